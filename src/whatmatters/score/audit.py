"""Audit: which importance score tells the truth about this model. Every layer scorer against measured damage, with its uncertainty.

The truth is `ablate`: each unit is damaged alone and the loss is measured. What a plan of bits needs is an order of damage for each weight
it takes bits from, so damage and scores are compared per weight. The units are the whole model, not a sample of one; what is uncertain is
the text. So intervals come from a bootstrap over its documents, which measures the truth anew, and p-values from permutations of the units,
which say how often an order that knows nothing does as well.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy import stats
from torch import Tensor, nn

from whatmatters.core.catalog import Entry, door, get_scorer
from whatmatters.core.catalog import scorers as known_scorers
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, ModelError
from whatmatters.core.evaluate import judging
from whatmatters.core.formats import QuantizedWeight, dequantize
from whatmatters.core.grids import fit_grid
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import Seed, derived, generator
from whatmatters.core.sites import Site, Structure
from whatmatters.score._agreement import draws, interval, permutations, share_above, spearman, standard
from whatmatters.score._audit import Audit, AuditCurve, AuditRow
from whatmatters.score._common import base_seed, check_by, data_settings, structure_of
from whatmatters.score._losses import Documents, FromBlock, Rounding, check_language, damaged, groups_of, skipped
from whatmatters.score.ablation import Ablation, ablate

__all__ = ["Audit", "AuditCurve", "AuditRow", "audit"]

SIGNIFICANT = 0.05


@door("score.audit")
def audit(
    model: nn.Module,
    calibration: Calibration,
    text: Calibration,
    *,
    scorers: Sequence[str | Scores] | None = None,
    by: Literal["block", "site"] = "site",
    truth: Ablation | Scores | None = None,
    damage: Literal["quantize", "skip"] = "quantize",
    bits: int = 2,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_search: bool = True,
    steps: int = 4,
    orders: int = 4,
    curve_samples: int | None = 16,
    seed: Seed = 0,
    resamples: int = 2000,
    confidence: float | int = 0.95,
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Judge importance scores by the damage they should have foreseen, on this very model.

    Args:
        model: a causal language model whose blocks form a chain; unchanged.
        calibration: token windows that scores are made from.
        text: other token windows, with several documents (`data.windows`), that damage is measured on.
        scorers: names of layer scorers and Scores of your own; None: all in the catalog, leaving out those that the model does not allow.
        by: units: "site" for groups of sites that read the same input, which a plan gives equal bits, or "block".
        truth: damage that was measured before, by `ablate` (best) or as Scores; None: measured here.
        damage: "quantize" rounds units to the nearest at `bits`; "skip" leaves blocks out (only `by="block"`).
        bits: width that damaged weights are rounded to, 2 to 8.
        group_size: inputs that share a scale; -1: one scale per output channel; None: 128 where that divides a site's inputs, else -1.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        steps: damage curves are measured at this many shares of the weights besides 0, evenly spaced up to all; at least 2.
        orders: random orders to compare with, at least 1.
        curve_samples: damage curves are measured on this many windows, spread evenly over the text; None for all. Damage that has added
            up shows on less text than that of a single unit.
        seed: decides random orders, resamples, permutations and the scorers that draw.
        resamples: bootstrap resamples of the documents, at least 100.
        confidence: of all intervals.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each step of each part.

    Returns:
        `Audit`.

    Raises:
        InputError: a setting out of range, fewer than three units, a truth for other units, two scores of one name.
        InputTypeError: scores of a unit that has no layer scores.
        UnknownNameError: no such layer scorer.
        ModelError: no language model, or its blocks do not form a chain.
        DataError: text or calibration data do not fit the model.
        NonFiniteError: a weight, an activation or a loss is NaN or infinite.

    Example:
        >>> class Bigrams(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(8, 8)
        ...         self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        ...
        ...     def forward(self, ids):
        ...         hidden = self.embed(ids)
        ...         for block in self.blocks:
        ...             hidden = block(hidden)
        ...         return hidden
        >>> data = Calibration.from_tensors(torch.randint(8, (4, 16), generator=torch.Generator().manual_seed(0)))
        >>> found = audit(Bigrams(), data, data, scorers=["magnitude", "random"])
        >>> len(found.rows), len(found.units)
        (2, 4)

    References:
        Spearman, "The proof and measurement of association between two things", 1904; Westfall and Young, "Resampling-based multiple
        testing", 1993 (the adjusted p-value); Efron and Tibshirani, "An introduction to the bootstrap", 1993.
    """
    started = time.perf_counter()
    check_by(by)
    _check_settings(steps, orders, curve_samples, resamples, confidence)
    found = structure_of(model, structure)
    rounding = Rounding(group_size, symmetric, clip_search)
    rounding.check(found, [bits])
    check_language(model, calibration)
    check_language(model, text)
    groups = groups_of(found, by)
    if len(groups) < 3:
        raise InputError(f"{len(groups)} units by {by!r}; an order of fewer than three says nothing: use by='site', or a deeper model")
    entries = _entries(scorers, "ablation" if truth is None or isinstance(truth, Ablation) else truth.method)
    base = base_seed(seed)
    if truth is None:
        truth = ablate(
            model, text, by=by, damage=damage, bits=bits, structure=found, progress=progress, **rounding.settings(),
        )  # fmt: skip
    units = _Units(groups, _true_damage(truth, groups, found))
    options = {"by": by, "structure": found, "seed": base, "levels": tuple(sorted({bits, 2, 3, 4, 8})), **rounding.settings()}
    scores, seconds, left_out = _score(model, calibration, entries, options, scorers is None, progress)
    importance = {name: units.importance(value, found, bits) for name, value in scores.items()}
    controls = {entry.slug for entry in entries if isinstance(entry, Entry) and entry.control}

    again = _measured_again(truth, units, resamples, generator(derived(base, "documents"))) if isinstance(truth, Ablation) else None
    agreements = _agreements(importance, units, again, controls, confidence, generator(derived(base, "permutations")))
    names = sorted(importance, key=lambda name: -agreements[name].spearman)
    first = next((name for name in names if name not in controls), names[0])
    ranked = [_Order(name, "scorer", units.ascending(importance[name])) for name in names]
    ranked.append(_Order("measured", "truth", units.ascending(units.per_weight)))
    ranked.append(_Order(f"reversed {first}", "reversed", units.ascending(importance[first])[::-1]))
    draw = generator(derived(base, "orders"))
    ranked += [_Order(f"random {i}", "random", torch.randperm(len(groups), generator=draw).tolist()) for i in range(1, orders + 1)]
    measured = _Curves(model, _spread(text, curve_samples), found, units, damage, _Rounded(rounding, bits), steps)
    measured.run(ranked, progress)

    areas = {order.label: measured.area(order) for order in ranked}
    by_chance = np.mean([areas[order.label] for order in ranked if order.kind == "random"], axis=0)
    weights = draws(len(by_chance), resamples, generator(derived(base, "documents")))
    rows = []
    for name in names:
        saved, saved_interval = _saved(areas[name], by_chance, weights, confidence)
        area = measured.per_token(areas[name])
        rows.append(AuditRow(name, name in controls, **vars(agreements[name]), area=area, saved=saved, saved_interval=saved_interval,
                             seconds=seconds.get(name, 0.0)))  # fmt: skip
    values = np.stack([importance[name] for name in names])
    settings = {
        "by": by, "damage": damage, "bits": bits, **rounding.settings(), "steps": steps, "orders": orders, "curve_samples": curve_samples,
        "seed": seed if isinstance(seed, int) else "generator", "resamples": resamples, "confidence": confidence,
        "calibration": data_settings(calibration), "text": data_settings(text),
    }  # fmt: skip
    best, verdict = _verdict(rows, importance, again, settings, len(groups))
    return Audit(
        verdict=verdict,
        best=best,
        rows=tuple(rows),
        agreement=tuple(tuple(row) for row in spearman(values, values).tolist()),
        curves=tuple(measured.curve(order) for order in ranked),
        units=units.names,
        members=tuple(tuple(site.name for site in sites) for sites in groups.values()),
        sizes=tuple(units.sizes.tolist()),
        damage=tuple(units.damage.tolist()),
        damage_intervals=_damage_intervals(again, units, confidence),
        importance={name: tuple(importance[name].tolist()) for name in names},
        loss=truth.loss if isinstance(truth, Ablation) else measured.loss,
        ceiling=None if again is None else float(spearman(again, units.per_weight[None]).mean()),
        documents=len(Documents.of(text).counts),
        skipped=left_out,
        settings=settings,
        seconds=time.perf_counter() - started,
        scores=scores,
        truth=truth if isinstance(truth, Ablation) else None,
    )


