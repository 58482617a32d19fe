"""The report's figures. Each is painted twice, for a wide and for a narrow page, so that its text keeps its size on a phone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from whatmatters.core.render import ACCENT, INK, MUTED, PAPER, RULE, SOFT, change, fixed, megabytes, svg
from whatmatters.pages.naming import Naming
from whatmatters.pages.results import Arm, Audit, Curve

__all__ = ["agreement", "correlations", "curves", "frontier", "heat", "per_weight"]

WIDE, FRONTIER, HALF, NARROW = 1040.0, 800.0, 520.0, 344.0
LONGEST = 32  # characters of a name in a figure
LINE = 22.0  # height of a row of text
LARGEST_HEAT = 64  # columns; beyond that blocks stand for their sites


def _both(
    paint: Callable[..., None], *, name: str, wide: float, height: float | int, narrow_height: float | int, title: str, description: str
) -> Markup:
    """The two versions; CSS shows the one that fits, and the other is hidden from screen readers too."""
    made = []
    for kind, width, tall in (("wide", wide, height), ("narrow", NARROW, narrow_height)):
        draw = functools.partial(paint, width=width)
        made.append(svg(draw, name=f"{name}-{kind}", width=width, height=tall, title=title, description=description, class_name=kind))
    return Markup("").join(made)


def _brief(name: str) -> str:
    """A name that leaves room for the figure; the tables have it whole."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def correlations(audit: Audit) -> Markup:
    """Each scorer's rank correlation with the measured damage, with its interval."""
    ordered = sorted(audit.scorers, key=lambda scorer: -scorer.correlation)

    def paint(figure: Any, width: float) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color=SOFT, linewidth=0.8, zorder=0)
        if audit.ceiling is not None:
            axes.axvline(audit.ceiling, color=SOFT, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=0)
        for place, scorer in enumerate(ordered):
            colour = ACCENT if scorer.name == audit.best else SOFT if scorer.control else INK
            if scorer.low is not None and scorer.high is not None:
                axes.plot([scorer.low, scorer.high], [place, place], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round")
            axes.plot([scorer.correlation], [place], marker="o", markersize=6.5, color=colour, markeredgecolor=PAPER, markeredgewidth=1)
            axes.annotate(
                fixed(scorer.correlation), (1.0, place), xycoords=("axes fraction", "data"), xytext=(34, 0),
                textcoords="offset points", va="center", ha="right", fontsize=11.5, color=colour if scorer.name == audit.best else MUTED,
            )  # fmt: skip
        low = min([-0.25, *(s.low if s.low is not None else s.correlation for s in ordered)])
        axes.set_xlim(max(-1.02, low - 0.05), 1.03)
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.set_yticks(range(len(ordered)), [_brief(scorer.name) + (" (control)" if scorer.control else "") for scorer in ordered])
        for label, scorer in zip(axes.get_yticklabels(), ordered, strict=True):
            label.set_color(ACCENT if scorer.name == audit.best else MUTED if scorer.control else INK)
            label.set_fontweight("bold" if scorer.name == audit.best else "normal")
        axes.tick_params(axis="y", length=0, pad=6)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1] if low < -0.5 else [0, 0.5, 1] if low > -0.45 else [-0.5, 0, 0.5, 1])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("rank correlation with measured damage" if width > NARROW else "correlation with measured damage")

    told = "; ".join(f"{s.name} {fixed(s.correlation)} ({fixed(s.low)} to {fixed(s.high)})" for s in ordered)
    tall = 62 + LINE * len(ordered)
    return _both(
        paint, name="correlations", wide=HALF, height=max(tall, 270), narrow_height=tall, title="Which score tells the truth",
        description=f"Rank correlation of each score with the damage measured on this model, with its interval: {told}.",
    )  # fmt: skip


