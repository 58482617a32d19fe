"""RSQ: the sheet's oracles, weighted statistics against brute force, any scorer in its place, every family, faults and bad input."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from whatmatters.core.catalog import scorers
from whatmatters.core.checkpoint import save
from whatmatters.core.data import Calibration, call_model
from whatmatters.core.errors import DataError, InputError, ModelError, NonFiniteError, ResumeError, UnknownNameError, WhatMattersError
from whatmatters.core.formats import attached, dequantize
from whatmatters.core.grids import GridSettings, fit_grid
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.core.walk import Block, walk
from whatmatters.quantize import expand_dataset, gptq, rotate, rsq
from whatmatters.quantize._common import round_with_hessian
from whatmatters.score._common import Statistic, input_statistics
from whatmatters.score.tokens import TokenContext, mean_one, normalize_importance, score_tokens
from whatmatters.testing.families import VOCABULARY, build, inputs

GRID = GridSettings(-1, True, True)
BAD = {"group_size": 8, "rotate": None, "token_scores": "uniform"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(family: str = "llama", padded: bool = False, batch: int = 4) -> Calibration:
    ids = normal(6, 24, 16) if family == "sequential" else inputs(family)
    valid = None
    if padded:
        valid = torch.ones(ids.shape[:2], dtype=torch.bool)
        valid[1, 20:] = valid[4, 9:] = False
    return Calibration.from_tensors(ids, valid, batch=batch)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def solve(weight: Tensor, hessian: Tensor) -> Tensor:
    grid = fit_grid(weight, 3, GRID, weight.dtype)
    codes, _ = round_with_hessian([weight], [grid], hessian, damping=0.01, act_order=False)
    return dequantize(grid.with_codes(codes[0]), weight.dtype)


def statistics(block: nn.Module, x: Tensor, weights: Tensor | None) -> list[Statistic]:
    """Statistics of the first layer of a small network, through a walk of its own."""
    model = nn.Sequential(block)
    found: list[Statistic] = []

    def visit(block: Block) -> dict[str, Any]:
        found.extend(input_statistics(block, block.sites, weights=None if weights is None else [weights]))
        return {}

    data = Calibration.from_tensors(x, batch=len(x))
    walk(model, data, visit, structure=structure(model), settings={}, commit=False)
    return found


# The sheet's oracles


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "sequential"])
@pytest.mark.parametrize("scores", ["uniform", "constant"])
def test_equal_weights_are_plain_gptq_to_the_bit(family: str, scores: str, padded: bool) -> None:
    def constant(context: TokenContext) -> Tensor:
        return torch.full(context.shape, -math.pi)

    plain, weighted = build(family), build(family)
    options = {"bits": 3, "group_size": 8, "act_order": True, "allow_uncovered": True}
    gptq(plain, data(family, padded), **options)
    rsq(weighted, data(family, padded), token_scores=constant if scores == "constant" else "uniform", rotate=None, **options)
    assert same(state(plain), state(weighted))
    assert not same(state(plain), state(build(family)))


@pytest.mark.parametrize("scale", [1e-6, 0.25, 3.7, 1024.0])
def test_the_scale_of_the_hessian_does_not_matter(scale: float) -> None:
    x = normal(200, 24) @ normal(24, 24, seed=1)
    hessian = x.double().T @ x.double()
    assert torch.equal(solve(normal(16, 24, seed=2), hessian), solve(normal(16, 24, seed=2), scale * hessian))


@pytest.mark.parametrize("seed", range(10))
def test_integer_weights_are_repetitions_and_zero_is_absence(seed: int) -> None:
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight.copy_(normal(8, 12, seed=seed))
    x = normal(60, 12, seed=seed + 100) @ normal(12, 12, seed=seed + 200)
    times = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(seed))
    weighted = statistics(layer, x, times.float())[0]
    repeated = statistics(layer, x.repeat_interleave(times, 0), None)[0]
    expected = (x.double() * times[:, None]).T @ x.double()
    for found in (weighted, repeated):
        assert found.tokens == int(times.sum())
        assert torch.allclose(found.total, expected, rtol=1e-5, atol=1e-5 * float(expected.diagonal().max()))
    assert torch.equal(solve(layer.weight.detach(), weighted.total), solve(layer.weight.detach(), repeated.total))


def planted(seed: int) -> dict[str, float]:
    """A few tokens have a covariance of their own. Errors of solutions under the weights (w) and under equal ones (1)."""
    generator = torch.Generator().manual_seed(seed)
    d = int(torch.randint(16, 65, (), generator=generator))
    tokens = 40 * d
    important = torch.rand(tokens, generator=generator) < 0.05 + 0.05 * float(torch.rand((), generator=generator))
    mixing = torch.randn(2, d, d, generator=generator, dtype=torch.float64) * (torch.arange(d, dtype=torch.float64) + 1) ** -1.0
    drawn = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    x = torch.where(important[:, None], drawn @ mixing[0].T, drawn @ mixing[1].T)
    weight = torch.randn(2 * d, d, generator=generator)
    weights = mean_one(normalize_importance(important.float()[None], r_min=0.005))[0]
    permuted = weights[torch.randperm(tokens, generator=generator)]
    uniform = torch.ones(tokens, dtype=torch.float64)
    hessians = {name: (x * w[:, None]).T @ x for name, w in (("w", weights), ("1", uniform), ("permuted", permuted))}
    errors: dict[str, float] = {}
    for name, hessian in hessians.items():
        delta = (solve(weight, hessian) - weight).double()
        errors |= {f"{name} under {h}": float(((delta @ hessians[h]) * delta).sum()) for h in ("w", "1")}
    return errors


def test_planted_important_tokens_win_every_time_and_permuted_weights_do_not() -> None:
    draws = [planted(seed) for seed in range(60)]
    assert all(e["w under w"] < 0.8 * e["1 under w"] for e in draws)
    assert all(e["w under 1"] > e["1 under 1"] for e in draws)
    assert all(e["w under w"] < 0.9 * e["permuted under w"] for e in draws)
    # permuted weights are as good as equal ones: no better on average, and better about as often as worse
    ratios = torch.tensor([e["permuted under w"] / e["1 under w"] for e in draws]).log()
    assert ratios.mean() > -2 * ratios.std() / 60**0.5
    assert (ratios < 0).sum() < 42
    assert torch.tensor([e["w under w"] / e["1 under w"] for e in draws]).log().mean().exp() < 0.6


# Statistics and scores of a walk


def test_scores_come_from_the_intact_block_on_inputs_of_the_rounded_ones() -> None:
    model = build("llama")
    original = copy.deepcopy(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def spy(context: TokenContext) -> Tensor:
        seen.setdefault(context.block, (context.inputs, context.outputs))
        return context.inputs.norm(dim=-1)

    calibration = data(batch=3)
    rsq(model, calibration, bits=2, group_size=8, token_scores=spy, rotate=None)
    caught: list[Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        call_model(model, calibration.inputs[:3])  # block 0 is rounded now
        handle.remove()
        x, y = seen["model.layers.1"]
        assert torch.equal(x, caught[0])
        positions = original.model.rotary_emb(x, torch.arange(24)[None])
        intact = original.model.layers[1](x, position_embeddings=positions)
    assert torch.allclose(intact if isinstance(intact, Tensor) else intact[0], y, atol=1e-6)


def test_experts_weight_the_tokens_they_are_given() -> None:
    """The statistics of an expert against routing done by hand."""
    model = build("mixtral")
    calibration = Calibration.from_tensors(inputs("mixtral"), batch=6)
    weights = torch.rand(6, 24, generator=torch.Generator().manual_seed(3))
    found: dict[str, Tensor] = {}

    def visit(block: Block) -> dict[str, Any]:
        for statistic in input_statistics(block, block.sites, weights=[weights]):
            found.update(dict.fromkeys(statistic.sites, statistic.total))
        return {}

    walk(model, calibration, visit, structure=structure(model), settings={}, commit=False)
    moe = model.model.layers[0].mlp
    caught: list[Tensor] = []
    handle = moe.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach().reshape(-1, 32)))
    with torch.no_grad():
        call_model(model, calibration.inputs)
        handle.remove()
        x = caught[0]
        chosen = (x @ moe.gate.weight.T).topk(2).indices
        for expert in range(4):
            w = weights.reshape(-1).double() * (chosen == expert).any(1)
            assert w.sum() > 0
            expected = (x.double() * w[:, None]).T @ x.double()
            assert torch.allclose(found[f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"], expected, rtol=1e-4, atol=1e-5)


def test_modules_say_which_sites_listen_to_weights() -> None:
    plain, weighted = build("llama"), build("llama")
    gptq(plain, data(), bits=2, group_size=8)
    rsq(weighted, data(), bits=2, group_size=8, rotate=None, token_scores="activation-norm", modules=["*.0.mlp.down_proj"])
    for site in structure(plain).in_block("model.layers.0"):
        assert torch.equal(site.view(plain), site.view(weighted)) == (not site.name.endswith("down_proj")), site.name


def test_weights_of_padding_are_zero_and_its_content_does_not_matter() -> None:
    calibration = data(padded=True)
    assert calibration.valid is not None
    other = Calibration.from_tensors(calibration.inputs.masked_fill(~calibration.valid, 5), calibration.valid, batch=4)
    results = []
    for one in (calibration, other):
        model = build("llama")
        rsq(model, one, bits=3, group_size=8)
        results.append(state(model))
    assert same(*results)


WALKERS = [entry.slug for entry in scorers("token", "walk")]


@pytest.mark.parametrize("name", WALKERS)
def test_every_token_scorer_fits(name: str) -> None:
    model = build("qwen3")
    report = rsq(model, data("qwen3"), bits=3, group_size=8, token_scores=name)
    assert len(report.rows) == 14
    assert report.settings["token_scores"] == name
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    by_function = build("qwen3")
    function = next(entry.function for entry in scorers("token", "walk") if entry.slug == name)
    rsq(by_function, data("qwen3"), bits=3, group_size=8, token_scores=function)
    assert same(state(model), state(by_function))


def test_the_attention_changes_what_is_rounded() -> None:
    assert "attention-concentration" in WALKERS
    uniform, attention = build("llama"), build("llama")
    rsq(uniform, data(), bits=3, group_size=8, token_scores="uniform")
    rsq(attention, data(), bits=3, group_size=8)
    assert not same(state(uniform), state(attention))


def test_saved_scores_fit_and_are_noted() -> None:
    live, saved = build("llama"), build("llama")
    scores = score_tokens(saved, data(), "attention-concentration")
    rsq(live, data(), bits=2, group_size=8, rotate=None)
    report = rsq(saved, data(), bits=2, group_size=8, rotate=None, token_scores=scores)
    assert any("departure" in note for note in report.notes)
    for site in structure(live).in_block("model.layers.0"):  # nothing is rounded before the first block: the scores are the same
        assert torch.equal(site.view(live), site.view(saved))
    assert not same(state(live), state(saved))


# Expansion


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 5), st.integers(0, 2**30), st.booleans())
def test_expanded_sequences_are_rolls(samples: int, length: int, factor: int, seed: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (samples, length), generator=generator)
    sizes = torch.randint(1, length + 1, (samples,), generator=generator) if padded else torch.full((samples,), length)
    valid = torch.arange(length)[None] < sizes[:, None]
    calibration = Calibration.from_tensors(ids, valid if padded else None, document=torch.arange(samples) % 2, batch=3)
    if factor > int(sizes.min()):
        with pytest.raises(DataError, match="at most one copy"):
            expand_dataset(calibration, factor)
        return
    expanded = expand_dataset(calibration, factor)
    assert len(expanded) == factor * samples
    assert expanded.batch == 3
    assert torch.equal(expanded.document, calibration.document.repeat(factor))
    assert torch.equal(expanded.inputs[:samples], ids)
    assert (expanded.valid is None) == (calibration.valid is None)
    for k in range(factor):
        for row in range(samples):
            size = int(sizes[row])
            found = expanded.inputs[k * samples + row]
            assert found[:size].tolist() == torch.roll(ids[row, :size], k * size // factor).tolist()
            assert sorted(found.tolist()) == sorted(ids[row].tolist())
            assert torch.equal(found[size:], ids[row, size:])


def test_expansion_is_the_same_as_giving_the_rolls() -> None:
    expanded, given_rolls = build("llama"), build("llama")
    report = rsq(expanded, data(), bits=3, group_size=8, expand_factor=3)
    ids = data().inputs
    rolls = Calibration.from_tensors(torch.cat([ids.roll(k * 8, 1) for k in range(3)]), batch=4)
    rsq(given_rolls, rolls, bits=3, group_size=8)
    assert same(state(expanded), state(given_rolls))
    assert report.rows[0]["tokens"] == pytest.approx(3 * 6 * 24)


def test_what_cannot_be_expanded() -> None:
    with pytest.raises(InputError, match="at least 1"):
        expand_dataset(data(), 0)
    with pytest.raises(DataError, match="sequences of tokens"):
        expand_dataset(Calibration.from_tensors(normal(5, 8)), 2)
    assert expand_dataset(data(), 1).digest == data().digest


# Rotation inside the walk


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("mode", ["hadamard", "random", "online"])
def test_without_rounding_only_the_rotation_is_left(family: str, mode: str) -> None:
    model, rotated = build(family), build(family)
    ids = inputs(family)
    before = call_model(model, ids).logits
    rsq(model, data(family), bits=16, rotate=mode, seed=4, allow_uncovered=True)
    rotate(rotated, mode=mode, seed=4)
    assert same(state(model), state(rotated))
    assert (call_model(model, ids).logits - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("mode", ["hadamard", "random", "online"])
def test_eight_bits_on_a_rotated_model_are_close(family: str, mode: str) -> None:
    """The rotated prefix feeds rotated blocks: one wrong input would show at once."""
    model = build(family)
    ids = inputs(family)
    before = call_model(model, ids).logits
    report = rsq(model, data(family), bits=8, group_size=8, rotate=mode, allow_uncovered=True)
    assert (call_model(model, ids).logits - before).abs().max() < 0.05 * before.abs().max()
    assert all(row["relative_weight_error"] < 1e-4 for row in report.rows)
    grids = attached(model)
    for site in structure(model).sites:
        view = site.view(model)
        grid = grids[site.name]
        assert torch.equal(dequantize(grid.with_codes(grid.codes_of(view)), view.dtype), view)


def test_rotation_helps_where_single_weights_stand_out() -> None:
    errors = {}
    for mode in (None, "hadamard"):
        model = build("llama")
        with torch.no_grad():
            weight = model.model.layers[1].mlp.gate_proj.weight
            weight[torch.arange(64), torch.arange(64) % 32] = 12 * weight.std()
        report = rsq(model, data(), bits=3, group_size=-1, rotate=mode, token_scores="uniform")
        errors[mode] = next(row["relative_weight_error"] for row in report.rows if row["site"] == "model.layers.1.mlp.gate_proj")
    assert errors["hadamard"] < 0.5 * errors[None]


def test_the_checkpoint_reloads_without_us(tmp_path: Path) -> None:
    model = build("llama", tied=True)
    report = rsq(model, data(), bits=3, group_size=8)
    assert any("became two" in note for note in report.notes)
    assert save(model, None, tmp_path / "out").format == "compressed-tensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = inputs("llama")
    expected = model(ids).logits
    assert (loaded(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_layer_norms_refuse_rotation_and_go_without() -> None:
    model = build("gpt2")
    before = state(model)
    with pytest.raises(ModelError, match=r"LayerNorm.*rotate=None"):
        rsq(model, data("gpt2"), bits=3, group_size=8)
    assert same(state(model), before)
    assert len(rsq(model, data("gpt2"), bits=3, group_size=8, rotate=None).rows) == 8


# Faults


class Fails:
    """A token scorer that raises the first time it sees a block."""

    def __init__(self, block: str, error: BaseException) -> None:
        self.block = block
        self.error: BaseException | None = error

    def __call__(self, context: TokenContext) -> Tensor:
        if self.error is not None and context.block == self.block:
            error, self.error = self.error, None
            raise error
        return context.attention_received


@pytest.mark.parametrize(("mode", "block"), [("hadamard", 0), ("hadamard", 1), ("hadamard", 2), ("online", 1), (None, 1)])
def test_a_run_that_failed_continues_to_the_same_bits(mode: str | None, block: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bits": 3, "group_size": 8, "rotate": mode}
    expected, model = build("llama", layers=3, tied=True), build("llama", layers=3, tied=True)
    rsq(expected, data(), token_scores=Fails("none", ValueError()), **settings)
    before = state(model)
    scorer = Fails(f"model.layers.{block}", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        rsq(model, data(), token_scores=scorer, run_dir=tmp_path / "run", **settings)
    assert same(state(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert attached(model) == {}
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert len(list((tmp_path / "run").glob("block-*"))) == block
    report = rsq(model, data(), token_scores=scorer, run_dir=tmp_path / "run", resume=True, **settings)
    assert same(state(model), state(expected))
    assert len(report.rows) == 21
    assert attached(model).keys() == attached(expected).keys()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"r_min": 0.01}, "setting r_min: was 0.005, is 0.01"),
        ({"r_max": 0.9}, "setting r_max"),
        ({"power": 2}, "setting power"),
        ({"position_norm": "linear"}, "setting position_norm"),
        ({"importance_settings": {"bins": 4}}, "setting bins"),
        ({"expand_factor": 2}, "setting expand_factor"),
        ({"rotate": "random"}, "setting rotate"),
        ({"rotate": None}, "setting rotate"),
        ({"seed": 1}, "setting seed"),
        ({"token_scores": "activation-norm"}, "setting token_scores"),
        ({"token_scores": "scores"}, "setting token_scores"),
        ({"modules": ["*.down_proj"]}, "setting modules"),
        ({"bits": 4}, "setting bits"),
        ({"group_size": 16}, "setting group_size"),
        ({"damping": 0.1}, "setting damping"),
        ({"act_order": True}, "setting act_order"),
        ({"symmetric": False}, "setting symmetric"),
        ({"clip_search": False}, "setting clip_search"),
        ({"true_sequential": False}, "setting true_sequential"),
    ],
)
def test_other_settings_are_not_resumed(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"bits": 3, "group_size": 8, "run_dir": tmp_path / "run"}
    model = build("llama")
    with pytest.raises(KeyboardInterrupt):
        rsq(model, data(), progress=stop, **settings)
    if changed.get("token_scores") == "scores":
        changed = {"token_scores": score_tokens(model, data())}
    with pytest.raises(ResumeError, match=told):
        rsq(model, data(), resume=True, **{**settings, **changed})


def test_scores_of_other_values_are_another_setting(tmp_path: Path) -> None:
    model = build("llama")
    scores = score_tokens(model, data())
    other = Scores("token", {name: value + 1 for name, value in scores.values.items()}, scores.method, structure=scores.structure)

    def stop(label: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"group_size": 8, "run_dir": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        rsq(model, data(), token_scores=scores, progress=stop, **settings)
    with pytest.raises(ResumeError, match="setting token_scores"):
        rsq(model, data(), token_scores=other, resume=True, **settings)


# Bad input


def broken(value: float) -> Any:
    def scorer(context: TokenContext) -> Tensor:
        return torch.full(context.shape, value).cumsum(1)

    return scorer


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"r_min": -0.1}, InputError, "r_min is -0.1"),
        ({"r_min": 1.0}, InputError, "r_min is 1.0 and r_max 1.0"),
        ({"power": 0}, InputError, "power is 0"),
        ({"importance_settings": {"quantile": 0.2}}, InputError, "quantile is 0.2"),
        ({"damping": 0.0}, InputError, "damping 0.0"),
        ({"bits": 1}, InputError, "1 bits"),
        ({"bits": 12}, InputError, "12 bits"),
        ({"group_size": 7}, InputError, "group size 7 does not divide the 32 inputs"),
        ({"expand_factor": 0}, InputError, "expand_factor 0"),
        ({"expand_factor": 99}, DataError, "expand_factor 99"),
        ({"modules": ["*.nothing"]}, InputError, "no site is named like"),
        ({"rotate": "givens"}, InputError, "'givens'"),
        ({"token_scores": "loudness"}, UnknownNameError, "attention-concentration"),
        ({"token_scores": broken(math.nan)}, NonFiniteError, "NaN or infinity"),
        ({"token_scores": lambda context: torch.zeros(2, 3)}, InputError, "expected"),
    ],
)
def test_bad_settings_change_nothing(settings: dict[str, Any], error: type[WhatMattersError], told: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(error, match=told) as caught:
        rsq(model, data(), **{"bits": 3, **BAD, **settings})
    assert str(caught.value).count("\n  in quantize.") == 1
    assert same(state(model), before)


def test_sites_that_are_not_rounded_pass_through() -> None:
    model = build("llama")
    names = [site.name for site in structure(model).sites]
    kept = model.get_submodule(names[6]).weight.detach().clone()
    report = rsq(model, data(), bits={name: 16 if i == 6 else 4 for i, name in enumerate(names)}, **BAD)
    assert torch.equal(model.get_submodule(names[6]).weight, kept)
    assert names[6] not in {row["site"] for row in report.rows}


def test_sequences_of_one_token_and_silent_scores_weigh_alike() -> None:
    one = Calibration.from_tensors(torch.arange(1, VOCABULARY)[:, None], batch=16)
    plain, weighted = build("llama"), build("llama")
    gptq(plain, one, bits=3, group_size=8)
    rsq(weighted, one, bits=3, group_size=8, rotate=None)
    assert same(state(plain), state(weighted))


def test_vectors_without_sequences_are_refused() -> None:
    model = build("sequential")
    with pytest.raises(ModelError, match="samples, length"):
        rsq(model, Calibration.from_tensors(inputs("sequential")), bits=3, **BAD)
