"""Layer scores of layer-wise quantization: how much a block changes its input (LIM), and how heavy the tail of its weights is (ZD).

Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan, Surdeanu 2024, "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing
LLMs Beyond Integer Bit-Levels", arXiv 2406.17415. unit layer · score LIM or ZD · allocation bits in rank order · action quantize. No
official code was published; the definitions are the paper's. Its smaller ZD means more important, so the score here is minus ZD.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration, check_fits
from whatmatters.core.errors import InputError, ModelError
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Site, Structure
from whatmatters.core.walk import Batch, Block, walk
from whatmatters.score._common import check_by, data_settings, finite_weight, structure_of

__all__ = ["layer_shift", "weight_outliers"]

CHUNK = 1 << 22
"""Weights widened to float64 at a time."""


def cosine(x: Float[Tensor, "*tokens d"], y: Float[Tensor, "*tokens d"]) -> Float64[Tensor, "*tokens"]:
    """Cosine between two vectors of each token, in float64; 0 where one of them is zero.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        tensor([1., 0.], dtype=torch.float64)
    """
    x, y = x.double(), y.double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    return torch.where(norms > 0, (x * y).sum(-1) / norms.where(norms > 0, 1.0), 0.0)


@scorer("layer-shift", unit="layer", when="ahead", needs_text=True, paper="2406.17415")
def layer_shift(
    model: nn.Module,
    calibration: Calibration,
    *,
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """LIM, layer input modification: minus the mean cosine between what goes into a block and what comes out of it.

    A block that turns its input far matters; one that leaves its direction alone has -1. The output is the block's own, before any norm
    that follows the last block. LIM is ShortGPT's Block Influence minus one.

    Args:
        model: any model whose blocks form a chain; unchanged.
        calibration: texts; the cosine is averaged over all their tokens, padding left out.
        by: "block" for the score of each block, "site" to give every site the score of its block.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each block.

    Returns:
        Scores of unit "layer" from -1 to 1, for the blocks that have sites.

    Raises:
        ModelError: no sites, the blocks do not form a chain, or a block's input and output differ in shape.
        DataError: the data is not this model's.
        NonFiniteError: an activation is NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(-torch.eye(2))
        >>> layer_shift(model, Calibration.from_tensors(torch.tensor([[3.0, 4.0]]))).values["0"].item()
        1.0

    References:
        Dumitru et al., 2024, arXiv 2406.17415; Men et al., "ShortGPT", 2024, arXiv 2403.03853 (Block Influence).
    """
    check_by(by)
    found = structure_of(model, structure)
    check_fits(model, calibration)
    values: dict[str, Tensor] = {}

    def visit(block: Block) -> dict[str, Any]:
        total, tokens = 0.0, 0

        def work(batch: Batch) -> tuple[tuple[float, int], list[Tensor]]:
            output = block.run(batch)
            if output.shape != batch.hidden.shape:
                raise ModelError(
                    f"{block.name} turns {tuple(batch.hidden.shape)} into {tuple(output.shape)}; its shift is defined for equal shapes only"
                )
            cosines = cosine(batch.hidden, output)
            cosines = cosines if batch.valid is None else cosines[batch.valid.to(cosines.device)]
            return (float(cosines.sum()), cosines.numel()), []

        def take(sums: Sequence[Any], _: Iterator[Tensor]) -> None:
            nonlocal total, tokens
            total, tokens = total + sums[0], tokens + sums[1]

        block.each(work, take)
        values[block.name] = torch.tensor(-total / tokens, dtype=torch.float64)
        return {}

    walk(model, calibration, visit, structure=found, settings={}, label="layer shift", commit=False, progress=progress)
    scores = Scores("layer", values, "layer-shift", data_settings(calibration), structure=found)
    return scores.lift(found) if by == "site" else scores


@scorer("weight-outliers", unit="layer", when="ahead", paper="2406.17415")
def weight_outliers(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    z: float | int = 1.0,
    two_sided: bool = False,
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """ZD, z-score distribution: minus the share of a block's weights that lie more than `z` standard deviations above their mean.

    Few weights far above the mean mean a heavy tail, which rounding hurts: such a block matters more.

    Args:
        model: any model with blocks; unchanged.
        calibration: ignored; taken so that every scorer can be called alike.
        z: how many standard deviations count as far, strictly more than that (paper: 1).
        two_sided: count weights far below the mean too (paper: no).
        by: "block" pools all sites of a block into one vector, "site" looks at each by itself.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each block or site.

    Returns:
        Scores of unit "layer" from -1 to 0. Blocks whose weights are all equal have 0 and are named in `settings["constant"]`.

    Raises:
        InputError: z is negative or not finite.
        ModelError: no blocks or no sites.
        NonFiniteError: a weight is NaN or infinite; the message names the site.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 9.0]]))
        >>> weight_outliers(model).values["0"].item()
        -0.25

    References:
        Dumitru et al., 2024, arXiv 2406.17415.
    """
    check_by(by)
    if not 0 <= z < float("inf"):
        raise InputError(f"z is {z}; expected a number of standard deviations, 0 or more")
    found = structure_of(model, structure)
    groups = {site.name: (site,) for site in found.sites} if by == "site" else {block: found.in_block(block) for block in found.blocks}
    groups = {name: sites for name, sites in groups.items() if sites}
    values: dict[str, Tensor] = {}
    constant: list[str] = []
    for name in track(groups, "weight outliers", len(groups), progress):
        share, spread = outlier_share(model, groups[name], z, two_sided)
        values[name] = torch.tensor(0.0 if share == 0 else -share, dtype=torch.float64)
        if spread == 0:
            constant.append(name)
    settings = {"z": z, "two_sided": two_sided, "constant": constant}
    return Scores("layer", values, "weight-outliers", settings, structure=found)


def outlier_share(model: nn.Module, sites: tuple[Site, ...], z: float | int, two_sided: bool) -> tuple[float, float]:
    """ZD of the pooled weights of some sites, and their standard deviation (of the population); ZD is 0 where that is 0."""
    for site in sites:
        finite_weight(model, site)
    low = min(float(site.view(model).min()) for site in sites)
    if all(float(site.view(model).max()) == low for site in sites):
        return 0.0, 0.0
    count = sum(site.size for site in sites)
    mean = sum(float(part.sum()) for part in _parts(model, sites)) / count
    spread = (sum(float((part - mean).square().sum()) for part in _parts(model, sites)) / count) ** 0.5
    far = 0
    for part in _parts(model, sites):
        distance = (part - mean) / spread
        far += int(((distance.abs() if two_sided else distance) > z).sum())
    return far / count, spread


def _parts(model: nn.Module, sites: tuple[Site, ...]) -> Iterator[Float64[Tensor, "rows d"]]:
    """The weights of the sites in float64, some rows at a time."""
    for site in sites:
        weight = site.view(model)
        for part in weight.split(max(1, CHUNK // weight.shape[1])):
            yield part.double()
