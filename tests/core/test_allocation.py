"""Oracles for allocation: brute force, enumeration and integer arithmetic, never the code under test."""

import itertools
import math
import os
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core import allocation
from whatmatters.core.errors import BudgetError, InputError, InputTypeError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Site, Structure

FEW = settings(max_examples=60, deadline=None)


def model(sizes: list[list[tuple[int, int]]], ties: tuple[tuple[str, ...], ...] = ()) -> Structure:
    """A structure with the given shapes, one list for each block; sites are named b0.s0, b0.s1, ..."""
    sites = [Site(f"b{b}.s{s}", f"b{b}.s{s}.weight", shape, f"b{b}") for b, shapes in enumerate(sizes) for s, shape in enumerate(shapes)]
    return Structure(tuple(f"b{b}" for b in range(len(sizes))), tuple(sites), ties)


def by_block(values: list[float], structure: Structure) -> Scores:
    pairs = zip(structure.blocks, values, strict=True)
    return Scores("layer", {block: torch.tensor(v, dtype=torch.float64) for block, v in pairs}, "test", {}, structure=structure)


def losses_of(rows: list[list[float]], structure: Structure, levels: tuple[int, ...]) -> Scores:
    table = {site.name: torch.tensor(row, dtype=torch.float64) for site, row in zip(structure.sites, rows, strict=True)}
    return Scores("layer", table, "test", {"levels": list(levels)}, scale="loss", structure=structure)


def used_codes(plan: Plan, structure: Structure) -> int:
    return sum(int(plan.values[site.name]) * site.size for site in structure.sites)


# Kernels


