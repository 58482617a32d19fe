"""What an audit found: its rows, curves and verdict, how they are drawn, written and strictly read."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from whatmatters.core.errors import FormatError, InputError
from whatmatters.core.records import PathLike, read_text, reading, take, write_text
from whatmatters.core.scores import Scores
from whatmatters.score.ablation import Ablation


@dataclass(frozen=True)
class AuditRow:
    """How one scorer did.

    Attributes:
        scorer: its name.
        control: whether it is meant to know nothing.
        spearman: rank correlation of its scores with the measured damage, per weight; 0 where all scores are equal.
        interval: confidence interval of `spearman` over other texts of the same kind; None where the truth has no documents.
        p: how often a random order correlates as well.
        p_adjusted: how often the best of as many random orders as there are scorers does; None for a control.
        kendall: Kendall's tau-b.
        top: share of the most damaging quarter of the units that is in its top quarter.
        area: mean increase of the loss, nats a token, while units are damaged one after another, its least important first.
        saved: part of the area of random orders that it avoids; negative if it does worse; None where random orders lose nothing.
        saved_interval: confidence interval of `saved`.
        seconds: time the scores took; 0 for scores that were given.
    """

    scorer: str
    control: bool
    spearman: float
    interval: tuple[float, float] | None
    p: float
    p_adjusted: float | None
    kendall: float
    top: float
    area: float
    saved: float | None
    saved_interval: tuple[float, float] | None
    seconds: float


@dataclass(frozen=True)
class AuditCurve:
    """Loss while more and more of the model is damaged.

    Attributes:
        label: name of the scorer, or "measured", "random 1" and so on, "reversed NAME".
        kind: "scorer", "truth", "random" or "reversed".
        shares: share of the weights damaged, from 0 to 1.
        increases: increase of the loss over the intact model, nats a token.
    """

    label: str
    kind: str
    shares: tuple[float, ...]
    increases: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean increase over the shares."""
        return float(np.trapezoid(self.increases, self.shares))


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    Attributes:
        verdict: one sentence: which score to trust on this model and how much.
        best: the scorer it names; None if none can be told from random.
        rows: one for each scorer, the best correlation first.
        agreement: rank correlation between every two scorers, in the order of the rows.
        curves: damage curves of every scorer, the measured order, random orders and the best scorer reversed.
        units: what was scored: blocks, or the first site of each tied group.
        members: sites of each unit.
        sizes: weights of each unit.
        damage: measured increase of the loss when the unit alone is damaged, nats a token.
        damage_intervals: confidence interval of each; None where the truth has no documents.
        importance: of each scorer, its score of each unit, per weight.
        loss: of the intact model, nats a token.
        ceiling: mean rank correlation of the damage with itself measured on resampled documents: what a perfect score could reach.
        documents: documents (or windows) of the text.
        skipped: scorers that do not work on this model, and why.
        settings: everything the audit was told, JSON-able.
        seconds: wall time.
        scores: the scores themselves, to make plans from; not saved.
        truth: the measured damage, document by document; not saved, None if Scores were given.
    """

    verdict: str
    best: str | None
    rows: tuple[AuditRow, ...]
    agreement: tuple[tuple[float, ...], ...]
    curves: tuple[AuditCurve, ...]
    units: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    damage: tuple[float, ...]
    damage_intervals: tuple[tuple[float, float], ...] | None
    importance: Mapping[str, tuple[float, ...]]
    loss: float
    ceiling: float | None
    documents: int
    skipped: Mapping[str, str]
    settings: Mapping[str, Any]
    seconds: float
    scores: Mapping[str, Scores] = field(default_factory=dict, repr=False)
    truth: Ablation | None = field(default=None, repr=False)

    def table(self) -> list[dict[str, Any]]:
        """The rows as mappings, for a terminal or a data frame."""
        return [asdict(row) for row in self.rows]

    def curve(self, label: str) -> AuditCurve:
        """The damage curve of that label; "random" is the mean of the random orders (not the scorer of that name). Raises InputError."""
        if label == "random":
            drawn = [curve for curve in self.curves if curve.kind == "random"]
            points = [np.mean([getattr(curve, name) for curve in drawn], axis=0).tolist() for name in ("shares", "increases")]
            return AuditCurve("random", "random", tuple(points[0]), tuple(points[1]))
        for curve in self.curves:
            if curve.label == label:
                return curve
        raise InputError(f"no damage curve {label!r}; expected 'random' or one of {', '.join(curve.label for curve in self.curves)}")

    def to_json(self) -> dict[str, Any]:
        """Everything but the scores and the documents, as JSON-able values."""
        value = {name: getattr(self, name) for name in _SAVED}
        value |= {"rows": self.table(), "curves": [asdict(curve) for curve in self.curves]}
        value |= {name: dict(value[name]) for name in ("importance", "skipped", "settings")}
        return value

    def save(self, path: PathLike, *, overwrite: bool = True) -> None:
        """Write as JSON text, whole or not at all; raises FileError."""
        write_text(path, {"format": "whatmatters.audit", "version": 1, **self.to_json()}, overwrite=overwrite)

    @classmethod
    def load(cls, path: PathLike) -> "Audit":
        """Read what `save` wrote.

        Raises:
            FileError: there is no such file or it cannot be read.
            FormatError: it is not what `save` writes.
        """
        with reading(path):
            return _from_json(take(read_text(path), "audit", frozenset(_SAVED)))

    def plot(self) -> Any:
        """A matplotlib Figure: rank correlations with their intervals, and damage curves beside random and reversed order."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 0.3 * len(self.rows) + 2.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, row in enumerate(reversed(self.rows)):
            color = "0.6" if row.control else "C0" if row.scorer == self.best else "C7"
            left.plot(row.spearman, place, "o", color=color)
            if row.interval is not None:
                left.plot(row.interval, (place, place), color=color)
        left.axvline(0, color="0.8", zorder=0)
        left.set_yticks(range(len(self.rows)), [_plain(row.scorer) for row in reversed(self.rows)])
        left.set_xlabel("rank correlation with measured damage")
        best = next((row.scorer for row in self.rows if not row.control), self.rows[0].scorer)
        styles = {"random": ("0.6", "-"), "measured": ("k", ":"), best: ("C0", "-"), f"reversed {best}": ("C3", "--")}
        for label, (color, line) in styles.items():
            curve = self.curve(label)
            right.plot(curve.shares, curve.increases, line, marker=".", color=color, label=_plain(label))
        right.set_xlabel("share of the weights damaged")
        right.set_ylabel("increase of the loss, nats a token")
        right.legend()
        return figure


