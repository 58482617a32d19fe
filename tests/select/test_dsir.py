"""DSIR: closed forms, other libraries, enumeration; the same rows whoever works; bad rows told; stopped runs continued."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from whatmatters.core.catalog import get_method
from whatmatters.core.errors import (
    BudgetError,
    DataError,
    FileError,
    FormatError,
    InputError,
    MissingExtraError,
    ResumeError,
    WhatMattersError,
)
from whatmatters.kernels.ngrams import sha256_bucket
from whatmatters.select import DSIR, DSIRSelection, hashed_ngrams, kl_reduction
from whatmatters.select import _corpus as corpora
from whatmatters.select.dsir import _Largest, gumbel, inclusion, log_ratio
from whatmatters.testing.forms import form

WORDS = {
    "sea": ["sea", "ship", "sail", "wave", "storm", "harbour", "the", "a", "of"],
    "bank": ["bank", "bond", "stock", "price", "share", "market", "the", "a", "of"],
}


def texts(seed: int, count: int, *kinds: str, longest: int = 30) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[kinds[i % len(kinds)]], draw.integers(5, longest))) for i in range(count)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of kilobytes in several pieces and blocks."""
    monkeypatch.setattr(corpora, "PIECE", 4000)
    monkeypatch.setattr(corpora, "BLOCK", 900)
    monkeypatch.setattr(corpora, "PACKED", 100)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the draw is what top-k chooses")
        yield


def jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows)))
    return path


def fitted(raw: object, target: object, **settings: object) -> DSIR:
    run = {name: settings.pop(name) for name in ("run_dir", "resume", "progress") if name in settings}
    return DSIR(**{"min_tokens": 1, "n_jobs": 1, "max_ngrams": "all", **settings}).fit(raw=raw, target=target, **run)


# Weights


def test_weights_are_sparse_products_and_multinomial_likelihoods() -> None:
    raw, target = texts(0, 40, "sea", "bank"), texts(1, 15, "sea")
    dsir = fitted(raw, target, num_buckets=200, target_smoothing=0.5)
    counts, of_target = hashed_ngrams(raw, num_buckets=200), hashed_ngrams(target, num_buckets=200)
    p = (of_target.sum(axis=0) + 0.5) / (of_target.sum() + 100)
    q = counts.sum(axis=0) / counts.sum()
    expected = counts @ (np.log(p + 1e-8) - np.log(q + 1e-8))
    weights = dsir.score().values["texts"].numpy()
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    # Up to the floor it is the log likelihood ratio of the multinomials; the coefficient cancels.
    p, q = (x + 1e-8 for x in (p, q))
    p, q = p / p.sum(), q / q.sum()
    for row, weight in zip(counts.toarray(), weights, strict=True):
        ratio = stats.multinomial.logpmf(row, row.sum(), p) - stats.multinomial.logpmf(row, row.sum(), q)
        assert weight == pytest.approx(ratio, abs=1e-3)


def test_counts_are_those_of_scikit_learn() -> None:
    raw = ["Hello, world! hello", "", "a b_c 12 d-e", "日本 é x"]
    vectorizer = CountVectorizer(token_pattern=r"\w+|[^\w\s]+", ngram_range=(1, 2))
    counts = vectorizer.fit_transform(raw).toarray()
    expected = np.zeros((4, 97), np.int64)
    for gram, column in vectorizer.vocabulary_.items():
        expected[:, sha256_bucket(gram, 97)] += counts[:, column]
    assert np.array_equal(hashed_ngrams(raw, num_buckets=97).toarray(), expected)


def test_log_ratio_is_naive_bayes() -> None:
    draw = np.random.default_rng(0)
    target, raw = draw.integers(0, 50, 30), draw.integers(0, 50, 30)
    bayes = MultinomialNB(alpha=1.0, fit_prior=False).fit(np.stack([raw, target]), [0, 1])
    odds = bayes.feature_log_prob_[1] - bayes.feature_log_prob_[0]
    np.testing.assert_allclose(log_ratio(target, raw + 1, 1.0), odds, atol=1e-5)


