"""Choose from a huge corpus the documents that look like a small one: hashed n-grams, importance weights, draws without replacement.

Give raw text of any size and a little text of the kind you want; get k raw documents whose n-grams are distributed as the target's are.

Sang Michael Xie, Shibani Santurkar, Tengyu Ma, Percy Liang: "Data Selection for Language Models via Importance Resampling", NeurIPS 2023,
arXiv 2302.03169. Unit: a document. Score: log p_target(z) / p_raw(z) of its hashed n-gram counts z. Allocation: k documents without
replacement by Gumbel top-k. Action: select.

Where it follows the official code (`data-selection` 1.0.3) rather than the paper: the tokenizer is WordPunct, 1e-8 is added to both
distributions, documents of fewer than 100 tokens are left out, and with `hash="sha256"` buckets, log ratios and weights are bit-equal to
the official ones. Where it departs: every draw has a seed, keyed by file and line, so that the number of workers changes nothing; the cap
on n-grams for the raw fit takes pieces of the corpus in a random order instead of a prefix; `temperature` and `length_normalize` are
additions, off by default.
"""

import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator

from whatmatters.core.allocation import top_k as largest
from whatmatters.core.catalog import method
from whatmatters.core.checkpoint import PathLike, atomic_file, check_output
from whatmatters.core.errors import BudgetError, DataError, FileError, FormatError, InputError
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import Seed, derived
from whatmatters.kernels.ngrams import compiled_face
from whatmatters.select._corpus import PIECE, UNREAD, Corpus, Piece, corpus
from whatmatters.select._pieces import Done, Features, Task, each, hashed64, load_rows
from whatmatters.select._run import TOLD, Counts, Run, by_line
from whatmatters.select._selection import DSIRSelection, RowProblem, write_selection

__all__ = ["DSIR", "hashed_ngrams", "kl_reduction"]

FLOOR = 1e-8
"""Added to both distributions before the logarithm: bounds what one n-gram can say to 18 nats either way."""
AUTO = 100_000
"""`max_ngrams="auto"`: this many for each bucket."""
SAME_AS_TOP = 0.98
"""Share of a draw that plain top-k would have chosen too, from which on the user is told."""


# The mathematics


def log_ratio(
    target: Int64[np.ndarray, "*targets buckets"], raw: Int64[np.ndarray, " buckets"], smoothing: float = 0.0
) -> Float64[np.ndarray, "*targets buckets"]:
    """log(p + 1e-8) - log(q + 1e-8) for each bucket; `smoothing` counts are added to every bucket of the target."""
    padded = target + smoothing if smoothing else target
    p = padded / padded.sum(axis=-1, keepdims=True)
    return np.log(p + FLOOR) - np.log(raw / raw.sum() + FLOOR)


