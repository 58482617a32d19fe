"""`whatmatters.testing` for users: laws hold for what the library makes, broken ones are found; the command judges a device."""

import dataclasses
import subprocess
import sys
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core import allocation
from whatmatters.core.errors import InputError, UnknownNameError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Site, Structure
from whatmatters.testing import check_method, check_plan, check_scorer, check_scores
from whatmatters.testing.kernels import KERNELS, check_kernels

SITES = tuple(
    Site(f"h.{i}.{part}", f"h.{i}.{part}.weight", shape, f"h.{i}") for i in range(3) for part, shape in (("a", (8, 16)), ("b", (16, 8)))
)
STRUCTURE = Structure(("h.0", "h.1", "h.2"), SITES)
UNIT = st.integers(0, 3).map(float)


def layers(values: list[float]) -> Scores:
    return Scores("layer", dict(zip(STRUCTURE.blocks, map(torch.tensor, values), strict=True)), "mine", {}, structure=STRUCTURE)


def weights(seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    return Scores("weight", {s.name: torch.randint(0, 4, s.shape, generator=draw).float() for s in SITES}, "mine", {}, structure=STRUCTURE)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(UNIT, min_size=3, max_size=3), average=st.sampled_from([2.5, 3.0, 3.7]), sparsity=st.sampled_from([0.1, 0.5, 0.9]))
def test_layer_scores_and_their_plans_obey_the_laws(values: list[float], average: float, sparsity: float) -> None:
    scores = layers(values)
    check_scores(scores)
    check_plan(allocation.bits(scores, average, (2, 4, 8), count="codes"), scores)
    check_plan(allocation.bits(scores, average + 4, (2, 4, 8), group_size=8), scores)
    check_plan(allocation.ratios(scores, sparsity), scores)
    table = allocation.loss_from_rank(scores, (2, 4, 8))
    check_scores(table)
    check_plan(allocation.bits(table, average, (2, 4, 8), how="optimum", count="codes"), table)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scope=st.sampled_from(["all", "site", "row", "2:4"]))
def test_weight_scores_and_their_masks_obey_the_laws(seed: int, scope: str) -> None:
    scores = weights(seed)
    check_scores(scores)
    check_plan(allocation.masks(scores, 0.5, scope=scope), scores)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.integers(0, 6))
