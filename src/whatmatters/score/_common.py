"""What scorers share: statistics of what goes into each site of a block, and scores of weights collected site by site."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from whatmatters.core.capture import site_inputs
from whatmatters.core.data import Calibration, check_fits
from whatmatters.core.errors import InputError, ModelError, NonFiniteError
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import Seed
from whatmatters.core.sites import Site, Structure, structure, version_of
from whatmatters.core.walk import Batch, Block, give_memory_back, walk
from whatmatters.kernels.gram import add_tiles, gram_tiles, mirror

__all__ = ["Statistic", "input_statistics"]


class _Enough(Exception):
    """Ends a forward pass early."""


@dataclass
class Statistic:
    """Sum over tokens of w_t x_t x_t' for one input tensor, which several sites may read.

    Attributes:
        total: (in, in), or its diagonal (in,).
        tokens: sum of the weights; the number of tokens when there are none.
        sites: names of the sites that read this input.
    """

    total: Float64[Tensor, "d d"] | Float64[Tensor, " d"]
    tokens: float
    sites: list[str]


def input_statistics(
    block: Block, sites: Sequence[Site], *, kind: Literal["gram", "diagonal"] = "gram", weights: Sequence[Tensor] | None = None
) -> list[Statistic]:
    """Run all micro-batches through a block and sum up what its sites are given.

    Sites that read the same tensor share one statistic, so q, k and v cost one product. A micro-batch is left as soon as every wanted
    site has been given its input. Padding counts nothing. An expert that is never chosen has a statistic of zeros and no tokens.

    Args:
        block: the block being visited, in whatever state its weights are.
        sites: the sites of interest.
        kind: "gram" for sum w x x', "diagonal" for sum w x^2.
        weights: for each micro-batch the weights of its tokens, (samples, length), non-negative; None: all one. Where ranks share the
            work, those of `block.own_batches()` will do.

    Returns:
        One statistic for each distinct input, in the order of `sites`.

    Raises:
        ModelError: an expert is given tokens that cannot be followed back to their positions, and weights or padding need them to be.
    """
    give_memory_back()  # of the solve before, so that peaks do not add up
    found: dict[str, Statistic] = {}
    alias: dict[str, str] = {}
    wanted = {site.name for site in sites}
    plain = all(site.index is None for site in sites)
    by_name = {site.name: site for site in sites}

    def pieces_of(x: Tensor, w: Tensor | None) -> Iterable[Tensor]:
        if kind == "gram":
            return gram_tiles(x, w)
        squares = x.double().square()
        return [squares.sum(0) if w is None else (squares * w.double()[:, None]).sum(0)]

    def add(name: str, tokens: float, pieces: Iterable[Tensor]) -> None:
        statistic = found.setdefault(name, empty(name, block.weight(by_name[name]).device))
        if kind == "gram":
            add_tiles(statistic.total, pieces)
        else:
            for piece in pieces:
                statistic.total += piece.to(statistic.total.device)
        statistic.tokens += tokens

    def empty(name: str, device: torch.device) -> Statistic:
        d = by_name[name].shape[1]
        return Statistic(torch.zeros((d, d) if kind == "gram" else (d,), dtype=torch.float64, device=device), 0.0, [name])

    def work(batch: Batch) -> tuple[Any, list[Tensor]]:
        """Adds what one micro-batch gives, or, where ranks share the work, gives it away: each name with its tokens and tiles."""
        told: list[tuple[str, float, int]] = []
        given: list[Tensor] = []
        others: dict[str, str] = {}
        token_weights = _token_weights(batch, weights, block)
        seen: list[tuple[tuple[int, int, torch.Size], str, Tensor]] = []  # holds the tensors, so that addresses stay theirs
        names: set[str] = set()

        def callback(name: str, x: Tensor, rows: Tensor | None) -> None:
            address = (x.data_ptr(), version_of(x), x.shape)
            first = next((owner for known, owner, _ in seen if known == address), None)
            names.add(name)
            if first is None:
                seen.append((address, name, x))
                w = token_weights
                if w is not None and by_name[name].index is not None:
                    if rows is None:
                        raise ModelError(f"{name}: the tokens given to this expert cannot be followed, so they cannot be weighted")
                    w = w[rows]
                flat = x.reshape(-1, x.shape[-1])
                if not (w is None or by_name[name].index is not None or len(w) == len(flat)):
                    raise ModelError(f"{name} is given {len(flat)} tokens where the micro-batch has {len(w)}, so they cannot be weighted")
                tokens = float(len(flat) if w is None else w.double().sum())
                if block.shared:
                    pieces = list(pieces_of(flat, w))
                    told.append((name, tokens, len(pieces)))
                    given.extend(pieces)
                else:
                    add(name, tokens, pieces_of(flat, w))
            elif name != first:
                others[name] = first
            if plain and names == wanted:
                raise _Enough

        try:
            with site_inputs(block.module, sites, callback, root_name=block.name):
                block.run(batch)
        except _Enough:
            pass
        return [told, others], given

    def take(note: Any, tensors: Iterator[Tensor]) -> None:
        told, others = note
        for name, tokens, count in told:
            add(name, tokens, itertools.islice(tensors, count))
        alias.update(others)

    block.each(work, take)
    for name in by_name:
        if name in alias and name not in found:
            found[alias[name]].sites.append(name)
        elif name not in found:
            found[name] = empty(name, torch.device("cpu"))
    if kind == "gram":
        for statistic in found.values():
            mirror(statistic.total)
    order = {name: i for i, name in enumerate(by_name)}
    return sorted(found.values(), key=lambda s: order[s.sites[0]])


def _token_weights(batch: Batch, weights: Sequence[Tensor] | None, block: Block) -> Tensor | None:
    """Weights of the tokens of a micro-batch, flat; zero at padding; None when all are one."""
    w = None if weights is None else weights[block.place(batch, len(weights))].reshape(-1)
    if batch.valid is None:
        return w
    valid = batch.valid.reshape(-1)
    return valid.to(torch.float64) if w is None else w * valid


def structure_of(model: nn.Module, given: Structure | None) -> Structure:
    """The structure at hand, or found."""
    return structure(model) if given is None else given


def finite_weight(model: nn.Module, site: Site) -> Tensor:
    """The (out, in) view of a site's weights; raises NonFiniteError naming the site."""
    weight = site.view(model)
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{site.name} holds NaN or infinity; repair the checkpoint before scoring it")
    return weight


