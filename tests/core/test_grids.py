"""Grids against scalar Python, and the clip search against trying every fraction."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core.formats import dequantize
from whatmatters.core.grids import GridSettings, fit_grid, rounded


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(row: list[float], bits: int, symmetric: bool) -> float:
    """Least sum |error|^2.4 over the fractions 1 - i/100, i < 80, with unrounded scales, in Python floats."""
    best = math.inf
    for i in range(80):
        f = 1 - i / 100
        if symmetric:
            scale = f * max(map(abs, row)) / (2 ** (bits - 1) - 1)
            points = [q * scale for q in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        else:
            low, high = min(0.0, *row), max(0.0, *row)
            scale = f * (high - low) / (2**bits - 1)
            zero = round(-low * f / scale)
            points = [(q - zero) * scale for q in range(2**bits)]
        best = min(best, sum(min(abs(w - p) for p in points) ** 2.4 for w in row))
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clip_search_finds_the_best_fraction(bits: int, symmetric: bool) -> None:
    weight = normal(5, 24)
    lost = (rounded(weight, bits, GridSettings(-1, symmetric, True)) - weight).abs().double().pow(2.4).sum(1)
    for row, ours in zip(weight.tolist(), lost.tolist(), strict=True):
        assert ours == pytest.approx(brute(row, bits, symmetric), rel=0.02)  # scales are rounded to 16 bits


@given(
    bits=st.sampled_from([2, 3, 4, 8]), size=st.sampled_from([-1, 4, 8]), symmetric=st.booleans(), clip=st.booleans(),
    seed=st.integers(0, 10_000), stretch=st.floats(1e-3, 1e3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_codes_are_the_nearest_and_stay_in_range(bits: int, size: int, symmetric: bool, clip: bool, seed: int, stretch: float) -> None:
    weight = normal(3, 16, seed=seed) * stretch
    grid = fit_grid(weight, bits, GridSettings(size, symmetric, clip), torch.float32)
    codes = grid.codes_of(weight)
    low, high = grid.code_range
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    groups = grid.scale.shape[1]
    values = torch.arange(low, high + 1, dtype=torch.int8)
    zero = torch.zeros(3, groups) if grid.zero_point is None else grid.zero_point.float()
    points = (values.float() - zero[..., None]) * grid.scale.float()[..., None]
    nearest = (weight.view(3, groups, -1, 1) - points[:, :, None, :]).abs().amin(-1).view(3, 16)
    found = (weight - (codes.view(3, groups, -1).float() - zero[..., None]).mul(grid.scale.float()[..., None]).view(3, 16)).abs()
    assert torch.allclose(found, nearest, atol=1e-5 * stretch)


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]), symmetric=st.booleans(), seed=st.integers(0, 10_000),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_codes_can_be_read_back_from_the_weights(bits: int, symmetric: bool, seed: int, dtype: torch.dtype) -> None:
    """What is kept in memory is the grid; the checkpoint's codes come from the dequantized weights, in every dtype."""
    weight = normal(4, 32, seed=seed).to(dtype)
    grid = fit_grid(weight, bits, GridSettings(8, symmetric, False), dtype)
    codes = grid.codes_of(weight)
    values = dequantize(grid.with_codes(codes), dtype)
    assert torch.equal(dequantize(grid.with_codes(grid.codes_of(values)), dtype), values)


def test_without_search_the_codes_span_the_range_evenly() -> None:
    grid = fit_grid(torch.tensor([[-7.5, 1.0, 2.0, 3.0]]), 4, GridSettings(-1, True, False), torch.float32)
    assert float(grid.scale) == 1.0
    grid = fit_grid(torch.tensor([[-1.0, 0.0, 2.0, 14.0]]), 4, GridSettings(-1, False, False), torch.float32)
    assert float(grid.scale) == 1.0
    assert grid.zero_point is not None
    assert int(grid.zero_point) == 1 - 8


def test_constant_and_zero_groups_are_exact() -> None:
    assert torch.equal(rounded(torch.zeros(2, 8), 3, GridSettings(4)), torch.zeros(2, 8))
    assert torch.equal(rounded(torch.full((2, 8), 0.75), 3, GridSettings(4, False)), torch.full((2, 8), 0.75))


def test_two_bits_of_a_clipped_grid_use_all_codes() -> None:
    codes = fit_grid(normal(8, 256), 2, GridSettings(-1), torch.float32).codes_of(normal(8, 256))
    assert sorted(codes.unique().tolist()) == [-2, -1, 0, 1]
