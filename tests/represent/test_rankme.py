"""RankMe against closed forms, scipy's entropy and the SVD of the whole matrix."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from whatmatters.core.errors import InputError, InputTypeError, ModelError, NonFiniteError
from whatmatters.represent import (
    RankMeAccumulator,
    RankMeCallback,
    Spectrum,
    rankme,
    rankme_from_model,
    select_by_rankme,
    spectrum,
)


def matrix(values: list[float], rows: int = 400, seed: int = 0, mean: float = 0.0) -> Tensor:
    """A float64 matrix with exactly these singular values (before `mean` is added)."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right + mean


@pytest.mark.parametrize("route", ["svd", "gram"])
def test_two_singular_values_by_hand(route: str) -> None:
    # exp(H(2/3, 1/3)), not exp(H(.8, .2)) = 1.6494, which eigenvalues would give
    assert rankme(matrix([2.0, 1.0]), eps=0.0, route=route) == pytest.approx(1.8899, abs=5e-5)


@pytest.mark.parametrize("route", ["svd", "gram"])
@pytest.mark.parametrize("values", [[5.0, 4.0, 1.0, 0.5], [1.0] * 16, [0.7**k for k in range(20)]])
def test_equals_the_entropy_of_scipy(values: list[float], route: str) -> None:
    assert rankme(matrix(values), eps=0.0, route=route) == pytest.approx(math.exp(stats.entropy(values)), rel=1e-9)


def test_orthonormal_columns_give_their_number_and_eps_the_surplus() -> None:
    assert rankme(matrix([1.0] * 16).float()) == pytest.approx(16.00004, abs=1e-5)
    assert rankme(torch.ones(64, 8)) == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("route", ["svd", "gram"])
def test_bias_of_eps_has_its_closed_form(route: str) -> None:
    zeros = 2046
    Z = torch.zeros(4 * 2048 if route == "gram" else 2048, 2048)
    Z[0, 0] = Z[1, 1] = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rankme(Z, route=route) == pytest.approx(2 * math.exp(-zeros * 1e-7 * math.log(1e-7)), abs=2e-6)


def test_one_hot_embeddings_of_balanced_classes_count_the_classes() -> None:
    assert rankme(torch.eye(5, 7).repeat(20, 1)) == pytest.approx(5, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-12, 1e12), route=st.sampled_from(["svd", "gram"]))
def test_invariances(seed: int, scale: float, route: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(80, 10, generator=generator, dtype=torch.float64) @ torch.randn(10, 10, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    value = rankme(Z, route=route)
    order = torch.randperm(80, generator=generator)
    for same in (Z * scale, Z @ turn, Z[order], Z.repeat(3, 1), -Z):
        assert rankme(same, route=route) == pytest.approx(value, rel=1e-5)
    assert 1 <= value <= 10 + 1e-4


def test_transposed_matrix_has_the_same_value_by_svd() -> None:
    Z = matrix([0.8**k for k in range(12)], rows=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rankme(Z.T, route="svd") == pytest.approx(rankme(Z, route="svd"), rel=1e-9)


def test_a_large_mean_eats_the_mass_and_centering_gives_it_back() -> None:
    Z = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.01, 64)
    plain = rankme(Z)
    assert rankme(Z + 10.0) < 0.2 * plain
    for route in ("svd", "gram"):
        assert rankme(Z.double() + 1e4, center=True, route=route) == pytest.approx(rankme(Z.double(), center=True), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True), seed=st.integers(0, 999), center=st.booleans())
def test_streaming_does_not_depend_on_the_split_or_the_order_of_merging(cuts: list[int], seed: int, center: bool) -> None:
    Z = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)) @ torch.diag(torch.logspace(0, -3, 8)) + 5.0
    whole = RankMeAccumulator(center=center)
    whole.update(Z)
    parts = []
    for piece in torch.tensor_split(Z, sorted(cuts)):
        part = RankMeAccumulator(center=center)
        part.update(piece)
        parts.append(part)
    for order in (parts, parts[::-1]):
        merged = RankMeAccumulator(center=center)
        for part in order:
            merged.merge(part)
        assert merged.samples == 200
        assert merged.compute().rankme == pytest.approx(whole.compute().rankme, rel=1e-9)
    exact = torch.linalg.svdvals((Z.double() - Z.double().mean(0)) if center else Z.double())
    assert torch.allclose(whole.compute().singular_values, exact, rtol=1e-6, atol=1e-7 * float(exact[0]))


def test_float32_keeps_seven_decades_of_singular_values() -> None:
    # Products in float32 would drown everything below 3e-4 of the largest.
    values = [10.0**-k for k in range(8)]
    Z = matrix(values, rows=4000).float()
    exact = torch.linalg.svdvals(Z.double())
    assert torch.allclose(spectrum(Z.split(100)).singular_values[:7], exact[:7], rtol=1e-2)
    assert rankme(Z.split(100)) == pytest.approx(rankme(Z, route="svd"), rel=1e-6)