@FEW
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 5), st.sampled_from([0, 1, -1])
)
def test_top_k_is_brute_force(rows: list[list[int]], k: int, dim: int) -> None:
    values = torch.tensor(rows, dtype=torch.float32)
    lines = rows if dim != 0 else [list(c) for c in zip(*rows, strict=True)]
    if k > len(lines[0]):
        with pytest.raises(InputError):
            allocation.top_k(values, k, dim)
        return
    mask = allocation.top_k(values, k, dim)
    got = (mask if dim != 0 else mask.T).tolist()
    for line, chosen in zip(lines, got, strict=True):
        best = sorted(range(len(line)), key=lambda i: (-line[i], i))[:k]
        assert [i for i, c in enumerate(chosen) if c] == sorted(best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_top_k_takes_every_number_type(dtype: torch.dtype) -> None:
    values = torch.tensor([[2, 5, 5, 1], [0, 0, 0, 0]], dtype=dtype)
    assert allocation.top_k(values, 2).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_top_k_needs_a_dimension() -> None:
    with pytest.raises(InputError, match="dimension"):
        allocation.top_k(torch.tensor(1.0), 1)


def filled_by_hand(values: list[int], budget: Fraction) -> list[Fraction]:
    """Water-filling in fractions: cap whatever exceeds 1, share the rest again."""
    shares: dict[int, Fraction] = {}
    while True:
        free = [i for i in range(len(values)) if i not in shares]
        left, mass = budget - len(shares), sum(values[i] for i in free)
        if not free or left <= 0:
            return [shares.get(i, Fraction(0)) for i in range(len(values))]
        if mass == 0:
            return [shares.get(i, left / len(free)) for i in range(len(values))]
        over = [i for i in free if values[i] * left >= mass]
        if not over:
            return [shares.get(i, values[i] * left / mass) for i in range(len(values))]
        shares.update(dict.fromkeys(over, Fraction(1)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_probabilities_are_water_filling(values: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.fractions(0, len(values), max_denominator=4))
    got = allocation.probabilities(torch.tensor([values, values], dtype=torch.float64), float(budget))
    expected = torch.tensor([float(p) for p in filled_by_hand(values, budget)], dtype=torch.float64)
    torch.testing.assert_close(got, expected.expand(2, -1), rtol=1e-12, atol=1e-12)
    assert float(got.min()) >= 0 <= 1 >= float(got.max())
    scale = allocation.probabilities(torch.tensor(values, dtype=torch.float64) * 1e300, float(budget))
    torch.testing.assert_close(scale, expected, rtol=1e-12, atol=1e-12)


def test_probabilities_have_the_gradient_of_the_shares() -> None:
    values = torch.tensor([9.0, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert allocation.probabilities(values, 2)[0] == 1
    assert torch.autograd.gradcheck(lambda v: allocation.probabilities(v, 2), values)
    assert torch.autograd.gradcheck(lambda v: allocation.probabilities(v, 1.5, dim=0), values.detach()[:, None].requires_grad_())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.data())
def test_inclusion_probabilities_are_exact_by_enumerating_the_draw(values: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, len(values)))
    grain = allocation.GRAIN
    shares = filled_by_hand(values, Fraction(budget))
    grains = allocation._grains(torch.tensor([float(p) for p in shares], dtype=torch.float64), budget)
    assert int(grains.sum()) == budget * grain
    assert all(0 <= g <= grain and abs(g - p * grain) <= 2 for g, p in zip(grains.tolist(), shares, strict=True))
    # The outcome changes only where the offset passes a multiple: every stretch between is one trace of the draw.
    turns = sorted({0, grain, *((-int(c)) % grain for c in grains.cumsum(0))})
    mass = [0] * len(values)
    for start, end in itertools.pairwise(turns):
        outcomes = {tuple(allocation._comb(grains, torch.tensor([u])).tolist()) for u in (start, (start + end - 1) // 2, end - 1)}
        assert len(outcomes) == 1
        (outcome,) = outcomes
        assert sum(outcome) == budget
        mass = [m + (end - start) * chosen for m, chosen in zip(mass, outcome, strict=True)]
    assert mass == grains.tolist()


def test_sample_draws_with_its_probabilities_and_nothing_else() -> None:
    values = torch.tensor([5.0, 1.0, 1.0, 2.0, 0.0])
    draws = allocation.sample(values.expand(20_000, 5), 2, generator=torch.Generator().manual_seed(0))
    assert (draws.sum(1) == 2).all()
    frequencies = draws.double().mean(0)
    expected = torch.tensor([1.0, 0.25, 0.25, 0.5, 0.0], dtype=torch.float64)
    assert (frequencies - expected).abs().max() < 5 * math.sqrt(0.25 / 20_000)  # five standard deviations
    again = allocation.sample(values.expand(20_000, 5), 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1, 999_999, 333_333, 10**6])
def test_sample_counts_exactly_on_a_million(dtype: torch.dtype, budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(10**6, generator=generator, dtype=dtype) ** 4
    assert int(allocation.sample(values, budget, generator=generator).sum()) == budget


def test_sample_along_another_dimension_and_of_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    assert allocation.sample(torch.rand(6, 3, 2), 4, 0, generator=generator).sum(0).tolist() == [[4, 4]] * 3
    assert allocation.sample(torch.rand(3, 0), 0, generator=generator).shape == (3, 0)
    for budget in (-1, 7, 2**26):
        with pytest.raises(InputError):
            allocation.sample(torch.rand(6), budget, generator=generator)
    with pytest.raises(InputError):
        allocation.probabilities(torch.rand(6), 6.5)


def test_straight_through_has_the_hard_values_bit_for_bit() -> None:
    soft = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul(1e8).requires_grad_()
    hard = allocation.top_k(soft, 100)
    out = allocation.straight_through(hard, soft)
    assert torch.equal(out, hard.float())
    out.mul(torch.arange(1000.0)).sum().backward()
    assert torch.equal(soft.grad, torch.arange(1000.0))


def test_threshold_is_closed_and_broadcasts() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert allocation.threshold(values, torch.tensor([[2.0], [4.0]])).tolist() == [[False, True], [False, True]]
    assert allocation.threshold(values, 2).tolist() == [[False, True], [True, True]]


# Masks


def pruned_by_hand(cells: list[tuple[float, Any]], sparsity: Fraction) -> set[Any]:
    count = math.ceil(sparsity * len(cells))
    ordered = sorted(range(len(cells)), key=lambda i: (-cells[i][0], i))
    return {cells[i][1] for i in ordered[len(cells) - count :]}


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 100),
    st.sampled_from(["all", "site", "row", "1:2", "2:4", "3:4", "4:4"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_masks_are_brute_force(sites: list[list[list[int]]], percent: int, scope: str, dtype: torch.dtype) -> None:
    # 0.1 in float32 and float64 differ: mixed dtypes must be compared in the wider one.
    tensors = {f"s{i}": torch.tensor(rows, dtype=dtype if i % 2 else torch.float32) * 0.1 for i, rows in enumerate(sites)}
    scores = Scores("weight", tensors, "test", {})
    cells = [(float(t[r, c]), (n, r, c)) for n, t in tensors.items() for r in range(t.shape[0]) for c in range(4)]
    if ":" in scope:
        n, m = map(int, scope.split(":"))
        sparsity = 1 - Fraction(n, m)
        plan = allocation.masks(scores, None, scope=scope)
        key: Callable[[Any], Any] = lambda cell: (cell[1][0], cell[1][1], cell[1][2] // m)  # noqa: E731
    else:
        sparsity = Fraction(percent, 100)
        plan = allocation.masks(scores, percent / 100, scope=scope)
        key = {"all": lambda cell: 0, "site": lambda cell: cell[1][0], "row": lambda cell: cell[1][:2]}[scope]
    pruned = set()
    for _, group in itertools.groupby(cells, key):
        pruned |= pruned_by_hand(list(group), sparsity)
    got = {(n, r, c) for n, r, c in (cell[1] for cell in cells) if not plan.values[n][r, c]}
    assert got == pruned
    assert plan.account["pruned"] == len(pruned)
    assert len(cells) - len(pruned) <= (1 - sparsity) * len(cells)
    assert 0 <= plan.account["unused"] < plan.account["scopes"]


def test_sparsity_is_read_in_decimals() -> None:
    scores = Scores("weight", {"a": torch.arange(10.0).reshape(1, 10)}, "test", {})
    for tenths in range(11):  # 0.7 * 10 is 7.000000000000001 in binary, whose ceiling is 8
        assert allocation.masks(scores, tenths / 10).account["pruned"] == tenths
    assert allocation.masks(scores, Fraction(1, 3)).account["pruned"] == 4


def test_global_masks_are_quick() -> None:
    values = torch.rand(2000, 2000, generator=torch.Generator().manual_seed(0))
    scores = Scores("weight", {f"s{i}": values for i in range(4)}, "test", {})
    begin = time.process_time()
    plan = allocation.masks(scores, 0.5)
    assert time.process_time() - begin < 5
    assert sum(int(mask.sum()) for mask in plan.values.values()) == 8_000_000


@pytest.mark.parametrize(
    ("sparsity", "scope", "error"),
    [(-0.1, "all", BudgetError), (1.1, "row", BudgetError), (math.nan, "all", InputError), (None, "all", InputError),
     (0.5, "column", InputError), (0.5, "2:3", InputError), (0.25, "2:4", BudgetError), (None, "0:4", InputError),
     (None, "5:4", InputError),
     (None, "a:b", InputError), (None, "2:", InputError), (None, "²:4", InputError)],
)  # fmt: skip
def test_masks_refuse(sparsity: float | None, scope: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        allocation.masks(Scores("weight", {"a": torch.ones(2, 4)}, "test", {}), sparsity, scope=scope)


def test_masks_want_weights() -> None:
    with pytest.raises(InputTypeError, match="weight"):
        allocation.masks(Scores("layer", {"a": torch.tensor(1.0)}, "test", {}), 0.5)


# Bits: the rank rule


def test_sheet_oracle_forty_equal_layers() -> None:
    structure = model([[(8, 8)]] * 40)
    scores = by_block([math.sin(i) for i in range(40)], structure)
    plan = allocation.bits(scores, 3.5, (4, 2), count="codes")
    low = [site for site, level in plan.values.items() if level == 2]
    assert len(low) == 10
    assert set(low) == {f"b{i}.s0" for i in sorted(range(40), key=math.sin)[:10]}
    assert plan.account["achieved"] == plan.account["average_codes"] == 3.5
    assert plan.account["unused"] == 0


def test_paper_arithmetic_of_13b() -> None:
    # LLaMA-2-13B: 40 blocks, hidden 5120, intermediate 13824; 30 at 4 bits and 10 at 2 make 3.5.
    block = [(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)]
    structure = model([block] * 40)
    plan = allocation.bits(by_block(list(map(float, range(40))), structure), 3.5, (2, 4), count="codes")
    levels = [plan.values[f"b{i}.s0"] for i in range(40)]
    assert levels == [2] * 10 + [4] * 30
    assert all(plan.values[f"b{i}.s{s}"] == levels[i] for i in range(40) for s in range(7))


def test_ends_of_the_range() -> None:
    structure = model([[(4, 4)]] * 7)
    scores = by_block([3.0, 1.0, 2.0, 7.0, 5.0, 4.0, 6.0], structure)
    assert set(allocation.bits(scores, 4, (4, 2), count="codes").values.values()) == {4}
    assert set(allocation.bits(scores, 2, (4, 2), count="codes").values.values()) == {2}
    for average in (1.99, 4.01):
        with pytest.raises(BudgetError, match=r"2\.0 to 4\.0"):
            allocation.bits(scores, average, (4, 2), count="codes")


def test_feasible_range_is_told_in_the_same_count_and_can_be_typed_in() -> None:
    structure = model([[(64, 128), (32, 128)]] * 3)
    scores = by_block([1.0, 2.0, 3.0], structure)
    with pytest.raises(BudgetError, match="stored on disk") as caught:
        allocation.bits(scores, 2.0, (2, 4))
    low, high = str(caught.value).split("feasible range is ")[1].split(" bits")[0].split(" to ")
    assert 2 < float(low) < 2.5 < 4 < float(high) < 4.5
    assert set(allocation.bits(scores, float(low), (2, 4)).values.values()) == {2}
    top = allocation.bits(scores, float(high), (2, 4))
    assert float(high) - 1e-4 < top.account["achieved"] + top.account["smallest_step"] / top.account["weights"]
    with pytest.raises(BudgetError):
        allocation.bits(scores, float(low) - 0.001, (2, 4))


SHAPES = st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3), min_size=1, max_size=6)


def smallest_step(plan: Plan, groups: list[list[str]], structure: Structure, levels: list[int]) -> int | None:
    steps = []
    for group in groups:
        level = levels.index(int(plan.values[group[0]]))
        if level + 1 < len(levels):
            steps.append(sum(structure.site(n).size for n in group) * (levels[level + 1] - levels[level]))
    return min(steps, default=None)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.lists(st.sampled_from([2, 3, 4, 5, 8, 16]), min_size=1, max_size=4, unique=True), st.data())
def test_rank_rule_never_over_and_spent_to_the_last_step(shapes: list, levels: list[int], data: st.DataObject) -> None:
    ties = tuple((f"b{i}.s0", f"b{i}.s1") for i, s in enumerate(shapes) if len(s) > 1 and i % 2)
    structure = model(shapes, ties)
    low, high = min(levels), max(levels)
    average = data.draw(st.integers(low * 100, high * 100)) / 100
    keyed = data.draw(st.sampled_from(["block", "site", "mixed"]))
    tied = data.draw(st.booleans())
    names = [s.name for s in structure.sites] if keyed == "site" else list(structure.blocks) + ["b0.s0"] * (keyed == "mixed")
    values = {name: torch.tensor(float(data.draw(st.integers(-3, 3)))) for name in names}
    plan = allocation.bits(Scores("layer", values, "test", {}), average, levels, count="codes", structure=structure, tied=tied)
    if keyed == "block":
        groups = [[s.name for s in structure.in_block(b)] for b in structure.blocks]
    else:
        groups = structure.groups() if tied else [[s.name] for s in structure.sites]
    assert list(plan.values) == [site.name for site in structure.sites]
    assert all(len({plan.values[name] for name in group}) == 1 for group in groups)
    total = sum(site.size for site in structure.sites)
    unused = math.floor(Fraction(str(average)) * total) - used_codes(plan, structure)
    assert unused >= 0
    assert plan.account["unused"] == unused
    step = smallest_step(plan, groups, structure, sorted(levels))
    assert plan.account["smallest_step"] == step
    assert step is None or unused < step


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8), st.lists(st.integers(1, 5), min_size=8, max_size=8), st.data())
def test_two_levels_cut_the_ranking_and_are_nested(values: list[int], widths: list[int], data: st.DataObject) -> None:
    structure = model([[(1, widths[i])] for i in range(len(values))])
    scores = by_block(list(map(float, values)), structure)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    total = sum(site.size for site in structure.sites)
    equal = len(set(widths[: len(values)])) == 1
    before: set[int] = set()
    for average in sorted((data.draw(st.integers(20, 40)) / 10 for _ in range(4)), reverse=True):
        plan = allocation.bits(scores, average, (4, 2), count="codes")
        low = {i for i in range(len(values)) if plan.values[f"b{i}.s0"] == 2}
        cut = low | {int(name[1]) for name in plan.account["filled"]}
        # The sheet: demote in order until the budget holds, and not one more.
        k = next(k for k in range(len(values) + 1) if 4 * total - 2 * sum(widths[i] for i in order[len(order) - k :]) <= average * total)
        assert cut == set(order[len(order) - k :])
        assert before <= cut
        before = cut
        assert not equal or not plan.account["filled"]
        if k:  # raising the last one lowered would break the budget
            assert used_codes(plan, structure) + 2 * widths[order[-k]] > average * total or order[-k] not in low


@FEW
@given(SHAPES, st.data())
def test_rank_rule_is_invariant_to_increasing_maps(shapes: list, data: st.DataObject) -> None:
    ties = tuple((f"b{i}.s0", f"b{i}.s1") for i, s in enumerate(shapes) if len(s) > 1)
    structure = model(shapes, ties)
    ranks = [data.draw(st.integers(0, 5)) for _ in structure.sites]
    images = sorted(data.draw(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6, unique=True)))
    average = data.draw(st.integers(20, 80)) / 10
    plans = []
    for image in (list(map(float, range(6))), images):
        values = {s.name: torch.tensor(image[r], dtype=torch.float64) for s, r in zip(structure.sites, ranks, strict=True)}
        plans.append(dict(allocation.bits(Scores("layer", values, "test", {}), average, count="codes", structure=structure).values))
    assert plans[0] == plans[1]


def test_three_levels_make_neighbouring_bands() -> None:
    structure = model([[(4, 4)]] * 6)
    scores = by_block([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], structure)
    levels = [list(allocation.bits(scores, a, (8, 4, 2), count="codes").values.values()) for a in (8, 6, 4, 3, 2)]
    assert levels == [[8] * 6, [8, 8, 8, 4, 4, 4], [4] * 6, [4, 4, 4, 2, 2, 2], [2] * 6]


def test_fractions_cut_bands_of_the_weights() -> None:
    structure = model([[(1, 10)]] * 10)
    scores = by_block(list(map(float, range(10))), structure)
    plan = allocation.bits(scores, None, (2, 4, 8), count="codes", fractions={8: 0.2, 4: 0.6, 2: 0.2})
    assert list(plan.values.values()) == [2, 2, 4, 4, 4, 4, 4, 4, 8, 8]
    assert plan.account["achieved"] == 4.4
    for fractions in ({8: 0.5}, {8: 0.5, 3: 0.5}, {8: 1.5, 4: -0.5}):
        with pytest.raises(InputError):
            allocation.bits(scores, None, (2, 4, 8), count="codes", fractions=fractions)
    for average, fractions in ((None, None), (4, {8: 1})):
        with pytest.raises(InputError, match="exactly one"):
            allocation.bits(scores, average, (2, 4, 8), count="codes", fractions=fractions)


def test_equal_scores_break_by_position() -> None:
    structure = model([[(2, 2)]] * 5)
    plan = allocation.bits(by_block([1.0] * 5, structure), 2.8, (2, 4), count="codes")
    assert list(plan.values.values()) == [4, 4, 2, 2, 2]


def test_stored_count_holds_scales_and_padding() -> None:
    structure = model([[(64, 128)]] * 4)
    plan = allocation.bits(by_block([1.0, 2.0, 3.0, 4.0], structure), 3.5, (2, 4), group_size=32)
    # 64 rows of 128 codes at b bits fill words exactly; four scales of 16 bits a row; 128 bits tell the shape.
    expected = sum(64 * 128 * int(b) + 64 * 4 * 16 + 128 for b in plan.values.values())
    assert plan.account["used"] == expected
    assert plan.account["average_stored"] == plan.account["achieved"] == expected / (4 * 64 * 128)
    assert list(plan.values.values()) == [2, 2, 2, 4]
    assert plan.account["average_codes"] == 2.5
    odd = allocation.bits(by_block([1.0, 2.0, 3.0, 4.0], structure), 3.5, (2, 4), count="codes", group_size=48)
    assert odd.account["average_stored"] is None  # 48 does not divide 128, which only matters where it is stored


def test_own_cost_and_its_laws() -> None:
    structure = model([[(2, 3)], [(3, 2)]])
    scores = by_block([1.0, 2.0], structure)
    plan = allocation.bits(scores, 8, (1, 2), cost=lambda shape, level: shape[0] * level * 10)
    assert plan.budget["count"] == "cost"
    assert plan.account["used"] == 20 * 1 + 30 * 2 <= 8 * 12
    with pytest.raises(InputError, match="no fall"):
        allocation.bits(scores, 3, (2, 4), cost=lambda shape, level: 100 - level)
    with pytest.raises(InputTypeError, match="whole numbers"):
        allocation.bits(scores, 3, (2, 4), cost=lambda shape, level: -level)


def test_level_16_is_left_as_it_is() -> None:
    structure = model([[(8, 8)], [(8, 8)]])
    plan = allocation.bits(by_block([1.0, 2.0], structure), 10, (4, 16), count="codes")
    assert list(plan.values.values()) == [4, 16]
    with pytest.raises(InputError, match="levels"):
        allocation.bits(by_block([1.0, 2.0], structure), 10, (16, 32), count="codes")


def test_rank_rule_on_80_blocks_is_instantaneous() -> None:
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    structure = model([shapes] * 80, tuple(t for b in range(80) for t in ((f"b{b}.s0", f"b{b}.s1", f"b{b}.s2"), (f"b{b}.s4", f"b{b}.s5"))))
    values = {s.name: torch.tensor(math.sin(i)) for i, s in enumerate(structure.sites)}
    begin = time.process_time()
    plan = allocation.bits(Scores("layer", values, "test", {}, structure=structure), 3.5)
    assert time.process_time() - begin < 1
    assert 0 <= plan.account["unused"] < plan.account["smallest_step"]
    assert plan.account["average_stored"] <= 3.5


@pytest.mark.parametrize(
    ("change", "error"),
    [({"average": math.nan}, InputError), ({"average": math.inf}, InputError), ({"levels": ()}, InputError),
     ({"levels": (2, 2)}, InputError),
     ({"levels": (0, 4)}, InputError), ({"levels": (4, 33)}, InputError), ({"structure": None}, InputError),
     ({"structure": Structure((), ())}, InputError), ({"structure": model([[(4, 4)]])}, InputError),
     ({"structure": model([[(4, 4)]] * 3)}, InputError), ({"how": "optimum"}, InputError), ({"levels": (True, 4)}, InputTypeError)],
)  # fmt: skip
def test_bits_refuses(change: dict[str, Any], error: type[Exception]) -> None:
    structure = model([[(4, 4)], [(4, 4)]])
    arguments = {"average": 3, "levels": (2, 4), "structure": structure, "count": "codes"} | change
    scores = Scores("layer", {"b0": torch.tensor(1.0), "b1": torch.tensor(2.0)}, "test", {})
    with pytest.raises(error):
        allocation.bits(scores, arguments.pop("average"), arguments.pop("levels"), **arguments)


def test_blocks_without_sites_get_nothing() -> None:
    structure = Structure(("b0", "b1"), (Site("b0.s", "b0.s.weight", (4, 4), "b0"),))
    plan = allocation.bits(by_block([1.0, 2.0], structure), 3, (2, 4), count="codes")
    assert dict(plan.values) == {"b0.s": 2}


def test_errors_name_the_operation() -> None:
    structure = model([[(4, 4)]])
    with pytest.raises(BudgetError, match=r"in allocate\.bits\(") as caught:
        allocation.bits(by_block([1.0], structure), 9, (2, 4), count="codes")
    assert "ask for less" in str(caught.value)


# Bits: the optimum


@st.composite
def tables(draw: st.DrawFn) -> tuple[list, list[bool], list[list[float]], tuple[int, ...], Fraction]:
    shapes = draw(st.lists(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7)), min_size=1, max_size=2), min_size=1, max_size=4))
    tied = [draw(st.booleans()) for _ in shapes]
    levels = tuple(sorted(draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=3, unique=True))))
    whole = st.integers(0, 6).map(float)  # few values: many ties
    fine = st.integers(0, 10**6).map(lambda n: n / 1024)
    losses = draw(st.sampled_from([whole, fine]))
    falling = draw(st.booleans())
    rows = [[draw(losses) for _ in levels] for shape in shapes for _ in shape]
    average = Fraction(draw(st.integers(levels[0] * 20, levels[-1] * 20)), 20)
    return shapes, tied, [sorted(row, reverse=True) for row in rows] if falling else rows, levels, average


