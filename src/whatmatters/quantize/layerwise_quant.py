"""Layer-wise quantization: less important layers get fewer bits, so that the average is any number you like, also 3.25.

Dumitru et al. 2024, arXiv 2406.17415. unit layer (a block) · score layer input modification, or the share of weights far above the mean ·
allocation by rank under an average · action quantize, with any quantizer. The official repository holds no code; the rule for three or
more levels is `core.allocation.bits`. Layers are ranked once, on the model as it is.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whatmatters.core import allocation
from whatmatters.core.catalog import door, get_method, get_scorer, method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import DataError, InputError, InputTypeError
from whatmatters.core.formats import DENSE_BITS, WIDTHS, dequantize
from whatmatters.core.grids import GridSettings, fit_grid
from whatmatters.core.progress import Progress
from whatmatters.core.records import thawed
from whatmatters.core.report import Report, measured
from whatmatters.core.scores import Scores, level_list
from whatmatters.core.sites import Structure
from whatmatters.core.sites import structure as find_structure
from whatmatters.quantize._common import check_groups, check_sites

__all__ = ["bits_sweep", "layerwise_quant"]


@method(
    "layerwise-quant", paper="2406.17415", job="quantize", unit="layer", action="quantize", score="layer input modification",
    allocation="bits by rank",
)  # fmt: skip
def layerwise_quant(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    average_bits: int | float | Fraction,
    levels: Sequence[int] = (4, 2),
    layer_scores: str | Scores | Callable[..., Scores] = "layer-shift",
    how: Literal["rank", "optimum"] = "rank",
    count: Literal["stored", "codes"] = "stored",
    backend: str | Callable[..., Report] = "rtn",
    group_size: int = 128,
    symmetric: bool = True,
    backend_settings: Mapping[str, Any] | None = None,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model in place with bits by layer, so that their average is a given number.

    Args:
        model: any model with blocks; changed in place, in one last step.
        calibration: data for the scorer and the quantizer, where they need some.
        average_bits: bits per weight on average over the sites of all blocks, between the lowest and the highest level.
        levels: bit widths to choose from, 2 to 8, or 16 to leave sites as they are.
        layer_scores: name of a scorer that runs ahead ("layer-shift" is the paper's LIM, "weight-outliers" its ZD), Scores made earlier, or
            a function `f(model, calibration) -> Scores`.
        how: "rank": lower the least important layers first (the paper's). "optimum": least sum of predicted losses; needs a loss table.
        count: "stored": everything on disk counts against the average. "codes": codes only, as in the paper.
        backend: name of a quantizer, or a function called as all quantizers are: `f(model, calibration, bits=plan, group_size=...,
            symmetric=..., structure=..., allow_uncovered=..., run_dir=..., resume=..., progress=...)`.
        group_size: inputs that share a scale; -1: one scale per output channel.
        symmetric: codes signed around zero; False: with zero points.
        backend_settings: further settings of the quantizer.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site.
        seed: for scorers that draw.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told by scorer and quantizer.

    Returns:
        The quantizer's report under this method's name; its settings tell the budget and what came of it in both counts.

    Raises:
        BudgetError: the average is outside the feasible range, which the message names.
        InputError: a level that cannot be stored, rank scores with `how="optimum"`, scores that lack a layer.
        InputTypeError: scores of tokens.
        DataError: scorer or quantizer need calibration data and there is none.
        UnknownNameError: no such scorer or quantizer; the message lists the known ones.
        NonFiniteError: a weight is NaN; the message names the site.

    Example:
        >>> import torch
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> scores = Scores("layer", {str(i): torch.tensor(float(i)) for i in range(4)}, "mine", {})
        >>> report = layerwise_quant(model, average_bits=3.5, layer_scores=scores, count="codes", group_size=-1)
        >>> [row["bits"] for row in report.rows]
        [2, 4, 4, 4]

    References:
        Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels", 2024,
        arXiv 2406.17415.
    """
    _check_levels(levels)
    found = find_structure(model) if structure is None else structure
    quantize, needs_text = _backend(backend)
    if needs_text and calibration is None:
        raise DataError(f"the quantizer {backend!r} needs calibration data; give some, or backend='rtn'")
    check_groups(dict.fromkeys((site.name for site in found.sites), min(levels)), found, group_size)
    check_sites(model, found, allow_uncovered)
    report = Report("layerwise-quant", "quantize", {})
    with measured(report):
        scores = layer_importance(layer_scores, model, calibration, found, seed=seed, progress=progress)
        plan = allocation.bits(
            scores, average_bits, levels, how=how, count=count, structure=found, group_size=group_size, symmetric=symmetric
        )
        inner = quantize(
            model, calibration, bits=plan, group_size=group_size, symmetric=symmetric, structure=found, allow_uncovered=allow_uncovered,
            run_dir=run_dir, resume=resume, progress=progress, **(backend_settings or {}),
        )  # fmt: skip
    report.rows = inner.rows
    report.notes = inner.notes
    report.settings = {
        "average_bits": float(average_bits),
        "levels": list(levels),
        "layer_scores": scores.method,
        "how": how,
        "count": count,
        "seed": seed,
        "backend": inner.method,
        "backend_settings": inner.settings,
        "account": thawed(plan.account),
    }
    return report