def test_companion_measures_by_their_formulas() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1e-9], dtype=torch.float64)
    found = Spectrum(values, 400, 4)
    squares = values.numpy() ** 2
    assert found.participation_ratio == pytest.approx(squares.sum() ** 2 / (squares**2).sum())
    assert found.stable_rank == pytest.approx(squares.sum() / 9)
    assert found.rank == 3 == np.linalg.matrix_rank(np.diag(values.numpy()), tol=3 * 400 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("count", [6, 40, 300])
def test_alpha_of_an_exact_power_law(alpha: float, count: int) -> None:
    k = torch.arange(1, count + 1, dtype=torch.float64)
    assert Spectrum(k ** (-alpha / 2), 4 * count, count).alpha_req == pytest.approx(alpha, rel=1e-9)


def test_sample_size_bias_grows_and_is_told() -> None:
    values = []
    for rows in (64, 128, 256, 512, 4096):
        draws = []
        for seed in range(5):
            Z = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)) * torch.linspace(1, 0.01, 64)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                draws.append(rankme(Z))
            assert bool(caught) == (rows < 256)
        values.append(sum(draws) / len(draws))
    assert values == sorted(values)
    # expected: the population's value, of singular values proportional to the standard deviations
    assert values[-1] == pytest.approx(math.exp(stats.entropy(np.linspace(1, 0.01, 64))), rel=0.01)
    assert values[0] < 0.9 * values[-1]


def test_zeros_are_a_collapse_and_not_a_nan() -> None:
    found = spectrum(torch.zeros(20, 3))
    assert found.collapsed
    assert found.rankme == found.participation_ratio == found.stable_rank == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_measured_in_float32(dtype: torch.dtype) -> None:
    Z = (torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 8).round().to(dtype)
    assert rankme(Z) == rankme(Z.float()) == rankme(Z.float().numpy())


@pytest.mark.parametrize(
    ("Z", "error", "message"),
    [
        (torch.ones(1, 4), InputError, "at least 2"),
        (torch.ones(8, 1), InputError, "at least 2 dimensions"),
        (torch.ones(2, 3, 4), InputError, "flatten"),
        (torch.tensor([[1.0, float("nan")], [1, 1]]), NonFiniteError, "1 of 2"),
        (torch.ones(4, 4).to_sparse(), InputTypeError, "dense"),
        (torch.ones(4, 4).to(torch.complex64), InputTypeError, "real"),
        ([torch.ones(4, 4), torch.ones(4, 5)], InputError, "5 dimensions after"),
        ([], InputError, "0 rows"),
    ],
)
def test_bad_matrices(Z: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rankme(Z)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="eps"):
        rankme(torch.eye(4), eps=-1.0)
    with pytest.raises(InputError, match="streamed"):
        rankme([torch.eye(4)], route="svd")
    with pytest.raises(InputError, match="every"):
        RankMeCallback(every=0)
    with pytest.raises(InputError, match="plateau"):
        select_by_rankme({1: 2.0}, plateau=2.0)
    with pytest.raises(InputError, match="at least one"):
        select_by_rankme({})


def test_selection_takes_an_end_of_the_plateau() -> None:
    sweep = {0.1: 5.0, 1.0: 40.0, 10.0: 39.9, 100.0: 20.0}
    assert select_by_rankme(sweep) == 1.0
    assert select_by_rankme(sweep, prefer="last") == 10.0
    assert select_by_rankme(sweep, prefer="last", plateau=0.001) == 1.0


def test_a_layer_of_a_model_is_measured_in_evaluation_mode() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[0].eval()
    data = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
    found = rankme_from_model(model, data.split(32), layer="0", samples=64)
    assert found.samples == 64
    with torch.no_grad():
        assert found.rankme == pytest.approx(rankme(model[0](data[:64])), rel=1e-9)
    assert [m.training for m in model] == [False, True, True]
    assert not model[0]._forward_hooks
    with pytest.raises(ModelError, match="no layer 'head'"):
        rankme_from_model(model, data.split(32), layer="head")


def test_callback_in_a_loop_measures_the_newest_rows() -> None:
    watcher = RankMeCallback(every=3, rows=20)
    model = nn.Identity()
    batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    with watcher.watch(model):
        returned = [(model(batch), watcher.step())[1] for batch in batches]
    assert [value is None for value in returned] == [True, True, False, True, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert watcher.history == [(3, rankme(torch.cat(batches[:3])[-20:])), (6, rankme(torch.cat(batches[3:])[-20:]))]
    assert not model._forward_hooks
    with watcher.watch(model), pytest.raises(ModelError, match="gave nothing"):
        watcher.step(), watcher.step(), watcher.step()


def test_callback_inside_a_real_trainer(tmp_path: object) -> None:
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    class Rows(Dataset):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": torch.randn(6, generator=torch.Generator().manual_seed(index))}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.encoder(x).square().mean()}

    watcher = RankMeCallback(layer="encoder", every=2, rows=16)
    with torch.random.fork_rng():
        trainer = Trainer(
            Model(),
            TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=8, logging_steps=2, report_to=[], use_cpu=True),
            train_dataset=Rows(),
            callbacks=[watcher],
        )
        trainer.train()
    assert [step for step, _ in watcher.history] == [2, 4]
    logged = [entry["rankme"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [value for _, value in watcher.history]
    assert not trainer.model.encoder._forward_hooks


def test_pictures_and_json() -> None:
    found = spectrum(matrix([3.0, 2.0, 1.0]))
    assert found.to_json()["rankme"] == found.rankme
    assert len(found.plot().axes) == 1
