"""Round to nearest: every weight goes to the nearest point of its group's grid. The baseline that needs no data.

unit weight · no score · one bit width, or a plan · action round.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.formats import DENSE_BITS
from whatmatters.core.grids import GridSettings
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.sites import Structure
from whatmatters.quantize._common import Rounding, quantize_blocks

__all__ = ["rtn"]


@method("rtn", job="quantize", unit="layer", action="quantize", allocation="bits by site", kind="baseline", needs_text=False)
def rtn(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    bits: int | Plan | Mapping[str, int] = 4,
    group_size: int = 128,
    symmetric: bool = True,
    clip_search: bool = True,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model's sites in place by rounding to nearest.

    Args:
        model: any model with blocks; changed in place, in one last step.
        calibration: ignored; taken so that every quantizer can be called alike.
        bits: bits per weight, 2 to 8 (16 or more: left as it is), or a plan of bits by site.
        group_size: inputs that share a scale; -1: one scale per output channel.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they stay as they are.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: bits, relative weight error.

    Raises:
        InputError: bits, group size or plan do not fit the model.
        ModelError: uncovered weights that were not allowed.
        NonFiniteError: a weight is NaN; the message names the site.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [row["bits"] for row in rtn(model, bits=3, group_size=4).rows]
        [3, 3]
    """

    def visit(rounding: Rounding) -> None:
        for site in rounding.block.sites:
            if rounding.bits[site.name] < DENSE_BITS:
                grid = rounding.grid(site)
                rounding.set(site, grid, grid.codes_of(rounding.block.weight(site)))

    return quantize_blocks(
        "rtn", model, None, visit, bits=bits, grid=GridSettings(group_size, symmetric, clip_search), settings={}, found=structure,
        allow_uncovered=allow_uncovered, run_dir=run_dir, resume=resume, progress=progress,
    )  # fmt: skip