def _check_settings(steps: int, orders: int, curve_samples: int | None, resamples: int, confidence: float | int) -> None:
    if steps < 2 or orders < 1:
        raise InputError(f"steps is {steps} and orders {orders}; expected at least 2 steps and 1 random order")
    if curve_samples is not None and curve_samples < 1:
        raise InputError(f"curve_samples is {curve_samples}; expected at least 1, or None for all windows")
    if resamples < 100:
        raise InputError(f"resamples is {resamples}; expected at least 100, 2000 for a 95 % interval")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; expected between 0 and 1, for example 0.95")


def _spread(text: Calibration, samples: int | None) -> Calibration:
    """Some windows of a text, spread evenly over it."""
    if samples is None or samples >= len(text):
        return text
    rows = torch.linspace(0, len(text) - 1, samples, dtype=torch.float64).round().long()
    valid = None if text.valid is None else text.valid[rows]
    return Calibration(text.inputs[rows], valid, text.document[rows], text.batch, text.source)


def _entries(wanted: Sequence[str | Scores] | None, truth: str) -> list[Entry | Scores]:
    """The scorers to judge; by default all layer scorers but the one that measured the truth."""
    if wanted is None:
        return [entry for entry in known_scorers("layer", "ahead") if entry.slug != truth]
    if not wanted:
        raise InputError("scorers is empty; expected names of layer scorers or Scores, or None for all")
    return [item if isinstance(item, Scores) else get_scorer(item, "layer", "ahead") for item in wanted]


