"""Scorers that run ahead: a model and calibration data in, Scores out, the model unchanged."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from whatmatters.core.catalog import Entry
from whatmatters.core.errors import NonFiniteError
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.testing.forms import Check, Form
from whatmatters.testing.forms.action import BAD_SUBJECTS, call, cast, poisoned, refuses_foreign_data, subject, without_text
from whatmatters.testing.laws import check_scores

__all__ = ["FORM"]

SAMPLES: dict[str, Any] = {"group_size": 8}


def outcome(result: Scores, subject: Any) -> Mapping[str, Tensor]:
    """The scores by name."""
    return dict(result.values)


def settings(entry: Entry) -> dict[str, Any]:
    """The samples that the entry takes."""
    return {name: value for name, value in SAMPLES.items() if name in signature(entry.function).parameters}


def variants(entry: Entry) -> list[dict[str, Any]]:
    """The settings that change what is scored: unit and names."""
    parameters = signature(entry.function).parameters
    units = [{"unit": "layer"}, {"unit": "weight"}] if "unit" in parameters else [{}]
    keys = [{"by": "block"}, {"by": "site"}] if "by" in parameters else [{}]
    return [{**settings(entry), **unit, **by} for unit in units for by in keys]


def returns_scores_of_the_model(entry: Entry) -> None:
    """Unit, names and structure are those of the model and of the entry."""
    model, data = subject(0)
    found = structure(model)
    scores = call(entry, (model, data), **settings(entry))
    assert isinstance(scores, Scores), f"{entry.slug} returned {type(scores).__name__}; return Scores"
    assert scores.unit == entry.unit, f"the scores are of unit {scores.unit!r} and the entry says {entry.unit!r}"
    assert scores.structure == found, "give Scores the structure of the model: structure=..., so that plans know sizes and ties"
    covered = {site.name for site in found.sites} <= scores.lift(found).values.keys() if scores.unit == "layer" else True
    assert covered, "score every block or every site"


def scores_obey_their_laws(entry: Entry) -> None:
    """In every unit and by every name it offers."""
    for given in variants(entry):
        check_scores(call(entry, subject(0), **given))


def structure_at_hand_gives_the_same(entry: Entry) -> None:
    """Given what `structure` found, the scores are those without it."""
    good = subject(0)
    again = call(entry, subject(0), **settings(entry), structure=structure(good[0]))
    first = call(entry, good, **settings(entry))
    assert all(torch.equal(first.values[name], again.values[name]) for name in first.values), "use `structure` only to save finding it"


def scores_are_their_own(entry: Entry) -> None:
    """Changing the model afterwards changes no score."""
    good = subject(0)
    scores = call(entry, good, **settings(entry))
    before = {name: value.clone() for name, value in scores.values.items()}
    with torch.no_grad():
        for parameter in good[0].parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(before[name], scores.values[name]) for name in before), "the scores share memory with the model: copy"


def control_knows_nothing(entry: Entry) -> None:
    """The scores of a control are the same for other weights and other data."""
    first, second = (call(entry, subject(seed), **settings(entry)) for seed in (0, 1))
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.values), (
        f"{entry.slug} depends on the model or the data: leave out control=True"
    )


def names_the_place_of_a_bad_number(entry: Entry) -> None:
    """The message about NaN or infinity names the site or the block."""
    for value in (torch.nan, torch.inf):
        try:
            call(entry, poisoned(value)(subject(0)), **settings(entry))
        except NonFiniteError as error:
            assert "model.layers.1" in str(error), f"name the site that holds {value} in the message: {error}"
        else:
            raise AssertionError(f"{entry.slug} took a weight of {value}; Scores refuse NaN themselves, so do not hide it")


def other_families_work(entry: Entry) -> None:
    """Conv1D, per-head norms, slices of experts: whatever has sites."""
    for family in ("qwen3", "gpt2", "mixtral"):
        scores = call(entry, subject(0, family), **settings(entry))
        assert all(torch.isfinite(value).all() for value in scores.values.values()), f"not finite on the {family} model"


def data_decide_values_not_names(entry: Entry) -> None:
    """More data in other micro-batches score the same sites: names and shapes do not depend on the data."""
    model, data = subject(0)
    assert data is not None
    other = type(data).from_tensors(data.inputs[:3], batch=3)
    first, second = call(entry, (model, data), **settings(entry)), call(entry, (model, other), **settings(entry))
    shapes = [{name: value.shape for name, value in scores.values.items()} for scores in (first, second)]
    assert shapes[0] == shapes[1], "what is scored depends on the data; score all sites"


def takes(*names: str) -> Any:
    """Applies to entries that have one of these parameters."""
    return lambda entry: any(name in signature(entry.function).parameters for name in names)


CHECKS = (
    Check("returns-scores-of-the-model", returns_scores_of_the_model),
    Check("scores-obey-their-laws", scores_obey_their_laws),
    Check("structure-at-hand-gives-the-same", structure_at_hand_gives_the_same, takes("structure")),
    Check("scores-are-their-own", scores_are_their_own),
    Check("control-knows-nothing", control_knows_nothing, lambda entry: entry.control),
    Check("names-the-place-of-a-bad-number", names_the_place_of_a_bad_number, lambda entry: not entry.control),
    Check("refuses-foreign-data", refuses_foreign_data, lambda entry: entry.needs_text),
    Check("other-families-work", other_families_work),
    Check("data-decide-values-not-names", data_decide_values_not_names, lambda entry: entry.needs_text),
)

FORM = Form(
    subject=subject,
    call=call,
    outcome=outcome,
    samples=SAMPLES,
    bad_subjects={what: broken for what, broken in BAD_SUBJECTS.items() if what != "NaN in a weight" and what != "infinity in a weight"},
    bad_settings={
        "levels": [(), (0, 4)],
        "group_size": [0, -2, 7],
        "bits": [0, 9],
        "z": [-1.0],
        "eps": [0.0, -1.0],
        "draws": [0],
        "samples": [0],
    },
    without_text=without_text,
    cast=cast,
    checks=CHECKS,
)
