"""Scores of weights against naive loops, finite differences and one backward pass for each sample."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.capture import settings_of, site_inputs
from whatmatters.core.catalog import scorers
from whatmatters.core.data import Calibration, call_model
from whatmatters.core.errors import DataError, ModelError, NonFiniteError
from whatmatters.core.sites import Site, structure
from whatmatters.score import activation, fisher, gradient, hessian_diagonal, magnitude, random
from whatmatters.testing.families import FAMILIES, build, inputs

LANGUAGE = ["llama", "qwen3", "gpt2", "mixtral"]
AHEAD = scorers("layer", "ahead")


def data(family: str, samples: int = 5, length: int = 12, batch: int = 2, padded: bool = False) -> Calibration:
    ids = inputs(family, samples=samples, length=length)
    valid = None
    if padded:
        valid = torch.ones_like(ids, dtype=torch.bool)
        valid[0, 7:] = False
        valid[3, 3:] = False
    return Calibration.from_tensors(ids, valid, batch=batch)


def mean_squares(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """Mean square of every site's inputs over all valid tokens: one whole forward pass a sample, everything in float64."""
    found = structure(model)
    sums = {site.name: torch.zeros(site.shape[1], dtype=torch.float64) for site in found.sites}
    first = next(site.name for site in found.sites if site.index is None)
    tokens = 0
    for row in range(len(calibration)):
        ids = calibration.inputs[row : row + 1]
        if calibration.valid is not None:
            ids = ids[calibration.valid[row : row + 1]][None]

        def add(name: str, x: Tensor, rows: Tensor | None) -> None:
            nonlocal tokens
            tokens += x[..., 0].numel() if name == first else 0
            sums[name] += x.reshape(-1, x.shape[-1]).double().square().sum(0)

        with torch.no_grad(), settings_of(model, _experts_implementation="eager"), site_inputs(model, found.sites, add):
            call_model(model, ids)
    return {name: value / tokens for name, value in sums.items()}


# ---- magnitude, activation, Hessian diagonal, random


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_absolute_weight(family: str) -> None:
    model = build(family)
    found = structure(model)
    whole = magnitude(model, unit="weight")
    for site in found.sites:
        np.testing.assert_array_equal(whole.values[site.name].numpy(), np.abs(site.view(model).numpy()))
    by_block = magnitude(model)
    for block in by_block.values:
        pooled = np.concatenate([np.abs(site.view(model).double().numpy()).ravel() for site in found.in_block(block)])
        assert by_block.values[block].item() == pytest.approx(pooled.mean(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_activation_and_hessian_against_a_naive_pass(family: str, padded: bool) -> None:
    if padded and not FAMILIES[family].pads:
        pytest.skip("images and vectors have no padding")
    model, calibration = build(family), data(family, padded=padded)
    expected = mean_squares(model, calibration)
    wanda, curvature = (scorer(model, calibration, unit="weight") for scorer in (activation, hessian_diagonal))
    for site in structure(model).sites:
        w = site.view(model).double()
        torch.testing.assert_close(wanda.values[site.name].double(), w.abs() * expected[site.name].sqrt(), rtol=2e-4, atol=1e-7)
        torch.testing.assert_close(curvature.values[site.name].double(), w.square() * expected[site.name], rtol=4e-4, atol=1e-9)


@pytest.mark.parametrize("scorer", [magnitude, activation, hessian_diagonal])
def test_layer_scores_are_means_of_weight_scores(scorer: Any) -> None:
    model, calibration = build("llama"), data("llama")
    whole = scorer(model, calibration, unit="weight")
    by_site, by_block = scorer(model, calibration, by="site"), scorer(model, calibration)
    for site in structure(model).sites:
        assert by_site.values[site.name].item() == pytest.approx(whole.values[site.name].double().mean().item(), rel=1e-5)
    for block in by_block.values:
        sites = structure(model).in_block(block)
        pooled = torch.cat([whole.values[site.name].double().flatten() for site in sites])
        assert by_block.values[block].item() == pytest.approx(pooled.mean().item(), rel=1e-5)


def test_hessian_diagonal_is_what_one_removed_weight_changes() -> None:
    model = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64))
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = hessian_diagonal(model, Calibration.from_tensors(x, batch=7), unit="weight").values["0"]
    with torch.no_grad():
        before = model(x)
        model[0].weight[1, 2] = 0
        changed = (model(x) - before).square().sum(1).mean()
    assert scores[1, 2].item() == pytest.approx(changed.item(), rel=1e-5)


