"""LIM against closed forms of blocks that are known, ZD against the distributions' own tails."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, ModelError, NonFiniteError
from whatmatters.core.sites import structure
from whatmatters.score import layer_shift, weight_outliers
from whatmatters.testing.families import build, inputs


def stack(*weights: Tensor) -> nn.Sequential:
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.float64) for w in weights]
    with torch.no_grad():
        for layer, w in zip(layers, weights, strict=True):
            layer.weight.copy_(w)
    return nn.Sequential(*layers)


def points(samples: int = 40, d: int = 6) -> Calibration:
    return Calibration.from_tensors(torch.randn(samples, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64), batch=7)


# ---- LIM


def test_known_blocks_have_their_known_shift() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    turn = torch.zeros(6, 6, dtype=torch.float64)  # rotates each pair of coordinates by 90 degrees: orthogonal to its input, same norm
    for i in range(0, 6, 2):
        turn[i, i + 1], turn[i + 1, i] = -1, 1
    scores = layer_shift(stack(eye, -eye, eye + turn, 7.5 * eye, 0.01 * eye), points())
    expected = [-1, 1, -1 / np.sqrt(2), -1, -1]
    np.testing.assert_allclose([value.item() for value in scores.values.values()], expected, atol=1e-12)


def test_a_zero_vector_has_cosine_zero() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    score = layer_shift(stack(torch.eye(2, dtype=torch.float64)), Calibration.from_tensors(x))
    assert score.values["0"].item() == -0.5
    assert layer_shift(stack(torch.zeros(2, 2)), Calibration.from_tensors(x)).values["0"].item() == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_llm_blocks_against_hooks_on_the_whole_model(family: str) -> None:
    """Block Influence (ShortGPT), 1 - mean cosine, from hooks: its order is LIM's and its values are LIM's plus one."""
    model, ids = build(family), inputs(family, samples=5, length=11)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[2, 6:] = False
    found = structure(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> object:
        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"], output if isinstance(output, Tensor) else output[0])

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in found.blocks]  # type: ignore[arg-type]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=valid.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    scores = layer_shift(model, Calibration.from_tensors(ids, valid, batch=2))
    for name, (x, y) in seen.items():
        influence = 1 - nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)[valid].mean().item()
        assert scores.values[name].item() == pytest.approx(influence - 1, abs=1e-5)


def test_the_last_block_is_taken_before_the_final_norm() -> None:
    model, ids = build("llama"), inputs("llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 3, 32))
    strange = layer_shift(model, Calibration.from_tensors(ids))
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
    plain = layer_shift(model, Calibration.from_tensors(ids))
    assert strange.values["model.layers.1"] == plain.values["model.layers.1"]


def test_sites_get_the_shift_of_their_block() -> None:
    model, calibration = build("llama"), Calibration.from_tensors(inputs("llama"))
    by_block, by_site = layer_shift(model, calibration), layer_shift(model, calibration, by="site")
    assert all(by_site.values[site.name] == by_block.values[site.block] for site in structure(model).sites)


def test_blocks_that_change_shape_have_no_shift() -> None:
    with pytest.raises(ModelError, match="equal shapes"):
        layer_shift(build("sequential"), Calibration.from_tensors(inputs("sequential")))


# ---- ZD

COUNT = 250_000
NORMAL, UNIFORM, LAPLACE, EXPONENTIAL = stats.norm(), stats.uniform(), stats.laplace(), stats.expon()


def linear(values: np.ndarray) -> nn.Module:
    side = 500
    return stack(torch.from_numpy(values.reshape(side, -1).copy()))


def share(values: np.ndarray, **options: float | bool) -> float:
    return -weight_outliers(linear(values), **options).values["0"].item()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("distribution", "known"),
    [(NORMAL, 0.158655), (UNIFORM, (1 - 1 / np.sqrt(3)) / 2), (LAPLACE, 0.5 * np.exp(-np.sqrt(2))), (EXPONENTIAL, np.exp(-2))],
    ids=["normal", "uniform", "laplace", "exponential"],
)
def test_shares_are_the_tails_of_the_distributions(distribution: object, known: float) -> None:
    values = distribution.rvs(COUNT, random_state=np.random.default_rng(0))  # type: ignore[attr-defined]
    mean, spread = distribution.mean(), distribution.std()  # type: ignore[attr-defined]
    upper, lower = distribution.sf(mean + spread), distribution.cdf(mean - spread)  # type: ignore[attr-defined]
    assert upper == pytest.approx(known, abs=1e-6)
    noise = 4 * np.sqrt(0.25 / COUNT)  # the sample's own mean and deviation vary too
    assert share(values) == pytest.approx(upper, abs=noise)
    assert share(values, two_sided=True) == pytest.approx(upper + lower, abs=noise)
    assert share(values, z=2.0) == pytest.approx(distribution.sf(mean + 2 * spread), abs=noise)  # type: ignore[attr-defined]


def test_skew_is_seen_from_one_side_only() -> None:
    values = -EXPONENTIAL.ppf((np.arange(COUNT) + 0.5) / COUNT)  # the mirror image: nothing lies above mean + deviation
    assert share(values) < 1e-3  # the sample's deviation is a little below 1
    assert share(values, two_sided=True) == pytest.approx(np.exp(-2), abs=1e-4)


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_scale_and_shift_change_nothing(a: float, b: float, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(2000)
    assert share(a * values + b) == share(values)
    symmetric = np.concatenate([values, -values])
    assert share(-a * symmetric) == share(symmetric)


def test_a_block_is_pooled_into_one_vector() -> None:
    model = build("llama")
    found = structure(model)
    for z, two_sided in ((1.0, False), (0.5, True)):
        scores = weight_outliers(model, z=z, two_sided=two_sided)
        for block, score in scores.values.items():
            pooled = np.concatenate([site.view(model).double().numpy().ravel() for site in found.in_block(block)])
            standard = (pooled - pooled.mean()) / pooled.std()
            assert score.item() == -np.mean((np.abs(standard) if two_sided else standard) > z)
    by_site = weight_outliers(model, by="site")
    for site in found.sites:
        assert by_site.values[site.name].item() == -np.mean(stats.zscore(site.view(model).double().numpy(), axis=None) > 1)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_constant_weights_have_no_outliers_and_are_told(value: float) -> None:
    scores = weight_outliers(stack(torch.full((7, 3), value)))
    assert scores.values["0"].item() == 0
    assert scores.settings["constant"] == ("0",)


def test_fewer_weights_in_the_tail_matter_more() -> None:
    heavy = torch.zeros(50, 50)
    heavy[0, 0] = 100
    gaussian = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    assert weight_outliers(stack(gaussian, heavy)).order() == ["1", "0"]


def test_bad_settings_and_weights_are_refused() -> None:
    for z in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="z is"):
            weight_outliers(build("llama"), z=z)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.k_proj"):
        weight_outliers(model)
