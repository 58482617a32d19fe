"""Quantization error: what rounding a site to each bit width costs, the loss table that exact bit allocation minimises.

unit layer · score squared error of round-to-nearest, by level · allocation the optimum of `allocate.bits(how="optimum")` · action
quantize. With calibration data an error counts as much as the input it meets: the mean squared change of the layer's output, inputs taken
as uncorrelated. Without, it is the plain squared error of the weights.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration, check_fits
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores, level_list
from whatmatters.core.sites import Site, Structure
from whatmatters.core.walk import Block, walk
from whatmatters.score._common import check_by, data_settings, finite_weight, input_statistics, structure_of, tokens_of
from whatmatters.score._losses import Rounding

__all__ = ["quantization_error"]


@scorer("quantization-error", unit="layer", when="ahead")
def quantization_error(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    levels: Sequence[int] = (2, 3, 4, 8),
    by: Literal["block", "site"] = "site",
    group_size: int | None = None,
    symmetric: bool = True,
    clip_search: bool = True,
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Predicted loss of rounding each site to each level: sum over its weights of (w - rounded w)^2, times E[x^2] with data.

    Args:
        model: any model with blocks, with data also one whose blocks form a chain; unchanged.
        calibration: data whose activations weight the errors; None for plain squared errors. Padding does not count.
        levels: bit widths, 2 to 8, and 16 or more for a site left as it is, which loses nothing.
        by: one row for each "site", or for each "block" (the sum of its sites).
        group_size: inputs that share a scale; -1: one scale per output channel; None: 128 where that divides a site's inputs, else -1.
            Give what the model will be quantized with.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each site, with data after each block.

    Returns:
        Scores of unit "layer" and scale "loss": a vector for each site or block, by ascending level (`settings["levels"]`).

    Raises:
        InputError: levels, group size out of range.
        ModelError: no sites, or with data the blocks do not form a chain.
        DataError: the data is not this model's.
        NonFiniteError: a weight or an activation is NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[-3.0, 1.25, 2.0, 3.0]]))
        >>> quantization_error(model, levels=(3, 16)).values["0"]
        tensor([0.0625, 0.0000], dtype=torch.float64)

    References:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, arXiv 2004.10568 (the layer-wise error).
    """
    check_by(by)
    ascending = level_list(levels)
    found = structure_of(model, structure)
    rounding = Rounding(group_size, symmetric, clip_search)
    rounding.check(found, ascending)
    settings: dict[str, Any] = {"levels": ascending, **rounding.settings()}
    values: dict[str, Tensor] = {}

    def errors(site: Site, importance: Tensor | None) -> Tensor:
        weight = finite_weight(model, site)
        original = weight.double()
        found = []
        for bits in ascending:
            square = (rounding.round(site, weight, bits).double() - original).square_()
            found.append(float((square if importance is None else square * importance).sum()))
        return torch.tensor(found, dtype=torch.float64)

    def visit(block: Block) -> dict[str, Any]:
        tokens = tokens_of(block)
        by_name = {site.name: site for site in block.sites}
        for statistic in input_statistics(block, block.sites, kind="diagonal"):
            for name in statistic.sites:
                values[name] = errors(by_name[name], (statistic.total / tokens).to(by_name[name].view(model).device))
        return {}

    if calibration is None:
        for site in track(found.sites, "quantization error", len(found.sites), progress):
            values[site.name] = errors(site, None)
    else:
        check_fits(model, calibration)
        settings |= data_settings(calibration)
        walk(model, calibration, visit, structure=found, settings={}, label="quantization error", commit=False, progress=progress)
    ordered = {site.name: values[site.name] for site in found.sites}
    scores = Scores("layer", ordered, "quantization-error", settings, scale="loss", structure=found)
    return scores.reduce("sum", by="block") if by == "block" else scores
