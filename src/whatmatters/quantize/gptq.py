"""GPTQ: weights are rounded one column after another, and the columns still to come make up for the error so far.

Frantar, Ashkboos, Hoefler, Alistarh 2023, arXiv 2210.17323. unit weight · score inverse Hessian of the layer's reconstruction loss ·
one bit width, or a plan · action round with feedback. Scales are fixed from the original weights ("static groups"), so act-order keeps
groups contiguous. The Hessian uses inputs from the already quantized blocks before, as the official code does.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.grids import GridSettings
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.sites import Structure
from whatmatters.quantize._common import Rounding, quantize_blocks

__all__ = ["gptq"]


@method(
    "gptq", paper="2210.17323", job="quantize", unit="layer", action="quantize", score="Hessian", allocation="bits by site", kind="baseline"
)
def gptq(
    model: nn.Module,
    calibration: Calibration,
    *,
    bits: int | Plan | Mapping[str, int] = 4,
    group_size: int = 128,
    symmetric: bool = True,
    clip_search: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    true_sequential: bool = True,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model's sites in place with error feedback through the Hessian of each layer's reconstruction loss.

    Args:
        model: any model with blocks; changed in place, in one last step.
        calibration: data whose activations make the Hessians.
        bits: bits per weight, 2 to 8 (16 or more: left as it is), or a plan of bits by site.
        group_size: inputs that share a scale; -1: one scale per output channel.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        act_order: round columns by falling diagonal of the Hessian.
        damping: share of the mean diagonal that is added to the Hessian, > 0.
        true_sequential: collect inputs of each group of sites after the groups before it in the block are rounded.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they stay as they are.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: bits, relative weight error, loss, tokens, seconds.

    Raises:
        InputError: bits, group size, damping or plan do not fit.
        ModelError: uncovered weights that were not allowed, or blocks that do not form a chain.
        NonFiniteError: a weight or an activation is NaN.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = Calibration.from_tensors(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
        >>> [row["tokens"] for row in gptq(model, data, bits=3, group_size=-1).rows]
        [32.0, 32.0]

    References:
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, arXiv 2210.17323.
    """
    if not damping > 0:
        raise InputError(f"damping {damping}; expected a positive share of the Hessian's mean diagonal, such as 0.01")

    def visit(rounding: Rounding) -> None:
        rounding.to_feedback(damping=damping, act_order=act_order, true_sequential=true_sequential)

    return quantize_blocks(
        "gptq", model, calibration, visit, bits=bits, grid=GridSettings(group_size, symmetric, clip_search),
        settings={"act_order": act_order, "damping": damping, "true_sequential": true_sequential}, found=structure,
        allow_uncovered=allow_uncovered, run_dir=run_dir, resume=resume, progress=progress,
    )  # fmt: skip
