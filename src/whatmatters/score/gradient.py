"""Gradients: what the loss loses, to first order or by the Fisher information, when a weight is removed.

First order: Molchanov, Tyree, Karras, Aila, Kautz 2017, arXiv 1611.06440, |w g|. Fisher: Theis, Korshunova, Tejani, Huszar 2018, arXiv
1801.05787, w^2 F / 2 with the diagonal F of the empirical Fisher information: gradients are squared sample by sample and averaged then;
the square of the mean gradient would vanish at a minimum. unit weight or layer · any allocation · any action.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration, logits
from whatmatters.core.errors import NonFiniteError
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Site, Structure
from whatmatters.score._common import WeightScores, data_settings, finite_weight, structure_of
from whatmatters.score._losses import check_language, gradients, sequence_nats

__all__ = ["fisher", "gradient"]


@scorer("gradient", unit="layer", when="ahead", needs_text=True, needs_gradients=True, paper="1611.06440")
def gradient(
    model: nn.Module,
    calibration: Calibration,
    *,
    unit: Literal["layer", "weight"] = "layer",
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """First-order Taylor score |w g|, with g the gradient of the mean loss a token over the calibration text.

    Args:
        model: a causal language model; unchanged, `.grad` and `requires_grad` of its parameters included.
        calibration: token windows; padding does not count.
        unit: "weight" for every weight, "layer" for the mean.
        by: for unit "layer", one score for each "block" or each "site".
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each micro-batch.

    Returns:
        Scores, none negative; estimates of |loss without the weight - loss| in nats a token.

    Raises:
        ModelError: no sites, or no language model.
        DataError: the data is not this model's, or has nothing to predict.
        NonFiniteError: a weight or a gradient is NaN or infinite; the message names the site.

    Example:
        >>> class Bigrams(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(4, 4)
        ...         self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        ...
        ...     def forward(self, ids):
        ...         return self.blocks[0](self.embed(ids))
        >>> gradient(Bigrams(), Calibration.from_tensors(torch.tensor([[0, 1, 2, 3]])), unit="weight").values["blocks.0"].shape
        torch.Size([4, 4])

    References:
        Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017, arXiv 1611.06440.
    """
    found = structure_of(model, structure)
    collected = WeightScores(found, unit, by)
    check_language(model, calibration)
    for site in found.sites:
        finite_weight(model, site)
    names = list(dict.fromkeys(site.parameter for site in found.sites))
    sums: dict[str, Tensor] = {}
    tokens = 0
    batches = list(calibration.batches())
    with gradients(model, names) as gradients_of:
        for inputs, valid in track(batches, "gradient", len(batches), progress):
            nats, counts = sequence_nats(logits(model, inputs, valid), inputs, valid)
            tokens += int(counts.sum())
            for name, g in zip(names, gradients_of(nats.sum()), strict=True):
                sums[name] = sums[name].add_(g) if name in sums else g.to(_wide(g), copy=True)
    for site in found.sites:
        g = _checked(site, _slice(site, sums[site.parameter]) / tokens)
        collected.add(site, (finite_weight(model, site).to(g.dtype) * g).abs())
    return collected.scores("gradient", data_settings(calibration))


@scorer("fisher", unit="layer", when="ahead", needs_text=True, needs_gradients=True, paper="1801.05787")
def fisher(
    model: nn.Module,
    calibration: Calibration,
    *,
    unit: Literal["layer", "weight"] = "layer",
    by: Literal["block", "site"] = "block",
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Diagonal Fisher score w^2 F / 2, with F the mean over samples of the squared gradient of each sample's mean loss a token.

    One backward pass for each sample: samples without anything to predict are left out.

    Args:
        model: a causal language model; unchanged, `.grad` and `requires_grad` of its parameters included.
        calibration: token windows; padding does not count.
        unit: "weight" for every weight, "layer" for the mean.
        by: for unit "layer", one score for each "block" or each "site".
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each sample.

    Returns:
        Scores, none negative.

    Raises:
        ModelError: no sites, or no language model.
        DataError: the data is not this model's, or has nothing to predict.
        NonFiniteError: a weight or a gradient is NaN or infinite; the message names the site.

    Example:
        >>> class Bigrams(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(4, 4)
        ...         self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        ...
        ...     def forward(self, ids):
        ...         return self.blocks[0](self.embed(ids))
        >>> fisher(Bigrams(), Calibration.from_tensors(torch.tensor([[0, 1, 2, 3]])), unit="weight").values["blocks.0"].shape
        torch.Size([4, 4])

    References:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv 1801.05787.
    """
    found = structure_of(model, structure)
    collected = WeightScores(found, unit, by)
    check_language(model, calibration)
    for site in found.sites:
        finite_weight(model, site)
    names = list(dict.fromkeys(site.parameter for site in found.sites))
    sums: dict[str, Tensor] = {}
    samples = 0
    with gradients(model, names) as gradients_of:
        for row in track(range(len(calibration)), "fisher", len(calibration), progress):
            inputs = calibration.inputs[row : row + 1]
            valid = None if calibration.valid is None else calibration.valid[row : row + 1]
            nats, counts = sequence_nats(logits(model, inputs, valid), inputs, valid)
            if int(counts) == 0:
                continue
            samples += 1
            for name, g in zip(names, gradients_of(nats.sum() / counts.sum()), strict=True):
                square = g.to(_wide(g), copy=True).square_()
                sums[name] = sums[name].add_(square) if name in sums else square
    for site in found.sites:
        f = _checked(site, _slice(site, sums[site.parameter]) / samples)
        collected.add(site, finite_weight(model, site).to(f.dtype).square() * f / 2)
    return collected.scores("fisher", data_settings(calibration))


def _wide(g: Tensor) -> torch.dtype:
    """float32 for gradients in less: a sum over many samples would stall in bfloat16."""
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def _slice(site: Site, value: Tensor) -> Tensor:
    """The part of a parameter's tensor that belongs to a site, seen as (out, in)."""
    part = value if site.index is None else value[site.index]
    return part.T if site.transposed else part


def _checked(site: Site, value: Tensor) -> Tensor:
    if not torch.isfinite(value).all():
        raise NonFiniteError(f"the gradient of {site.name} is NaN or infinite; check the model's dtype and the text")
    return value