def _score(
    model: nn.Module,
    calibration: Calibration,
    entries: Sequence[Entry | Scores],
    options: Mapping[str, Any],
    skip: bool,
    progress: Progress | None,
) -> tuple[dict[str, Scores], dict[str, float], dict[str, str]]:
    """The scores by name, the seconds each took, and what was skipped because the model does not allow it."""
    scores: dict[str, Scores] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        name = entry.method if isinstance(entry, Scores) else entry.slug
        if name in scores:
            raise InputError(f"two scores are named {name!r}; give Scores a method of their own to tell them apart")
        if isinstance(entry, Scores):
            entry.expect_unit("layer", "weight")
            scores[name] = entry
            continue
        accepted = inspect.signature(entry.function).parameters
        given = {key: value for key, value in {**options, "progress": progress}.items() if key in accepted}
        started = time.perf_counter()
        try:
            scores[name] = entry.function(model, calibration, **given)
        except ModelError as error:
            if not skip:
                raise
            left_out[name] = str(error).partition("\n")[0]
        seconds[name] = time.perf_counter() - started
    return scores, seconds, left_out


class _Units:
    """The units of an audit with their measured damage; all comparisons are per weight."""

    def __init__(self, groups: Mapping[str, tuple[Site, ...]], damage: Float64[np.ndarray, " units"]) -> None:
        self.groups = groups
        self.names = tuple(groups)
        self.sizes: Int64[np.ndarray, " units"] = np.array([sum(site.size for site in sites) for sites in groups.values()])
        self.damage = damage
        self.per_weight = damage / self.sizes

    def importance(self, scores: Scores, found: Structure, bits: int) -> Float64[np.ndarray, " units"]:
        """A score for each unit, per weight: the mean over its weights, or its losses (at `bits` if the table has them) over its size."""
        if scores.unit == "weight":
            scores = scores.reduce("mean")
        scores.check_structure(found)
        lifted = {name: value.double().numpy() for name, value in scores.lift(found).values.items()}
        if scores.scale == "loss":
            column = scores.levels.index(bits) if bits in scores.levels else 0
            totals = [sum(lifted[site.name][column] - lifted[site.name][-1] for site in sites) for sites in self.groups.values()]
            return np.array(totals) / self.sizes
        # A mean taken around the first member: members with equal scores give that score exactly, so ties stay ties.
        firsts = np.array([lifted[sites[0].name] for sites in self.groups.values()])
        around = zip(firsts, self.groups.values(), strict=True)
        return firsts + np.array([sum((lifted[site.name] - one) * site.size for site in sites) for one, sites in around]) / self.sizes

    def ascending(self, importance: Float64[np.ndarray, " units"]) -> list[int]:
        """Units from the least important on; of equal ones the later is the less important."""
        return sorted(range(len(importance)), key=lambda unit: (importance[unit], -unit))

    def share(self, chosen: Sequence[int]) -> float:
        """Share of all weights that some units hold."""
        return float(self.sizes[list(chosen)].sum() / self.sizes.sum())

    def stops(self, order: Sequence[int], steps: int) -> list[int]:
        """How many units of an order make up 0, 1/steps, 2/steps ... of the weights, as nearly as whole units can."""
        upto = np.cumsum(self.sizes[list(order)]) / self.sizes.sum()
        inner = [int(np.abs(upto[:-1] - step / steps).argmin()) + 1 for step in range(1, steps)]
        return [0, *inner, len(order)]


