"""The gather product: every face against the masked product in float64, the mask against a sort in Python."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whatmatters.core.errors import InputError, MissingExtraError, NonFiniteError
from whatmatters.kernels import sparse_gemv as module
from whatmatters.kernels.sparse_gemv import face_for, sparse_gemv, sparse_gemv_reference

FACES = ["bag", "compiled"]
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


def case(out: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, out, generator=draw).to(dtype).T
    return weight, torch.randn(size, generator=draw).to(dtype), torch.rand(size, generator=draw), torch.randn(out, generator=draw).to(dtype)


def chosen(scores: list[float], keep: int) -> list[int]:
    """The `keep` largest, the earlier of equals first, by a sort in Python."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


@needs_numba
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(("out", "size", "keep"), [(1, 1, 1), (7, 5, 0), (7, 5, 5), (4100, 33, 11), (513, 130, 46), (8, 64, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_faces_give_the_product_over_the_largest(face: str, out: int, size: int, keep: int, with_bias: bool) -> None:
    weight, x, norms, bias = case(out, size)
    rows = chosen((x * norms).abs().tolist(), keep)
    expected = weight[:, rows].double() @ x[rows].double() + (bias.double() if with_bias else 0)
    y, kept = sparse_gemv(weight, x, norms, keep=keep, bias=bias if with_bias else None, face=face)
    assert kept == keep
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)
    reference, count = sparse_gemv_reference(weight, x, norms, keep=keep, bias=bias if with_bias else None)
    assert count == keep
    torch.testing.assert_close(reference.double(), expected, rtol=1e-6, atol=1e-6)


@needs_numba
@pytest.mark.parametrize("face", FACES)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3e-39, 5.0, -1e30]), min_size=1, max_size=40), data=st.data())
def test_which_channels_are_kept_with_many_ties(face: str, values: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(values)))
    signal = torch.tensor(values)
    rows = chosen(signal.abs().tolist(), keep)
    weight = torch.eye(len(values)).T  # the product tells which channels went in
    y, kept = sparse_gemv(weight, torch.ones(len(values)), keep=keep, signal=signal, face=face)
    assert kept == keep
    assert y.nonzero()[:, 0].tolist() == rows


@needs_numba
@pytest.mark.parametrize("face", FACES)
def test_a_bound_keeps_what_reaches_it(face: str) -> None:
    y, kept = sparse_gemv(torch.eye(4).T, torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([1.0, 1.0, 8.0, 0.5]), bound=2.0, face=face)
    assert (y.tolist(), kept) == ([0.0, -2.0, 0.5, 0.0], 2)


@needs_numba
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [{"keep": 2}, {"bound": 0.1}])
def test_scores_that_are_not_finite_are_refused(face: str, bad: float, how: dict[str, float]) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        sparse_gemv(torch.eye(3).T, torch.tensor([1.0, bad, 2.0]), face=face, **how)


@needs_numba
def test_two_threads_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, norms, bias = case(4100, 96)
    monkeypatch.setattr(module, "PARALLEL", 1000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(sparse_gemv(weight, x, norms, keep=31, bias=bias, face="compiled")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_take_the_bag(dtype: torch.dtype) -> None:
    weight, x, norms, bias = case(24, 40, dtype=dtype)
    assert face_for(weight) == "bag"
    y, _ = sparse_gemv(weight, x, norms, keep=13, bias=bias)
    expected, _ = sparse_gemv_reference(weight, x, norms, keep=13, bias=bias)
    assert y.dtype == dtype
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), expected.double(), rtol=bound, atol=5 * bound)
    with pytest.raises(InputError, match="float32"):
        sparse_gemv(weight, x, norms, keep=13, face="compiled")


def test_rows_that_are_not_contiguous_take_the_bag_too() -> None:
    weight, x, norms, _ = case(24, 40)
    packed = weight.contiguous()
    assert face_for(packed) == "bag"
    torch.testing.assert_close(sparse_gemv(packed, x, norms, keep=7)[0], sparse_gemv_reference(weight, x, norms, keep=7)[0])


def test_bad_settings_and_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, norms, _ = case(4, 5)
    for wrong in ({}, {"keep": 1, "bound": 1.0}, {"keep": 6}, {"keep": -1}, {"keep": 1, "face": "triton"}):
        with pytest.raises(InputError):
            sparse_gemv(weight, x, norms, **wrong)
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    module._compiled.cache_clear()
    with pytest.raises(MissingExtraError, match=r"whatmatters\[fast\]"):
        sparse_gemv(weight, x, norms, keep=1, face="compiled")
    module._compiled.cache_clear()