def enumerated(structure: Structure, rows: list[list[float]], levels: tuple[int, ...], average: Fraction) -> tuple[Fraction, int]:
    """Least loss, then least size, over every choice."""
    loss = {site.name: row for site, row in zip(structure.sites, rows, strict=True)}
    total = sum(site.size for site in structure.sites)
    best = None
    for choice in itertools.product(range(len(levels)), repeat=len(structure.groups())):
        picked = [(name, i) for group, i in zip(structure.groups(), choice, strict=True) for name in group]
        size = sum(structure.site(name).size * levels[i] for name, i in picked)
        if size <= average * total:
            value = (sum((Fraction(loss[name][i]) for name, i in picked), Fraction(0)), size)
            best = value if best is None else min(best, value)
    assert best is not None
    return best


def spent(plan: Plan, structure: Structure, rows: list[list[float]], levels: tuple[int, ...]) -> tuple[Fraction, int]:
    loss = sum((Fraction(row[levels.index(plan.values[s.name])]) for s, row in zip(structure.sites, rows, strict=True)), Fraction(0))
    return loss, used_codes(plan, structure)


@settings(max_examples=200, deadline=None)
@given(tables())
def test_optimum_is_enumeration_and_never_beaten(case: tuple[list, list[bool], list[list[float]], tuple[int, ...], Fraction]) -> None:
    shapes, tied, rows, levels, average = case
    structure = model(shapes, tuple((f"b{i}.s0", f"b{i}.s1") for i, s in enumerate(shapes) if len(s) > 1 and tied[i]))
    scores = losses_of(rows, structure, levels)
    plan = allocation.bits(scores, average, levels, how="optimum", count="codes")
    best = enumerated(structure, rows, levels, average)
    assert spent(plan, structure, rows, levels) == best
    assert plan.account["predicted_loss"] == float(best[0])
    assert dict(allocation.bits(scores, average, levels, how="optimum", count="codes").values) == dict(plan.values)
    total = sum(site.size for site in structure.sites)
    for other in (allocation.bits_greedy, allocation.bits_lp_rounding):
        rival = other(scores, average, levels, count="codes")
        loss, size = spent(rival, structure, rows, levels)
        assert size <= average * total
        assert (loss, size) >= best
        assert all(len({rival.values[name] for name in group}) == 1 for group in structure.groups())


