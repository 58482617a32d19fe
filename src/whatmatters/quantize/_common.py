"""What quantizers share: rounding with and without feedback, and the walk that quantizes block by block."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int8, Int64
from torch import Tensor, nn

from whatmatters.core.actions import check_names_fit, check_sites
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, InputTypeError
from whatmatters.core.formats import DENSE_BITS, WIDTHS, QuantizedGrid, attach, dequantize
from whatmatters.core.grids import GridSettings, fit_grid
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report, measured
from whatmatters.core.sites import Site, Structure, structure
from whatmatters.core.walk import Block, walk
from whatmatters.kernels.feedback import feedback_factor, round_with_feedback
from whatmatters.score._common import Statistic, input_statistics


@dataclass(frozen=True)
class Rows:
    """Grids of the stacked rows of several sites, as the feedback kernel takes them: scale and zero (groups, out), code range (out)."""

    scale: Float[Tensor, "groups out"]
    zero: Float[Tensor, "groups out"]
    low: Float[Tensor, " out"]
    high: Float[Tensor, " out"]
    group: Int64[Tensor, " d"]


def stacked_rows(grids: Sequence[QuantizedGrid], inputs: int, order: Int64[Tensor, " d"] | None) -> Rows:
    """The grids of sites that share their inputs, rows one under another; columns in `order` if given."""
    groups = max(grid.scale.shape[1] for grid in grids)
    scale, zero, low, high = [], [], [], []
    for grid in grids:
        s = grid.scale.float()
        scale.append(s)
        zero.append(torch.zeros_like(s) if grid.zero_point is None else grid.zero_point.float())
        low.append(torch.full((len(s),), float(grid.code_range[0])))
        high.append(torch.full((len(s),), float(grid.code_range[1])))
    group = torch.arange(inputs) // (inputs // groups)
    device = grids[0].scale.device
    return Rows(
        torch.cat(scale).T.contiguous(), torch.cat(zero).T.contiguous(), torch.cat(low).to(device), torch.cat(high).to(device),
        (group if order is None else group[order.cpu()]).to(device),
    )  # fmt: skip


def round_with_hessian(
    weights: Sequence[Float[Tensor, "_ d"]],
    grids: Sequence[QuantizedGrid],
    hessian: Float64[Tensor, "d d"],
    *,
    damping: float,
    act_order: bool,
) -> tuple[list[Int8[Tensor, "_ d"]], list[float]]:
    """GPTQ for sites that share their inputs: one factorization, one pass over the columns for all their rows.

    Inputs that are always zero (zero on the diagonal of H) get code zero. With `act_order` columns go by falling diagonal of H.

    Returns:
        Codes of each site, and each site's loss tr(D (H + damping) D').
    """
    weight = torch.cat([w.float() for w in weights])
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if dead.any():
        hessian = hessian.clone()
        hessian.diagonal()[dead] = 1.0
        weight = weight.masked_fill(dead[None, :], 0.0)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if order is not None:
        hessian, weight = hessian[order][:, order], weight[:, order]
    rows = stacked_rows(grids, weight.shape[1], order)
    factor = feedback_factor(hessian, damping)
    del hessian
    codes, loss = round_with_feedback(weight, factor, rows.scale, rows.zero, rows.group, rows.low, rows.high)
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    sizes = [len(w) for w in weights]
    return list(codes.split(sizes)), [float(part.sum()) for part in loss.split(sizes)]


def site_bits(bits: int | Plan | Mapping[str, int], found: Structure) -> dict[str, int]:
    """Bits of every site of a model from a number, a plan or a mapping; 16 or more means the site is left as it is.

    Raises:
        InputTypeError: a plan of another kind.
        InputError: bits out of range, or a plan for other sites.
    """
    if isinstance(bits, Plan):
        if bits.kind != "bits":
            raise InputTypeError(f"a {bits.kind!r} plan was given; quantizing takes a plan of kind 'bits' (allocate.bits makes one)")
        given: Mapping[str, Any] = bits.values
    elif isinstance(bits, Mapping):
        given = bits
    else:
        given = {site.name: bits for site in found.sites}
    check_names_fit(given.keys(), found, "the bit plan")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or not (value in WIDTHS or value >= DENSE_BITS):
            raise InputError(f"{name}: {value!r} bits; expected one of {', '.join(map(str, WIDTHS))}, or 16 to leave the site as it is")
    return {site.name: int(given[site.name]) for site in found.sites}


def check_groups(bits: Mapping[str, int], found: Structure, group_size: int) -> None:
    """Raises InputError naming the first site whose inputs the group size does not divide."""
    if group_size != -1 and group_size < 1:
        raise InputError(f"group size {group_size}; expected a positive number of inputs, or -1 for one scale per output channel")
    for site in found.sites:
        if group_size != -1 and bits[site.name] < DENSE_BITS and site.shape[1] % group_size:
            raise InputError(
                f"group size {group_size} does not divide the {site.shape[1]} inputs of {site.name}; "
                f"choose a divisor, or -1 for one scale per output channel"
            )


class Rounding:
    """Rounds the sites of one block on their grids and keeps the record: what every quantizer's visit ends with."""

    def __init__(self, block: Block, groups: Sequence[Sequence[str]], bits: Mapping[str, int], settings: GridSettings) -> None:
        self.block = block
        self.groups = groups
        self.bits = bits
        self.settings = settings
        self.rows: list[dict[str, Any]] = []

    def grid(self, site: Site) -> QuantizedGrid:
        """The grid of a site's weights as they are now."""
        weight = self.block.weight(site)
        return fit_grid(weight, self.bits[site.name], self.settings, weight.dtype)

    def set(self, site: Site, grid: QuantizedGrid, codes: Int8[Tensor, "out d"], **measures: float) -> None:
        """Put the dequantized weights in place and add the site's row."""
        weight = self.block.weight(site)
        rounded = dequantize(grid.with_codes(codes), weight.dtype)
        change = (rounded.float() - weight.float()).square().sum() / weight.float().square().sum().clamp(
            min=torch.finfo(torch.float32).tiny
        )
        weight.copy_(rounded)
        self.block.extras[f"{site.name}.scale"] = grid.scale
        if grid.zero_point is not None:
            self.block.extras[f"{site.name}.zero_point"] = grid.zero_point
        self.rows.append({"site": site.name, "bits": grid.bits, "relative_weight_error": float(change), **measures})

    def feedback(self, sites: Sequence[Site], statistic: Statistic, *, damping: float, act_order: bool) -> None:
        """Round sites that share their inputs with error feedback; without a single calibration token, to the nearest."""
        grids = [self.grid(site) for site in sites]
        weights = [self.block.weight(site) for site in sites]
        start = time.perf_counter()
        if statistic.tokens == 0:
            codes, losses = [g.codes_of(w) for w, g in zip(weights, grids, strict=True)], [0.0] * len(sites)
        else:
            hessian = statistic.total.div_(statistic.tokens)
            codes, losses = round_with_hessian(weights, grids, hessian, damping=damping, act_order=act_order)
        seconds = (time.perf_counter() - start) / len(sites)
        for site, grid, code, loss in zip(sites, grids, codes, losses, strict=True):
            self.set(site, grid, code, loss=loss, tokens=statistic.tokens, seconds=seconds)

    def to_feedback(
        self,
        *,
        damping: float,
        act_order: bool,
        true_sequential: bool,
        weights: Sequence[Tensor] | None = None,
        weighted: Collection[str] | None = None,
    ) -> None:
        """Collect Hessians and round all sites of the block that have fewer than 16 bits.

        Args:
            damping: share of the mean diagonal of H that is added to it.
            act_order: columns by falling diagonal of H.
            true_sequential: collect the inputs of each group of tied sites after the groups before it are rounded; else all at once.
            weights: weights of the tokens, by micro-batch.
            weighted: names of the sites whose statistics they weight; None: all.
        """
        sites = [site for site in self.block.sites if self.bits[site.name] < DENSE_BITS]
        by_name = {site.name: site for site in sites}
        groups = [[by_name[name] for name in group if name in by_name] for group in self.groups]
        for stage in groups if true_sequential else [sites]:
            listening = [site for site in stage if weighted is None or site.name in weighted]
            others = [site for site in stage if site not in listening]
            statistics = input_statistics(self.block, listening, weights=weights) if listening else []
            statistics += input_statistics(self.block, others) if others else []
            for statistic in statistics:
                self.feedback([by_name[n] for n in statistic.sites], statistic, damping=damping, act_order=act_order)


