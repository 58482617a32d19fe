"""Any scorer's plan is applied as it says; and what all pruners promise: nothing changes on a fault, runs resume to the same bits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whatmatters.core.allocation as allocate
from whatmatters.core.catalog import get_method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, InputTypeError, ModelError, NonFiniteError, ResumeError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.prune import apply, magnitude, sparsegpt, wanda
from whatmatters.testing.families import FAMILIES, build

Case = Callable[[str], tuple[nn.Module, Calibration]]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def random_scores(model: nn.Module, seed: int = 0) -> Scores:
    found, g = structure(model), torch.Generator().manual_seed(seed)
    return Scores("weight", {site.name: torch.rand(site.shape, generator=g) for site in found.sites}, "random", {}, structure=found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["all", "row", "2:4"])
def test_a_mask_is_applied_and_nothing_else(family: str, scope: str, case: Case) -> None:
    model, _ = case(family)
    before, found = copy.deepcopy(model), structure(model)
    plan = allocate.masks(random_scores(model), 0.5, scope=scope)
    report = apply(model, plan, allow_uncovered=True)
    for site, row in zip(found.sites, report.rows, strict=True):
        assert torch.equal(site.view(model), site.view(before) * plan.values[site.name])
        assert row["kept"] == int(plan.values[site.name].sum())
    covered = {site.parameter for site in found.sites}
    rest = [name for name, value in model.state_dict().items() if name not in covered and not torch.equal(value, before.state_dict()[name])]
    assert rest == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_repairing_a_mask_of_sparsegpt_gives_sparsegpt(family: str, pattern: str | None, case: Case) -> None:
    model, calibration = case(family)
    twin = copy.deepcopy(model)
    sparsegpt(model, calibration, pattern=pattern, allow_uncovered=True)
    masks = {site.name: site.view(model) != 0 for site in structure(model).sites}
    apply(twin, Plan("mask", masks, {}, {}, "mine"), calibration, repair="sparsegpt", allow_uncovered=True)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(a == 0, b == 0)


def test_repair_lowers_the_output_error_of_any_mask() -> None:
    shares = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 16, generator=g) @ torch.randn(16, 16, generator=g) + 0.5 * torch.randn(64, 16, generator=g)
        model = nn.Sequential(build("sequential", seed=seed)[0])
        original, plain = model[0].weight.detach().clone(), copy.deepcopy(model)
        plan = allocate.masks(random_scores(model, seed), 0.5, scope="row")
        apply(model, plan, Calibration.from_tensors(x), repair="sparsegpt")
        apply(plain, plan)
        errors = [float((x @ (m[0].weight.detach() - original).T).square().sum()) for m in (model, plain)]
        shares.append(errors[0] / errors[1])
    assert max(shares) < 1
    assert sum(shares) / len(shares) < 0.85


def test_masks_of_any_weight_scorer_reach_an_expert_that_no_token_does() -> None:
    model, one = build("mixtral"), Calibration.from_tensors(torch.tensor([[5]]))
    before, found = copy.deepcopy(model), structure(model)
    plan = allocate.masks(random_scores(model), 0.5, scope="row")
    report = apply(model, plan, one, repair="sparsegpt", allow_uncovered=True)
    blind = [row["site"] for row in report.rows if not row["informed"]]
    assert len(blind) == 8
    assert sum("pruned without repair" in note for note in report.notes) == 8
    for name in blind:
        assert torch.equal(found.site(name).view(model), found.site(name).view(before) * plan.values[name])


@pytest.mark.parametrize("repair", ["none", "sparsegpt"])
def test_a_ratio_plan_is_met_by_magnitude_or_sparsegpt(repair: Any, case: Case) -> None:
    model, calibration = case("llama")
    twin, found = copy.deepcopy(model), structure(model)
    scores = Scores("layer", {block: torch.tensor(float(i)) for i, block in enumerate(found.blocks)}, "mine", {}, structure=found)
    plan = allocate.ratios(scores, 0.45)
    report = apply(model, plan, calibration, repair=repair)
    if repair == "none":
        magnitude(twin, sparsity=plan)
    else:
        sparsegpt(twin, calibration, sparsity=plan)
    assert same(weights(model), weights(twin))
    assert [row["weights"] - row["kept"] for row in report.rows] == [round(plan.values[s.name] * s.size) for s in found.sites]


def test_a_wrong_plan_is_refused_and_changes_nothing(case: Case) -> None:
    model, calibration = case("sequential")
    before, good = weights(model), allocate.masks(random_scores(model), 0.5)
    other = {"0": torch.ones(3, 3, dtype=torch.bool), **{n: m for n, m in good.values.items() if n != "0"}}
    lacking = {name: mask for name, mask in good.values.items() if name != "2"}
    for plan, error, match in [
        (Plan("bits", {"0": 4}, {}, {}, "mine"), InputTypeError, "takes 'mask'"),
        (Plan("mask", other, {}, {}, "mine"), InputError, r"mask of 0 has shape \(3, 3\); the site has \(32, 16\)"),
        (Plan("mask", lacking, {}, {}, "mine"), InputError, "lacks 2"),
        (Plan("mask", {**good.values, "7": good.values["0"]}, {}, {}, "mine"), InputError, "has 7, which the model has not"),
    ]:
        with pytest.raises(error, match=match):
            apply(model, plan)
    with pytest.raises(InputError, match="without calibration data"):
        apply(model, good, repair="sparsegpt")
    with pytest.raises(InputError, match=r"damping 0\.0"):
        apply(model, good, calibration, repair="sparsegpt", damping=0.0)
    assert same(weights(model), before)


PRUNERS: dict[str, Callable[..., Any]] = {
    "magnitude": magnitude,
    "magnitude-all": lambda model, data, **options: magnitude(model, data, **({"scope": "all"} | options)),
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "apply": lambda model, data, **options: apply(model, allocate.masks(random_scores(model), 0.5), data, repair="sparsegpt", **options),
}


@pytest.mark.parametrize("name", [n for n in PRUNERS if n != "apply"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparsity_zero_leaves_every_bit(name: str, family: str, case: Case) -> None:
    model, calibration = case(family)
    next(iter(structure(model).sites)).view(model)[0, :2] = torch.tensor([-0.0, 1e-42])
    before = weights(model)
    report = PRUNERS[name](model, calibration, sparsity=0)
    assert all(torch.equal(v.view(torch.int32), before[k].view(torch.int32)) for k, v in weights(model).items() if v.dtype == torch.float32)
    assert all(row["sparsity"] == 0 and row["kept"] == row["weights"] for row in report.rows)


@pytest.mark.parametrize("name", [n for n in PRUNERS if n != "apply"])
def test_sparsity_one_leaves_nothing(name: str, case: Case) -> None:
    model, calibration = case("sequential")
    report = PRUNERS[name](model, calibration, sparsity=1.0)
    assert all(site.view(model).eq(0).all() for site in structure(model).sites)
    assert all(row["kept"] == 0 for row in report.rows)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_fault_or_an_interrupt_leaves_the_model_as_it_was(name: str, case: Case) -> None:
    model, calibration = case("llama")
    model.train()
    before, rng = weights(model), torch.random.get_rng_state()

    def stop(label: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PRUNERS[name](model, calibration, progress=stop)
    assert same(weights(model), before)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), rng)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_stopped_run_ends_with_the_bits_of_an_unbroken_one(name: str, case: Case, tmp_path: Path) -> None:
    model, calibration = case("llama")
    unbroken = copy.deepcopy(model)
    expected = PRUNERS[name](unbroken, calibration)

    def stop(label: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PRUNERS[name](model, calibration, run_dir=tmp_path, progress=stop)
    report = PRUNERS[name](model, calibration, run_dir=tmp_path, resume=True)
    assert same(weights(model), weights(unbroken))
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.rows] for r in (report, expected)]
    assert untimed[0] == untimed[1]
    assert report.notes == expected.notes


def test_resuming_with_another_mask_or_share_is_refused(case: Case, tmp_path: Path) -> None:
    model, _ = case("llama")
    apply(copy.deepcopy(model), allocate.masks(random_scores(model, 0), 0.5, scope="row"), run_dir=tmp_path / "a")
    with pytest.raises(ResumeError, match="setting masks"):
        apply(model, allocate.masks(random_scores(model, 1), 0.5, scope="row"), run_dir=tmp_path / "a", resume=True)
    magnitude(copy.deepcopy(model), run_dir=tmp_path / "b")
    with pytest.raises(ResumeError, match="setting sparsity"):
        magnitude(model, sparsity=0.4, run_dir=tmp_path / "b", resume=True)


@pytest.mark.parametrize("name", PRUNERS)
def test_weights_that_are_not_finite_or_not_covered_are_named(name: str, case: Case) -> None:
    model, calibration = case("mixtral")
    with pytest.raises(ModelError, match=r"mlp\.gate\.weight.*allow_uncovered=True"):
        PRUNERS[name](model, calibration)
    report = PRUNERS[name](build("mixtral"), calibration, allow_uncovered=True)
    assert any("no site covers it" in note and "mlp.gate.weight" in note for note in report.notes)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn\.o_proj holds NaN"):
        PRUNERS[name](model, calibration, allow_uncovered=True)


@pytest.mark.parametrize("slug", ["magnitude", "wanda", "sparsegpt"])
def test_they_are_in_the_catalog(slug: str, case: Case) -> None:
    model, calibration = case("sequential")
    entry = get_method(slug, "prune")
    assert entry.kind == "baseline"
    assert entry.needs_text == (slug != "magnitude")
    assert entry.function(model, calibration, sparsity=0.5).method == slug
    assert all(int((site.view(model) != 0).sum()) <= site.size // 2 for site in structure(model).sites)
