"""The audit: its statistics against scipy and enumeration, its curves against damaged copies, its verdict on planted truths."""

import contextlib
import copy
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from whatmatters.core import catalog
from whatmatters.core.data import Calibration
from whatmatters.core.errors import DataError, FormatError, InputError, InputTypeError, ModelError, UnknownNameError, WhatMattersError
from whatmatters.core.evaluate import evaluate
from whatmatters.core.grids import GridSettings, rounded
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.score import Ablation, Audit, ablate, audit
from whatmatters.score._agreement import draws, permutations, spearman
from whatmatters.score.audit import _saved, _Units
from whatmatters.testing.families import build, inputs

QUICK: dict[str, Any] = {"steps": 3, "orders": 2, "resamples": 200, "curve_samples": None}


def text(family: str = "llama", samples: int = 6, length: int = 12, seed: int = 1) -> Calibration:
    ids = inputs(family, samples=samples, length=length, seed=seed)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, 7:] = False
    return Calibration.from_tensors(ids, valid, torch.arange(samples) // 2, batch=2)


def uneven(layers: int = 4) -> nn.Module:
    """A Llama whose blocks do very different amounts of work."""
    model = build("llama", layers=layers)
    with torch.no_grad():
        for factor, layer in zip((3.0, 0.3, 8.0, 1.0), model.model.layers, strict=True):
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return model


@pytest.fixture(scope="module")
def found() -> Audit:
    with torch.random.fork_rng():
        return audit(uneven(), text(seed=2), text(), by="site", bits=3, **QUICK)


# ---- statistics


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
@settings(max_examples=80, deadline=None)
def test_rank_correlation_is_scipys_also_with_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array([float(pair[i]) for pair in pairs]) for i in (0, 1))
    mine = spearman(a[None], b[None])[0, 0]
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert mine == 0
    else:
        assert mine == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_few_units_are_permuted_exactly() -> None:
    some, exact = permutations(4, torch.Generator())
    assert exact
    assert sorted(map(tuple, some.tolist())) == sorted(itertools.permutations(range(4)))
    drawn, exact = permutations(12, torch.Generator().manual_seed(0))
    assert not exact
    assert (np.sort(drawn, axis=1) == np.arange(12)).all()
    # each unit is equally likely in each place
    assert np.abs((drawn[:, 0][:, None] == np.arange(12)).mean(0) - 1 / 12).max() < 4 * math.sqrt(1 / 12 / len(drawn))


def planted(model: nn.Module, judged: Calibration, by: Any = "block") -> tuple[Ablation, Scores]:
    truth = ablate(model, judged, by=by, bits=3)
    return truth, truth.scores


def test_p_values_count_the_permutations_that_do_as_well() -> None:
    model, judged = uneven(), text()
    truth, _ = planted(model, judged)
    values = [float(v) for v in truth.damage]
    order = np.argsort(np.argsort(values))
    swapped = order.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    given = [
        Scores("layer", {b: torch.tensor(float(v)) for b, v in zip(truth.units, ranks, strict=True)}, name, {})
        for name, ranks in (("same", order), ("swapped", swapped))
    ]
    result = audit(model, judged, judged, by="block", truth=truth, scorers=given, bits=3, **QUICK)
    for name, ranks in (("same", order), ("swapped", swapped)):
        row = next(row for row in result.rows if row.scorer == name)
        rho = stats.spearmanr(ranks, values).statistic
        by_chance = [stats.spearmanr(ranks, [values[i] for i in p]).statistic for p in itertools.permutations(range(4))]
        assert row.spearman == pytest.approx(rho)
        assert row.p == np.mean(np.array(by_chance) >= rho - 1e-9)
        assert row.kendall == pytest.approx(stats.kendalltau(ranks, values).statistic)
        best = [
            max(stats.spearmanr(r, [values[i] for i in p]).statistic for r in (order, swapped)) for p in itertools.permutations(range(4))
        ]
        assert row.p_adjusted == np.mean(np.array(best) >= rho - 1e-9)
    assert result.rows[0].scorer == "same"
    assert result.rows[0].top == 1
    assert result.agreement[0][1] == pytest.approx(stats.spearmanr(order, swapped).statistic)


