"""One contract for every catalog entry, found without being told: documentation, bad input, restored state, determinism, evidence.

Settings that an entry requires are filled in by the name of the parameter, never by the name of the method: a new entry whose parameter
has no default and no line in `SAMPLES` fails here and is told so.
"""

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whatmatters.core import catalog
from whatmatters.core.catalog import Entry
from whatmatters.core.data import Calibration
from whatmatters.core.errors import WhatMattersError
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.score import score_tokens
from whatmatters.testing.families import build, inputs

EVIDENCE = Path(__file__).parents[1] / "evidence"
METHODS = catalog.methods()
ACTIONS = [e for e in METHODS if e.job in ("quantize", "prune")]
AHEAD = catalog.scorers(when="ahead")
WALK = catalog.scorers(when="walk")
MODEL_ENTRIES = [*ACTIONS, *AHEAD]
EVERY = [*METHODS, *AHEAD, *WALK]
SAMPLES: dict[str, Any] = {"group_size": 8, "average_bits": 4.5, "levels": (2, 4, 8), "sparsity": 0.5, "allow_uncovered": True}
"""Settings for the tiny models, by the name of the parameter; used where an entry has the parameter."""


def ids(entries: list[Entry]) -> list[str]:
    return [f"{e.job}:{e.slug}" for e in entries]


def each(entries: list[Entry]) -> Any:
    return pytest.mark.parametrize("entry", entries, ids=ids(entries))


def calibration(family: str = "llama") -> Calibration:
    return Calibration.from_tensors(inputs(family, samples=4, length=16), batch=2)


def settings(entry: Entry) -> dict[str, Any]:
    parameters = inspect.signature(entry.function).parameters
    return {name: value for name, value in SAMPLES.items() if name in parameters}


def call(entry: Entry, model: nn.Module, data: Calibration | None = None, **more: Any) -> Any:
    return entry.function(model, calibration() if data is None and entry.needs_text else data, **{**settings(entry), **more})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sections(entry: Entry) -> dict[str, str]:
    text = inspect.getdoc(entry.function) or ""
    parts = re.split(r"^(Args|Returns|Raises|Example|References):\n", text, flags=re.MULTILINE)
    return {"Summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def file_of(entry: Entry) -> Any:
    return inspect.getmodule(inspect.unwrap(entry.function))


# ---- documentation and form


@each(EVERY)
def test_summary_is_one_sentence_on_one_line(entry: Entry) -> None:
    assert entry.summary.endswith(".")
    assert len(entry.summary) <= 140


@each(EVERY)
def test_docstring_has_its_sections(entry: Entry) -> None:
    lacking = {"Args", "Returns", "Example"} - sections(entry).keys()
    assert not lacking, f"{entry.slug} lacks {lacking}"
    assert ">>>" in sections(entry)["Example"]


@each(ACTIONS)
def test_docstring_says_what_is_raised(entry: Entry) -> None:
    assert "Raises" in sections(entry)


@each(EVERY)
def test_docstring_explains_every_parameter(entry: Entry) -> None:
    told = set(re.findall(r"^\s*\**([a-z_]+)(?: \([^)]*\))?:", sections(entry)["Args"], flags=re.MULTILINE))
    lacking = {n for n, p in inspect.signature(entry.function).parameters.items() if p.kind is not p.VAR_KEYWORD} - told
    assert not lacking, f"{entry.slug} does not explain {lacking}"


@each([e for e in METHODS if e.paper])
def test_papers_are_cited(entry: Entry) -> None:
    module = file_of(entry)
    assert entry.paper is not None
    assert entry.paper in (module.__doc__ or "")
    assert entry.paper in sections(entry).get("References", "")


@each(EVERY)
def test_settings_are_keyword_only_and_immutable(entry: Entry) -> None:
    for name, parameter in inspect.signature(entry.function).parameters.items():
        if name not in ("model", "calibration", "context"):
            assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD), f"{entry.slug}: {name} can be given by position"
        assert not isinstance(parameter.default, list | dict | set), f"{entry.slug}: the default of {name} can be changed"


