"""WINA: the best subset by enumeration, masks by a sort in Python, the transform in float64, decoding against whole sequences, undoing."""

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from whatmatters.core import checkpoint, embedded
from whatmatters.core.data import Calibration
from whatmatters.core.errors import (
    BudgetError,
    DataError,
    FormatError,
    InputError,
    InputTypeError,
    ModelError,
    NonFiniteError,
    WhatMattersError,
)
from whatmatters.core.plans import Plan
from whatmatters.core.sites import structure
from whatmatters.infer import greedy_rows, teal, wina
from whatmatters.infer._common import gates_of, kept_channels, orthogonal_basis
from whatmatters.testing.families import build, causal, inputs


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """A model of a single linear."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return nn.Sequential(layer)


def through(entry: Callable[..., Any], weight: Tensor, x: Tensor, sparsity: float, bias: Tensor | None = None, **more: Any) -> Tensor:
    """What a single linear gives under a handle."""
    with torch.no_grad(), entry(one(weight, bias), sparsity=sparsity, dense_prefix=0, **more) as handle:
        return handle._gates[0].module(x)


def chosen(scores: Tensor, keep: int) -> Tensor:
    """A mask of the `keep` largest of each row, the earlier of equals first, by a sort in Python."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in zip(mask.view(-1, scores.shape[-1]), scores.reshape(-1, scores.shape[-1]).tolist(), strict=True):
        row[sorted(range(len(values)), key=lambda j: (-values[j], j))[:keep]] = True
    return mask


# The mathematics


def test_with_orthogonal_columns_it_is_the_best_of_all_subsets() -> None:
    draw = draws(0)
    subsets = torch.zeros(math.comb(12, 6), 12, dtype=torch.float64)
    for row, kept in zip(subsets, itertools.combinations(range(12), 6), strict=True):
        row[list(kept)] = 1
    for _ in range(100):
        basis = torch.linalg.qr(torch.randn(20, 12, generator=draw, dtype=torch.float64)).Q
        weight = basis * torch.randn(12, generator=draw, dtype=torch.float64).mul(0.8).exp()
        x = torch.randn(12, generator=draw, dtype=torch.float64)
        whole = weight @ x
        errors = ((subsets * x) @ weight.T - whole).square().sum(1)
        own = through(wina, weight, x[None, None], 0.5)[0, 0]
        dropped = (x * weight.norm(dim=0)).square().sort().values[:6].sum()
        assert float((own - whole).square().sum()) == pytest.approx(float(errors.min()), rel=1e-9)
        assert float(errors.min()) == pytest.approx(float(dropped), rel=1e-10)


def test_with_equal_norms_it_is_teal() -> None:
    weight = functional.normalize(torch.randn(9, 16, generator=draws(1), dtype=torch.float64), dim=0)
    x = torch.randn(1, 30, 16, generator=draws(2), dtype=torch.float64)
    assert torch.equal(through(wina, weight, x, 0.6), through(teal, weight, x, 0.6))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.25, 0.5, 0.65]))
def test_scaling_a_channel_and_its_weights_changes_nothing(seed: int, sparsity: float) -> None:
    draw = draws(seed)
    weight, x = torch.randn(8, 20, generator=draw), torch.randn(1, 3, 20, generator=draw)
    scale = 2.0 ** torch.randint(-6, 7, (20,), generator=draw)  # powers of two: nothing is rounded
    assert torch.equal(through(wina, weight, x, sparsity), through(wina, weight / scale, x * scale, sparsity))


def test_scaling_does_change_teal() -> None:
    weight, x = torch.randn(8, 20, generator=draws(3)), torch.randn(1, 3, 20, generator=draws(4))
    scale = 2.0 ** torch.arange(-10, 10)
    assert not torch.equal(through(teal, weight, x, 0.5), through(teal, weight / scale, x * scale, 0.5))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
