"""Pruning with error feedback: the inner loop of SparseGPT, in the terms of `kernels.feedback`.

With H = M M', M upper triangular, F_ij = M_ij / M_jj and D = original minus pruned, a column's best value given the errors before it is
t_j = w_j + sum_{i<j} D_i F_ij, and setting t_j to zero costs exactly M_jj^2 t_j^2. The paper's inverse factor is U = M^-1, so this is its
score w^2 / U_jj^2. The paper chooses the weights of a group of columns together, by what they would be with no column of the group pruned
yet: those values solve (T - W) F_gg = D_before F_before,g, a small unit triangular system, so the inverse of H is never formed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

__all__ = ["prune_with_feedback", "prune_with_feedback_reference"]

BLOCK = 128
"""Columns whose correction by all earlier ones is one matrix product."""
SUB_BLOCK = 16
"""Columns that are corrected one by one."""

Choose = Callable[[Tensor, int], Tensor]
"""From the cost (out, columns) of pruning each weight of a group, and the group's first column, to the weights that are kept."""


def prune_with_feedback_reference(
    weight: Float[Tensor, "out d"], hessian: Float64[Tensor, "d d"], choose: Choose, group: int, damping: float
) -> tuple[Float64[Tensor, "out d"], Bool[Tensor, "out d"]]:
    """The paper's algorithm, column by column in float64 with the inverse Hessian's Cholesky factor. The oracle of the fast one."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work = weight.double().clone()
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % group == 0:
            keep[:, j : j + group] = choose((work[:, j : j + group] / upper.diagonal()[j : j + group]).square(), j)
        pruned = torch.where(keep[:, j], work[:, j], 0.0)
        error = (work[:, j] - pruned) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
        work[:, j] = pruned
    return work, keep


def prune_with_feedback(
    weight: Float[Tensor, "out d"], factor: Float[Tensor, "d d"], choose: Choose, group: int
) -> tuple[Float[Tensor, "out d"], Bool[Tensor, "out d"]]:
    """Prune the columns of W in order; what is kept makes up for the errors of the columns before it.

    Args:
        weight: W; rows may come from several layers that share the inputs.
        factor: M of `kernels.feedback.feedback_factor`.
        choose: called once for each group of columns with the cost (out, columns) of pruning each weight, and the first column; returns
            the mask of the weights that are kept. Costs rise in the loss tr(D (H + damping) D').
        group: consecutive columns that are chosen together, at least 1; the last group may be shorter.

    Returns:
        The new weights, exactly zero where pruned, and the mask of those that are kept. Float32, or float64 if W is.
    """
    columns = weight.shape[1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    original = weight.to(dtype).T.contiguous()
    diagonal = factor.diagonal()
    feedback = (factor / diagonal).to(dtype)
    squares = diagonal.square().to(dtype)
    deltas = torch.empty_like(original)
    keep = torch.empty(original.shape, dtype=torch.bool, device=weight.device)
    width = group * max(1, BLOCK // group)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        pending = feedback[:start, start:stop].T @ deltas[:start]
        for begin in range(start, stop, group):
            end = min(begin + group, stop)
            mine = pending[begin - start : end - start]
            mine.addmm_(feedback[start:begin, begin:end].T, deltas[start:begin])
            shift = torch.linalg.solve_triangular(feedback[begin:end, begin:end].T, mine, upper=False, unitriangular=True)
            cost = (original[begin:end] + shift).square_().mul_(squares[begin:end, None])
            keep[begin:end] = choose(cost.T, begin).T
            for first in range(begin, end, SUB_BLOCK):
                last = min(first + SUB_BLOCK, end)
                mine[first - begin : last - begin].addmm_(feedback[begin:first, first:last].T, deltas[begin:first])
                for j in range(first, last):
                    change = mine[j - begin]
                    change.addmv_(deltas[first:j].T, feedback[first:j, j])
                    torch.where(keep[j], -change, original[j], out=deltas[j])
    return (original - deltas).T.contiguous(), keep.T.contiguous()
