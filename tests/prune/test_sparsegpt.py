"""SparseGPT: the official algorithm in float64 numpy, the exact least squares on its mask, patterns, and the case without correlations."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import whatmatters.core.allocation as allocate
from whatmatters.core.data import Calibration
from whatmatters.core.errors import BudgetError, InputError, InputTypeError, NonFiniteError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.prune import magnitude, sparsegpt, wanda
from whatmatters.prune.sparsegpt import quota
from whatmatters.testing.families import FAMILIES, build

Case = Callable[[str], tuple[nn.Module, Calibration]]
Seen = Callable[[nn.Module, Calibration], dict[str, Tensor]]


def official(weight: Tensor, x: Tensor, sparsity: float, pattern: tuple[int, int] | None, block: int, damping: float = 0.01) -> np.ndarray:
    """The published algorithm with exact counts: lazily batched blocks, inverse Cholesky factor, all in float64."""
    w, h = weight.double().numpy().copy(), (x.double().T @ x.double()).numpy() / len(x)
    columns = w.shape[1]
    h[np.diag_indices(columns)] += damping * np.diag(h).mean()
    inverse = np.linalg.inv(h)
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    total, done = math.ceil(Fraction(str(sparsity)) * w.size), 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        w1, u1 = w[:, start:stop].copy(), upper[start:stop, start:stop]
        errors, mask = np.zeros_like(w1), np.zeros(w1.shape, dtype=bool)
        if pattern is None:
            count = math.ceil(Fraction(total * stop, columns)) - done
            done += count
            score = w1**2 / np.diag(u1) ** 2
            mask.reshape(-1)[np.argsort(score.reshape(-1), kind="stable")[:count]] = True
        for j in range(stop - start):
            if pattern is not None and j % pattern[1] == 0:
                score = w1[:, j : j + pattern[1]] ** 2 / np.diag(u1)[j : j + pattern[1]] ** 2
                least = np.argsort(score, axis=1, kind="stable")[:, : pattern[1] - pattern[0]]
                np.put_along_axis(mask, least + j, True, axis=1)
            q = np.where(mask[:, j], 0.0, w1[:, j])
            error = (w1[:, j] - q) / u1[j, j]
            w1[:, j:] -= np.outer(error, u1[j, j:])
            w1[:, j] = q
            errors[:, j] = error
        w[:, start:stop] = w1
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sparsity", "pattern", "block"), [(0.5, None, 128), (0.3, None, 24), (0.5, (2, 4), 128), (0.625, (3, 8), 16)])
def test_each_block_is_pruned_as_published(
    family: str, sparsity: float, pattern: tuple[int, int] | None, block: int, case: Case, seen: Seen
) -> None:
    model, calibration = case(family)
    model, expected = model.double(), build(family).double()
    for config in (getattr(model, "config", None), getattr(expected, "config", None)):
        if config is not None:
            config._experts_implementation = "eager"  # the fused experts have no float64
    if family == "sequential":
        calibration = Calibration.from_tensors(calibration.inputs.double(), batch=16)
    found = structure(expected)
    settings = {"sparsity": sparsity, "pattern": pattern and f"{pattern[0]}:{pattern[1]}", "block_size": block}
    report = sparsegpt(model, calibration, allow_uncovered=True, **settings)
    # Gram matrices are summed in float32 products, so a tie within their rounding may go either way in a later block: one block at a time
    for name in found.blocks:
        inputs = seen(expected, calibration)
        for site in found.in_block(name):
            view = site.view(expected)
            want = torch.from_numpy(official(view, inputs[site.name], sparsity, pattern, block))
            got = site.view(model)
            assert torch.equal(got == 0, want == 0), site.name
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
            view.copy_(got)
    for site, row in zip(found.sites, report.rows, strict=True):
        assert row["weights"] - row["kept"] == math.ceil(Fraction(str(sparsity)) * site.size)


def layer(seed: int, out: int = 8, d: int = 16, tokens: int = 64) -> tuple[nn.Sequential, Tensor]:
    """A layer and inputs that are correlated."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, out, bias=False))
    model[0].weight.data.copy_(torch.randn(out, d, generator=g))
    return model, torch.randn(tokens, d, generator=g) @ torch.randn(d, d, generator=g) + 0.5 * torch.randn(tokens, d, generator=g)


def output_error(weight: Tensor, original: Tensor, x: Tensor) -> float:
    return float((x.double() @ (weight.double() - original.double()).T).square().sum())