def test_intervals_are_a_bootstrap_over_documents_against_a_loop() -> None:
    model, judged = uneven(), text(samples=10)
    truth, _ = planted(model, judged, "site")
    result = audit(model, judged, judged, truth=truth, scorers=["magnitude"], bits=3, **QUICK | {"resamples": 2000})
    row = result.rows[0]
    generator = np.random.default_rng(5)
    scores = np.array(result.importance["magnitude"])
    correlations, damages = [], []
    for _ in range(2000):
        chosen = generator.integers(0, len(truth.counts), len(truth.counts))
        damage = (truth.nats - truth.base)[:, chosen].sum(1) / truth.counts[chosen].sum()
        damages.append(damage)
        correlations.append(stats.spearmanr(scores, damage / np.array(truth.sizes)).statistic)
    assert row.interval is not None
    assert result.damage_intervals is not None
    np.testing.assert_allclose(row.interval, np.quantile(correlations, [0.025, 0.975]), atol=0.06)
    spread = np.std(damages, axis=0).max()
    np.testing.assert_allclose(np.array(result.damage_intervals).T, np.quantile(damages, [0.025, 0.975], axis=0), atol=0.3 * spread)


def test_scores_are_compared_per_weight() -> None:
    model, judged = build("llama"), text()
    structured = structure(model)
    groups = {group[0]: tuple(structured.site(name) for name in group) for group in structured.groups()}
    units = _Units(groups, np.arange(len(groups), dtype=float))
    sizes = {site.name: site.size for site in structured.sites}
    per_site = {name: torch.tensor(float(i), dtype=torch.float64) for i, name in enumerate(sizes)}
    plain = units.importance(Scores("layer", per_site, "mine", {}, structure=structured), structured, 2)
    table = {name: torch.stack([value * sizes[name], value * 0]) for name, value in per_site.items()}
    losses = units.importance(Scores("layer", table, "mine", {"levels": [2, 4]}, "loss", structured), structured, 2)
    expected = [sum(float(per_site[s.name]) * s.size for s in sites) / sum(s.size for s in sites) for sites in groups.values()]
    np.testing.assert_allclose(plain, expected)
    np.testing.assert_allclose(losses, expected)
    whole = {s.name: per_site[s.name].expand(s.shape) for s in structured.sites}
    np.testing.assert_allclose(units.importance(Scores("weight", whole, "mine", {}), structured, 2), expected)
    blocks = {block: torch.tensor(0.1 * (i + 1)) for i, block in enumerate(structured.blocks)}
    lifted = units.importance(Scores("layer", blocks, "mine", {}), structured, 2)
    assert len(set(lifted)) == len(blocks)  # sites of a block stay tied to the bit
    assert judged.tokens


# ---- curves


def test_curves_are_the_losses_of_damaged_copies(found: Audit) -> None:
    model, judged = uneven(), text()
    base = evaluate(model, judged).loss
    assert found.loss == pytest.approx(base, rel=1e-6)
    importance = found.importance["fisher"]
    order = sorted(range(len(found.units)), key=lambda unit: (importance[unit], -unit))
    total = sum(found.sizes)
    for curve, ranked in ((found.curve("fisher"), order), (found.curve(f"reversed {found.rows[0].scorer}"), None)):
        assert curve.shares[0] == 0
        assert curve.shares[-1] == 1
        assert curve.increases[0] == 0
        if ranked is None:
            continue
        for share, increase in zip(curve.shares, curve.increases, strict=True):
            cumulated = np.cumsum([0] + [found.sizes[unit] for unit in ranked]) / total
            count = int(np.abs(cumulated - share).argmin())
            assert cumulated[count] == pytest.approx(share)
            damaged = copy.deepcopy(model)
            names = {name for unit in ranked[:count] for name in found.members[unit]}
            with torch.no_grad():
                for site in structure(damaged).sites:
                    if site.name in names:
                        weight = site.view(damaged)
                        weight.copy_(rounded(weight.clone(), 3, GridSettings(-1)))
            assert increase == pytest.approx(evaluate(damaged, judged).loss - base, abs=2e-6)


def test_area_and_what_is_saved_follow_from_the_curves(found: Audit) -> None:
    random_area = np.mean([curve.area for curve in found.curves if curve.kind == "random"])
    for row in found.rows:
        own = next(curve for curve in found.curves if curve.kind == "scorer" and curve.label == row.scorer)
        assert row.area == pytest.approx(own.area, rel=1e-6)
        assert row.saved == pytest.approx(1 - row.area / random_area, rel=1e-5)
        # some documents of random ids gain by damage: resamples of them alone have no share to tell
        assert row.saved_interval is None or row.saved_interval[0] <= row.saved_interval[1]
    mean = found.curve("random")
    assert mean.increases[-1] == pytest.approx(found.curve("measured").increases[-1])
    with pytest.raises(InputError, match="no damage curve"):
        found.curve("nonsense")


