"""What pruners share: how many weights go where, choosing them, and the walk that prunes block by block."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from whatmatters.core.actions import check_names_fit, check_sites
from whatmatters.core.allocation import top_k
from whatmatters.core.data import Calibration
from whatmatters.core.errors import BudgetError, InputError, InputTypeError, NonFiniteError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report, measured
from whatmatters.core.sites import Site, Structure, structure
from whatmatters.core.walk import Block, walk
from whatmatters.kernels.feedback import feedback_factor
from whatmatters.kernels.prune_feedback import prune_with_feedback
from whatmatters.score._common import Statistic, input_statistics

Choose = Callable[[Site, Tensor, int], Tensor]
"""From a site, the cost (out, columns) of pruning each of its weights in some columns, and the first of these, to the weights kept."""


def checked(model: nn.Module, found: Structure | None, allow_uncovered: bool) -> tuple[Structure, list[str]]:
    """Blocks and sites of a model whose weights can be pruned, and notes for the report; raises as `check_sites` does."""
    found = structure(model) if found is None else found
    return found, check_sites(model, found, allow_uncovered)


def pattern_of(scope: str) -> tuple[int, int] | None:
    """n and m of "n:m", of m consecutive inputs n are kept; None for another scope.

    Raises:
        InputError: n is not from 1 to m.
    """
    kept, colon, of = scope.partition(":")
    if not colon:
        return None
    if not (kept.isascii() and kept.isdigit() and of.isascii() and of.isdigit() and 0 < int(kept) <= int(of)):
        raise InputError(f"pattern {scope!r:.40}; expected n:m with n from 1 to m, such as '2:4'")
    return int(kept), int(of)


def exact_share(sparsity: int | float | None) -> Fraction:
    """The share a person wrote, read in decimals.

    Raises:
        InputTypeError: it is no number.
        BudgetError: it is not from 0 to 1.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise InputTypeError(f"sparsity is {sparsity!r}; expected a number from 0 to 1, or a plan of kind 'ratio'")
    if not 0 <= sparsity <= 1:
        raise BudgetError(f"sparsity is {sparsity}; the feasible range is 0 to 1: give the share of the weights that goes")
    return Fraction(str(sparsity))


