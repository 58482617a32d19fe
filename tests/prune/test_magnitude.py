"""Magnitude pruning: brute force over sorted weights, exact counts, patterns, and one cut over all sites."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import whatmatters.core.allocation as allocate
from whatmatters.core.data import Calibration
from whatmatters.core.errors import BudgetError, InputError, InputTypeError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.prune import magnitude
from whatmatters.prune.magnitude import global_cut
from whatmatters.testing.families import FAMILIES, build

Case = Callable[[str], tuple[nn.Module, Calibration]]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {site.name: site.view(model).clone() for site in structure(model).sites}


def smallest(values: list[float], count: int) -> set[int]:
    """Positions of the `count` smallest magnitudes; of equal ones the last, by plain sorting."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), -i))
    return set(order[:count])


def by_hand(before: Tensor, sparsity: float, scope: str) -> Tensor:
    share = Fraction(str(sparsity))
    rows, columns = before.shape
    runs = {"site": [list(range(rows * columns))], "row": [[r * columns + c for c in range(columns)] for r in range(rows)]}
    if ":" in scope:
        of = int(scope.split(":")[1])
        runs[scope] = [list(range(i, i + of)) for i in range(0, rows * columns, of)]
    flat = before.reshape(-1).tolist()
    for run in runs[scope]:
        for place in smallest([flat[i] for i in run], math.ceil(share * len(run))):
            flat[run[place]] = 0.0
    return torch.tensor(flat).reshape(rows, columns)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sparsity", "scope"), [(0.37, "site"), (0.3, "row"), (0.5, "2:4"), (0.75, "1:4")])
def test_the_smallest_go_and_the_others_stay(family: str, sparsity: float, scope: str, case: Case) -> None:
    model, _ = case(family)
    before = weights(model)
    report = magnitude(model, sparsity=sparsity, scope=scope, allow_uncovered=True)
    after = weights(model)
    for site, row in zip(before, report.rows, strict=True):
        expected = by_hand(before[site], sparsity, scope)
        assert torch.equal(after[site], expected)
        assert row["site"] == site
        assert row["kept"] == int((expected != 0).sum())
        assert row["sparsity"] == pytest.approx(1 - row["kept"] / row["weights"])
        lost = before[site] - expected
        assert row["relative_weight_error"] == pytest.approx(float(lost.square().sum() / before[site].square().sum()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.333, 1.0])
def test_one_cut_over_all_sites(family: str, sparsity: float, case: Case) -> None:
    model, _ = case(family)
    before = weights(model)
    flat = torch.cat([w.reshape(-1) for w in before.values()])
    gone = smallest(flat.tolist(), math.ceil(Fraction(str(sparsity)) * len(flat)))
    expected = flat.clone()
    expected[list(gone)] = 0
    report = magnitude(model, sparsity=sparsity, scope="all", allow_uncovered=True)
    assert torch.equal(torch.cat([w.reshape(-1) for w in weights(model).values()]), expected)
    assert sum(row["weights"] - row["kept"] for row in report.rows) == len(gone)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-30, 3e4, -2.0, 1e-6])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(VALUES, min_size=1, max_size=6), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), data=st.data(),
)  # fmt: skip
def test_the_cut_is_exact_with_ties_in_every_dtype(values: list[list[float]], dtype: torch.dtype, data: st.DataObject) -> None:
    model = nn.Sequential(*[nn.Linear(len(row), 1, bias=False) for row in values]).to(dtype)
    for layer, row in zip(model, values, strict=True):
        layer.weight.data.copy_(torch.tensor([row]))
    total = sum(map(len, values))
    keep = data.draw(st.integers(0, total))
    sites = structure(model).sites
    cut = global_cut(model, sites, keep)
    masks = torch.cat([cut.mask(site, site.view(model).abs()).reshape(-1) for site in sites])
    flat = torch.cat([site.view(model).reshape(-1) for site in sites])
    gone = smallest(flat.tolist(), total - keep)
    assert [i for i in range(total) if not masks[i]] == sorted(gone)
    assert sum(cut.counts.values()) == total - keep