def test_equal_corpora_have_no_weights_and_a_uniform_choice() -> None:
    raw = [f"word{i} other{i}" for i in range(10)]
    dsir = fitted(raw, raw)
    assert not dsir.log_ratio_.any()
    assert not dsir.score().values["texts"].any()
    chosen = np.zeros(10)
    for seed in range(400):
        chosen[dsir.select(3, seed=seed).indices] += 1
    assert stats.chisquare(chosen).pvalue > 1e-3
    assert dsir.select(10).indices.tolist() == list(range(10))


def test_fast_hash_gives_the_same_mathematics() -> None:
    raw, target = texts(0, 30, "sea", "bank"), texts(1, 10, "sea")
    dsir = fitted(raw, target, hash="fast", num_buckets=5000)
    expected = hashed_ngrams(raw, num_buckets=5000, hash="fast") @ dsir.log_ratio_[0]
    np.testing.assert_allclose(dsir.score().values["texts"].numpy(), expected, rtol=1e-10, atol=1e-9)
    reference = fitted(raw, target, hash="fast", num_buckets=5000, kernel="reference")
    assert torch.equal(reference.score().values["texts"], dsir.score().values["texts"])


def test_any_tokenizer() -> None:
    raw, target = ["a,b c", "d e", "a,b a,b"], ["a,b"]
    dsir = fitted(raw, target, tokenizer=str.split, ngrams=1)
    assert dsir.raw_counts_[sha256_bucket("a,b", 10_000)] == 3
    assert dsir.select(1, top_k=True).indices.tolist() == [2]


# The draw


def test_gumbel_top_k_is_sequential_sampling() -> None:
    logits = np.log([1.0, 2.0, 3.0, 4.0])
    keys = logits + gumbel(7, 0, np.arange(4 * 200_000)).reshape(-1, 4)
    drawn = np.sort(np.argsort(-keys, axis=1)[:, :2], axis=1)
    shares = logits.copy()
    shares = np.exp(shares) / np.exp(shares).sum()
    distance = 0.0
    for a, b in itertools.combinations(range(4), 2):
        exact = shares[a] * shares[b] / (1 - shares[a]) + shares[b] * shares[a] / (1 - shares[b])
        distance += abs(np.mean((drawn == (a, b)).all(axis=1)) - exact) / 2
    assert distance < 0.005


def test_noise_is_standard_gumbel_and_of_its_line() -> None:
    noise = gumbel(3, 1, np.arange(100_000))
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    assert np.array_equal(noise[500:600], gumbel(3, 1, np.arange(500, 600)))
    for key, file in ((4, 1), (3, 2)):
        other = gumbel(key, file, np.arange(100_000))
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02


def test_first_draw_is_softmax_and_select_uses_it() -> None:
    raw = ["a a", "b b", "c c", "d d"]
    dsir = fitted(raw, ["a b c", "a b", "a"], ngrams=1, target_smoothing=1.0, temperature=2.0)
    weights = dsir.score().values["texts"].numpy() / 2
    expected = np.exp(weights - weights.max())
    expected /= expected.sum()
    drawn = np.bincount([int(dsir.select(1, seed=seed).indices[0]) for seed in range(600)], minlength=4)
    assert stats.chisquare(drawn, expected * 600).pvalue > 1e-3


def test_inverse_probabilities_are_unbiased() -> None:
    draw = np.random.default_rng(0)
    logits, lengths, k = draw.standard_normal(30), draw.integers(1, 100, 30).astype(float), 8
    estimates = []
    for seed in range(10_000):
        keys = logits + gumbel(seed, 0, np.arange(30))
        order = np.argsort(-keys)
        chosen, bound = order[:k], keys[order[k]]
        estimates.append((lengths[chosen] / inclusion(logits[chosen], bound)).sum())
    error = np.std(estimates) / 100
    assert abs(np.mean(estimates) - lengths.sum()) < 3 * error
    # The same from `select`, whose bound is the largest key left out.
    dsir = fitted(texts(0, 60, "sea", "bank"), texts(1, 9, "sea"), temperature=400.0)
    sums = [(1 / dsir.select(20, seed=seed).inclusion_probability).sum() for seed in range(150)]
    assert abs(np.mean(sums) - 60) < 4 * np.std(sums) / np.sqrt(150)


