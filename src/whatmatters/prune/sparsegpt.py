"""SparseGPT: weights go that cost the layer's output least, and the weights that stay make up for those that went.

Frantar, Alistarh 2023, arXiv 2301.00774. unit weight · score w^2 / [H^-1]_jj as seen when its turn comes (the inverse of the Hessian of
the columns still to come) · masks within blocks of 128 columns, or n:m · action zero, with error feedback to later columns. As in the
official code the Hessians of a block are taken from inputs that went through the pruned blocks before it. Two departures: the number
that goes is exact (the official code prunes one weight more in each block of columns), and the weights of an input that is always zero
go first but within the budget, where the official code sets all of them to zero beyond it.
"""

from pathlib import Path

from torch import Tensor, nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.sites import Site, Structure
from whatmatters.prune._common import Pruning, checked, kept_mask, note_uninformed, pattern_of, prune_blocks, site_counts, told

__all__ = ["sparsegpt"]


@method(
    "sparsegpt", paper="2301.00774", job="prune", unit="weight", action="prune", score="w^2 over the inverse Hessian's diagonal",
    allocation="masks by block of columns", kind="baseline",
)  # fmt: skip
def sparsegpt(
    model: nn.Module,
    calibration: Calibration,
    *,
    sparsity: int | float | Plan | None = 0.5,
    pattern: str | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a model's sites in place with error feedback through the Hessian of each layer's reconstruction loss.

    Args:
        model: any model with blocks; changed in place, in one last step.
        calibration: data whose activations make the Hessians.
        sparsity: share of each site's weights that goes, from 0 to 1, rounded up to a whole number; or a plan of kind "ratio" with a share
            for each site; None where the pattern says it.
        pattern: "n:m": n are kept of every m consecutive inputs; None: weights compete within a block of columns.
        block_size: columns whose weights are chosen together, without a pattern.
        damping: share of the mean diagonal that is added to the Hessian, > 0 (the official `percdamp`).
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they stay as they are.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: sparsity, weights kept, relative weight error, relative output error tr(D H D') / tr(W H W'),
        tokens, whether the tokens told anything (else the site was pruned by magnitude), seconds.

    Raises:
        BudgetError: the sparsity is out of range, or is not the one of the pattern.
        InputTypeError: the sparsity is neither a number nor a plan of kind "ratio".
        InputError: damping, block size, pattern or plan do not fit.
        ModelError: uncovered weights that were not allowed, or blocks that do not form a chain.
        NonFiniteError: a weight or an activation is NaN.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = Calibration.from_tensors(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
        >>> [row["kept"] for row in sparsegpt(model, data, sparsity=0.25).rows]
        [48, 12]

    References:
        Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, arXiv 2301.00774.
    """
    if not damping > 0:
        raise InputError(f"damping {damping}; expected a positive share of the Hessian's mean diagonal, such as 0.01")
    if block_size < 1:
        raise InputError(f"block size {block_size}; expected a positive number of columns, such as 128")
    if pattern is not None and pattern_of(pattern) is None:
        raise InputError(f"pattern {pattern!r:.40}; expected n:m such as '2:4', or None")
    found, notes = checked(model, structure, allow_uncovered)
    scope = pattern or "site"
    counts = site_counts(sparsity, scope, found)
    group = int(pattern.partition(":")[2]) if pattern else block_size

    def choose(site: Site, cost: Tensor, start: int) -> Tensor:
        return kept_mask(cost, quota(counts[site.name], site.shape, start, start + cost.shape[1]), scope)

    def visit(pruning: Pruning) -> None:
        pruning.by_feedback(
            choose, lambda site: kept_mask(pruning.block.weight(site).abs(), counts[site.name], scope), group=group, damping=damping
        )

    settings = {"sparsity": told(sparsity), "pattern": pattern, "block_size": block_size, "damping": damping}
    report = prune_blocks(
        "sparsegpt", model, calibration, visit, counts=counts, settings=settings, identity={}, found=found, notes=notes, run_dir=run_dir,
        resume=resume, progress=progress,
    )  # fmt: skip
    return note_uninformed(report, "pruned by magnitude")


def quota(pruned: int, shape: tuple[int, int], start: int, stop: int) -> int:
    """How many of a site's `pruned` weights go from its columns start to stop: shares rounded so that all of them add up to it.

    Example:
        >>> [quota(5, (2, 4), start, start + 1) for start in range(4)]
        [2, 1, 1, 1]
    """
    columns = shape[1]
    return -(-pruned * stop // columns) + (-pruned * start // columns)