@each(MODEL_ENTRIES)
def test_required_settings_have_a_sample(entry: Entry) -> None:
    required = {
        n for n, p in inspect.signature(entry.function).parameters.items()
        if p.default is p.empty and p.kind is p.KEYWORD_ONLY
    }  # fmt: skip
    assert required <= SAMPLES.keys(), f"give {required - SAMPLES.keys()} of {entry.slug} a default, or a line in SAMPLES"


@each(EVERY)
def test_names_units_and_rooms_agree(entry: Entry) -> None:
    module = file_of(entry)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.slug)
    assert entry.unit in catalog.UNITS
    assert module.__name__.split(".")[1] == entry.job
    assert inspect.unwrap(entry.function).__name__ in module.__all__
    if entry.kind != "scorer":
        assert module.__name__.rpartition(".")[2] == entry.slug.replace("-", "_")


@each(EVERY)
def test_entries_are_found_by_both_spellings(entry: Entry) -> None:
    find = catalog.get_scorer if entry.kind == "scorer" else catalog.get_method
    assert find(entry.slug) is find(entry.slug.replace("-", "_"))


# ---- what a call does


@each(ACTIONS)
def test_actions_return_a_report_on_known_sites(entry: Entry, tmp_path: Path) -> None:
    model = build("llama")
    report = call(entry, model)
    assert isinstance(report, Report)
    assert report.method == entry.slug
    assert {row["site"] for row in report.rows} <= {s.name for s in structure(model).sites}
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


@each(AHEAD)
def test_scorers_return_finite_scores_that_survive_a_file(entry: Entry, tmp_path: Path) -> None:
    model = build("llama")
    scores = call(entry, model)
    assert isinstance(scores, Scores)
    assert scores.structure == structure(model)
    scores.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    assert same(dict(loaded.values), dict(scores.values))
    assert loaded.unit == scores.unit == entry.unit


@each(MODEL_ENTRIES)
def test_the_same_call_gives_the_same_bits(entry: Entry) -> None:
    outcomes = []
    for _ in range(2):
        model = build("llama")
        result = call(entry, model)
        outcomes.append(dict(result.values) if isinstance(result, Scores) else state(model))
    assert same(outcomes[0], outcomes[1])


@each(MODEL_ENTRIES)
def test_global_randomness_is_neither_read_nor_written(entry: Entry) -> None:
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        model = build("llama")
        result = call(entry, model)
        assert torch.equal(torch.random.get_rng_state(), before)
        outcomes.append(dict(result.values) if isinstance(result, Scores) else state(model))
    assert same(outcomes[0], outcomes[1])


@each(MODEL_ENTRIES)
def test_modes_hooks_and_gradients_are_left_as_they_were(entry: Entry) -> None:
    model = build("llama").train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    call(entry, model)
    assert [m.training for m in model.modules()] == modes
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert sum(p.requires_grad for p in model.parameters()) >= len(list(model.parameters())) - 1
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert model.config._attn_implementation == build("llama").config._attn_implementation


@each(AHEAD)
def test_scorers_change_no_weight(entry: Entry) -> None:
    model = build("llama")
    before = state(model)
    call(entry, model)
    assert same(state(model), before)


@each(MODEL_ENTRIES)
def test_calibration_data_are_not_modified(entry: Entry) -> None:
    data = calibration()
    before = data.inputs.clone()
    call(entry, build("llama"), data)
    assert torch.equal(data.inputs, before)