def gumbel(key: int, file: int, lines: Int64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Standard Gumbel noise for each line, decided by the key, the number of the file and the number of the line alone."""
    stream = hashed64(hashed64(np.array([key], np.uint64)) ^ np.uint64(file))
    uniform = (hashed64(hashed64(stream ^ lines.astype(np.uint64))) >> np.uint64(12)).astype(np.float64)
    return -np.log(-np.log((uniform + 0.5) * 2.0**-52))


def inclusion(logits: Float64[np.ndarray, " rows"], bound: float) -> Float64[np.ndarray, " rows"]:
    """Probability that a key logit + Gumbel is above the bound: 1 - exp(-exp(logit - bound))."""
    return -np.expm1(-np.exp(np.minimum(logits - bound, 700.0)))


def divergence(p: Float64[np.ndarray, "*targets buckets"], q: Float64[np.ndarray, " buckets"]) -> float:
    """KL(p || q) in nats, the mean over targets; 0 log 0 is 0."""
    terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1.0)) - np.log(q)), 0.0)
    return float(terms.sum(axis=-1).mean())


def kl_reduction(target: Any, raw: Any, selected: Any, *, smoothing: float | int = 0.5) -> float:
    """How much nearer to the target the selection is than the raw corpus: KL(target || raw) - KL(target || selected), in nats.

    Compare selections of equal token count: a small one has more empty buckets, which the divergence punishes.

    Args:
        target: n-gram counts by bucket, (buckets,), or (targets, buckets) for the mean over several.
        raw: counts of the raw corpus (buckets,).
        selected: counts of the selection (buckets,).
        smoothing: added to every bucket of raw and selection alike; with 0, shares get the floor 1e-8 instead.

    Returns:
        The reduction; larger is better, 0 for a selection distributed as the raw corpus is.

    Raises:
        InputError: counts that are negative, not finite, empty or of different lengths, or a negative smoothing.

    Example:
        >>> round(kl_reduction([8, 2], [5, 5], [80, 20], smoothing=0.0), 4)
        0.1927

    References:
        arXiv 2302.03169, section 5.
    """
    p, q, s = (np.asarray(counts, dtype=np.float64) for counts in (target, raw, selected))
    if p.ndim not in (1, 2) or q.ndim != 1 or q.shape != s.shape or p.shape[-1:] != q.shape:
        raise InputError(
            f"counts of shapes {p.shape}, {q.shape} and {s.shape}; expected (buckets,) three times, or (targets, buckets) first"
        )
    if not smoothing >= 0 or not np.isfinite(smoothing):
        raise InputError(f"smoothing is {smoothing}; expected a finite number of at least 0")
    for name, counts in (("target", p), ("raw", q), ("selected", s)):
        if not np.isfinite(counts).all() or (counts < 0).any() or not (counts.sum(axis=-1) > 0).all():
            raise InputError(f"the counts of {name} are negative, not finite or all zero; expected counts of at least one n-gram")

    def shares(counts: Any) -> Any:
        padded = counts + smoothing
        return padded / padded.sum() if smoothing else counts / counts.sum() + FLOOR

    p = p / p.sum(axis=-1, keepdims=True)
    return divergence(p, shares(q)) - divergence(p, shares(s))


def hashed_ngrams(
    texts: Sequence[str], *, ngrams: int = 2, num_buckets: int = 10_000, hash: str = "sha256", tokenizer: Any = "wordpunct"
) -> Any:
    """Counts of the hashed n-grams of each text, as a sparse matrix.

    Args:
        texts: documents.
        ngrams: n; every run of 1 to n tokens counts.
        num_buckets: columns of the matrix, 2 to 2**31.
        hash: "sha256" (that of `data-selection`) or "fast"; their buckets differ.
        tokenizer: "wordpunct", or a function from a text in lower case to its tokens.

    Returns:
        scipy CSR array (texts, num_buckets) of int64.

    Raises:
        InputError: a setting out of range.
        InputTypeError: not a list of strings.

    Example:
        >>> hashed_ngrams(["Alice went"]).indices.tolist()
        [114, 5816, 6720]

    References:
        arXiv 2302.03169, section 3.
    """
    features = _features(ngrams, num_buckets, hash, tokenizer, "auto", "text")
    given = corpus(texts, "texts")
    if given.texts is None:
        raise InputError("texts are paths; expected the texts themselves")
    encoded = [text.encode("utf-8", "replace") for text in given.texts]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    found = features.hasher().hashed(np.frombuffer(b"".join(encoded), np.uint8), ends[:-1], ends[1:])
    matrix = csr_array((np.ones(len(found.ids), np.int64), found.ids.copy(), found.indptr), shape=(len(encoded), num_buckets))
    matrix.sum_duplicates()
    return matrix


# The draw


class _Largest:
    """The rows with the k + 1 largest keys of a stream, equal keys by position; holds a few times as many."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.parts: list[dict[str, np.ndarray]] = []
        self.held = 0
        self.bound = -np.inf

    def add(self, **columns: np.ndarray) -> None:
        keys = columns["key"]
        kept = keys > self.bound
        self.parts.append({name: values[kept] for name, values in columns.items()})
        self.held += int(kept.sum())
        if self.held > 2 * (self.k + 1) + 65536:
            self._cut(self.k + 1)
            self.bound = float(self.parts[0]["key"].min())

    def _cut(self, count: int) -> dict[str, np.ndarray]:
        merged = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        chosen = largest(torch.from_numpy(merged["key"]), min(count, len(merged["key"]))).numpy()
        merged = {name: values[chosen] for name, values in merged.items()}
        self.parts, self.held = [merged], len(merged["key"])
        return merged

    def finish(self) -> tuple[dict[str, np.ndarray], float]:
        """The k largest in the order of the stream, and the largest key that was left out (minus infinity if none was)."""
        more = self._cut(self.k + 1)
        keys = np.sort(more["key"])
        bound = float(keys[0]) if len(keys) > self.k else -np.inf
        return self._cut(self.k), bound


def _features(ngrams: int, num_buckets: int, hash: str, tokenizer: Any, kernel: Any, column: str) -> Features:
    if not _whole(ngrams) or not 1 <= ngrams <= 16:
        raise InputError(f"ngrams is {ngrams!r:.40}; expected a whole number from 1 to 16")
    if not _whole(num_buckets) or not 2 <= num_buckets <= 2**31:
        raise InputError(f"num_buckets is {num_buckets!r:.40}; expected a whole number from 2 to 2**31")
    if hash not in ("sha256", "fast"):
        raise InputError(f"hash {hash!r:.40} is unknown; expected 'sha256' (that of data-selection) or 'fast'")
    if tokenizer != "wordpunct" and not callable(tokenizer):
        raise InputError(f"tokenizer is {tokenizer!r:.40}; expected 'wordpunct' or a function from a text to its tokens")
    if not isinstance(column, str) or not column:
        raise InputError(f"field is {column!r:.40}; expected the name of the text field")
    compiled_face(kernel)
    return Features(int(ngrams), int(num_buckets), hash, None if tokenizer == "wordpunct" else tokenizer, kernel, column)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


@method(
    "dsir", paper="2302.03169", job="select", unit="sample", action="select", form="selector", needs_text=False,
    score="log ratio of hashed n-gram distributions", allocation="Gumbel top-k without replacement",
)  # fmt: skip
class DSIR(BaseEstimator):
    """Select k documents of a huge raw corpus that are distributed as a small target corpus is.

    Corpora are streamed: memory depends on k and on the length of the longest line, not on the size of the corpus. Rows that cannot be
    read keep their place, are counted, and are told by file and line.

    Args:
        ngrams: n; every run of 1 to n tokens counts.
        num_buckets: buckets that n-grams are hashed into, 2 to 2**31.
        tokenizer: "wordpunct", or a function from a text in lower case to its tokens, such as `nltk.word_tokenize` (the paper's choice; it
            runs in Python).
        hash: "sha256": bit-equal to `data-selection` 1.0.3; "fast": several times faster, other buckets.
        target_smoothing: counts added to every bucket of the target, so that an unseen n-gram costs less than 10 nats; 0.1 to 1, as long
            as that times `num_buckets` is small against the n-grams of the target: beyond, it drowns them.
        temperature: log weights are divided by it before the noise is added; above 1 makes for more variety.
        length_normalize: rank by log weight per token; then documents of any length compete, and a small temperature is needed.
        min_tokens: documents with fewer tokens (punctuation included) are not chosen.
        max_ngrams: n-grams of the raw corpus that the fit counts: "auto" is 100,000 for each bucket, "all", or a number; more or less, to
            the end of a batch. Where that is not all, pieces of 8 MB are taken in a random order.
        separate_targets: choose for each target (each file, or each list of texts) by itself.
        target_proportions: share of each target; None for shares by n-grams.
        field: name of the text in JSON objects, or of the parquet column.
        n_jobs: processes; -1 for one for each processor.
        engine: "local", or "ray" for a Ray cluster whose machines all see the files and `run_dir`.
        kernel: "compiled" (needs numba), "reference", or "auto": compiled where numba is installed.

    Attributes:
        log_ratio_: (targets, buckets) log ratios.
        raw_counts_: (buckets,) n-grams of the raw corpus that were counted.
        target_counts_: (targets, buckets) n-grams of the targets.
        problems_: the first rows of the target, then of the raw corpus, that could not be used as they were.

    Raises:
        InputError: a setting out of range (told by `fit`).
        MissingExtraError: `kernel="compiled"` without numba, `engine="ray"` without Ray, .zst without zstandard.

    Example:
        >>> raw = ["the cat sat on the mat", "stocks fell on monday", "a cat and a dog", "bonds rose on friday"]
        >>> dsir = DSIR(ngrams=1, min_tokens=1).fit(raw=raw, target=["the dog sat", "a cat on a mat"])
        >>> dsir.select(2, top_k=True).indices.tolist()
        [0, 2]

    References:
        arXiv 2302.03169.
    """

    def __init__(
        self,
        *,
        ngrams: int = 2,
        num_buckets: int = 10_000,
        tokenizer: Any = "wordpunct",
        hash: str = "sha256",
        target_smoothing: float | int = 0.0,
        temperature: float | int = 1.0,
        length_normalize: bool = False,
        min_tokens: int = 100,
        max_ngrams: int | str = "auto",
        separate_targets: bool = False,
        target_proportions: Sequence[float | int] | None = None,
        field: str = "text",
        n_jobs: int = -1,
        engine: str = "local",
        kernel: str = "auto",
    ) -> None:
        self.ngrams = ngrams
        self.num_buckets = num_buckets
        self.tokenizer = tokenizer
        self.hash = hash
        self.target_smoothing = target_smoothing
        self.temperature = temperature
        self.length_normalize = length_normalize
        self.min_tokens = min_tokens
        self.max_ngrams = max_ngrams
        self.separate_targets = separate_targets
        self.target_proportions = target_proportions
        self.field = field
        self.n_jobs = n_jobs
        self.engine = engine
        self.kernel = kernel

    def fit(
        self, *, raw: Any, target: Any, run_dir: PathLike | None = None, resume: bool = False, progress: Progress | None = None
    ) -> "DSIR":
        """Count the n-grams of target and raw corpus.

        Args:
            raw: a path, a list of paths (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; a line or row is a document), or a list of texts.
            target: the same; with `separate_targets`, a list of paths or a list of lists of texts.
            run_dir: folder for what is found on the way, from which a stopped run continues; None for a temporary one.
            resume: continue in an existing `run_dir`.
            progress: told (label, done, total).

        Returns:
            This estimator.

        Raises:
            DataError, FileError, InputTypeError: a corpus that cannot be used, or in which no row can be read.
            ResumeError: the run folder is of other settings or files.
        """
        features, limit = self._checked()
        targets = self._targets(target)
        source = corpus(raw, "raw")
        # What is computed on the way stays where it is; settings that only choose among weights may change between runs.
        deciding = ("ngrams", "num_buckets", "hash", "target_smoothing", "max_ngrams", "separate_targets", "field")
        self._run = Run(run_dir, resume, {
            **{name: getattr(self, name) for name in deciding}, "tokenizer": _named(self.tokenizer), "piece": PIECE,
            "raw": source.fingerprint(), "target": [part.fingerprint() for part in targets],
        })  # fmt: skip
        self._raw, self._pieces = source, source.pieces(self.field)
        self.problems_: list[RowProblem] = []
        states = []
        for number, part in enumerate(targets):
            label = f"target {number + 1} of {len(targets)}" if len(targets) > 1 else "target"
            pieces = part.pieces(self.field)
            capped = limit if self.separate_targets else None
            states.append(self._counted(pieces, features, capped, f"target{number}", label, progress, fingerprints=True))
            self._tell(part, pieces, states[-1])
        pieces = self._pieces
        if limit is not None:
            # A random order, so that a cap does not take what comes first; without one the order does not matter.
            pieces = [pieces[i] for i in np.argsort(hashed64(np.arange(len(pieces), dtype=np.uint64)))]
        counted = self._counted(pieces, features, limit, "raw", "raw", progress)
        self._told = counted.pieces == len(pieces) and counted.complete
        if self._told:
            self._tell(source, pieces, counted)
        self.raw_counts_ = counted.counts
        self.target_counts_ = np.stack([state.counts for state in states])
        self.log_ratio_ = log_ratio(self.target_counts_, self.raw_counts_, self.target_smoothing)
        self._prints = np.unique(np.concatenate([state.fingerprints for state in states]))
        self._weighed = False
        return self

    def _checked(self) -> tuple[Features, int | None]:
        features = _features(self.ngrams, self.num_buckets, self.hash, self.tokenizer, self.kernel, self.field)
        if not _finite(self.target_smoothing) or self.target_smoothing < 0:
            raise InputError(f"target_smoothing is {self.target_smoothing!r:.40}; expected a finite number of at least 0")
        if not _finite(self.temperature) or self.temperature <= 0:
            raise InputError(f"temperature is {self.temperature!r:.40}; expected a finite number above 0")
        if not _whole(self.min_tokens) or self.min_tokens < 0:
            raise InputError(f"min_tokens is {self.min_tokens!r:.40}; expected a whole number of at least 0")
        if not (self.max_ngrams in ("auto", "all") or (_whole(self.max_ngrams) and int(self.max_ngrams) > 0)):
            raise InputError(f"max_ngrams is {self.max_ngrams!r:.40}; expected 'auto', 'all' or a number above 0")
        if not _whole(self.n_jobs) or (self.n_jobs < 1 and self.n_jobs != -1):
            raise InputError(f"n_jobs is {self.n_jobs!r:.40}; expected -1 or a number of at least 1")
        if self.engine not in ("local", "ray"):
            raise InputError(f"engine {self.engine!r:.40} is unknown; expected 'local' or 'ray'")
        limits = {"auto": AUTO * self.num_buckets, "all": None}
        return features, limits[self.max_ngrams] if isinstance(self.max_ngrams, str) else int(self.max_ngrams)

    def _targets(self, target: Any) -> list[Corpus]:
        if not self.separate_targets:
            if self.target_proportions is not None:
                raise InputError("target_proportions are given for targets that are taken as one; set separate_targets=True")
            return [corpus(target, "target")]
        listed = isinstance(target, Sequence) and not isinstance(target, str | bytes)
        if not listed or any(isinstance(part, str) for part in target):
            raise InputError("separate_targets needs a list of paths (pathlib.Path) or a list of lists of texts as target")
        found = [corpus(part, f"target {number + 1}") for number, part in enumerate(target)]
        if not found:
            raise DataError("target is empty; give at least one")
        shares = self.target_proportions
        if shares is not None:
            given = np.asarray(shares, np.float64)
            if given.shape != (len(found),) or not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
                raise InputError(
                    f"target_proportions are {shares!r:.60} for {len(found)} targets; expected a number of at least 0 for each"
                )
        return found

    @property
    def _jobs(self) -> int:
        if self.n_jobs != -1:
            return int(self.n_jobs)
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def _counted(
        self,
        pieces: list[Piece],
        features: Features,
        limit: int | None,
        name: str,
        label: str,
        progress: Progress | None,
        fingerprints: bool = False,
    ) -> Counts:
        """Counts of a corpus: piece after piece, from where an earlier run stopped, up to the limit."""
        state = self._run.counts(name, self.num_buckets)
        if progress is not None:
            progress(label, state.pieces, len(pieces))
        if not state.complete:
            left = pieces[state.pieces :]
            tasks = [Task(piece, features, limit, fingerprints) for piece in left]
            try:
                for piece, result in zip(left, each(tasks, jobs=self._jobs, engine=self.engine), strict=True):
                    state.add(result, piece)
                    self._run.keep(name, state, now=False)
                    if progress is not None:
                        progress(label, state.pieces, len(pieces))
                    if limit is not None and state.ngrams > limit:
                        break
                state.complete = True
            finally:
                self._run.keep(name, state, now=True)
        if not state.ngrams:
            first = f"row {state.reasons[0][1] + 1}: {state.reasons[0][2]}" if state.reasons else "all are blank"
            raise DataError(f"{label} has no text: none of its {state.rows} rows holds a token; {first}")
        return state

    def _tell(self, source: Corpus, pieces: list[Piece], state: Counts) -> None:
        """Warn of rows that could not be used as they are, with file and line."""
        bad = state.unread + state.repaired
        if not bad:
            return
        lines = {piece.number: (source.files[piece.file], line) for piece, line in by_line(pieces[: len(state.lengths)], state.lengths)}
        found = [RowProblem(lines[n][0], lines[n][1] + row + 1, reason) for n, row, reason in sorted(state.reasons)]
        self.problems_ += found
        _warn(found, bad)

    def _weigh(self, progress: Progress | None) -> None:
        """Weights of all rows, piece by piece into the run folder."""
        if not hasattr(self, "_run"):
            raise InputError("this DSIR has no raw corpus; call fit first")
        if self._weighed:
            return
        features, _ = self._checked()
        parameters = self._run.folder / "parameters.safetensors"
        if not parameters.exists():
            with atomic_file(parameters) as temporary:
                save_file({"log_ratio": self.log_ratio_, "fingerprints": self._prints}, temporary)
        missing = [piece for piece in self._pieces if not self._run.rows(piece).exists()]
        finished = len(self._pieces) - len(missing)
        if progress is not None:
            progress("weights", finished, len(self._pieces))
        tasks = [Task(piece, features, parameters=str(parameters), rows=str(self._run.rows(piece))) for piece in missing]
        for count, _ in enumerate(each(tasks, jobs=self._jobs, engine=self.engine), finished + 1):
            if progress is not None:
                progress("weights", count, len(self._pieces))
        self._weighed = True
        if not self._told:
            self._told = True
            found = list(itertools.islice(self.problems(), TOLD))
            self.problems_ += found
            if found:
                _warn(found, sum(result.unread + result.repaired for _, _, result, _ in self._rows()))

    def _rows(self) -> Iterator[tuple[Piece, int, Done, Any]]:
        """(piece, number of rows before it in its file, what is known of it, its rows)."""
        file, line = -1, 0
        for piece in self._pieces:
            result, rows = load_rows(self._run.rows(piece), len(self.log_ratio_))
            line = line if piece.file == file else 0
            file = piece.file
            yield piece, line, result, rows
            line += result.rows

    def score(self, *, progress: Progress | None = None) -> Scores:
        """The log importance weight of every row of the raw corpus. Unlike `select`, this holds a number for each row.

        Args:
            progress: told (label, done, total).

        Returns:
            Scores of unit "sample" by file ("texts" for a list): a vector, or (rows, targets) for several targets. Rows that could not be
            read, and blank lines, have the lowest number a float64 can hold.
        """
        self._weigh(progress)
        parts: dict[str, list[np.ndarray]] = {}
        for piece, _, _, rows in self._rows():
            values = rows["weight"].copy()
            values[rows["note"] >= UNREAD] = np.finfo(np.float64).min
            parts.setdefault(self._raw.files[piece.file] or "texts", []).append(values)
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        values = {name: torch.from_numpy(value[:, 0] if value.shape[1] == 1 else value) for name, value in joined.items() if len(value)}
        return Scores("sample", values, "dsir", {"ngrams": self.ngrams, "num_buckets": self.num_buckets, "hash": self.hash})

    def select(self, k: int, *, top_k: bool = False, seed: Seed = 0, progress: Progress | None = None) -> DSIRSelection:
        """Choose k documents.

        Args:
            k: how many, from 1 to the number of eligible rows.
            top_k: the k largest weights, without noise.
            seed: decides the noise, together with the number of the file and the line.
            progress: told (label, done, total).

        Returns:
            The rows with their weights and inclusion probabilities, in the order of the corpus, and what is known of them together.

        Raises:
            BudgetError: k is out of range; the message says how many rows are eligible and why others are not.
        """
        if not _whole(k) or k < 1:
            raise BudgetError(f"k is {k!r:.40}; expected a whole number of at least 1")
        self._checked()
        self._weigh(progress)
        key = int(torch.randint(2**62, (), generator=seed)) if isinstance(seed, torch.Generator) else derived(seed, "dsir")
        counted = self._totals()
        if k > counted["eligible"]:
            raise BudgetError(
                f"{k} documents of {counted['eligible']} eligible ones; of {counted['rows']} rows, {counted['too_short']} have fewer than "
                f"min_tokens={self.min_tokens} tokens and {counted['unread']} could not be read: lower min_tokens, or ask for fewer"
            )
        quotas = _quotas(k, self._shares())
        taken = np.empty(0, np.int64)
        chosen: list[dict[str, np.ndarray]] = []
        overlap = 0
        for number, quota in enumerate(quotas):
            if quota:
                found, alike = self._draw(number, quota, taken, None if top_k else key)
                chosen.append(found)
                overlap += alike
                taken = np.sort(np.concatenate([taken, found["index"]]))
        merged = {name: np.concatenate([part[name] for part in chosen]) for name in chosen[0]}
        order = np.argsort(merged["index"])
        merged = {name: values[order] for name, values in merged.items()}
        selected = self._counts_of(merged["index"], progress)
        if not top_k and overlap > SAME_AS_TOP * k and k < counted["eligible"]:
            warnings.warn(
                f"{overlap / k:.1%} of the draw is what top-k chooses: weights differ by far more than the noise; "
                "raise temperature for more variety",
                stacklevel=2,
            )
        settings = {name: value for name, value in self.get_params().items() if name not in ("n_jobs", "engine", "kernel")}
        settings |= {
            "tokenizer": _named(self.tokenizer),
            "k": int(k),
            "top_k": top_k,
            "seed": seed if isinstance(seed, int) else "generator",
        }
        return DSIRSelection(
            merged["index"], merged["file"], merged["line"] + 1, merged["where"], merged["weight"], merged["tokens"].astype(np.int64),
            merged["probability"], merged["target"], self._raw.files, kl_reduction(self.target_counts_, self.raw_counts_, selected),
            overlap / k, **counted, settings=settings,
        )  # fmt: skip

    def _shares(self) -> Float64[np.ndarray, " targets"]:
        given = self.target_proportions if self.separate_targets else None
        shares = self.target_counts_.sum(axis=1) if given is None else np.asarray(given, np.float64)
        return shares / shares.sum()

    def _totals(self) -> dict[str, int]:
        totals = dict.fromkeys(("rows", "eligible", "too_short", "unread", "repaired", "known"), 0)
        for _, _, result, rows in self._rows():
            able = self._able(rows)
            totals["rows"] += result.rows
            totals["eligible"] += int(able.sum())
            totals["too_short"] += int((rows["note"] < UNREAD).sum() - able.sum())
            for name in ("unread", "repaired", "known"):
                totals[name] += getattr(result, name)
        return totals

    def _able(self, rows: Any) -> Bool[np.ndarray, " rows"]:
        return (rows["note"] < UNREAD) & (rows["tokens"] >= self.min_tokens)

    def _draw(self, number: int, quota: int, taken: Int64[np.ndarray, " taken"], key: int | None) -> tuple[dict[str, np.ndarray], int]:
        """The documents for one target, and how many of them plain top-k chooses too."""
        drawn, plain, first = _Largest(quota), _Largest(quota), 0
        for piece, line, result, rows in self._rows():
            able = self._able(rows)
            able[taken[(taken >= first) & (taken < first + result.rows)] - first] = False
            places = np.flatnonzero(able)
            kept = rows[places]
            weight = kept["weight"][:, number]
            logit = weight / np.maximum(kept["tokens"], 1) if self.length_normalize else weight
            logit = logit / self.temperature
            noise = 0.0 if key is None else gumbel(derived(key, number), piece.file, line + places)
            drawn.add(
                key=logit + noise, logit=logit, index=first + places, file=np.full(len(places), piece.file), line=line + places,
                where=kept["where"], weight=weight, tokens=kept["tokens"],
            )  # fmt: skip
            if key is not None:
                plain.add(key=logit, index=first + places)
            first += result.rows
        found, bound = drawn.finish()
        alike = quota if key is None else int(np.isin(found["index"], plain.finish()[0]["index"]).sum())
        found["probability"] = np.ones(quota) if key is None else inclusion(found.pop("logit"), bound)
        found.pop("logit", None)
        found["target"] = np.full(quota, number)
        return found, alike

    def _counts_of(self, indices: Int64[np.ndarray, " k"], progress: Progress | None) -> Int64[np.ndarray, " buckets"]:
        """Counts of chosen rows: only the pieces that hold any are read again."""
        features, _ = self._checked()
        tasks, first = [], 0
        for piece in self._pieces:
            rows = load_rows(self._run.rows(piece), len(self.log_ratio_), only_summary=True)[0].rows
            low, high = np.searchsorted(indices, [first, first + rows])
            if high > low:
                tasks.append(Task(piece, features, chosen=indices[low:high] - first))
            first += rows
        total = np.zeros(self.num_buckets, np.int64)
        for count, result in enumerate(each(tasks, jobs=self._jobs, engine=self.engine), 1):
            assert result.counts is not None
            total += result.counts
            if progress is not None:
                progress("selection", count, len(tasks))
        return total

    def problems(self) -> Iterator[RowProblem]:
        """All rows of the raw corpus that were unread or repaired, by file and line; needs the weights of `score` or `select`."""
        self._weigh(None)
        for piece, line, result, rows in self._rows():
            told: dict[int, str] = {}
            for row, reason in result.reasons:
                told[row] = f"{told[row]}; {reason}" if row in told else reason
            marked = {int(row): "unread or repaired" for row in np.flatnonzero((rows["note"] > 0) & (rows["note"] <= UNREAD))}
            for row, reason in sorted((marked | told).items()):
                yield RowProblem(self._raw.files[piece.file], line + row + 1, reason)

    def write(self, selection: DSIRSelection, output: PathLike, *, overwrite: bool = False) -> Path:
        """Write the chosen documents, in the order of the corpus, one file for each source file, and `selection.json` beside them.

        Lines are copied as they stand (unpacked), rows of parquet with all their columns.

        Args:
            selection: what `select` returned.
            output: folder to make.
            overwrite: whether to replace an existing one.

        Returns:
            The folder.

        Raises:
            FileError: it exists, or cannot be written.
        """
        return write_selection(selection, self._raw, self.problems_, output, overwrite=overwrite)

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Write counts and settings as safetensors; nothing of the corpora but their counts."""
        check_output(path, overwrite)
        settings = {name: value for name, value in self.get_params().items() if name != "tokenizer"}
        told = {"format": "whatmatters.dsir", "version": 1, "settings": settings, "tokenizer": _named(self.tokenizer)}
        with atomic_file(path, overwrite=overwrite) as temporary:
            save_file(
                {"raw_counts": self.raw_counts_, "target_counts": self.target_counts_, "fingerprints": self._prints.view(np.int64)},
                temporary, metadata={"whatmatters": json.dumps(told, default=list)},
            )  # fmt: skip

    @classmethod
    def load(cls, path: PathLike, *, raw: Any, run_dir: PathLike | None = None, tokenizer: Any = "wordpunct") -> "DSIR":
        """Read what `save` wrote, to weigh and select from another raw corpus with it.

        Args:
            path: the file.
            raw: the corpus to select from.
            run_dir: as for `fit`.
            tokenizer: the function that was used, where it was not "wordpunct"; functions are not saved.

        Returns:
            An estimator that can `score` and `select`, as after `fit`.

        Raises:
            FileError, FormatError: no such file, or not one of ours.
            InputError: the tokenizer is not the one that the counts were made with.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                told = json.loads((file.metadata() or {}).get("whatmatters", "{}"))
                arrays = {name: file.get_tensor(name) for name in ("raw_counts", "target_counts", "fingerprints")}
        except OSError as error:
            raise FileError(f"cannot read {os.fspath(path)}: {error}") from error
        except (SafetensorError, ValueError) as error:
            raise FormatError(f"{os.fspath(path)} was not written by DSIR.save: {error}") from error
        if told.get("format") != "whatmatters.dsir" or told.get("version") != 1:
            raise FormatError(f"{os.fspath(path)} was not written by DSIR.save")
        if _named(tokenizer) != told["tokenizer"]:
            raise InputError(f"the counts were made with the tokenizer {told['tokenizer']!r}, not {_named(tokenizer)!r}; give that one")
        try:
            made = cls(**told["settings"], tokenizer=tokenizer)
            made._checked()
        except (TypeError, InputError) as error:
            raise FormatError(f"{os.fspath(path)} holds settings that DSIR does not take: {error}") from error
        made.raw_counts_, made.target_counts_ = arrays["raw_counts"], arrays["target_counts"]
        if made.raw_counts_.shape != (made.num_buckets,) or made.target_counts_.shape[1:] != (made.num_buckets,):
            raise FormatError(f"{os.fspath(path)} holds counts of shape {made.raw_counts_.shape} for {made.num_buckets} buckets")
        made._prints, made.problems_, made._weighed, made._told = arrays["fingerprints"].view(np.uint64), [], False, False
        made.log_ratio_ = log_ratio(made.target_counts_, made.raw_counts_, made.target_smoothing)
        made._raw = corpus(raw, "raw")
        made._pieces = made._raw.pieces(made.field)
        made._run = Run(run_dir, False, {"loaded": told, "raw": made._raw.fingerprint()})
        return made


def _named(tokenizer: Any) -> str:
    return (
        tokenizer
        if isinstance(tokenizer, str)
        else f"{getattr(tokenizer, '__module__', '')}.{getattr(tokenizer, '__qualname__', tokenizer)}"
    )


def _quotas(k: int, shares: Float64[np.ndarray, " targets"]) -> list[int]:
    """Documents for each target: the whole part of its share, what is left to the last."""
    quotas = [int(k * share) for share in shares]
    quotas[-1] += k - sum(quotas)
    return quotas


def _warn(problems: Sequence[RowProblem], count: int) -> None:
    shown = "; ".join(f"{p.file or 'texts'}, line {p.line}: {p.reason}" for p in problems[:5])
    warnings.warn(f"{count} rows could not be used as they are ({shown}{'; ...' if count > 5 else ''})", stacklevel=4)