def test_optimum_of_exchangeable_groups_prefers_the_earlier() -> None:
    structure = model([[(2, 2)]] * 6)
    scores = losses_of([[5.0, 1.0]] * 6, structure, (2, 4))
    plan = allocation.bits(scores, Fraction(8, 3), (2, 4), how="optimum", count="codes")
    assert list(plan.values.values()) == [4, 4, 2, 2, 2, 2]


def test_optimum_of_a_table_by_block_keeps_the_sum() -> None:
    structure = model([[(2, 2), (1, 3)], [(2, 2), (1, 3)]])
    table = {"b0": torch.tensor([4.0, 1.0]), "b1": torch.tensor([9.0, 2.0])}
    scores = Scores("layer", table, "test", {"levels": [2, 4]}, scale="loss", structure=structure)
    plan = allocation.bits(scores, 3, (2, 4), how="optimum", count="codes")
    assert list(plan.values.values()) == [2, 2, 4, 4]
    assert plan.account["predicted_loss"] == pytest.approx(6.0, rel=1e-12)


def test_optimum_wants_losses_of_its_levels() -> None:
    structure = model([[(2, 2)]] * 2)
    with pytest.raises(InputError, match="loss_from_rank"):
        allocation.bits(by_block([1.0, 2.0], structure), 3, (2, 4), how="optimum")
    with pytest.raises(InputError, match="levels"):
        allocation.bits(losses_of([[2.0, 1.0]] * 2, structure, (2, 4)), 3, (2, 3, 4), how="optimum", count="codes")
    with pytest.raises(InputError, match="fractions"):
        allocation.bits(losses_of([[2.0, 1.0]] * 2, structure, (2, 4)), None, (2, 4), how="optimum", fractions={2: 1})