def test_top_k_is_argsort_with_ties_by_position() -> None:
    raw = texts(0, 50, "sea", "bank")
    raw[40] = raw[10]
    dsir = fitted(raw, texts(1, 10, "sea"))
    weights = dsir.score().values["texts"].numpy()
    for k in (1, 7, 49, 50):
        assert dsir.select(k, top_k=True).indices.tolist() == sorted(np.argsort(-weights, kind="stable")[:k].tolist())
    assert (dsir.select(5, top_k=True).inclusion_probability == 1).all()


def test_a_stream_of_keys_is_cut_as_a_whole() -> None:
    keys = np.random.default_rng(0).integers(0, 300_000, 400_000).astype(np.float64)
    stream = _Largest(50)
    for first in range(0, len(keys), 30_000):
        stream.add(key=keys[first : first + 30_000], index=np.arange(first, min(first + 30_000, len(keys))))
    found, bound = stream.finish()
    order = np.argsort(-keys, kind="stable")
    assert found["index"].tolist() == sorted(order[:50].tolist())
    assert bound == keys[order[50]]


def test_length_normalization_ranks_by_mean_weight() -> None:
    raw = ["sea sea", "sea sea sea sea sea bank bank", "bank"]
    plain, normal = (fitted(raw, ["sea"] * 3, ngrams=1, target_smoothing=1.0, length_normalize=on) for on in (False, True))
    assert normal.select(1, top_k=True).indices.tolist() == [0]
    weights = plain.score().values["texts"]
    assert torch.equal(weights, normal.score().values["texts"])


def test_targets_one_by_one() -> None:
    raw = texts(0, 60, "sea", "bank")
    targets = [texts(1, 10, "sea"), texts(2, 10, "bank")]
    dsir = fitted(raw, targets, separate_targets=True, target_proportions=[3, 1])
    chosen = dsir.select(11, top_k=True)
    assert np.bincount(chosen.target).tolist() == [8, 3]
    assert len(np.unique(chosen.indices)) == 11
    assert all(chosen.indices[chosen.target == 0] % 2 == 0)
    assert all(chosen.indices[chosen.target == 1] % 2 == 1)
    for number, part in enumerate(targets):
        alone = fitted(raw, part)
        np.testing.assert_allclose(dsir.score().values["texts"][:, number], alone.score().values["texts"], rtol=1e-12)
    by_size = fitted(raw, targets, separate_targets=True)
    shares = [hashed_ngrams(part).sum() for part in targets]
    assert np.bincount(by_size.select(10, top_k=True).target)[0] == int(10 * shares[0] / sum(shares))
    with pytest.raises(InputError, match="for 2 targets"):
        fitted(raw, targets, separate_targets=True, target_proportions=[1.0])
    with pytest.raises(InputError, match="set separate_targets"):
        fitted(raw, targets[0], target_proportions=[1.0])