@each([e for e in MODEL_ENTRIES if "progress" in inspect.signature(e.function).parameters])
@pytest.mark.parametrize("at", [0, 1])
def test_an_interruption_leaves_the_model_as_it_was(entry: Entry, at: int) -> None:
    model = build("llama").train()
    before = state(model)
    calls = []

    def progress(label: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(entry, model, progress=progress)
    assert same(state(model), before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@each(ACTIONS)
def test_weights_no_site_covers_must_be_allowed(entry: Entry) -> None:
    model = build("mixtral")
    before = state(model)
    with pytest.raises(WhatMattersError, match="allow_uncovered"):
        call(entry, model, calibration("mixtral"), allow_uncovered=False)
    assert same(state(model), before)


@each(MODEL_ENTRIES)
def test_a_module_without_blocks_is_refused_with_the_operation_named(entry: Entry) -> None:
    with pytest.raises(WhatMattersError, match=rf"in {entry.job}\.") as caught:
        call(entry, nn.Linear(8, 8))
    assert isinstance(caught.value, ValueError | TypeError)


@each(ACTIONS)
def test_nan_weights_are_named_and_nothing_is_changed(entry: Entry) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = {name: value.nan_to_num(7.0) for name, value in state(model).items()}
    with pytest.raises(WhatMattersError, match=r"model\.layers\.1"):
        call(entry, model)
    assert same({name: value.nan_to_num(7.0) for name, value in state(model).items()}, before)


@each([e for e in MODEL_ENTRIES if e.needs_text])
def test_data_that_is_needed_is_asked_for(entry: Entry) -> None:
    with pytest.raises(WhatMattersError):
        entry.function(build("llama"), None, **settings(entry))


@each([e for e in MODEL_ENTRIES if not e.needs_text])
def test_entries_that_claim_to_need_no_data_run_without(entry: Entry) -> None:
    entry.function(build("llama"), None, **settings(entry))


@each([e for e in MODEL_ENTRIES if not e.needs_gradients])
def test_entries_that_claim_to_need_no_gradients_run_without(entry: Entry) -> None:
    model = build("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        call(entry, model)


@each(MODEL_ENTRIES)
def test_half_precision_models_work_and_keep_their_dtype(entry: Entry) -> None:
    model = build("llama").to(torch.bfloat16)
    call(entry, model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@each(AHEAD)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])
def test_scorers_work_on_every_family(entry: Entry, family: str) -> None:
    scores = call(entry, build(family), calibration(family))
    assert all(torch.isfinite(value).all() for value in scores.values.values())


@each(WALK)
def test_token_scorers_score_every_token_and_ignore_padding(entry: Entry) -> None:
    model, data = build("llama"), inputs("llama", samples=3, length=16)
    valid = torch.ones_like(data, dtype=torch.bool)
    valid[1, 11:] = False
    other = data.clone()
    other[~valid] = 5
    results = []
    for one in (data, other):
        scores = score_tokens(model, Calibration.from_tensors(one, valid, batch=2), entry.slug)
        assert scores.values.keys() == set(structure(model).blocks)
        results.append(torch.stack([value[valid] for value in scores.values.values()]))
    assert torch.isfinite(results[0]).all()
    assert torch.allclose(results[0], results[1], atol=1e-5)


# ---- evidence


@each([e for e in METHODS if e.kind == "method"])
def test_methods_have_fresh_evidence(entry: Entry) -> None:
    import importlib

    from whatmatters.reproduce._common import digest

    record = json.loads((EVIDENCE / f"{entry.slug}.json").read_text(encoding="utf-8"))
    keys = {"slug", "claims", "results", "seeds", "versions", "seconds", "peak_bytes", "commit", "digest"}
    assert keys <= record.keys()
    assert record["claims"]
    for claim in record["claims"]:
        assert {"claim", "tier", "verdict", "effect", "interval", "smallest_effect"} <= claim.keys()
        assert claim["verdict"] in ("shown", "refuted", "inconclusive")
        assert claim["tier"] in ("exact", "planted", "desk", "public", "arithmetic")
    assert len(record["seeds"]) >= 3
    experiment = importlib.import_module(f"whatmatters.reproduce.{entry.slug.replace('-', '_')}")
    assert record["digest"] == digest(entry.slug, experiment), "the code has changed since: run `whatmatters reproduce " + entry.slug + "`"


def test_deep_copies_of_a_quantized_model_keep_its_record() -> None:
    from whatmatters.core.formats import attached
    from whatmatters.quantize import rtn

    model = build("llama")
    rtn(model, bits=4, group_size=8)
    assert attached(copy.deepcopy(model)).keys() == attached(model).keys()
