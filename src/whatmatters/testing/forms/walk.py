"""Scorers inside a walk: called with a block's tokens, they score each. Run here by `score_tokens`, as an action would."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import Entry
from whatmatters.core.data import Calibration
from whatmatters.core.errors import NonFiniteError
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.score.tokens import TokenContext, score_tokens
from whatmatters.testing.families import build, inputs
from whatmatters.testing.forms import Check, Form
from whatmatters.testing.forms.action import cast, poisoned
from whatmatters.testing.laws import check_scores
from whatmatters.testing.state import changes, state_of

__all__ = ["FORM"]

Subject = tuple[nn.Module, Calibration]


def subject(seed: int, family: str = "llama", other: bool = False) -> Subject:
    """A tiny model and sequences, one of them padded; their length is the seed's too. `other`: with other ids where padding is."""
    ids = inputs(family, samples=3, length=16 + seed, seed=seed + 1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 11:] = False
    if other:
        ids = torch.where(valid, ids, 5)
    return build(family, seed), Calibration.from_tensors(ids, valid, batch=2)


def call(entry: Entry, subject: Any, **settings: Any) -> Scores:
    """Scores of all tokens at every block."""
    model, text = subject
    return score_tokens(model, text, entry.function if not settings else lambda context: entry.function(context, **settings))


def outcome(result: Scores, subject: Subject) -> Mapping[str, Tensor]:
    """The scores by block."""
    return dict(result.values)


def contexts(seed: int) -> list[TokenContext]:
    """One context at each block, as a scorer is given it, kept beyond the walk; its outputs are made already."""
    kept: list[TokenContext] = []

    def keep(context: TokenContext) -> Tensor:
        _ = context.attention_received, context.outputs
        kept.append(context)
        return torch.ones(context.shape)

    score_tokens(*subject(seed), keep)
    return kept


def scores_every_token_at_every_block(entry: Entry) -> None:
    """Each block has a score for each token, and padding is marked."""
    good = subject(0)
    scores = call(entry, good)
    assert scores.values.keys() == set(structure(good[0]).blocks), "score at every block"
    assert scores.unit == entry.unit == "token", f"the entry says unit {entry.unit!r}; scorers in a walk score tokens"
    assert scores.valid is not None and good[1].valid is not None
    assert all(torch.equal(mask, good[1].valid) for mask in scores.valid.values()), "the valid positions are not those of the data"


def padding_has_no_say(entry: Entry) -> None:
    """Other ids at padded positions change no score of a token."""
    results = []
    for other in (False, True):
        good = subject(0, other=other)
        results.append(torch.stack([value[good[1].valid] for value in call(entry, good).values.values()]))
    assert torch.allclose(results[0], results[1], atol=1e-5), "look at `context.tokens`: padding took part in the scores of tokens"


def scores_obey_their_laws(entry: Entry) -> None:
    """Finite, immutable, ranked without padding, the same from a file."""
    check_scores(call(entry, subject(0)))


def context_is_only_read(entry: Entry) -> None:
    """What a scorer is told stays as it was."""
    for context in contexts(0):
        told = {name: getattr(context, name) for name in ("ids", "inputs", "valid", "frequencies", "outputs", "attention_received")}
        before = state_of(told)
        entry.function(context)
        assert not changes(before, state_of(told)), f"the scorer wrote into {changes(before, state_of(told))[0]} of its context; copy first"


def answers_with_one_number_a_token(entry: Entry) -> None:
    """A floating-point tensor of the context's shape, on its device, without a graph."""
    for context in contexts(0):
        scores = entry.function(context)
        assert isinstance(scores, Tensor) and scores.is_floating_point(), "return a floating-point tensor"
        assert tuple(scores.shape) == context.shape, (
            f"the scores have shape {tuple(scores.shape)}; return {context.shape}: (samples, length)"
        )
        assert scores.device == context.inputs.device, "return the scores on the device of `context.inputs`"
        assert not scores.requires_grad, "the scores carry a graph; detach them"


def sequences_are_scored_alike(entry: Entry) -> None:
    """Micro-batches do not matter: each sequence has the same scores in batches of one and of three."""
    model, data = subject(0)
    by_batch = [call(entry, (model, Calibration.from_tensors(data.inputs, data.valid, batch=size))) for size in (1, 3)]
    for name, value in by_batch[0].values.items():
        assert torch.allclose(value, by_batch[1].values[name], rtol=1e-4, atol=1e-5), f"the scores at {name} depend on the micro-batch"


def control_knows_nothing(entry: Entry) -> None:
    """The scores of a control are the same at every token."""
    scores = call(entry, subject(0))
    assert scores.valid is not None
    told = torch.cat([value[scores.valid[name]] for name, value in scores.values.items()])
    assert bool((told == told[0]).all()), f"{entry.slug} tells tokens apart: leave out control=True"


def bad_numbers_do_not_pass(entry: Entry) -> None:
    """A model with NaN in a block is refused, naming it."""
    try:
        call(entry, poisoned(torch.nan)(subject(0)))
    except NonFiniteError as error:
        assert "model.layers.1" in str(error), f"name the block in the message: {error}"
    else:
        raise AssertionError("a block that gives NaN was scored")


def other_families_work(entry: Entry) -> None:
    """Learned positions, per-head norms, experts."""
    for family in ("qwen3", "gpt2", "mixtral"):
        scores = call(entry, subject(0, family))
        assert all(torch.isfinite(value).all() for value in scores.values.values()), f"not finite on the {family} model"


CHECKS = (
    Check("scores-every-token-at-every-block", scores_every_token_at_every_block),
    Check("padding-has-no-say", padding_has_no_say),
    Check("scores-obey-their-laws", scores_obey_their_laws),
    Check("context-is-only-read", context_is_only_read),
    Check("answers-with-one-number-a-token", answers_with_one_number_a_token),
    Check("sequences-are-scored-alike", sequences_are_scored_alike),
    Check("control-knows-nothing", control_knows_nothing, lambda entry: entry.control),
    Check("bad-numbers-do-not-pass", bad_numbers_do_not_pass),
    Check("other-families-work", other_families_work),
)

FORM = Form(
    subject=subject,
    call=call,
    outcome=outcome,
    bad_subjects={"a module without blocks": lambda good: (nn.Linear(8, 8), good[1])},
    bad_settings={"share": [-0.1, 1.5], "tokens_per_cluster": [0], "steps": [0]},
    without_text=lambda good: (good[0], None),
    cast=cast,
    checks=CHECKS,
)
