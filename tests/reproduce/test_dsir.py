"""The experiment's own parts: the bigram model is a distribution, the classifier chooses k, a smoke run evaluates every claim."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from whatmatters.core.errors import DataError, InputError
from whatmatters.reproduce import dsir
from whatmatters.reproduce._desk import shared_data
from whatmatters.select import hashed_ngrams


def test_bigram_probabilities_sum_to_one_and_follow_the_counts() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3}
    model = dsir.Bigrams(["a b a b a c", "d a"], vocabulary)
    words = list(vocabulary)
    for before in words:
        assert sum(np.exp(-model.loss([f"{before} {word}"])) for word in words) == pytest.approx(1.0)
    # After "a": b twice, c once, of two kinds; 8 words of 4 kinds, the rest shared evenly by 4 words.
    single = (2 + 4 / 4) / (8 + 4)
    assert np.exp(-model.loss(["a b"])) == pytest.approx((2 + 2 * single) / (3 + 2))
    losses = {pair: model.loss([" ".join(pair)]) for pair in itertools.product(words, words)}
    assert min(losses, key=losses.__getitem__) in (("b", "a"), ("d", "a"))


def test_heuristic_classification_prefers_the_target() -> None:
    raw, target = ["sea ship sail"] * 30 + ["bank bond share"] * 30, ["sea ship sail"] * 20
    chosen = dsir.heuristic(hashed_ngrams(raw), hashed_ngrams(target), 20, 0)
    assert len(np.unique(chosen)) == 20
    assert (chosen < 30).mean() > 0.8


def test_a_smoke_run_evaluates_every_claim(tmp_path: Path) -> None:
    if shared_data() is None:
        pytest.skip("no shared data")
    record = dsir.run(scale="smoke", output=tmp_path)
    assert len(record["claims"]) == 11
    assert {claim["verdict"] for claim in record["claims"] if claim["tier"] in ("exact", "arithmetic")} == {"shown"}
    assert (tmp_path / "dsir.json").is_file()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least 3"):
        dsir.run(seeds=2, output=tmp_path)
    monkeypatch.setenv("WHATMATTERS_DATA", str(tmp_path))
    with pytest.raises(DataError, match="WHATMATTERS_DATA"):
        dsir.run(output=tmp_path)
