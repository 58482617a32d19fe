"""Wanda: weights go whose magnitude times the norm of their input is least, in each output alike. No weight is changed to make up for it.

Sun, Liu, Bair, Kolter 2024, arXiv 2306.11695. unit weight · score |W| times the norm of the input feature · masks per row or n:m · action
zero. As in the official code, the norms of a block are taken from inputs that went through the pruned blocks before it, all of them
before anything in the block itself is pruned.
"""

import time
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.sites import Structure
from whatmatters.prune._common import (
    Pruning,
    check_inputs,
    checked,
    kept_mask,
    note_uninformed,
    pattern_of,
    prune_blocks,
    site_counts,
    told,
)
from whatmatters.score._common import input_statistics

__all__ = ["wanda"]


@method(
    "wanda", paper="2306.11695", job="prune", unit="weight", action="prune", score="|w| times input norm", allocation="masks by row",
    kind="baseline",
)  # fmt: skip
def wanda(
    model: nn.Module,
    calibration: Calibration,
    *,
    sparsity: int | float | Plan | None = 0.5,
    scope: str = "row",
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Set the weights to zero whose magnitude times input norm is least, in place.

    Args:
        model: any model with blocks; changed in place, in one last step.
        calibration: data whose activations give the norms.
        sparsity: share of the weights that goes, from 0 to 1, rounded up to a whole number in each scope; or a plan of kind "ratio" with a
            share for each site; None where the scope n:m says it.
        scope: where weights compete: within each "row" (output), each "site", or "n:m": n are kept of every m consecutive inputs.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they stay as they are.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: sparsity, weights kept, relative weight error, tokens, whether the tokens told anything (else
        the site was pruned by magnitude), seconds.

    Raises:
        BudgetError: the sparsity is out of range, or is not the one of n:m.
        InputTypeError: the sparsity is neither a number nor a plan of kind "ratio".
        InputError: an unknown scope, inputs that m does not divide, or a plan for other sites.
        ModelError: uncovered weights that were not allowed, or blocks that do not form a chain.
        NonFiniteError: a weight or an activation is NaN.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> report = wanda(model, Calibration.from_tensors(torch.tensor([[9.0, 1.0]])), sparsity=0.5)
        >>> model[0].weight.tolist()
        [[1.0, 0.0]]

    References:
        Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695.
    """
    if scope not in ("row", "site") and pattern_of(scope) is None:
        raise InputError(f"scope {scope!r:.40} is unknown; expected 'row', 'site' or n:m such as '2:4'")
    found, notes = checked(model, structure, allow_uncovered)
    counts = site_counts(sparsity, scope, found)

    def visit(pruning: Pruning) -> None:
        by_name = {site.name: site for site in pruning.sites}
        for statistic in input_statistics(pruning.block, pruning.sites, kind="diagonal") if by_name else []:
            check_inputs(statistic)
            informed = bool(statistic.total.any())
            for site in map(by_name.__getitem__, statistic.sites):
                start = time.perf_counter()
                weight = pruning.block.weight(site)
                score = importance(weight, statistic.total / statistic.tokens) if informed else weight.abs()
                keep = kept_mask(score, counts[site.name], scope)
                pruning.zero(site, keep, tokens=statistic.tokens, informed=informed, seconds=time.perf_counter() - start)

    report = prune_blocks(
        "wanda", model, calibration, visit, counts=counts, settings={"sparsity": told(sparsity), "scope": scope}, identity={}, found=found,
        notes=notes, run_dir=run_dir, resume=resume, progress=progress,
    )  # fmt: skip
    return note_uninformed(report, "pruned by magnitude")


def importance(weight: Float[Tensor, "out d"], squares: Float64[Tensor, " d"]) -> Float[Tensor, "out d"]:
    """|w| times the root mean square of its input, for weights (out, d) and mean squares of the inputs."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.abs().to(dtype) * squares.sqrt().to(dtype)
