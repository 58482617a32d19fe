"""Every compatible pair of a scorer and an action, found from what actions declare: the parameters that take scores or plans.

`token_scores` takes token scorers, `layer_scores` layer scorers, `bits` plans of bits and `sparsity` plans of ratios from layer scores;
`prune.apply` takes masks from weight scores. Whatever does not fit must be refused with an error of ours.
"""

import functools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whatmatters.core import allocation, catalog
from whatmatters.core.catalog import Entry
from whatmatters.core.errors import WhatMattersError
from whatmatters.core.plans import Plan
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.prune.apply import apply
from whatmatters.score.tokens import score_tokens
from whatmatters.testing.contract import parameters, settings, subject
from whatmatters.testing.laws import check_plan
from whatmatters.testing.state import changes, state_of

__all__ = ["Pair", "misfits", "pairs"]

AVERAGE, LEVELS, GROUP, SPARSITY = 4.5, (2, 4, 8), 8, 0.4
PLANS = {"bits": "bits", "sparsity": "ratio"}
"""Parameters of actions that take plans, and of which kind."""


@dataclass(frozen=True)
class Pair:
    """A scorer and an action (None: `prune.apply`) that fit, and how the scores reach it."""

    scorer: Entry
    action: Entry | None
    by: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.scorer.slug} -> {self.action.slug if self.action else 'apply'} ({self.by})"

    def run(self) -> None:
        """Score, allocate, act; raises AssertionError where the action did not do what the scores said."""
        if self.by in ("token_scores", "layer_scores"):
            assert self.action is not None
            model, data = subject(self.action)
            report = self.action.function(model, data, **settings(self.action) | {self.by: self.scorer.slug})
            assert report.settings[self.by] == self.scorer.slug, f"the report does not say that {self.by} were {self.scorer.slug}"
            assert report.rows, "the report has no rows"
        elif self.by in PLANS:
            self._planned()
        else:
            self._masked()

    def _planned(self) -> None:
        assert self.action is not None
        plan = plans(self.scorer)[self.by]
        model, data = subject(self.action)
        report = self.action.function(model, data, **settings(self.action) | {self.by: plan})
        told = {row["site"]: row for row in report.rows}
        assert set(told) == set(plan.values), "the rows of the report are not those of the plan"
        for name, value in plan.values.items():
            if self.by == "bits":
                assert told[name]["bits"] == value, f"{name} has {told[name]['bits']} bits; the plan says {value}"
            else:
                site = structure(model).site(name)
                gone = int((site.view(model) == 0).sum())
                assert float(value) * site.size - 1e-6 <= gone <= float(value) * site.size + site.shape[0], f"{gone} weights of {name} went"

    def _masked(self) -> None:
        plan = plans(self.scorer)["masks"]
        model, data = subject(self.scorer)
        report = apply(model, plan, data, repair="sparsegpt" if self.by == "masks, repaired" else "none", allow_uncovered=True)
        assert isinstance(report, Report)
        for name, mask in plan.values.items():
            weight = structure(model).site(name).view(model)
            assert isinstance(mask, Tensor)
            assert torch.equal(weight != 0, mask), f"the zeros of {name} are not those of the mask"


def pairs() -> list[Pair]:
    """All that fit."""
    found = []
    for action in (entry for entry in catalog.methods() if entry.form == "action"):
        declared = parameters(action)
        if "token_scores" in declared:
            found += [Pair(scorer, action, "token_scores") for scorer in catalog.scorers("token", "walk")]
        if "layer_scores" in declared:
            found += [Pair(scorer, action, "layer_scores") for scorer in catalog.scorers("layer", "ahead")]
        for name in PLANS:
            if name in declared and Plan in typing.get_args(declared[name].annotation):
                found += [Pair(scorer, action, name) for scorer in catalog.scorers("layer", "ahead")]
    for scorer in weight_scorers():
        found += [Pair(scorer, None, how) for how in ("masks", "masks, repaired")]
    return found


def weight_scorers() -> list[Entry]:
    """Scorers that give one score a weight."""
    return [entry for entry in catalog.scorers(when="ahead") if entry.unit == "weight" or "unit" in parameters(entry)]


@functools.cache
def scores_of(scorer: Entry, unit: str = "layer") -> Scores:
    """The scores of the tiny model, made once: any number of plans is spent from them."""
    model, data = subject(scorer)
    if scorer.when == "walk":
        return score_tokens(model, data, scorer.slug)
    given = settings(scorer) | ({"unit": unit} if "unit" in parameters(scorer) else {})
    scores: Scores = scorer.function(model, data, **given)
    return scores


@functools.cache
def plans(scorer: Entry) -> dict[str, Plan]:
    """A plan of each kind that the scorer's unit allows, each checked against its laws."""
    scores = scores_of(scorer)
    made = {
        "bits": allocation.bits(scores, AVERAGE, LEVELS, group_size=GROUP),
        "sparsity": allocation.ratios(scores, SPARSITY),
    }
    for plan in made.values():
        check_plan(plan, scores)
    if scorer in weight_scorers():
        made["masks"] = allocation.masks(scores_of(scorer, "weight"), SPARSITY)
        check_plan(made["masks"], scores_of(scorer, "weight"))
    return made


def misfits() -> Iterator[tuple[str, Callable[[], None]]]:
    """What does not fit: a name, and a function that raises AssertionError unless it is refused and the model left as it was."""
    layer, token = catalog.scorers("layer", "ahead"), catalog.scorers("token", "walk")
    masked = weight_scorers()[0]
    for action in (entry for entry in catalog.methods() if entry.form == "action"):
        declared = parameters(action)
        for name, wrong in (("token_scores", layer), ("layer_scores", token)):
            if name in declared:
                yield from ((f"{s.slug} as {name} of {action.slug}", functools.partial(_refused, action, name, s.slug)) for s in wrong)
                yield f"Scores of the wrong unit as {name} of {action.slug}", functools.partial(_refused, action, name, scores_of(wrong[0]))
        for name, kind in PLANS.items():
            if name in declared and Plan in typing.get_args(declared[name].annotation):
                others = [plan for plan in plans(masked).values() if plan.kind != kind]
                yield from (
                    (f"a plan of kind {p.kind} as {name} of {action.slug}", functools.partial(_refused, action, name, p)) for p in others
                )
    yield "a plan of bits to prune.apply", functools.partial(_rejects, lambda: apply(subject(masked)[0], plans(masked)["bits"]))
    yield "layer scores to masks", functools.partial(_rejects, lambda: allocation.masks(scores_of(layer[0]), SPARSITY))
    for scores in (scores_of(masked, "weight"), scores_of(token[0])):
        yield f"{scores.unit} scores to bits", functools.partial(_rejects, functools.partial(allocation.bits, scores, AVERAGE))
        yield f"{scores.unit} scores to ratios", functools.partial(_rejects, functools.partial(allocation.ratios, scores, SPARSITY))


def _refused(action: Entry, name: str, value: Any) -> None:
    on = subject(action)
    before = state_of(on)
    _rejects(lambda: action.function(*on, **settings(action) | {name: value}))
    assert not changes(before, state_of(on)), "the refused call changed the model"


def _rejects(call: Callable[[], object]) -> None:
    try:
        call()
    except WhatMattersError:
        return
    raise AssertionError("it was taken; an action that cannot use a unit or a kind of plan refuses it")
