"""Magnitude: a large weight matters more than a small one. Needs nothing but the weights.

Janowsky 1989; Han, Pool, Tran, Dally 2015, arXiv 1506.02626. unit weight or layer · score |w| · any allocation · any action.
"""

from typing import Literal

from torch import nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure
from whatmatters.score._common import WeightScores, finite_weight, structure_of

__all__ = ["magnitude"]


@scorer("magnitude", unit="layer", when="ahead", paper="1506.02626")
def magnitude(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    unit: Literal["layer", "weight"] = "layer",
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Absolute values of the weights, or their mean.

    Args:
        model: any model with blocks; unchanged.
        calibration: ignored; taken so that every scorer can be called alike.
        unit: "weight" for |w| of every weight, "layer" for their mean.
        by: for unit "layer", one score for each "block" or each "site".
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each site.

    Returns:
        Scores, none negative.

    Raises:
        ModelError: no blocks or no sites.
        NonFiniteError: a weight is NaN or infinite; the message names the site.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -3.0]]))
        >>> magnitude(model).values["0"].item()
        2.0

    References:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv 1506.02626.
    """
    found = structure_of(model, structure)
    collected = WeightScores(found, unit, by)
    for site in track(found.sites, "magnitude", len(found.sites), progress):
        collected.add(site, finite_weight(model, site).float().abs())
    return collected.scores("magnitude", {})
