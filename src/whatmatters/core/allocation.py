"""Allocation: budgets become plans, exactly. Never over the budget; what is left unused is smaller than the smallest step, or it raises.

Two levels of it: kernels over batched tensors (`top_k`, `probabilities`, `sample`, ...), used by every method also inside a forward pass,
and plans over saved Scores (`masks`, `bits`, `ratios`, `sampling`). Nothing here sees a model; counts are integers, budgets are fractions,
and ties break by position: the earlier of two equals counts as the more important.
"""

import contextlib
import ctypes
import heapq
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor

from whatmatters.core.catalog import door
from whatmatters.core.errors import BudgetError, InputError, InputTypeError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores, level_list
from whatmatters.core.sites import Structure

__all__ = [
    "bits",
    "bits_greedy",
    "bits_lp_rounding",
    "loss_from_rank",
    "masks",
    "probabilities",
    "ratios",
    "sample",
    "sampling",
    "straight_through",
    "threshold",
    "top_k",
]

Cost = Callable[[tuple[int, int], int], int]
"""Bits stored for a site of that (out, in) shape at that level."""

Number = int | float | Fraction

DENSE = 16
"""From this level on a site is left as it is: 16 bits a weight and no scales."""

NODES = 50_000
"""Branches of the integer program before it gives up; a model of 80 blocks takes about 100."""

TIE_NODES = 20
"""Branches of its second stage, which only breaks ties."""

GRAIN = 2**36
"""Inclusion probabilities are drawn as multiples of 1 / GRAIN, in integers, so that counts are exact."""


# Kernels


def top_k(values: Num[Tensor, "*shape"], k: int, dim: int = -1) -> Bool[Tensor, "*shape"]:
    """Exactly the k largest along a dimension, equal ones by position.

    Args:
        values: finite numbers.
        k: how many are chosen in every slice, from 0 to the length of the dimension.
        dim: the dimension they are chosen along.

    Returns:
        True for the chosen; no host synchronisation, no gradient (see `straight_through`).

    Raises:
        InputError: k is out of range.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1).tolist()
        [False, True, False, False]
    """
    length = _length(values, dim)
    if not 0 <= k <= length:
        raise InputError(f"top {k} along dimension {dim} of shape {tuple(values.shape)}; expected 0 to {length}")
    values = values.detach()
    if k in (0, length):
        return torch.full(values.shape, k > 0, dtype=torch.bool, device=values.device)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()  # exact, and every device can select in it
    bound = values.kthvalue(length - k + 1, dim=dim, keepdim=True).values
    above, ties = values > bound, values == bound
    return above | (ties & (ties.cumsum(dim) <= k - above.sum(dim, keepdim=True)))


def threshold(values: Num[Tensor, "*shape"], bound: float | int | Num[Tensor, "..."]) -> Bool[Tensor, "*shape"]:
    """True where a value is at least `bound` (a number, or a tensor that broadcasts to the shape of the values).

    Example:
        >>> threshold(torch.tensor([1.0, 2.0]), 2.0).tolist()
        [False, True]
    """
    return (values.detach() >= bound).expand(values.shape)


def probabilities(values: Num[Tensor, "*shape"], budget: float | int, dim: int = -1) -> Float[Tensor, "*shape"]:
    """Inclusion probabilities proportional to the values, none above 1, with a given sum: water-filling in closed form.

    Args:
        values: finite and not negative. Where fewer than `budget` of a slice are positive those get 1 and the zeros share the rest equally.
        budget: expected number of chosen, the sum along `dim`; from 0 to the length of the dimension.
        dim: the dimension they are shared along.

    Returns:
        Probabilities in the dtype of the values (float32 for integers), differentiable where the caps do not bind; no host synchronisation.

    Raises:
        InputError: the budget is out of range.

    Example:
        >>> probabilities(torch.tensor([6.0, 1.0, 1.0]), 2).tolist()
        [1.0, 0.5, 0.5]
    """
    length = _length(values, dim)
    if not 0 <= budget <= length:
        raise InputError(f"budget {budget} along dimension {dim} of shape {tuple(values.shape)}; expected 0 to {length}")
    dtype = values.dtype if values.is_floating_point() else torch.float32
    return _shares(values, budget, dim).to(dtype)


def _shares(values: Num[Tensor, "*shape"], budget: float | int, dim: int) -> Float[Tensor, "*shape"]:
    """`probabilities` in float64."""
    if values.shape[dim] == 0:
        return values.double()
    scaled = values.double().movedim(dim, -1)
    peak = scaled.detach().amax(-1, keepdim=True)
    scaled = scaled / torch.where(peak > 0, peak, 1.0)
    ordered = scaled.sort(-1, descending=True).values
    tail = ordered.flip(-1).cumsum(-1).flip(-1)
    left = (budget - torch.arange(ordered.shape[-1], device=values.device, dtype=torch.float64)).clamp_min(0)
    # The j largest are capped, j the first number for which the next one stays below 1; argmax finds the first True.
    first = (ordered.detach() * left <= tail.detach()).int().argmax(-1, keepdim=True)
    remaining, mass = left.expand_as(ordered).gather(-1, first), tail.gather(-1, first)
    positive = scaled * (remaining / torch.where(mass > 0, mass, 1.0))
    equal = remaining / (ordered.shape[-1] - first)
    shares = torch.where(mass > 0, positive, torch.where(scaled > 0, 1.0, equal))
    return shares.clamp(0, 1).movedim(-1, dim)


