"""The report: one HTML file that tells what a run found, made from the run's `results.json` and from nothing else.

It opens offline: styles and figures are inside, nothing is loaded from anywhere, and all of it can be read without scripts (the only one
copies commands). Everything that comes from models, texts and files is escaped.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.stats import rankdata

from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.render import change, colour_css, environment, megabytes, percent, printable, spread
from whatmatters.pages import figures
from whatmatters.pages.naming import Naming, by_level
from whatmatters.pages.results import Arm, Audit, Continuation, Results, Scorer, Tokens

__all__ = ["FILE_NAME", "page", "render"]

FILE_NAME = "report.html"
LISTED = 4  # most and least important parts
SHOWN_TOKENS = 5


def render(run_dir: str | os.PathLike[str]) -> Path:
    """Make `report.html` from the `results.json` of a run's folder, beside it.

    Args:
        run_dir: the folder.

    Returns:
        The path of the page. The same results give the same bytes.

    Raises:
        FileError: there are no results, or the page cannot be written.
        FormatError: the results are malformed.
    """
    results = Results.load(Path(run_dir))
    path = Path(run_dir) / FILE_NAME
    with atomic_file(path) as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    return path


def page(results: Results) -> str:
    """The HTML of the report."""
    naming = Naming(results.model)
    arms = {arm.id: arm for arm in results.arms}
    audit = results.audit
    return (
        environment("whatmatters.pages")
        .get_template("report.html.j2")
        .render(
            results=results,
            colours=colour_css(),
            verdict=verdict(results),
            audit=audit,
            scorers=sorted(audit.scorers, key=lambda scorer: -scorer.correlation) if audit else (),
            arms=arms,
            best=arms.get(results.best or ""),
            dense=next((arm for arm in results.arms if arm.role == "dense"), None),
            figures=_figures(results, naming),
            listed=_listed(audit, naming) if audit else None,
            continuations=_continuations(results.continuations, arms),
            tokens=_shaded(results.tokens) if results.tokens else None,
            plan=_plan(arms[results.best], naming) if results.best else (),
            settings=_flat(results.settings),
            total=sum(stage.seconds for stage in results.stages),
            spread=spread,
        )
    )


@dataclass(frozen=True)
class Verdict:
    """The first sentences: what came of it, who paid, and what it does not do."""

    headline: str
    paid: str
    speed: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.headline, self.paid, self.speed) if part)


def verdict(results: Results) -> Verdict | None:
    """What came of it, in words; None where nothing was compressed."""
    dense = next((arm for arm in results.arms if arm.role == "dense"), None)
    best = next((arm for arm in results.arms if arm.id == results.best), None)
    if dense is None or best is None:
        return None
    told = "smaller" if best.bytes < dense.bytes else "larger"
    interval = "" if best.low is None else f" ({round(100 * results.confidence)} % interval {spread(best.low, best.high)})"
    headline = (
        f"From {megabytes(dense.bytes)} to {megabytes(best.bytes)}, {percent(abs(1 - best.bytes / dense.bytes), 0)} {told}; "
        f"perplexity {change(best.change)}{interval}."
    )
    return Verdict(printable(headline), _paid(best, Naming(results.model)), _speed(best))


def _paid(arm: Arm, naming: Naming) -> str:
    levels = by_level(arm.levels)
    if not levels:
        return ""
    total = sum(map(len, levels.values()))
    who = f"“{arm.label}”: "
    if len(levels) == 1:
        return f"{who}all {total} sites paid alike, at {next(iter(levels))} bits."
    (low, paid), (high, spared) = next(iter(levels.items())), list(levels.items())[-1]
    told = f"{who}{len(paid)} of {total} sites paid most, at {low} bits: {naming.by_part(paid, 2)}. "
    return told + (f"The others kept {high} bits." if len(levels) == 2 else f"{len(spared)} kept {high} bits: {naming.by_part(spared, 2)}.")


def _speed(arm: Arm) -> str:
    if not arm.levels:
        return ""
    return "It is smaller, not faster: transformers unpacks the weights to full size at the first forward pass."


def _figures(results: Results, naming: Naming) -> Mapping[str, Markup]:
    made: dict[str, Markup] = {}
    if results.audit is not None:
        made["correlations"] = figures.correlations(results.audit)
        if results.audit.curves:
            made["curves"] = figures.curves(results.audit)
        made["heat"] = figures.heat(results.audit, naming)
        made["agreement"] = figures.agreement(results.audit, naming, _spearman)
    if len(results.arms) > 1:
        made["frontier"] = figures.frontier(results.arms, results.best)
    return made


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; 0 where one of them is constant, which ranks nothing."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


@dataclass(frozen=True)
class _Part:
    name: str
    block: str
    damage: float
    density: float  # for each million weights
    rank: int  # by the best score, 1 for the most important


def _listed(audit: Audit, naming: Naming) -> Mapping[str, Any]:
    """The parts whose damage costs most and least, with their rank by the score to trust."""
    judge = _judge(audit)
    damage = figures.per_weight(audit, naming)
    places = sorted(range(len(audit.units)), key=lambda i: -damage[i])
    ranks = {place: rank for rank, place in enumerate(sorted(places, key=lambda i: (-judge.values[i], i)), 1)}
    parts = [
        _Part(naming.unit(audit.units[i]), naming.block_label(audit.units[i][0]), audit.damage[i], 1e6 * damage[i], ranks[i])
        for i in places
    ]
    few = min(LISTED, len(parts) // 2) or 1
    return {"judge": judge.name, "most": parts[:few], "least": parts[::-1][:few]}


def _judge(audit: Audit) -> Scorer:
    """The scorer to trust, or the first one where none is better than chance."""
    ordered = sorted(audit.scorers, key=lambda scorer: (scorer.name != audit.best, scorer.control, -scorer.correlation))
    return ordered[0]


@dataclass(frozen=True)
class _Continued:
    arm: Arm
    same: str  # as far as it is what the dense model wrote
    rest: str


def _continuations(found: Sequence[Continuation], arms: Mapping[str, Arm]) -> list[_Continued]:
    reference = next((c.text for c in found if arms[c.arm].role == "dense"), "")
    continued = []
    for each in found:
        dense = arms[each.arm].role == "dense"
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reference, each.text, strict=False))
        same = 0 if dense else sum(1 for _ in alike)
        continued.append(_Continued(arms[each.arm], each.text[:same], each.text[same:]))
    return continued


@dataclass(frozen=True)
class _Shaded:
    text: str
    shade: int  # 0 to 100
    value: float


def _shaded(found: Tokens) -> Mapping[str, Any]:
    """Tokens with the shade of their rank, and the most important ones apart: shades alone tell nothing to those who do not see them."""
    values = [token.value for token in found.tokens]
    shades = rankdata(values, method="average") if values else []
    span = max(1, len(values) - 1)
    tokens = [
        _Shaded(token.text, round(100 * ((rank - 1) / span) ** 3), token.value) for token, rank in zip(found.tokens, shades, strict=True)
    ]
    total = sum(values)
    leading = sorted(range(len(tokens)), key=lambda i: (-values[i], i))[:SHOWN_TOKENS]
    return {
        "tokens": tokens,
        "leading": [(_visible(tokens[i].text), values[i] / total if total > 0 else None, i) for i in leading],
    }


def _visible(text: str) -> str:
    """A token whose blanks can be seen."""
    return text.replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}").replace(" ", "\N{OPEN BOX}")


def _plan(arm: Arm, naming: Naming) -> list[tuple[int, int, str]]:
    """(bits, number of sites, which) of the best arm, the lowest bits first."""
    return [(bits, len(names), naming.by_part(names, 8)) for bits, names in by_level(arm.levels).items()]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (dotted name, value) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{name}, ")
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(map(str, value))))
        else:
            pairs.append((name, _setting(value)))
    return pairs


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
