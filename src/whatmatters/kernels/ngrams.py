"""Hashed n-grams of text: the buckets of every run of 1 to n tokens, from raw UTF-8 bytes.

Text is lower-cased and cut into tokens as NLTK's WordPunct does (runs of word characters, runs of other marks; Unicode, by the tables of
the Python that runs). Two hashes:

- "sha256": int(sha256(tokens joined by one blank), 16) mod m, bit-equal to the package `data-selection`.
- "fast": a token's UTF-8 bytes by 64-bit FNV-1a, then h = mix(FNV); a longer run by h(t1..tg) = mix(h(t1..t(g-1)) * 0x9E3779B97F4A7C15 +
  h(tg)), mix being MurmurHash3's finalizer; bucket = (h >> 32) * m >> 32. These constants will not change.

Faces: `reference_buckets` in plain Python is the oracle; the compiled one (numba, the extra `fast`) makes a single pass over the bytes.
"""

import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8, UInt32, UInt64

from whatmatters.core.errors import InputError, MissingExtraError

__all__ = ["HashedTexts", "Hasher", "compiled_face", "reference_buckets", "tokens_of"]

Tokenizer = Callable[[str], Sequence[str]]

WORD_PUNCT = re.compile(r"\w+|[^\w\s]+")
CHARACTERS = 0x40000
"""Code points with an entry in the tables; above these, no Unicode version has letters, digits or blanks."""
MEMO = 2**20
"""Entries of the table of n-grams hashed before; 64 bytes each."""
MASK = 2**64 - 1


@dataclass(frozen=True, eq=False)
class HashedTexts:
    """Buckets of the n-grams of some documents.

    Attributes:
        ids: buckets, document after document; inside one by where the n-gram ends, shorter ones first.
        indptr: document i has ids[indptr[i] : indptr[i + 1]].
        tokens: tokens of each document.
    """

    ids: Int64[np.ndarray, " ngrams"]
    indptr: Int64[np.ndarray, " ends"]
    tokens: Int64[np.ndarray, " documents"]


def tokens_of(text: str) -> list[str]:
    """Tokens of a text: lower case, runs of word characters and runs of other marks.

    Example:
        >>> tokens_of("Alice went (home).")
        ['alice', 'went', '(', 'home', ').']
    """
    return WORD_PUNCT.findall(text.lower())


def sha256_bucket(gram: str, buckets: int) -> int:
    """SHA-256 of the n-gram, modulo the number of buckets.

    Example:
        >>> sha256_bucket("alice", 10_000), sha256_bucket("alice went", 10_000)
        (6720, 114)
    """
    return int.from_bytes(hashlib.sha256(gram.encode("utf-8", "replace")).digest(), "big") % buckets


def _mixed(value: int) -> int:
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & MASK
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
    return value ^ (value >> 33)


@functools.lru_cache(2**18)
def _fast_hash(token: str) -> int:
    value = 0xCBF29CE484222325
    for byte in token.encode("utf-8", "replace"):
        value = (value ^ byte) * 0x100000001B3 & MASK
    return _mixed(value)


@functools.lru_cache(2**20)
def _fast_gram(gram: tuple[str, ...]) -> int:
    if len(gram) == 1:
        return _fast_hash(gram[0])
    return _mixed((_fast_gram(gram[:-1]) * 0x9E3779B97F4A7C15 + _fast_hash(gram[-1])) & MASK)


@functools.lru_cache(2**20)
def _bucket(gram: tuple[str, ...], buckets: int, hash: str) -> int:
    if hash == "sha256":
        return sha256_bucket(" ".join(gram), buckets)
    return (_fast_gram(gram) >> 32) * buckets >> 32


