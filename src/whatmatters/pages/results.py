"""What a run found, as `results.json`: everything the report page shows, in one strict, versioned file.

The file is a JSON object `{"format": "whatmatters.results", "version": 1, ...}` whose other keys are the fields of `Results`; each class
below is one object of it, with exactly its fields. Parts that a run did not do are null or empty lists. Numbers are finite; names and
texts are shown escaped, so they may hold anything.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.errors import FormatError
from whatmatters.core.records import parse_json, read_text, reading

__all__ = [
    "FILE_NAME",
    "Arm",
    "Audit",
    "Command",
    "Continuation",
    "Curve",
    "Model",
    "Reload",
    "Results",
    "Scorer",
    "Site",
    "Stage",
    "Text",
    "Token",
    "Tokens",
]

FILE_NAME = "results.json"
FORMAT, VERSION = "whatmatters.results", 1
ROLES = ("dense", "baseline", "method", "control")
ORDERS = ("score", "reverse", "random", "damage")
DEPTH = 20


@dataclass(frozen=True)
class Site:
    """A site: its name, the index of its block (-1 outside all blocks) and its number of weights."""

    name: str
    block: int
    size: int


@dataclass(frozen=True)
class Model:
    """The model: what people call it, its number of parameters, the names of its blocks in order, and its sites."""

    name: str
    parameters: int
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Text:
    """A text and what it was used for: counts of documents, windows and tokens, and the digest of the text or split it comes from."""

    used_for: str
    source: str
    documents: int
    windows: int
    tokens: int
    digest: str


@dataclass(frozen=True)
class Scorer:
    """A scorer that was audited.

    `correlation`: Spearman's with the measured damage, `low` and `high` its interval; `values` one score for each unit of the audit, in
    order, higher matters more; `control`: a scorer that is meant to know nothing.
    """

    name: str
    correlation: float
    low: float | None
    high: float | None
    seconds: float
    control: bool
    values: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Damage (nats a token) as more and more of the model is damaged, least important first; `order` is what decided importance."""

    name: str
    order: str  # one of ORDERS: by a score, by the same score reversed, at random, by the measured damage itself
    share: tuple[float, ...]
    damage: tuple[float, ...]


@dataclass(frozen=True)
class Audit:
    """Every scorer against the damage that was measured.

    `how` says in words what the damage is; `units` names what was damaged, one after another: each a list of sites (or one block) that were
    damaged together; `damage` is the loss it cost, nats a token, compared with scores per weight; `ceiling` is the correlation that a
    perfect score could reach on so much text; `best` names the scorer to trust, null if there is none; `verdict` says how much.
    """

    how: str
    units: tuple[tuple[str, ...], ...]
    damage: tuple[float, ...]
    scorers: tuple[Scorer, ...]
    curves: tuple[Curve, ...]
    ceiling: float | None
    best: str | None
    verdict: str


@dataclass(frozen=True)
class Arm:
    """One model that was measured.

    `role` is one of "dense", "baseline", "method", "control"; `bits` the average stored bits of a weight in the sites, 16 for dense;
    `levels` the bits of every site, empty for dense. `change` is the perplexity's change against dense in percent, `low` and `high` its
    interval; `bytes` the size of the saved folder; `seconds` what it took to make; `peak_bytes` the memory above the loaded model.
    """

    id: str
    label: str
    role: str
    bits: float
    levels: dict[str, int]
    perplexity: float
    change: float
    low: float | None
    high: float | None
    kl: float | None
    agreement: float | None
    bytes: int
    seconds: float
    peak_bytes: int
    note: str


@dataclass(frozen=True)
class Continuation:
    """How an arm went on from the prompt."""

    arm: str
    text: str


@dataclass(frozen=True)
class Token:
    """A piece of text and its importance."""

    text: str
    value: float


@dataclass(frozen=True)
class Tokens:
    """Importance of the tokens of one window: which scorer, in which block, of which source."""

    scorer: str
    block: int
    source: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Reload:
    """The saved checkpoint, loaded by transformers alone: largest difference of its logits, relative to the largest logit."""

    arm: str
    path: str
    difference: float
    tolerance: float
    windows: int