def test_kl_reduction_against_scipy() -> None:
    draw = np.random.default_rng(0)
    p, q, s = (draw.integers(1, 40, 25) for _ in range(3))
    expected = stats.entropy(p, q) - stats.entropy(p, s)
    assert kl_reduction(p, q, s, smoothing=0.0) == pytest.approx(expected, abs=1e-5)
    smooth = stats.entropy(p, q + 0.5) - stats.entropy(p, s + 0.5)
    assert kl_reduction(p, q, s) == pytest.approx(smooth, abs=1e-12)
    assert kl_reduction(p, q, q) == 0
    assert kl_reduction(p, q, p, smoothing=0.0) == pytest.approx(stats.entropy(p, q), abs=1e-5)
    assert kl_reduction(np.stack([p, s]), q, s) == pytest.approx((kl_reduction(p, q, s) + kl_reduction(s, q, s)) / 2)
    for bad in ([], [-1, 2], [0, 0]):
        with pytest.raises(InputError):
            kl_reduction(bad, bad, bad)
    dsir = fitted(texts(0, 60, "sea", "bank"), texts(1, 10, "sea"))
    chosen = dsir.select(10)
    counts = hashed_ngrams([texts(0, 60, "sea", "bank")[i] for i in chosen.indices]).sum(axis=0)
    assert chosen.kl_reduction == pytest.approx(kl_reduction(dsir.target_counts_[0], dsir.raw_counts_, counts), abs=1e-12)


def test_a_draw_that_is_top_k_is_told() -> None:
    with pytest.warns(UserWarning, match="raise temperature"):
        fitted(texts(0, 60, "sea", "bank", longest=200), texts(1, 60, "sea")).select(5)


# Files


def test_every_format_gives_the_same_choice(tmp_path: Path, small_pieces: None) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = texts(0, 300, "sea", "bank")
    rows[7] = "ünïcödé ship"
    target = texts(1, 20, "sea")
    expected = fitted(rows, target).select(30, seed=3)
    plain = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.txt").write_text("\n".join(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()[:9000]) + gzip.compress(plain.read_bytes()[9000:]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    table = pyarrow.table({"n": range(300), "text": rows})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet", row_group_size=40)
    pyarrow.parquet.write_table(table.set_column(1, "text", table["text"].dictionary_encode()), tmp_path / "f.parquet", row_group_size=300)
    for path in sorted(tmp_path.iterdir()):
        for jobs in (1, 2):
            dsir = fitted(path, target, n_jobs=jobs)
            chosen = dsir.select(30, seed=3)
            assert chosen.indices.tolist() == expected.indices.tolist(), path
            assert np.array_equal(chosen.log_weight, expected.log_weight), path
            assert chosen.kl_reduction == expected.kl_reduction
            assert chosen.line.tolist() == (expected.indices + 1).tolist()
        written = dsir.write(chosen, tmp_path / "out", overwrite=True)
        (copy,) = (file for file in written.iterdir() if not file.name.startswith("selection."))
        if path.suffix == ".parquet":
            assert pyarrow.parquet.read_table(copy).to_pylist() == [table.slice(i, 1).to_pylist()[0] for i in expected.indices.tolist()]
        else:
            lines = copy.read_text().splitlines()
            found = [json.loads(line)["text"] for line in lines] if copy.suffix == ".jsonl" else lines
            assert found == [rows[i] for i in expected.indices]
        told = json.loads((written / "selection.json").read_text())
        assert told["count"] == 30
        assert told["kl_reduction"] == chosen.kl_reduction
        subprocess.run(["rm", "-r", str(written)], check=True)


def test_pieces_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [jsonl(tmp_path / f"{i}.jsonl", texts(i, 90, "sea", "bank")) for i in range(3)]
    results: list[DSIRSelection] = []
    for piece, jobs in ((2**23, 1), (3000, 1), (701, 2), (97, 3)):
        monkeypatch.setattr(corpora, "PIECE", piece)
        results.append(fitted(paths, texts(9, 20, "sea"), n_jobs=jobs, temperature=10.0).select(40))
    for other in results[1:]:
        assert np.array_equal(other.indices, results[0].indices)
        assert np.array_equal(other.file, results[0].file)
        assert np.array_equal(other.inclusion_probability, results[0].inclusion_probability)
    assert (results[0].line == results[0].indices % 90 + 1).all()