def reference_buckets(texts: Sequence[str], *, orders: int, buckets: int, hash: str, tokenizer: Tokenizer | None = None) -> HashedTexts:
    """Buckets of the n-grams of some texts, in plain Python: the oracle, and what runs without numba.

    Args:
        texts: documents.
        orders: n; every run of 1 to n tokens counts.
        buckets: m.
        hash: "sha256" or "fast".
        tokenizer: from a text in lower case to its tokens; None for `tokens_of`.

    Example:
        >>> reference_buckets(["Alice went"], orders=2, buckets=10_000, hash="sha256").ids.tolist()
        [6720, 5816, 114]
    """
    ids: list[int] = []
    ends = [0]
    counts = []
    for text in texts:
        tokens = tuple(tokens_of(text) if tokenizer is None else tokenizer(text.lower()))
        for last in range(1, len(tokens) + 1):
            ids.extend(_bucket(tokens[last - order : last], buckets, hash) for order in range(1, min(orders, last) + 1))
        ends.append(len(ids))
        counts.append(len(tokens))
    return HashedTexts(np.array(ids, np.int64), np.array(ends, np.int64), np.array(counts, np.int64))


@functools.cache
def compiled_face(face: str = "auto") -> Any:
    """The module of compiled functions, or None where the reference is to run.

    Raises:
        MissingExtraError: "compiled" was asked for by name and numba is not installed.
        InputError: no such face.
    """
    if face not in ("auto", "compiled", "reference"):
        raise InputError(f"kernel {face!r:.40} is unknown; expected 'auto', 'compiled' or 'reference'")
    if face == "reference":
        return None
    if importlib.util.find_spec("numba") is None:
        if face == "compiled":
            raise MissingExtraError("the compiled kernel needs numba: pip install 'whatmatters[fast]', or use kernel='reference'")
        return None
    return importlib.import_module("whatmatters.kernels._ngrams_compiled")


@functools.cache
def _tables() -> tuple[UInt8[np.ndarray, " points"], UInt32[np.ndarray, " points"]]:
    """Of each code point: 0 for a blank, 1 for a word character, 2 for another mark; and its lower case where that is one character."""
    characters = [chr(point) for point in range(CHARACTERS)]
    kinds = bytes(1 if c.isalnum() or c == "_" else 0 if c.isspace() else 2 for c in characters)
    lower = [c.lower() for c in characters]
    points = [ord(small) if len(small) == 1 else ord(c) for small, c in zip(lower, characters, strict=True)]
    return np.frombuffer(kinds, np.uint8), np.array(points, np.uint32)