def test_the_interval_of_what_is_saved_is_a_bootstrap_of_the_ratio() -> None:
    generator = np.random.default_rng(0)
    by_chance = generator.uniform(1, 3, 30)
    area = by_chance * generator.uniform(0.2, 0.8, 30)
    weights = draws(30, 4000, torch.Generator().manual_seed(0))
    assert (weights.sum(1) == 30).all()
    saved, interval = _saved(area, by_chance, weights, 0.9)
    assert saved == pytest.approx(1 - area.sum() / by_chance.sum())
    ratios = []
    for _ in range(4000):
        chosen = generator.integers(0, 30, 30)
        ratios.append(1 - area[chosen].sum() / by_chance[chosen].sum())
    assert interval is not None
    np.testing.assert_allclose(interval, np.quantile(ratios, [0.05, 0.95]), atol=0.01)
    assert _saved(area, -by_chance, weights, 0.9) == (None, None)
    assert _saved(area[:1], by_chance[:1], weights[:, :1], 0.9)[1] is None
    mixed = np.concatenate([by_chance[:-1], [-0.5]])
    assert _saved(area, mixed, np.eye(30), 0.9)[1] is None


def test_skipped_blocks_have_curves_too() -> None:
    model, judged = uneven(), text()
    result = audit(model, judged, judged, by="block", damage="skip", scorers=["layer-shift", "random"], **QUICK)
    shorter = copy.deepcopy(model)
    del shorter.model.layers[0:4]
    shorter.config.num_hidden_layers = 0
    expected = evaluate(shorter, judged).loss - evaluate(model, judged).loss
    assert result.curve("random").increases[-1] == pytest.approx(expected, abs=1e-5)
    assert "leaving them out" in result.verdict or "No score" in result.verdict


# ---- the whole


def test_all_layer_scorers_are_judged_but_the_truth_itself(found: Audit) -> None:
    judged = {row.scorer for row in found.rows}
    assert judged == {entry.slug for entry in catalog.scorers("layer", "ahead")} - {"ablation"}
    assert len(judged) >= 8
    assert [row.control for row in found.rows if row.scorer == "random"] == [True]
    assert found.scores.keys() == judged
    assert found.truth is not None
    assert found.units == found.truth.units
    assert found.ceiling is not None
    assert all(-1 <= row.spearman <= 1 for row in found.rows)
    correlations = [row.spearman for row in found.rows]
    assert correlations == sorted(correlations, reverse=True)
    assert found.verdict.endswith(".")
    assert "\n" not in found.verdict


def test_a_planted_truth_is_trusted_and_noise_is_not() -> None:
    model, judged = uneven(), text(samples=8)
    truth, scores = planted(model, judged, "site")
    per_weight = {
        name: torch.tensor(float(damage) / size, dtype=torch.float64)
        for members, damage, size in zip(truth.members, truth.damage, truth.sizes, strict=True)
        for name in members
    }
    oracle = Scores("layer", per_weight, "oracle", {}, structure=structure(model))
    backwards = Scores("layer", {n: -v for n, v in per_weight.items()}, "backwards", {})
    result = audit(model, judged, judged, truth=truth, scorers=[oracle, backwards, "random"], bits=3, **QUICK)
    assert result.best == "oracle"
    assert result.verdict.startswith("Trust oracle: ")
    assert "not to be told from random: backwards" in result.verdict
    rows = {row.scorer: row for row in result.rows}
    assert rows["oracle"].spearman == pytest.approx(1)
    assert rows["backwards"].spearman == pytest.approx(-1)
    assert rows["oracle"].top == 1
    alone = audit(model, judged, judged, truth=truth, scorers=[backwards, "random"], bits=3, **QUICK)
    assert alone.best is None
    assert alone.verdict.startswith("No score can be told from a random order on this model: the best, backwards,")
    controls = audit(model, judged, judged, truth=truth, scorers=["random"], bits=3, **QUICK)
    assert controls.best is None
    # a truth without documents has no intervals
    plain = audit(model, judged, judged, truth=scores, scorers=[oracle], bits=3, **QUICK)
    assert plain.rows[0].interval is None
    assert plain.damage_intervals is None
    assert plain.rows[0].spearman == pytest.approx(1)


