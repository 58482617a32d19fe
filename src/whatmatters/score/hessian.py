"""Hessian diagonal: what a layer's output loses, to second order, when one weight is removed.

LeCun, Denker, Solla 1989, "Optimal Brain Damage"; the layer-wise Hessian H = 2 E[x x'] is that of Frantar and Alistarh 2022, arXiv
2208.11580. unit weight or layer · score w_ij^2 H_jj / 2 = w_ij^2 E[x_j^2] · any allocation · any action. Of a single weight this is the
square of the activation score, so both give the same order within a site; their means over a layer differ. Sums over an expert's tokens
are divided by all tokens.
"""

from typing import Literal

from torch import nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure
from whatmatters.score._common import input_square_scores

__all__ = ["hessian_diagonal"]


@scorer("hessian-diagonal", unit="layer", when="ahead", needs_text=True, paper="2208.11580")
def hessian_diagonal(
    model: nn.Module,
    calibration: Calibration,
    *,
    unit: Literal["layer", "weight"] = "layer",
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Mean squared change of a layer's output if one weight became zero: w^2 times the mean square of its input.

    Args:
        model: any model whose blocks form a chain; unchanged.
        calibration: data whose activations are measured; padding does not count.
        unit: "weight" for every weight, "layer" for the mean.
        by: for unit "layer", one score for each "block" or each "site".
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each block.

    Returns:
        Scores, none negative.

    Raises:
        ModelError: no sites, or the blocks do not form a chain.
        DataError: the data is not this model's.
        NonFiniteError: a weight or an activation is NaN or infinite.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -3.0]]))
        >>> data = Calibration.from_tensors(torch.tensor([[2.0, 0.5]]))
        >>> hessian_diagonal(model, data, unit="weight").values["0"]
        tensor([[4.0000, 2.2500]])

    References:
        LeCun et al., "Optimal Brain Damage", 1989; Frantar and Alistarh, "Optimal Brain Compression", 2022, arXiv 2208.11580.
    """
    return input_square_scores(
        model,
        calibration,
        lambda weight, squares: weight.double().square() * squares,
        method="hessian-diagonal",
        unit=unit,
        by=by,
        structure=structure,
        progress=progress,
    )
