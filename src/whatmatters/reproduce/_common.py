"""What experiments share: claims judged by code, the evidence record, and the digest that tells when it is stale."""

import ast
import hashlib
import inspect
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType, TracebackType
from typing import Any, Literal

import numpy as np
from scipy import stats

from whatmatters.core.catalog import get_method
from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.errors import InputError
from whatmatters.core.evaluate import PeakMemory
from whatmatters.core.report import versions

Tier = Literal["exact", "planted", "desk", "public", "arithmetic"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """One claim and what came of it.

    Attributes:
        claim: the predicate in words, as it was evaluated.
        tier: "exact" (an oracle), "planted" (known truth), "desk" (real data, small model), "public" (a larger checkpoint) or "arithmetic".
        verdict: "shown", "refuted" or "inconclusive".
        effect: the mean effect that the predicate is about.
        interval: its 95 % interval; None where nothing is random.
        smallest_effect: the smallest effect the run could have seen: half the width of the interval.
    """

    claim: str
    tier: Tier
    verdict: Literal["shown", "refuted", "inconclusive"]
    effect: float
    interval: tuple[float, float] | None = None
    smallest_effect: float | None = None


def certain(claim: str, tier: Tier, holds: bool, effect: float | int) -> Claim:
    """A claim without chance: shown if it holds, refuted if not."""
    return Claim(claim, tier, "shown" if holds else "refuted", float(effect))


def below(claim: str, tier: Tier, effects: Sequence[float], bound: float) -> Claim:
    """The claim that the mean of paired effects is below `bound`, by a t interval over draws.

    Shown if the whole interval is below, refuted if it is all above or at the bound, inconclusive otherwise.

    Raises:
        InputError: fewer than three draws.
    """
    values = np.asarray(effects, dtype=np.float64)
    if len(values) < 3:
        raise InputError(f"{len(values)} draws for {claim!r}; a claim over draws needs at least 3")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return from_interval(claim, tier, float(values.mean()), (float(values.mean()) - half, float(values.mean()) + half), bound)


def from_interval(claim: str, tier: Tier, effect: float, interval: tuple[float, float], bound: float) -> Claim:
    """The claim that an effect is below `bound`, given its interval (from a bootstrap, say)."""
    low, high = interval
    verdict: Literal["shown", "refuted", "inconclusive"] = "shown" if high < bound else "refuted" if low >= bound else "inconclusive"
    return Claim(claim, tier, verdict, effect, (low, high), (high - low) / 2)


def _without_docstrings(source: str) -> str:
    """The code as a syntax tree in text: without docstrings, comments and layout, and alike whichever Python parses it."""
    return json.dumps(_plain(ast.parse(source)))


def _plain(node: object) -> object:
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return "docstring"
    # Fields that are empty are left out: newer Pythons add some.
    return [type(node).__name__, {name: _plain(value) for name, value in ast.iter_fields(node) if value is not None and value != []}]


def digest(slug: str, experiment: ModuleType) -> str:
    """SHA-256 of the method's file and the experiment's, as syntax trees without docstrings: prose may change, code may not."""
    method = inspect.getmodule(inspect.unwrap(get_method(slug).function))
    if method is None:
        raise InputError(f"the file of {slug!r} cannot be found")
    return source_digest([method, experiment])


def source_digest(modules: Sequence[ModuleType]) -> str:
    """SHA-256 of the code of some modules, docstrings left out."""
    total = hashlib.sha256()
    for module in modules:
        total.update(_without_docstrings(inspect.getsource(module)).encode())
    return total.hexdigest()


def commit() -> str:
    """The commit of the code that runs, with "+dirty" if files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--", ":/src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Experiment:
    """Collects claims and results of one method's experiment and writes them as evidence.

    Example:
        >>> with Experiment("rsq", seeds=[0, 1, 2]) as experiment:  # doctest: +SKIP
        ...     experiment.claims.append(certain("2 + 2 is 4", "arithmetic", 2 + 2 == 4, 0.0))
    """

    def __init__(self, slug: str, *, seeds: Sequence[int], differences: Sequence[str] = ()) -> None:
        self.slug = slug
        self.seeds = list(seeds)
        self.differences = list(differences)
        self.claims: list[Claim] = []
        self.results: dict[str, Any] = {}
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> "Experiment":
        self._start = perf_counter()
        self._peak = PeakMemory()
        self._peak.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._peak.__exit__(kind, error, trace)
        self.seconds = perf_counter() - self._start
        self.peak_bytes = self._peak.bytes

    def record(self, experiment: ModuleType) -> dict[str, Any]:
        """The evidence as a mapping with the keys every reader expects."""
        return {
            "slug": self.slug,
            "claims": [asdict(claim) for claim in self.claims],
            "results": self.results,
            "differs_from_paper": self.differences,
            "seeds": self.seeds,
            "versions": versions(),
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "commit": commit(),
            "digest": digest(self.slug, experiment),
        }

    def write(self, folder: Path, experiment: ModuleType) -> Path:
        """Write `folder/SLUG.json` atomically and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.slug}.json"
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.record(experiment), indent=1) + "\n", encoding="utf-8")
        return path