def test_with_columns_of_unequal_norm_it_beats_magnitude_and_chance(sparsity: float) -> None:
    errors = torch.zeros(3, dtype=torch.float64)
    for seed in range(200):
        draw = draws(seed)
        weight = torch.randn(24, 32, generator=draw) * torch.randn(32, generator=draw).mul(0.7).exp()
        x = torch.randn(1, 1, 32, generator=draw)
        whole = x @ weight.T
        chance = torch.zeros(32)
        chance[torch.randperm(32, generator=draw)[: kept_channels(32, sparsity)]] = 1
        arms = (through(wina, weight, x, sparsity), through(teal, weight, x, sparsity), (x * chance) @ weight.T)
        errors += torch.stack([(arm - whole).norm() / whole.norm() for arm in arms]).double()
    assert errors[0] < errors[1] < errors[2]


def test_nothing_but_the_bias_is_left_where_no_channel_is_kept() -> None:
    weight, bias = torch.randn(3, 4, generator=draws(5)), torch.tensor([1.0, 2.0, 3.0])
    for x in (torch.randn(1, 1, 4), torch.randn(1, 5, 4)):
        assert torch.equal(through(wina, weight, x, 0.9, bias), bias.expand(1, x.shape[1], 3))


@pytest.mark.parametrize(
    ("size", "sparsity", "keep"), [(100, 0.9, 10), (10, 0.65, 3), (4096, 0.65, 1433), (768, 1 / 3, 512), (7, 0.0, 7), (4, 0.99, 0)]
)
def test_counts_are_rounded_down_in_decimals(size: int, sparsity: float, keep: int) -> None:
    assert kept_channels(size, sparsity) == keep


def test_a_zero_weight_keeps_the_first_channels_and_gives_the_bias() -> None:
    bias = torch.tensor([1.0, 2.0])
    with torch.no_grad(), wina(one(torch.zeros(2, 6), bias), sparsity=0.5) as handle:
        gate = handle._gates[0]
        assert gate.mask(torch.randn(6)).tolist() == [True] * 3 + [False] * 3
        assert torch.equal(gate.module(torch.randn(1, 1, 6)), bias.view(1, 1, 2))


# Every site of every family


def naive(site: Any, model: nn.Module, x: Tensor, keep: int, weighted: bool = True) -> Tensor:
    """W (m * x) + b with the mask of a sort in Python."""
    weight = site.view(model)
    scores = x.abs() * (weight.norm(dim=0) if weighted else 1)
    bias = getattr(model.get_submodule(site.name), "bias", None)
    return functional.linear(torch.where(chosen(scores, keep), x, 0), weight, bias)


@pytest.mark.parametrize("entry", [wina, teal])
@pytest.mark.parametrize("family", [*causal(), "sequential"])
def test_every_site_gives_what_the_formula_says(family: str, entry: Callable[..., Any]) -> None:
    model = build(family)
    given = inputs(family, samples=2, length=6)
    seen: list[tuple[str, Tensor, Tensor]] = []
    with entry(model, sparsity=0.4, dense_prefix=0, allow_uncovered=True) as handle, torch.no_grad():
        hooks = [gate.module.register_forward_hook(lambda m, args, out, name=gate.site.name: seen.append((name, args[0], out)))
                 for gate in handle._gates]  # fmt: skip
        model(given)
        model(given[:1, :1] if family != "sequential" else given[:1])
        for hook in hooks:
            hook.remove()
        assert all(row["tokens_skipping"] == 1 for row in handle.counts())
    assert len({name for name, _, _ in seen}) == len([s for s in structure(model).sites if s.index is None])
    for name, x, y in seen:
        site = structure(model).site(name)
        expected = naive(site, model, x, kept_channels(site.shape[1], 0.4), entry is wina)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)


def test_experts_are_refused_or_stay_dense_and_are_named() -> None:
    model = build("mixtral")
    with pytest.raises(ModelError, match="experts"):
        wina(model)
    with wina(model, allow_uncovered=True) as handle:
        assert any("experts.gate_up_proj" in note for note in handle.report.notes)
        assert not any("experts" in row["site"] for row in handle.report.rows)


# Decoding and positions


