"""Claims are judged by code: hand-computed intervals, verdicts at their bounds, and a digest that sees code and not prose."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from whatmatters.core.errors import InputError
from whatmatters.reproduce import _common, rsq
from whatmatters.reproduce._common import Experiment, below, certain, digest, from_interval, source_digest


def test_below_is_the_t_interval_of_the_mean() -> None:
    claim = below("small", "desk", [1.0, 2.0, 3.0], 5.0)
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2 degrees of freedom), standard deviation 1
    assert claim.effect == 2.0
    assert claim.interval == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert claim.smallest_effect == pytest.approx(half, rel=1e-9)
    assert claim.verdict == "shown"


@pytest.mark.parametrize(("bound", "verdict"), [(4.5, "shown"), (4.4, "inconclusive"), (0.0, "inconclusive"), (-0.5, "refuted")])
def test_verdict_of_one_two_three_against_bounds(bound: float, verdict: str) -> None:
    assert below("small", "desk", [1.0, 2.0, 3.0], bound).verdict == verdict  # interval -0.484 to 4.484


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=20), st.floats(-100, 100))
def test_below_agrees_with_a_one_sample_t_test(effects: list[float], bound: float) -> None:
    claim = below("small", "desk", effects, bound)
    if np.ptp(effects) < 1e-6:
        return  # the test statistic is not defined
    low, high = stats.ttest_1samp(effects, 0.0).confidence_interval(0.95)
    assert claim.interval == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("effects", [[], [1.0], [1.0, 2.0]])
def test_fewer_than_three_draws_are_no_evidence(effects: list[float]) -> None:
    with pytest.raises(InputError, match="at least 3"):
        below("small", "desk", effects, 0.0)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-2.0, -1.0), "shown"),
        ((-2.0, 0.0), "inconclusive"),  # the bound itself is not below the bound
        ((-1.0, 1.0), "inconclusive"),
        ((0.0, 1.0), "refuted"),
        ((1.0, 2.0), "refuted"),
        ((-math.inf, math.inf), "inconclusive"),
    ],
)
def test_verdicts_of_intervals(interval: tuple[float, float], verdict: str) -> None:
    assert from_interval("small", "desk", sum(interval) / 2 if math.isfinite(sum(interval)) else 0.0, interval, 0.0).verdict == verdict


def test_identical_draws_leave_no_doubt() -> None:
    assert below("small", "exact", [-1.0] * 3, 0.0).verdict == "shown"
    assert below("small", "exact", [0.0] * 3, 0.0).verdict == "refuted"


def test_certain_claims() -> None:
    assert certain("2 + 2 is 4", "arithmetic", True, 4).verdict == "shown"
    claim = certain("2 + 2 is 5", "arithmetic", False, 4)
    assert (claim.verdict, claim.interval, claim.smallest_effect) == ("refuted", None, None)


def module(folder: Path, name: str, source: str) -> types.ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    made = types.ModuleType(name)
    made.__file__ = str(path)
    return made


CODE = 'def f(x):\n    """{doc}"""\n    return x + {number}{comment}\n\n\nLIMIT = 3\n"""{doc}"""\n'


def test_digest_sees_code_and_not_prose(tmp_path: Path) -> None:
    def of(name: str, **changed: str) -> str:
        return source_digest([module(tmp_path, name, CODE.format(**{"doc": "One.", "number": "1", "comment": "", **changed}))])

    base = of("a")
    assert of("b") == base
    assert of("c", doc="Other words, longer.") == base
    assert of("d", comment="  # why") == base
    assert of("e", number="2") != base
    assert source_digest([module(tmp_path, "f", CODE.format(doc="One.", number="1", comment="").replace("f(x)", "f(y, x)"))]) != base


def test_digest_is_of_method_and_experiment(tmp_path: Path) -> None:
    other = module(tmp_path, "other", "x = 1\n")
    assert digest("rsq", rsq) != digest("rsq", other)
    assert digest("rsq", other) != digest("layerwise-quant", other)


def test_record_and_file_of_an_experiment(tmp_path: Path) -> None:
    with Experiment("rsq", seeds=[0, 1, 2], differences=["smaller"]) as experiment:
        experiment.claims.append(certain("yes", "exact", True, 0.0))
        experiment.results["row"] = [1.5]
    path = experiment.write(tmp_path / "new" / "folder", rsq)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "rsq.json"
    assert record == json.loads(json.dumps(experiment.record(rsq)))
    assert record["claims"] == [
        {"claim": "yes", "tier": "exact", "verdict": "shown", "effect": 0.0, "interval": None, "smallest_effect": None}
    ]
    assert record["digest"] == digest("rsq", rsq)
    assert record["seeds"] == [0, 1, 2]
    assert {"versions", "commit", "seconds", "peak_bytes", "results"} <= record.keys()


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Experiment("rsq", seeds=[0, 1, 2]) as experiment:
        experiment.results["cannot"] = object()
    with pytest.raises(TypeError):
        experiment.write(tmp_path, rsq)
    assert list(tmp_path.iterdir()) == []


def test_commit_is_unknown_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_common, "__file__", str(tmp_path / "package" / "_common.py"))
    assert _common.commit() == "unknown"