@pytest.mark.full
def test_ray_selects_the_same_rows(tmp_path: Path, small_pieces: None) -> None:
    pytest.importorskip("ray")
    path = jsonl(tmp_path / "raw.jsonl", texts(0, 300, "sea", "bank"))
    local, remote = (fitted(path, texts(1, 20, "sea"), n_jobs=2, temperature=10.0, engine=e).select(60) for e in ("local", "ray"))
    assert np.array_equal(local.indices, remote.indices)
    assert np.array_equal(local.inclusion_probability, remote.inclusion_probability)
    assert local.kl_reduction == remote.kl_reduction


# Bad rows


def problems(dsir: DSIR) -> list[tuple[int, str]]:
    return [(problem.line, problem.reason) for problem in dsir.problems()]


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_bad_lines_are_told_by_file_and_line(tmp_path: Path, small_pieces: None, kernel: str) -> None:
    rows = texts(0, 200, "sea", "bank")
    lines = [json.dumps({"text": row}).encode() for row in rows]
    lines[3] = b'{"other": "ship"}'
    lines[50] = b'{"text": "sea \xff\xfe ship"}'
    lines[120] = b'{"text": "sea'
    lines[150] = b""
    lines[151] = b'{"text": 4}'
    lines[152] = b'{"text": "lone \\ud800"}'
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=f"5 rows could not be used .*{path}, line 4: no field 'text'.*line 51: not UTF-8"):
        dsir = fitted(path, texts(1, 20, "sea"), kernel=kernel)
    chosen = dsir.select(150)
    assert (chosen.rows, chosen.unread, chosen.repaired, chosen.eligible) == (200, 3, 2, 196)
    assert [line for line, _ in problems(dsir)] == [4, 51, 121, 152, 153]
    assert [p.line for p in dsir.problems_] == [4, 51, 121, 152, 153]
    assert {p.file for p in dsir.problems()} == {str(path)}
    # Every other row has the weight it has without them.
    clean = fitted([row for i, row in enumerate(rows) if i not in (3, 120, 150, 151)], texts(1, 20, "sea"))
    assert set(range(1, 201)) - {4, 121, 151, 152} >= set(chosen.line.tolist())
    assert clean.select(1).eligible == 196


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_truncated_files_lose_nothing_before_the_break(tmp_path: Path, small_pieces: None, kind: str) -> None:
    import zlib

    import zstandard

    rows = texts(0, 400, "sea", "bank")
    content = jsonl(tmp_path / "whole.jsonl", rows).read_bytes()
    if kind == ".gz":
        packed = gzip.compress(content)[:-2000]
        readable = zlib.decompressobj(wbits=31).decompress(packed)
    else:
        packer = zstandard.ZstdCompressor(level=1).compressobj()
        packed = b"".join(
            packer.compress(content[i : i + 4000]) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for i in range(0, len(content), 4000)
        )[:-1500]
        readable = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    path = tmp_path / f"raw.jsonl{kind}"
    path.write_bytes(packed)
    whole = readable.count(b"\n")
    assert 0 < whole < 400
    with pytest.warns(UserWarning, match=f"{path}, line {whole + 1}: the {kind} file ends early"):
        dsir = fitted(path, texts(1, 20, "sea"))
    chosen = dsir.select(1)
    assert chosen.eligible == whole
    assert problems(dsir) == [(whole + 1, f"the {kind} file ends early: it is truncated")]


def test_a_corrupt_member_and_a_break_between_lines(tmp_path: Path, small_pieces: None) -> None:
    rows = texts(0, 100, "sea", "bank")
    content = jsonl(tmp_path / "whole.jsonl", rows).read_bytes()
    (tmp_path / "corrupt.jsonl.gz").write_bytes(gzip.compress(content) + b"no gzip")
    with pytest.warns(UserWarning, match="line 101: the .gz file is corrupt from here on"):
        assert fitted(tmp_path / "corrupt.jsonl.gz", texts(1, 20, "sea")).select(1).eligible == 100
    (tmp_path / "footless.jsonl.gz").write_bytes(gzip.compress(content)[:-4])
    with pytest.warns(UserWarning, match="line 101: the .gz file ends early"):
        assert fitted(tmp_path / "footless.jsonl.gz", texts(1, 20, "sea")).select(1).eligible == 100


