"""Layer-wise quantization's experiment: a smoke run gives a valid record; curves, ranks and dropped layers against brute force."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from whatmatters.core.data import logits
from whatmatters.core.errors import InputError
from whatmatters.core.evaluate import evaluate
from whatmatters.quantize import rtn
from whatmatters.reproduce import layerwise_quant as experiment_module
from whatmatters.reproduce._common import digest
from whatmatters.reproduce._desk import Arms, Measured, Sizes, Subject, shuffles, subjects
from whatmatters.reproduce.layerwise_quant import (
    Curves,
    Ranking,
    better_orders,
    close_share,
    drop,
    grouping,
    outliers,
    rank_among_sets,
    reversed_scores,
    run,
    swept,
)

KEYS = {"slug", "claims", "results", "differs_from_paper", "seeds", "versions", "seconds", "peak_bytes", "commit", "digest"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evidence")
    record = run(scale="smoke", output=folder)
    assert json.loads((folder / "layerwise-quant.json").read_text(encoding="utf-8"))["digest"] == record["digest"]
    return record


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subjects({"embedded": Sizes(2, 16, 4, 1)}, model=None, scale="smoke")[0][0]


@pytest.fixture(scope="module")
def curves(subject: Subject) -> Curves:
    ranked = Ranking.of(subject, [0])
    _, everyone = shuffles(ranked.found.blocks, 2)
    orders = {f"order {number}": order for number, order in enumerate(everyone)}
    return swept(subject, orders, (8, 2), grouping(ranked.found), ranked.found, Arms(None, ""), subject.windows("test"))


def test_record_has_all_a_reader_expects(record: dict[str, Any]) -> None:
    assert record.keys() == KEYS
    assert record["digest"] == digest("layerwise-quant", experiment_module)
    assert {claim["tier"] for claim in record["claims"]} == {"exact", "desk", "arithmetic"}
    assert all(claim["verdict"] == "shown" for claim in record["claims"] if claim["tier"] != "desk")
    json.dumps(record, allow_nan=False)


def test_sets_of_the_record_make_its_curves(record: dict[str, Any]) -> None:
    results = record["results"]["untrained"]
    (level,) = results["levels"]
    of = {tuple(entry["lowered"]): entry["log_perplexity"] for entry in level["sets"]}
    assert len(of) == 8  # every set of three layers
    order = results["orders"]["ZD"]
    curve = [of[tuple(sorted(order[:step]))] for step in range(4)]
    assert level["curves"]["ZD"] == pytest.approx(curve, abs=1e-12)
    assert level["mean_log_perplexity"]["ZD"] == pytest.approx(np.mean(curve), abs=1e-12)
    best = min(
        np.mean([of[tuple(sorted(p[:step]))] for step in range(4)]) for p in shuffles(["0", "1", "2"], 0)[1] for p in [list(map(int, p))]
    )
    assert level["mean_log_perplexity"]["best order"] == pytest.approx(best, abs=1e-12)


def test_a_measured_set_is_the_model_quantized_so(subject: Subject, curves: Curves) -> None:
    ranked = Ranking.of(subject, [0])
    bits = {site.name: 2 if site.block == ranked.found.blocks[1] else 8 for site in ranked.found.sites}
    model = subject.copy()
    rtn(model, bits=bits, group_size=grouping(ranked.found), symmetric=False)
    expected = evaluate(model, subject.windows("test"))
    found = curves.sets[curves.lowered.index([1])]
    assert found.loss == pytest.approx(expected.loss, abs=1e-12)
    assert len(curves.sets) == 8


def artificial(losses: dict[tuple[int, ...], float], orders: dict[str, list[int]], documents: int = 3) -> Curves:
    """Curves in which every document has the same losses."""
    sets = sorted(losses)
    measured = [Measured(np.full(documents, losses[s]) * 10, np.full(documents, 10, dtype=np.int64), 0.0, {}) for s in sets]
    steps = {name: [sets.index(tuple(sorted(order[:k]))) for k in range(len(order) + 1)] for name, order in orders.items()}
    return Curves(measured, steps, [list(s) for s in sets])


def additive() -> Curves:
    harm = {0: 0.3, 1: 0.1, 2: 0.2}
    losses = {s: 1.0 + sum(harm[i] for i in s) for s in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]}
    _, everyone = shuffles(["0", "1", "2"], 0)
    return artificial(losses, {f"order {n}": [int(i) for i in order] for n, order in enumerate(everyone)} | {"good": [1, 2, 0]})


def test_share_of_better_orders_by_hand() -> None:
    curves = additive()
    everyone = [f"order {n}" for n in range(6)]
    assert better_orders(curves, ["good"], everyone) == (0.0, 0.0, 0.0)
    worst = max(everyone, key=lambda name: sum(curves.losses(name)))
    assert better_orders(curves, [worst], everyone) == pytest.approx((5 / 6,) * 3)
    assert better_orders(curves, ["good", worst], everyone)[0] == pytest.approx(5 / 12)


def test_share_that_stays_close_by_hand() -> None:
    curves = additive()  # 10 % higher perplexity is 0.0953 nats: the first layer of the best order costs 0.1
    assert close_share(curves, ["good"]) == 0.0
    losses = {(): 1.0, (0,): 1.05, (1,): 1.2, (0, 1): 1.09}
    curves = artificial(losses, {"a": [0, 1], "b": [1, 0]})
    assert close_share(curves, ["a"]) == 1.0
    assert close_share(curves, ["b"]) == 0.0  # that it comes back later does not count
    assert close_share(curves, ["a", "b"]) == 0.5


def test_rank_among_sets_by_hand() -> None:
    curves = additive()
    assert rank_among_sets(curves, "good", 1) == {"lowered": 1, "rank": 1, "sets": 3}
    worst = max((f"order {n}" for n in range(6)), key=lambda name: sum(curves.losses(name)))
    assert rank_among_sets(curves, worst, 2) == {"lowered": 2, "rank": 3, "sets": 3}


def test_dropped_layers_are_gone(subject: Subject) -> None:
    ranked = Ranking.of(subject, [0])
    model = subject.copy()
    drop(model, ranked.found.blocks[1:2], ranked, -1)
    expected = subject.copy()
    rtn(expected, bits=8, group_size=-1, symmetric=False)
    expected.model.layers = torch.nn.ModuleList([expected.model.layers[0], expected.model.layers[2]])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(logits(model, ids), logits(expected, ids))


def test_reverse_and_orders_have_the_least_important_first(subject: Subject) -> None:
    ranked = Ranking.of(subject, [0, 1])
    assert len(ranked.shift) == 2
    values = {name: float(value) for name, value in ranked.shift[0].values.items()}
    assert ranked.shift_orders[0] == sorted(values, key=values.__getitem__)
    assert reversed_scores(ranked.shift[0]).order() == ranked.shift[0].order()[::-1]


def test_outliers_of_weights_that_are_counted_by_hand() -> None:
    values = np.zeros(2000)
    values[:20] = 100.0
    assert outliers(values) == pytest.approx(0.01)


def test_nothing_of_a_subject_is_changed(subject: Subject, curves: Curves) -> None:
    fresh = subjects({"embedded": Sizes(2, 16, 4, 1)}, model=None, scale="smoke")[0][0]
    for a, b in zip(subject.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(a, b)
    copy.deepcopy(subject.model)


def test_two_draws_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 3"):
        run(scale="smoke", seeds=2, output=tmp_path)
    assert list(tmp_path.iterdir()) == []
