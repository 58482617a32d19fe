"""The spectrum of an embedding matrix: its singular values, from the whole matrix or streamed over batches, and what is read from them.

One component for every label-free measure of a representation that is a function of singular values. The streamed route keeps the float64
scatter, K^2 numbers, and gives the same values as an SVD of the whole matrix for N >> K.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from whatmatters.core.catalog import door
from whatmatters.core.errors import InputError, InputTypeError, NonFiniteError

__all__ = ["RankMeAccumulator", "Spectrum", "spectrum"]

EPS = 1e-7
ENOUGH = 4
"""Samples a dimension below which the value still grows with their number."""
FIT = (11, 100)
"""Ranks of the eigenvalues that alpha-ReQ fits its line to, where there are so many (Stringer et al. 2019)."""

Matrix = Tensor | NDArray[Any]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of an embedding matrix and what is read from them.

    Attributes:
        singular_values: falling, float64, min(samples, dimensions) of them.
        samples: rows of the matrix, N.
        dimensions: columns, K.
        eps: what RankMe adds to each share.
    """

    singular_values: Float64[Tensor, "m"]
    samples: int
    dimensions: int
    eps: float = EPS

    @property
    def collapsed(self) -> bool:
        """The matrix is zero: it has no direction at all, and every measure is 0."""
        return not bool(self.singular_values[0] > 0)

    @property
    def shares(self) -> Float64[Tensor, "m"]:
        """p of the paper without its epsilon: singular values divided by their sum; zeros if the matrix is zero."""
        return self.singular_values if self.collapsed else self.singular_values / self.singular_values.sum()

    @property
    def rankme(self) -> float:
        """exp(-sum p log p) with p = shares + eps (the paper's equations 1 and 2): 1 to min(N, K), and a little more through eps."""
        if self.collapsed:
            return 0.0
        p = self.shares + self.eps
        return math.exp(-float(torch.special.xlogy(p, p).sum()))

    @property
    def rank(self) -> int:
        """Singular values above the largest times max(N, K) times the float32 epsilon (numpy's rule)."""
        floor = self.singular_values[0] * max(self.samples, self.dimensions) * torch.finfo(torch.float32).eps
        return int((self.singular_values > floor).sum())

    @property
    def participation_ratio(self) -> float:
        """(sum l)^2 / sum l^2 of the eigenvalues l, the squared singular values."""
        squares = self.shares.square()
        return 0.0 if self.collapsed else float(squares.sum().square() / squares.square().sum())

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared largest singular value."""
        return 0.0 if self.collapsed else float((self.singular_values / self.singular_values[0]).square().sum())

    @property
    def alpha_req(self) -> float:
        """Alpha of the power law l_k ~ k^-alpha (Agrawal et al. 2022), by log-log least squares with weights 1/k; nan below 3 points."""
        values = self.singular_values.square()
        count = int((values > values[0] * torch.finfo(torch.float64).eps).sum())
        first = FIT[0] if count >= FIT[0] + 2 else 1
        k = torch.arange(first, min(count, FIT[1]) + 1, dtype=torch.float64)
        if len(k) < 3:
            return math.nan
        x, y, w = k.log(), values[first - 1 : first - 1 + len(k)].log(), 1 / k
        x = x - (w * x).sum() / w.sum()
        return -float((w * x * y).sum() / (w * x * x).sum())

    def to_json(self) -> dict[str, float | int | bool]:
        """All measures by name."""
        names = ("rankme", "rank", "participation_ratio", "stable_rank", "alpha_req", "samples", "dimensions", "collapsed")
        return {name: getattr(self, name) for name in names}

    def plot(self) -> Any:
        """A matplotlib Figure of the shares by rank, with RankMe as a line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(self.shares) + 1), self.shares.clamp(min=self.eps), marker=".")
        axes.axvline(self.rankme, linestyle="--", color="gray", label=f"RankMe {self.rankme:.1f}")
        axes.set(yscale="log", xlabel="direction", ylabel="share of the singular values")
        axes.legend()
        return figure


