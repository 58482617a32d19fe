"""Gram matrices: the sum over tokens written out in float64, over odd, empty and non-contiguous inputs and across tile borders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whatmatters.kernels import gram
from whatmatters.kernels.gram import accumulate_gram, accumulate_gram_reference, mirror


def by_hand(x: Tensor, weights: Tensor | None) -> Tensor:
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for t, row in enumerate(x.double()):
        total += torch.outer(row, row) * (1.0 if weights is None else float(weights[t]))
    return total


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9), d=st.integers(1, 11), tile=st.integers(1, 12), weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_fast_reference_and_hand_agree(tokens: int, d: int, tile: int, weighted: bool, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(d, tokens, generator=generator).to(dtype).T for _ in range(2)]  # not contiguous
    weights = [torch.rand(tokens, generator=generator) if weighted else None for _ in batches]
    expected = sum(by_hand(x, w) for x, w in zip(batches, weights, strict=True))
    fast, reference = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "TILE", tile)
        for x, w in zip(batches, weights, strict=True):
            accumulate_gram(fast, x, w)
            accumulate_gram_reference(reference, x, w)
        mirror(fast)
    torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(fast, fast.T)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025])
def test_mirror_keeps_the_lower_triangle_and_fills_the_upper(size: int) -> None:
    total = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower = total.tril()
    mirror(total)
    assert torch.equal(total, lower + lower.tril(-1).T)


def test_tiles_above_the_diagonal_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "TILE", 2)
    total = torch.zeros(4, 4, dtype=torch.float64)
    accumulate_gram(total, torch.ones(1, 4))
    assert total[:2, 2:].eq(0).all()
    assert total[2:].eq(1).all()


def test_sums_stay_exact_over_many_micro_batches() -> None:
    """In float32 a million and a quarter would swallow it; the running sum is float64."""
    total = torch.full((1, 1), 2.0**24, dtype=torch.float64)
    for _ in range(8):
        accumulate_gram(total, torch.full((1, 1), 0.5))
    assert total.item() == 2.0**24 + 2


def test_inputs_are_left_as_they_are() -> None:
    x, w = torch.randn(5, 3), torch.rand(5)
    before = x.clone(), w.clone()
    accumulate_gram(torch.zeros(3, 3, dtype=torch.float64), x, w)
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])
