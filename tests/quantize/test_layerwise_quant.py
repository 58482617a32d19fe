"""Layer-wise quantization: exact counts, special cases equal to the quantizer itself, sweeps against brute force, bad input."""

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from whatmatters.core.catalog import scorers
from whatmatters.core.data import Calibration
from whatmatters.core.errors import BudgetError, DataError, InputError, InputTypeError, NonFiniteError, UnknownNameError, WhatMattersError
from whatmatters.core.plans import Plan
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.quantize import bits_sweep, gptq, layerwise_quant, rsq, rtn
from whatmatters.testing.families import build, inputs


def data() -> Calibration:
    return Calibration.from_tensors(inputs("llama"), batch=3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stack(layers: int, sizes: tuple[int, ...] = (8,)) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(8, sizes[i % len(sizes)]) for i in range(layers)))


def ranked(values: Sequence[float], unit: str = "layer") -> Scores:
    return Scores(unit, {str(i): torch.tensor(float(value)) for i, value in enumerate(values)}, "mine", {})


def bits_of(report: Report) -> dict[str, int]:
    return {row["site"]: row["bits"] for row in report.rows}


# Allocation


def shuffled(n: int, seed: int = 0) -> list[float]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double().tolist()


def test_thirty_layers_of_forty_at_four_bits_are_three_and_a_half() -> None:
    """The paper's arithmetic for LLaMA-2-13B, which has 40 equal layers."""
    values = shuffled(40)
    report = layerwise_quant(stack(40), average_bits=3.5, layer_scores=ranked(values), count="codes", group_size=-1)
    bits = bits_of(report)
    assert sorted(bits.values()).count(2) == 10
    assert sum(bits.values()) / 40 == 3.5
    assert {name for name, b in bits.items() if b == 2} == {str(i) for i in range(40) if values[i] < 10}
    assert report.settings["account"]["average_codes"] == 3.5
    assert report.method == "layerwise-quant"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(0, 200), st.integers(0, 100))
def test_as_many_are_lowered_as_the_average_needs(n: int, hundredths: int, seed: int) -> None:
    average = 2 + hundredths / 100
    bits = bits_of(layerwise_quant(stack(n), average_bits=average, layer_scores=ranked(shuffled(n, seed)), count="codes", group_size=-1))
    lowered = [name for name, b in bits.items() if b == 2]
    assert len(lowered) == math.ceil(n * (200 - hundredths) / 200)
    assert sum(bits.values()) <= average * n + 1e-9
    order = sorted(range(n), key=lambda i: shuffled(n, seed)[i])
    assert set(lowered) == {str(i) for i in order[: len(lowered)]}


def test_the_budget_of_unequal_layers_is_kept_and_no_lowered_one_could_be_raised() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(4, 64), nn.Linear(64, 8), nn.Linear(8, 8))
    sizes = {str(i): layer.weight.numel() for i, layer in enumerate(model)}
    for average in (2.1, 2.5, 2.9, 3.3, 3.9):
        report = layerwise_quant(
            copy.deepcopy(model), average_bits=average, layer_scores=ranked([3, 1, 4, 1.5, 9]), count="codes", group_size=-1
        )
        bits = bits_of(report)
        used = sum(sizes[n] * b for n, b in bits.items())
        assert used <= average * sum(sizes.values())
        assert all(used + 2 * sizes[n] > average * sum(sizes.values()) for n, b in bits.items() if b == 2)