def tokens_of(block: Block) -> int:
    """Number of tokens that go into a block, padding left out."""
    counts: list[int] = []
    block.each(
        lambda batch: (batch.hidden[..., 0].numel() if batch.valid is None else int(batch.valid.sum()), []),
        lambda count, _: counts.append(count),
    )
    return sum(counts)


def data_settings(calibration: Calibration) -> dict[str, Any]:
    """What scores record about the data they were made on."""
    return {"data": calibration.digest, "samples": len(calibration)}


def base_seed(seed: Seed) -> int:
    """A whole number to derive other seeds from: the seed itself, or one drawn from the given generator."""
    return seed if isinstance(seed, int) else int(torch.randint(2**62, (), generator=seed, device=seed.device))


def check_by(by: str) -> None:
    """Raise InputError unless `by` names a way to key layer scores."""
    if by not in ("block", "site"):
        raise InputError(f"by is {by!r}; expected 'block' or 'site'")


class WeightScores:
    """Scores of weights, collected site by site: kept whole for unit "weight", reduced to their mean at once for unit "layer".

    Args:
        found: the structure of the model.
        unit: "weight" or "layer".
        by: for unit "layer": "block" for the mean over all weights of a block, "site" for each site's own.

    Raises:
        InputError: another unit or another `by`.
    """

    def __init__(self, found: Structure, unit: str, by: str) -> None:
        if unit not in ("weight", "layer"):
            raise InputError(f"unit is {unit!r}; expected 'weight' or 'layer'")
        check_by(by)
        self.found, self.unit, self.by = found, unit, by
        self.values: dict[str, Tensor] = {}

    def add(self, site: Site, values: Float[Tensor, "out d"]) -> None:
        """Take the scores of one site's weights."""
        self.values[site.name] = values.to("cpu", torch.float32) if self.unit == "weight" else values.mean(dtype=torch.float64).cpu()

    def scores(self, method: str, settings: dict[str, Any]) -> Scores:
        """What was collected, in the order of the sites."""
        ordered = {site.name: self.values[site.name] for site in self.found.sites}
        scores = Scores(self.unit, ordered, method, settings, structure=self.found)
        return scores.reduce("mean", by="block") if self.unit == "layer" and self.by == "block" else scores


def input_square_scores(
    model: nn.Module,
    calibration: Calibration,
    weigh: Callable[[Tensor, Tensor], Tensor],
    *,
    method: str,
    unit: str,
    by: str,
    structure: Structure | None,
    progress: Progress | None,
) -> Scores:
    """Scores of weights from each site's weights (out, in) and the mean squares of its inputs (in,), as `weigh` puts them together."""
    found = structure_of(model, structure)
    collected = WeightScores(found, unit, by)
    check_fits(model, calibration)

    def visit(block: Block) -> dict[str, Any]:
        tokens = tokens_of(block)
        by_name = {site.name: site for site in block.sites}
        for statistic in input_statistics(block, block.sites, kind="diagonal"):
            squares = statistic.total / tokens
            for name in statistic.sites:
                weight = finite_weight(model, by_name[name])
                collected.add(by_name[name], weigh(weight, squares.to(weight.device)))
        return {}

    walk(model, calibration, visit, structure=found, settings={}, label=method.replace("-", " "), commit=False, progress=progress)
    return collected.scores(method, data_settings(calibration))
