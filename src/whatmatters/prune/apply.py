"""Apply a plan: any scorer's masks or ratios become zeros in the model, with the weights that stay repaired if asked.

unit weight · any score · the plan's allocation · action zero, or zero with SparseGPT's error feedback.
"""

import hashlib
import time
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from whatmatters.core.actions import check_names_fit
from whatmatters.core.catalog import door
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, InputTypeError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.sites import Site, Structure
from whatmatters.prune._common import Pruning, checked, note_uninformed, prune_blocks
from whatmatters.prune.magnitude import magnitude
from whatmatters.prune.sparsegpt import sparsegpt

__all__ = ["apply"]

GROUP = 128
"""Columns the feedback goes through at a time; the mask is given, so it changes nothing but rounding."""


@door("prune.apply")
def apply(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    repair: Literal["none", "sparsegpt"] = "none",
    damping: float = 0.01,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a model in place as a plan says.

    Args:
        model: any model with blocks; changed in place, in one last step.
        plan: of kind "mask" (`allocate.masks`, from the scores of any weight scorer), or of kind "ratio" (`allocate.ratios`, from any layer
            scorer): then the weights of each site are chosen by magnitude, or by SparseGPT if that repairs.
        calibration: data for the repair.
        repair: "none", or "sparsegpt": the weights that stay make up for those that go.
        damping: share of the mean diagonal that is added to the Hessian, > 0; for the repair.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they stay as they are.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: sparsity, weights kept, relative weight error, seconds; with the repair also relative output
        error, tokens and whether they told anything (else the site was not repaired).

    Raises:
        InputTypeError: a plan of another kind.
        InputError: a plan for other sites or shapes, a repair without data, damping that is not positive.
        ModelError: uncovered weights that were not allowed, or blocks that do not form a chain.
        NonFiniteError: a weight or an activation is NaN.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> plan = Plan("mask", {"0": torch.tensor([[True, False]])}, {}, {}, "mine")
        >>> apply(model, plan).rows[0]["kept"]
        1
    """
    if plan.kind not in ("mask", "ratio"):
        raise InputTypeError(f"a plan of kind {plan.kind!r}; pruning takes 'mask' (allocate.masks) or 'ratio' (allocate.ratios)")
    if repair != "none" and calibration is None:
        raise InputError(f"repair {repair!r} without calibration data; pass some, or repair='none'")
    common: dict[str, Any] = {"allow_uncovered": allow_uncovered, "run_dir": run_dir, "resume": resume, "progress": progress}
    if plan.kind == "ratio":
        if calibration is None or repair == "none":
            return magnitude(model, sparsity=plan, structure=structure, **common)
        return sparsegpt(model, calibration, sparsity=plan, damping=damping, structure=structure, **common)
    if not damping > 0:
        raise InputError(f"damping {damping}; expected a positive share of the Hessian's mean diagonal, such as 0.01")
    found, notes = checked(model, structure, allow_uncovered)
    masks = site_masks(plan, found)

    def visit(pruning: Pruning) -> None:
        if repair == "sparsegpt":
            pruning.by_feedback(
                lambda site, cost, start: on(masks[site.name], cost)[:, start : start + cost.shape[1]],
                lambda site: on(masks[site.name], pruning.block.weight(site)),
                group=GROUP,
                damping=damping,
            )
            return
        for site in pruning.sites:
            start = time.perf_counter()
            keep = on(masks[site.name], pruning.block.weight(site))
            pruning.zero(site, keep, seconds=time.perf_counter() - start)

    settings = {"plan": dict(plan.budget), "scores": plan.method, "repair": repair, "damping": damping}
    report = prune_blocks(
        "apply", model, calibration if repair != "none" else None, visit,
        counts={name: int(mask.numel() - mask.sum()) for name, mask in masks.items()}, settings=settings,
        identity={"masks": digest_of(masks)}, found=found, notes=notes, run_dir=run_dir, resume=resume, progress=progress,
    )  # fmt: skip
    return note_uninformed(report, "pruned without repair")


def on(mask: Tensor, like: Tensor) -> Tensor:
    """The mask on the device of another tensor."""
    return mask.to(like.device)


def site_masks(plan: Plan, found: Structure) -> dict[str, Tensor]:
    """The masks of a plan, checked against the sites of the model; raises InputError."""
    check_names_fit(plan.values.keys(), found, "the mask plan")
    masks: dict[str, Tensor] = {}
    site: Site
    for site in found.sites:
        mask = plan.values[site.name]
        if not isinstance(mask, Tensor) or tuple(mask.shape) != site.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"the mask of {site.name} has shape {shape}; the site has {site.shape}")
        masks[site.name] = mask
    return masks


def digest_of(masks: dict[str, Tensor]) -> str:
    """SHA-256 over names and masks, for the fingerprint of a run."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.numpy().tobytes())
    return digest.hexdigest()
