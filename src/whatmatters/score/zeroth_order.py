"""Zeroth-order gradient norm: how strongly the loss reacts to a random step in a block's weights, by forward passes alone.

Sung, Yoon, Bansal 2024, "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models", arXiv 2310.02998; the
perturbation that is regenerated from its seed is that of Malladi et al. 2023 (MeZO), arXiv 2305.17333. unit layer · score root mean square
gradient · any allocation · any action. For z drawn from a standard normal, (loss(w + eps z) - loss(w - eps z)) / (2 eps) has mean square
|g|^2: no graph, no activations kept, so it runs where a backward pass does not fit. Each sample draws a z of its own.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import scorer
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.evaluate import judging
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import Seed, derived
from whatmatters.core.sites import Site, Structure
from whatmatters.score._common import base_seed, check_by, data_settings, finite_weight, structure_of
from whatmatters.score._losses import FromBlock, damaged, groups_of

__all__ = ["zeroth_order"]


@scorer("zeroth-order", unit="layer", when="ahead", needs_text=True, paper="2310.02998")
def zeroth_order(
    model: nn.Module,
    calibration: Calibration,
    *,
    by: Literal["block", "site"] = "block",
    eps: float | int = 1e-3,
    draws: int = 1,
    samples: int | None = 8,
    structure: Structure | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Scores:
    """Root mean square gradient of a block's weights, estimated from pairs of forward passes.

    Args:
        model: a causal language model whose blocks form a chain; its weights are put back bit by bit.
        calibration: token windows; padding does not count.
        by: one score for each "block", or for each "site" (tied sites are perturbed together and share theirs).
        eps: size of the step in each weight, above 0.
        draws: perturbations for each sample, at least 1; the estimate's relative spread is about 1 / sqrt(2 * draws * samples).
        samples: use only this many of the calibration windows, from the first on; None for all.
        structure: what `core.sites.structure` found, if at hand.
        seed: decides the perturbations; independent of the order of the blocks.
        progress: told after each block or site.

    Returns:
        Scores of unit "layer": root mean square over samples and weights of the gradient of a sample's mean loss a token. Being a mean
        over weights, it compares units of different size.

    Raises:
        InputError: eps, draws or samples out of range.
        ModelError: no sites, no language model, or the blocks do not form a chain.
        DataError: the data is not this model's, or has nothing to predict.
        NonFiniteError: a weight or a loss is NaN or infinite.

    Example:
        >>> class Bigrams(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(4, 4)
        ...         self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        ...
        ...     def forward(self, ids):
        ...         return self.blocks[0](self.embed(ids))
        >>> zeroth_order(Bigrams(), Calibration.from_tensors(torch.tensor([[0, 1, 2, 3]]))).order()
        ['blocks.0']

    References:
        Sung et al., 2024, arXiv 2310.02998; Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, arXiv 2305.17333.
    """
    check_by(by)
    if not 0 < eps < float("inf"):
        raise InputError(f"eps is {eps}; expected a step above 0, such as 0.001")
    if draws < 1 or (samples is not None and samples < 1):
        raise InputError(f"draws is {draws} and samples {samples}; expected at least 1 of each")
    found = structure_of(model, structure)
    text = _singly(calibration, samples)
    base = base_seed(seed)
    groups = groups_of(found, by)
    values: dict[str, Tensor] = {}
    done = 0
    if progress is not None:
        progress("zeroth order", 0, len(groups))
    with judging(model):
        for site in found.sites:
            finite_weight(model, site)
        rest = FromBlock(model, found.blocks, text)
        for index, block in enumerate(found.blocks):
            if index:
                rest.advance()
            for name, sites in ((name, sites) for name, sites in groups.items() if sites[0].block == block):
                pairs = [(number, derived(base, name, number, draw)) for number in range(len(rest.batches)) for draw in range(draws)]
                slopes = [slope(model, rest, sites, number, eps, drawn) for number, drawn in pairs]
                score = torch.tensor(slopes, dtype=torch.float64).square().mean().div(sum(site.size for site in sites)).sqrt()
                values |= dict.fromkeys([name] if by == "block" else [site.name for site in sites], score)
                done += 1
                if progress is not None:
                    progress("zeroth order", done, len(groups))
    names = list(groups) if by == "block" else [site.name for site in found.sites]
    settings: dict[str, Any] = {
        "eps": eps, "draws": draws, "seed": seed if isinstance(seed, int) else "generator", **data_settings(text),
    }  # fmt: skip
    return Scores("layer", {name: values[name] for name in names}, "zeroth-order", settings, structure=found)


def slope(model: nn.Module, rest: FromBlock, sites: tuple[Site, ...], number: int, eps: float | int, seed: int) -> float:
    """(loss(w + eps z) - loss(w - eps z)) / (2 eps) of one sample, for the z that `seed` draws: an estimate of g . z."""
    losses = []
    for sign in (1.0, -1.0):
        draw = torch.Generator().manual_seed(seed)

        def step(site: Site, weight: Tensor) -> Tensor:
            z = torch.randn(site.shape, generator=draw)
            return weight + (sign * eps * z).to(weight.device, weight.dtype)

        with damaged(model, sites, step):
            nats, counts = rest.nats(number)
        losses.append(float(nats.sum()) / max(1, int(counts.sum())))
    return (losses[0] - losses[1]) / (2 * eps)


def _singly(calibration: Calibration, samples: int | None) -> Calibration:
    """The first samples, in micro-batches of one."""
    valid = None if calibration.valid is None else calibration.valid[:samples]
    return Calibration(calibration.inputs[:samples], valid, calibration.document[:samples], 1, calibration.source)