def layer_importance(
    spec: str | Scores | Callable[..., Scores],
    model: nn.Module,
    calibration: Calibration | None,
    structure: Structure,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Layer scores from a scorer's name, a function or Scores; scores of weights or channels become their mean by site."""
    if isinstance(spec, str):
        entry = get_scorer(spec, when="ahead")
        if entry.needs_text and calibration is None:
            raise DataError(f"the scorer {entry.slug!r} needs calibration data; give some, or use 'weight-outliers'")
        offered = {"unit": "layer", "structure": structure, "seed": seed, "progress": progress}
        accepted = inspect.signature(entry.function).parameters
        scores = entry.function(model, calibration, **{key: value for key, value in offered.items() if key in accepted})
    else:
        scores = spec if isinstance(spec, Scores) else spec(model, calibration)
    if not isinstance(scores, Scores) or scores.unit not in ("layer", "weight", "channel"):
        told = f"unit {scores.unit!r}" if isinstance(scores, Scores) else type(scores).__name__
        raise InputTypeError(f"the layer scores are of {told}; expected Scores of unit 'layer', 'weight' or 'channel'")
    return scores if scores.unit == "layer" else scores.reduce("mean")


def _check_levels(levels: Iterable[int]) -> None:
    for level in level_list(levels):
        if level not in WIDTHS and not level >= DENSE_BITS:
            raise InputError(f"level {level}: quantizers take {', '.join(map(str, WIDTHS))} bits, or 16 to leave a site as it is")


def _backend(backend: str | Callable[..., Report]) -> tuple[Callable[..., Report], bool]:
    if not isinstance(backend, str):
        return backend, False
    entry = get_method(backend, job="quantize")
    if entry.slug == "layerwise-quant":
        raise InputError(f"backend {backend!r} is this method itself; expected a quantizer such as 'rtn', 'gptq' or 'rsq'")
    return entry.function, entry.needs_text


@door("quantize.bits_sweep")
def bits_sweep(
    model: nn.Module,
    orders: Mapping[str, Sequence[str]],
    measure: Callable[[nn.Module], float],
    *,
    levels: tuple[int, int] = (4, 2),
    counts: Sequence[int] | None = None,
    group_size: int = 64,
    symmetric: bool = False,
    clip_search: bool = True,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
) -> list[dict[str, Any]]:
    """Lower one layer after another from the higher level to the lower, in several orders, and measure after each: rounding to nearest.

    What a set of lowered layers gives is measured once, whichever orders reach it. Holds the weights of all sites at both levels. The model
    is given back as it was, also after a raise.

    Args:
        model: any model with blocks.
        orders: for each name the blocks in the order in which they are lowered, least important first; they may leave blocks out.
        measure: given the quantized model; its loss, say.
        levels: bits of the layers that stay, and of those that are lowered; 16: as they are.
        counts: how many layers are lowered where it is measured; None: 0, 1, ... up to all of an order.
        group_size: inputs that share a scale; -1: one scale per output channel.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least error.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site.

    Returns:
        A row for each order and count: "order", "lowered" (how many), "average_bits" (codes only), "value".

    Raises:
        InputError: an order names what is no block, or a block twice; levels that cannot be stored.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> rows = bits_sweep(model, {"forward": ["0", "1"]}, lambda m: 0.0, group_size=-1)
        >>> [row["average_bits"] for row in rows]
        [4.0, 3.0, 2.0]
    """
    _check_levels(levels)
    found = find_structure(model) if structure is None else structure
    check_groups(dict.fromkeys((site.name for site in found.sites), min(levels)), found, group_size)
    check_sites(model, found, allow_uncovered)
    for name, order in orders.items():
        wrong = [block for i, block in enumerate(order) if block not in found.blocks or block in order[:i]]
        if wrong:
            raise InputError(
                f"order {name!r} names {wrong[0]!r}, which is no block of the model or named twice; blocks are {found.blocks[:3]}, ..."
            )
    settings = GridSettings(group_size, symmetric, clip_search)
    before = {site.name: site.view(model).clone() for site in found.sites}

    def rounded(bits: int) -> dict[str, Tensor]:
        return {name: weight if bits >= DENSE_BITS else _rounded(weight, bits, settings) for name, weight in before.items()}

    high, low = rounded(levels[0]), rounded(levels[1])
    total = sum(site.size for site in found.sites)
    known: dict[frozenset[str], float] = {}
    rows: list[dict[str, Any]] = []
    try:
        for name, order in orders.items():
            for lowered in range(len(order) + 1) if counts is None else counts:
                chosen = frozenset(order[:lowered])
                if chosen not in known:
                    _put(model, found, {s.name: (low if s.block in chosen else high)[s.name] for s in found.sites})
                    known[chosen] = float(measure(model))
                size = sum(site.size for site in found.sites if site.block in chosen)
                average = (levels[0] * (total - size) + levels[1] * size) / total
                rows.append({"order": name, "lowered": lowered, "average_bits": average, "value": known[chosen]})
    finally:
        _put(model, found, before)
    return rows


def _rounded(weight: Tensor, bits: int, settings: GridSettings) -> Tensor:
    grid = fit_grid(weight, bits, settings, weight.dtype)
    return dequantize(grid.with_codes(grid.codes_of(weight)), weight.dtype)


def _put(model: nn.Module, found: Structure, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for site in found.sites:
            site.view(model).copy_(weights[site.name])
