"""Weighted Gram matrices of calibration inputs: the Hessian of a layer's reconstruction loss, accumulated micro-batch by micro-batch."""

from collections.abc import Iterable, Iterator

from jaxtyping import Float, Float32, Float64
from torch import Tensor

__all__ = ["accumulate_gram", "accumulate_gram_reference", "add_tiles", "gram_tiles", "mirror"]

TILE = 1024
"""Rows of the result computed at a time: bounds the temporary product and skips the half above the diagonal."""


def accumulate_gram_reference(
    total: Float64[Tensor, "d d"], inputs: Float[Tensor, "tokens d"], weights: Float[Tensor, "tokens"] | None = None
) -> None:
    """Add sum_t w_t x_t x_t' to `total` in place, all in float64. The oracle of `accumulate_gram`."""
    x = inputs.double()
    total += x.T @ (x if weights is None else x * weights.double()[:, None])


def accumulate_gram(
    total: Float64[Tensor, "d d"], inputs: Float[Tensor, "tokens d"], weights: Float[Tensor, "tokens"] | None = None
) -> None:
    """Add sum_t w_t x_t x_t' to the lower triangle of `total`, in place; `mirror` completes it.

    Products are taken in float32 and summed over micro-batches in float64. Only tiles on or below the diagonal are computed: about half
    the multiplications of a full product.

    Args:
        total: the running sum; only tiles on and below the diagonal are touched.
        inputs: one micro-batch of inputs.
        weights: non-negative weights of its tokens; None: all one.
    """
    add_tiles(total, gram_tiles(inputs, weights))


def gram_tiles(inputs: Float[Tensor, "tokens d"], weights: Float[Tensor, "tokens"] | None = None) -> Iterator[Float32[Tensor, "rows _"]]:
    """The product that `accumulate_gram` adds, as the tiles on and below the diagonal: rows by rows, up to where the diagonal ends."""
    x = inputs.float()
    if weights is not None:
        x = x * weights.float().sqrt()[:, None]
    size = x.shape[1]
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        yield x[:, start:stop].T @ x[:, :stop]


def add_tiles(total: Float64[Tensor, "d d"], tiles: Iterable[Float32[Tensor, "rows _"]]) -> None:
    """Add what `gram_tiles` gives to `total`, in place."""
    start = 0
    for tile in tiles:
        stop = start + len(tile)
        total[start:stop, :stop] += tile.to(total.device)
        start = stop


def mirror(total: Float64[Tensor, "d d"]) -> None:
    """Copy the lower triangle onto the upper one, in place, tile by tile."""
    size = total.shape[0]
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        total[:start, start:stop] = total[start:stop, :start].T
        tile = total[start:stop, start:stop]
        tile.copy_(tile.tril() + tile.tril(-1).T)