def test_random_scores_are_seeded_and_uniform() -> None:
    model = build("llama", hidden=64, intermediate=128)
    one, same, other = (random(model, unit="weight", seed=seed) for seed in (1, 1, 2))
    name = next(iter(one.values))
    assert torch.equal(one.values[name], same.values[name])
    assert not torch.equal(one.values[name], other.values[name])
    pooled = torch.cat([value.flatten() for value in one.values.values()])
    assert pooled.mean().item() == pytest.approx(0.5, abs=0.01)
    assert pooled.var().item() == pytest.approx(1 / 12, abs=0.01)
    generator = torch.Generator().manual_seed(1)
    drawn = random(model, seed=generator)
    assert drawn.values.keys() == {"model.layers.0", "model.layers.1"}
    assert drawn.order() == random(model, seed=1).order()
    assert random(model, seed=generator).values["model.layers.0"] != drawn.values["model.layers.0"]


# ---- gradients


def total_loss(model: nn.Module, calibration: Calibration) -> tuple[Tensor, int]:
    """Sum of -log p over all predicted tokens, from log_softmax and indexing; and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(calibration)):
        ids = calibration.inputs[row : row + 1]
        if calibration.valid is not None:
            ids = ids[calibration.valid[row : row + 1]][None]
        log_p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for t in range(1, ids.shape[1]):
            total = total - log_p[0, t - 1, ids[0, t]]
            count += 1
    return total, count


@pytest.mark.parametrize("family", LANGUAGE)
def test_gradient_against_finite_differences(family: str) -> None:
    model, calibration = build(family).double(), data(family, padded=True)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the fused experts have no float64
    scores = gradient(model, calibration, unit="weight")
    step = 1e-3 if family == "gpt2" else 3e-3  # RMSNorm computes in float32 whatever the model's dtype: smaller steps drown in its rounding
    sites = list(structure(model).sites)[::3]
    if family == "mixtral":  # other weights change which experts are chosen, and the loss jumps
        sites = [site for site in structure(model).sites if site.index is not None and site.block == "model.layers.1"]
    for site in sites:
        weight = site.view(model)
        row, column = np.unravel_index(int(scores.values[site.name].argmax()), site.shape)
        original = weight[row, column].item()
        losses = []
        with torch.no_grad():
            for signed in (step, -step):
                weight[row, column] = original + signed
                total, count = total_loss(model, calibration)
                losses.append(total.item() / count)
            weight[row, column] = original
        slope = (losses[0] - losses[1]) / (2 * step)
        assert scores.values[site.name][row, column].item() == pytest.approx(abs(original * slope), rel=5e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fisher_squares_each_sample_before_the_mean(family: str) -> None:
    model, calibration = build(family), data(family, padded=True)
    found = structure(model)
    names = sorted({site.parameter for site in found.sites})
    squares = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.float64) for name in names}
    for row in range(len(calibration)):
        valid = calibration.valid[row : row + 1]  # type: ignore[index]
        total, count = total_loss(model, Calibration.from_tensors(calibration.inputs[row : row + 1], valid))
        grads = torch.autograd.grad(total / count, [model.get_parameter(name) for name in names], allow_unused=True)
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                squares[name] += g.double().square() / len(calibration)
    scores = fisher(model, calibration, unit="weight")
    for site in found.sites:
        f = squares[site.parameter] if site.index is None else squares[site.parameter][site.index]
        expected = site.view(model).double().square() * (f.T if site.transposed else f) / 2
        torch.testing.assert_close(scores.values[site.name].double(), expected, rtol=2e-3, atol=1e-10)


def test_fisher_does_not_vanish_where_the_mean_gradient_does() -> None:
    """Two texts that pull a weight in opposite directions: the mean gradient is zero, the Fisher information is not."""

    class Coin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(2, 2)
            self.blocks = nn.ModuleList([nn.Linear(2, 2, bias=False)])
            with torch.no_grad():
                self.embed.weight.copy_(torch.ones(2, 2))
                self.blocks[0].weight.copy_(torch.ones(2, 2))

        def forward(self, ids: Tensor) -> Tensor:
            return self.blocks[0](self.embed(ids))

    calibration = Calibration.from_tensors(torch.tensor([[0, 0], [0, 1]]))
    assert gradient(Coin(), calibration, unit="weight").values["blocks.0"].abs().max().item() == pytest.approx(0, abs=1e-7)
    # gradient of each sample: (p - target) x = 1/2, so w^2 F / 2 = 1/8
    torch.testing.assert_close(fisher(Coin(), calibration, unit="weight").values["blocks.0"], torch.full((2, 2), 0.125))


def test_samples_with_nothing_to_predict_are_left_out_of_the_fisher_mean() -> None:
    model, ids = build("llama"), inputs("llama", samples=3, length=6)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 1:] = False
    with_one = fisher(model, Calibration.from_tensors(ids, valid))
    without = fisher(model, Calibration.from_tensors(ids[[0, 2]]))
    for block in with_one.values:
        torch.testing.assert_close(with_one.values[block], without.values[block])


@pytest.mark.parametrize("scorer", [gradient, fisher])
def test_frozen_parameters_are_scored_and_stay_frozen(scorer: Any) -> None:
    model, calibration = build("llama"), data("llama")
    expected = scorer(model, calibration)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scores = scorer(model, calibration)
    assert all(torch.equal(scores.values[block], expected.values[block]) for block in expected.values)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- what holds for all of them


def state(model: nn.Module) -> Any:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return weights, flags, grads, torch.random.get_rng_state()


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:3] == b[1:3] and torch.equal(a[3], b[3])


@pytest.mark.parametrize("entry", AHEAD, ids=lambda e: e.slug)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_nothing_is_left_behind(entry: Any, family: str) -> None:
    model, calibration = build(family).train(), data(family, padded=True)
    before = state(model)
    entry.function(model, calibration)
    assert same(state(model), before)


@pytest.mark.parametrize("entry", AHEAD, ids=lambda e: e.slug)
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_nothing_is_left_behind_after_a_raise(entry: Any, calls: int) -> None:
    model, calibration = build("llama").train(), data("llama")
    before = state(model)
    told: list[int] = []

    def progress(label: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entry.function(model, calibration, progress=progress)
    assert same(state(model), before)


@pytest.mark.parametrize("entry", AHEAD, ids=lambda e: e.slug)
def test_nothing_is_left_behind_when_a_forward_pass_fails(entry: Any) -> None:
    if not entry.needs_text:
        pytest.skip("runs no forward pass")
    model, calibration = build("llama").train(), data("llama")
    found, runs = structure(model), []
    inner = model.model.layers[0].mlp.down_proj.forward

    def fail(x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) > 2:
            raise MemoryError
        return inner(x)

    model.model.layers[0].mlp.down_proj.forward = fail
    before = state(model)
    with pytest.raises(MemoryError):
        entry.function(model, calibration, structure=found)
    assert same(state(model), before)


@pytest.mark.parametrize("entry", AHEAD, ids=lambda e: e.slug)
def test_nan_weights_are_named(entry: Any) -> None:
    if entry.control:
        pytest.skip("does not look at the weights")
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(NonFiniteError):
        entry.function(model, data("llama"))


@pytest.mark.parametrize("scorer", [gradient, fisher])
def test_language_models_and_their_ids_are_needed(scorer: Any) -> None:
    with pytest.raises(DataError, match="token ids"):
        scorer(build("sequential"), data("sequential"))
    with pytest.raises(DataError, match="model knows 64"):
        scorer(build("llama"), Calibration.from_tensors(torch.full((1, 4), 64)))
    with pytest.raises(DataError, match="no loss to measure"):
        scorer(build("llama"), Calibration.from_tensors(torch.ones(3, 1, dtype=torch.int64)))
    bare = build("llama").model
    with pytest.raises(ModelError, match="logits"):
        scorer(bare, data("llama"))


def test_sites_are_seen_as_out_by_in() -> None:
    model = build("gpt2")
    sites: dict[str, Site] = {site.name: site for site in structure(model).sites}
    for scorer in (magnitude, activation, gradient):
        scores = scorer(model, data("gpt2"), unit="weight")
        assert all(tuple(value.shape) == sites[name].shape for name, value in scores.values.items())
