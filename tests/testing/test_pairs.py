"""Every scorer with every action that takes its unit; what does not fit is refused with an error of ours."""

import inspect
import typing
from typing import Any

import pytest
import torch

from whatmatters.core import allocation, catalog
from whatmatters.core.catalog import Entry
from whatmatters.core.data import Calibration
from whatmatters.core.errors import WhatMattersError
from whatmatters.core.plans import Plan
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.prune import apply as apply_masks
from whatmatters.score import score_tokens
from whatmatters.testing.families import build, inputs

ACTIONS = [entry for entry in catalog.methods() if entry.form == "action"]
TAKES_BITS = [entry for entry in ACTIONS if "bits" in inspect.signature(entry.function).parameters]
TAKES_LAYERS = [entry for entry in ACTIONS if "layer_scores" in inspect.signature(entry.function).parameters]
TAKES_TOKENS = [entry for entry in ACTIONS if "token_scores" in inspect.signature(entry.function).parameters]
LAYER, TOKEN = catalog.scorers("layer", "ahead"), catalog.scorers("token", "walk")
WEIGHT = [entry for entry in LAYER if "unit" in inspect.signature(entry.function).parameters]


def data() -> Calibration:
    return Calibration.from_tensors(inputs("llama", samples=4, length=16), batch=2)


def named(entry: Entry) -> str:
    return entry.slug


def scores(entry: Entry, **settings: Any) -> Scores:
    extra = {"group_size": 8} if "group_size" in inspect.signature(entry.function).parameters else {}
    return entry.function(build("llama"), data(), **extra, **settings)


def run(action: Entry, **settings: Any) -> tuple[torch.nn.Module, Report]:
    model = build("llama")
    return model, action.function(model, data() if action.needs_text else None, group_size=8, **settings)


@pytest.mark.parametrize("scorer", LAYER, ids=named)
def test_layer_scores_make_bits_for_every_quantizer(scorer: Entry) -> None:
    plan = allocation.bits(scores(scorer), 5.0, (2, 4, 8), group_size=8)
    for action in TAKES_BITS:
        model, report = run(action, bits=plan)
        assert {row["site"]: row["bits"] for row in report.rows} == dict(plan.values)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, build("llama").model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("scorer", LAYER, ids=named)
@pytest.mark.parametrize("action", TAKES_LAYERS, ids=named)
def test_layer_scorers_by_name_and_as_scores_are_the_same(action: Entry, scorer: Entry) -> None:
    found = scores(scorer, by="block") if "by" in inspect.signature(scorer.function).parameters else scores(scorer)
    model, _ = run(action, average_bits=5.0, levels=(2, 4), layer_scores=found)
    if "group_size" in inspect.signature(scorer.function).parameters:
        return  # by name a scorer has its own group size, which does not divide the tiny model's inputs
    by_name = build("llama")
    action.function(by_name, data(), group_size=8, average_bits=5.0, levels=(2, 4), layer_scores=scorer.slug)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), by_name.parameters(), strict=True))


@pytest.mark.parametrize("scorer", TOKEN, ids=named)
@pytest.mark.parametrize("action", TAKES_TOKENS, ids=named)
def test_token_scorers_serve_every_action_that_takes_them(action: Entry, scorer: Entry) -> None:
    model, report = run(action, bits=4, token_scores=scorer.slug, rotate=None)
    assert report.rows
    saved = score_tokens(build("llama"), data(), scorer.slug)
    again, _ = run(action, bits=4, token_scores=saved, rotate=None)
    assert torch.isfinite(again.lm_head.weight).all()
    first = structure(model).blocks[0]
    same = [
        torch.equal(p, q) for p, q in zip(model.get_submodule(first).parameters(), again.get_submodule(first).parameters(), strict=True)
    ]
    assert all(same), "before anything is quantized, saved scores are those of the walk"


