"""The folder of a run: what it is about, the counts so far, the weights of each finished piece. A stopped run continues from it."""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from whatmatters.core.checkpoint import PathLike, atomic_file, check_output
from whatmatters.core.errors import FileError, FormatError, ResumeError
from whatmatters.select._corpus import Piece
from whatmatters.select._pieces import Done

SECONDS = 5.0
"""Counts are written at most this often."""
TOLD = 1000
"""Rows that could not be used whose reasons are kept."""


@dataclass
class Counts:
    """Counts of a corpus, up to some piece."""

    counts: Int64[np.ndarray, " buckets"]
    fingerprints: UInt64[np.ndarray, " documents"]
    pieces: int = 0
    rows: int = 0
    unread: int = 0
    repaired: int = 0
    ngrams: int = 0
    complete: bool = False
    reasons: list[tuple[int, int, str]] = field(default_factory=list)  # (piece, row of the piece, reason)
    lengths: list[int] = field(default_factory=list)  # rows of each piece, in the order of counting

    def add(self, result: Done, piece: Piece) -> None:
        assert result.counts is not None
        self.counts += result.counts
        if result.fingerprints is not None:
            self.fingerprints = np.unique(np.concatenate([self.fingerprints, result.fingerprints]))
        if len(self.reasons) < TOLD:
            self.reasons.extend((piece.number, row, reason) for row, reason in result.reasons)
        self.pieces += 1
        self.rows += result.rows
        self.unread += result.unread
        self.repaired += result.repaired
        self.ngrams += result.ngrams
        self.lengths.append(result.rows)


class Run:
    """The folder of a run: what it is about, the counts so far, the weights of each finished piece."""

    def __init__(self, folder: PathLike | None, resume: bool, about: dict[str, Any]) -> None:
        about = json.loads(json.dumps(about, default=str))
        self.last = 0.0
        if folder is None:
            self.holder = tempfile.TemporaryDirectory(prefix="whatmatters-dsir-")
            self.folder = Path(self.holder.name)
        else:
            self.folder = Path(folder).absolute()
            described = self.folder / "run.json"
            if described.exists():
                if not resume:
                    raise FileError(f"{self.folder} holds a run already; continue it with resume=True (--resume), or choose another folder")
                try:
                    before = json.loads(described.read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    raise FormatError(f"{described} cannot be read: {error}") from None
                changed = sorted(name for name in before.keys() | about.keys() if before.get(name) != about.get(name))
                if changed:
                    raise ResumeError(f"the run in {self.folder} is of another {', '.join(changed)}; use the same, or another folder")
                return
            check_output(self.folder, overwrite=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")

    def rows(self, piece: Piece) -> Path:
        """Where the weights of a piece are."""
        return self.folder / "rows" / f"{piece.number // 1000:05d}" / f"{piece.number:08d}.rows"

    def counts(self, name: str, buckets: int) -> Counts:
        """Counts as an earlier run left them, or none yet."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return Counts(np.zeros(buckets, np.int64), np.empty(0, np.uint64))
        try:
            with safe_open(path, framework="numpy") as file:
                told = json.loads(file.metadata()["told"])
                return Counts(file.get_tensor("counts"), file.get_tensor("fingerprints"), **told)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path} is no state of a run ({error}); remove the run folder and start again") from None

    def keep(self, name: str, state: Counts, *, now: bool) -> None:
        """Write the counts so far, at most every few seconds unless told `now`."""
        if not now and time.monotonic() - self.last < SECONDS:
            return
        told = {key: getattr(state, key) for key in ("pieces", "rows", "unread", "repaired", "ngrams", "complete", "reasons", "lengths")}
        with atomic_file(self.folder / f"{name}.safetensors") as temporary:
            save_file({"counts": state.counts, "fingerprints": state.fingerprints}, temporary, metadata={"told": json.dumps(told)})
        self.last = time.monotonic()


def by_line(pieces: list[Piece], lengths: list[int]) -> Iterator[tuple[Piece, int]]:
    """Each piece, in the order of the corpus, with the number of rows before it in its file."""
    file, line = -1, 0
    for piece, rows in sorted(zip(pieces, lengths, strict=True), key=lambda pair: pair[0].number):
        line = line if piece.file == file else 0
        file = piece.file
        yield piece, line
        line += rows
