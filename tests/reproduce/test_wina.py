"""WINA's experiment: a smoke run gives a valid record whose claims are those of its rows."""

import json
import math
from typing import Any

import pytest

from whatmatters.core.errors import InputError
from whatmatters.reproduce import wina as experiment_module
from whatmatters.reproduce._common import digest
from whatmatters.reproduce.wina import ARMS, planted_draw, run

KEYS = {"slug", "claims", "results", "differs_from_paper", "seeds", "versions", "seconds", "peak_bytes", "commit", "digest"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evidence")
    record = run(scale="smoke", output=folder)
    assert json.loads((folder / "wina.json").read_text(encoding="utf-8"))["claims"] == json.loads(json.dumps(record["claims"]))
    return record


def test_record_has_all_a_reader_expects(record: dict[str, Any]) -> None:
    assert record.keys() == KEYS
    assert record["digest"] == digest("wina", experiment_module)
    assert {claim["tier"] for claim in record["claims"]} == {"exact", "planted", "desk", "arithmetic"}
    json.dumps(record, allow_nan=False)


def test_identities_plants_and_figures_hold(record: dict[str, Any]) -> None:
    for claim in record["claims"]:
        if claim["tier"] != "desk":
            assert claim["verdict"] == "shown", claim


def test_claims_are_those_of_the_rows(record: dict[str, Any]) -> None:
    rows = {(row["arm"], row["sparsity"]): row for row in record["results"]["untrained"]["arms"]}
    assert {name for name, _ in rows} >= set(ARMS)
    assert len(rows["random", 0.5]["by_draw"]) == len(rows["WINA, threshold", 0.5]["by_draw"]) == 3
    effect = math.log(rows["WINA", 0.65]["perplexity"] / rows["TEAL", 0.65]["perplexity"])
    (claim,) = (c for c in record["claims"] if c["claim"].endswith("at 65%: perplexity of WINA is below TEAL's"))
    assert claim["effect"] == pytest.approx(effect, abs=1e-9)


def test_figures_against_a_computation_of_their_own(record: dict[str, Any]) -> None:
    row = record["results"]["arithmetic"]["LLaMA-3-8B"]
    block = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336)
    assert row["reduction_at_65_percent"] == pytest.approx(0.65 * 32 * block / (32 * block + 4096 * 128256))
    assert row["transform_share_of_a_block"] == pytest.approx(2 * 4096**2 / block)


def test_planted_draws_are_errors_and_few_seeds_are_refused() -> None:
    assert all(0 < error < 2 for error in planted_draw(3, 0.5))
    with pytest.raises(InputError):
        run(scale="smoke", seeds=2)