@pytest.mark.parametrize("count", ["stored", "codes"])
@pytest.mark.parametrize("tied", [True, False])
def test_optimum_of_a_70b_model_takes_seconds(count: str, tied: bool, capfd: pytest.CaptureFixture[str]) -> None:
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    structure = model([shapes] * 80, tuple(t for b in range(80) for t in ((f"b{b}.s0", f"b{b}.s1", f"b{b}.s2"), (f"b{b}.s4", f"b{b}.s5"))))
    generator = np.random.default_rng(0)
    rows = [[math.exp(generator.normal()) * site.size**0.5 * 4.0**-b for b in (2, 3, 4, 8)] for site in structure.sites]
    scores = losses_of(rows, structure, (2, 3, 4, 8))
    begin = time.process_time()
    plan = allocation.bits(scores, 3.5, how="optimum", count=count, tied=tied)
    assert time.process_time() - begin < 10
    rivals = [f(scores, 3.5, count=count, tied=tied) for f in (allocation.bits_greedy, allocation.bits_lp_rounding)]
    assert all(plan.account["predicted_loss"] <= rival.account["predicted_loss"] for rival in rivals)
    by_rank = allocation.bits(scores, 3.5, count=count, tied=tied)
    assert plan.account["predicted_loss"] < sum(
        row[(2, 3, 4, 8).index(by_rank.values[s.name])] for row, s in zip(rows, structure.sites, strict=True)
    )
    assert plan.account["used"] <= 3.5 * plan.account["weights"]
    assert capfd.readouterr() == ("", "")  # the solver's library prints from C in some cases