def _true_damage(truth: Ablation | Scores, groups: Mapping[str, tuple[Site, ...]], found: Structure) -> Float64[np.ndarray, " units"]:
    if isinstance(truth, Ablation):
        if truth.units != tuple(groups):
            raise InputError(
                f"the truth is about {len(truth.units)} units such as {truth.units[0]!r}; expected {next(iter(groups))!r}: see by="
            )
        return truth.damage
    truth.expect_unit("layer")
    if truth.scale != "rank":
        raise InputError("the truth is a loss table; expected one measured damage for each block or site, as ablation gives")
    truth.check_structure(found)
    names = [[name] if name in truth.values else [site.name for site in sites] for name, sites in groups.items()]
    lacking = next((name for members in names for name in members if name not in truth.values), None)
    if lacking is not None:
        raise InputError(f"the truth has no damage for {lacking!r}; expected it for each unit: see by=")
    return np.array([np.mean([float(truth.values[name]) for name in members]) for members in names])


def _measured_again(truth: Ablation, units: _Units, resamples: int, draw: torch.Generator) -> Float64[np.ndarray, "resamples units"] | None:
    """Damage per weight, measured on each resample of the documents; None where there is but one."""
    if len(truth.counts) < 2:
        return None
    weights = draws(len(truth.counts), resamples, draw)
    return (weights @ (truth.nats - truth.base).T) / (weights @ truth.counts)[:, None] / units.sizes


def _damage_intervals(
    again: Float64[np.ndarray, "resamples units"] | None, units: _Units, confidence: float | int
) -> tuple[tuple[float, float], ...] | None:
    if again is None:
        return None
    low, high = interval(again * units.sizes, confidence)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


@dataclass(frozen=True)
class _Agreement:
    spearman: float
    interval: tuple[float, float] | None
    p: float
    p_adjusted: float | None
    kendall: float
    top: float


