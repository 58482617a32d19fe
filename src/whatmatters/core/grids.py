"""The grid a site is rounded to: a step, and a code for zero, for each group of inputs of each output."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whatmatters.core.formats import QuantizedGrid, dequantize, round_scale

__all__ = ["GridSettings", "fit_grid", "rounded"]

CLIP_STEPS = 80
CLIP_GRID = 100
CLIP_NORM = 2.4
"""The clip search tries the fractions 1 - i/100, i < 80, of the full range and minimises sum |error|^2.4, as the code of GPTQ and RSQ."""
CHUNK = 1 << 17
"""Weights the clip search works on at a time: they stay in the cache."""


@dataclass(frozen=True)
class GridSettings:
    """How grids are laid.

    Attributes:
        group_size: inputs that share a scale; -1: one scale per output channel.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
    """

    group_size: int = 128
    symmetric: bool = True
    clip_search: bool = True


def fit_grid(weight: Float[Tensor, "out d"], bits: int, settings: GridSettings, dtype: torch.dtype) -> QuantizedGrid:
    """The grid of a site.

    Symmetric: codes -2^(b-1) .. 2^(b-1)-1. With clip search the scale is f * max|w| / (2^(b-1)-1) with the best fraction f; without, the
    codes span the range evenly, max|w| / ((2^b-1)/2), as the format's own minmax observer has it. Asymmetric: (max - min) / (2^b-1) over
    a range that includes 0, times the fraction. Scales are rounded to the 16 bits a checkpoint stores before anything is rounded to them.

    Args:
        weight: the site's weights.
        bits: width of a code, 2 to 8.
        settings: how the grid is laid; the group size must divide the inputs.
        dtype: dtype of the model's weights, which decides that of the scales.

    Returns:
        The grid.

    Example:
        >>> fit_grid(torch.tensor([[-3.0, 1.0, 2.0, 3.0]]), 3, GridSettings(-1), torch.float32).scale
        tensor([[1.]], dtype=torch.float16)
    """
    outputs, inputs = weight.shape
    size = inputs if settings.group_size == -1 else settings.group_size
    grouped = weight.float().reshape(outputs * (inputs // size), size)
    top = 2 ** (bits - 1) - 1
    low = grouped.amin(1).clamp(max=0)
    high = grouped.amax(1).clamp(min=0)
    if settings.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if settings.clip_search:
        fraction = _best_fraction(grouped, low, high, bits, settings.symmetric)
    else:
        fraction = torch.full_like(high, top / ((2**bits - 1) / 2) if settings.symmetric else 1.0)
    scale = _step(low, high, bits, settings.symmetric) * fraction
    stored = round_scale(scale.reshape(outputs, -1), dtype)
    if settings.symmetric:
        return QuantizedGrid(stored, None, bits, settings.group_size)
    zero = (-(low * fraction) / stored.float().reshape(-1)).round().clamp(0, 2**bits - 1) - (top + 1)
    return QuantizedGrid(stored, zero.reshape(outputs, -1).to(torch.int8), bits, settings.group_size)


def rounded(weight: Float[Tensor, "out d"], bits: int, settings: GridSettings) -> Float[Tensor, "out d"]:
    """The weights rounded to the nearest point of their grid, in their own dtype.

    Example:
        >>> rounded(torch.tensor([[-3.0, 1.2, 2.0, 3.0]]), 3, GridSettings(-1))
        tensor([[-3.,  1.,  2.,  3.]])
    """
    grid = fit_grid(weight, bits, settings, weight.dtype)
    return dequantize(grid.with_codes(grid.codes_of(weight)), weight.dtype)


def _step(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    return high / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)


def _best_fraction(
    grouped: Float[Tensor, "groups size"], low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> Float[Tensor, " groups"]:
    """For each group the fraction of its range that rounds it with the least sum |error|^2.4."""
    result = torch.ones_like(high)
    rows = max(1, CHUNK // grouped.shape[1])
    for start in range(0, len(grouped), rows):
        part = slice(start, start + rows)
        w, lo = grouped[part], low[part, None]
        step = _step(lo, high[part, None], bits, symmetric)
        step = torch.where(step == 0, 1.0, step)
        best = torch.full_like(high[part], torch.inf)
        chosen = result[part]
        for i in range(CLIP_STEPS):
            fraction = 1 - i / CLIP_GRID
            scale = step * fraction
            codes = (w / scale).round_()
            if symmetric:
                codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            else:
                zero = (-lo / step).round()
                codes.add_(zero).clamp_(0, 2**bits - 1).sub_(zero)
            # exp(2.4 log x) is ten times as fast as x ** 2.4 here, and log 0 = -inf gives 0
            error = codes.mul_(scale).sub_(w).abs_().log_().mul_(CLIP_NORM).exp_().sum(1)
            better = error < best
            best = torch.where(better, error, best)
            chosen.masked_fill_(better, fraction)
    return result
