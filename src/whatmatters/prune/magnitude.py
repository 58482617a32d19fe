"""Magnitude pruning: the smallest weights go. The baseline that needs no data.

unit weight · score |w| · masks over all, per site, per row or n:m · action zero.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.sites import Site, Structure
from whatmatters.prune._common import Pruning, checked, exact_share, kept_mask, pattern_of, prune_blocks, site_counts, told

__all__ = ["magnitude"]


@method("magnitude", job="prune", unit="weight", action="prune", score="|w|", allocation="masks", kind="baseline", needs_text=False)
def magnitude(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    sparsity: int | float | Plan | None = 0.5,
    scope: str = "site",
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Set the weights of least magnitude to zero, in place.

    Args:
        model: any model with blocks; changed in place, in one last step.
        calibration: ignored; taken so that every pruner can be called alike.
        sparsity: share of the weights that goes, from 0 to 1, rounded up to a whole number in each scope; or a plan of kind "ratio" with a
            share for each site; None where the scope n:m says it.
        scope: where weights compete: within each "site", over "all" sites together, within each "row" (output), or "n:m": n are kept of
            every m consecutive inputs.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they stay as they are.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: sparsity, weights kept, relative weight error, seconds.

    Raises:
        BudgetError: the sparsity is out of range, or is not the one of n:m.
        InputTypeError: the sparsity is neither a number nor a plan of kind "ratio".
        InputError: an unknown scope, inputs that m does not divide, or a plan for other sites.
        ModelError: uncovered weights that were not allowed.
        NonFiniteError: a weight is NaN; the message names the site.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.0, 1.0, 5.0, 6.0]]))
        >>> report = magnitude(model, sparsity=0.5, scope="2:4")
        >>> model[0].weight.tolist()
        [[0.0, -4.0, 0.0, 3.0], [0.0, 0.0, 5.0, 6.0]]
    """
    if scope not in ("site", "all", "row") and pattern_of(scope) is None:
        raise InputError(f"scope {scope!r:.40} is unknown; expected 'site', 'all', 'row' or n:m such as '2:4'")
    found, notes = checked(model, structure, allow_uncovered)
    cut: Cut | None = None
    if scope == "all":
        if isinstance(sparsity, Plan):
            raise InputError(
                "a plan says how much of each site goes, scope 'all' leaves that to the weights; give scope='site' or a number"
            )
        total = sum(site.size for site in found.sites)
        cut = global_cut(model, found.sites, total - math.ceil(exact_share(sparsity) * total))
    counts = site_counts(sparsity, scope, found) if cut is None else cut.counts

    def visit(pruning: Pruning) -> None:
        for site in pruning.sites:
            start = time.perf_counter()
            importance = pruning.block.weight(site).abs()
            keep = kept_mask(importance, counts[site.name], scope) if cut is None else cut.mask(site, importance)
            pruning.zero(site, keep, seconds=time.perf_counter() - start)

    return prune_blocks(
        "magnitude", model, None, visit, counts=counts, settings={"sparsity": told(sparsity), "scope": scope}, identity={}, found=found,
        notes=notes, run_dir=run_dir, resume=resume, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """Which weights are kept under one budget for all sites: those above a bound and, of those equal to it, the first.

    Attributes:
        bound: the least magnitude that is kept, 0-dimensional.
        equal: how many of the weights equal to the bound are kept, by site.
        counts: how many weights go, by site.
    """

    bound: Tensor
    equal: Mapping[str, int]
    counts: Mapping[str, int]

    def mask(self, site: Site, importance: Tensor) -> Bool[Tensor, "out d"]:
        """The weights of a site that are kept."""
        value = importance.to(self.bound.dtype)
        keep, ties = value > self.bound, value == self.bound
        if self.equal[site.name]:
            keep |= ties & (ties.reshape(-1).cumsum(0).reshape(ties.shape) <= self.equal[site.name])
        return keep


def global_cut(model: nn.Module, sites: Sequence[Site], keep: int) -> Cut:
    """The cut that keeps exactly `keep` weights of all sites together, one site in memory at a time.

    Floating-point numbers that are not negative are ordered as their bit patterns are, so the bound is found digit by digit from counts
    of 16-bit digits: exact, without sorting or joining the weights.
    """
    dtype = sites[0].view(model).dtype
    for site in sites:
        dtype = torch.promote_types(dtype, site.view(model).dtype)
    width = torch.finfo(dtype).bits
    whole = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]

    def patterns() -> Iterator[tuple[Site, Int[Tensor, " weights"]]]:
        for site in sites:
            pattern = site.view(model).to(dtype).abs().reshape(-1).view(whole)
            yield site, pattern.int() if width == 16 else pattern

    if keep == 0:
        bound = torch.tensor(torch.inf, dtype=dtype)
        return Cut(bound, {site.name: 0 for site in sites}, {site.name: site.size for site in sites})
    prefix, left = 0, keep
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for _, pattern in patterns():
            if shift + 16 < width:
                pattern = pattern[pattern >> (shift + 16) == prefix]
            counts += torch.bincount((pattern >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        from_above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, left))
        left -= int(from_above[place] - counts[0xFFFF - place])
        prefix = (prefix << 16) | (0xFFFF - place)
    equal, gone = {}, {}
    for site, pattern in patterns():
        equal[site.name] = min(left, int((pattern == prefix).sum()))
        gone[site.name] = site.size - int((pattern > prefix).sum()) - equal[site.name]
        left -= equal[site.name]
    return Cut(torch.tensor(prefix, dtype=whole).view(dtype), equal, gone)
