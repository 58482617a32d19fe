"""Activation: a weight matters as much as the signal that goes through it, |w| times the norm of its input.

Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695. unit weight or
layer · score |w_ij| sqrt(mean x_j^2) · any allocation · any action. The norm is a root mean square over tokens, so that scores do not grow
with the amount of text; an expert's is taken over all tokens, also those it is not given, so that a rarely used one matters less.
"""

from typing import Literal

from torch import nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure
from whatmatters.score._common import input_square_scores

__all__ = ["activation"]


@scorer("activation", unit="layer", when="ahead", needs_text=True, paper="2306.11695")
def activation(
    model: nn.Module,
    calibration: Calibration,
    *,
    unit: Literal["layer", "weight"] = "layer",
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Wanda's score: absolute weight times the norm of its input over the calibration tokens.

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
        >>> activation(model, data, unit="weight").values["0"]
        tensor([[2.0000, 1.5000]])

    References:
        Sun et al., 2023, arXiv 2306.11695.
    """
    return input_square_scores(
        model,
        calibration,
        lambda weight, squares: weight.float().abs() * squares.sqrt().float(),
        method="activation",
        unit=unit,
        by=by,
        structure=structure,
        progress=progress,
    )
