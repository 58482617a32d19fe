"""Pruning with feedback: the paper's algorithm in float64, the conditional optimum solved directly, and fixed masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whatmatters.kernels import prune_feedback
from whatmatters.kernels.feedback import feedback_factor
from whatmatters.kernels.prune_feedback import prune_with_feedback, prune_with_feedback_reference


def problem(out: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * d + 2, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(d, out, generator=g, dtype=torch.float64).T, x.T @ x / len(x)  # weights not contiguous


def half(cost: Tensor, start: int) -> Tensor:
    """Keeps the dearer half of a group, all rows together."""
    flat = cost.reshape(-1)
    keep = torch.zeros(flat.shape, dtype=torch.bool)
    keep[flat.argsort(descending=True)[: len(flat) // 2]] = True
    return keep.reshape(cost.shape)


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(0, 5), d=st.integers(1, 21), group=st.integers(1, 24), block=st.integers(1, 9), sub=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_fast_and_reference_agree(out: int, d: int, group: int, block: int, sub: int, seed: int) -> None:
    weight, hessian = problem(out, d, seed)
    expected, mask = prune_with_feedback_reference(weight, hessian, half, group, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_feedback, "BLOCK", block)
        patch.setattr(prune_feedback, "SUB_BLOCK", sub)
        pruned, keep = prune_with_feedback(weight, feedback_factor(hessian, 0.01), half, group)
    assert pruned.dtype == torch.float64
    assert torch.equal(keep, mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("out", "d", "group"), [(7, 300, 128), (5, 132, 4), (3, 129, 40), (2, 200, 1000)])
def test_float32_agrees_with_the_float64_reference(out: int, d: int, group: int) -> None:
    weight, hessian = problem(out, d, 1)
    expected, mask = prune_with_feedback_reference(weight, hessian, half, group, 0.01)
    pruned, keep = prune_with_feedback(
        weight.float(), feedback_factor(hessian, 0.01), lambda cost, start: mask[:, start : start + group], group
    )
    assert pruned.dtype == torch.float32
    assert torch.equal(keep, mask)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


def test_costs_are_the_least_loss_of_pruning_each_weight_alone() -> None:
    """Brute force: prune one weight, re-solve all columns still to come; what that loses beyond what was lost already is the cost."""
    weight, hessian = problem(2, 9, 5)
    full, group = damped(hessian, 0.01), 3
    seen: list[tuple[int, Tensor]] = []

    def choose(cost: Tensor, start: int) -> Tensor:
        seen.append((start, cost.clone()))
        return half(cost, start)

    pruned, _ = prune_with_feedback(weight, feedback_factor(hessian, 0.01), choose, group)

    def least(row: int, start: int, also: int | None) -> float:
        """Least d H d' for a row with columns before `start` as pruned, column `also` zero and the others free."""
        fixed = list(range(start)) + ([] if also is None else [also])
        error = [float(weight[row, j] - pruned[row, j]) for j in range(start)] + ([] if also is None else [float("nan")])
        free = [j for j in range(len(full)) if j not in fixed]
        if also is not None:
            error[-1] = float(weight[row, also])
        e = torch.tensor(error, dtype=torch.float64)
        inner = full[fixed][:, fixed] - full[fixed][:, free] @ torch.linalg.solve(full[free][:, free], full[free][:, fixed])
        return float(e @ inner @ e)

    for start, cost in seen:
        for row in range(2):
            for j in range(start, start + group):
                if j < start + group - 1 or start + group < len(full):
                    alone = least(row, start, j) - least(row, start, None)
                    # the paper's score takes H^-1 of the columns from j on; that of all columns from `start` on is smaller before j
                    assert float(cost[row, j - start]) >= alone - 1e-8
                    if j == start:
                        assert float(cost[row, 0]) == pytest.approx(alone, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 10), seed=st.integers(0, 1000))
def test_the_loss_is_the_sum_over_turns(d: int, seed: int) -> None:
    """tr(D H D') = sum over pruned weights of M_jj^2 t_j^2, with the costs seen when each column is a group of its own."""
    weight, hessian = problem(3, d, seed)
    paid = torch.zeros((), dtype=torch.float64)

    def choose(cost: Tensor, start: int) -> Tensor:
        keep = half(cost, start)
        paid.add_(cost[~keep].sum())
        return keep

    pruned, _ = prune_with_feedback(weight, feedback_factor(hessian, 0.01), choose, 1)
    error = weight - pruned
    torch.testing.assert_close(((error @ damped(hessian, 0.01)) * error).sum(), paid, rtol=1e-7, atol=1e-7)


def test_the_weights_after_a_block_of_pruned_columns_are_the_exact_optimum() -> None:
    """With the first columns all pruned and the others all kept, the greedy pass is the least-squares solution."""
    weight, hessian = problem(4, 12, 2)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, :5] = False
    pruned, _ = prune_with_feedback(weight, feedback_factor(hessian, 0.01), lambda cost, start: mask[:, start : start + 4], 4)
    h = damped(hessian, 0.01)
    expected = weight[:, 5:] + torch.linalg.solve(h[5:, 5:], h[5:, :5] @ weight[:, :5].T).T
    torch.testing.assert_close(pruned[:, 5:], expected, rtol=1e-8, atol=1e-8)
    assert pruned[:, :5].eq(0).all()


def test_keeping_all_changes_nothing() -> None:
    weight, hessian = problem(3, 20, 0)
    pruned, keep = prune_with_feedback(
        weight, feedback_factor(hessian, 0.01), lambda cost, start: torch.ones_like(cost, dtype=torch.bool), 8
    )
    assert torch.equal(pruned, weight)
    assert keep.all()


def test_without_correlations_kept_weights_stay() -> None:
    weight = problem(6, 33, 0)[0].float()
    pruned, keep = prune_with_feedback(weight, feedback_factor(torch.eye(33, dtype=torch.float64), 0.01), half, 8)
    assert torch.equal(pruned, weight * keep)
    expected = torch.cat([half(part.square(), 0) for part in weight.split(8, dim=1)], 1)
    assert torch.equal(keep, expected)
