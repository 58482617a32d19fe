"""The contract can fail: scorers that break one promise each, and the check that catches it."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from whatmatters.core.catalog import Entry, door
from whatmatters.core.errors import NonFiniteError
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.testing import check_scorer
from whatmatters.testing.contract import run

Toy = Callable[..., Scores]
counted = [0]


def made(model: nn.Module, values: dict[str, torch.Tensor] | None = None, **more: Any) -> Scores:
    """Mean size of the weights of each block."""
    found = structure(model)
    for site in found.sites:
        if not torch.isfinite(site.view(model)).all():
            raise NonFiniteError(f"{site.name} holds NaN or infinity; repair the checkpoint")
    own = {name: sum(s.view(model).detach().double().abs().mean() for s in found.in_block(name)) for name in found.blocks}
    return Scores("layer", {**own, **(values or {})}, "toy", {}, structure=found, **more)


def good(model: nn.Module, calibration: Any = None, *, progress: Any = None) -> Scores:
    """Blocks with larger weights matter more."""
    for done in range(3):
        if progress is not None:
            progress("toy", done, 2)
    return made(model)


def draws(model: nn.Module, calibration: Any = None) -> Scores:
    """Draws from the global generator of torch."""
    torch.rand(1)
    return made(model)


def draws_numpy(model: nn.Module, calibration: Any = None) -> Scores:
    """Reads the global generator of numpy."""
    return made(model, {structure(model).blocks[0]: torch.tensor(float(np.random.rand()))})  # noqa: NPY002


def leaves_a_hook(model: nn.Module, calibration: Any = None) -> Scores:
    """Leaves a hook in the model."""
    scores = made(model)
    next(model.children()).register_forward_hook(lambda *_: None)
    return scores


def changes_the_mode(model: nn.Module, calibration: Any = None) -> Scores:
    """Leaves the model in training mode."""
    scores = made(model)
    model.train(not model.training)
    return scores


def changes_a_weight(model: nn.Module, calibration: Any = None) -> Scores:
    """Changes a weight."""
    scores = made(model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    return scores


def mutable_default(model: nn.Module, calibration: Any = None, *, names: Any = []) -> Scores:  # noqa: B006
    """Has a default that can be changed."""
    return made(model)


def by_position(model: nn.Module, calibration: Any = None, power: float = 1.0) -> Scores:
    """Takes a setting by position."""
    return made(model)


def prints(model: nn.Module, calibration: Any = None) -> Scores:
    """Prints what it does."""
    print("scoring")
    return made(model)


def counts(model: nn.Module, calibration: Any = None) -> Scores:
    """Gives something else each time."""
    counted[0] += 1
    return made(model, {structure(model).blocks[0]: torch.tensor(float(counted[0]))})


def constant(model: nn.Module, calibration: Any = None) -> Scores:
    """Looks at nothing."""
    found = made(model)
    return Scores("layer", {name: torch.tensor(float(i)) for i, name in enumerate(found.values)}, "toy", {}, structure=found.structure)


def swallows(model: nn.Module, calibration: Any = None, *, progress: Any = None) -> Scores:
    """Swallows an interruption."""
    try:
        return good(model, progress=progress)
    except KeyboardInterrupt:
        return made(model)


def interrupted_with_a_hook(model: nn.Module, calibration: Any = None, *, progress: Any = None) -> Scores:
    """Leaves a hook when it is interrupted."""
    handle = next(model.children()).register_forward_hook(lambda *_: None)
    scores = good(model, progress=progress)
    handle.remove()
    return scores


def tells_two_totals(model: nn.Module, calibration: Any = None, *, progress: Any = None) -> Scores:
    """Tells progress of two totals."""
    if progress is not None:
        for done, total in ((0, 2), (1, 3), (2, 2)):
            progress("toy", done, total)
    return made(model)


def no_full_stop(model: nn.Module, calibration: Any = None) -> Scores:
    """Has no full stop"""
    return made(model)


def hides_nan(model: nn.Module, calibration: Any = None) -> Scores:
    """Takes NaN for zero."""
    found = structure(model)
    own = {name: sum(s.view(model).nan_to_num(0, 0, 0).double().abs().mean() for s in found.in_block(name)) for name in found.blocks}
    return Scores("layer", {name: value.detach() for name, value in own.items()}, "toy", {}, structure=found)


def shares_memory(model: nn.Module, calibration: Any = None) -> Scores:
    """Keeps a view of the model's weights."""
    found = made(model)
    own = {name: model.get_submodule(name).input_layernorm.weight.detach() for name in found.values}
    scores = Scores("layer", {name: value[0].clone() for name, value in own.items()}, "toy", {}, structure=found.structure)
    object.__setattr__(scores, "values", {name: value[0] for name, value in own.items()})
    return scores