@pytest.mark.parametrize("count", ["stored", "codes"])
@pytest.mark.parametrize("backend", ["rtn", "gptq", "rsq"])
@pytest.mark.parametrize("bits", [4, 2])
def test_one_level_for_all_is_the_quantizer_itself(backend: str, bits: int, count: str) -> None:
    uniform, layered = build("llama"), build("llama")
    quantize: Any = {"rtn": rtn, "gptq": gptq, "rsq": rsq}[backend]
    quantize(uniform, data(), bits=bits, group_size=8)
    found = structure(layered)
    scores = Scores("layer", {name: torch.tensor(float(i)) for i, name in enumerate(found.blocks)}, "mine", {})
    # 8 inputs share a scale of 16 bits, and the shape entry of a site is 128 bits
    used = sum(s.shape[0] * (32 * math.ceil(s.shape[1] * bits / 32) + 16 * s.shape[1] // 8) + 128 for s in found.sites)
    stored = Fraction(used, sum(s.size for s in found.sites))
    average = stored if count == "stored" else bits
    report = layerwise_quant(layered, data(), average_bits=average, layer_scores=scores, backend=backend, group_size=8, count=count)
    assert same(state(uniform), state(layered))
    assert set(bits_of(report).values()) == {bits}
    assert report.settings["backend"] == backend


def test_three_levels_and_losses() -> None:
    values = [5.0, 1.0, 3.0, 2.0]
    report = layerwise_quant(
        stack(4), average_bits=4.5, levels=(8, 4, 2), layer_scores=ranked(values), count="codes", group_size=-1, symmetric=False
    )
    bits = bits_of(report)
    assert sum(bits.values()) <= 18
    assert [bits[str(i)] for i in sorted(range(4), key=lambda i: values[i])] == sorted(bits.values())
    table = {str(i): torch.tensor([w, 0.0]).double() for i, w in enumerate([1.0, 9.0, 2.0, 8.0])}
    losses = Scores("layer", table, "table", {"levels": [2, 4]}, scale="loss")
    report = layerwise_quant(stack(4), average_bits=3, layer_scores=losses, how="optimum", count="codes", group_size=-1)
    assert bits_of(report) == {"0": 2, "1": 4, "2": 2, "3": 4}


# Scorers and quantizers in their places


AHEAD = [entry.slug for entry in scorers("layer", "ahead")]


@pytest.mark.parametrize("name", AHEAD)
def test_every_layer_scorer_fits(name: str) -> None:
    model = build("llama")
    report = layerwise_quant(model, data(), average_bits=4, layer_scores=name, count="codes", levels=(8, 3), group_size=8)
    account = report.settings["account"]
    assert account["average_codes"] <= 4
    assert len(report.rows) == 14
    assert report.settings["layer_scores"].replace("_", "-").startswith(name.split("-")[0])


def test_the_papers_scorers_are_there() -> None:
    assert {"layer-shift", "weight-outliers"} <= set(AHEAD)


def test_functions_get_model_and_data_and_weight_scores_are_averaged() -> None:
    def mine(model: nn.Module, calibration: Calibration | None) -> Scores:
        return Scores("weight", {str(i): torch.full((8, 8), float(i)) for i in range(4)}, "mine", {})

    report = layerwise_quant(stack(4), average_bits=3, layer_scores=mine, count="codes", group_size=-1)
    assert bits_of(report) == {"0": 2, "1": 2, "2": 4, "3": 4}


def test_a_function_can_quantize() -> None:
    given: dict[str, Any] = {}

    def mine(model: nn.Module, calibration: Calibration | None, *, bits: Plan, **settings: Any) -> Report:
        given.update(settings, bits=bits)
        return Report("mine", "quantize", {"a": 1}, [{"site": "0", "bits": 2}], ["noted"])

    model = stack(2)
    report = layerwise_quant(
        model, average_bits=3, layer_scores=ranked([0, 1]), count="codes", group_size=4, backend=mine, backend_settings={"x": 3}
    )
    assert dict(given["bits"].values) == {"0": 2, "1": 4}
    assert (given["group_size"], given["symmetric"], given["x"]) == (4, True, 3)
    assert (report.method, report.settings["backend"], report.notes) == ("layerwise-quant", "mine", ["noted"])


def test_a_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    expected, model = build("llama", layers=3), build("llama", layers=3)
    scores = Scores("layer", {f"model.layers.{i}": torch.tensor(float(i)) for i in range(3)}, "mine", {})
    options: dict[str, Any] = {"average_bits": 3.4, "layer_scores": scores, "count": "codes", "group_size": 8, "backend": "gptq"}
    layerwise_quant(expected, data(), **options)

    def stop(label: str, done: int, total: int) -> None:
        if label == "gptq" and done == 2:
            raise KeyboardInterrupt

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        layerwise_quant(model, data(), run_dir=tmp_path, progress=stop, **options)
    assert same(state(model), before)
    layerwise_quant(model, data(), run_dir=tmp_path, resume=True, **options)
    assert same(state(model), state(expected))


# Sweeps


def probe(model: nn.Module) -> float:
    x = torch.linspace(-1, 1, 40).reshape(5, 8)
    with torch.no_grad():
        return float(model(x).square().sum())


def test_a_sweep_is_what_quantizing_again_and_again_gives() -> None:
    model = stack(4)
    before = state(model)
    orders = {"forward": ["0", "1", "2", "3"], "backward": ["3", "2", "1", "0"], "some": ["2"]}
    calls = 0

    def measure(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return probe(model)

    rows = bits_sweep(model, orders, measure, levels=(8, 2), group_size=4)
    assert same(state(model), before)
    assert calls == 5 + 3 + 1  # nothing and everything lowered are the same in both orders, and {2} is new
    assert len(rows) == 5 + 5 + 2
    for row in rows:
        twin = copy.deepcopy(model)
        bits = {name: 2 if name in orders[row["order"]][: row["lowered"]] else 8 for name in "0123"}
        rtn(twin, bits=bits, group_size=4, symmetric=False)
        assert row["value"] == probe(twin)
        assert row["average_bits"] == sum(bits.values()) / 4
    assert [row["lowered"] for row in bits_sweep(model, orders, measure, counts=[1], group_size=4)] == [1, 1, 1]


def test_a_sweep_gives_the_model_back_also_after_a_raise() -> None:
    model = build("llama")
    before = state(model)

    def fails(model: nn.Module) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        bits_sweep(model, {"one": ["model.layers.0"]}, fails, group_size=8)
    assert same(state(model), before)
    values = bits_sweep(
        model,
        {"one": ["model.layers.0"]},
        lambda m: float(m.model.layers[0].mlp.up_proj.weight.detach().std()),
        levels=(16, 2),
        group_size=8,
    )
    assert values[0]["value"] == pytest.approx(float(before["model.layers.0.mlp.up_proj.weight"].std()))
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"orders": {"a": ["7"]}}, "'7', which is no block"),
        ({"orders": {"a": ["1", "1"]}}, "named twice"),
        ({"levels": (4, 1)}, "level 1"),
        ({"group_size": 3}, "group size 3 does not divide"),
    ],
)
def test_bad_sweeps_are_refused(settings: dict[str, Any], told: str) -> None:
    orders = settings.pop("orders", {"a": ["0"]})
    with pytest.raises(InputError, match=told):
        bits_sweep(stack(2), orders, probe, **{"group_size": 4, **settings})


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"average_bits": 1.5}, BudgetError, "range is 2.0 to 4.0 bits per weight"),
        ({"average_bits": 4.01}, BudgetError, "range is 2.0 to 4.0 bits per weight"),
        ({"average_bits": math.nan}, InputError, "nan"),
        ({"levels": (4, 1)}, InputError, "level 1: quantizers take 2, 3"),
        ({"levels": (9, 4)}, InputError, "level 9"),
        ({"levels": ()}, InputError, "levels"),
        ({"group_size": 3}, InputError, "group size 3 does not divide"),
        ({"layer_scores": "loudness"}, UnknownNameError, "layer-shift"),
        ({"layer_scores": "layer-shift"}, DataError, "needs calibration data"),
        ({"layer_scores": ranked([1.0, 2.0])}, InputError, "no score"),
        ({"layer_scores": Scores("token", {"0": torch.ones(1, 2)}, "mine", {})}, InputTypeError, "unit 'token'"),
        ({"layer_scores": lambda model, data: 3}, InputTypeError, "int"),
        ({"how": "optimum"}, InputError, "loss table"),
        ({"backend": "gptq"}, DataError, "'gptq' needs calibration data"),
        ({"backend": "layerwise-quant"}, InputError, "this method itself"),
        ({"backend": "magic"}, UnknownNameError, "rtn"),
    ],
)
def test_bad_input_changes_nothing(settings: dict[str, Any], error: type[WhatMattersError], told: str) -> None:
    model = stack(3)
    before = state(model)
    options = {"average_bits": 3, "layer_scores": ranked([1, 2, 3]), "count": "codes", "group_size": -1}
    with pytest.raises(error, match=told) as caught:
        layerwise_quant(model, **{**options, **settings})
    assert "in quantize.layerwise_quant(" in str(caught.value) or "in allocate.bits(" in str(caught.value)
    assert same(state(model), before)


def test_nan_names_the_layer_and_constant_layers_go_through() -> None:
    model = stack(3)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"\b1 holds"):
        layerwise_quant(model, average_bits=3, layer_scores=ranked([1, 2, 3]), group_size=-1)
    with torch.no_grad():
        model[1].weight.fill_(0.5)
    assert len(layerwise_quant(model, average_bits=3, layer_scores=ranked([1, 2, 3]), count="codes", group_size=-1).rows) == 3
