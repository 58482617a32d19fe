"""Work on the pieces of a corpus: counting, weighing, counting again what was chosen; here, in other processes, or under Ray.

Whoever does a piece, the result is the same, and results come back in the order of the pieces.
"""

import functools
import json
import multiprocessing
import os
import struct
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt64
from safetensors.numpy import load_file

from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.errors import DataError, FormatError, InputError, MissingExtraError
from whatmatters.kernels.json_lines import texts_of_lines
from whatmatters.kernels.ngrams import HashedTexts, Hasher
from whatmatters.select._corpus import REPAIRED, UNREAD, Batch, Piece, read

LISTED = 1000
"""Reasons that are kept for each piece; all bad rows are marked in the rows, with or without a reason."""


@dataclass(frozen=True)
class Features:
    """How texts become counts.

    Attributes:
        orders: n of the n-grams.
        buckets: number of buckets.
        hash: "sha256" or "fast".
        tokenizer: None for WordPunct.
        face: which kernel.
        column: field or column of the text.
    """

    orders: int
    buckets: int
    hash: str
    tokenizer: Any
    face: str
    column: str

    def hasher(self) -> Hasher:
        """This process's hasher with these settings; its memory is used again by the next piece."""
        return _hasher(self.orders, self.buckets, self.hash, self.tokenizer, self.face)


@functools.lru_cache(1)
def _hasher(orders: int, buckets: int, hash: str, tokenizer: Any, face: str) -> Hasher:
    return Hasher(orders, buckets, hash, tokenizer=tokenizer, face=face)


@dataclass(frozen=True)
class Task:
    """A piece and what is to be done with it.

    Attributes:
        piece: the piece.
        features: how its texts become counts.
        limit: stop counting behind this many n-grams; None for all.
        fingerprints: also return a fingerprint of every document.
        parameters: file of log ratios and fingerprints, where weights are to be computed.
        rows: file that the weights go to.
        chosen: rows (numbers in the piece) that are counted; None for all.
    """

    piece: Piece
    features: Features
    limit: int | None = None
    fingerprints: bool = False
    parameters: str = ""
    rows: str = ""
    chosen: Any = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Done:
    """What came of a piece.

    Attributes:
        rows: rows of the piece, whatever is in them.
        unread: rows that could not be read.
        repaired: rows that were read with bytes replaced.
        reasons: (row of the piece, reason), the first LISTED.
        ngrams: n-grams that were counted or weighed.
        counts: n-grams by bucket.
        fingerprints: of each document that has tokens, if asked for.
        known: rows that equal a document of the target.
    """

    rows: int = 0
    unread: int = 0
    repaired: int = 0
    reasons: list[tuple[int, str]] = field(default_factory=list)
    ngrams: int = 0
    counts: Int64[np.ndarray, " buckets"] | None = None
    fingerprints: UInt64[np.ndarray, " documents"] | None = None
    known: int = 0


def row_type(targets: int) -> np.dtype[Any]:
    """What is kept of each row: its weight for each target, what finds it again, its tokens, and a note."""
    return np.dtype([("weight", "<f8", (targets,)), ("where", "<i8"), ("tokens", "<u4"), ("note", "u1")])


@functools.lru_cache(1)
def _parameters(path: str, stamp: int) -> tuple[Float64[np.ndarray, "targets buckets"], UInt64[np.ndarray, " documents"]]:
    stored = load_file(path)
    return stored["log_ratio"], stored["fingerprints"]


def done(task: Task) -> Done:
    """Do a piece."""
    if task.rows:
        with atomic_file(task.rows) as temporary, temporary.open("wb") as file:
            result = _weighed(task, file)
            _write_footer(file, result)
        return result
    return _counted(task)


def _counted(task: Task) -> Done:
    hasher = task.features.hasher()
    counts = np.zeros(task.features.buckets, np.int64)
    tally = _Tally()
    prints = []
    total = 0
    for batch in read(task.piece, task.features.column, task.features.face):
        first = tally.add(batch)
        begin, end = batch.begin, batch.end
        if task.chosen is not None:
            wanted = task.chosen[(task.chosen >= first) & (task.chosen < tally.rows)] - first
            begin, end = begin[wanted], end[wanted]
        texts = hasher.hashed(batch.text, begin, end)
        counts += np.bincount(texts.ids, minlength=len(counts))
        total += len(texts.ids)
        if task.fingerprints:
            prints.append(_fingerprints(texts, len(counts)))
        if task.limit is not None and total > task.limit:
            break
    found = np.concatenate(prints) if prints else np.empty(0, np.uint64)
    return Done(tally.rows, tally.unread, tally.repaired, tally.reasons, total, counts, found if task.fingerprints else None)


def _weighed(task: Task, file: Any) -> Done:
    log_ratio, known = _parameters(task.parameters, os.stat(task.parameters).st_mtime_ns)
    hasher = task.features.hasher()
    tally, total, alike = _Tally(), 0, 0
    for batch in read(task.piece, task.features.column, task.features.face):
        tally.add(batch)
        texts = hasher.hashed(batch.text, batch.begin, batch.end)
        rows = np.zeros(len(batch.notes), row_type(len(log_ratio)))
        rows["weight"] = weights(hasher, log_ratio, texts)
        rows["where"], rows["tokens"], rows["note"] = batch.where, texts.tokens, batch.notes
        rows.tofile(file)
        total += len(texts.ids)
        if len(known):
            alike += int(np.isin(_fingerprints(texts, task.features.buckets), known).sum())
    return Done(tally.rows, tally.unread, tally.repaired, tally.reasons, total, known=alike)