@pytest.mark.parametrize("scorer", WEIGHT, ids=named)
@pytest.mark.parametrize("scope", ["all", "site", "row", "2:4"])
def test_weight_scores_make_masks_that_prune(scorer: Entry, scope: str) -> None:
    plan = allocation.masks(scores(scorer, unit="weight"), 0.5, scope=scope)
    model = build("llama")
    report = apply_masks(model, plan)
    zeros = sum(int((s.view(model) == 0).sum()) for s in structure(model).sites)
    assert zeros == sum(s.size for s in structure(model).sites) // 2
    assert len(report.rows) == len(structure(model).sites)


def test_what_does_not_fit_is_refused() -> None:
    layer, weight = scores(LAYER[1]), scores(WEIGHT[0], unit="weight")
    token = score_tokens(build("llama"), data(), "uniform")
    mask, bits = allocation.masks(weight, 0.5), allocation.bits(layer, 5.0, (2, 4, 8), group_size=8)
    model = build("llama")
    before = [p.clone() for p in model.parameters()]
    attempts = [
        lambda: allocation.bits(token, 4.0),
        lambda: allocation.bits(layer, 4.0, how="optimum"),
        lambda: allocation.masks(layer, 0.5),
        lambda: apply_masks(model, bits),
        *(lambda a=a: a.function(model, data(), bits=mask, group_size=8) for a in TAKES_BITS),
        *(lambda a=a: a.function(model, data(), bits=4, group_size=8, token_scores=layer) for a in TAKES_TOKENS),
        *(lambda a=a: a.function(model, data(), bits=4, group_size=8, token_scores="magnitude") for a in TAKES_TOKENS),
        *(lambda a=a: a.function(model, data(), average_bits=3, group_size=8, layer_scores=token) for a in TAKES_LAYERS),
        *(lambda a=a: a.function(model, data(), average_bits=3, group_size=8, layer_scores="uniform") for a in TAKES_LAYERS),
    ]
    for attempt in attempts:
        with pytest.raises(WhatMattersError):
            attempt()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


TAKES_RATIOS = [
    entry
    for entry in ACTIONS
    if Plan in typing.get_args(getattr(inspect.signature(entry.function).parameters.get("sparsity"), "annotation", None))
]


@pytest.mark.parametrize("scorer", LAYER, ids=named)
def test_layer_scores_make_ratios_for_every_pruner(scorer: Entry) -> None:
    plan = allocation.ratios(scores(scorer), 0.4)
    for action in TAKES_RATIOS:
        model = build("llama")
        action.function(model, data() if action.needs_text else None, sparsity=plan)
        for site in structure(model).sites:
            wanted, gone = float(plan.values[site.name]) * site.size, int((site.view(model) == 0).sum())
            assert wanted - 1e-6 <= gone < wanted + site.shape[0], f"{action.slug}: {gone} of {site.name}, the plan says {wanted}"


@pytest.mark.parametrize("scorer", WEIGHT, ids=named)
def test_weight_scores_make_masks_that_are_repaired(scorer: Entry) -> None:
    plan = allocation.masks(scores(scorer, unit="weight"), 0.4)
    model = build("llama")
    apply_masks(model, plan, data(), repair="sparsegpt")
    for site in structure(model).sites:
        assert not site.view(model)[~plan.values[site.name]].any()


def test_every_scorer_and_every_action_is_in_a_pair() -> None:
    assert {entry.slug for entry in [*LAYER, *TOKEN]} == {entry.slug for entry in catalog.scorers()}
    taking = [*TAKES_BITS, *TAKES_LAYERS, *TAKES_TOKENS, *TAKES_RATIOS]
    assert {entry.slug for entry in taking} == {entry.slug for entry in ACTIONS}


def test_plans_of_the_wrong_kind_are_refused_by_pruners() -> None:
    layer, weight = scores(LAYER[1]), scores(WEIGHT[0], unit="weight")
    wrong = [allocation.masks(weight, 0.5), allocation.bits(layer, 5.0, (2, 4, 8), group_size=8)]
    for action in TAKES_RATIOS:
        for plan in wrong:
            with pytest.raises(WhatMattersError):
                action.function(build("llama"), data(), sparsity=plan)