_LINES: Mapping[str, Mapping[str, Any]] = {
    "score": {"color": ACCENT, "linewidth": 2.6, "zorder": 4},
    "damage": {"color": INK, "linewidth": 1.4, "linestyle": (0, (1, 1.6)), "zorder": 3},
    "reverse": {"color": INK, "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 3},
    "random": {"color": SOFT, "linewidth": 1.2, "zorder": 1},
}


def curves(audit: Audit) -> Markup:
    """Damage against the share of the model that is damaged, by the best score, reversed, at random and by the truth."""

    def paint(figure: Any, width: float) -> None:
        axes = figure.add_subplot()
        for curve in audit.curves:
            axes.plot(curve.share, curve.damage, **_LINES[curve.order])
        axes.set_xlim(0, 1.02)
        axes.set_ylim(bottom=min(0.0, *(min(c.damage) for c in audit.curves)))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("share of the weights damaged, least important first" if width > NARROW else "share damaged, least important first")
        axes.set_ylabel("added nats a token")
        figure.legend(
            handles=_handles(audit.curves), loc="outside upper left", ncols=2 if width > NARROW else 1, handlelength=2.1, labelspacing=0.3
        )

    told = "; ".join(f"{c.name}: {fixed(_at(c, 0.5), 3)} at half" for c in audit.curves)
    return _both(
        paint, name="curves", wide=HALF, height=max(62 + LINE * len(audit.scorers), 270), narrow_height=310,
        title="Damage when the least important goes first",
        description=f"Loss added as a growing share of the weights is damaged, in several orders: {told}. Lower is better.",
    )  # fmt: skip


def _at(curve: Curve, share: float) -> float:
    """The damage at a share, between the measured points."""
    points = list(zip(curve.share, curve.damage, strict=True))
    for (a, low), (b, high) in pairwise(points):
        if a <= share <= b:
            return low if a == b else low + (high - low) * (share - a) / (b - a)
    return points[-1][1]


def _handles(found: Sequence[Curve]) -> list[Any]:
    """One legend entry for each kind of curve, the worst first, as they lie in the figure."""
    from matplotlib.lines import Line2D

    kinds: dict[tuple[str, str], list[float]] = {}
    for curve in found:
        kinds.setdefault((curve.order, curve.name), []).append(_at(curve, 0.5))
    ordered = sorted(kinds, key=lambda kind: -sum(kinds[kind]) / len(kinds[kind]))
    return [Line2D([], [], label=_brief(name), **_LINES[order]) for order, name in ordered]


def _shades(values: Sequence[float]) -> list[float]:
    """Ranks from 0 to 1, equal values alike."""
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    last = {value: first[value] + ordered.count(value) - 1 for value in set(values)}
    most = max(1, len(values) - 1)
    return [(first[v] + last[v]) / 2 / most for v in values]


def per_weight(audit: Audit, naming: Naming) -> list[float]:
    """The measured damage as scores are compared with it."""
    return [damage / naming.size(unit) for damage, unit in zip(audit.damage, audit.units, strict=True)]


def heat(audit: Audit, naming: Naming) -> Markup:
    """Scorers by units, shaded by rank, the measured damage first."""
    groups: list[tuple[str, list[int]]] = []  # name of the block, places of its units
    for place, unit in enumerate(audit.units):
        block = naming.block_label(unit[0])
        if not groups or groups[-1][0] != block:
            groups.append((block, []))
        groups[-1][1].append(place)
    whole = len(audit.units) > LARGEST_HEAT and len(groups) < len(audit.units)

    def row(values: Sequence[float]) -> list[float]:
        shades = _shades(values)
        return _shades([sum(shades[i] for i in places) / len(places) for _, places in groups]) if whole else shades

    ordered = sorted(audit.scorers, key=lambda scorer: -scorer.correlation)
    rows = [("measured damage", row(per_weight(audit, naming))), *((scorer.name, row(scorer.values)) for scorer in ordered)]
    columns = len(rows[0][1])

    def paint(figure: Any, width: float) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import to_rgba
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot()
        gap = 0.35  # between the truth and the scores
        tops = [0.0, *(number + gap for number in range(1, len(rows)))]
        patches, colours = [], []
        for top, (_, shades) in zip(tops, rows, strict=True):
            for column, shade in enumerate(shades):
                patches.append(Rectangle((column, top), 1, 0.92))
                colours.append(to_rgba(ACCENT if top else INK, 0.04 + 0.9 * shade**1.6))
        axes.add_collection(PatchCollection(patches, facecolors=colours, edgecolors="none"))
        axes.set_xlim(0, columns)
        axes.set_ylim(tops[-1] + 1, 0)
        axes.set_yticks([top + 0.46 for top in tops], [_brief(name) for name, _ in rows])
        for label, (name, _) in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(ACCENT if name == audit.best else INK)
            label.set_fontweight("bold" if name == audit.best else "normal")
        edges = list(range(columns + 1)) if whole else [places[0] for _, places in groups] + [columns]
        for edge in edges[1:-1] if len(groups) > 1 else []:
            axes.plot([edge, edge], [0, tops[-1] + 0.92], color=PAPER, linewidth=2.0)
        step = max(1, -(-len(groups) * 22 // int(width * 0.6)))
        shown = list(range(0, len(groups), step))
        axes.set_xticks([(edges[n] + edges[n + 1]) / 2 for n in shown], [groups[n][0] for n in shown])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        told = "block, parts in their order" if width <= NARROW else "block, and in it the parts in the order they run"
        axes.set_xlabel("block" if whole or len(groups) == columns else told)

    tall = 40 + LINE * (len(rows) + 0.5)
    return _both(
        paint, name="heat", wide=WIDE, height=tall, narrow_height=tall, title="What matters, by score and place",
        description="Each row is a score, each column a part of the model; the stronger the colour, the higher its rank. The first row is "
        "the measured damage, per weight. The most and the least important parts are listed below.",
    )  # fmt: skip


def agreement(audit: Audit, naming: Naming, correlate: Callable[[Sequence[float], Sequence[float]], float]) -> Markup:
    """Rank correlation of every score with every other and with the damage."""
    ordered = sorted(audit.scorers, key=lambda scorer: -scorer.correlation)
    rows: list[tuple[str, Sequence[float]]] = [("measured damage", per_weight(audit, naming)), *((s.name, s.values) for s in ordered)]
    values = [[correlate(a, b) for _, b in rows] for _, a in rows]

    def paint(figure: Any, width: float) -> None:
        from matplotlib.colors import to_rgba
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot()
        narrow = width <= NARROW
        for down in range(len(rows)):
            for across in range(down + 1):
                value = values[down][across]
                strength = abs(value) ** 1.5
                # Opposite orders are outlined rather than given another hue.
                axes.add_patch(
                    Rectangle(
                        (across + 0.04, down + 0.04), 0.92, 0.92, facecolor=to_rgba(ACCENT, 0.05 + 0.5 * max(value, 0) ** 1.5),
                        edgecolor=to_rgba(INK, 0.75 * strength) if value < -0.2 else "none", linewidth=0.9,
                    )
                )  # fmt: skip
                if down != across:
                    told = fixed(100 * value, 0) if narrow else fixed(value).replace("0.", ".", 1)
                    axes.text(across + 0.5, down + 0.52, told, ha="center", va="center", fontsize=9.4 if narrow else 11.5, color=INK)
        axes.set_xlim(0, len(rows))
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([n + 0.5 for n in range(len(rows))], [f"{_brief(name)}\N{EN SPACE}{n}" for n, (name, _) in enumerate(rows)])
        axes.set_xticks([n + 0.5 for n in range(len(rows))], [str(n) for n in range(len(rows))])
        for label in axes.get_yticklabels():
            label.set_color(INK)
        if narrow:
            axes.set_xlabel("in hundredths")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    told = "; ".join(
        f"{rows[i][0]} and {rows[j][0]} {fixed(values[i][j])}" for i in range(len(rows)) for j in range(i) if abs(values[i][j]) >= 0.7
    )
    return _both(
        paint, name="agreement", wide=HALF, height=40 + 29 * len(rows), narrow_height=52 + 24 * len(rows),
        title="How far the scores agree", description=f"Rank correlations between scores. Strong ones: {told or 'none'}.",
    )  # fmt: skip


_MARKERS = {"dense": "s", "baseline": "o", "method": "o", "control": "X"}


def frontier(arms: Sequence[Arm], best: str | None) -> Markup:
    """Size against perplexity, every arm with its interval; the nearer to the lower left the better."""
    dense = next(arm for arm in arms if arm.role == "dense")
    shown = [arm for arm in arms if arm.role != "dense"] or [dense]

    def paint(figure: Any, width: float) -> None:
        axes = figure.add_subplot()
        axes.axhline(dense.perplexity, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=0)
        for arm in shown:
            colour = ACCENT if arm.id == best else SOFT if arm.role == "control" else INK
            if arm.low is not None and arm.high is not None:
                ends = [dense.perplexity * (1 + bound / 100) for bound in (arm.low, arm.high)]
                axes.plot([arm.bytes / 1e6] * 2, ends, color=colour, linewidth=1.6, alpha=0.45, zorder=2, solid_capstyle="round")
            axes.plot(
                [arm.bytes / 1e6], [arm.perplexity], marker=_MARKERS[arm.role], markersize=9 if arm.id == best else 7,
                color=colour, markeredgecolor=PAPER, markeredgewidth=1, zorder=3,
            )  # fmt: skip
        sizes = [arm.bytes / 1e6 for arm in shown]
        room = (max(sizes) - min(sizes)) or max(sizes) * 0.2
        axes.set_xlim(min(sizes) - 0.12 * room, max(sizes) + 0.12 * room)
        highest = max(max(arm.perplexity, dense.perplexity * (1 + (arm.high or arm.change) / 100)) for arm in shown)
        lowest = min(dense.perplexity, *(dense.perplexity * (1 + (arm.low if arm.low is not None else arm.change) / 100) for arm in shown))
        above = (highest - lowest) or 1.0
        axes.set_ylim(lowest - 0.08 * above, highest + 0.12 * above)
        axes.tick_params(length=3)
        axes.set_xlabel("size on disk, MB")
        axes.set_ylabel("perplexity")
        _label(axes, [(f"dense, {megabytes(dense.bytes)}", axes.get_xlim()[0], dense.perplexity, MUTED, False)] + [
            (arm.label, arm.bytes / 1e6, arm.perplexity, ACCENT if arm.id == best else MUTED if arm.role == "control" else INK, True)
            for arm in shown
        ], width)  # fmt: skip

    told = "; ".join(f"{arm.label} {megabytes(arm.bytes)}, perplexity {fixed(arm.perplexity)} ({change(arm.change)})" for arm in shown)
    return _both(
        paint, name="frontier", wide=FRONTIER, height=max(330, 60 + 21 * len(shown)), narrow_height=max(340, 80 + 19 * len(shown)),
        title="Size against perplexity",
        description=f"The original has {megabytes(dense.bytes)} and perplexity {fixed(dense.perplexity)}. {told}. Lower left is better.",
    )  # fmt: skip


def _label(axes: Any, points: Sequence[tuple[str, float, float, str, bool]], width: float) -> None:
    """Names in a column at the right, in the order of the heights and never on top of each other, thin lines leading to them."""
    low, high = axes.get_ylim()
    step = (high - low) * (17.0 / (240.0 if width <= NARROW else 270.0))
    ordered = sorted(points, key=lambda point: point[2])
    places = [point[2] for point in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + step)
    over = places[-1] - (high - step * 0.3)
    if over > 0:  # too high: the stack is pushed down from the top
        places[-1] -= over
        for index in range(len(places) - 2, -1, -1):
            places[index] = min(places[index], places[index + 1] - step)
    right = axes.get_xlim()[1]
    leader = {"arrowstyle": "-", "color": RULE, "linewidth": 0.9, "linestyle": (0, (2, 2)), "shrinkA": 0, "shrinkB": 5}
    for (name, x, y, colour, line), place in zip(ordered, places, strict=True):
        if line:
            axes.annotate("", (x, y), xytext=(right, place), arrowprops=leader, annotation_clip=False, zorder=1)
        axes.annotate(
            _brief(name), (right, place), xytext=(5, 0), textcoords="offset points", va="center", ha="left", annotation_clip=False,
            fontsize=11.5 if width > NARROW else 10.5, color=colour, fontweight="bold" if colour == ACCENT else "normal",
        )  # fmt: skip