def weights(
    hasher: Hasher, log_ratio: Float64[np.ndarray, "targets buckets"], texts: HashedTexts
) -> Float64[np.ndarray, "documents targets"]:
    """Each document's log weights. With "sha256" by the dense product of the official code, bit for bit; else a sum over n-grams."""
    if hasher.hash == "sha256":
        # One target is a dot product there, several are a matrix-vector product; the two round differently.
        return hasher.products(log_ratio[0] if len(log_ratio) == 1 else log_ratio, texts).reshape(-1, len(log_ratio))
    return np.stack([sums(row[texts.ids], texts.indptr) for row in log_ratio], axis=1)


def sums(values: Any, indptr: Int64[np.ndarray, " ends"]) -> Any:
    """Sum of the values of each document; 0 where it has none."""
    total = np.zeros(len(indptr) - 1, values.dtype)
    full = np.flatnonzero(np.diff(indptr))
    if len(full):
        total[full] = np.add.reduceat(values, indptr[full])
    return total


@functools.lru_cache(2)
def _marks(buckets: int) -> UInt64[np.ndarray, " buckets"]:
    return hashed64(np.arange(buckets, dtype=np.uint64))


def hashed64(values: UInt64[np.ndarray, " values"]) -> UInt64[np.ndarray, " values"]:
    """Splitmix64, the k-th number of the stream k: a fixed map of 64 bits to 64 that look random."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _fingerprints(texts: HashedTexts, buckets: int) -> UInt64[np.ndarray, " documents"]:
    """A number for each document with tokens that equal documents share: a hash of its counts."""
    return hashed64(sums(_marks(buckets)[texts.ids], texts.indptr)[texts.tokens > 0])


class _Tally:
    def __init__(self) -> None:
        self.rows, self.unread, self.repaired = 0, 0, 0
        self.reasons: list[tuple[int, str]] = []

    def add(self, batch: Batch) -> int:
        """Count a batch and return the number of its first row."""
        first = self.rows
        for row, reason in batch.reasons:
            if len(self.reasons) < LISTED:
                self.reasons.append((first + row, reason))
        self.rows += len(batch.notes)
        # A file that breaks off between two lines has a reason and no row.
        self.unread += int((batch.notes == UNREAD).sum()) + sum(row >= len(batch.notes) for row, _ in batch.reasons)
        self.repaired += int((batch.notes == REPAIRED).sum())
        return first


# Rows in files


def _write_footer(file: Any, result: Done) -> None:
    told = {name: getattr(result, name) for name in ("rows", "unread", "repaired", "reasons", "ngrams", "known")}
    text = json.dumps(told).encode()
    file.write(text + struct.pack("<Q", len(text)))


def load_rows(path: Path, targets: int, *, only_summary: bool = False) -> tuple[Done, Any]:
    """What is known about a piece, and its rows (mapped from the file); raises FormatError for anything but a whole file of ours."""
    kind = row_type(targets)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size - 8)
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(size - 8 - length)
            told = json.loads(file.read(length))
        result = Done(**{**told, "reasons": [(int(row), str(reason)) for row, reason in told["reasons"]]})
        if result.rows * kind.itemsize != size - 8 - length:
            raise FormatError(f"{path} holds {size - 8 - length} bytes for {result.rows} rows of {kind.itemsize}")
        if only_summary or not result.rows:
            return result, np.empty(0, kind)
        return result, np.memmap(path, kind, "r", shape=(result.rows,))
    except (OSError, ValueError, TypeError, KeyError, struct.error) as error:
        raise FormatError(f"{path} is no whole file of rows ({error}); remove the run folder and start again") from None


# Engines


def each(tasks: Iterable[Task], *, jobs: int, engine: str) -> Iterator[Done]:
    """Do the tasks and yield what came of them, in their order; few are in flight at any time.

    Raises:
        MissingExtraError: "ray" without Ray.
        InputError: no such engine.
    """
    if engine not in ("local", "ray"):
        raise InputError(f"engine {engine!r:.40} is unknown; expected 'local' or 'ray'")
    listed = list(tasks)
    if engine == "ray":
        return _by_ray(listed, jobs)
    if jobs == 1 or len(listed) < 2:
        return map(done, listed)
    return _by_processes(listed, min(jobs, len(listed)))


def _load(features: Features) -> None:
    """Load compiled code once, before the processes part."""
    line = np.frombuffer(b'{"text": "a"}', np.uint8)
    found = texts_of_lines(line, np.zeros(1, np.int64), np.array([len(line)]), "text", face=features.face)
    texts = features.hasher().hashed(found.plain, found.begin, found.end)
    features.hasher().products(np.zeros(features.buckets), texts)


def _by_processes(tasks: list[Task], jobs: int) -> Iterator[Done]:
    _load(tasks[0].features)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    try:
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(pool.submit(done, task))
            if len(waiting) >= 3 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, for want of memory as a rule; use fewer (n_jobs), and resume the run") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _by_ray(tasks: list[Task], jobs: int) -> Iterator[Done]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("engine='ray' needs Ray: pip install 'whatmatters[ray]', or use engine='local'") from error
    ours = not ray.is_initialized()
    if ours:
        own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
        ray.init(**own, log_to_driver=False, configure_logging=False)
    try:
        remote = ray.remote(done)
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(remote.remote(task))
            if len(waiting) >= 3 * jobs:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        if ours:
            ray.shutdown()