def test_nulls_and_broken_text_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    binary = pyarrow.array([b"sea ship", None, b"bad \xff byte", b""], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(4, binary.buffers()[1], binary.buffers()[2], binary.buffers()[0], 1)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "raw.parquet")
    with pytest.warns(UserWarning, match="line 2: the field 'text' is null.*line 3: not UTF-8"):
        dsir = fitted(tmp_path / "raw.parquet", ["sea"])
    assert dsir.select(2).line.tolist() == [1, 3]


def test_leakage_is_told() -> None:
    raw, target = texts(0, 30, "sea", "bank"), texts(1, 5, "sea")
    raw[4] = target[2].upper()
    raw[9] = target[2]
    assert fitted(raw, target).select(3).known == 2


def test_bad_input(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw, target = texts(0, 20, "sea", "bank"), texts(1, 5, "sea")
    path = jsonl(tmp_path / "raw.jsonl", raw)
    with pytest.raises(BudgetError, match="of 0 eligible ones; of 20 rows, 20 have fewer than min_tokens=100"):
        fitted(raw, target, min_tokens=100).select(1)
    with pytest.raises(BudgetError, match="21 documents of 20"):
        fitted(raw, target).select(21)
    with pytest.raises(DataError, match=r"name files.*give pathlib\.Path"):
        fitted([str(path)], target)
    with pytest.raises(FileError, match="is a folder"):
        fitted(tmp_path, target)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(DataError, match="unknown kind"):
        fitted(tmp_path / "x.csv", target)
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "raw.parquet")
    with pytest.raises(DataError, match="no column 'body'"):
        fitted(tmp_path / "raw.parquet", target, field="body")
    with pytest.raises(DataError, match="raw has no text: none of its 20 rows holds a token; row 1: no field 'body'"):
        fitted(path, target, field="body")
    with pytest.raises(InputError, match="call fit first"):
        DSIR().select(1)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="target has no text"):
        fitted(raw, tmp_path / "empty.jsonl")


def test_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"whatmatters\[zstd\]"):
        fitted(tmp_path / "a.jsonl.zst", ["a"])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"whatmatters\[ray\]"):
        fitted(["a"], ["a"], engine="ray")


# Runs


def test_a_cap_takes_pieces_in_a_random_order(tmp_path: Path, small_pieces: None) -> None:
    path = jsonl(tmp_path / "raw.jsonl", texts(0, 300, "sea") + texts(0, 300, "bank"))
    target = texts(1, 20, "sea")
    capped = [fitted(path, target, max_ngrams=4000, n_jobs=jobs) for jobs in (1, 2)]
    assert np.array_equal(capped[0].raw_counts_, capped[1].raw_counts_)
    assert 4000 < capped[0].raw_counts_.sum() < 6000 < fitted(path, target).raw_counts_.sum()
    both = [capped[0].raw_counts_[sha256_bucket(word, 10_000)] for word in ("ship", "bond")]
    assert min(both) > 0
    assert capped[0].select(600).eligible == 600


def test_interrupted_runs_continue_to_the_same(tmp_path: Path, small_pieces: None) -> None:
    path, target = jsonl(tmp_path / "raw.jsonl", texts(0, 300, "sea", "bank")), texts(1, 20, "sea")
    expected = fitted(path, target, temperature=5.0).select(50)

    class Stopped(Exception):
        pass

    stops = [("raw", 2), ("weights", 0), ("weights", 3), ("selection", 1), None]
    for stop in stops:

        def progress(label: str, done: int, total: int) -> None:
            if (label, done) == stop:
                raise Stopped

        try:
            dsir = fitted(path, target, temperature=5.0, run_dir=tmp_path / "run", resume=True, progress=progress)
            chosen = dsir.select(50, progress=progress)
        except Stopped:
            assert stop is not None
    assert np.array_equal(chosen.indices, expected.indices)
    assert np.array_equal(chosen.log_weight, expected.log_weight)
    assert chosen.kl_reduction == expected.kl_reduction
    with pytest.raises(FileError, match="resume=True"):
        fitted(path, target, run_dir=tmp_path / "run")
    with pytest.raises(ResumeError, match="another hash, target"):
        fitted(path, texts(2, 20, "sea"), hash="fast", run_dir=tmp_path / "run", resume=True)
    rows = next((tmp_path / "run" / "rows").rglob("*.rows"))
    rows.write_bytes(rows.read_bytes()[:-20])
    with pytest.raises(FormatError, match="no whole file of rows"):
        fitted(path, target, run_dir=tmp_path / "run", resume=True).select(50)