def _agreements(
    importance: Mapping[str, Float64[np.ndarray, " units"]],
    units: _Units,
    again: Float64[np.ndarray, "resamples units"] | None,
    controls: set[str],
    confidence: float | int,
    draw: torch.Generator,
) -> dict[str, _Agreement]:
    names = list(importance)
    values = np.stack([importance[name] for name in names])
    observed = spearman(values, units.per_weight[None])[:, 0]
    intervals = None if again is None else interval(spearman(again, values), confidence)
    permuted, exact = permutations(len(units.names), draw)
    by_chance = standard(values) @ standard(units.per_weight[None])[0][permuted].T
    judged = np.array([name not in controls for name in names])
    best_by_chance = by_chance[judged].max(axis=0) if judged.any() else None
    size = math.ceil(len(units.names) / 4)
    most_damaging = set(units.ascending(units.per_weight)[-size:])
    result = {}
    for i, name in enumerate(names):
        tau = stats.kendalltau(values[i], units.per_weight).statistic
        result[name] = _Agreement(
            spearman=float(observed[i]),
            interval=None if intervals is None else (float(intervals[0][i]), float(intervals[1][i])),
            p=share_above(by_chance[i], observed[i], exact),
            p_adjusted=None if name in controls or best_by_chance is None else share_above(best_by_chance, observed[i], exact),
            kendall=float(tau) if math.isfinite(tau) else 0.0,
            top=len(most_damaging & set(units.ascending(values[i])[-size:])) / size,
        )
    return result


class _Rounded:
    """Rounded weights of sites, kept as codes and made once: a curve needs them again and again."""

    def __init__(self, rounding: Rounding, bits: int) -> None:
        self.rounding, self.bits = rounding, bits
        self._records: dict[str, QuantizedWeight] = {}

    def __call__(self, site: Site, weight: Tensor) -> Tensor:
        if site.name not in self._records:
            grid = fit_grid(weight, self.bits, self.rounding.grid(site), weight.dtype)
            self._records[site.name] = grid.with_codes(grid.codes_of(weight))
        return dequantize(self._records[site.name], weight.dtype)


@dataclass(frozen=True)
class _Order:
    """An order of the units, the one that is damaged first in front."""

    label: str
    kind: str
    units: list[int]


class _Curves:
    """Losses of the model while units are damaged one after another; each set of units is measured once."""

    def __init__(
        self,
        model: nn.Module,
        text: Calibration,
        found: Structure,
        units: _Units,
        damage: str,
        change: Callable[[Site, Tensor], Tensor],
        steps: int,
    ) -> None:
        self.model, self.text, self.found, self.units, self.damage, self.change, self.steps = (
            model, text, found, units, damage, change, steps,
        )  # fmt: skip
        self.documents = Documents.of(text)
        self.nats: dict[frozenset[int], Float64[np.ndarray, " documents"]] = {}

    def run(self, orders: Sequence[_Order], progress: Progress | None) -> None:
        """Measure all that the curves of these orders need."""
        distinct = list(dict.fromkeys([frozenset[int](), *(chosen for order in orders for chosen in self._sets(order))]))
        with judging(self.model):
            whole = FromBlock(self.model, self.found.blocks, self.text)
            for chosen in track(distinct, "damage curves", len(distinct), progress):
                with self._with(chosen):
                    self.nats[chosen] = self.documents.sums(whole.all_nats())

    def _sets(self, order: _Order) -> list[frozenset[int]]:
        return [frozenset(order.units[:k]) for k in self.units.stops(order.units, self.steps)]

    @contextmanager
    def _with(self, chosen: frozenset[int]) -> Iterator[None]:
        names = [self.units.names[unit] for unit in sorted(chosen)]
        with ExitStack() as stack:
            if self.damage == "skip":
                for name in names:
                    stack.enter_context(skipped(self.model, name))
            else:
                stack.enter_context(damaged(self.model, [site for name in names for site in self.units.groups[name]], self.change))
            yield

    @property
    def loss(self) -> float:
        """Loss of the intact model."""
        return self.per_token(self.nats[frozenset()])

    def per_token(self, nats: Float64[np.ndarray, " documents"]) -> float:
        """Nats a token."""
        return float(nats.sum() / self.documents.counts.sum())

    def _points(self, order: _Order) -> tuple[list[float], Float64[np.ndarray, "points documents"]]:
        sets = self._sets(order)
        return [self.units.share(sorted(chosen)) for chosen in sets], np.stack([self.nats[s] - self.nats[frozenset()] for s in sets])

    def curve(self, order: _Order) -> AuditCurve:
        """The damage curve of an order."""
        shares, rises = self._points(order)
        return AuditCurve(order.label, order.kind, tuple(shares), tuple(self.per_token(rise) for rise in rises))

    def area(self, order: _Order) -> Float64[np.ndarray, " documents"]:
        """Area under the curve of each document, in nats."""
        shares, rises = self._points(order)
        return np.trapezoid(rises, shares, axis=0)