class Hasher:
    """Hashes documents given as bytes; holds the room it works in, so that nothing is allocated twice.

    Args:
        orders: n; every run of 1 to n tokens counts.
        buckets: m, from 2 to 2**31.
        hash: "sha256" or "fast".
        tokenizer: from a text in lower case to its tokens; None for WordPunct. Any other runs in Python.
        face: "compiled", "reference", or "auto": compiled where numba is installed.

    Example:
        >>> text = np.frombuffer(b"Alice went. Home!", np.uint8)
        >>> Hasher(1, 100, "fast").hashed(text, np.array([0, 12]), np.array([11, 17])).tokens
        array([3, 2])
    """

    def __init__(self, orders: int, buckets: int, hash: str, *, tokenizer: Tokenizer | None = None, face: str = "auto") -> None:
        self.orders, self.buckets, self.hash, self.tokenizer = orders, buckets, hash, tokenizer
        self.compiled: Any = compiled_face(face) if tokenizer is None else None
        self.missed = 0  # n-grams that were not in the memo
        self._ids = np.empty(0, np.int64)
        self._scratch = np.empty(0, np.uint8)
        self._spans = np.empty((0, 3), np.int64)
        self._memo: UInt64[np.ndarray, "slots words"] | None = None
        self._rows = np.zeros((0, 0))

    def hashed(
        self, text: UInt8[np.ndarray, " bytes"], begin: Int64[np.ndarray, " documents"], end: Int64[np.ndarray, " documents"]
    ) -> HashedTexts:
        """Buckets of the documents text[begin[i] : end[i]], which must be valid UTF-8. The ids are overwritten by the next call."""
        if self.compiled is None:
            texts = [text[a:b].tobytes().decode() for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
            return reference_buckets(texts, orders=self.orders, buckets=self.buckets, hash=self.hash, tokenizer=self.tokenizer)
        odd = np.zeros(len(begin), np.bool_)
        result = self._compiled(text, begin, end, odd)
        if odd.any():
            # The lower case of a few capitals depends on their neighbours: Python makes it, and the pass is repeated.
            result = self._compiled(*_lowered(text, begin, end, odd), np.zeros(len(begin), np.bool_))
        return result

    def _compiled(
        self,
        text: UInt8[np.ndarray, " bytes"],
        begin: Int64[np.ndarray, " documents"],
        end: Int64[np.ndarray, " documents"],
        odd: Bool[np.ndarray, " documents"],
    ) -> HashedTexts:
        kind, lower = _tables()
        total = int((end - begin).sum())
        if len(self._ids) < self.orders * total:
            self._ids = np.empty(self.orders * total, np.int64)
        indptr, tokens = np.zeros(len(begin) + 1, np.int64), np.zeros(len(begin), np.int64)
        common = (text, begin, end, self.orders, self.buckets, kind, lower, self._ids, indptr, tokens, odd)
        if self.hash == "fast":
            count = self.compiled.fast_buckets(*common)
        else:
            if self._memo is None:
                self._memo = np.full((MEMO, self.compiled.KEY_WORDS + 1), 2**64 - 1, np.uint64)
            longest = int((end - begin).max(initial=0))
            if len(self._scratch) < 3 * longest + 64:
                # A blank after each token; and some small letters take more bytes than their capitals.
                self._scratch = np.empty(3 * longest + 64, np.uint8)
                self._spans = np.empty((self.orders * longest + 8, 3), np.int64)
            count, missed, _ = self.compiled.exact_buckets(*common, self._memo, self._scratch, self._spans)
            self.missed += missed
        return HashedTexts(self._ids[:count], indptr, tokens)

    def products(self, weights: Float64[np.ndarray, "*targets buckets"], texts: HashedTexts) -> Float64[np.ndarray, "documents *targets"]:
        """Each document's `np.dot(weights, counts)`, by that very call: the same bits as code that does the same on dense counts."""
        documents = len(texts.tokens)
        result = np.zeros((documents, *weights.shape[:-1]))
        if self._rows.shape[1:] != weights.shape[-1:]:
            self._rows = np.zeros((8, weights.shape[-1]))
        for first in range(0, documents, len(self._rows)):
            rows = self._rows[: documents - first]
            if self.compiled is None:
                for row in range(len(rows)):
                    a, b = texts.indptr[first + row : first + row + 2]
                    result[first + row] = np.dot(weights, np.bincount(texts.ids[a:b], minlength=weights.shape[-1]).astype(np.float64))
                continue
            self.compiled.add_rows(texts.ids, texts.indptr, first, rows, 1)
            for row, counts in enumerate(rows):
                result[first + row] = np.dot(weights, counts)
            self.compiled.add_rows(texts.ids, texts.indptr, first, rows, -1)
        return result


def _lowered(
    text: UInt8[np.ndarray, " bytes"],
    begin: Int64[np.ndarray, " documents"],
    end: Int64[np.ndarray, " documents"],
    odd: Bool[np.ndarray, " documents"],
) -> tuple[UInt8[np.ndarray, " more"], Int64[np.ndarray, " documents"], Int64[np.ndarray, " documents"]]:
    """The same documents with the odd ones lower-cased by Python, appended behind the others."""
    begin, end = begin.copy(), end.copy()
    added, size = [text], len(text)
    for document in np.flatnonzero(odd).tolist():
        small = text[begin[document] : end[document]].tobytes().decode().lower().encode()
        begin[document], end[document] = size, size + len(small)
        size += len(small)
        added.append(np.frombuffer(small, np.uint8))
    return np.concatenate(added), begin, end
