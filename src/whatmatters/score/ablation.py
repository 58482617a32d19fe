"""Ablation: damage one block or one group of tied sites, and measure what the model loses. The slow truth that scores are judged by.

Leave one out. unit layer · score measured increase of the loss · any allocation · any action. Only the part of the model from the damaged
block on is run again, so it costs about half a forward pass over the text for each unit.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from whatmatters.core.catalog import door, scorer
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.evaluate import judging
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure
from whatmatters.score._common import check_by, data_settings, finite_weight, structure_of
from whatmatters.score._losses import Documents, FromBlock, Rounding, damaged, groups_of, skipped

__all__ = ["Ablation", "ablate", "ablation"]


@dataclass(frozen=True, eq=False)
class Ablation:
    """Measured damage, kept document by document so that its uncertainty can be told.

    Attributes:
        scores: unit "layer", method "ablation": increase of the loss in nats a token, of each block or site.
        units: names of the units that were damaged: blocks, or the first site of each tied group.
        members: names of the sites of each unit.
        sizes: number of weights of each unit.
        base: nats of the intact model, summed over each document.
        nats: the same with each unit damaged.
        counts: judged tokens of each document.
        unit: what was summed over: "document", or "window" where the text is a single document.
    """

    scores: Scores
    units: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    base: Float64[np.ndarray, " documents"]
    nats: Float64[np.ndarray, "units documents"]
    counts: Int64[np.ndarray, " documents"]
    unit: str

    @property
    def damage(self) -> Float64[np.ndarray, " units"]:
        """Increase of the loss in nats a token, of each unit."""
        return (self.nats - self.base).sum(1) / self.counts.sum()

    @property
    def loss(self) -> float:
        """Loss of the intact model, nats a token."""
        return float(self.base.sum() / self.counts.sum())


@door("score.ablate")
def ablate(
    model: nn.Module,
    text: Calibration,
    *,
    by: Literal["block", "site"] = "block",
    damage: Literal["quantize", "skip"] = "quantize",
    bits: int = 2,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_search: bool = True,
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """Damage each block, or each group of tied sites, alone, and measure the increase of the loss on a text.

    Args:
        model: a causal language model whose blocks form a chain; its weights are put back bit by bit.
        text: token windows to measure on (`data.windows`), best not the ones that scores are made from.
        by: "block", or "site": tied sites, which a plan gives equal bits, are damaged together.
        damage: "quantize" rounds the weights to the nearest at `bits`; "skip" leaves a block out, its output being its input.
        bits: width that damaged weights are rounded to, 2 to 8.
        group_size: inputs that share a scale; -1: one scale per output channel; None: 128 where that divides a site's inputs, else -1.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each unit.

    Returns:
        `Ablation`, with the losses of each document.

    Raises:
        InputError: a setting out of range, or `damage="skip"` by site.
        ModelError: no sites, no language model, the blocks do not form a chain, or a skipped block changes the shape of its input.
        DataError: the text is not this model's, or has nothing to predict.
        NonFiniteError: a weight or a loss is NaN or infinite.

    Example:
        >>> class Bigrams(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(4, 4)
        ...         self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        ...
        ...     def forward(self, ids):
        ...         return self.blocks[1](self.blocks[0](self.embed(ids)))
        >>> ablate(Bigrams(), Calibration.from_tensors(torch.tensor([[0, 1, 2, 3]]))).units
        ('blocks.0', 'blocks.1')

    References:
        The leave-one-out oracle of Dumitru et al., 2024, arXiv 2406.17415, and of many before.
    """
    check_by(by)
    if damage not in ("quantize", "skip"):
        raise InputError(f"damage is {damage!r}; expected 'quantize' or 'skip'")
    if damage == "skip" and by == "site":
        raise InputError("a site cannot be skipped, only a whole block; use by='block' or damage='quantize'")
    found = structure_of(model, structure)
    rounding = Rounding(group_size, symmetric, clip_search)
    rounding.check(found, [bits])
    groups = groups_of(found, by)
    documents = Documents.of(text)
    nats: dict[str, Tensor] = {}
    if progress is not None:
        progress("ablation", 0, len(groups))
    with judging(model):
        rest = FromBlock(model, found.blocks, text)
        for site in found.sites:
            finite_weight(model, site)
        base = rest.all_nats()
        for index, block in enumerate(found.blocks):
            if index:
                rest.advance()
            for name, sites in ((name, sites) for name, sites in groups.items() if sites[0].block == block):
                with skipped(model, block) if damage == "skip" else damaged(model, sites, lambda s, w: rounding.round(s, w, bits)):
                    nats[name] = rest.all_nats()
                if progress is not None:
                    progress("ablation", len(nats), len(groups))
    per_document = np.stack([documents.sums(nats[name]) for name in groups])
    summed = documents.sums(base)
    increase = dict(zip(groups, (per_document - summed).sum(1) / documents.counts.sum(), strict=True))
    if by == "site":
        increase = {site.name: increase[name] for name, sites in groups.items() for site in sites}
        increase = {site.name: increase[site.name] for site in found.sites}
    settings: dict[str, Any] = {"by": by, "damage": damage, **data_settings(text)}
    if damage == "quantize":
        settings |= {"bits": bits, **rounding.settings()}
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in increase.items()}
    return Ablation(
        Scores("layer", values, "ablation", settings, structure=found),
        tuple(groups),
        tuple(tuple(site.name for site in sites) for sites in groups.values()),
        tuple(sum(site.size for site in sites) for sites in groups.values()),
        summed,
        per_document,
        documents.counts,
        documents.unit,
    )


@scorer("ablation", unit="layer", when="ahead", needs_text=True)
def ablation(
    model: nn.Module,
    calibration: Calibration,
    *,
    by: Literal["block", "site"] = "block",
    damage: Literal["quantize", "skip"] = "quantize",
    bits: int = 2,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_search: bool = True,
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Measured increase of the loss, in nats a token, when each block or group of tied sites is damaged alone.

    Args:
        model: a causal language model whose blocks form a chain; its weights are put back bit by bit.
        calibration: token windows to measure on.
        by: "block", or "site": tied sites are damaged together, and each has the damage of its group.
        damage: "quantize" rounds the weights to the nearest at `bits`; "skip" leaves a block out.
        bits: width that damaged weights are rounded to, 2 to 8.
        group_size: inputs that share a scale; -1: one scale per output channel; None: 128 where that divides a site's inputs, else -1.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each unit.

    Returns:
        Scores of unit "layer"; negative where the damage helped. `ablate` gives the losses of each document too.

    Raises:
        InputError: a setting out of range, or `damage="skip"` by site.
        ModelError: no sites, no language model, the blocks do not form a chain, or a skipped block changes the shape of its input.
        DataError: the data is not this model's, or has nothing to predict.
        NonFiniteError: a weight or a loss is NaN or infinite.

    Example:
        >>> class Bigrams(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(4, 4)
        ...         self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        ...
        ...     def forward(self, ids):
        ...         return self.blocks[1](self.blocks[0](self.embed(ids)))
        >>> sorted(ablation(Bigrams(), Calibration.from_tensors(torch.tensor([[0, 1, 2, 3]])), damage="skip").values)
        ['blocks.0', 'blocks.1']

    References:
        The leave-one-out oracle of Dumitru et al., 2024, arXiv 2406.17415, and of many before.
    """
    return ablate(
        model, calibration, by=by, damage=damage, bits=bits, group_size=group_size, symmetric=symmetric, clip_search=clip_search,
        structure=structure, progress=progress,
    ).scores  # fmt: skip