def _saved(
    area: Float64[np.ndarray, " documents"],
    by_chance: Float64[np.ndarray, " documents"],
    weights: Float64[np.ndarray, "resamples documents"],
    confidence: float | int,
) -> tuple[float | None, tuple[float, float] | None]:
    """Part of the area of random orders that is avoided, and its interval over resamples of the documents."""
    if by_chance.sum() <= 0:
        return None, None
    saved = float(1 - area.sum() / by_chance.sum())
    drawn = weights @ by_chance
    if len(area) < 2 or not (drawn > 0).all():
        return saved, None
    low, high = interval(1 - (weights @ area) / drawn, confidence)
    return saved, (float(low), float(high))


def _verdict(
    rows: Sequence[AuditRow],
    importance: Mapping[str, Float64[np.ndarray, " units"]],
    again: Float64[np.ndarray, "resamples units"] | None,
    settings: Mapping[str, Any],
    count: int,
) -> tuple[str | None, str]:
    """The scorer to trust, if any, and the sentence that says how much."""
    judged = [row for row in rows if not row.control]
    what = "blocks" if settings["by"] == "block" else "groups of sites"
    how = f"rounding to {settings['bits']} bits" if settings["damage"] == "quantize" else "leaving them out"
    if not judged:
        return None, "Only controls were judged, so there is no score to trust."
    best = judged[0]
    correlation = f"rank correlation {best.spearman:.2f}"
    if best.interval is not None:
        correlation += f", {100 * settings['confidence']:g} % interval {best.interval[0]:.2f} to {best.interval[1]:.2f}"
    chance = f"{100 * (best.p_adjusted or 0):.2g} %"
    if best.p_adjusted is None or best.p_adjusted > SIGNIFICANT:
        tried = f"the best of {len(judged)} random orders would" if len(judged) > 1 else "a random order would"
        return None, (
            f"No score can be told from a random order on this model: the best, {best.scorer}, agrees with the damage measured by {how} "
            f"in {count} {what} ({correlation}) no better than {tried} {chance} of the time; measure the damage itself, or give all equal "
            "bits."
        )
    saved = ""
    if best.saved is not None:
        saved = (
            f"damaging by its order {'avoids' if best.saved >= 0 else 'adds'} {abs(100 * best.saved):.0f} % of the loss of random orders"
        )
        saved = f"; {saved}"
    useless = [row.scorer for row in judged if row.p_adjusted is not None and row.p_adjusted > SIGNIFICANT]
    rivals = [row for row in judged[1:] if row.scorer not in useless]
    alike = _not_told_apart(best, rivals, importance, again, float(settings["confidence"]))
    more = f"; on this text it cannot be told apart from {_listed(alike)}" if alike else ""
    more += f"; not to be told from random: {_listed(useless)}" if useless else ""
    sentence = f"Trust {best.scorer}: its order agrees with the damage measured by {how} in {count} {what} ({correlation}){saved}{more}."
    return best.scorer, sentence


def _not_told_apart(
    best: AuditRow,
    others: Sequence[AuditRow],
    importance: Mapping[str, Float64[np.ndarray, " units"]],
    again: Float64[np.ndarray, "resamples units"] | None,
    confidence: float | int,
) -> list[str]:
    """Scorers that do at least as well as the best on more resamples of the documents than the confidence allows."""
    if again is None:
        return []
    leading = spearman(again, importance[best.scorer][None])[:, 0]
    return [row.scorer for row in others if (spearman(again, importance[row.scorer][None])[:, 0] >= leading).mean() > (1 - confidence) / 2]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