def test_padded_token_scores_and_their_sampling_obey_the_laws(seed: int, budget: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    scores = Scores("token", {"h.0": torch.rand(2, 4, generator=draw)}, "mine", {}, valid={"h.0": valid})
    check_scores(scores)
    check_plan(allocation.sampling(scores, budget), scores)


def forced(value: Any, **fields: Any) -> Any:
    """The same object with fields that no constructor would have taken."""
    changed = object.__new__(type(value))
    for field in dataclasses.fields(value):
        object.__setattr__(changed, field.name, fields.get(field.name, getattr(value, field.name)))
    return changed


def with_values(value: Any, **values: Any) -> Any:
    return forced(value, values=MappingProxyType({**value.values, **{name.replace("_", "."): v for name, v in values.items()}}))


@pytest.mark.parametrize(
    ("scores", "law"),
    [
        (with_values(layers([1.0, 2.0, 3.0]), h_0=torch.tensor(torch.nan)), "not finite"),
        (with_values(layers([1.0, 2.0, 3.0]), h_0=torch.tensor(1)), "int64"),
        (with_values(layers([1.0, 2.0, 3.0]), h_0=torch.ones((), requires_grad=True)), "graph"),
        (forced(layers([1.0, 2.0, 3.0]), values={"h.0": torch.tensor(1.0)}), "can be changed"),
    ],
)
def test_broken_scores_are_found(scores: Scores, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_scores(scores)


class Upside(Scores):
    """Scores of which the least important come first."""

    def rank(self) -> Scores:
        return super()._like({name: -value for name, value in super().rank().values.items()})


def test_wrong_ranks_are_found() -> None:
    with pytest.raises(AssertionError, match="ranks are 0 to n - 1"):
        check_scores(Upside("layer", {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, "mine"))


BITS = allocation.bits(layers([1.0, 2.0, 3.0]), 3.0, (2, 4), count="codes")
MASK = allocation.masks(weights(0), 0.5)
RATIO = allocation.ratios(layers([1.0, 2.0, 3.0]), 0.5)
SAMPLING = allocation.sampling(layers([1.0, 2.0, 3.0]), 2)


@pytest.mark.parametrize(
    ("plan", "scores", "law"),
    [
        (with_values(BITS, **{site.name.replace(".", "_"): 4 for site in SITES}), None, "more than 3.0 bits"),
        (with_values(BITS, **{site.name.replace(".", "_"): 2 for site in SITES}), None, "other bits than are used"),
        (forced(BITS, account=MappingProxyType({**BITS.account, "unused": -1})), None, "budget is exceeded"),
        (forced(BITS, account=MappingProxyType({**BITS.account, "unused": 10**6})), None, "left out"),
        (BITS, layers([3.0, 2.0, 1.0]), "got fewer bits"),
        (with_values(MASK, h_0_a=torch.ones(8, 16, dtype=torch.bool)), None, "are kept, more than"),
        (with_values(MASK, h_0_a=torch.zeros(8, 16, dtype=torch.bool)), None, "another number of weights"),
        (MASK, weights(1), "matters less than one that goes"),
        (with_values(RATIO, h_0_a=0.0), None, "expected exactly"),
        (with_values(RATIO, h_0_a=0.0001), None, "whole numbers"),
        (RATIO, layers([3.0, 2.0, 1.0]), "goes than of"),
        (with_values(SAMPLING, h_0=torch.tensor(0.9, dtype=torch.float64)), None, "not to the budget"),
        (SAMPLING, layers([3.0, 2.0, 1.0]), "lower probability"),
    ],
)
def test_broken_plans_are_found(plan: Plan, scores: Scores | None, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_plan(plan, scores)


def test_of_equal_weights_the_earlier_are_kept() -> None:
    scores = Scores("weight", {"a": torch.ones(1, 4)}, "mine", {})
    plan = allocation.masks(scores, 0.5)
    check_plan(plan, scores)
    with pytest.raises(AssertionError, match="the earlier are kept"):
        check_plan(forced(plan, values=MappingProxyType({"a": torch.tensor([[False, False, True, True]])})), scores)


def test_a_scorer_of_ones_own_is_told_what_is_wrong() -> None:
    def noisy(model: Any, calibration: Any = None) -> Scores:
        """Other scores each time."""
        from whatmatters.core.sites import structure

        found = structure(model)
        return Scores("layer", {name: torch.rand(()) for name in found.blocks}, "noisy", {}, structure=found)

    with pytest.raises(AssertionError, match="global-randomness-is-left-alone: the global generator of torch was used"):
        check_scorer(noisy)
    with pytest.raises(InputError, match="expected 'ahead' or 'walk'"):
        check_scorer(noisy, when="later")
    with pytest.raises(UnknownNameError):
        check_method("no-such-method")
    assert len(check_method("rtn")) >= 25


def test_a_broken_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from whatmatters.testing import kernels

    assert set(check_kernels()) == set(KERNELS)
    assert not any(check_kernels().values())
    monkeypatch.setattr(kernels, "mirror", lambda total: None)
    assert "relative error" in (check_kernels()["gram"] or "")


def test_every_kernel_with_a_reference_is_run_beside_it() -> None:
    import importlib
    import pkgutil

    from whatmatters import kernels

    files = {info.name for info in pkgutil.iter_modules(kernels.__path__)}
    with_reference = {name for name in files if any("reference" in n for n in vars(importlib.import_module(f"whatmatters.kernels.{name}")))}
    assert with_reference == {"feedback", "gram", "ngrams", "prune_feedback", "sparse_gemv"}, (
        "add the kernel to whatmatters.testing.kernels.KERNELS"
    )
    assert len(KERNELS) == len(with_reference)


def command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command, after some code, in a process of its own without our tests' type checks; the last it says is its processor time."""
    run = f"import runpy, sys; sys.argv = ['testing', *{list(arguments)!r}]; {code}\n"
    run += "try:\n    runpy.run_module('whatmatters.testing', run_name='__main__')\nfinally:\n    assert 'pytest' not in sys.modules\n"
    run += "    import time; print('cpu', time.process_time(), file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)


def test_one_entry_from_the_command_line() -> None:
    done = command("--entry", "weight-outliers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weight-outliers" in done.stdout
    assert "all hold" in done.stdout
    broken = command("--entry", "weight-outliers", code="import whatmatters.score.layers as l; l._parts = lambda *a: iter(())")
    assert broken.returncode == 1, broken.stdout
    unknown = command("--entry", "no-such-entry")
    assert unknown.returncode == 2
    assert "no entry named" in unknown.stderr
    assert "Traceback" not in unknown.stderr


@pytest.mark.full
def test_the_whole_takes_less_than_a_minute() -> None:
    done = command("--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stderr.rsplit("cpu ", 1)[1]) < 60, "seconds of one processor"
