"""The evidence that is in the repository: complete, its verdicts those of its numbers, its cheapest rows as they come out today."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from whatmatters.core import catalog
from whatmatters.core.evaluate import evaluate
from whatmatters.reproduce import layerwise_quant, rsq
from whatmatters.reproduce._common import below, from_interval
from whatmatters.reproduce._desk import Subject, subjects
from whatmatters.reproduce.rsq import make_arm

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "evidence"
KEYS = {"slug", "claims", "results", "differs_from_paper", "seeds", "versions", "seconds", "peak_bytes", "commit", "digest"}
METHODS = [entry.slug for entry in catalog.methods() if entry.kind == "method"]
DRAWS, DOCUMENTS = " (over calibration draws)", " (over documents)"


def record_of(slug: str) -> dict[str, Any]:
    path = EVIDENCE / f"{slug}.json"
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `whatmatters reproduce {slug}`")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


@pytest.mark.parametrize("slug", METHODS)
def test_records_are_whole(slug: str) -> None:
    record = record_of(slug)
    assert record.keys() >= KEYS
    assert len(record["seeds"]) >= 3
    assert record["differs_from_paper"]
    assert record["seconds"] > 0
    tiers = {claim["tier"] for claim in record["claims"]}
    assert {"exact", "desk"} <= tiers <= {"exact", "planted", "desk", "public", "arithmetic"}
    assert len({claim["claim"] for claim in record["claims"]}) == len(record["claims"])
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("slug", METHODS)
def test_intervals_hold_their_effects_and_tell_the_smallest_one(slug: str) -> None:
    for claim in record_of(slug)["claims"]:
        if claim["interval"] is None:
            assert claim["verdict"] in ("shown", "refuted")
        else:
            low, high = claim["interval"]
            assert low - 1e-12 <= claim["effect"] <= high + 1e-12 or "share that is better" in claim["claim"]
            assert claim["smallest_effect"] == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("slug", METHODS)
def test_exact_and_arithmetic_claims_hold(slug: str) -> None:
    failed = [claim for claim in record_of(slug)["claims"] if claim["tier"] in ("exact", "arithmetic") and claim["verdict"] != "shown"]
    assert failed == []


PAIRS = {
    "GPTQ is below RTN's": ("RTN", "GPTQ", 0.0),
    "rotate+GPTQ is not above GPTQ's by 1 %": ("GPTQ", "rotate+GPTQ", math.log(1.01)),
    "RSQ is at most that of rotate+GPTQ + 1 %": ("rotate+GPTQ", "RSQ", math.log(1.01)),
    "RSQ is below that of rotate+GPTQ": ("rotate+GPTQ", "RSQ", 0.0),
    "RSQ is below that of RSQ with permuted weights": ("RSQ, permuted weights", "RSQ", 0.0),
    "RSQ without rotation is below that of GPTQ": ("GPTQ", "RSQ, no rotation", 0.0),
}


def test_verdicts_of_rsq_are_those_of_its_rows() -> None:
    record = record_of("rsq")
    claims = {claim["claim"]: claim for claim in record["claims"]}
    checked = 0
    for name, result in record["results"].items():
        if not (isinstance(result, dict) and "rows" in result and "arms" in result):
            continue
        of = {(row["bits"], row["arm"], row["seed"]): math.log(row["perplexity"]) for row in result["rows"]}
        for bits in {row["bits"] for row in result["rows"]}:
            for words, (base, arm, bound) in PAIRS.items():
                told = f"{name}, {bits} bits: log perplexity of {words}"
                again = below(told, "desk", [of[bits, arm, seed] - of[bits, base, seed] for seed in result["draws"]], bound)
                claim = claims[told + DRAWS]
                assert claim["verdict"] == again.verdict
                assert claim["effect"] == pytest.approx(again.effect, abs=1e-9)
                assert claim["interval"] == pytest.approx(again.interval, abs=1e-9)
                over = claims[told + DOCUMENTS]
                assert over["verdict"] == from_interval(told, "desk", over["effect"], tuple(over["interval"]), bound).verdict
                checked += 1
    assert checked >= len(PAIRS)


def test_planted_verdicts_are_those_of_the_rows() -> None:
    rows = record_of("rsq")["results"]["planted"]
    assert len(rows) == 60
    assert all(row["weighted"] < row["uniform"] for row in rows)
    assert not all(row["permuted"] < row["uniform"] for row in rows)
    assert all(0.05 <= row["share"] <= 0.1 for row in rows)


def test_verdicts_of_orders_are_those_of_the_sets() -> None:
    record = record_of("layerwise-quant")
    claims = {claim["claim"]: claim for claim in record["claims"]}
    checked = 0
    for name, result in record["results"].items():
        for level in result.get("levels", []) if isinstance(result, dict) else []:
            of = {tuple(entry["lowered"]): entry["log_perplexity"] for entry in level["sets"]}
            assert len(of) == 2 ** result["blocks"]

            def curve(order: list[int], of: dict[tuple[int, ...], float] = of) -> float:
                return sum(of[tuple(sorted(order[:step]))] for step in range(len(order) + 1)) / (len(order) + 1)

            # The mean over all orders is, at every step, that over all sets of its size.
            sizes = range(result["blocks"] + 1)
            by_size = [[loss for chosen, loss in of.items() if len(chosen) == size] for size in sizes]
            mean = sum(sum(losses) / len(losses) for losses in by_size) / len(sizes)
            shift = sum(curve(order) for order in result["orders"]["LIM"]) / len(result["orders"]["LIM"])
            high, low = level["levels"]
            at = f"{name}, {high} to {low} bits: mean over lowered layers of log perplexity"
            assert claims[f"{at}: LIM is below random"]["effect"] == pytest.approx(shift - mean, abs=1e-9)
            reverse = curve(result["orders"]["ZD"][::-1])
            assert claims[f"{at}: ZD is below reverse ZD"]["effect"] == pytest.approx(curve(result["orders"]["ZD"]) - reverse, abs=1e-9)
            checked += 1
    assert checked >= 2


def of_record(record: dict[str, Any], subject: Subject) -> dict[str, Any]:
    if subject.name not in record["results"]:
        pytest.skip(f"the evidence was made without {subject.name}")
    result: dict[str, Any] = record["results"][subject.name]
    if result["text"] != subject.windows("test").digest:
        pytest.skip("the evidence was made with another standard library")
    return result


@pytest.fixture(scope="module")
def library_subject() -> Subject:
    found, _ = subjects(rsq.SIZES["desk"], model=None, scale="desk")
    return next(subject for subject in found if subject.name == "pylib-lm")


def test_dense_perplexity_of_the_embedded_model_is_as_recorded(library_subject: Subject) -> None:
    result = of_record(record_of("rsq"), library_subject)
    judged = evaluate(library_subject.model, library_subject.windows("test"))
    assert judged.perplexity == pytest.approx(result["dense_perplexity"], rel=1e-5)


def test_layer_orders_of_the_embedded_model_are_as_recorded(library_subject: Subject) -> None:
    found, _ = subjects(layerwise_quant.SIZES["desk"], model=None, scale="desk")
    subject = next(subject for subject in found if subject.name == "pylib-lm")
    result = of_record(record_of("layerwise-quant"), subject)
    ranked = layerwise_quant.Ranking.of(subject, [0])
    numbers = [[ranked.found.blocks.index(name) for name in order] for order in (ranked.shift_orders[0], ranked.outlier_order)]
    assert numbers == [result["orders"]["LIM"][0], result["orders"]["ZD"]]


@pytest.mark.parametrize("arm", ["GPTQ", "RSQ"])
def test_one_cheap_seed_comes_out_as_recorded(arm: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (data / "stories260k" / "hf").is_dir():
        pytest.skip("no stories260k in the shared data")
    monkeypatch.setenv("WHATMATTERS_DATA", str(data))
    found, _ = subjects(rsq.SIZES["desk"], model=None, scale="desk")
    result = of_record(record_of("rsq"), found[0])
    (row,) = (row for row in result["rows"] if (row["bits"], row["arm"], row["seed"]) == (3, arm, 1))
    model = found[0].copy()
    make_arm(arm, found[0], 3, 1)(model)
    # Sums in another order (threads, processors) move a few codes to their neighbours.
    assert evaluate(model, found[0].windows("test")).perplexity == pytest.approx(row["perplexity"], rel=5e-3)


def test_pages_show_the_evidence() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "scripts" / "method_pages.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    made = {path: text for path, text in pages.made().items() if path.suffix == ".md"}  # figures change with matplotlib's version
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/method_pages.py"