def exact(original: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """The best weights on a fixed mask: one least-squares problem for each row."""
    result = torch.zeros_like(original, dtype=torch.float64)
    for row in range(len(original)):
        chosen = keep[row].nonzero().squeeze(1)
        if len(chosen):
            target = x.double() @ original[row].double()
            result[row, chosen] = torch.linalg.lstsq(x.double()[:, chosen], target[:, None], driver="gelsd").solution.squeeze(1)
    return result


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_it_lies_between_the_exact_optimum_and_pruning_without_repair(pattern: str | None) -> None:
    shares = []
    for seed in range(12):
        model, x = layer(seed)
        original = model[0].weight.detach().clone()
        data = Calibration.from_tensors(x)
        report = sparsegpt(model, data, pattern=pattern)
        pruned = model[0].weight.detach()
        error = output_error(pruned, original, x)
        assert error >= output_error(exact(original, pruned != 0, x), original, x) * (1 - 1e-9)
        assert report.rows[0]["relative_output_error"] == pytest.approx(error / output_error(torch.zeros(8, 16), original, x), rel=1e-3)
        for rival in (magnitude, wanda):
            other, _ = layer(seed)
            rival(other, data, scope=pattern or "row")
            shares.append(error / output_error(other[0].weight.detach(), original, x))
    assert max(shares) < 1
    assert sum(shares) / len(shares) < 0.8


@pytest.mark.parametrize(("settings", "scope"), [({"sparsity": 0.3}, "site"), ({"pattern": "2:4"}, "2:4"), ({"pattern": "1:2"}, "1:2")])
def test_without_correlations_it_is_magnitude(settings: dict[str, object], scope: str) -> None:
    models = [nn.Sequential(build("sequential")[2]) for _ in range(2)]
    data = Calibration.from_tensors(torch.eye(32) * 3)
    sparsegpt(models[0], data, **settings)
    magnitude(models[1], sparsity=settings.get("sparsity", 0.5), scope=scope)
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 60)), block=st.integers(1, 70), share=st.fractions(0, 1, max_denominator=200),
)  # fmt: skip
def test_quotas_add_up_and_fit_their_blocks(shape: tuple[int, int], block: int, share: Fraction) -> None:
    rows, columns = shape
    pruned = math.ceil(share * rows * columns)
    parts = [(start, min(start + block, columns)) for start in range(0, columns, block)]
    counts = [quota(pruned, shape, *part) for part in parts]
    assert sum(counts) == pruned
    assert all(0 <= count <= rows * (stop - start) for count, (start, stop) in zip(counts, parts, strict=True))
    assert all(abs(count - share * rows * (stop - start)) <= 2 for count, (start, stop) in zip(counts, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_of_four_holds_everywhere(dtype: torch.dtype, case: Case) -> None:
    model, calibration = case("llama")
    model = model.to(dtype)
    sparsegpt(model, calibration, pattern="2:4")
    for site in structure(model).sites:
        view = site.view(model)
        assert view.dtype == dtype
        assert ((view.reshape(view.shape[0], -1, 4) != 0).sum(-1) == 2).all()


def test_a_ratio_plan_is_met_and_sites_with_nothing_to_prune_stay(case: Case) -> None:
    model, calibration = case("gpt2")
    found = structure(model)
    before = {site.name: site.view(model).clone() for site in found.sites}
    scores = Scores("layer", {site.name: torch.tensor(float(i)) for i, site in enumerate(found.sites)}, "mine", {}, structure=found)
    plan = allocate.ratios(scores, 0.2, cap=0.4)
    values = dict(plan.values) | {found.sites[0].name: 0.0}
    report = sparsegpt(model, calibration, sparsity=Plan("ratio", values, {}, {}, "mine"))
    for site, row in zip(found.sites, report.rows, strict=True):
        assert row["weights"] - row["kept"] == round(values[site.name] * site.size)
        assert torch.equal(site.view(model), before[site.name]) == (row["kept"] == row["weights"])


def test_inputs_that_are_always_zero_go_first_and_cost_nothing() -> None:
    model, x = layer(1)
    x[:, [2, 9]] = 0
    original = model[0].weight.detach().clone()
    sparsegpt(model, Calibration.from_tensors(x), sparsity=0.125, damping=1e-4)
    pruned = model[0].weight.detach()
    assert pruned[:, [2, 9]].eq(0).all()
    assert int((pruned == 0).sum()) == 16
    model[0].weight.data.copy_(original)
    sparsegpt(model, Calibration.from_tensors(x), sparsity=0.0625)  # half of them: the smallest
    expected = original.clone()
    expected[:, [2, 9]] *= original[:, [2, 9]].abs() > original[:, [2, 9]].abs().median()
    assert torch.equal(model[0].weight.detach(), expected)
    assert output_error(pruned, original, x) < 1e-6 * output_error(torch.zeros(8, 16), original, x)


def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude() -> None:
    one = Calibration.from_tensors(torch.tensor([[5]]))
    model, twin = build("mixtral"), build("mixtral")
    report = sparsegpt(model, one, pattern="2:4", allow_uncovered=True)
    magnitude(twin, scope="2:4", allow_uncovered=True)
    blind = [row["site"] for row in report.rows if not row["informed"]]
    assert len(blind) == 8
    assert all(any(note.endswith(f"pruned by magnitude: {name}") for note in report.notes) for name in blind)
    found = structure(model)
    assert all(torch.equal(found.site(name).view(model), found.site(name).view(twin)) for name in blind)


def test_inputs_that_are_all_zero_tell_nothing() -> None:
    models = [nn.Sequential(build("sequential")[0]) for _ in range(2)]
    sparsegpt(models[0], Calibration.from_tensors(torch.zeros(4, 16)), sparsity=0.25)
    magnitude(models[1], sparsity=0.25)
    assert torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"damping": 0.0}, InputError, "damping 0.0"),
        ({"damping": float("nan")}, InputError, "damping nan"),
        ({"block_size": 0}, InputError, "block size 0"),
        ({"pattern": "row"}, InputError, "n:m"),
        ({"pattern": "2:3", "sparsity": None}, InputError, "2:3 for 0 with 16 inputs"),
        ({"pattern": "1:4"}, BudgetError, "0.75"),
        ({"sparsity": 2}, BudgetError, "0 to 1"),
        ({"sparsity": Plan("mask", {"0": torch.ones(2, 2, dtype=torch.bool)}, {}, {}, "mine")}, InputTypeError, r"prune\.apply"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings: dict[str, object], error: type[Exception], match: str) -> None:
    model = build("sequential")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=match):
        sparsegpt(model, Calibration.from_tensors(torch.randn(8, 16)), **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_inputs_that_are_not_finite_are_named() -> None:
    x = torch.randn(8, 16)
    x[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="inputs of 0 hold NaN"):
        sparsegpt(build("sequential"), Calibration.from_tensors(x))
