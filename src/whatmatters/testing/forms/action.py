"""Actions: a model and calibration data in, the model changed in one last step, a Report out. Quantizers and pruners."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import Entry
from whatmatters.core.data import Calibration
from whatmatters.core.errors import DataError, ModelError, NonFiniteError, WhatMattersError
from whatmatters.core.report import Report
from whatmatters.core.sites import structure
from whatmatters.testing.families import build, inputs
from whatmatters.testing.forms import Check, Form
from whatmatters.testing.state import changes, state_of

__all__ = ["FORM"]

Subject = tuple[nn.Module, Calibration | None]


def subject(seed: int, family: str = "llama") -> Subject:
    """A tiny model and data for it."""
    return build(family, seed), Calibration.from_tensors(inputs(family, samples=4, length=16, seed=seed + 1), batch=2)


def call(entry: Entry, subject: Subject, **settings: Any) -> Any:
    """As everyone calls it."""
    return entry.function(*subject, **settings)


def outcome(result: Report, subject: Subject) -> Mapping[str, Tensor]:
    """The weights afterwards."""
    return {name: value.detach().clone() for name, value in subject[0].state_dict().items()}


def poisoned(value: float) -> Callable[[Subject], Subject]:
    """A weight of the second block is no number."""

    def broken(subject: Subject) -> Subject:
        with torch.no_grad():
            subject[0].get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = value
        return subject

    return broken


def whole_numbers(subject: Subject) -> Subject:
    """A model whose weights are integers."""
    for module in subject[0].modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter((parameter.detach() * 10).to(torch.int8), requires_grad=False))
    return subject


def without_text(subject: Subject) -> Subject:
    """The model alone."""
    return subject[0], None


def cast(subject: Subject, dtype: torch.dtype) -> Subject:
    """The model in another type; token ids stay."""
    return subject[0].to(dtype), subject[1]


BAD_SUBJECTS: dict[str, Callable[[Subject], Subject]] = {
    "a module without blocks": lambda good: (nn.Linear(8, 8), good[1]),
    "NaN in a weight": poisoned(torch.nan),
    "infinity in a weight": poisoned(torch.inf),
    "whole-number weights": whole_numbers,
}
"""Models that nothing can be done with; shared with the scorers."""

SAMPLES: dict[str, Any] = {"group_size": 8, "average_bits": 4.5, "levels": (2, 4, 8), "sparsity": 0.5, "allow_uncovered": True}


def settings(entry: Entry) -> dict[str, Any]:
    """The samples that the entry takes."""
    from inspect import signature

    return {name: value for name, value in SAMPLES.items() if name in signature(entry.function).parameters}


def returns_a_report_on_known_sites(entry: Entry) -> None:
    """Method, job and sites of the report are those of the call, and each site has one row."""
    good = subject(0)
    names = [site.name for site in structure(good[0]).sites]
    report = call(entry, good, **settings(entry))
    assert isinstance(report, Report), f"{entry.slug} returned {type(report).__name__}; return a Report"
    assert (report.method, report.job) == (entry.slug, entry.job), f"the report says {report.method!r}, {report.job!r}; say {entry.slug!r}"
    told = [row["site"] for row in report.rows]
    assert sorted(told) == sorted(set(told)) and set(told) <= set(names), "give the report one row for each site that was worked on"
    assert report.seconds > 0, "fill in the report's seconds: use core.report.measured"
    assert report.settings, "tell in the report's settings what was asked for"


def report_survives_a_file(entry: Entry) -> None:
    """Saved and loaded, the report is equal."""
    report = call(entry, subject(0), **settings(entry))
    with tempfile.TemporaryDirectory() as folder:
        report.save(Path(folder) / "report.json")
        assert Report.load(Path(folder) / "report.json") == report, "put only what JSON holds into settings, rows and notes of the report"


def names_the_place_of_a_bad_number(entry: Entry) -> None:
    """The message about NaN or infinity names the site."""
    for value in (torch.nan, torch.inf):
        try:
            call(entry, poisoned(value)(subject(0)), **settings(entry))
        except NonFiniteError as error:
            assert "model.layers.1" in str(error), f"name the site that holds {value} in the message: {error}"
        else:
            raise AssertionError(f"{entry.slug} took a weight of {value}; check with core.actions.check_sites")


def asks_before_leaving_weights_uncovered(entry: Entry) -> None:
    """A weight that no site covers is refused unless allowed, and nothing is changed."""
    good = subject(0, "mixtral")
    before = state_of(good)
    try:
        call(entry, good, **settings(entry) | {"allow_uncovered": False})
    except WhatMattersError as error:
        assert "allow_uncovered" in str(error), f"tell how it is allowed: allow_uncovered=True; the message is {error}"
    else:
        raise AssertionError("weights that no site covers were left without being allowed; call core.actions.check_sites")
    assert not changes(before, state_of(good)), f"changed by a refused call: {changes(before, state_of(good))[:3]}"


def gradients_are_neither_made_nor_switched(entry: Entry) -> None:
    """Frozen weights stay frozen, the others not, and no gradient is left, in a model that is partly training and partly frozen."""
    model, data = subject(0)
    model.train().get_submodule("model.layers.1").eval()
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    told = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    call(entry, (model, data), **settings(entry))
    left = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    wrong = [name for name in left if left[name] != told.get(name, (True, left[name][1]))]
    assert not wrong, f"requires_grad or dtype of {wrong[:3]} is not as it was; write into the tensors, inside torch.no_grad()"
    assert {name: module.training for name, module in model.named_modules()} == modes, "put every module's own training mode back"
    assert all(p.grad is None for p in model.parameters()), "leave no gradient in the model"


def leaves_forward_and_attention_alone(entry: Entry) -> None:
    """No replaced forward and no other attention implementation stays in the model."""
    model: Any
    model, data = subject(0)
    attention = model.config._attn_implementation
    call(entry, (model, data), **settings(entry))
    replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not replaced, f"the forward of {replaced[:3]} stays replaced; use a context manager"
    assert model.config._attn_implementation == attention, "put the attention implementation back"


def refuses_foreign_data(entry: Entry) -> None:
    """Token ids beyond the vocabulary are refused with an error of ours, and the model stays as it was."""
    model, _ = subject(0)
    before = state_of(model)
    data = Calibration.from_tensors(torch.full((2, 8), 10_000))
    try:
        call(entry, (model, data), **settings(entry))
    except DataError:
        assert not changes(before, state_of(model)), "a refused call changed the model"
    else:
        raise AssertionError("calibration data of another model were taken; call core.data.check_fits first")


def other_families_work(entry: Entry) -> None:
    """Conv1D, per-head norms, slices of experts: a model is worked on, or refused as it was."""
    for family in ("gpt2", "qwen3", "mixtral"):
        good = subject(0, family)
        before = state_of(good)
        try:
            rows = call(entry, good, **settings(entry)).rows
        except ModelError:
            assert not changes(before, state_of(good)), f"the {family} model was refused after it was changed"
            continue
        assert rows, f"no row for a site of the {family} model"
        wrong = [name for name, value in good[0].state_dict().items() if not torch.isfinite(value).all()]
        assert not wrong, f"the {family} model has {wrong[:3]} not finite afterwards"


CHECKS = (
    Check("returns-a-report-on-known-sites", returns_a_report_on_known_sites),
    Check("report-survives-a-file", report_survives_a_file),
    Check("names-the-place-of-a-bad-number", names_the_place_of_a_bad_number),
    Check("asks-before-leaving-weights-uncovered", asks_before_leaving_weights_uncovered),
    Check("gradients-are-neither-made-nor-switched", gradients_are_neither_made_nor_switched),
    Check("leaves-forward-and-attention-alone", leaves_forward_and_attention_alone),
    Check("refuses-foreign-data", refuses_foreign_data, lambda entry: entry.needs_text),
    Check("other-families-work", other_families_work),
)

FORM = Form(
    subject=subject,
    call=call,
    outcome=outcome,
    samples=SAMPLES,
    bad_subjects=BAD_SUBJECTS,
    bad_settings={
        "bits": [0, 1, 9],
        "group_size": [0, -2, 7],
        "damping": [0.0, -1.0],
        "average_bits": [1.0, 99.0],
        "levels": [(), (0, 4), (4, 9)],
        "sparsity": [-0.1, 1.5],
        "scope": ["everywhere", "3:2", "2:5"],
        "pattern": ["everywhere", "3:2"],
        "block_size": [0],
        "r_min": [-1.0, 1.0],
        "power": [0.0],
        "expand_factor": [0],
        "rotate": ["sideways"],
        "position_norm": ["cubic"],
        "token_scores": ["no-such-score"],
        "layer_scores": ["no-such-score"],
        "backend": ["no-such-quantizer"],
    },
    changes=True,
    atomic=True,
    without_text=without_text,
    cast=cast,
    checks=CHECKS,
)