def test_a_solver_that_answers_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    class Answer:
        message, status = "made up", 0

        def __init__(self, x: np.ndarray | None) -> None:
            self.x = x

    structure = model([[(2, 2)]] * 3)
    scores = losses_of([[4.0, 2.0], [4.0, 1.0], [4.0, 3.0]], structure, (2, 4))
    for x in (np.ones(3), np.full(3, 0.4), None, np.array([0.0, 0.0, 0.0])):
        monkeypatch.setattr(scipy.optimize, "milp", lambda *a, x=x, **k: Answer(x))
        with pytest.raises(BudgetError, match="integer program"):
            allocation.bits(scores, 3, (2, 4), how="optimum", count="codes")


def test_silencing_the_solver_loses_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with allocation._solver_silenced():
        os.write(1, b"HighsMipSolverData::transform\nof another thread\n")
    print("later", flush=True)
    assert capfd.readouterr() == ("of another thread\nlater\n", "")


def test_loss_from_rank_is_its_formula() -> None:
    structure = model([[(2, 2)]] * 3)
    table = allocation.loss_from_rank(by_block([5.0, -1.0, 5.0], structure), (2, 4, 16), decay=2.0)
    # Ranks 2.5, 1, 2.5 over their sum 6.
    for name, rank in (("b0", 2.5), ("b1", 1.0), ("b2", 2.5)):
        assert table.values[name].tolist() == pytest.approx([rank / 6 / 4, rank / 6 / 16, 0.0])
    assert table.levels == (2, 4, 16)
    plan = allocation.bits(table, 4, (2, 4, 16), how="optimum", count="codes", structure=structure)
    assert plan.account["achieved"] <= 4
    for decay in (1.0, math.nan, math.inf, 0.5):
        with pytest.raises(InputError, match="decay"):
            allocation.loss_from_rank(by_block([1.0, 2.0, 3.0], structure), (2, 4), decay=decay)
    with pytest.raises(InputError, match="already"):
        allocation.loss_from_rank(table, (2, 4))