def _plain(text: str) -> str:
    """Names come from users and may hold characters that matplotlib would take for mathematics."""
    return text.replace("$", r"\$")


_UNSAVED = ("scores", "truth")
_SAVED = tuple(f.name for f in fields(Audit) if f.name not in _UNSAVED)


def _from_json(value: dict[str, Any]) -> Audit:
    """An audit from the values of a file, checked in every part."""
    units = _texts(value["units"], "units")
    count = len(units)
    rows = [_record(AuditRow, item) for item in _list(value["rows"], "rows")]
    curves = [_record(AuditCurve, item) for item in _list(value["curves"], "curves")]
    intervals = value["damage_intervals"]
    importance = _mapping(value["importance"], "importance")
    return Audit(
        verdict=_text(value["verdict"], "verdict"),
        best=None if value["best"] is None else _text(value["best"], "best"),
        rows=tuple(rows),
        agreement=tuple(_numbers(row, "agreement", len(rows)) for row in _list(value["agreement"], "agreement", len(rows))),
        curves=tuple(curves),
        units=units,
        members=tuple(_texts(item, "members") for item in _list(value["members"], "members", count)),
        sizes=tuple(_whole(item, "sizes") for item in _list(value["sizes"], "sizes", count)),
        damage=_numbers(value["damage"], "damage", count),
        damage_intervals=None if intervals is None else tuple(_pair(item, "damage_intervals") for item in _list(intervals, "them", count)),
        importance={_text(name, "importance"): _numbers(item, "importance", count) for name, item in importance.items()},
        loss=_number(value["loss"], "loss"),
        ceiling=None if value["ceiling"] is None else _number(value["ceiling"], "ceiling"),
        documents=_whole(value["documents"], "documents"),
        skipped={name: _text(reason, "skipped") for name, reason in _mapping(value["skipped"], "skipped").items()},
        settings=_mapping(value["settings"], "settings"),
        seconds=_number(value["seconds"], "seconds"),
    )


_ROW = {
    "scorer": "text", "control": "flag", "spearman": "number", "interval": "pair?", "p": "number", "p_adjusted": "number?",
    "kendall": "number", "top": "number", "area": "number", "saved": "number?", "saved_interval": "pair?", "seconds": "number",
}  # fmt: skip
_CURVE = {"label": "text", "kind": "text", "shares": "numbers", "increases": "numbers"}


def _record(kind: type[Any], item: Any) -> Any:
    expected = _ROW if kind is AuditRow else _CURVE
    if not isinstance(item, dict) or set(item) != set(expected):
        raise FormatError(f"an entry of an audit does not hold exactly {', '.join(expected)}")
    readers: dict[str, Callable[[Any, str], Any]] = {
        "text": _text, "flag": _flag, "number": _number, "numbers": _numbers, "pair": _pair,
    }  # fmt: skip
    values = {}
    for name, form in expected.items():
        optional = form.endswith("?") and item[name] is None
        values[name] = None if optional else readers[form.removesuffix("?")](item[name], name)
    return kind(**values)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{what} of an audit is {type(value).__name__}; expected text")
    return value


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise FormatError(f"{what} of an audit is {type(value).__name__}; expected true or false")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{what} of an audit is {type(value).__name__}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise FormatError(f"{what} of an audit is too large a number") from None


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"{what} of an audit is {type(value).__name__}; expected a whole number")
    return value


def _list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise FormatError(f"{what} of an audit are no list{'' if length is None else f' of {length}'}")
    return value


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} of an audit is {type(value).__name__}; expected an object")
    return value


def _numbers(value: Any, what: str, length: int | None = None) -> tuple[float, ...]:
    return tuple(_number(item, what) for item in _list(value, what, length))


def _pair(value: Any, what: str) -> tuple[float, float]:
    low, high = _numbers(value, what, 2)
    return low, high


def _texts(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_text(item, what) for item in _list(value, what))