def other_unit(model: nn.Module, calibration: Any = None) -> Scores:
    """Scores weights while it says layers."""
    found = made(model).structure
    assert found is not None
    return Scores("weight", {s.name: s.view(model).detach().abs() for s in found.sites}, "toy", {}, structure=found)


def without_structure(model: nn.Module, calibration: Any = None) -> Scores:
    """Gives no structure."""
    found = made(model)
    return Scores("layer", dict(found.values), "toy", {})


def changes_the_process(model: nn.Module, calibration: Any = None) -> Scores:
    """Changes the number of threads."""
    scores = made(model)
    torch.set_num_threads(torch.get_num_threads() + 1)
    return scores


def breaks_otherwise(model: nn.Module, calibration: Any = None) -> Scores:
    """Raises an error that is not ours."""
    for site in structure(model).sites:
        if not torch.isfinite(site.view(model)).all():
            raise RuntimeError("bad weight")
    return made(model)


CAUGHT: dict[Toy, set[str]] = {
    draws: {"global-randomness-is-left-alone"},
    draws_numpy: {"global-randomness-is-left-alone", "same-call-gives-the-same-bits"},
    leaves_a_hook: {"modes-and-hooks-are-left-as-found", "inputs-are-not-modified"},
    changes_the_mode: {"modes-and-hooks-are-left-as-found", "inputs-are-not-modified"},
    changes_a_weight: {"inputs-are-not-modified"},
    mutable_default: {"defaults-are-immutable"},
    by_position: {"settings-are-keyword-only"},
    prints: {"nothing-is-printed"},
    counts: {"same-call-gives-the-same-bits"},
    constant: {"outcome-depends-on-the-subject"},
    swallows: {"first-interruption-leaves-no-trace", "second-interruption-leaves-no-trace", "last-interruption-leaves-no-trace"},
    interrupted_with_a_hook: {"first-interruption-leaves-no-trace", "second-interruption-leaves-no-trace"},
    tells_two_totals: {"progress-is-told-in-order"},
    no_full_stop: {"summary-is-one-sentence"},
    hides_nan: {"names-the-place-of-a-bad-number"},
    shares_memory: {"scores-are-their-own"},
    other_unit: {"returns-scores-of-the-model"},
    without_structure: {"returns-scores-of-the-model"},
    changes_the_process: {"process-is-left-as-found"},
    breaks_otherwise: {"names-the-place-of-a-bad-number"},
}
"""What must be caught, by what; other checks may trip over the same fault."""


def entry(function: Toy, **flags: Any) -> Entry:
    return Entry("toy", door("user.toy")(function), "scorer", "score", "layer", when="ahead", form="ahead", **flags)


def failed(tested: Entry) -> set[str]:
    threads = torch.get_num_threads()
    try:
        return {result.check for result in run(tested) if result.error is not None}
    finally:
        torch.set_num_threads(threads)


def test_a_good_scorer_keeps_all_of_it() -> None:
    results = check_scorer(good)
    assert len(results) > 25
    assert len({result.check for result in results}) == len(results)


@pytest.mark.parametrize("toy", CAUGHT, ids=lambda toy: toy.__name__)
def test_each_fault_is_caught_by_the_check_meant_for_it(toy: Toy) -> None:
    assert failed(entry(toy)) >= CAUGHT[toy]


@pytest.mark.parametrize("toy", [prints, mutable_default, by_position, no_full_stop, tells_two_totals], ids=lambda toy: toy.__name__)
def test_a_fault_of_form_is_caught_by_nothing_else(toy: Toy) -> None:
    assert failed(entry(toy)) == CAUGHT[toy]


def needs_grad(model: nn.Module, calibration: Any = None) -> Scores:
    """Uses gradients."""
    scores = made(model)
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    return scores


def test_flags_are_checked_both_ways() -> None:
    assert "works-without-gradients" in failed(entry(needs_grad))
    assert "gradients-are-really-needed" not in failed(entry(needs_grad, needs_gradients=True))
    assert "gradients-are-really-needed" in failed(entry(good, needs_gradients=True))
    assert "text-is-needed-as-claimed" in failed(entry(good, needs_text=True))
    assert "control-knows-nothing" in failed(entry(good, control=True))


def test_what_is_broken_is_told() -> None:
    with pytest.raises(AssertionError, match=r"(?s)prints breaks 1 of \d+ checks.*nothing-is-printed: printed 'scoring'"):
        check_scorer(prints)


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
