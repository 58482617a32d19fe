"""What a command says and where: results on stdout, everything else on stderr, so that `--json` can be piped."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from whatmatters.core.errors import WhatMattersError

if TYPE_CHECKING:
    from rich.console import Console

LINE: ContextVar[tuple[str, ...]] = ContextVar("line", default=())
"""The arguments of the command that runs, to say how it is continued."""

SECONDS_BETWEEN_LINES = 5.0
"""Where stderr is no terminal, progress is a plain line at most this often."""


def error_text(error: WhatMattersError) -> str:
    """The message of one of our errors without the Python call it came through, which `--debug` shows."""
    return str(error).partition("\n  in ")[0]


def spoken_duration(seconds: float | int) -> str:
    """Seconds as people say them.

    Example:
        >>> spoken_duration(4.2), spoken_duration(200), spoken_duration(9000)
        ('4 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def spoken_size(size: float | int) -> str:
    """Bytes as people say them.

    Example:
        >>> spoken_size(512), spoken_size(11_600_000)
        ('512 bytes', '11.6 MB')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}" if size < 1000 * limit else f"{size / limit:.0f} {unit}"
    return f"{size:.0f} bytes"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded with blanks, numbers to the right: readable in a terminal, a file and a mail.

    Example:
        >>> print(table(("name", "bits"), [("a", 3), ("bc", 4)]))
        name  bits
        a        3
        bc       4
    """
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) or row[i] == "" for row in rows) for i in range(len(header))]
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(header)]
    lines = []
    for row in [list(header), *cells]:
        padded = (text.rjust(width) if right else text.ljust(width) for text, width, right in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    """The same value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class ProgressLines:
    """Progress as plain lines: for files and pipes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.began: dict[str, float] = {}
        self.last = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.began[label] = now
        elif done == total or now - self.last >= SECONDS_BETWEEN_LINES:
            spent = now - self.began.get(label, now)
            left = f"about {spoken_duration(spent / done * (total - done))} left" if done < total else f"{spoken_duration(spent)}"
            print(f"{label}: {done} of {total}, {left}", file=self.stream, flush=True)
            self.last = now

    def close(self) -> None:
        """Nothing is open."""


class ProgressBars:
    """Progress as bars with the time left: for terminals."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=Console(file=stream), transient=True)
        self.tasks: dict[str, Any] = {}
        self.bars.start()

    def __call__(self, label: str, done: int, total: int) -> None:
        if done == 0 or label not in self.tasks:
            if label in self.tasks:
                self.bars.remove_task(self.tasks[label])
            self.tasks[label] = self.bars.add_task(label, total=total)
        self.bars.update(self.tasks[label], completed=done)

    def close(self) -> None:
        """Take the bars off the screen."""
        self.bars.stop()


def launched_rank() -> int | None:
    """The rank of this process where torchrun started several; torch is not imported to find out that it did not."""
    if "WORLD_SIZE" not in os.environ:
        return None
    from whatmatters.core.ranks import launched

    found = launched()
    return None if found is None else found[0]


class Nowhere(io.TextIOBase):
    """A stream that takes text and keeps none."""

    def write(self, text: str) -> int:
        """Take it."""
        return len(text)


class Output:
    """The output of one command. Used in a `with`: what libraries print meanwhile goes to stderr.

    Where torchrun started several processes the first of them speaks. The others share its work if the command can be shared, and
    otherwise end at once.

    Args:
        json: print one JSON document at the end, and nothing else on stdout.
        ranked: the command shares its work among ranks.
    """

    def __init__(self, json: bool, *, ranked: bool = False) -> None:
        self.json = json
        self.ranked = ranked
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Output":
        self._stdout: Any = sys.stdout
        self._stderr: Any = sys.stderr
        rank = launched_rank()
        if rank and not self.ranked:
            raise typer.Exit
        if rank:
            self._stdout = self._stderr = Nowhere()
            self._stack.enter_context(contextlib.redirect_stderr(self._stderr))
        self._stack.enter_context(contextlib.redirect_stdout(self._stderr))
        if rank is not None and self.ranked:
            from whatmatters.core.ranks import join

            self._stack.enter_context(join())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, traceback)

    def progress(self) -> Callable[[str, int, int], None]:
        """Something to tell progress to: bars on a terminal, lines elsewhere; gone when the command ends."""
        shown = ProgressBars(self._stderr) if self._stderr.isatty() else ProgressLines(self._stderr)
        self._stack.callback(shown.close)
        return shown

    def console(self) -> "Console | None":
        """A rich console for what a command prints itself; None where only JSON goes out."""
        from rich.console import Console

        return None if self.json else Console(file=self._stdout)

    def say(self, text: str = "") -> None:
        """A part of the result, for people."""
        if not self.json:
            print(text, file=self._stdout)

    def note(self, text: str) -> None:
        """Something to know that is no result: stderr."""
        print(text, file=self._stderr, flush=True)

    def finish(self, result: Mapping[str, Any], *, following: Sequence[str] = ()) -> None:
        """The end: the JSON document, or the commands that usually come next."""
        self._stack.close()
        if self.json:
            print(json.dumps(_finite({**result, "next": list(following)}), indent=1, default=str, allow_nan=False), file=self._stdout)
        for command in following:
            self.say(f"next: {command}")