def test_the_same_seed_gives_the_same_audit_and_the_model_is_left_alone() -> None:
    model, judged = uneven().train(), text()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = [audit(model, judged, judged, scorers=["random", "zeroth-order"], bits=3, seed=3, **QUICK).to_json() for _ in range(2)]
    for result in results:
        result.pop("seconds")
        for row in result["rows"]:
            row.pop("seconds")
    assert results[0] == results[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    other = audit(model, judged, judged, scorers=["random"], bits=3, seed=4, **QUICK)
    assert other.importance["random"] != results[0]["importance"]["random"]


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_are_audited(family: str) -> None:
    result = audit(build(family), text(family), text(family, seed=5), **QUICK)
    assert len(result.rows) >= 8
    assert not result.skipped


def test_what_the_model_does_not_allow_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(model: nn.Module, calibration: Calibration, *, by: str, progress: Any = None) -> Scores:
        raise ModelError("no such thing in this model\n  in score.picky")

    entries = [*catalog.scorers("layer", "ahead")[:3], catalog.Entry("picky", picky, "scorer", "score", "layer", when="ahead")]
    monkeypatch.setattr(sys.modules["whatmatters.score.audit"], "known_scorers", lambda unit, when: entries)
    result = audit(uneven(), text(), text(), bits=3, **QUICK)
    assert result.skipped == {"picky": "no such thing in this model"}


def test_bad_audits_are_refused_before_any_work() -> None:
    model, data = uneven(), text()

    def refused(error: type[WhatMattersError], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            audit(options.pop("model", model), data, options.pop("text", data), **options)

    refused(UnknownNameError, "known: .*fisher", scorers=["nonsense"])
    refused(InputError, "scorers is empty", scorers=[])
    refused(InputError, "two scores are named 'magnitude'", scorers=["magnitude", "magnitude"], **QUICK)
    refused(InputError, "fewer than three", model=build("llama"), by="block")
    refused(InputError, "steps is 1", steps=1)
    refused(InputError, "0 random order|orders 0", orders=0)
    refused(InputError, "curve_samples is 0", curve_samples=0)
    refused(InputError, "resamples is 99", resamples=99)
    refused(InputError, "confidence is 1", confidence=1.0)
    refused(InputError, "2 to 8", bits=1)
    refused(InputError, "does not divide", group_size=64)
    refused(InputError, "only a whole block", damage="skip")
    refused(DataError, "model knows 64", text=Calibration.from_tensors(torch.full((2, 5), 99)))
    refused(InputError, "see by=", truth=ablate(model, data, by="block"), scorers=["random"])
    refused(InputError, "loss table", truth=Scores("layer", {"a": torch.ones(1)}, "x", {"levels": [2]}, "loss"), scorers=["random"])
    refused(InputError, "no block or site", truth=Scores("layer", {"a": torch.tensor(1.0)}, "x", {}), scorers=["random"])
    refused(InputTypeError, "unit 'channel'", scorers=[Scores("channel", {"a": torch.ones(2)}, "x", {})], **QUICK)


# ---- files and pictures


def test_a_file_holds_everything_but_the_scores(found: Audit, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    found.save(path)
    loaded = Audit.load(path)
    assert json.dumps(loaded.to_json(), default=dict) == json.dumps(found.to_json(), default=dict)
    assert loaded.rows == found.rows
    assert loaded.curves == found.curves
    assert loaded.scores == {}
    assert [row["scorer"] for row in loaded.table()] == [row.scorer for row in found.rows]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_damaged_files_raise_only_our_error(found: Audit, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    found.save(path)
    original = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        spoiled = bytearray(original)
        for _ in range(int(generator.integers(1, 4))):
            spoiled[int(generator.integers(len(spoiled)))] = int(generator.integers(256))
        path.write_bytes(bytes(spoiled[: int(generator.integers(len(spoiled)))] if generator.random() < 0.2 else spoiled))
        with contextlib.suppress(FormatError):
            assert isinstance(Audit.load(path), Audit)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 1), ("rows", [{}]), ("units", ["a"]), ("units", [1]), ("damage", "x"), ("loss", None), ("sizes", [1.5]), ("best", 3),
        ("importance", {"a": [1]}), ("agreement", [[1]]), ("curves", [{"label": "a", "kind": "b", "shares": [True], "increases": [0]}]),
        ("damage_intervals", [[1, 2, 3]]), ("skipped", {"a": 1}), ("documents", True), ("extra", 1), ("seconds", 10**400),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_refused(found: Audit, tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "audit.json"
    found.save(path)
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError):
        Audit.load(path)


def test_pictures_are_drawn_also_of_strange_names(found: Audit, tmp_path: Path) -> None:
    found.plot().savefig(tmp_path / "audit.svg")
    model, judged = uneven(), text()
    strange = Scores("layer", {b: torch.tensor(1.0) for b in structure(model).blocks}, "$\\frac{$", {})
    audit(model, judged, judged, scorers=[strange], bits=3, **QUICK).plot().savefig(tmp_path / "strange.svg")
    assert (tmp_path / "strange.svg").stat().st_size > 1000
