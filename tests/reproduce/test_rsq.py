"""RSQ's experiment: a smoke run gives a valid record; planted truth, shuffled weights and costs against computations of their own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from whatmatters.core import catalog
from whatmatters.core.errors import InputError
from whatmatters.reproduce import rsq as experiment_module
from whatmatters.reproduce._common import Experiment, digest
from whatmatters.reproduce.rsq import ARMS, arithmetic, error, permuted, planted_draw, run
from whatmatters.score.tokens import TokenContext, normalize_importance

KEYS = {"slug", "claims", "results", "differs_from_paper", "seeds", "versions", "seconds", "peak_bytes", "commit", "digest"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evidence")
    told: list[str] = []
    record = run(scale="smoke", output=folder, progress=lambda label, done, total: told.append(label))
    assert json.loads((folder / "rsq.json").read_text(encoding="utf-8"))["claims"] == json.loads(json.dumps(record["claims"]))
    assert told
    return record


def test_record_has_all_a_reader_expects(record: dict[str, Any]) -> None:
    assert record.keys() == KEYS
    assert record["slug"] == "rsq"
    assert record["seeds"] == [0, 1, 2]
    assert record["digest"] == digest("rsq", experiment_module)
    assert {claim["tier"] for claim in record["claims"]} == {"exact", "planted", "desk", "arithmetic"}
    json.dumps(record, allow_nan=False)


def test_identities_hold_and_planted_tokens_are_served(record: dict[str, Any]) -> None:
    for claim in record["claims"]:
        if claim["tier"] in ("exact", "planted", "arithmetic"):
            assert claim["verdict"] == "shown", claim


def test_every_arm_has_a_row_for_each_draw(record: dict[str, Any]) -> None:
    rows = record["results"]["untrained"]["rows"]
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm, seed) for arm in ("RTN", "GPTQ", *ARMS) for seed in (0, 1, 2)}
    assert len({row["perplexity"] for row in rows if row["arm"] == "RTN"}) == 1
    assert len({row["perplexity"] for row in rows if row["arm"] == "RSQ"}) == 3


def test_claims_over_draws_are_those_of_the_rows(record: dict[str, Any]) -> None:
    of = {(row["arm"], row["seed"]): math.log(row["perplexity"]) for row in record["results"]["untrained"]["rows"]}
    effect = sum(of["RSQ", seed] - of["rotate+GPTQ", seed] for seed in (0, 1, 2)) / 3
    (claim,) = (c for c in record["claims"] if "RSQ is below that of rotate+GPTQ (over calibration draws)" in c["claim"])
    assert claim["effect"] == pytest.approx(effect, abs=1e-9)


@pytest.mark.parametrize("seeds", [0, 2])
def test_two_draws_are_refused_before_any_work(seeds: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 3"):
        run(scale="smoke", seeds=seeds, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weighted_error_by_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, rounded = torch.randn(2, 3, generator=draw), torch.randn(2, 3, generator=draw)
    x, w = torch.randn(4, 3, generator=draw), torch.rand(4, generator=draw, dtype=torch.float64)
    expected = 0.0
    for t in range(4):
        for row in range(2):
            expected += float(w[t]) * sum(float(weight[row, i] - rounded[row, i]) * float(x[t, i]) for i in range(3)) ** 2
    assert error(weight, rounded, x, w) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", [100, 101, 102, 103])
def test_planted_draws_that_were_not_reported(seed: int) -> None:
    row = planted_draw(seed, width=24)
    assert row["weighted"] < row["uniform"]
    assert row["price"] > 1  # what is spent on some tokens is missing elsewhere
    assert 0.05 <= row["share"] <= 0.1


def test_permuted_weights_have_the_same_histogram_on_other_tokens() -> None:
    heard = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 30:] = False

    def attend(attention: bool) -> tuple[Tensor, Tensor | None]:
        return torch.zeros(2, 40, 4), heard

    context = TokenContext("h.0", 4, torch.ones(2, 40), torch.zeros(2, 40, 4), valid, run=attend)
    shuffled = permuted(context, seed=0)
    for row in range(2):
        tokens = valid[row]
        assert torch.equal(shuffled[row, tokens].sort().values, heard[row, tokens].sort().values)
        assert not torch.equal(shuffled[row, tokens], heard[row, tokens])
    assert torch.equal(shuffled[1, 30:], heard[1, 30:])
    assert torch.equal(permuted(context, seed=0), shuffled)
    assert not torch.equal(permuted(context, seed=1), shuffled)
    assert torch.equal(heard, attend(True)[1])  # the scores themselves are not written to
    mapped = normalize_importance(shuffled, valid=valid)
    assert torch.allclose(mapped[0].sort().values, normalize_importance(heard, valid=valid)[0].sort().values)


def test_cost_by_hand() -> None:
    with Experiment("rsq", seeds=[0, 1, 2]) as experiment:
        arithmetic(experiment)
    told = experiment.results["arithmetic"]
    block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096  # weights of a block of Llama-3-8B
    assert block == 218_103_808
    assert told["tokens"] == 2**20
    assert told["multiplications_per_block"]["forward"] == 2**20 * (block + 4096 * 4096)
    assert told["multiplications_per_block"]["hessians"] == 2**20 * (3 * 4096**2 + 14336**2) / 2
    assert told["attention_map_bytes_per_sequence"] == 32 * 4096 * 4096 * 4 == 2**31
    assert told["stored_bits_per_weight_at_3"]["groups of 128"] == pytest.approx(3.125, abs=1e-4)
    assert told["bytes_added_if_embeddings_were_tied"] == 128256 * 4096 * 2


def test_experiment_is_of_a_method_in_the_catalog() -> None:
    assert catalog.get_method("rsq").paper == "2503.01820"