class RankMeAccumulator:
    """Collects an embedding matrix batch by batch; memory K^2 whatever the number of rows, and the value of the whole matrix.

    What is kept is the mean and the scatter around it in float64, so a large mean costs no precision (Chan et al. 1979). Accumulators of
    several workers are merged. Singular values below 1e-8 of the largest are noise of the squaring and are taken as zero.

    Args:
        center: measure around the mean; the paper does not.
        eps: what RankMe adds to each share, at least 0.

    Raises:
        InputError: a negative eps; a batch of another width.
        NonFiniteError: NaN or infinity in a batch.

    Example:
        >>> import torch
        >>> collected = RankMeAccumulator()
        >>> for batch in torch.eye(4).repeat(8, 1).split(5):
        ...     collected.update(batch)
        >>> round(collected.compute().rankme, 3)
        4.0
    """

    def __init__(self, *, center: bool = False, eps: float = EPS) -> None:
        self.center = center
        self.eps = check_eps(eps)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.samples = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None

    def update(self, batch: Matrix) -> None:
        """Add the rows of a batch (n, K)."""
        rows = _matrix(batch).double()
        if len(rows):
            mean = rows.mean(0)
            around = rows - mean
            self._add(len(rows), mean, around.T @ around)

    def merge(self, other: "RankMeAccumulator") -> None:
        """Add all that another accumulator has collected."""
        if other.mean is not None and other.scatter is not None:
            self._add(other.samples, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.mean is None or self.scatter is None:
            self.samples, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self.mean.shape:
            raise InputError(f"a batch of {len(mean)} dimensions after batches of {len(self.mean)}; compare embeddings of one width")
        total = self.samples + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.samples * count / total)
        self.mean += shift * (count / total)
        self.samples = total

    def compute(self) -> Spectrum:
        """The spectrum of all rows so far."""
        if self.mean is None or self.scatter is None or self.samples < 2:
            raise InputError(f"{self.samples} rows; a spectrum needs at least 2")
        gram = self.scatter if self.center else self.scatter + self.samples * torch.outer(self.mean, self.mean)
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)[: self.samples]
        noise = values[0] * len(gram) * torch.finfo(torch.float64).eps
        singular = torch.where(values > noise, values, 0.0).sqrt().cpu()
        return _warned(Spectrum(singular, self.samples, len(gram), self.eps))


def check_eps(eps: float) -> float:
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"eps is {eps}; expected a number of at least 0 (the paper's is {EPS})")
    return eps


def _matrix(given: Matrix) -> Float[Tensor, "n k"]:
    """A finite floating-point matrix of at least two columns, in float32 or float64."""
    if not isinstance(given, Tensor | np.ndarray):
        raise InputTypeError(f"embeddings are a {type(given).__name__}; expected a torch tensor or a numpy array (samples, dimensions)")
    rows = torch.as_tensor(given).detach()
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise InputError(
            f"embeddings of shape {tuple(rows.shape)}; expected (samples, dimensions) with at least 2 dimensions. "
            "Of tokens (batch, length, dimensions) take the mean, or flatten them: the rank differs"
        )
    if rows.is_complex() or rows.is_sparse:
        raise InputTypeError(f"embeddings of {rows.dtype}, {rows.layout}; expected a dense real matrix")
    rows = rows if rows.dtype == torch.float64 else rows.float()
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        raise NonFiniteError(
            f"{int((~finite).sum())} of {len(rows)} embeddings hold NaN or infinity, first row {int((~finite).int().argmax())}"
        )
    return rows


def _warned(found: Spectrum) -> Spectrum:
    if found.samples < ENOUGH * found.dimensions:
        warnings.warn(
            f"effective rank limited by sample count: {found.samples} samples of {found.dimensions} dimensions; "
            f"give at least {ENOUGH * found.dimensions}, and compare only values of equal numbers",
            stacklevel=3,
        )
    return found


@door("represent.spectrum")
def spectrum(Z: Matrix | Iterable[Matrix], *, eps: float = EPS, center: bool = False, route: str = "auto") -> Spectrum:
    """Singular values of an embedding matrix, with RankMe, participation ratio, stable rank and alpha-ReQ read from them.

    Args:
        Z: embeddings (N, K), tensor or array, any real dtype; or an iterable of such batches, which is streamed.
        eps: what RankMe adds to each share, at least 0.
        center: subtract the mean row first; the paper does not.
        route: "svd" of the matrix, "gram" (float64 scatter, K^2 memory, the same value for N >> K), "auto": "gram" if N > 2 K or batches
            are given.

    Returns:
        The spectrum; a warning is given below 4 K samples, where the value still grows with their number.

    Raises:
        InputError: not a matrix, fewer than 2 rows or columns, an unknown route, a negative eps.
        NonFiniteError: NaN or infinity; the message tells how many rows.

    Example:
        >>> import torch
        >>> found = spectrum(torch.eye(4).repeat(8, 1))
        >>> round(found.participation_ratio, 3), found.rank
        (4.0, 4)
    """
    if route not in ("auto", "svd", "gram"):
        raise InputError(f"route is {route!r}; expected 'auto', 'svd' or 'gram'")
    check_eps(eps)
    if isinstance(Z, Tensor | np.ndarray):
        rows = _matrix(Z)
        if len(rows) < 2:
            raise InputError(f"{len(rows)} rows; a spectrum needs at least 2")
        if route == "svd" or (route == "auto" and len(rows) <= 2 * rows.shape[1]):
            rows = (rows - rows.mean(0) if center else rows).double()
            return _warned(Spectrum(torch.linalg.svdvals(rows).cpu(), rows.shape[0], rows.shape[1], eps))
        Z = rows.split(8192)
    elif route == "svd":
        raise InputError("batches are streamed and have no svd; give the whole matrix, or route='gram'")
    collected = RankMeAccumulator(center=center, eps=eps)
    for batch in Z:
        collected.update(batch)
    return collected.compute()