def site_counts(sparsity: int | float | Plan | None, scope: str, found: Structure) -> dict[str, int]:
    """How many weights of every site go. Counts are rounded up, in each row for scope "row", so that no more is kept than was asked for.

    Args:
        sparsity: one share for all sites, or a plan of kind "ratio"; None where n:m says it.
        scope: "row", or "n:m", or any other word for a whole site.
        found: the sites of the model.

    Raises:
        InputTypeError: neither a number nor a plan of kind "ratio".
        BudgetError: a share that is out of range, or is not the one of n:m.
        InputError: a plan for other sites, or inputs that m does not divide; the message names the site.
    """
    if (pattern := pattern_of(scope)) is not None:
        kept, of = pattern
        if isinstance(sparsity, Plan):
            raise InputError(f"a plan of kind {sparsity.kind!r} with {scope}: the pattern says how much goes; give one of the two")
        if sparsity is not None and exact_share(sparsity) != 1 - Fraction(kept, of):
            raise BudgetError(f"sparsity {sparsity} with {scope}; the only feasible one is {1 - kept / of:g}: give that or None")
        for site in found.sites:
            if site.shape[1] % of:
                raise InputError(f"{scope} for {site.name} with {site.shape[1]} inputs; expected a multiple of {of}")
        return {site.name: site.size // of * (of - kept) for site in found.sites}
    row = scope == "row"
    if isinstance(sparsity, Plan):
        if sparsity.kind != "ratio":
            raise InputTypeError(f"a plan of kind {sparsity.kind!r} was given as sparsity; expected kind 'ratio' (masks go to prune.apply)")
        check_names_fit(sparsity.values.keys(), found, "the plan")
        shares = {name: float(value) for name, value in sparsity.values.items()}
        return {
            site.name: _planned(shares[site.name], site.shape[1]) * site.shape[0] if row else _planned(shares[site.name], site.size)
            for site in found.sites
        }
    share = exact_share(sparsity)
    return {site.name: math.ceil(share * site.shape[1]) * site.shape[0] if row else math.ceil(share * site.size) for site in found.sites}


def _planned(share: float, count: int) -> int:
    """share * count rounded up, but not from p / count to p + 1: a plan holds whole counts as floating-point shares."""
    exact = Fraction(str(share)) * count
    nearest = round(exact)
    return nearest if abs(exact - nearest) <= Fraction(count, 2**52) else math.ceil(exact)


def kept_mask(importance: Float[Tensor, "out d"], pruned: int, scope: str) -> Bool[Tensor, "out d"]:
    """The most important weights, where `pruned` go from all rows together: by pattern, from each row alike, or from the whole."""
    rows, columns = importance.shape
    if (pattern := pattern_of(scope)) is not None:
        kept, of = pattern
        return top_k(importance.reshape(rows, columns // of, of), kept).reshape(rows, columns)
    if scope == "row":
        return top_k(importance, columns - pruned // rows)
    return top_k(importance.reshape(-1), importance.numel() - pruned).reshape(rows, columns)


class Pruning:
    """Prunes the sites of one block and keeps the record: what every pruner's visit is given.

    Attributes:
        block: the block being visited.
        counts: how many weights of every site go.
        rows: the record, a mapping for each site.
    """

    def __init__(self, block: Block, counts: Mapping[str, int]) -> None:
        self.block = block
        self.counts = counts
        self.rows: list[dict[str, Any]] = []

    @property
    def sites(self) -> list[Site]:
        """The sites of the block from which anything goes."""
        return [site for site in self.block.sites if self.counts[site.name]]

    def zero(self, site: Site, keep: Bool[Tensor, "out d"], **measures: Any) -> None:
        """Set to zero what is not kept, and add the site's row."""
        self.set(site, self.block.weight(site).masked_fill(~keep, 0.0), keep, **measures)

    def set(self, site: Site, pruned: Float[Tensor, "out d"], keep: Bool[Tensor, "out d"], **measures: Any) -> None:
        """Put new weights in place, and add the site's row."""
        weight = self.block.weight(site)
        before = weight.to(torch.promote_types(weight.dtype, torch.float32))
        change = before - pruned
        total = before.square().sum().clamp(min=torch.finfo(before.dtype).tiny)
        kept = int(keep.sum())
        self.rows.append(
            {
                "site": site.name,
                "sparsity": (site.size - kept) / site.size,
                "kept": kept,
                "weights": site.size,
                "relative_weight_error": float(change.square().sum() / total),
                **measures,
            }
        )
        weight.copy_(pruned)

    def by_feedback(self, choose: Choose, without: Callable[[Site], Tensor], *, group: int, damping: float) -> None:
        """Prune with error feedback through the Hessian of each site's inputs; sites that share their inputs in one pass.

        Args:
            choose: which weights of a group of columns are kept.
            without: the mask of a site that no token reaches, or whose inputs are all zero: nothing is known and nothing corrected.
            group: columns that are chosen together.
            damping: share of the mean diagonal that is added to the Hessian.
        """
        by_name = {site.name: site for site in self.sites}
        for statistic in input_statistics(self.block, self.sites) if self.sites else []:
            start = time.perf_counter()
            sites = [by_name[name] for name in statistic.sites]
            check_inputs(statistic)
            if not statistic.total.diagonal().any():
                for site in sites:
                    self.zero(site, without(site), tokens=statistic.tokens, informed=False, seconds=time.perf_counter() - start)
                continue
            hessian = statistic.total / statistic.tokens
            weights = [self.block.weight(site) for site in sites]
            pieces = prune_together(sites, weights, hessian, choose, group=group, damping=damping)
            errors = [_output_error(weight, new, hessian) for weight, (new, _) in zip(weights, pieces, strict=True)]
            seconds = (time.perf_counter() - start) / len(sites)
            for site, (new, keep), error in zip(sites, pieces, errors, strict=True):
                self.set(site, new, keep, relative_output_error=error, tokens=statistic.tokens, informed=True, seconds=seconds)


def check_inputs(statistic: Statistic) -> None:
    """Raise NonFiniteError, naming a site, if what went into it is not finite."""
    if not torch.isfinite(statistic.total).all():
        raise NonFiniteError(f"the inputs of {statistic.sites[0]} hold NaN or infinity; check the model's dtype and the data")


def prune_together(
    sites: Sequence[Site],
    weights: Sequence[Float[Tensor, "_ d"]],
    hessian: Float64[Tensor, "d d"],
    choose: Choose,
    *,
    group: int,
    damping: float,
) -> list[tuple[Float[Tensor, "_ d"], Bool[Tensor, "_ d"]]]:
    """New weights and masks of sites that share their inputs: one factorization, one pass over the columns for all their rows."""
    sizes = [len(weight) for weight in weights]
    dead = hessian.diagonal() == 0

    def choose_all(cost: Tensor, start: int) -> Tensor:
        # what reads an input that is always zero goes before all else, the smallest first: its cost is the damping's alone
        cost = torch.where(dead[start : start + cost.shape[1]], -1 / cost, cost)
        return torch.cat([choose(site, part, start) for site, part in zip(sites, cost.split(sizes), strict=True)])

    new, keep = prune_with_feedback(torch.cat(list(weights)), feedback_factor(hessian, damping), choose_all, group)
    return list(zip(new.split(sizes), keep.split(sizes), strict=True))


def _output_error(weight: Float[Tensor, "out d"], new: Float[Tensor, "out d"], hessian: Float64[Tensor, "d d"]) -> float:
    """Share of the layer's squared output that is changed: tr(D H D') / tr(W H W')."""
    h = hessian.to(new.dtype)
    before = weight.to(new.dtype)
    change = before - new
    lost, whole = (float(((x @ h) * x).sum(dtype=torch.float64)) for x in (change, before))
    return lost / whole if whole > 0 else 0.0


def prune_blocks(
    slug: str,
    model: nn.Module,
    calibration: Calibration | None,
    visit: Callable[[Pruning], None],
    *,
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    found: Structure,
    notes: Sequence[str],
    run_dir: str | Path | None,
    resume: bool,
    progress: Progress | None,
) -> Report:
    """Walk over the blocks, let `visit` prune each, commit, and report.

    Args:
        slug: the method.
        model: changed in one last step.
        calibration: what goes through the blocks; None for methods that need none.
        visit: prunes the sites of a block.
        counts: how many weights of every site go.
        settings: what the report tells.
        identity: what else determines the result, for the fingerprint of a run that is resumed.
        found: the sites.
        notes: what the report says beside the rows.
        run_dir: folder that makes the run resumable.
        resume: continue the run there.
        progress: told after each block.
    """
    report = Report(slug, "prune", dict(settings), notes=list(notes))

    def visit_block(block: Block) -> dict[str, Any]:
        pruning = Pruning(block, counts)
        visit(pruning)
        rows = {row["site"]: row for row in pruning.rows}
        return {"rows": [rows.get(site.name) or _untouched(site) for site in block.sites]}

    with measured(report):
        result = walk(
            model, calibration, visit_block, structure=found, settings={"method": slug, **settings, **identity, "counts": dict(counts)},
            label=slug, run_dir=run_dir, resume=resume, progress=progress,
        )  # fmt: skip
    report.rows = [row for block in result.rows for row in block["rows"]]
    return report


def _untouched(site: Site) -> dict[str, Any]:
    return {
        "site": site.name,
        "sparsity": 0.0,
        "kept": site.size,
        "weights": site.size,
        "relative_weight_error": 0.0,
        "seconds": 0.0,
    }


def note_uninformed(report: Report, instead: str) -> Report:
    """Add a note for each site whose inputs told nothing; `instead` says what was done there."""
    names = [row["site"] for row in report.rows if row.get("informed") is False]
    report.notes += [f"no calibration token reached it, or only zeros, so it was {instead}: {name}" for name in names]
    return report


def told(sparsity: int | float | Plan | None) -> Any:
    """A sparsity as the report shows it."""
    return {"plan": dict(sparsity.budget)} if isinstance(sparsity, Plan) else sparsity