# Ratios and sampling


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 100), st.integers(0, 30), st.integers(60, 100), st.data())
def test_ratios_are_exact_within_floor_and_cap(shapes: list, percent: int, floor: int, cap: int, data: st.DataObject) -> None:
    structure = model(shapes)
    values = [data.draw(st.integers(-3, 3)) for _ in structure.sites]
    scores = Scores("layer", {s.name: torch.tensor(float(v)) for s, v in zip(structure.sites, values, strict=True)}, "test", {})
    sizes = [site.size for site in structure.sites]
    low = [math.ceil(Fraction(floor, 100) * n) for n in sizes]
    high = [math.floor(Fraction(cap, 100) * n) for n in sizes]
    pruned = math.ceil(Fraction(percent, 100) * sum(sizes))
    if any(a > b for a, b in zip(low, high, strict=True)) or not sum(low) <= pruned <= sum(high):
        with pytest.raises(BudgetError, match="feasible range"):
            allocation.ratios(scores, percent / 100, floor=floor / 100, cap=cap / 100, structure=structure)
        return
    plan = allocation.ratios(scores, percent / 100, floor=floor / 100, cap=cap / 100, structure=structure)
    counts = [plan.values[site.name] * site.size for site in structure.sites]
    whole = [round(count) for count in counts]
    assert sum(whole) == pruned == plan.account["pruned"]
    assert all(a <= n <= b for a, n, b in zip(low, whole, high, strict=True))
    for i, j in itertools.permutations(range(len(sizes)), 2):
        if values[i] < values[j]:  # the less important loses the larger share, up to one weight of rounding and the whole-number bounds
            assert whole[i] / sizes[i] >= whole[j] / sizes[j] - 1 / sizes[i] - 1 / sizes[j]


