"""Hashed n-grams and JSON fields: the compiled faces against plain Python, on all of Unicode and on broken input."""

import hashlib
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core.errors import InputError, MissingExtraError
from whatmatters.kernels import ngrams
from whatmatters.kernels.json_lines import texts_of_lines
from whatmatters.kernels.ngrams import Hasher, compiled_face, reference_buckets, tokens_of

HASHES = ("sha256", "fast")
ODD = [
    "",
    "alice",
    "Alice went",
    "a\x1cb\x1db\x1ec\x1fd",
    "x y",
    "日本語 と 中文",
    "e\u0301té",
    "İstanbul Iı",
    "ΣΊΣΥΦΟΣ ΟΔΟΣ. ΑΣ",
    "😀😀 ok",
    "a.b,c!!",
    "Ⱥ K Å ẞ ǅ",
    "\x00\x01 a\x00b",
    "_under_score_ 12²½",
    "\u2028line\u2029",
    "\U0003ffff \U00100000x",
    "  ",
]


def packed(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends[:-1], ends[1:]


def by_hand(text: str, n: int, m: int) -> list[int]:
    """Ten lines with re and hashlib."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    found = []
    for order in range(1, n + 1):
        for first in range(len(words) - order + 1):
            found.append(int(hashlib.sha256(" ".join(words[first : first + order]).encode()).hexdigest(), 16) % m)
    return sorted(found)


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_compiled_face_is_the_reference(hash: str, n: int) -> None:
    texts = [*ODD, " ".join(ODD), "word " * 50, "a" * 300 + " " + "b" * 40]
    expected = reference_buckets(texts, orders=n, buckets=1009, hash=hash)
    for face in ("compiled", "reference"):
        found = Hasher(n, 1009, hash, face=face).hashed(*packed(texts))
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.indptr, expected.indptr)
        assert np.array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("face", ["compiled", "reference"])
def test_sha256_is_ten_lines_of_hashlib(face: str) -> None:
    draw = np.random.default_rng(0)
    alphabet = [*"abcXYZ019 .,!?-\t\n", "é", "ß", "Σ", "İ", "日", "\u0301", "\xa0", "\x1d", "😀"]
    texts = ["".join(draw.choice(alphabet, draw.integers(0, 80))) for _ in range(180)] + ODD
    found = Hasher(2, 10_000, "sha256", face=face).hashed(*packed(texts))
    for i, text in enumerate(texts):
        assert sorted(found.ids[found.indptr[i] : found.indptr[i + 1]].tolist()) == by_hand(text, 2, 10_000), text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=6), st.sampled_from(HASHES), st.integers(1, 3), st.sampled_from([2, 10_000, 2**31]))
def test_all_texts(texts: list[str], hash: str, n: int, buckets: int) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    expected = reference_buckets(texts, orders=n, buckets=buckets, hash=hash)
    found = Hasher(n, buckets, hash, face="compiled").hashed(*packed(texts))
    assert np.array_equal(found.ids, expected.ids)
    # The number of n-grams tells the number of tokens.
    for total, tokens in zip(np.diff(found.indptr), found.tokens, strict=True):
        if tokens >= n - 1:
            assert total == n * tokens - n * (n - 1) // 2


def test_the_tables_are_those_of_this_python() -> None:
    kind, lower = ngrams._tables()
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        word = bool(character.isalnum() or character == "_")
        expected = 1 if word else 0 if character.isspace() else 2
        assert (kind[point] if point < len(kind) else 2) == expected
        small = character.lower()
        if len(small) == 1:
            assert (lower[point] if point < len(lower) else point) == ord(small)
        else:
            assert point == 0x130


def test_published_vectors_and_stable_fast_hash() -> None:
    assert reference_buckets(["Alice went"], orders=2, buckets=10_000, hash="sha256").ids.tolist() == [6720, 5816, 114]
    # The fast hash is a promise: saved parameters depend on it. By its definition, in integers.
    mask, value = 2**64 - 1, 0xCBF29CE484222325
    for byte in b"alice":
        value = (value ^ byte) * 0x100000001B3 & mask
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & mask
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & mask
    value ^= value >> 33
    assert reference_buckets(["alice"], orders=1, buckets=10_000, hash="fast").ids.tolist() == [(value >> 32) * 10_000 >> 32]


def test_every_length_of_a_sha256_message() -> None:
    texts = ["x" * length for length in range(1, 200)]
    found = Hasher(1, 2**31, "sha256", face="compiled").hashed(*packed(texts))
    assert found.ids.tolist() == [int(hashlib.sha256(t.encode()).hexdigest(), 16) % 2**31 for t in texts]


def test_the_memo_never_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "MEMO", 4)  # four entries: nearly every look-up collides
    hasher = Hasher(2, 10_000, "sha256", face="compiled")
    text = "the cat and the dog and the cat and a cat " * 20
    for _ in range(2):
        found = hasher.hashed(*packed([text]))
        assert np.array_equal(found.ids, reference_buckets([text], orders=2, buckets=10_000, hash="sha256").ids)
    assert 0 < hasher.missed < 2 * len(found.ids)


@pytest.mark.parametrize("face", ["compiled", "reference"])
def test_products_are_dense_dot_products(face: str) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abcdefgh"), draw.integers(0, 30))) for _ in range(21)]
    hasher = Hasher(2, 500, "sha256", face=face)
    found = hasher.hashed(*packed(texts))
    weights = draw.standard_normal(500)
    for _ in range(2):
        result = hasher.products(weights, found)
        for i in range(len(texts)):
            counts = np.bincount(found.ids[found.indptr[i] : found.indptr[i + 1]], minlength=500)
            assert result[i] == np.dot(weights, counts)  # bit for bit


def test_tokens_are_those_of_word_punct() -> None:
    assert tokens_of("Good muffins cost $3.88\nin New York.") == ["good", "muffins", "cost", "$", "3", ".", "88", "in", "new", "york", "."]


def test_faces_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected 'auto'"):
        compiled_face("cuda")
    compiled_face.cache_clear()
    monkeypatch.setattr(ngrams.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="whatmatters\\[fast\\]"):
        compiled_face("compiled")
    assert compiled_face("auto") is None
    compiled_face.cache_clear()


LINES = [
    b'{"text": "plain"}',
    b'{"a": [1, {"text": "inner"}], "text": "outer"}',
    b'{"text": "esc \\n\\t\\"\\\\\\/ \\u00e9 \\ud83d\\ude00"}',
    b'{"text": "lone \\ud800 x \\udc00"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": 3}',
    b'{"text": null, "n": -1.5e-3}',
    b'{"other": "x"}',
    b'{"text": "broken',
    b'{"text": "a"} x',
    b'{"text": "a",}',
    b'{"text": "tab\there"}',
    b'{"n": 01, "text": "a"}',
    b'{"n": NaN, "text": "a"}',
    b"[1, 2]",
    b'"a bare string"',
    b"",
    b"   \t\r",
    b"null",
    b'{"t\\u0065xt": "hidden key"}',
    b'{"text": "a", "n": 1.}',
    b'{"n": [], "text": "c"}',
    b'{"n": [1,], "text": "c"}',
    b'{"n": {"a": {}}, "text": ""}',
    b'{"text": "\\x41"}',
    b'{"text": {"text": "x"}}',
    b"\xef\xbb\xbf" + b'{"text": "bom"}',
    b'{"text": "' + "日本 é".encode() + b'"}',
    b'{"n": ' + b"9" * 5000 + b', "text": "a"}',
    b"[" * 70 + b"]" * 70,
    b'{"text": "\\ud83d\\u0041"}',
    b"{}",
    b'{"n": tru, "text": "a"}',
    b'{"n": true, "text": "a", "m": false}',
    b'{"a" : 1 , "text" : "spaces" }\r',
    b'{"n":' + b"[" * 80 + b"]" * 80 + b',"text":"d"}',
]


def fields(lines: list[bytes], face: str) -> tuple[list[bytes], dict[int, str], dict[int, str], list[int]]:
    text = np.frombuffer(b"".join(lines), np.uint8)
    ends = np.cumsum([0, *map(len, lines)]).astype(np.int64)
    found = texts_of_lines(text, ends[:-1], ends[1:], "text", face=face)
    got = [found.plain[a:b].tobytes() for a, b in zip(found.begin, found.end, strict=True)]
    return got, found.unread, found.repaired, sorted(found.blank)


def test_json_fields_are_those_of_the_json_module() -> None:
    texts, unread, repaired, blank = fields(LINES, "compiled")
    assert (texts, unread, repaired, blank) == fields(LINES, "reference")
    for number, line in enumerate(LINES):
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except ValueError:
            assert number in unread or number in blank
            continue
        text = record.get("text") if isinstance(record, dict) else record if isinstance(record, str) else None
        if isinstance(text, str):
            assert texts[number].decode() == re.sub("[\ud800-\udfff]", "\ufffd", text)
            assert (number in repaired) == any(0xD800 <= ord(c) <= 0xDFFF for c in text)
        else:
            assert number in unread
    assert len(blank) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["text", "a", "tex"]), json_values, max_size=3),
    st.booleans(),
    st.integers(0, 200),
    st.binary(max_size=2),
)
def test_json_fields_of_any_object_whole_or_damaged(record: dict, escaped: bool, place: int, junk: bytes) -> None:
    line = json.dumps(record, ensure_ascii=escaped).encode("utf-8", "replace")
    damaged = (line[:place] + junk.decode("utf-8", "replace").encode() + line[place:]).replace(b"\n", b" ")
    damaged = damaged.decode("utf-8", "replace").encode()
    assert fields([line, damaged], "compiled") == fields([line, damaged], "reference")
