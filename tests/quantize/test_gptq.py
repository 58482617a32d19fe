"""GPTQ and round-to-nearest: exact special cases, an independent textbook solver, every family, faults and bad input."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, InputTypeError, ModelError, NonFiniteError, WhatMattersError
from whatmatters.core.formats import attached, dequantize
from whatmatters.core.grids import GridSettings, fit_grid
from whatmatters.core.sites import structure
from whatmatters.kernels.feedback import feedback_factor, round_with_feedback_reference
from whatmatters.quantize import gptq, rtn
from whatmatters.quantize._common import round_with_hessian
from whatmatters.testing.families import FAMILIES, build, inputs

SETTINGS = GridSettings(-1, True, True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, d: int, seed: int) -> Tensor:
    return normal(tokens, d, seed=seed) @ normal(d, d, seed=seed + 1) / d**0.5


def gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def solve(
    weight: Tensor, hessian: Tensor, bits: int = 3, settings: GridSettings = SETTINGS, act_order: bool = False, damping: float = 0.01
) -> Tensor:
    grid = fit_grid(weight, bits, settings, weight.dtype)
    codes, _ = round_with_hessian([weight], [grid], hessian, damping=damping, act_order=act_order)
    return codes[0]


def loss(weight: Tensor, codes: Tensor, hessian: Tensor, bits: int = 3, settings: GridSettings = SETTINGS) -> float:
    delta = weight.double() - dequantize(fit_grid(weight, bits, settings, weight.dtype).with_codes(codes), weight.dtype).double()
    return float(((delta @ hessian) * delta).sum())


def nearest(weight: Tensor, bits: int = 3, settings: GridSettings = SETTINGS) -> Tensor:
    return fit_grid(weight, bits, settings, weight.dtype).codes_of(weight)


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("settings", [GridSettings(-1), GridSettings(8), GridSettings(8, False), GridSettings(-1, False, False)])
def test_white_inputs_give_round_to_nearest(settings: GridSettings, damping: float) -> None:
    weight = normal(7, 32)
    for scale in (1e-6, 1.0, 1e6):
        assert torch.equal(solve(weight, scale * torch.eye(32).double(), settings=settings, damping=damping), nearest(weight, 3, settings))


def test_one_column_gives_round_to_nearest() -> None:
    weight = normal(9, 1)
    assert torch.equal(solve(weight, torch.tensor([[3.0]]).double()), nearest(weight))


@pytest.mark.parametrize("seed", range(200))
def test_correlated_inputs_lose_less_than_rounding(seed: int) -> None:
    weight, hessian = normal(48, 24, seed=seed), gram(correlated(96, 24, seed + 1000))
    assert loss(weight, solve(weight, hessian), hessian) <= loss(weight, nearest(weight), hessian)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("d", [1, 5, 16, 17, 129, 150])
def test_codes_are_those_of_the_textbook(d: int, act_order: bool) -> None:
    """The paper's algorithm in float64 with the inverse's Cholesky factor; a rounding boundary may differ, the loss may not."""
    weight, hessian = normal(6, d, seed=d), gram(correlated(4 * d + 8, d, d))
    settings = GridSettings(-1)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(d)
    grid = fit_grid(weight, 3, settings, weight.dtype)
    expected = torch.empty(6, d, dtype=torch.int8)
    expected[:, order] = round_with_feedback_reference(
        weight[:, order], hessian[order][:, order], grid.scale.float().T, torch.zeros(1, 6), torch.zeros(d, dtype=torch.long),
        torch.full((6,), -4.0), torch.full((6,), 3.0), 0.01,
    )  # fmt: skip
    codes = solve(weight, hessian, settings=settings, act_order=act_order)
    assert (codes == expected).double().mean() > 0.99
    assert loss(weight, codes, hessian) == pytest.approx(loss(weight, expected, hessian), rel=1e-3)


def test_the_loss_reported_is_that_of_the_damped_hessian() -> None:
    weight, hessian = normal(6, 40), gram(correlated(100, 40, 3))
    grid = fit_grid(weight, 3, SETTINGS, weight.dtype)
    codes, told = round_with_hessian([weight], [grid], hessian, damping=0.01, act_order=False)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    assert told[0] == pytest.approx(loss(weight, codes[0], damped), rel=1e-4)


def test_the_factor_multiplies_back_and_gives_up_on_an_indefinite_matrix() -> None:
    hessian = gram(correlated(64, 20, 0))
    factor = feedback_factor(hessian, 0.01)
    assert torch.allclose(factor @ factor.T, hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20).double(), rtol=1e-10)
    assert torch.equal(factor, factor.triu())
    singular = torch.ones(20, 20).double()
    assert torch.isfinite(feedback_factor(singular, 0.01)).all()
    with pytest.raises(NonFiniteError, match="not positive definite"):
        feedback_factor(torch.tensor([[1.0, -9.0], [-9.0, 1.0]]).double(), 0.001)
    with pytest.raises(NonFiniteError, match="holds NaN"):
        feedback_factor(torch.full((2, 2), torch.nan).double(), 0.01)


def test_inputs_that_are_always_zero_get_code_zero() -> None:
    x = correlated(50, 12, 5)
    x[:, 4] = 0
    codes = solve(normal(5, 12), gram(x))
    assert torch.equal(codes[:, 4], torch.zeros(5, dtype=torch.int8))


def test_rows_of_stacked_sites_do_not_touch_each_other() -> None:
    hessian = gram(correlated(60, 24, 1))
    a, b = normal(5, 24, seed=1), normal(3, 24, seed=2)
    grids = [fit_grid(a, 3, SETTINGS, a.dtype), fit_grid(b, 8, SETTINGS, b.dtype)]
    together, _ = round_with_hessian([a, b], grids, hessian, damping=0.01, act_order=True)
    alone = [round_with_hessian([w], [g], hessian, damping=0.01, act_order=True)[0][0] for w, g in zip([a, b], grids, strict=True)]
    assert [(x == y).double().mean() > 0.99 for x, y in zip(together, alone, strict=True)] == [True, True]


def data(family: str) -> Calibration:
    return Calibration.from_tensors(inputs(family), batch=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", [rtn, gptq])
def test_every_family_is_rounded_to_its_grid(family: str, quantize: Any) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = quantize(model, data(family), bits=3, group_size=8, allow_uncovered=True)
    found = structure(model)
    grids = attached(model)
    assert {row["site"] for row in report.rows} == {s.name for s in found.sites}
    for site in found.sites:
        view = site.view(model)
        grid = grids[site.name]
        assert torch.equal(dequantize(grid.with_codes(grid.codes_of(view)), view.dtype), view)
    touched = {site.parameter for site in found.sites}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name not in touched)
    assert all(not torch.equal(model.state_dict()[name], before[name]) for name in touched)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "sequential"])
def test_the_same_inputs_give_the_same_bits(family: str) -> None:
    models = [build(family) for _ in range(2)]
    for model in models:
        gptq(model, data(family), bits=2, group_size=8, act_order=True, allow_uncovered=True)
    first, second = (m.state_dict() for m in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_layer_of_a_network_loses_less_than_rounding() -> None:
    """End to end, by the output of the first layer on the calibration data themselves."""
    model = build("sequential")
    x = correlated(200, 16, 3)
    errors = {}
    for quantize in (rtn, gptq):
        twin = copy.deepcopy(model)
        quantize(twin, Calibration.from_tensors(x, batch=50), bits=2, group_size=-1)
        errors[quantize.__name__] = float((twin[0](x) - model[0](x)).detach().square().sum())
    assert errors["gptq"] < errors["rtn"]


def test_experts_without_tokens_are_rounded_and_noted() -> None:
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # ties go to the first experts: the last two see nothing
    report = gptq(model, data("mixtral"), bits=4, group_size=8, allow_uncovered=True)
    assert any("no calibration token reached it" in note for note in report.notes)
    assert any("no site covers it" in note for note in report.notes)


def test_mixed_bits_and_sites_left_alone() -> None:
    model = build("llama")
    names = [site.name for site in structure(model).sites]
    before = model.get_submodule(names[0]).weight.detach().clone()
    bits = {name: 16 if i == 0 else (2, 3, 4, 8)[i % 4] for i, name in enumerate(names)}
    report = gptq(model, data("llama"), bits=bits, group_size=8)
    assert torch.equal(model.get_submodule(names[0]).weight, before)
    assert {row["site"]: row["bits"] for row in report.rows} == {n: b for n, b in bits.items() if b < 16}
    for name in names[1:]:
        assert len(model.get_submodule(name).weight[0, :8].unique()) <= 2 ** bits[name]


def test_true_sequential_uses_inputs_of_the_rounded_sites() -> None:
    plain, sequential = build("llama"), build("llama")
    gptq(plain, data("llama"), bits=2, group_size=8, true_sequential=False)
    gptq(sequential, data("llama"), bits=2, group_size=8, true_sequential=True)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(plain.get_submodule(first).weight, sequential.get_submodule(first).weight)
    down = "model.layers.0.mlp.down_proj"
    assert not torch.equal(plain.get_submodule(down).weight, sequential.get_submodule(down).weight)


def test_padding_counts_nothing() -> None:
    ids = inputs("llama")
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[:, 20:] = False
    other = ids.clone()
    other[:, 20:] = 3
    results = []
    for one in (ids, other):
        model = build("llama")
        gptq(model, Calibration.from_tensors(one, valid, batch=2), bits=3, group_size=8)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"bits": 1}, InputError, "1 bits; expected one of 2, 3"),
        ({"bits": 9}, InputError, "9 bits"),
        ({"bits": True}, InputError, "True bits"),
        ({"bits": {"a": 3}}, InputError, "lacks model.layers.0"),
        ({"group_size": 7}, InputError, "group size 7 does not divide the 32 inputs of model.layers.0"),
        ({"group_size": 0}, InputError, "group size 0"),
        ({"damping": 0.0}, InputError, "damping 0.0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings: dict[str, Any], error: type[WhatMattersError], told: str) -> None:
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=told) as caught:
        gptq(model, data("llama"), **{"bits": 3, "group_size": 8, **settings})
    assert "in quantize.gptq(" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_uncovered_weights_need_to_be_allowed() -> None:
    with pytest.raises(ModelError, match=r"mlp\.gate\.weight.*allow_uncovered"):
        rtn(build("mixtral"), bits=4, group_size=8)


def test_nan_weights_are_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        rtn(model, bits=4, group_size=8)


def test_a_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    expected = build("llama", layers=3)
    gptq(expected, data("llama"), bits=3, group_size=8)
    model = build("llama", layers=3)

    def stop(label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        gptq(model, data("llama"), bits=3, group_size=8, run_dir=tmp_path, progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert attached(model) == {}
    gptq(model, data("llama"), bits=3, group_size=8, run_dir=tmp_path, resume=True)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert attached(model).keys() == attached(expected).keys()


def test_plans_of_another_kind_are_refused() -> None:
    from whatmatters.core.plans import Plan

    model = build("llama")
    ratios = Plan(
        kind="ratio", values={s.name: 0.5 for s in structure(model).sites}, budget={"sparsity": 0.5}, account={}, method="x", settings={}
    )
    with pytest.raises(InputTypeError, match="kind 'bits'"):
        rtn(model, bits=ratios, group_size=8)


def test_half_precision_models_keep_their_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model: nn.Module = build("llama").to(dtype)
        rtn(model, bits=4, group_size=8)
        assert {p.dtype for p in model.parameters()} == {dtype}
