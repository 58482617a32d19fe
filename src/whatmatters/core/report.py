"""The report of an action: what was done, with which settings and versions, and a row for each site."""

import functools
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.errors import FileError, FormatError, MissingExtraError
from whatmatters.core.evaluate import PeakMemory

__all__ = ["Report", "measured", "versions"]


@functools.cache
def _installed() -> tuple[tuple[str, str], ...]:
    packages = ("whatmatters", "torch", "transformers", "compressed-tensors", "safetensors", "numpy", "scipy")
    return ("python", platform.python_version()), ("machine", platform.machine()), *((name, metadata.version(name)) for name in packages)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return dict(_installed())


@dataclass
class Report:
    """What an action did.

    Attributes:
        method: slug of the method.
        job: its job.
        settings: everything it was asked to do, JSON-able.
        rows: a mapping for each site, with at least "site".
        notes: departures, uncovered weights and other things a reader must know.
        seconds: wall time.
        peak_bytes: peak resident memory above the start.
        versions: versions of the software.
        before: measurements of the model before, by name, if any were taken.
        after: the same afterwards.

    Example:
        >>> Report("rtn", "quantize", {"bits": 4}, [{"site": "a", "bits": 4}]).rows[0]["site"]
        'a'
    """

    method: str
    job: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=versions)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` wrote; raises FileError or FormatError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise FileError(f"cannot read the report {path}: {error}") from error
        except UnicodeDecodeError as error:
            raise FormatError(f"{path} is not a report: not UTF-8") from error
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path} is not a report: {error}") from error

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame; needs the extra `frames`."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("Report.to_frame needs pandas: pip install 'whatmatters[frames]'") from error
        return pandas.DataFrame(self.rows)


@contextmanager
def measured(report: Report) -> Iterator[Report]:
    """Fill in seconds and peak memory of what runs inside the `with`."""
    start = perf_counter()
    with PeakMemory() as peak:
        yield report
    report.seconds = perf_counter() - start
    report.peak_bytes = peak.bytes
