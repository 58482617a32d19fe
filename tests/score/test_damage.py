"""Zeroth-order gradients, ablation and quantization error against whole forward passes and plain formulas."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.allocation import bits as allocate_bits
from whatmatters.core.data import Calibration
from whatmatters.core.errors import DataError, InputError, InputTypeError, ModelError
from whatmatters.core.evaluate import evaluate, judging
from whatmatters.core.grids import GridSettings, rounded
from whatmatters.core.seeds import derived
from whatmatters.core.sites import structure
from whatmatters.score import ablate, ablation, quantization_error, zeroth_order
from whatmatters.score._losses import FromBlock, gradients, sequence_nats
from whatmatters.testing.families import build, inputs

LANGUAGE = ["llama", "qwen3", "gpt2", "mixtral"]


def text(family: str, samples: int = 5, length: int = 12, padded: bool = True) -> Calibration:
    ids = inputs(family, samples=samples, length=length)
    valid = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        valid[0, 7:] = False
        valid[3, 3:] = False
    return Calibration.from_tensors(ids, valid, torch.tensor([0, 0, 1, 1, 2])[:samples], batch=2)


# ---- running from a block on


@pytest.mark.parametrize("family", LANGUAGE)
def test_losses_from_any_block_are_those_of_the_whole_model(family: str) -> None:
    model, judged = build(family), text(family)
    expected = evaluate(model, judged)
    with judging(model):
        rest = FromBlock(model, structure(model).blocks, judged)
        for index in range(2):
            if index:
                rest.advance()
            nats = rest.all_nats().numpy()
            np.testing.assert_allclose(np.bincount(judged.document.numpy(), weights=nats), expected.nats, rtol=1e-5)


def test_blocks_that_are_no_chain_are_noticed() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embed(ids)
            for block in self.blocks:
                hidden = hidden + block(hidden)
            return hidden

    with pytest.raises(ModelError, match="do not form a chain"):
        ablation(Skipping(), Calibration.from_tensors(torch.arange(8)[None]))


# ---- ablation


def by_hand(model: nn.Module, judged: Calibration, names: list[str], bits: int, settings: GridSettings) -> np.ndarray:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        for site in structure(damaged).sites:
            if site.name in names:
                weight = site.view(damaged)
                weight.copy_(rounded(weight.clone(), bits, settings))
    return evaluate(damaged, judged).nats


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("by", ["block", "site"])
def test_quantized_units_against_damaged_copies(family: str, by: Any) -> None:
    model, judged = build(family), text(family)
    found = structure(model)
    measured = ablate(model, judged, by=by, bits=3, group_size=8, symmetric=False)
    expected_units = [[s.name for s in found.in_block(b)] for b in found.blocks] if by == "block" else found.groups()
    assert [list(members) for members in measured.members] == expected_units
    base = evaluate(model, judged)
    np.testing.assert_allclose(measured.base, base.nats, rtol=1e-6)
    assert measured.loss == pytest.approx(base.loss)
    for members, nats, damage in zip(measured.members, measured.nats, measured.damage, strict=True):
        expected = by_hand(model, judged, list(members), 3, GridSettings(8, False, True))
        np.testing.assert_allclose(nats, expected, rtol=1e-5)
        assert damage == pytest.approx((expected.sum() - base.nats.sum()) / base.tokens, abs=1e-5)
        score = measured.scores.values[members[0] if by == "site" else next(s.block for s in found.sites if s.name == members[0])]
        assert score.item() == pytest.approx(damage)
    assert set(measured.scores.values) == ({s.name for s in found.sites} if by == "site" else set(found.blocks))
    assert measured.sizes == tuple(sum(found.site(name).size for name in members) for members in measured.members)


@pytest.mark.parametrize("family", LANGUAGE)
def test_skipped_blocks_against_a_shorter_model(family: str) -> None:
    model, judged = build(family), text(family, padded=False)
    scores = ablation(model, judged, damage="skip")
    for index, block in enumerate(structure(model).blocks):
        shorter = copy.deepcopy(model)
        layers = shorter.get_submodule(block.rpartition(".")[0])
        del layers[index]  # type: ignore[operator]
        shorter.config.num_hidden_layers = 1
        if hasattr(shorter.config, "layer_types"):
            shorter.config.layer_types = ["full_attention"]
        expected = evaluate(shorter, judged).loss - evaluate(model, judged).loss
        assert scores.values[block].item() == pytest.approx(expected, abs=1e-5)


def test_a_single_document_is_kept_by_window() -> None:
    judged = Calibration.from_tensors(inputs("llama", samples=3, length=8), document=torch.zeros(3, dtype=torch.int64))
    measured = ablate(build("llama"), judged)
    assert measured.unit == "window"
    assert measured.nats.shape == (2, 3)


def test_sixteen_bits_do_no_damage_and_the_default_grid_always_fits() -> None:
    model, judged = build("llama"), text("llama")
    assert all(value == 0 for value in ablate(model, judged, bits=16).damage)
    assert ablate(model, judged).scores.settings["group_size"] is None


def test_bad_ablations_are_refused() -> None:
    model, judged = build("llama"), text("llama")
    for options, match in [
        ({"by": "site", "damage": "skip"}, "only a whole block"), ({"bits": 1}, "2 to 8"), ({"bits": 9}, "2 to 8"),
        ({"group_size": 5}, "group size 5 does not divide the 32 inputs of model.layers.0"), ({"group_size": 0}, "group size 0"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=match):
            ablation(model, judged, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="token ids"):
        ablation(build("sequential"), Calibration.from_tensors(inputs("sequential")))


# ---- zeroth order


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slopes_are_gradients_along_their_direction(family: str) -> None:
    model, data = build(family).double(), text(family, samples=2, padded=False)
    found = structure(model)
    scores = zeroth_order(model, data, eps=1e-3, seed=7, draws=2)
    names = [site.parameter for site in found.sites]
    for block in found.blocks:
        squares = []
        for row in range(2):
            ids = data.inputs[row : row + 1]
            with gradients(model, names) as gradients_of:
                nats, counts = sequence_nats(model(input_ids=ids, use_cache=False).logits, ids, None)
                grads = dict(zip(names, gradients_of(nats.sum() / counts.sum()), strict=True))
            for draw in range(2):
                generator = torch.Generator().manual_seed(derived(7, block, row, draw))
                slope = 0.0
                for site in found.in_block(block):
                    g = grads[site.parameter].T if site.transposed else grads[site.parameter]
                    slope += float((g * torch.randn(site.shape, generator=generator)).sum())
                squares.append(slope**2)
        size = sum(site.size for site in found.in_block(block))
        assert scores.values[block].item() == pytest.approx(np.sqrt(np.mean(squares) / size), rel=2e-3)


def test_many_draws_converge_to_the_root_mean_square_gradient() -> None:
    model, data, draws = build("llama").double(), text("llama", samples=1, padded=False), 120
    found = structure(model)
    scores = zeroth_order(model, data, draws=draws, eps=1e-3)
    with gradients(model, [site.parameter for site in found.sites]) as gradients_of:
        nats, counts = sequence_nats(model(input_ids=data.inputs, use_cache=False).logits, data.inputs, None)
        grads = dict(zip((site.name for site in found.sites), gradients_of(nats.sum() / counts.sum()), strict=True))
    for block in found.blocks:
        pooled = torch.cat([grads[site.name].flatten() for site in found.in_block(block)])
        assert scores.values[block].item() == pytest.approx(pooled.square().mean().sqrt().item(), rel=3 / np.sqrt(2 * draws))


def test_zeroth_order_needs_no_graph_and_does_not_depend_on_what_else_is_scored() -> None:
    model, data = build("llama"), text("llama")
    with torch.inference_mode():
        scores = zeroth_order(model, data, by="site")
    shares = [[scores.values[name].item() for name in group] for group in structure(model).groups()]
    assert all(len(set(group)) == 1 for group in shares)
    assert len({group[0] for group in shares}) == len(shares)
    again = zeroth_order(model, data, by="site", seed=1)
    assert again.values["model.layers.0.mlp.down_proj"] != scores.values["model.layers.0.mlp.down_proj"]
    first = zeroth_order(model, data, samples=2)
    alone = zeroth_order(model, Calibration.from_tensors(data.inputs[:2], data.valid[:2]), samples=None)  # type: ignore[index]
    assert all(torch.equal(first.values[b], alone.values[b]) for b in first.values)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": float("inf")}, {"draws": 0}, {"samples": 0}])
def test_bad_zeroth_order_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        zeroth_order(build("llama"), text("llama"), **options)


# ---- quantization error


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "sequential"])
def test_errors_without_data_are_squared_differences(family: str) -> None:
    model = build(family)
    table = quantization_error(model, levels=(8, 3, 16), group_size=8, symmetric=False)
    assert table.levels == (3, 8, 16)
    for site in structure(model).sites:
        w = site.view(model)
        expected = [float((rounded(w, b, GridSettings(8, False, True)).double() - w.double()).square().sum()) for b in (3, 8)] + [0.0]
        np.testing.assert_allclose(table.values[site.name].numpy(), expected, rtol=1e-9)
        assert table.values[site.name][0] > table.values[site.name][1] > 0


def test_errors_with_data_are_output_errors_of_uncorrelated_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    x = torch.eye(6).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0] * 6)[:, None] * 3  # inputs without correlation
    table = quantization_error(model, Calibration.from_tensors(x, batch=5), levels=(2, 4))
    for column, bits in enumerate((2, 4)):
        w = model[0].weight.detach()
        error = (x @ (rounded(w, bits, GridSettings(-1)) - w).T).square().sum(1).mean().item()
        assert table.values["0"][column].item() == pytest.approx(error, rel=1e-5)


def test_block_tables_are_sums_and_feed_the_optimum() -> None:
    model, data = build("llama"), text("llama")
    by_site, by_block = quantization_error(model, data), quantization_error(model, data, by="block")
    for block in by_block.values:
        total = sum(by_site.values[site.name] for site in structure(model).in_block(block))
        torch.testing.assert_close(by_block.values[block], total)
    plan = allocate_bits(by_site, 4.0, how="optimum", count="codes")
    assert plan.account["achieved"] <= 4
    assert set(plan.values) == {site.name for site in structure(model).sites}


def test_bad_levels_are_refused() -> None:
    for levels in ((1, 4), (4, 9), (4, 4), ()):
        with pytest.raises((InputError, InputTypeError)):
            quantization_error(build("llama"), levels=levels)
    with pytest.raises(InputError, match="does not divide"):
        quantization_error(build("llama"), group_size=128)