def decoded(model: nn.Module, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a sequence that is fed in pieces, with a key-value cache."""
    cache, parts = None, []
    for start, stop in itertools.pairwise([0, *cuts, ids.shape[1]]):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"mask_by": "threshold"}, {"transform": True}])
def test_pieces_and_single_tokens_give_what_the_whole_sequence_gives(family: str, more: dict[str, Any]) -> None:
    model, ids = build(family), inputs(family, samples=1, length=14)
    calibration = Calibration.from_tensors(inputs(family, samples=4, length=16, seed=9), batch=2)
    with torch.no_grad(), wina(model, calibration, sparsity=0.5, dense_prefix=3, **more):
        whole = model(ids).logits
        for cuts in ([1, 2, 3, 4, 5], [2, 7], list(range(1, 14))):
            torch.testing.assert_close(decoded(model, ids, cuts), whole, rtol=1e-3, atol=1e-4)


def test_the_dense_prefix_is_dense_and_nothing_else_is() -> None:
    model, ids = build("llama"), inputs("llama", samples=2, length=12)
    with torch.no_grad():
        dense = model(ids).logits
        with wina(model, sparsity=0.7, dense_prefix=5):
            sparse = model(ids).logits
            given = model(ids, position_ids=torch.arange(12)[None]).logits
        with wina(model, sparsity=0.7, dense_prefix=12):
            torch.testing.assert_close(model(ids).logits, dense)
    torch.testing.assert_close(sparse[:, :5], dense[:, :5])
    assert (sparse[:, 5:] - dense[:, 5:]).abs().amax(-1).min() > 1e-3
    assert torch.equal(given, sparse)


def test_padding_on_the_left_counts_by_the_positions_that_are_given() -> None:
    model, ids = build("llama"), inputs("llama", samples=1, length=8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    with torch.no_grad(), wina(model, sparsity=0.5, dense_prefix=4):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(shifted, model(ids).logits, rtol=1e-3, atol=1e-4)


def test_generate_skips_at_every_site_for_every_token_after_the_first() -> None:
    model, ids = build("llama"), inputs("llama", samples=1, length=6)
    with wina(model, sparsity=0.5) as handle:
        made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert made.shape == (1, 11)
        assert {row["tokens_skipping"] for row in handle.counts()} == {4}
        assert {row["tokens_dense"] for row in handle.counts()} == {6}
        assert all(row["kept_share"] == 0.5 for row in handle.counts())


# The transform


def test_the_transform_leaves_the_function_and_makes_columns_orthogonal() -> None:
    model, ids = build("llama").double(), inputs("llama", samples=2, length=10)
    keys, gates = model.model.layers[1].self_attn.k_proj.weight, model.model.layers[1].mlp.gate_proj.weight
    singular = torch.linalg.svdvals(keys.detach()), torch.linalg.svdvals(gates.detach())
    with torch.no_grad():
        dense = model(ids).logits
        with wina(model, sparsity=0.0, transform=True):
            assert float((model(ids).logits - dense).abs().max()) < 1e-8
            for weight, values in zip((keys, gates), singular, strict=True):
                gram = weight.T @ weight
                assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-12
                torch.testing.assert_close(weight.norm(dim=0)[: len(values)], values, rtol=1e-10, atol=1e-12)


def test_keys_of_few_heads_lose_nothing_up_to_their_rank() -> None:
    model, ids = build("llama").double(), inputs("llama", samples=2, length=10)  # 2 of 4 heads have keys: rank 16 of 32
    found = structure(model)
    shares = {site.name: 0.5 if site.name.endswith("k_proj") else 0.0 for site in found.sites}
    with torch.no_grad():
        dense = model(ids).logits
        with wina(model, allocation=Plan("ratio", shares, {}, {}, "mine"), transform=True, dense_prefix=0):
            assert float((model(ids).logits - dense).abs().max()) < 1e-8
        with wina(model, allocation=Plan("ratio", shares, {}, {}, "mine"), dense_prefix=0):
            assert float((model(ids).logits - dense).abs().max()) > 1e-5


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_the_basis_is_orthogonal_for_all_shapes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=draws(6))
    basis = orthogonal_basis(weight)
    torch.testing.assert_close(basis.T @ basis, torch.eye(shape[1], dtype=torch.float64))
    gram = (weight.double() @ basis).T @ (weight.double() @ basis)
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10)


def test_orthogonal_only_uses_norms_at_k_and_gate_and_nowhere_else() -> None:
    for family, expected in (("llama", {"k_proj", "gate_proj"}), ("gpt2", {"c_attn", "c_fc"})):
        with wina(build(family), norms="orthogonal_only") as handle:
            assert {gate.site.name.rpartition(".")[2] for gate in handle._gates if gate.norms is not None} == expected


def test_the_transform_needs_norms_to_read_from() -> None:
    with pytest.raises(ModelError, match="norm"):
        wina(build("sequential"), transform=True)


# Thresholds and the greedy search


def test_thresholds_skip_the_asked_share_of_unseen_data() -> None:
    weight = torch.randn(16, 64, generator=draws(7)) * torch.randn(64, generator=draws(8)).exp()
    data = torch.randn(2, 2000, 64, generator=draws(9))
    for sparsity in (0.25, 0.5, 0.65, 0.9):
        with torch.no_grad(), wina(one(weight), Calibration.from_tensors(data[0]), sparsity=sparsity, mask_by="threshold") as handle:
            gate = handle._gates[0]
            assert 1 - float(gate.mask(data[1]).float().mean()) == pytest.approx(sparsity, abs=0.01)
            own = (data[0] * weight.norm(dim=0)).abs()
            assert 1 - float(gate.mask(data[0]).float().mean()) == pytest.approx(float((own <= gate.bound).float().mean()), abs=1e-6)
            assert gate.bound == pytest.approx(float(own.flatten().double().quantile(sparsity)), rel=1e-3)


def test_a_threshold_of_zero_keeps_what_is_not_zero() -> None:
    data = torch.randn(50, 8, generator=draws(10)).relu()  # half of it is zero
    with torch.no_grad(), wina(one(torch.randn(3, 8)), Calibration.from_tensors(data), sparsity=0.3, mask_by="threshold") as handle:
        assert torch.equal(handle._gates[0].mask(data), data > 0)


def test_thresholds_do_not_look_at_padding_or_the_dense_prefix() -> None:
    ids = inputs("llama", samples=4, length=16)
    valid = torch.ones(4, 16, dtype=torch.bool)
    valid[2:, 10:] = False
    bounds = []
    for filler in (3, 40):
        calibration = Calibration.from_tensors(ids.masked_fill(~valid, filler), valid, batch=2)
        with wina(build("llama"), calibration, mask_by="threshold") as handle:
            bounds.append([row["threshold"] for row in handle.report.rows])
    assert bounds[0] == bounds[1]
    with pytest.raises(DataError, match="beyond the first 16"):
        wina(build("llama"), Calibration.from_tensors(ids), mask_by="threshold", dense_prefix=16)


def test_greedy_rows_grow_by_one_step_and_take_the_least_error_each_time() -> None:
    costs = {"q": 1.0, "k": 0.25, "gate": 3.5}
    weights = {"q": 3.0, "k": 1.0, "gate": 5.0}

    def error(shares: Any) -> float:
        return sum(weights[name] * shares[name] ** 2 for name in costs) + shares["q"] * shares["gate"]

    rows = greedy_rows(costs, error, 0.66, 0.025)
    assert rows[0] == (0.0, {"q": 0.0, "k": 0.0, "gate": 0.0})
    assert rows[-2][0] < 0.66 - 1e-9 <= rows[-1][0]
    for (before, old), (after, new) in itertools.pairwise(rows):
        clipped = any(share == 1.0 and old[name] < 1 for name, share in new.items())
        assert clipped or after - before == pytest.approx(0.025 / 4.75)
        options = [error(old | {name: min(1, old[name] + 0.025 / costs[name])}) for name in costs if old[name] < 1]
        assert error(new) == pytest.approx(min(options))
    assert sum(error(new) <= error(dict.fromkeys(costs, share)) for share, new in rows) > 0.9 * len(rows)
    assert greedy_rows(costs, error, 0.999, 0.5)[-1][0] >= 0.999


def test_a_greedy_plan_meets_the_budget_in_each_block_and_can_be_used_again() -> None:
    model, ids = build("llama"), inputs("llama", samples=4, length=16)
    calibration = Calibration.from_tensors(ids, batch=2)
    with torch.no_grad():
        with wina(model, calibration, sparsity=0.5, allocation="greedy", step=0.25) as handle:
            outputs, plan = model(ids).logits, handle.plan
        found = structure(model)
        for block in found.blocks:
            sites = found.in_block(block)
            share = sum(site.size * plan.values[site.name] for site in sites) / sum(site.size for site in sites)
            assert 0.5 - 1e-9 <= share < 0.5 + 0.25 * 32 * 32 / sum(site.size for site in sites)
        assert len(set(plan.values.values())) > 2
        with wina(model, allocation=plan) as again:
            assert torch.equal(model(ids).logits, outputs)
            assert dict(again.plan.values) == dict(plan.values)


# Undoing


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    facts = {name: (m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return {"tensors": tensors, "facts": facts, "parameters": [id(p) for p in model.parameters()]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["facts"] == b["facts"] and a["parameters"] == b["parameters"] and all(
        torch.equal(a["tensors"][k][0], b["tensors"][k][0]) and a["tensors"][k][1] == b["tensors"][k][1] for k in a["tensors"]
    )  # fmt: skip


@pytest.mark.parametrize("family", [*causal(), "sequential"])
@pytest.mark.parametrize("transform", [False, True])
def test_undo_restores_bits_layout_hooks_and_outputs(family: str, transform: bool) -> None:
    if family == "sequential" and transform:
        pytest.skip("a plain network has no norms to transform behind")
    model, given = build(family), inputs(family)
    before = state(model)
    with torch.no_grad():
        output = model(given)
        handle = wina(model, sparsity=0.6, transform=transform, allow_uncovered=True)
        changed = model(given)
        handle.undo()
        handle.undo()
        again = model(given)
    assert same(before, state(model))
    assert not handle.active
    assert torch.equal(getattr(output, "logits", output), getattr(again, "logits", again))
    assert not torch.equal(getattr(output, "logits", output), getattr(changed, "logits", changed))


@pytest.mark.parametrize("stop_at", range(4))
def test_an_interruption_leaves_the_model_as_it_was(stop_at: int) -> None:
    model = build("llama").train()
    before = state(model)
    told: list[str] = []

    def progress(label: str, done: int, total: int) -> None:
        told.append(label)
        if len(told) > 2 * stop_at:
            raise KeyboardInterrupt

    calibration = Calibration.from_tensors(inputs("llama", samples=2, length=8))
    with pytest.raises(KeyboardInterrupt):
        wina(model, calibration, sparsity=0.5, allocation="greedy", step=0.5, transform=True, mask_by="threshold", progress=progress)
    assert same(before, state(model))


def test_a_raise_inside_the_with_undoes_too() -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="mine"), wina(model):
        raise RuntimeError("mine")
    assert same(before, state(model))


def test_no_sparsity_is_bit_identical_and_lays_nothing_out() -> None:
    model, ids = build("llama"), inputs("llama")
    before = state(model)
    with torch.no_grad():
        dense = model(ids).logits
        with wina(model, sparsity=0.0):
            assert torch.equal(model(ids).logits, dense)
            for name, parameter in model.named_parameters():
                assert parameter.stride() == before["tensors"][name][1]


def test_a_model_has_one_handle_and_is_not_saved_with_it(tmp_path: Any) -> None:
    model, tokenizer = embedded.load()
    handle = wina(model)
    with pytest.raises(ModelError, match="undo"):
        teal(model)
    with pytest.raises(FormatError, match="undo"):
        checkpoint.save(model, tokenizer, tmp_path / "out")
    handle.undo()
    teal(model).undo()
    checkpoint.save(model, tokenizer, tmp_path / "out")


def test_copies_of_a_sparse_model_are_sparse_on_their_own() -> None:
    model, ids = build("llama"), inputs("llama", samples=1, length=5)
    with torch.no_grad():
        dense = model(ids).logits
        with wina(model, sparsity=0.5, dense_prefix=0) as handle:
            sparse, twin = model(ids).logits, copy.deepcopy(model)
            assert all(gate.module is not own.module for gate, own in zip(gates_of(twin), handle._gates, strict=True))
        assert torch.equal(twin(ids).logits, sparse)
        assert torch.equal(model(ids).logits, dense)


# Dtypes, devices, missing parts, bad input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_skip_as_well(dtype: torch.dtype) -> None:
    model, x = one(torch.randn(16, 32, generator=draws(11)).to(dtype)), torch.randn(1, 1, 32, generator=draws(12)).to(dtype)
    with torch.no_grad(), wina(model, sparsity=0.5, dense_prefix=0) as handle:
        single, twice = model(x), model(x.expand(1, 2, 32))[:, :1]
        assert handle.counts()[0]["tokens_skipping"] == 1
        assert handle.report.rows[0]["face"] == "bag"
    assert single.dtype == dtype
    torch.testing.assert_close(single.double(), twice.double(), rtol=3e-2, atol=6e-2)


def test_without_numba_it_skips_by_bags_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), inputs("llama", samples=1, length=8)
    results = []
    for missing in (False, True):
        if missing:
            find = importlib.util.find_spec
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
        with torch.no_grad(), wina(model, sparsity=0.5) as handle:
            assert {row["face"] for row in handle.report.rows} == {"bag" if missing else "compiled"}
            results.append(decoded(model, ids, list(range(1, 8))))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_gradients_pass_through_the_kept_channels_only() -> None:
    weight, x = torch.randn(3, 6, generator=draws(13)), torch.randn(1, 1, 6, generator=draws(14), requires_grad=True)
    with wina(one(weight), sparsity=0.5, dense_prefix=0) as handle:
        gate = handle._gates[0]
        gate.module(x).sum().backward()
        assert torch.equal(x.grad != 0, gate.mask(x))
        assert handle.counts()[0]["tokens_dense"] == 1


@pytest.mark.parametrize("tokens", [1, 3])
def test_activations_that_are_not_finite_are_named(tokens: int) -> None:
    model = build("sequential")
    x = torch.ones(1, tokens, 16)
    x[..., 5] = float("nan")
    with torch.no_grad(), wina(model, dense_prefix=0), pytest.raises(NonFiniteError, match="0: an activation is NaN"):
        model(x)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, "0 to below 1"),
        ({"sparsity": -0.1}, BudgetError, "0 to below 1"),
        ({"sparsity": float("nan")}, BudgetError, "0 to below 1"),
        ({"sparsity": True}, InputTypeError, "number"),
        ({"allocation": "magic"}, InputError, "greedy"),
        ({"allocation": "greedy"}, DataError, "calibration"),
        ({"mask_by": "threshold"}, DataError, "calibration"),
        ({"mask_by": "luck"}, InputError, "topk"),
        ({"norms": "some"}, InputError, "orthogonal_only"),
        ({"dense_prefix": -1}, InputError, "0 or more"),
        ({"step": 0.0}, InputError, "above 0"),
        ({"allocation": Plan("bits", {"0": 4}, {}, {}, "mine")}, InputTypeError, "ratio"),
        ({"allocation": Plan("ratio", {"0": 0.5}, {}, {}, "mine")}, InputError, "lacks"),
        ({"allocation": Plan("ratio", {"0": 0.5}, {}, {}, "mine"), "sparsity": 0.5}, InputError, "one of the two"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[WhatMattersError], words: str) -> None:
    model = build("sequential")
    before = state(model)
    with pytest.raises(error, match=words):
        wina(model, **settings)
    assert same(before, state(model))
    assert issubclass(error, ValueError | TypeError)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = build("sequential")
    model[2].weight.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="2 holds"):
        wina(model)


# Costs


def test_costs_are_those_of_the_formula() -> None:
    model = build("llama")  # d 32, kv 16, ff 64: per block q 1024, k 512, v 512, o 1024, gate, up, down 2048 each
    weights = 2 * (1024 + 512 + 512 + 1024 + 3 * 2048)
    with wina(model, sparsity=0.5) as handle:
        costs = handle.costs()
        assert costs["macs_dense"] == weights
        assert costs["macs_sparse"] == weights / 2
        assert costs["macs_overhead"] == 2 * (6 * 32 + 64)  # one product of x and c at each site
        assert costs["bytes_dense"] == 4 * weights
        assert costs["bytes_sparse"] == 4 * weights / 2 + 4 * costs["macs_overhead"]
        assert costs["reduction"] == pytest.approx(0.5 - costs["macs_overhead"] / weights)
    with teal(model, sparsity=0.5) as handle:
        assert handle.costs()["reduction"] == 0.5
    with wina(model, sparsity=0.0, transform=True) as handle:
        assert handle.costs()["macs_overhead"] == pytest.approx(2 * 2 * 32 * 32)  # 2 d^2 a layer
