"""Every check of the contract can fail: small entries, each broken in one way, are caught by the check that is meant for it alone."""

import contextlib
import dataclasses
import random
import subprocess
import sys
import types
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.catalog import Entry, door, with_data
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.progress import track
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure as find
from whatmatters.quantize import rtn
from whatmatters.testing import check_scorer, contract


def magnitudes(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """Mean magnitude of the weights of each block."""
    found = structure or find(model)
    values = {}
    for block in track(found.blocks, "toy", len(found.blocks), progress):
        values[block] = torch.stack([site.view(model).float().abs().mean() for site in found.in_block(block)]).mean()
    return Scores("layer", values, "toy", {}, structure=found)


def rounded(model: nn.Module, calibration: Calibration | None = None, **settings: Any) -> Report:
    """Round to nearest, under the name of the toy."""
    report = rtn(model, calibration, **settings)
    report.method = "toy"
    return report


BROKEN: list[tuple[set[str], Entry]] = []


def broken(*caught: str, kind: str = "scorer", text: bool = False, **flags: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A toy entry and the checks that must fail on it, all others must hold."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = door(f"{'score' if kind == 'scorer' else 'quantize'}.toy")(with_data(function) if text else function)
        if kind == "scorer":
            entry = Entry("toy", wrapped, "scorer", "score", "layer", when="ahead", form="ahead", needs_text=text)
        elif kind == "walk":
            entry = Entry("toy", wrapped, "scorer", "score", "token", when="walk", form="walk", needs_text=True)
        else:
            entry = Entry("toy", wrapped, "baseline", "quantize", "layer", action="quantize", needs_text=text)
        BROKEN.append((set(caught), dataclasses.replace(entry, **flags)))
        return function

    return decorate


@broken()
def nothing_wrong(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """Nothing is wrong with this one."""
    return magnitudes(model, calibration, structure=structure, progress=progress)


@broken("global-randomness-is-left-alone")
def draws_from_torch(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """Moves the global generator of torch."""
    torch.rand(1)
    return magnitudes(model, calibration, structure=structure, progress=progress)


@broken("global-randomness-is-left-alone")
def draws_from_numpy(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """Moves the global generator of numpy."""
    np.random.rand()  # noqa: NPY002
    return magnitudes(model, calibration, structure=structure, progress=progress)


@broken("global-randomness-is-left-alone", "same-call-gives-the-same-bits", "works-without-gradients", "structure-at-hand-gives-the-same")
def reads_a_generator(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """Its answer depends on Python's generator, and is another one in each call."""
    return shifted(magnitudes(model, calibration, structure=structure, progress=progress), random.random())


@broken("global-randomness-is-left-alone")
def seeds_for_itself(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """The same bits in each call, at the cost of everybody else's."""
    torch.manual_seed(0)
    return magnitudes(model, calibration, structure=structure, progress=progress)


def shifted(scores: Scores, by: float) -> Scores:
    return dataclasses.replace(scores, values={name: value + by for name, value in scores.values.items()})


@broken("modes-and-hooks-are-left-as-found", "inputs-are-not-modified")
def leaves_a_hook(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """A hook stays in the model."""
    scores = magnitudes(model, calibration, structure=structure)
    model.register_forward_hook(print_nothing)
    return scores


def print_nothing(*args: Any) -> None:
    """Says nothing."""


@broken("modes-and-hooks-are-left-as-found")
def leaves_the_mode(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """The model comes back in eval mode, which is the mode it mostly came in."""
    scores = magnitudes(model, calibration, structure=structure)
    model.eval()
    return scores


@broken("inputs-are-not-modified")
def normalizes_in_place(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """The calibration data are shifted where they lie; with the scores it makes this has nothing to do."""
    scores = magnitudes(model, calibration, structure=structure)
    if calibration is not None and calibration.inputs.max() < 64:
        calibration.inputs.add_(1).clamp_(max=63)
    return scores


@broken("inputs-are-not-modified")
def freezes_the_model(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """The weights take no gradients any more."""
    scores = magnitudes(model, calibration, structure=structure)
    model.requires_grad_(False)
    return scores


@broken("defaults-survive-a-call", "defaults-are-immutable")
def collects_in_a_default(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    seen: list[int] = [],  # noqa: B006
    structure: Any = None,
) -> Scores:
    """The default grows with each call."""
    seen.append(1)
    return magnitudes(model, calibration, structure=structure)


@broken("first-interruption-leaves-no-trace", "second-interruption-leaves-no-trace", "last-interruption-leaves-no-trace")
def swallows_interruptions(
    model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None
) -> Scores:
    """Ctrl-C does nothing."""

    def quiet(label: str, done: int, total: int) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            progress(label, done, total)

    return magnitudes(model, calibration, structure=structure, progress=quiet if progress else None)


@broken("second-interruption-leaves-no-trace")
def restores_unless_interrupted(
    model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None
) -> Scores:
    """The mode is put back at the end, and not in a finally."""
    told: list[int] = []

    def between(label: str, done: int, total: int) -> None:
        told.append(done)
        modes = model.training
        if len(told) == 2:
            model.eval()
        progress(label, done, total)
        model.train(modes)

    return magnitudes(model, calibration, structure=structure, progress=between if progress else None)


@broken("progress-is-told-in-order")
def counts_to_nowhere(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, progress: Any = None) -> Scores:
    """The bar never reaches its end."""
    short = None if progress is None else lambda label, done, total: progress(label, done, total + 1)
    return magnitudes(model, calibration, structure=structure, progress=short)


@broken("gradients-are-really-needed", needs_gradients=True)
def boasts_of_gradients(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Says that it needs gradients."""
    return magnitudes(model, calibration, structure=structure)


@broken("works-without-gradients")
def hides_its_gradients(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Needs gradients and does not say so."""
    scores = magnitudes(model, calibration, structure=structure)
    with torch.enable_grad():
        leaf = torch.ones(1, requires_grad=True)
        (grad,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return shifted(scores, float(grad))


@broken("text-is-needed-as-claimed")
def hides_its_text(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Needs text and does not say so."""
    scores = magnitudes(model, calibration, structure=structure)
    if calibration is None:
        raise InputError("there is no text to look at")
    return shifted(scores, 1.0)


@broken("text-is-needed-as-claimed", "refuses-foreign-data", needs_text=True)
def boasts_of_text(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Says that it needs text and never looks at it."""
    return magnitudes(model, calibration, structure=structure)


@broken("control-knows-nothing", control=True)
def a_control_that_knows(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Says that it knows nothing."""
    return magnitudes(model, calibration, structure=structure)


@broken("outcome-depends-on-the-subject")
def looks_at_nothing(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Later blocks matter more, in every model."""
    scores = magnitudes(model, calibration, structure=structure)
    return dataclasses.replace(scores, values={name: torch.tensor(float(i)) for i, name in enumerate(scores.values)})


@broken("nothing-is-printed")
def talks(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Prints what it does."""
    print("scoring", file=sys.stderr)
    return magnitudes(model, calibration, structure=structure)


@broken("process-is-left-as-found")
def switches_the_process(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Changes how the process computes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return magnitudes(model, calibration, structure=structure)


@broken("names-the-place-of-a-bad-number")
def hides_bad_numbers(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Turns NaN into zero."""
    found = structure or find(model)
    values = {
        b: torch.stack([s.view(model).float().nan_to_num().abs().clamp(max=9).mean() for s in found.in_block(b)]).sum()
        for b in found.blocks
    }
    return Scores("layer", values, "toy", {}, structure=found)


@broken("returns-scores-of-the-model", unit="weight")
def scores_another_unit(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Says unit weight, gives layers."""
    return magnitudes(model, calibration, structure=structure)


@broken("structure-at-hand-gives-the-same")
def trusts_no_structure(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Another answer where the structure is given."""
    return shifted(magnitudes(model, calibration, structure=structure), 0.0 if structure is None else 1.0)


@broken("unknown-settings-are-refused")
def takes_anything(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None, no_such_setting: int = 0) -> Scores:
    """A mistyped setting passes."""
    return magnitudes(model, calibration, structure=structure)


@broken("settings-are-keyword-only")
def settings_by_position(model: nn.Module, calibration: Calibration | None = None, scale: float = 1.0, structure: Any = None) -> Scores:
    """A setting that can be given by position."""
    return shifted(magnitudes(model, calibration, structure=structure), scale)


@broken("bad-settings-are-refused")
def takes_bad_settings(model: nn.Module, calibration: Calibration | None = None, *, bits: int = 4, structure: Any = None) -> Scores:
    """Zero bits pass."""
    return magnitudes(model, calibration, structure=structure)


@broken("bad-settings-are-refused")
def raises_foreign_errors(model: nn.Module, calibration: Calibration | None = None, *, bits: int = 4, structure: Any = None) -> Scores:
    """An error that nobody can catch by our class."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits are {bits}; expected 2 to 8")
    return magnitudes(model, calibration, structure=structure)


@broken("bad-settings-are-refused")
def says_too_little(model: nn.Module, calibration: Calibration | None = None, *, bits: int = 4, structure: Any = None) -> Scores:
    """A message of one word."""
    if not 2 <= bits <= 8:
        raise InputError("bits")
    return magnitudes(model, calibration, structure=structure)


@broken("bad-settings-are-refused")
def works_before_it_refuses(model: nn.Module, calibration: Calibration | None = None, *, bits: int = 4, structure: Any = None) -> Scores:
    """Refuses when it is too late."""
    scores = magnitudes(model, calibration, structure=structure)
    if not 2 <= bits <= 8:
        model.train()
        raise InputError(f"bits are {bits}; expected 2 to 8")
    return scores


@broken("bad-subjects-are-refused")
def unhelpful_about_models(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """A model without blocks ends in an error of Python's."""
    if isinstance(model, nn.Linear):
        raise AttributeError("blocks")
    return magnitudes(model, calibration, structure=structure)


@broken("dtypes-are-as-claimed")
def loses_a_dtype(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Refuses half precision, which it claims."""
    if next(model.parameters()).dtype == torch.float16:
        raise InputError("float16 is not supported")
    return magnitudes(model, calibration, structure=structure)


@broken("dtypes-are-as-claimed", dtypes=("float32",))
def takes_more_than_it_says(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Claims float32 alone, and takes all."""
    return magnitudes(model, calibration, structure=structure)


@broken("two-calls-share-nothing", kind="action")
def shares_its_rows(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False
) -> Report:
    """All reports have one list of notes."""
    report = rounded(model, calibration, group_size=group_size, allow_uncovered=allow_uncovered)
    report.notes = NOTES
    return report


NOTES: list[str] = []


@broken("gradients-are-neither-made-nor-switched", kind="action")
def freezes_what_it_rounds(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False
) -> Report:
    """Rounded weights are frozen."""
    report = rounded(model, calibration, group_size=group_size, allow_uncovered=allow_uncovered)
    model.requires_grad_(False)
    return report


@broken("first-interruption-leaves-no-trace", "second-interruption-leaves-no-trace", "last-interruption-leaves-no-trace", kind="action")
def changes_as_it_goes(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False, progress: Any = None
) -> Report:
    """What was done before an interruption stays done."""
    report = rounded(model, calibration, group_size=group_size, allow_uncovered=allow_uncovered)
    for _ in track(range(2), "toy", 2, progress):
        pass
    return report


@broken("returns-a-report-on-known-sites", kind="action")
def reports_under_another_name(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False
) -> Report:
    """The report is that of another method."""
    return rtn(model, calibration, group_size=group_size, allow_uncovered=allow_uncovered)


@broken("report-survives-a-file", kind="action")
def reports_a_tuple(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False
) -> Report:
    """A tuple comes back from JSON as a list."""
    report = rounded(model, calibration, group_size=group_size, allow_uncovered=allow_uncovered)
    report.settings["levels"] = (2, 4)
    return report


@broken("asks-before-leaving-weights-uncovered", kind="action")
def leaves_weights_uncovered(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False
) -> Report:
    """Nobody is asked."""
    return rounded(model, calibration, group_size=group_size, allow_uncovered=True)


@broken("leaves-forward-and-attention-alone", "modes-and-hooks-are-left-as-found", kind="action")
def replaces_forward(
    model: nn.Module, calibration: Calibration | None = None, *, group_size: int = 8, allow_uncovered: bool = False
) -> Report:
    """Listens for good."""
    report = rounded(model, calibration, group_size=group_size, allow_uncovered=allow_uncovered)
    model.forward = model.forward
    return report


@broken("padding-has-no-say", kind="walk")
def ranks_among_padding(context: Any) -> Tensor:
    """Divides by a mean in which padding counts."""
    norms = context.inputs.norm(dim=-1).float()
    return norms / norms.mean(dim=1, keepdim=True)


@broken("context-is-only-read", kind="walk")
def writes_into_its_context(context: Any) -> Tensor:
    """Rounds in place what it was told to look at."""
    if context.frequencies is not None:
        context.frequencies.clamp_(max=0)
    return context.inputs.norm(dim=-1).float()


@broken("sequences-are-scored-alike", "padding-has-no-say", kind="walk")
def depends_on_the_batch(context: Any) -> Tensor:
    """Divides by the largest of the micro-batch."""
    norms = context.inputs.norm(dim=-1).float()
    return norms / norms.sum()


@broken("scores-are-their-own")
def shares_memory(model: nn.Module, calibration: Calibration | None = None, *, structure: Any = None) -> Scores:
    """Gives views of the model's weights."""
    scores = magnitudes(model, calibration, structure=structure)
    first = next(iter(scores.values))
    views = {first: find(model).in_block(first)[0].view(model).detach()[0, 0]}
    object.__setattr__(
        scores, "values", MappingProxyType({**scores.values, **views}) if views[first].dtype == torch.float32 else scores.values
    )
    return scores


@pytest.mark.parametrize(("caught", "entry"), BROKEN, ids=[entry.function.__name__ for _, entry in BROKEN])
def test_it_is_caught_by_the_check_that_is_meant_for_it(caught: set[str], entry: Entry) -> None:
    contract._baseline.cache_clear()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        results = contract.run(entry)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        NOTES.clear()
    failed = {result.check: str(result.error) for result in results if result.error is not None}
    assert set(failed) == caught, failed
    assert all(len(message) > 20 for message in failed.values()), "a message says what the author must do"


# ---- documentation: looked at by the check alone


def documented(model: nn.Module, calibration: Calibration | None = None, *, bits: int = 4) -> Report:
    """Rounds to nearest.

    Args:
        model: any.
        calibration: ignored.
        bits: 2 to 8.

    Returns:
        A report.

    Raises:
        InputError: bits out of range.

    Example:
        >>> 1 + 1
        2

    References:
        Someone, 2024, arXiv 2401.00001.
    """
    raise NotImplementedError


def without(*words: str, **replaced: str) -> Callable[..., Any]:
    """The same function with another docstring."""
    text = documented.__doc__ or ""
    for word in words:
        text = text.replace(word, "")
    for old, new in replaced.items():
        text = text.replace(old, new)
    copied = types.FunctionType(documented.__code__, documented.__globals__, "documented", documented.__defaults__)
    copied.__kwdefaults__, copied.__annotations__, copied.__doc__ = documented.__kwdefaults__, documented.__annotations__, text
    copied.__module__ = documented.__module__
    return copied


def unannotated(model, *, bits=4):  # type: ignore[no-untyped-def]
    """Nobody knows what this takes."""


DOCUMENTATION = {
    "summary-is-one-sentence": without("."),
    "docstring-has-its-sections": without("Returns:"),
    "errors-are-documented": without(InputError="Mistake"),
    "parameters-are-explained": without("bits: 2 to 8."),
    "explanations-have-their-parameter": without(bits="width"),
    "example-runs": without(**{"        2\n": "        3\n"}),
    "paper-is-cited": without("2401.00001"),
    "everything-is-annotated": unannotated,
    "slug-is-a-literal": documented,
    "file-is-where-it-belongs": documented,
    "both-spellings-are-found": documented,
    "kind-and-unit-are-known": documented,
    "form-is-known": documented,
    "required-settings-have-a-sample": documented,
}


@pytest.mark.parametrize("name", DOCUMENTATION)
def test_documentation_is_caught(name: str) -> None:
    check = next(check for check in contract.GENERAL if check.name == name)
    entry = Entry("some-slug-" + "nobody-has", DOCUMENTATION[name], "baseline", "quantize", "layer", paper="2401.00001", action="quantize")
    entry = {
        "kind-and-unit-are-known": dataclasses.replace(entry, unit="atom"),
        "form-is-known": dataclasses.replace(entry, form="sonnet"),
        "required-settings-have-a-sample": dataclasses.replace(entry, function=needs_a_setting),
    }.get(name, entry)
    with pytest.raises((AssertionError, LookupError)):
        check.run(entry)


def needs_a_setting(model: nn.Module, *, depth_of_thought: int) -> Report:
    """A setting that no form knows."""
    raise NotImplementedError


def test_good_documentation_passes() -> None:
    entry = Entry("documented", documented, "baseline", "quantize", "layer", paper="2401.00001", action="quantize")
    names = set(DOCUMENTATION) - {"paper-is-cited", "file-is-where-it-belongs", "both-spellings-are-found"}
    for check in contract.GENERAL:
        if check.name in names:
            check.run(entry)


def test_every_general_check_is_shown_to_fail_or_needs_a_registered_entry() -> None:
    shown = set().union(*(caught for caught, _ in BROKEN)) | set(DOCUMENTATION)
    elsewhere = {
        "registering-twice-is-one-entry",  # about the catalog, not about an entry
        "listed-for-people-and-machines",
        "undoing-gives-the-subject-back",
        "result-survives-a-file",
        "result-is-strict-json",
        "outcome-is-finite",
        "settings-are-not-modified",
    }
    assert {check.name for check in contract.GENERAL} - shown == elsewhere


# ---- forms of results that toys of the library's forms do not have


class Odd:
    """A result with everything wrong with it."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def save(self, path: Any) -> None:
        path.write_bytes(b"\x80pickle")

    @classmethod
    def load(cls, path: Any) -> "Odd":
        return cls(1.0)

    def to_json(self) -> dict[str, float]:
        return {"value": float("nan")}


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("result-survives-a-file", lambda levels=(2,): Odd()),
        ("result-is-strict-json", lambda levels=(2,): Odd()),
        ("outcome-is-finite", lambda levels=(2,): Odd(float("nan"))),
        ("settings-are-not-modified", lambda levels: levels.append(1) or Odd()),
        ("undoing-gives-the-subject-back", lambda levels=(2,): Odd()),
    ],
)
def test_results_are_caught(name: str, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from whatmatters.testing.forms import Form

    def call(entry: Entry, subject: nn.Module, **settings: Any) -> Any:
        subject.weight.data.add_(1)
        return entry.function(**settings)

    odd = Form(
        subject=lambda seed: nn.Linear(1, 1).requires_grad_(False),
        call=call,
        outcome=lambda result, subject: {"value": torch.tensor(result.value)},
        samples={"levels": [2]},
        changes=True,
        undo=lambda result, subject: None,
    )
    monkeypatch.setattr(contract, "form", lambda entry: odd)
    contract._baseline.cache_clear()
    check = next(check for check in contract.GENERAL if check.name == name)
    entry = Entry("odd", function, "baseline", "quantize", "layer", action="quantize")
    assert check.applies(entry)
    with pytest.raises((AssertionError, ValueError)):
        check.run(entry)
    contract._baseline.cache_clear()


PYTHONS_OWN = """
import random
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.testing import check_scorer

def draws(model, calibration=None):
    "Draws from Python's global generator."
    random.random()
    found = structure(model)
    return Scores("layer", {s.name: s.view(model).detach().double().abs().mean() for s in found.sites}, "toy", {}, structure=found)

check_scorer(draws)
"""


def test_pythons_generator_is_looked_at_where_annotations_are_not_checked() -> None:
    """beartype itself draws from it, so this runs as a user's process does."""
    done = subprocess.run([sys.executable, "-c", PYTHONS_OWN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the global generator of python was used" in done.stderr


def test_what_is_broken_is_told() -> None:
    with pytest.raises(AssertionError, match=r"(?s)talks breaks 1 of \d+ checks.*nothing-is-printed: printed 'scoring'"):
        check_scorer(talks)
