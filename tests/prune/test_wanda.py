"""Wanda: the naive formula on inputs seen with plain hooks, block by block, and the cases where it is magnitude."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import whatmatters.core.allocation as allocate
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, NonFiniteError
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.prune import magnitude, wanda
from whatmatters.testing.families import FAMILIES, build

Case = Callable[[str], tuple[nn.Module, Calibration]]
Seen = Callable[[nn.Module, Calibration], dict[str, Tensor]]


def naive(weight: Tensor, x: Tensor, sparsity: float, scope: str) -> Tensor:
    """|W| times the norm of the input, the least of each row or run of m set to zero."""
    metric = weight.abs().double() * x.double().norm(dim=0)
    result = weight.clone()
    width = weight.shape[1] if scope == "row" else int(scope.split(":")[1])
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            order = sorted(range(start, start + width), key=lambda j: (float(metric[row, j]), -j))
            for j in order[: math.ceil(Fraction(str(sparsity)) * width)]:
                result[row, j] = 0
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sparsity", "scope"), [(0.4, "row"), (0.5, "2:4")])
def test_each_block_is_pruned_by_what_reaches_it_through_the_pruned_ones(
    family: str, sparsity: float, scope: str, case: Case, seen: Seen
) -> None:
    model, calibration = case(family)
    expected = build(family)
    found = structure(expected)
    for block in found.blocks:
        inputs = seen(expected, calibration)
        for site in found.in_block(block):
            view = site.view(expected)
            view.copy_(naive(view, inputs[site.name], sparsity, scope))
    report = wanda(model, calibration, sparsity=sparsity, scope=scope, allow_uncovered=True)
    for site in found.sites:
        assert torch.equal(site.view(model), site.view(expected)), site.name
    assert all(row["informed"] for row in report.rows)


def test_with_inputs_of_equal_norm_it_is_magnitude() -> None:
    signs = torch.randint(0, 2, (64, 16), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    models = [nn.Sequential(build("sequential")[0]) for _ in range(2)]
    wanda(models[0], Calibration.from_tensors(signs), sparsity=0.6)
    magnitude(models[1], sparsity=0.6, scope="row")
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_a_constant_weight_is_pruned_by_the_norm_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    model[0].weight.data.fill_(1.0)
    wanda(model, Calibration.from_tensors(torch.tensor([[1.0, 4.0, 3.0, 2.0]])), sparsity=0.5)
    assert model[0].weight.tolist() == [[0.0, 1.0, 1.0, 0.0]] * 3


def test_padding_does_not_count() -> None:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[2:, 8:] = False
    other = ids.masked_fill(~valid, 7)
    models = [build("llama") for _ in range(2)]
    for model, tokens in zip(models, (ids, other), strict=True):
        wanda(model, Calibration.from_tensors(tokens, valid))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


class InPlace(nn.Module):
    """A residual block that writes into its activations: both layers are given the same tensor, with other values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += 3 * self.first(x).square()
        return self.second(x)


def test_activations_that_are_written_into_are_told_apart() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Sequential(InPlace(), InPlace()), torch.randn(32, 8)
    assert structure(model, x[:2]).ties == ()
    expected, data = copy.deepcopy(model), Calibration.from_tensors(x)
    for block in expected:
        given = x.clone()
        after = given + 3 * block.first(given).detach().square()
        block.first.weight.data.copy_(naive(block.first.weight.detach(), given, 0.5, "row"))
        block.second.weight.data.copy_(naive(block.second.weight.detach(), after, 0.5, "row"))
        x = block(x).detach()
    wanda(model, data, sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude(case: Case) -> None:
    one = Calibration.from_tensors(torch.tensor([[5]]))
    model, twin = build("mixtral"), build("mixtral")
    report = wanda(model, one, sparsity=0.5, allow_uncovered=True)
    magnitude(twin, sparsity=0.5, scope="row", allow_uncovered=True)
    blind = [row["site"] for row in report.rows if not row["informed"]]
    assert len(blind) == 2 * 2 * 2  # two experts of four, two matrices, two blocks
    assert [name for name in blind if not any(note.endswith(f"pruned by magnitude: {name}") for note in report.notes)] == []
    found = structure(model)
    for name in blind:
        assert torch.equal(found.site(name).view(model), found.site(name).view(twin))


def test_inputs_that_are_all_zero_tell_nothing() -> None:
    models = [nn.Sequential(build("sequential")[0]) for _ in range(2)]
    report = wanda(models[0], Calibration.from_tensors(torch.zeros(4, 16)), sparsity=0.25)
    magnitude(models[1], sparsity=0.25, scope="row")
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert "or only zeros" in report.notes[0]


def test_scope_site_and_ratio_plans(case: Case, seen: Seen) -> None:
    model, calibration = case("sequential")
    twin = build("sequential")
    found = structure(model)
    scores = Scores("layer", {site.name: torch.tensor(float(i)) for i, site in enumerate(found.sites)}, "mine", {}, structure=found)
    plan = allocate.ratios(scores, 0.4)
    report = wanda(model, calibration, sparsity=plan, scope="site")
    for site, row in zip(found.sites, report.rows, strict=True):
        view = site.view(twin)
        metric = view.abs() * seen(twin, calibration)[site.name].norm(dim=0)
        pruned = round(plan.values[site.name] * site.size)
        view.reshape(-1)[metric.reshape(-1).argsort()[:pruned]] = 0
        assert row["weights"] - row["kept"] == pruned
        assert torch.equal(view, site.view(model))


def test_bad_inputs_are_refused() -> None:
    model = build("sequential")
    before = [p.clone() for p in model.parameters()]
    data = torch.randn(8, 16)
    with pytest.raises(InputError, match="'row', 'site'"):
        wanda(model, Calibration.from_tensors(data), scope="all")
    data[3, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="inputs of 0 hold"):
        wanda(model, Calibration.from_tensors(data))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
