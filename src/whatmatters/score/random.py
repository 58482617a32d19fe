"""Random: scores that know nothing. What a score is worth is what it gains over this one, under the same budget.

unit weight or layer · score drawn uniformly · any allocation · any action. The control of every comparison here.
"""

from typing import Literal

import torch
from torch import nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import Seed, generator
from whatmatters.core.sites import Structure
from whatmatters.score._common import WeightScores, check_by, structure_of

__all__ = ["random"]


@scorer("random", unit="layer", when="ahead", control=True)
def random(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    unit: Literal["layer", "weight"] = "layer",
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Scores:
    """Scores drawn uniformly between 0 and 1.

    Args:
        model: any model with blocks; unchanged, and its weights are not looked at.
        calibration: ignored; taken so that every scorer can be called alike.
        unit: "weight" for one draw a weight, "layer" for one a block or site.
        by: for unit "layer", one score for each "block" or each "site".
        structure: what `core.sites.structure` found, if at hand.
        seed: decides the draws, which are made in the order of the sites.
        progress: told after each block or site.

    Returns:
        Scores from 0 to 1.

    Raises:
        ModelError: no blocks or no sites.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> random(model, seed=1).order() == random(model, seed=1).order()
        True

    References:
        None: this is a control.
    """
    found = structure_of(model, structure)
    draw = generator(seed)
    settings = {"seed": seed if isinstance(seed, int) else "generator"}
    if unit == "layer":
        check_by(by)
        names = [site.name for site in found.sites] if by == "site" else [block for block in found.blocks if found.in_block(block)]
        values = {name: _uniform((), draw) for name in track(names, "random", len(names), progress)}
        return Scores("layer", values, "random", settings, structure=found)
    collected = WeightScores(found, unit, by)
    for site in track(found.sites, "random", len(found.sites), progress):
        collected.add(site, _uniform(site.shape, draw))
    return collected.scores("random", settings)


def _uniform(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=draw, device=draw.device)
