"""The tables of composability: scores once, equal plans once, budgets kept, allocators against the optimum."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from whatmatters.core import catalog
from whatmatters.core.data import Calibration
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.reproduce import composability
from whatmatters.reproduce._desk import Arms, Sizes, subjects
from whatmatters.reproduce.composability import BUDGETS, Bench, allocator_table, planned, run
from whatmatters.score import layer_shift, quantization_error


@pytest.fixture
def bench() -> Bench:
    (subject,), _ = subjects({"embedded": Sizes(2, 16, 4, 1)}, model=None, scale="smoke")
    return Bench(subject, structure(subject.model), Arms(None, ""))


def test_tables_are_filled_for_every_scorer_and_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    original = composability.scores_of

    def counted(entry: catalog.Entry, bench: Bench, data: Calibration, by: str, seed: int) -> Scores:
        calls.append((entry.slug, by))
        return original(entry, bench, data, by, seed)

    def none(bench: Bench, draws: Any, progress: Any) -> list[Any]:
        return []

    monkeypatch.setattr(composability, "scores_of", counted)
    monkeypatch.setattr(composability, "token_table", none)  # its own test below, with RSQ
    monkeypatch.setattr(composability, "QUANTIZERS", {"RTN": composability.QUANTIZERS["RTN"]})
    record = run(scale="smoke", output=tmp_path / "assets")
    assert json.loads((tmp_path / "assets" / "composability.json").read_text(encoding="utf-8"))["layers"] == record["layers"]
    scorers = {entry.slug for entry in catalog.scorers(when="ahead")}
    rows = {(row["scorer"], row["by"], row["budget"], row["quantizer"]): row for row in record["layers"]}
    assert rows.keys() == {(s, by, b, q) for s in scorers for by in ("site", "block") for b in BUDGETS for q in ("RTN",)}
    assert all(row["stored"] <= row["budget"] for row in rows.values())
    assert all(row["interval_percent"][0] <= row["change_percent"] <= row["interval_percent"][1] for row in rows.values())
    for slug in scorers:  # once for each grain; the control 3 times
        assert [calls.count((slug, by)) for by in ("site", "block")] == [3 if slug == "random" else 1] * 2


def test_equal_plans_are_quantized_once(bench: Bench) -> None:
    plan = planned(layer_shift(bench.subject.model, bench.subject.calibration(0)), 3.5, bench)
    first = bench.quantized("RTN", plan)
    assert bench.quantized("RTN", plan) is first
    assert len(bench.arms.known) == 1
    assert bench.quantized("GPTQ", plan) is not first


def test_loss_scores_are_spent_by_the_optimum_and_ranks_in_order(bench: Bench) -> None:
    table = quantization_error(bench.subject.model, group_size=-1)
    assert planned(table, 3.5, bench).settings["how"] == "optimum"
    assert planned(layer_shift(bench.subject.model, bench.subject.calibration(0)), 3.5, bench).settings["how"] == "rank"


def test_optimum_is_never_worse_than_greedy_or_rounding(bench: Bench) -> None:
    told, claims = allocator_table(bench)
    assert [claim.verdict for claim in claims] == ["shown", "shown"]
    for row in told["predicted"]:
        assert row["largest_excess_percent"] >= row["mean_excess_percent"] >= 0
    of = {(row["allocator"], row["budget"]): row["predicted_loss"] for row in told["measured_with_RTN"]}
    assert all(of["optimum", budget] <= of[name, budget] + 1e-12 for budget in BUDGETS for name in ("greedy", "LP rounding"))


def test_token_table_compares_with_uniform_weights(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [entry for entry in catalog.scorers("token", "walk") if entry.slug in ("uniform", "attention-concentration")]

    def few(unit: str | None = None, when: str | None = None) -> list[Any]:
        return some

    monkeypatch.setattr(catalog, "scorers", few)
    rows = {row["scorer"]: row for row in composability.token_table(bench, [0, 1, 2], None)}
    assert list(rows) == ["uniform", "attention-concentration", "permuted"]
    assert rows["uniform"]["to_uniform"] == 0
    assert rows["uniform"]["draws_better_than_uniform"] == 0
    assert len(set(rows["permuted"]["by_draw"])) == 3


def test_uniform_bits_are_counted_as_stored(bench: Bench) -> None:
    weights = sum(site.size for site in bench.found.sites)
    scales = sum(16 * site.shape[0] + 128 for site in bench.found.sites)  # one 16-bit scale per output, and the entry of the shape
    assert bench.stored(4, -1) == pytest.approx(4 + scales / weights)


def test_dense_is_the_model_itself(bench: Bench) -> None:
    before = [parameter.clone() for parameter in bench.subject.model.parameters()]
    assert bench.dense.perplexity > 1
    bench.quantized("RTN", 3)
    assert all(torch.equal(a, b) for a, b in zip(before, bench.subject.model.parameters(), strict=True))
    assert isinstance(bench.subject.model, nn.Module)