def test_ratios_are_proportional_where_nothing_binds() -> None:
    structure = model([[(10, 100)], [(20, 100)], [(10, 100)]])
    plan = allocation.ratios(by_block([2.0, 3.0, 1.0], structure), 0.25)
    # Shares 2, 1, 3 times a factor f: 2000 f + 2000 f + 3000 f = 1000 weights.
    assert [round(plan.values[f"b{i}.s0"] * n) for i, n in enumerate((1000, 2000, 1000))] == [286, 286, 428]
    capped = allocation.ratios(by_block([2.0, 3.0, 1.0], structure), 0.25, floor=0.2, cap=0.3)
    assert [round(capped.values[f"b{i}.s0"] * n) for i, n in enumerate((1000, 2000, 1000))] == [300, 400, 300]


def test_ratios_refuse() -> None:
    structure = model([[(4, 4)]] * 2)
    scores = by_block([1.0, 2.0], structure)
    for sparsity, floor, cap in ((1.5, 0, 1), (0.5, 0.6, 1), (0.5, 0, 0.4), (0.5, -0.1, 1), (0.5, 0.55, 0.5)):
        with pytest.raises(BudgetError):
            allocation.ratios(scores, sparsity, floor=floor, cap=cap)
    with pytest.raises(InputError, match="structure"):
        allocation.ratios(Scores("layer", {"b0": torch.tensor(1.0)}, "test", {}), 0.5)
    with pytest.raises(InputTypeError):
        allocation.ratios(Scores("channel", {"b0": torch.ones(3)}, "test", {}), 0.5)


@FEW
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=3), st.data())
def test_sampling_shares_the_budget_over_valid_tokens(rows: list[list[tuple[int, bool]]], data: st.DataObject) -> None:
    values = torch.tensor([[v for v, _ in row] for row in rows], dtype=torch.float32)
    valid = torch.tensor([[ok for _, ok in row] for row in rows])
    valid[0, 0] = True
    scores = Scores("token", {"b0": values, "b1": values}, "test", {}, valid={"b0": valid, "b1": torch.ones_like(valid)})
    flat = values[valid].int().tolist() + values.reshape(-1).int().tolist()
    budget = data.draw(st.integers(0, len(flat)))
    plan = allocation.sampling(scores, budget)
    got = plan.values["b0"][valid].tolist() + plan.values["b1"].reshape(-1).tolist()
    assert got == pytest.approx([float(p) for p in filled_by_hand(flat, Fraction(budget))], abs=1e-12)
    assert float(plan.values["b0"][~valid].sum()) == 0
    assert plan.account["units"] == len(flat)


def test_sampling_refuses() -> None:
    with pytest.raises(InputError, match="none below 0"):
        allocation.sampling(Scores("sample", {"a": torch.tensor([-1.0, 2.0])}, "test", {}), 1)
    for budget in (-1, 3):
        with pytest.raises(BudgetError, match="0 to 2"):
            allocation.sampling(Scores("sample", {"a": torch.tensor([1.0, 2.0])}, "test", {}), budget)
    with pytest.raises(InputError, match="loss"):
        allocation.sampling(losses_of([[1.0, 2.0]], model([[(2, 2)]]), (2, 4)), 1)