KILLED = """
import sys, warnings
from pathlib import Path
from whatmatters.select import DSIR, _corpus
warnings.simplefilter("ignore")
_corpus.PIECE = 4000
raw, target, run = map(Path, sys.argv[1:])
DSIR(min_tokens=1, n_jobs=1, temperature=5.0).fit(raw=raw, target=target, run_dir=run, resume=True).select(50)
"""


def test_kill_minus_nine(tmp_path: Path, small_pieces: None) -> None:
    path = jsonl(tmp_path / "raw.jsonl", texts(0, 3000, "sea", "bank"))
    target, run = jsonl(tmp_path / "target.jsonl", texts(1, 20, "sea")), tmp_path / "run"
    expected = fitted(path, target, temperature=5.0).select(50)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(target), str(run)], env=os.environ)
    deadline = time.monotonic() + 60
    while len(list(run.rglob("*.rows"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dsir = fitted(path, target, temperature=5.0, max_ngrams="auto", run_dir=run, resume=True)
    assert np.array_equal(dsir.select(50).indices, expected.indices)


def test_saved_parameters_choose_from_another_corpus(tmp_path: Path) -> None:
    raw, other, target = texts(0, 40, "sea", "bank"), texts(5, 40, "sea", "bank"), texts(1, 10, "sea")
    dsir = fitted(raw, target, temperature=9.0)
    dsir.save(tmp_path / "d.safetensors")
    again = DSIR.load(tmp_path / "d.safetensors", raw=raw)
    assert np.array_equal(again.select(9).indices, dsir.select(9).indices)
    assert again.get_params() == dsir.get_params()
    weights = DSIR.load(tmp_path / "d.safetensors", raw=other).score().values["texts"].numpy()
    np.testing.assert_allclose(weights, hashed_ngrams(other) @ dsir.log_ratio_[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="made with the tokenizer 'wordpunct'"):
        DSIR.load(tmp_path / "d.safetensors", raw=raw, tokenizer=str.split)
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(FormatError, match=r"DSIR\.save"):
        DSIR.load(tmp_path / "x.safetensors", raw=raw)
    with pytest.raises(FileError):
        dsir.save(tmp_path / "d.safetensors")


def test_habits_of_an_estimator() -> None:
    dsir = DSIR(ngrams=3, min_tokens=1)
    assert clone(dsir).get_params() == dsir.get_params()
    assert dsir.set_params(ngrams=1) is dsir
    assert dsir.fit(raw=["a", "b"], target=["a"]) is dsir
    state = torch.random.get_rng_state()
    first = dsir.select(1, seed=torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(first.indices, dsir.select(1, seed=torch.Generator().manual_seed(3)).indices)


def test_the_form_calls_it_and_every_fault_is_told() -> None:
    entry = get_method("dsir")
    how = form(entry)
    first, second = (how.outcome(how.call(entry, how.subject(0), **how.samples), how.subject(0)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for damaged in how.bad_subjects.values():
        with pytest.raises(WhatMattersError):
            how.call(entry, damaged(how.subject(0)), **how.samples)
    for name, values in how.bad_settings.items():
        for value in values:
            with pytest.raises(WhatMattersError):
                how.call(entry, how.subject(0), **{**how.samples, name: value})