@dataclass(frozen=True)
class Stage:
    """A part of the run and its wall time."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Command:
    """A command to paste next, and what it is for."""

    purpose: str
    command: str


@dataclass(frozen=True)
class Results:
    """Everything a run found.

    `best` is the id of the arm the verdict is about, `reason` how it was chosen; `unit` and `confidence` say what the intervals are over.

    Raises:
        FormatError: parts that contradict each other: names of no arm, lists of different lengths, an unknown role.
    """

    title: str
    model: Model
    texts: tuple[Text, ...]
    interpreter: str | None
    audit: Audit | None
    arms: tuple[Arm, ...]
    best: str | None
    reason: str
    unit: str
    confidence: float
    prompt: str
    continuations: tuple[Continuation, ...]
    tokens: Tokens | None
    reload: Reload | None
    stages: tuple[Stage, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    commands: tuple[Command, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        ids = [arm.id for arm in self.arms]
        _check(len(set(ids)) == len(ids), "two arms have the same id")
        _check(sum(arm.role == "dense" for arm in self.arms) == (1 if ids else 0), "the arms do not hold exactly one that is dense")
        _check((self.best is None) == (not ids), "best is given without arms, or the other way round")
        wanted = [self.best, *(c.arm for c in self.continuations), *([self.reload.arm] if self.reload else [])]
        for name in wanted:
            _check(name is None or name in ids, f"no arm is called {name!r:.60}")
        sites = {site.name for site in self.model.sites}
        _check(all(-1 <= site.block < len(self.model.blocks) for site in self.model.sites), "a site is in a block that the model lacks")
        for arm in self.arms:
            _check(arm.role in ROLES, f"an arm has the role {arm.role!r:.40}; expected one of {', '.join(ROLES)}")
            _check(arm.bytes > 0 and arm.perplexity > 0, f"arm {arm.id!r:.40} has no size or no perplexity")
            _check(sites.issuperset(arm.levels), f"arm {arm.id!r:.40} has levels of sites that the model lacks")
        if self.audit is not None:
            self._check_audit(self.audit, sites | set(self.model.blocks))

    def _check_audit(self, audit: Audit, known: set[str]) -> None:
        _check(len(audit.units) == len(audit.damage) > 0, f"{len(audit.units)} units and {len(audit.damage)} damages; expected as many")
        _check(all(unit and known.issuperset(unit) for unit in audit.units), "the audit has a unit that is no list of sites or blocks")
        _check(all(site.size > 0 for site in self.model.sites), "a site has no weights")
        names = [scorer.name for scorer in audit.scorers]
        _check(len(set(names)) == len(names) > 0, "the audit has no scorers, or two of one name")
        _check(audit.best is None or audit.best in names, "the audit's best is none of its scorers")
        for scorer in audit.scorers:
            _check(len(scorer.values) == len(audit.units), f"{scorer.name!r:.40} does not have one score for each unit")
        for curve in audit.curves:
            _check(len(curve.share) == len(curve.damage) > 1, f"the curve {curve.name!r:.40} does not have as many shares as damages")
            _check(curve.order in ORDERS, f"a curve has the order {curve.order!r:.40}; expected one of {', '.join(ORDERS)}")

    def to_json(self) -> dict[str, Any]:
        """The JSON-able form that is written."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def save(self, run_dir: str | Path) -> Path:
        """Write `results.json` into a folder, whole or not at all; returns its path.

        Raises:
            FileError: it cannot be written.
        """
        path = Path(run_dir) / FILE_NAME
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, run_dir: str | Path) -> "Results":
        """Read the `results.json` of a folder, or that file.

        Raises:
            FileError: there is none, or it cannot be read.
            FormatError: it is not exactly what `save` writes.
        """
        path = Path(run_dir)
        path = path / FILE_NAME if path.is_dir() else path
        with reading(path):
            return cls.from_json(read_text(path))

    @classmethod
    def parse(cls, text: str | bytes) -> "Results":
        """The results that a text holds; raises FormatError."""
        return cls.from_json(parse_json(text))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Results":
        """The results from their JSON form; raises FormatError."""
        if value.get("format") != FORMAT:
            raise FormatError(f"it holds {value.get('format')!r:.60}; expected {FORMAT}")
        if value.get("version") != VERSION or type(value.get("version")) is not int:
            raise FormatError(f"it has version {value.get('version')!r:.20}; this release reads version {VERSION}")
        return _read(cls, {key: part for key, part in value.items() if key not in ("format", "version")}, "results")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise FormatError(message)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`; nothing is converted but lists to tuples and whole numbers to floats."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_depth(value, where)
        return value
    if origin is types.UnionType:  # only `X | None` is used
        return None if value is None else _read(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(type, kind))
        _check(isinstance(value, dict), f"{where} is {type(value).__name__}; expected an object")
        odd = sorted(set(map(str, value)) ^ set(hints))
        _check(not odd, f"{where}: keys missing or unknown: {str(odd)[:200]}")
        return typing.cast(Any, kind)(**{key: _read(hint, value[key], f"{where}.{key}") for key, hint in hints.items()})
    if origin is tuple:
        _check(isinstance(value, list), f"{where} is {type(value).__name__}; expected a list")
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _check(isinstance(value, dict), f"{where} is {type(value).__name__}; expected an object")
        return {key: _read(arguments[1], item, f"{where}.{key:.60}") for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    _check(type(value) is kind, f"{where} is {type(value).__name__} {value!r:.40}; expected {kind.__name__}")
    _check(kind is not float or math.isfinite(value), f"{where} is {value}; expected a finite number")
    if kind is int:
        _check(abs(value) < 2**63, f"{where} is too large")
    return value


def _check_depth(value: Any, where: str, depth: int = 0) -> None:
    _check(depth < DEPTH, f"{where} is nested more than {DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, where, depth + 1)