def quantize_blocks(
    slug: str,
    model: nn.Module,
    calibration: Calibration | None,
    visit: Callable[[Rounding], None],
    *,
    bits: int | Plan | Mapping[str, int],
    grid: GridSettings,
    settings: dict[str, Any],
    found: Structure | None,
    allow_uncovered: bool,
    run_dir: str | Path | None,
    resume: bool,
    progress: Progress | None,
    **walk_options: Any,
) -> Report:
    """Walk over the blocks, let `visit` round each, commit, attach the records, and report."""
    found = structure(model) if found is None else found
    levels = site_bits(bits, found)
    check_groups(levels, found, grid.group_size)
    notes = check_sites(model, found, allow_uncovered)
    plan = bits.budget if isinstance(bits, Plan) else {}
    told = {"bits": bits if isinstance(bits, int) else {"plan": dict(plan)}, **vars(grid), **settings}
    report = Report(slug, "quantize", told, notes=notes)
    groups = found.groups()

    def visit_block(block: Block) -> dict[str, Any]:
        rounding = Rounding(block, [g for g in groups if g[0].startswith(f"{block.name}.") or g[0] == block.name], levels, grid)
        visit(rounding)
        return {"rows": rounding.rows}

    with measured(report):
        result = walk(
            model, calibration, visit_block, structure=found, settings={"method": slug, **told, "levels": levels}, label=slug,
            run_dir=run_dir, resume=resume, progress=progress, **walk_options,
        )  # fmt: skip
        report.rows = [row for block in result.rows for row in block["rows"]]
        grids = {
            site.name: QuantizedGrid(
                result.extras[f"{site.name}.scale"], result.extras.get(f"{site.name}.zero_point"), levels[site.name], grid.group_size
            )
            for site in found.sites
            if f"{site.name}.scale" in result.extras
        }
        attach(model, grids)
    unseen = [row["site"] for row in report.rows if row.get("tokens") == 0]
    report.notes += [f"no calibration token reached it, rounded to the nearest: {name}" for name in unseen]
    return report
