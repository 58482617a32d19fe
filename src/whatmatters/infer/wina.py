"""WINA: for every token each linear reads only the input channels that matter most, by activation times column norm. No training.

Chen, Zhao, Ko, Banbury, Zhuang, Liang, Cameron, Chen 2025, arXiv 2505.19427. unit channel · score |x_j| times the norm of what it is
multiplied with · allocation top-k per token (or a calibrated threshold), shares by site uniform or by greedy search · action skip. If the
columns of W are orthogonal, dropping channels costs exactly the sum of x_j^2 c_j^2, so that the largest |x_j| c_j are the best choice.

Following the official code: counts are rounded down; the greedy search is TEAL's, on the dense model's inputs and the last quarter of the
positions; `norms="orthogonal_only"` uses norms where that code does (k and gate), while the paper's formula is for all. Departing from it:
positions that stay dense are counted in the sequence and not in the call; a block's error is measured per token, not along the sequence;
the transform rotates the inputs of the matrices in place of the residual stream, at the same d^2 a half block: residual stream,
embeddings, head and hooks stay as they are, norms keep their gains, and any norm will do.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import DataError, InputError, ModelError
from whatmatters.core.evaluate import judging
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.sites import Site, Structure
from whatmatters.core.walk import Block, walk
from whatmatters.infer._common import (
    Gating,
    Positions,
    SparseActivations,
    as_plan,
    column_norms,
    exact_share,
    install,
    kept_channels,
    planned_shares,
    sparsify,
)

__all__ = ["greedy_rows", "wina"]


@method(
    "wina", paper="2505.19427", job="infer", unit="channel", action="skip", score="|x| times column norm",
    allocation="top-k per token, uniform or greedy by site", needs_text=False, form="handle",
)  # fmt: skip
def wina(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    sparsity: int | float | None = None,
    allocation: str | Plan = "uniform",
    mask_by: str = "topk",
    norms: str = "all",
    transform: bool = False,
    dense_prefix: int = 4,
    step: float = 0.025,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    progress: Progress | None = None,
) -> SparseActivations:
    """Skip, for each token, the input channels of every linear that matter least; the handle undoes it.

    Decoding one token at a time reads the kept weights only. Prefill and evaluation, with more tokens at once, are masked dense products:
    the same result, and no speed-up.

    Args:
        model: any model whose blocks have linears (also Conv1D); changed in place until the handle is undone.
        calibration: data for thresholds and for the greedy search; not needed otherwise.
        sparsity: s, the share of the channels that is skipped, from 0 to below 1; None: 0.5, or what the plan says.
        allocation: "uniform": s at each site; "greedy": s over each block, split where it changes the block's output least; or a plan of
            kind "ratio" with a share for each site.
        mask_by: "topk": exactly floor(in (1 - s)) channels are kept for each token, equal scores by position; "threshold": those above
            the s-quantile of the calibration scores.
        norms: "all": c_j at each site, the paper's formula; "orthogonal_only": only where the official code uses them (k and gate, or
            what is fused in their place), c = 1 elsewhere.
        transform: make the columns of k and gate orthogonal by a rotation of their input, which the matrices that share it undo. Costs d^2
            multiplications a half block and token, which are counted, and memory for the weights as they were.
        dense_prefix: positions at the beginning of a sequence that stay dense; they attract the attention of all others.
        step: multiplications that go in one step of the greedy search, as a share of d^2.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: leave experts and other weights dense that are no linear of their own.
        progress: told after each block.

    Returns:
        The handle: `undo()`, `report`, `plan`, `costs()`, `counts()`; leaving a `with` undoes too.

    Raises:
        BudgetError: sparsity out of range.
        InputError: an unknown setting, or a number beside a plan.
        InputTypeError: sparsity is no number, or the plan not of kind "ratio".
        DataError: thresholds or a greedy search without calibration data.
        ModelError: experts that were not allowed, no norm in front of the matrices to transform, or a model that is sparse already.
        NonFiniteError: a weight is NaN, or (as the model runs) an activation.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 9.0]]))
        >>> with torch.no_grad(), wina(model, sparsity=0.75):
        ...     model(torch.tensor([[3.0, 2.0, 2.0, 1.0]])).tolist()
        [[9.0, 9.0]]

    References:
        Chen, Zhao, Ko, Banbury, Zhuang, Liang, Cameron, Chen, "WINA: Weight Informed Neuron Activation for Accelerating Large Language
        Model Inference", 2025, arXiv 2505.19427. The greedy search: Liu et al., "Training-Free Activation Sparsity in Large Language
        Models" (TEAL), 2024, arXiv 2408.14690.
    """
    if norms not in ("all", "orthogonal_only"):
        raise InputError(f"norms is {norms!r:.40}; expected 'all' or 'orthogonal_only'")
    if not 0 < step <= 1:
        raise InputError(f"step is {step!r:.40}; expected above 0 to 1")

    def gating(found: Structure, sites: list[Site]) -> Gating:
        leads = readers_of_norms(model, found, sites) if transform or norms == "orthogonal_only" else {}
        with_norms = None if norms == "all" else set(leads)
        return Gating(
            norms=lambda site, weight: column_norms(weight) if with_norms is None or site.name in with_norms else None,
            rotations=leads if transform else {},
        )

    return sparsify(
        "wina", model, calibration, gating=gating, mask_by=mask_by, dense_prefix=dense_prefix,
        shares=shares_by("wina", model, calibration, sparsity, allocation, step, progress),
        settings={"sparsity": sparsity, "allocation": allocation if isinstance(allocation, str) else "plan", "mask_by": mask_by,
                  "norms": norms, "transform": transform, "dense_prefix": dense_prefix, "step": step},
        found=structure, allow_uncovered=allow_uncovered, progress=progress,
    )  # fmt: skip


# Which matrices read a norm, and which of those that share an input is made orthogonal


def readers_of_norms(model: nn.Module, found: Structure, sites: list[Site]) -> dict[str, tuple[str, ...]]:
    """By name of the matrix whose columns are made orthogonal, all that read the same output of a norm.

    Of three that read it (q, k, v) that is the second, of two (gate, up) the first: the official choice, told by order and not by name.

    Raises:
        ModelError: nothing reads the output of a norm, or the model cannot be run on two tokens to find out.
    """
    if not hasattr(model, "config"):
        raise ModelError(f"{type(model).__name__} is no transformers model; which of its matrices read a norm can only be seen in those")
    made: list[Tensor] = []  # kept, so that no other tensor gets their ids
    reading: set[str] = set()

    def norm(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made.append(output)

    def reader(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: reading.add(name) if any(args[0] is output for output in made) else None

    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = list(module.parameters())
            if own and all(p.dim() == 1 for p in own):
                stack.callback(module.register_forward_hook(norm).remove)
        for site in sites:
            stack.callback(model.get_submodule(site.name).register_forward_pre_hook(reader(site.name)).remove)
        stack.enter_context(judging(model))
        model(torch.ones((1, 2), dtype=torch.long, device=device))
    groups = [tuple(name for name in group if name in reading) for group in found.groups()]
    if not reading:
        raise ModelError(f"no linear of {type(model).__name__} reads the output of a norm, so there is nothing to transform")
    return {group[(len(group) - 1) // 2]: group for group in groups if group}


# How much each site skips

Shares = Callable[[Structure, list[Site], Gating, Positions], tuple[Plan, list[Site]]]


def shares_by(
    slug: str, model: nn.Module, calibration: Calibration | None, sparsity: int | float | None, allocation: str | Plan, step: float,
    progress: Progress | None,
) -> Shares:  # fmt: skip
    """What turns a budget into a share for each site: uniform, greedy, or as a plan says."""
    if isinstance(allocation, Plan):
        if sparsity is not None:
            raise InputError(f"sparsity={sparsity!r} beside a plan, which says it already; give one of the two")
        plan = allocation
        return lambda found, sites, gating, positions: (
            as_plan(slug, planned_shares(plan, sites, found), float(plan.budget.get("sparsity", 0.0)), "plan", found), sites,
        )  # fmt: skip
    share = exact_share(0.5 if sparsity is None else sparsity)
    if allocation == "uniform":
        return lambda found, sites, gating, positions: (
            as_plan(slug, dict.fromkeys((site.name for site in sites), float(share)), float(share), "uniform", found), sites,
        )  # fmt: skip
    if allocation != "greedy":
        raise InputError(f"allocation is {allocation!r:.40}; expected 'uniform', 'greedy', or a plan of kind 'ratio'")
    if calibration is None:
        raise DataError("allocation='greedy' needs calibration data to measure errors; pass some as the second argument")
    data = calibration

    def search(found: Structure, sites: list[Site], gating: Gating, positions: Positions) -> tuple[Plan, list[Site]]:
        chosen: dict[str, float] = {}

        def visit(block: Block) -> dict[str, Any]:
            own = [site for site in sites if site.block == block.name]
            if own:
                chosen.update(greedy_sparsity(block, own, gating, positions, float(share), step)[-1][1])
            return {}

        walk(model, data, visit, structure=found, settings={}, label="greedy search", commit=False, progress=progress)
        return as_plan(slug, chosen, float(share), "greedy", found, step), sites

    return search


def greedy_sparsity(
    block: Block, sites: list[Site], gating: Gating, positions: Positions, target: float, step: float
) -> list[tuple[float, dict[str, float]]]:
    """Rows (share of the block's multiplications skipped, share by site) of the greedy search on one block; the last reaches the target."""
    square = sites[0].shape[1] ** 2
    with contextlib.ExitStack() as undo:
        whole = {site.name: site.shape[1] for site in sites}
        gates = install(undo, block.module, sites, gating, positions, whole, name=block.name, skipping=False)
        batches = list(block.batches())
        dense = [block.run(batch) for batch in batches]

        def error(shares: Mapping[str, float]) -> float:
            for name, gate in gates.items():
                gate.keep = kept_channels(gate.site.shape[1], shares[name])
            total, count = 0.0, 0
            for batch, output in zip(batches, dense, strict=True):
                difference = (block.run(batch) - output).float().norm(dim=-1)
                late = _last_quarter(difference, batch.valid)
                total, count = total + float(late.sum(dtype=torch.float64)), count + late.numel()
            return total / max(count, 1)

        return greedy_rows({site.name: site.size / square for site in sites}, error, target, step)


def _last_quarter(values: Tensor, valid: Tensor | None) -> Tensor:
    """Values of the valid tokens in the last quarter of the positions, where there are positions."""
    if values.dim() < 2:
        return values
    start = math.floor(0.75 * values.shape[1])
    late = values[:, start:]
    return late if valid is None else late[valid[:, start:].to(late.device)]


def greedy_rows(
    costs: Mapping[str, float], error: Callable[[Mapping[str, float]], float], target: float, step: float
) -> list[tuple[float, dict[str, float]]]:
    """TEAL's greedy search: from dense, `step` of the cost goes at a time, each time where the error then is least, until `target` is met.

    Args:
        costs: multiplications by name, in any unit; must not be empty.
        error: of the shares by name.
        target: share of all costs that goes at least, from 0 to below 1.
        step: cost that goes in one step, in the same unit.

    Returns:
        A row for each step, the dense one first: share of the cost that goes, and shares by name. A name at 1 takes no further part, and
        its last step is what was left of it.

    Example:
        >>> rows = greedy_rows({"a": 1.0, "b": 1.0}, lambda shares: shares["a"] + 2 * shares["b"], 0.25, 0.25)
        >>> [(share, names) for share, names in rows]
        [(0.0, {'a': 0.0, 'b': 0.0}), (0.125, {'a': 0.25, 'b': 0.0}), (0.25, {'a': 0.5, 'b': 0.0})]
    """
    shares = dict.fromkeys(costs, 0.0)
    total = sum(costs.values())
    rows = [(0.0, dict(shares))]
    while rows[-1][0] < target - 1e-9:
        tried: list[tuple[float, int, dict[str, float]]] = []
        for name, cost in costs.items():
            if shares[name] < 1:
                candidate = shares | {name: min(1.0, shares[name] + step / cost)}
                tried.append((error(candidate), len(tried), candidate))
        shares = min(tried, key=lambda item: item[:2])[2]
        rows.append((sum(costs[name] * share for name, share in shares.items()) / total, dict(shares)))
    return rows