def sample(values: Num[Tensor, "*shape"], budget: int, dim: int = -1, *, generator: torch.Generator) -> Bool[Tensor, "*shape"]:
    """Draw exactly `budget` units along a dimension, with the inclusion probabilities of `probabilities`.

    Systematic sampling: one uniform number a slice, laid as a comb over the cumulated probabilities. Counts are exact because the
    probabilities are whole multiples of 2**-36 that add up to the budget. Neighbours exclude each other: the sample is spread evenly.

    Args:
        values: finite and not negative, or probabilities that add up to the budget (they stay what they are).
        budget: how many are drawn in every slice, from 0 to the length of the dimension.
        dim: the dimension they are drawn along.
        generator: the source of randomness, on the device of the values.

    Returns:
        True for the drawn; no host synchronisation.

    Raises:
        InputError: the budget is out of range.

    Example:
        >>> int(sample(torch.rand(5, 100), 30, generator=torch.Generator().manual_seed(0)).sum())
        150

    References:
        W. G. Madow, "On the theory of systematic sampling, II", 1949.
    """
    length = _length(values, dim)
    if not 0 <= budget <= length:
        raise InputError(f"budget {budget} along dimension {dim} of shape {tuple(values.shape)}; expected 0 to {length}")
    if budget >= 2**26:
        raise InputError(f"a budget of {budget}; expected fewer than {2**26}: sample in batches")
    if values.numel() == 0:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    grains = _grains(_shares(values.detach(), budget, dim).movedim(dim, -1), budget)
    offset = torch.randint(GRAIN, (*grains.shape[:-1], 1), generator=generator, device=values.device)
    return _comb(grains, offset).movedim(-1, dim)


def _grains(shares: Float[Tensor, "*batch units"], budget: int) -> Int64[Tensor, "*batch units"]:
    """Probabilities in whole grains, each at most GRAIN, that add up to exactly `budget` of them."""
    grains = (shares * GRAIN).long().clamp(0, GRAIN)
    lacking = budget * GRAIN - grains.sum(-1, keepdim=True)
    # Rounding lacks less than a grain a unit: one more to the first that have room (or one less, where sums were rounded up).
    room = grains < GRAIN
    grains = grains + (room & (room.cumsum(-1) <= lacking)).long()
    room = grains > 0
    return grains - (room & (room.cumsum(-1) <= -lacking)).long()


def _comb(grains: Int64[Tensor, "*batch units"], offset: Int64[Tensor, "*batch 1"]) -> Bool[Tensor, "*batch units"]:
    """The units whose stretch of the cumulated grains holds a tooth of the comb."""
    end = grains.cumsum(-1) + offset
    return end.div(GRAIN, rounding_mode="floor") > (end - grains).div(GRAIN, rounding_mode="floor")


