"""Quantization with error feedback: the inner loop of GPTQ, and a sibling of it for pruning.

For a layer with weights W (out, in) and Hessian H (in, in), columns are rounded one after another and the columns still to come make up
for the error made so far. With H = M M', M upper triangular, the best value of column j given the errors D of the columns before it is

    t_j = w_j + sum_{i<j} D_i M_ij / M_jj                     (D = original minus rounded)

and the loss tr(D H D') is exactly sum_j M_jj^2 |t_j - rounded_j|^2. This is the same iterate as the paper's, which uses the Cholesky
factor of the inverse of H; it needs one factorization instead of a factorization, an inverse and a second factorization, and turns the
update of all remaining columns into one product per block of columns.
"""

import torch
from jaxtyping import Float, Float64, Int8, Int64
from torch import Tensor

from whatmatters.core.errors import NonFiniteError

__all__ = ["feedback_factor", "round_with_feedback", "round_with_feedback_reference"]

BLOCK = 128
"""Columns whose correction by all earlier blocks is one matrix product."""
SUB_BLOCK = 16
"""Columns inside a block that are corrected one by one."""
PIECE = 1 << 20
"""Elements that are moved at a time."""
ATTEMPTS = 49
"""How often the damping is added before the matrix is given up."""


def feedback_factor(hessian: Float64[Tensor, "d d"], damping: float) -> Float64[Tensor, "d d"]:
    """M, upper triangular, with M M' = H + damping * mean(diag H) * I; damping is added again until the factorization succeeds.

    Raises:
        NonFiniteError: H is not finite, or stays indefinite after 49 additions.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise NonFiniteError("the Hessian holds NaN or infinity; check the calibration inputs")
    step = damping * diagonal.mean().item()
    damped = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(1, ATTEMPTS + 1):
        damped.copy_(hessian)
        damped.diagonal().add_(attempt * step)
        # H reversed, factorized and reversed again gives the upper factor. All of it in place: one copy of H is all that is held.
        _reverse(damped)
        lower = damped.mT
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed.item():
            _reverse(damped)
            return damped.mT
    raise NonFiniteError(
        f"the Hessian is not positive definite even with {ATTEMPTS * damping:g} of its mean diagonal added; raise the damping"
    )


def _reverse(matrix: Float64[Tensor, "d d"]) -> None:
    """Reverse rows and columns in place, a piece at a time: of a contiguous matrix this is its elements in reverse order."""
    flat = matrix.view(-1)
    for start in range(0, len(flat) // 2, PIECE):
        stop = min(start + PIECE, len(flat) // 2)
        first, last = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def round_with_feedback_reference(
    weight: Float[Tensor, "out d"],
    hessian: Float64[Tensor, "d d"],
    scale: Float[Tensor, "groups out"],
    zero: Float[Tensor, "groups out"],
    group: Int64[Tensor, "d"],
    low: Float[Tensor, "out"],
    high: Float[Tensor, "out"],
    damping: float,
) -> Int8[Tensor, "out d"]:
    """The paper's algorithm, column by column in float64 with the inverse Hessian's Cholesky factor. The oracle of the fast one."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work = weight.double().clone()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for j in range(weight.shape[1]):
        s, z = scale[group[j]].double(), zero[group[j]].double()
        q = (work[:, j] / s).round().add(z).clamp(low.double(), high.double())
        error = (work[:, j] - (q - z) * s) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
        codes[:, j] = q.to(torch.int8)
    return codes


def round_with_feedback(
    weight: Float[Tensor, "out d"],
    factor: Float[Tensor, "d d"],
    scale: Float[Tensor, "groups out"],
    zero: Float[Tensor, "groups out"],
    group: Int64[Tensor, "d"],
    low: Float[Tensor, "out"],
    high: Float[Tensor, "out"],
) -> tuple[Int8[Tensor, "out d"], Float64[Tensor, "out"]]:
    """Round the columns of W in order, each after the correction by the errors before it.

    Args:
        weight: W; rows may come from several layers that share the inputs, each with its own grid.
        factor: M of `feedback_factor`.
        scale: step of each row's grid, by group of columns.
        zero: code of the value 0, by group; 0 for symmetric grids.
        group: group of each column.
        low: smallest code of each row.
        high: largest code of each row.

    Returns:
        Codes, and each row's share of the loss tr(D (H + damping) D').
    """
    columns = weight.shape[1]
    original = weight.float().T.contiguous()
    diagonal = factor.diagonal()
    feedback = factor.float().div_(diagonal.float())  # a float64 divisor would make float64 copies of the whole
    squares = diagonal.double().square().tolist()
    deltas = torch.empty_like(original)
    codes = torch.empty(original.shape, dtype=torch.int8, device=weight.device)
    loss = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    rounded = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    groups = group.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        target = original[start:stop].clone()
        if start:
            target.addmm_(feedback[:start, start:stop].T, deltas[:start])
        for first in range(start, stop, SUB_BLOCK):
            last = min(first + SUB_BLOCK, stop)
            if first > start:
                target[first - start : last - start].addmm_(feedback[start:first, first:last].T, deltas[start:first])
            for j in range(first, last):
                wanted = target[j - start]
                if j > first:
                    wanted.addmv_(deltas[first:j].T, feedback[first:j, j])
                s, z = scale[groups[j]], zero[groups[j]]
                torch.div(wanted, s, out=rounded)
                rounded.round_().add_(z)
                torch.clamp(rounded, low, high, out=rounded)
                codes[j] = rounded
                rounded.sub_(z).mul_(s)
                torch.sub(original[j], rounded, out=deltas[j])
                loss.add_((wanted - rounded).square_().double(), alpha=squares[j])
    return codes.T.contiguous(), loss