def test_a_cut_over_dtypes_that_differ() -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False).to(torch.bfloat16))
    model[0].weight.data.copy_(torch.tensor([[1.0, 2.001, 3.0]]))
    model[1].weight.data.copy_(torch.tensor([[2.0], [0.5], [4.0]]))
    sites = structure(model).sites
    cut = global_cut(model, sites, 3)
    assert [cut.mask(site, site.view(model).abs()).reshape(-1).tolist() for site in sites] == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("scope", ["site", "row", "all", "2:4"])
@pytest.mark.parametrize("sparsity", [0.5, 0.1, 0.77])
def test_it_is_what_the_allocation_makes_of_the_magnitudes(scope: str, sparsity: float) -> None:
    if scope == "2:4":
        sparsity = 0.5
    model = build("llama")
    before = weights(model)
    plan = allocate.masks(Scores("weight", {name: w.abs() for name, w in before.items()}, "mine", {}), sparsity, scope=scope)
    magnitude(model, sparsity=sparsity, scope=scope)
    for name, after in weights(model).items():
        assert torch.equal(after, before[name] * plan.values[name])


@pytest.mark.parametrize("scope", ["site", "row"])
def test_a_ratio_plan_is_met_in_each_site(scope: str, case: Case) -> None:
    model, _ = case("gpt2")
    found = structure(model)
    scores = Scores("layer", {site.name: torch.tensor(float(i)) for i, site in enumerate(found.sites)}, "mine", {}, structure=found)
    plan = allocate.ratios(scores, 0.4, cap=0.9)
    report = magnitude(model, sparsity=plan, scope=scope)
    for site, row in zip(found.sites, report.rows, strict=True):
        wanted = round(plan.values[site.name] * site.size)
        if scope == "row":
            wanted = math.ceil(Fraction(wanted, site.size) * site.shape[1]) * site.shape[0]
        assert row["weights"] - row["kept"] == wanted
    assert report.settings["sparsity"]["plan"]["sparsity"] == 0.4


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**34).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_whole_counts_survive_as_shares(pruned_of: tuple[int, int]) -> None:
    from whatmatters.prune._common import _planned

    pruned, size = pruned_of
    assert _planned(pruned / size, size) == pruned


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"sparsity": 1.5}, BudgetError, "0 to 1"),
        ({"sparsity": -0.1}, BudgetError, "0 to 1"),
        ({"sparsity": float("nan")}, BudgetError, "0 to 1"),
        ({"sparsity": True}, InputTypeError, "number"),
        ({"sparsity": None}, InputTypeError, "number"),
        ({"scope": "column"}, InputError, "'site', 'all', 'row'"),
        ({"scope": "5:4"}, InputError, "n from 1 to m"),
        ({"scope": "0:4"}, InputError, "n from 1 to m"),
        ({"scope": "2:"}, InputError, "n from 1 to m"),
        ({"scope": "2:5", "sparsity": None}, InputError, r"2:5 for model\.layers\.0\.self_attn\.q_proj with 32 inputs"),
        ({"scope": "1:4", "sparsity": 0.5}, BudgetError, "0.75"),
        ({"sparsity": Plan("bits", {"a": 4}, {}, {}, "mine")}, InputTypeError, "'ratio'"),
        ({"sparsity": Plan("ratio", {"a": 0.5}, {}, {}, "mine")}, InputError, "lacks model.layers.0"),
        ({"sparsity": Plan("ratio", {"a": 0.5}, {}, {}, "mine"), "scope": "2:4"}, InputError, "one of the two"),
        ({"sparsity": Plan("ratio", {"a": 0.5}, {}, {}, "mine"), "scope": "all"}, InputError, "scope='site'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_and_change_nothing(settings: dict[str, object], error: type[Exception], match: str) -> None:
    model = build("llama")
    before = weights(model)
    with pytest.raises(error, match=match):
        magnitude(model, **settings)
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