def straight_through(hard: Num[Tensor, "*shape"] | Bool[Tensor, "*shape"], soft: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values of `hard`, bit for bit, with the gradient of `soft`.

    Example:
        >>> soft = torch.tensor([0.3, 0.9], requires_grad=True)
        >>> straight_through(top_k(soft, 1), soft).sum().backward()
        >>> soft.grad.tolist()
        [1.0, 1.0]
    """
    return hard.detach().to(soft.dtype) + (soft - soft.detach())


def _length(values: Tensor, dim: int) -> int:
    if values.dim() == 0 or not -values.dim() <= dim < values.dim():
        raise InputError(f"dimension {dim} of shape {tuple(values.shape)}; expected one that the tensor has")
    return values.shape[dim]


# Numbers as they were written


def _exact(value: Number, what: str) -> Fraction:
    """The number a person wrote: 0.1 is one tenth and not the nearest binary fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise InputTypeError(f"{what} is {type(value).__name__}; expected a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{what} is {value}; expected a finite number")
        return Fraction(str(float(value)))
    return Fraction(value)


def _share(value: Number, what: str) -> Fraction:
    exact = _exact(value, what)
    if not 0 <= exact <= 1:
        raise BudgetError(f"{what} is {float(exact):g}; the feasible range is 0 to 1: give the share of the weights that goes")
    return exact


# Masks


@door("allocate.masks")
def masks(scores: Scores, sparsity: Number | None, *, scope: str = "all", structure: Structure | None = None) -> Plan:
    """Keep the most important weights: a mask for every site under one sparsity.

    Args:
        scores: unit "weight".
        sparsity: share of the weights that goes, from 0 to 1, read as written in decimals. The number that goes is rounded up, so the
            number kept never exceeds (1 - sparsity) of all. None where n:m says it already.
        scope: where weights compete: "all" sites together, within each "site", within each "row" (output), or "n:m": n are kept of every m
            consecutive inputs.
        structure: goes into the plan; default that of the scores.

    Returns:
        A plan of kind "mask", True for the weights that are kept; equal scores are kept by position.

    Raises:
        InputTypeError: the scores are not of weights.
        BudgetError: the sparsity is out of range, or is not the one of n:m.
        InputError: an unknown scope, or inputs that m does not divide.

    Example:
        >>> scores = Scores("weight", {"a": torch.tensor([[3.0, 1.0, 2.0, 4.0]])}, "mine", {})
        >>> masks(scores, 0.5, scope="2:4").values["a"].tolist()
        [[True, False, False, True]]
    """
    scores.expect_unit("weight")
    structure = structure or scores.structure
    total = sum(value.numel() for value in scores.values.values())
    values: dict[str, int | float | Tensor]
    if ":" in scope:
        kept_of, of = _pattern(scope)
        share = 1 - Fraction(kept_of, of)
        if sparsity is not None and _share(sparsity, "sparsity") != share:
            raise BudgetError(f"sparsity {float(sparsity):g} with {scope}; the only feasible one is {float(share):g}: give that or None")
        values = {name: _n_of_m(name, value, kept_of, of) for name, value in scores.values.items()}
        competing = Counter({of: total // of})
    elif sparsity is None:
        raise InputError(f"sparsity None with scope {scope!r:.40}; expected a number from 0 to 1")
    else:
        share = _share(sparsity, "sparsity")
        if scope == "all":
            values = dict(_largest(scores.values, _keep(share, total)))
            competing = Counter([total])
        elif scope == "site":
            values = {n: _largest({n: v}, _keep(share, v.numel()))[n] for n, v in scores.values.items()}
            competing = Counter(value.numel() for value in scores.values.values())
        elif scope == "row":
            values = {name: top_k(value, _keep(share, value.shape[1])) for name, value in scores.values.items()}
            competing = Counter()
            for value in scores.values.values():
                competing[value.shape[1]] += value.shape[0]
        else:
            raise InputError(f"scope {scope!r:.40} is unknown; expected 'all', 'site', 'row' or n:m such as '2:4'")
    kept = sum(times * _keep(share, count) for count, times in competing.items())
    account = {
        "achieved": (total - kept) / total,
        "kept": kept,
        "pruned": total - kept,
        "unused": float((1 - share) * total - kept),
        "scopes": competing.total(),
        "smallest_step": 1,
    }
    settings = {"scope": scope, "scores": dict(scores.settings)}
    return Plan._adopt("mask", values, {"sparsity": float(share), "scope": scope}, account, scores.method, settings, structure)


def _keep(share: Fraction, count: int) -> int:
    return count - math.ceil(share * count)


def _pattern(scope: str) -> tuple[int, int]:
    kept, _, of = scope.partition(":")
    if not (kept.isascii() and kept.isdigit() and of.isascii() and of.isdigit() and len(scope) < 12 and 0 < int(kept) <= int(of)):
        raise InputError(f"scope {scope!r:.40}; expected n:m with n from 1 to m, such as '2:4'")
    return int(kept), int(of)


def _n_of_m(name: str, value: Float[Tensor, "out in"], kept: int, of: int) -> Bool[Tensor, "out in"]:
    rows, columns = value.shape
    if columns % of:
        raise InputError(f"{kept}:{of} for {name!r} with {columns} inputs; expected a multiple of {of}")
    return top_k(value.reshape(rows, columns // of, of), kept).reshape(rows, columns)


def _largest(values: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks that keep the largest over all tensors together: one selection, no sorting, and counting only where there are ties."""
    total = sum(value.numel() for value in values.values())
    if keep in (0, total):
        return {name: torch.full(value.shape, keep > 0) for name, value in values.items()}
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values.values()) else torch.float32
    flat = torch.cat([value.reshape(-1).to(dtype) for value in values.values()]).numpy()
    flat.partition(total - keep)
    bound = torch.tensor(flat[total - keep], dtype=dtype)
    del flat
    result, ties = {}, {}
    room = keep
    for name, value in values.items():
        result[name] = value.to(dtype) > bound
        ties[name] = value.to(dtype) == bound
        room -= int(result[name].sum())
    for name, equal in ties.items():
        count = int(equal.sum())
        if room <= 0:
            break
        result[name] |= equal if count <= room else equal & (equal.reshape(-1).cumsum(0).reshape(equal.shape) <= room)
        room -= min(count, room)
    return result


# Bits


@dataclass(frozen=True)
class _Counting:
    """How bits are counted: by a user's own cost, by what is stored, or by codes alone."""

    count: str
    cost: Cost | None
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        return self.count if self.cost is None else "cost"

    def __call__(self, shape: tuple[int, int], level: int) -> int:
        if self.cost is not None:
            return self.cost(shape, level)
        return self.stored(shape, level) if self.count == "stored" else self.codes(shape, level)

    def stored(self, shape: tuple[int, int], level: int) -> int:
        from whatmatters.core.formats import stored_bits  # formats brings the checkpoint library along

        return stored_bits(shape, level, group_size=self.group_size, symmetric=self.symmetric)

    def codes(self, shape: tuple[int, int], level: int) -> int:
        return shape[0] * shape[1] * min(level, DENSE)


@dataclass(frozen=True)
class _Problem:
    """Groups of sites, in position order, and what each costs at each level (ascending). `budget` and costs are bits."""

    groups: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    costs: tuple[tuple[int, ...], ...]
    levels: tuple[int, ...]
    budget: int
    counting: _Counting
    structure: Structure

    def cost(self, chosen: Sequence[int]) -> int:
        return sum(costs[level] for costs, level in zip(self.costs, chosen, strict=True))


@door("allocate.bits")
def bits(
    scores: Scores,
    average: Number | None,
    levels: Sequence[int] = (2, 3, 4, 8),
    *,
    how: Literal["rank", "optimum"] = "rank",
    count: Literal["stored", "codes"] = "stored",
    cost: Cost | None = None,
    structure: Structure | None = None,
    tied: bool = True,
    group_size: int = 128,
    symmetric: bool = True,
    fractions: Mapping[int, Number] | None = None,
) -> Plan:
    """Bits for every site under an average.

    `how="rank"`: all groups begin at the highest level. The least important is lowered by one level, then the next, until the budget holds;
    when all are one level down it begins again with the least important, so that at any time two neighbouring levels are in use and the
    more important groups have the higher (with two levels: the papers' rule). Then whatever still fits is raised again, most important
    first, one level a pass. A group's importance is the mean, weighted by size, of the ranks of its members' scores (equal scores share
    their rank): no increasing map of the scores changes the plan.

    `how="optimum"`: the least sum of predicted losses, by integer programming with zero gap; among equal sums the smaller size, and among
    groups that can be exchanged the earlier ones high.

    Args:
        scores: unit "layer". Keyed by block, a whole block is one group (the papers'); keyed by site, tied sites are one group.
        average: bits per weight, read as written in decimals. None with `fractions`.
        levels: bit widths that may be used; 16 or more means that a site is left as it is.
        how: "rank" uses the order of the scores (a loss table by its `stakes`); "optimum" needs scale "loss".
        count: what is counted: "stored": everything on disk (codes with padding, scales, zero points); "codes": the papers' bits a weight.
        cost: bits for a site of a shape at a level, in place of `count`'s; it must not fall as the level rises.
        structure: sizes, blocks and ties; default that of the scores.
        tied: sites that read the same input get equal bits.
        group_size: weights per scale, -1 for one scale per output; for `count="stored"`.
        symmetric: no zero points; for `count="stored"`.
        fractions: in place of an average, `how="rank"` only: the share of the weights at each level, such as {8: 0.2, 4: 0.6, 2: 0.2}; the
            ranking is cut into consecutive bands, none but the lowest larger than its share.

    Returns:
        A plan of kind "bits". Its account: "achieved" (average in the count asked for), "average_stored" (None where the format cannot
        hold it), "average_codes", "used" and "unused" bits, "smallest_step" (bits to the next level of the group, not at the highest level,
        that needs fewest; under "optimum" only steps that lower the loss), "filled" (sites raised again at the end).

    Raises:
        BudgetError: the average is out of the feasible range, which is told in the same count.
        InputTypeError: the scores are not of layers.
        InputError: no structure, a site without a score, rank scores with `how="optimum"`, a level without losses.

    Example:
        >>> from whatmatters.core.sites import Site
        >>> sites = tuple(Site(f"h.{i}.fc", f"h.{i}.fc.weight", (64, 64), f"h.{i}") for i in range(4))
        >>> model = Structure(("h.0", "h.1", "h.2", "h.3"), sites)
        >>> scores = Scores("layer", {f"h.{i}": torch.tensor(float(i)) for i in range(4)}, "mine", {}, structure=model)
        >>> bits(scores, 3.5, (2, 4), count="codes").values["h.0.fc"]
        2

    References:
        Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels",
        arXiv 2406.17415, 2024 (the rank rule).
    """
    if how not in ("rank", "optimum"):
        raise InputError(f"how {how!r:.40} is unknown; expected 'rank' or 'optimum'")
    if (average is None) == (fractions is None):
        raise InputError("average and fractions are two ways to say the same; give exactly one of them")
    if how == "optimum":
        if fractions is not None:
            raise InputError("fractions with how='optimum'; give an average, or use how='rank'")
        _expect_losses(scores, "how='optimum'")
    problem, lifted = _problem(scores, average, levels, _Counting(count, cost, group_size, symmetric), structure, tied)
    if how == "optimum":
        losses = _losses(problem, lifted)
        return _plan(problem, _optimum(problem, losses), scores, average, how=how, tied=tied, losses=losses)
    order = _order(problem, lifted)
    if fractions is not None:
        chosen = _bands(problem, order, fractions)
        return _plan(problem, chosen, scores, average, how=how, tied=tied, fractions=fractions)
    chosen = _demote(problem, order)
    filled = _fill(problem, order, chosen)
    return _plan(problem, chosen, scores, average, how=how, tied=tied, filled=filled)


@door("allocate.bits_greedy")
def bits_greedy(
    scores: Scores,
    average: Number,
    levels: Sequence[int] = (2, 3, 4, 8),
    *,
    count: Literal["stored", "codes"] = "stored",
    cost: Cost | None = None,
    structure: Structure | None = None,
    tied: bool = True,
    group_size: int = 128,
    symmetric: bool = True,
) -> Plan:
    """Bits by marginal gain: all groups begin at the lowest level, and the step that saves most loss for a bit is taken while one fits.

    A comparison for `bits(how="optimum")`, which is never worse. Arguments, account and errors are those of `bits`.

    Example:
        >>> from whatmatters.core.sites import Site
        >>> model = Structure(("h",), (Site("h.a", "h.a.weight", (4, 4), "h"), Site("h.b", "h.b.weight", (4, 4), "h")))
        >>> table = {"h.a": torch.tensor([9.0, 0.0]), "h.b": torch.tensor([1.0, 0.0])}
        >>> scores = Scores("layer", table, "mine", {"levels": [2, 4]}, scale="loss", structure=model)
        >>> dict(bits_greedy(scores, 3, (2, 4), count="codes").values)
        {'h.a': 4, 'h.b': 2}
    """
    _expect_losses(scores, "bits_greedy")
    problem, lifted = _problem(scores, average, levels, _Counting(count, cost, group_size, symmetric), structure, tied)
    losses = _losses(problem, lifted)
    chosen = _climb(problem, losses, [0] * len(problem.groups))
    return _plan(problem, chosen, scores, average, how="greedy", tied=tied, losses=losses)


@door("allocate.bits_lp_rounding")
def bits_lp_rounding(
    scores: Scores,
    average: Number,
    levels: Sequence[int] = (2, 3, 4, 8),
    *,
    count: Literal["stored", "codes"] = "stored",
    cost: Cost | None = None,
    structure: Structure | None = None,
    tied: bool = True,
    group_size: int = 128,
    symmetric: bool = True,
) -> Plan:
    """Bits by the linear relaxation: its solution, fractional groups rounded down, then the greedy steps that still fit.

    A comparison for `bits(how="optimum")`, which is never worse. Arguments, account and errors are those of `bits`.

    Example:
        >>> from whatmatters.core.sites import Site
        >>> model = Structure(("h",), (Site("h.a", "h.a.weight", (4, 4), "h"), Site("h.b", "h.b.weight", (4, 4), "h")))
        >>> table = {"h.a": torch.tensor([9.0, 0.0]), "h.b": torch.tensor([1.0, 0.0])}
        >>> scores = Scores("layer", table, "mine", {"levels": [2, 4]}, scale="loss", structure=model)
        >>> dict(bits_lp_rounding(scores, 3.5, (2, 4), count="codes").values)
        {'h.a': 4, 'h.b': 2}
    """
    _expect_losses(scores, "bits_lp_rounding")
    problem, lifted = _problem(scores, average, levels, _Counting(count, cost, group_size, symmetric), structure, tied)
    losses = _losses(problem, lifted)
    chosen = _climb(problem, losses, _rounded_down(problem, losses))
    return _plan(problem, chosen, scores, average, how="lp_rounding", tied=tied, losses=losses)


@door("allocate.loss_from_rank")
def loss_from_rank(scores: Scores, levels: Sequence[int], decay: float = 4.0) -> Scores:
    """A loss table made up from an order: the least that `bits(how="optimum")` needs, for those who choose to believe it.

    Args:
        scores: unit "layer", scale "rank".
        levels: bit widths of the table.
        decay: by which factor one more bit lowers the loss, above 1; 4 is what rounding error squared does.

    Returns:
        Scores of scale "loss": weight * decay ** -level, where weights are ranks, from 1 for the least important (equal scores share
        theirs), divided by their sum; 0 at levels of 16 or more, where nothing is rounded.

    Raises:
        InputError: the scores are losses already, or `decay` is not above 1.

    Example:
        >>> scores = Scores("layer", {"a": torch.tensor(5.0), "b": torch.tensor(7.0)}, "mine", {})
        >>> loss_from_rank(scores, (1, 2)).values["b"].tolist()
        [0.16666666666666666, 0.041666666666666664]
    """
    scores.expect_unit("layer")
    if scores.scale != "rank":
        raise InputError("the scores are a loss table already; give them to bits(how='optimum') as they are")
    if not (math.isfinite(decay) and decay > 1):
        raise InputError(f"decay {decay}; expected a finite number above 1")
    ascending = level_list(levels)
    ranks = _ranks({name: value.item() for name, value in scores.values.items()})
    total = sum(ranks.values())
    table = {
        name: torch.tensor(
            [0.0 if level >= DENSE else float(rank / total) * float(decay) ** -level for level in ascending], dtype=torch.float64
        )
        for name, rank in ranks.items()
    }
    settings = {"levels": ascending, "decay": decay, "from": scores.method, "scores": dict(scores.settings)}
    return Scores("layer", table, "loss_from_rank", settings, scale="loss", structure=scores.structure)


def _expect_losses(scores: Scores, what: str) -> None:
    scores.expect_unit("layer")
    if scores.scale != "loss":
        raise InputError(
            f"{what} minimises losses and {scores.method!r} gives ranks; use how='rank', a loss table such as "
            "score.quantization_error, or loss_from_rank(scores, levels) if you mean it"
        )


def _problem(
    scores: Scores, average: Number | None, levels: Sequence[int], counting: _Counting, structure: Structure | None, tied: bool
) -> tuple[_Problem, Scores]:
    """The groups with their costs and the budget (without an average: what the highest level costs), and the scores by site."""
    scores.expect_unit("layer")
    structure = structure or scores.structure
    if structure is None:
        raise InputError(f"scores of {scores.method!r} know no sizes or ties; give structure=, from whatmatters.structure(model)")
    if not structure.sites:
        raise InputError("the structure has no sites; there is nothing to give bits to")
    if counting.count not in ("stored", "codes"):
        raise InputError(f"count {counting.count!r:.40} is unknown; expected 'stored' or 'codes'")
    scores.check_structure(structure)
    lifted = scores.lift(structure)
    shapes = {site.name: site.shape for site in structure.sites}
    if all(name in structure.blocks for name in scores.values):
        names = [[site.name for site in structure.in_block(block)] for block in structure.blocks]
    else:
        names = structure.groups() if tied else [[site.name] for site in structure.sites]
    groups = tuple(tuple(group) for group in names if group)
    ascending = level_list(levels)
    sizes = tuple(sum(math.prod(shapes[name]) for name in group) for group in groups)
    costs = _costs(groups, shapes, ascending, counting)
    total = sum(sizes)
    lowest, budget = sum(row[0] for row in costs), sum(row[-1] for row in costs)
    if average is not None:
        wanted = _exact(average, "average")
        low, high = Fraction(lowest, total), max(Fraction(budget, total), Fraction(ascending[-1]))
        if not low <= wanted <= high:
            raise BudgetError(_infeasible(wanted, low, high, ascending, counting))
        budget = math.floor(wanted * total)
    return _Problem(groups, sizes, costs, ascending, budget, counting, structure), lifted


def _costs(
    groups: Iterable[tuple[str, ...]], shapes: Mapping[str, tuple[int, int]], levels: tuple[int, ...], cost: Cost
) -> tuple[tuple[int, ...], ...]:
    known: dict[tuple[int, int], tuple[int, ...]] = {}
    for group in groups:
        for name in group:
            if (shape := shapes[name]) in known:
                continue
            row = tuple(cost(shape, level) for level in levels)
            if any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in row):
                raise InputTypeError(f"cost gives {row!r:.80} bits for {name!r} of shape {shape}; expected whole numbers from 0")
            if any(low > high for low, high in pairwise(row)):
                raise InputError(f"{name!r} of shape {shape} costs {row} bits at the levels {levels}; expected no fall: leave out a level")
            known[shape] = row
    return tuple(tuple(map(sum, zip(*(known[shapes[name]] for name in group), strict=True))) for group in groups)


def _infeasible(wanted: Fraction, low: Fraction, high: Fraction, levels: tuple[int, ...], counting: _Counting) -> str:
    # Rounded inwards, so that the numbers shown can be typed in.
    shown_low, shown_high = math.ceil(low * 10_000) / 10_000, math.floor(high * 10_000) / 10_000
    advice = "ask for more, or add a lower level" if wanted < low else "ask for less, or add a higher level"
    counted = {"stored": "counted as stored on disk, scales included", "codes": "counting codes only", "cost": "by the given cost"}
    return (
        f"an average of {float(wanted):g} bits with the levels {levels}; the feasible range is {shown_low} to {shown_high} bits "
        f"per weight, {counted[counting.name]}: {advice}"
    )


def _ranks(values: Mapping[str, float]) -> dict[str, Fraction]:
    """Ranks from 1 for the smallest; equal values share the mean of theirs."""
    ordered = sorted(values.values())
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for place, value in enumerate(ordered, start=1):
        first.setdefault(value, place)
        last[value] = place
    return {name: Fraction(first[value] + last[value], 2) for name, value in values.items()}


def _order(problem: _Problem, lifted: Scores) -> list[int]:
    """Groups from the most to the least important, equal ones by position."""
    ranks = _ranks({name: value.item() for name, value in lifted.stakes().values.items()})
    weights = {site.name: site.size for site in problem.structure.sites}
    means = [
        sum((ranks[name] * weights[name] for name in group), Fraction(0)) / size
        for group, size in zip(problem.groups, problem.sizes, strict=True)
    ]
    return sorted(range(len(means)), key=lambda g: -means[g])


def _demote(problem: _Problem, order: list[int]) -> list[int]:
    """Lower by one level, the least important first, band after band, until the budget holds."""
    chosen = [len(problem.levels) - 1] * len(problem.groups)
    used = problem.cost(chosen)
    for level in reversed(range(1, len(problem.levels))):
        for group in reversed(order):
            if used <= problem.budget:
                return chosen
            chosen[group] = level - 1
            used -= problem.costs[group][level] - problem.costs[group][level - 1]
    return chosen


def _fill(problem: _Problem, order: list[int], chosen: list[int]) -> list[int]:
    """Raise whatever still fits, most important first, one level a pass; changes `chosen` and returns the groups that rose."""
    unused = problem.budget - problem.cost(chosen)
    risen: set[int] = set()
    moved = True
    while moved:
        moved = False
        for group in order:
            if chosen[group] + 1 < len(problem.levels):
                step = problem.costs[group][chosen[group] + 1] - problem.costs[group][chosen[group]]
                if step <= unused:
                    chosen[group] += 1
                    unused -= step
                    risen.add(group)
                    moved = True
    return sorted(risen)


def _bands(problem: _Problem, order: list[int], fractions: Mapping[int, Number]) -> list[int]:
    """Cut the ranking into consecutive bands, highest level first."""
    shares = {level: _share(fraction, f"fraction of level {level}") for level, fraction in fractions.items()}
    if not set(shares) <= set(problem.levels) or sum(shares.values()) != 1:
        raise InputError(f"fractions {dict(fractions)!r:.120}; expected shares of the levels {problem.levels} that add up to exactly 1")
    total, chosen, place, done, upto = sum(problem.sizes), [0] * len(order), 0, 0, Fraction(0)
    for level in reversed(range(len(problem.levels))):
        upto += shares.get(problem.levels[level], Fraction(0))
        while place < len(order) and done + problem.sizes[order[place]] <= upto * total:
            chosen[order[place]] = level
            done += problem.sizes[order[place]]
            place += 1
    return chosen


def _losses(problem: _Problem, lifted: Scores) -> list[tuple[Fraction, ...]]:
    """Exact sums of the losses of each group at each level."""
    known = lifted.levels
    if not set(problem.levels) <= set(known):
        raise InputError(f"the loss table has the levels {known}; the plan may use {problem.levels}: give levels that have losses")
    columns = [known.index(level) for level in problem.levels]
    rows = {name: value.tolist() for name, value in lifted.values.items()}
    return [tuple(sum((Fraction(rows[name][c]) for name in group), Fraction(0)) for c in columns) for group in problem.groups]


def _climb(problem: _Problem, losses: list[tuple[Fraction, ...]], start: list[int]) -> list[int]:
    """Take the step that saves most loss for a bit while one fits; equal ones by position."""
    chosen, unused = list(start), problem.budget - problem.cost(start)
    steps: list[tuple[int, Fraction, int, int]] = []

    def offer(group: int) -> None:
        level = chosen[group]
        if level + 1 < len(problem.levels):
            gain, step = losses[group][level] - losses[group][level + 1], problem.costs[group][level + 1] - problem.costs[group][level]
            if gain > 0:
                heapq.heappush(steps, (1, -gain / step, group, step) if step else (0, -gain, group, 0))

    for group in range(len(chosen)):
        offer(group)
    while steps:
        *_, group, step = heapq.heappop(steps)
        if step <= unused:  # what does not fit now never will
            chosen[group] += 1
            unused -= step
            offer(group)
    return chosen


@dataclass(frozen=True)
class _Program:
    """The choices worth making beyond the cheapest of each group, as columns of a 0/1 program scaled for floating point."""

    base: list[int]
    columns: list[tuple[int, int]]
    gains: np.ndarray
    sizes: np.ndarray
    room: float
    one_each: Any


def _program(problem: _Problem, losses: list[tuple[Fraction, ...]]) -> _Program | None:
    """None if there is nothing to choose."""
    from scipy.sparse import csr_matrix  # SciPy takes long to import and only this job needs it

    base, columns, gains, extras = [], [], [], []
    for group, (row, costs) in enumerate(zip(losses, problem.costs, strict=True)):
        # A level is worth it only if every cheaper one loses more; of equal cost and loss the higher is kept.
        worth: list[int] = []
        for level in sorted(range(len(costs)), key=lambda i: (costs[i], row[i], -i)):
            if not worth or row[level] < row[worth[-1]]:
                worth.append(level)
        base.append(worth[0])
        for level in worth[1:]:
            columns.append((group, level))
            gains.append(row[worth[0]] - row[level])
            extras.append(costs[level] - costs[worth[0]])
    if not columns:
        return None
    unit = math.gcd(*extras)
    largest = max(gains)
    numbers = np.array([group for group, _ in columns])
    groups, places = np.unique(numbers, return_inverse=True)
    one_each = csr_matrix((np.ones(len(columns)), (places, np.arange(len(columns)))), shape=(len(groups), len(columns)))
    # The solver's absolute gap is 1e-6 and cannot be set: gains up to 1e6 make it 1e-12 of the largest.
    scaled = np.array([float(gain / largest) * 1e6 for gain in gains])
    # The solver forgives 1e-6 of a row: rows are shrunk as far as half a unit stays above that, since long ones make it repair (and print).
    shrink = max(1.0, min(4e5, max(extras) / unit / 100))
    room = (problem.budget - problem.cost(base)) // unit
    return _Program(base, columns, scaled, np.array([extra // unit / shrink for extra in extras]), room / shrink, one_each)


def _optimum(problem: _Problem, losses: list[tuple[Fraction, ...]]) -> list[int]:
    """The least loss within the budget, then the least size, then earlier groups high among those that can be exchanged."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    def value(levels: Sequence[int]) -> Fraction:
        return sum((row[level] for row, level in zip(losses, levels, strict=True)), Fraction(0))

    program = _program(problem, losses)
    if program is None:
        return [_cheapest(costs, row) for costs, row in zip(problem.costs, losses, strict=True)]
    one_each = LinearConstraint(program.one_each, -np.inf, 1)
    within = LinearConstraint(program.sizes[None], -np.inf, program.room)
    whole, unit_box = np.ones(len(program.columns)), Bounds(0, 1)
    # Presolve off: choices not worth making are gone already, and undoing it costs repairs. Nodes are limited and not seconds, so
    # that the answer never depends on the machine.
    options = {"mip_rel_gap": 0.0, "presolve": False, "node_limit": NODES}
    with _solver_silenced():
        solution = milp(-program.gains, constraints=[one_each, within], integrality=whole, bounds=unit_box, options=options)
    chosen = _chosen(program, solution) if solution.status == 0 else None
    if chosen is None or problem.cost(chosen) > problem.budget:
        raise BudgetError(
            f"the integer program was not solved exactly ({solution.message!r:.120}); sizes may be too far apart for it: "
            "use how='rank' or bits_greedy"
        )
    least = value(chosen)
    # Second stage: no more loss and less size. It only breaks ties, so it is cut off early.
    gains = program.gains / 1e4
    no_worse = LinearConstraint(gains[None], float(gains @ _picked(program, chosen)), np.inf)
    options["node_limit"] = TIE_NODES
    with _solver_silenced():
        smaller = milp(program.sizes, constraints=[one_each, within, no_worse], integrality=whole, bounds=unit_box, options=options)
    other = _chosen(program, smaller)
    if other is not None and value(other) <= least and problem.cost(other) < problem.cost(chosen):
        chosen = other
    chosen = _earlier_high(problem, losses, chosen)
    improved = _climb(problem, losses, chosen)
    if float((value(chosen) - value(improved)) / max(max(row) - min(row) for row in losses)) > 1e-9:
        raise BudgetError("the integer program left a step that fits and lowers the loss; use how='rank' or bits_greedy")
    return improved


@contextlib.contextmanager
def _solver_silenced() -> Iterator[None]:
    """Drop the lines that SciPy's HiGHS prints from C while it repairs a solution; whatever else is printed meanwhile comes after.

    They would land in the standard output of `whatmatters --json`. SciPy has no switch for them.
    """
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    with tempfile.TemporaryFile() as caught:
        kept = os.dup(1)
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            caught.seek(0)
            other = b"".join(line for line in caught if not line.startswith(b"HighsMipSolverData::"))
            while other:
                other = other[os.write(1, other) :]


def _cheapest(costs: tuple[int, ...], row: tuple[Fraction, ...]) -> int:
    return min(range(len(costs)), key=lambda i: (row[i], costs[i], -i))


def _chosen(program: _Program, solution: Any) -> list[int] | None:
    """The levels of a solver's answer; None if there is none or it is not whole."""
    if solution.x is None or np.abs(solution.x - solution.x.round()).max() > 1e-5:
        return None
    chosen = list(program.base)
    taken: set[int] = set()
    for (group, level), x in zip(program.columns, solution.x.round(), strict=True):
        if x:
            if group in taken:
                return None
            taken.add(group)
            chosen[group] = level
    return chosen


def _picked(program: _Program, chosen: list[int]) -> np.ndarray:
    return np.array([float(chosen[group] == level) for group, level in program.columns])


def _earlier_high(problem: _Problem, losses: list[tuple[Fraction, ...]], chosen: list[int]) -> list[int]:
    """Groups with the same costs and losses can be exchanged: among them the levels go down with the position."""
    alike: dict[Any, list[int]] = {}
    for group, (costs, row) in enumerate(zip(problem.costs, losses, strict=True)):
        alike.setdefault((costs, row), []).append(group)
    result = list(chosen)
    for groups in alike.values():
        for group, level in zip(groups, sorted((chosen[g] for g in groups), reverse=True), strict=True):
            result[group] = level
    return result


def _rounded_down(problem: _Problem, losses: list[tuple[Fraction, ...]]) -> list[int]:
    """The linear relaxation, each fractional group at the cheapest level it touches."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix, vstack

    program = _program(problem, losses)
    if program is None:
        return [_cheapest(costs, row) for costs, row in zip(problem.costs, losses, strict=True)]
    rows = vstack([program.one_each, csr_matrix(program.sizes[None])])
    bounds = np.append(np.ones(program.one_each.shape[0]), program.room)
    solution = linprog(-program.gains, A_ub=rows, b_ub=bounds, bounds=(0, 1))
    chosen = list(program.base)
    if solution.x is None:
        raise BudgetError(f"the linear program was not solved ({solution.message!r:.120}); use bits_greedy")
    for (group, level), x in zip(program.columns, solution.x, strict=True):
        if x > 1 - 1e-9:
            chosen[group] = level
    held = np.bincount([group for group, _ in program.columns], weights=solution.x, minlength=len(chosen))
    for (group, level), x in zip(reversed(program.columns), solution.x[::-1], strict=True):
        if held[group] > 1 - 1e-9 and 1e-9 < x <= 1 - 1e-9:
            chosen[group] = level  # columns go up with the cost, so the cheapest is set last
    if problem.cost(chosen) > problem.budget:
        raise BudgetError("the linear program was not solved exactly enough to round; use bits_greedy")
    return chosen


def _plan(
    problem: _Problem,
    chosen: list[int],
    scores: Scores,
    average: Number | None,
    *,
    how: str,
    tied: bool,
    filled: Sequence[int] = (),
    losses: list[tuple[Fraction, ...]] | None = None,
    fractions: Mapping[int, Number] | None = None,
) -> Plan:
    """The plan with its account; the last check of the two laws, in integers."""
    used, total = problem.cost(chosen), sum(problem.sizes)
    unused = (problem.budget if average is not None else used) - used
    steps = [
        row[level + 1] - row[level]
        for group, (row, level) in enumerate(zip(problem.costs, chosen, strict=True))
        if level + 1 < len(row) and (losses is None or losses[group][level + 1] < losses[group][level])
    ]
    smallest = min(steps, default=None)
    if unused < 0 or (average is not None and smallest is not None and unused >= smallest):
        raise BudgetError(f"the plan leaves {unused} bits and the smallest step is {smallest}; please report this with the scores")
    shapes = {site.name: site.shape for site in problem.structure.sites}
    values = {name: problem.levels[level] for group, level in zip(problem.groups, chosen, strict=True) for name in group}
    values = {name: values[name] for name in shapes}
    counting = problem.counting
    try:
        stored = sum(counting.stored(shapes[name], level) for name, level in values.items()) / total
    except InputError:  # a width or a group size that the format does not hold, with another count asked for
        stored = None
    account: dict[str, Any] = {
        "achieved": used / total,
        "used": used,
        "unused": unused,
        "smallest_step": smallest,
        "average_stored": stored,
        "average_codes": sum(counting.codes(shapes[name], level) for name, level in values.items()) / total,
        "weights": total,
        "filled": [name for group in filled for name in problem.groups[group]],
    }
    if losses is not None:
        account["predicted_loss"] = float(sum((row[level] for row, level in zip(losses, chosen, strict=True)), Fraction(0)))
    budget: dict[str, Any] = {"average_bits": None if average is None else float(average), "count": counting.name}
    if fractions is not None:
        budget["fractions"] = {str(level): float(fraction) for level, fraction in fractions.items()}
    settings = {
        "how": how,
        "levels": problem.levels,
        "tied": tied,
        "group_size": counting.group_size,
        "symmetric": counting.symmetric,
        "scores": dict(scores.settings),
    }
    return Plan("bits", values, budget, account, scores.method, settings, problem.structure)


# Ratios and sampling


@door("allocate.ratios")
def ratios(scores: Scores, sparsity: Number, *, floor: Number = 0.0, cap: Number = 1.0, structure: Structure | None = None) -> Plan:
    """How much of every site goes: the less important, the more, between a floor and a cap, with an exact total.

    A site's sparsity is proportional to how far its rank is from the top (N for the least important of N sites, 1 for the most important,
    equal scores share), cut at `floor` and `cap`; the factor is such that the number of weights that go over all sites is exactly
    `sparsity` of all, rounded up. No increasing map of the scores changes the plan.

    Args:
        scores: unit "layer", keyed by block or site; a loss table is ranked by its `stakes`.
        sparsity: share of all weights that goes, from 0 to 1, read as written in decimals.
        floor: least share of any site.
        cap: largest share of any site.
        structure: the sizes; default that of the scores.

    Returns:
        A plan of kind "ratio": site to a share p / size with whole p, so that `round(size * share)` weights go.

    Raises:
        BudgetError: a share is out of range, or no plan between floor and cap has this total; the feasible range is told.
        InputTypeError: the scores are not of layers.
        InputError: no structure, or a site without a score.

    Example:
        >>> from whatmatters.core.sites import Site
        >>> model = Structure(("h",), (Site("h.a", "h.a.weight", (4, 5), "h"), Site("h.b", "h.b.weight", (4, 5), "h")))
        >>> scores = Scores("layer", {"h.a": torch.tensor(1.0), "h.b": torch.tensor(2.0)}, "mine", {}, structure=model)
        >>> dict(ratios(scores, 0.3).values)
        {'h.a': 0.4, 'h.b': 0.2}
    """
    scores.expect_unit("layer")
    structure = structure or scores.structure
    if structure is None or not structure.sites:
        raise InputError(f"scores of {scores.method!r} know no sizes; give structure=, from whatmatters.structure(model)")
    scores.check_structure(structure)
    wanted, least, most = _share(sparsity, "sparsity"), _share(floor, "floor"), _share(cap, "cap")
    sizes = [site.size for site in structure.sites]
    low, high = [math.ceil(least * size) for size in sizes], [math.floor(most * size) for size in sizes]
    total, pruned = sum(sizes), math.ceil(wanted * sum(sizes))
    if any(a > b for a, b in zip(low, high, strict=True)) or not sum(low) <= pruned <= sum(high):
        raise BudgetError(
            f"sparsity {float(wanted):g} with floor {float(least):g} and cap {float(most):g}; the feasible range is {sum(low) / total:g} "
            f"to {sum(high) / total:g}: change the sparsity, lower the floor or raise the cap"
        )
    lifted = scores.lift(structure)
    ranks = _ranks({name: -value.item() for name, value in lifted.stakes().values.items()})
    counts = _poured([ranks[site.name] * site.size for site in structure.sites], low, high, pruned)
    values = {site.name: count / site.size for site, count in zip(structure.sites, counts, strict=True)}
    account = {
        "achieved": pruned / total,
        "pruned": pruned,
        "kept": total - pruned,
        "unused": float(pruned - wanted * total),
        "smallest_step": 1,
    }
    budget = {"sparsity": float(wanted), "floor": float(least), "cap": float(most)}
    return Plan("ratio", values, budget, account, scores.method, {"scores": dict(scores.settings)}, structure)


def _poured(slopes: list[Fraction], low: list[int], high: list[int], total: int) -> list[int]:
    """Whole numbers near clamp(factor * slope, low, high) with an exact total: the factor by water-filling, then by remainder."""
    # Between two neighbouring turns of the factor the sum is linear; walk them upwards.
    turns: list[tuple[Fraction, int, int]] = []
    for site, slope in enumerate(slopes):
        turns += [(low[site] / slope, 0, site), (high[site] / slope, 1, site)]
    factor, steepness, level = Fraction(0), Fraction(0), Fraction(sum(low))
    for turn, ends, site in sorted(turns):
        if steepness and level + steepness * (turn - factor) >= total:
            break
        level += steepness * (turn - factor)
        factor = turn
        steepness += -slopes[site] if ends else slopes[site]
    if steepness:
        factor += (total - level) / steepness
    exact = [min(max(factor * slope, Fraction(a)), Fraction(b)) for slope, a, b in zip(slopes, low, high, strict=True)]
    counts = [math.floor(value) for value in exact]
    # Equal remainders go to the later site: the earlier of two equals is the more important.
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], -i))
    for site in by_remainder[: total - sum(counts)]:
        counts[site] += 1
    return counts


@door("allocate.sampling")
def sampling(scores: Scores, budget: int) -> Plan:
    """Inclusion probabilities proportional to the scores, none above 1, that add up to the number of units to be kept.

    Args:
        scores: any unit; finite and not negative. Padding is never included.
        budget: how many units over all names, from 0 to their number.

    Returns:
        A plan of kind "sampling"; draw from it with `sample`, which keeps these probabilities.

    Raises:
        BudgetError: the budget is out of range.
        InputError: negative scores, or a loss table.

    Example:
        >>> scores = Scores("sample", {"text": torch.tensor([6.0, 1.0, 1.0])}, "mine", {})
        >>> sampling(scores, 2).values["text"].tolist()
        [1.0, 0.5, 0.5]
    """
    if scores.scale == "loss":
        raise InputError("a loss table cannot be sampled from; give scores of scale 'rank', such as its stakes()")
    places = {n: torch.ones_like(v, dtype=torch.bool) if scores.valid is None else scores.valid[n] for n, v in scores.values.items()}
    pieces = [value[places[name]].double() for name, value in scores.values.items()]
    for name, piece in zip(scores.values, pieces, strict=True):
        if float(piece.min()) < 0:
            raise InputError(
                f"scores of {name!r} go down to {float(piece.min()):g}; expected none below 0: use normalized('minmax') or rank()"
            )
    flat = torch.cat(pieces)
    if isinstance(budget, bool) or not 0 <= budget <= len(flat):
        raise BudgetError(f"a budget of {budget} of {len(flat)} units; the feasible range is 0 to {len(flat)} whole units")
    shares = probabilities(flat, budget)
    values = {}
    for (name, value), share in zip(scores.values.items(), shares.split([len(p) for p in pieces]), strict=True):
        values[name] = torch.zeros(value.shape, dtype=torch.float64).masked_scatter(places[name], share)
    account = {"achieved": float(shares.sum()), "unused": 0, "smallest_step": 1, "units": len(flat), "certain": int((shares == 1).sum())}
    settings = {"unit": scores.unit, "scores": dict(scores.settings)}
    return Plan("sampling", values, {"units": budget}, account, scores.method, settings, scores.structure)
