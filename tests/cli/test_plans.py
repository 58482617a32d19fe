"""`score` and `plan`: one scoring, any number of budgets, other tools' files."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from whatmatters.core import allocation
from whatmatters.core.catalog import scorers
from whatmatters.core.checkpoint import load
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.interop import TOOLS


@pytest.fixture
def layers(work, tiny):
    """Layer scores of the tiny model in a file."""
    found = structure(load(tiny)[0])
    scores = Scores("layer", {b: torch.tensor(float(i)) for i, b in enumerate(found.blocks)}, "mine", {}, structure=found)
    scores.save(work / "scores.safetensors")
    return scores


@pytest.mark.parametrize("entry", scorers(when="ahead"), ids=lambda entry: entry.slug)
def test_every_scorer_that_runs_ahead(run, work, tiny, text, small, entry):
    told = json.loads(run("score", tiny, "--scorer", entry.slug, "--text", text, *small, "-o", "s.safetensors", "--json").stdout)
    scores = Scores.load(work / "s.safetensors")
    assert (told["scorer"], told["unit"]) == (entry.slug, scores.unit)
    assert scores.structure is not None
    assert told["order"] == (scores if scores.unit == "layer" else scores.reduce("mean")).order()


def test_settings_of_a_scorer_are_options(run, work, tiny):
    run("score", tiny, "--scorer", "weight-outliers", "--by", "site", "--two-sided", "--z", "2", "-o", "s.safetensors")
    scores = Scores.load(work / "s.safetensors")
    assert (scores.settings["z"], scores.settings["two_sided"]) == (2.0, True)
    assert len(scores.values) == 14


def test_score_dry_run_writes_nothing(run, work, tiny, text, listing):
    assert "dry run" in run("score", tiny, "--scorer", "layer-shift", "--text", text, "-o", "s", "--dry-run").stdout
    assert listing(work) == {}


def test_score_needs_its_text_and_a_known_scorer(run, work, tiny):
    assert "learns from text" in run("score", tiny, "--scorer", "layer-shift", "-o", "s", code=2).output
    assert "known: " in run("score", tiny, "--scorer", "no-such", "-o", "s", code=1).stderr


def test_plan_for_several_budgets_is_what_allocation_makes(run, work, layers):
    line = ("plan", "scores.safetensors", "--average-bits", "4.5", "--average-bits", "5", "--group-size", "16")
    told = json.loads(run(*line, "-o", "plan.json", "--json").stdout)
    for value, shown in zip(("4.5", "5.0"), told["plans"], strict=True):
        plan = Plan.load(work / f"plan-{value}.json")
        expected = allocation.bits(layers, float(value), (2, 3, 4, 8), group_size=16)
        assert dict(plan.values) == dict(expected.values)
        assert shown["bytes"] == math.floor(plan.account["used"] / 8)
    assert not (work / "plan.json").exists()


def test_plan_of_one_budget_has_the_name_that_was_given(run, work, layers):
    result = run("plan", "scores.safetensors", "--average-bits", "3", "--levels", "2,4", "--count", "codes", "-o", "mine")
    assert set(Plan.load(work / "mine").values.values()) == {2, 4}
    assert "next: whatmatters quantize MODEL --plan mine --output DIR" in result.stdout


def test_plan_without_an_output_only_tells(run, work, layers):
    before = sorted(work.iterdir())
    assert "sites:" in run("plan", "scores.safetensors", "--average-bits", "4.5", "--group-size", "16").stdout
    assert sorted(work.iterdir()) == before


def test_plan_dry_run_writes_nothing(run, work, layers):
    before = sorted(work.iterdir())
    run("plan", "scores.safetensors", "--average-bits", "4.5", "--group-size", "16", "-o", "plan.json", "--dry-run")
    assert sorted(work.iterdir()) == before


def test_loss_tables_are_solved_and_ranks_are_ranked(run, work, layers):
    allocation.loss_from_rank(layers, (2, 3, 4)).save(work / "loss.safetensors")
    told = json.loads(run("plan", "loss.safetensors", "--average-bits", "3", "--count", "codes", "--json").stdout)["plans"][0]
    assert "predicted_loss" in told["account"]
    assert set(told["values"].values()) <= {2, 3, 4}
    ranked = json.loads(run("plan", "loss.safetensors", "--average-bits", "3", "--count", "codes", "--how", "rank", "--json").stdout)
    assert "predicted_loss" not in ranked["plans"][0]["account"]
    assert "loss_from_rank" in run("plan", "scores.safetensors", "--average-bits", "3", "--how", "optimum", code=1).stderr


def test_masks_and_ratios(run, work, tiny, layers):
    found = layers.structure
    model, _ = load(tiny)
    Scores("weight", {s.name: s.view(model).abs() for s in found.sites}, "w", {}, structure=found).save(work / "w.safetensors")
    run("plan", "w.safetensors", "--sparsity", "0.3", "-o", "mask.safetensors")
    assert Plan.load(work / "mask.safetensors").account["achieved"] == pytest.approx(0.3, abs=1e-4)
    run("plan", "w.safetensors", "--scope", "2:4", "-o", "half.safetensors")
    assert Plan.load(work / "half.safetensors").account["achieved"] == 0.5
    run("plan", "scores.safetensors", "--sparsity", "0.5", "--floor", "0.4", "-o", "ratio.json")
    assert min(Plan.load(work / "ratio.json").values.values()) >= 0.4
    run("plan", "w.safetensors", "--average-bits", "3", "--count", "codes", "-o", "bits.json")
    assert Plan.load(work / "bits.json").kind == "bits"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_plan_for_every_tool_writes_its_own_file(run, work, tool, saved):
    from whatmatters.testing.families import build

    found = structure(build("llama", hidden=256, intermediate=512))
    values = {block: torch.tensor(float(i)) for i, block in enumerate(found.blocks)}
    Scores("layer", values, "mine", {}, structure=found).save(work / "s.safetensors")
    group = "32" if tool.group_sizes is None or 32 in tool.group_sizes else str(tool.group_sizes[0])
    result = run("plan", "s.safetensors", "--average-bits", "5.5", "--group-size", group, "--for", tool.name, "-o", "plan.json")
    assert (work / f"plan-{tool.file}").stat().st_size > 0
    assert tool.proof in result.stdout
    plan = Plan.load(work / "plan.json")
    tool.check(plan)
    assert set(plan.values.values()) <= set(tool.levels)


def test_tool_that_cannot_hold_it_is_refused_before_anything_is_written(run, work, layers):
    before = sorted(work.iterdir())
    line = ("plan", "scores.safetensors", "--average-bits", "3.5", "-o", "plan.json")
    assert "vllm cannot load 3 bits" in run(*line, "--for", "vllm", "--levels", "3,4", code=1).stderr
    assert "group size 16" in run(*line[:2], "--average-bits", "6", "--group-size", "16", "-o", "p", "--for", "vllm", code=1).stderr
    assert "known: llama.cpp" in run(*line, "--for", "nothing", code=1).stderr
    assert "give --average-bits" in run("plan", "scores.safetensors", "--sparsity", "0.5", "--for", "vllm", code=2).output
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "no budget was given"),
        (("--average-bits", "3", "--average-bits", "3"), 2, "given twice"),
        (("--average-bits", "10", "--group-size", "16"), 1, "feasible range is"),
        (("--average-bits", "1", "--group-size", "16"), 1, "feasible range is"),
        (("--average-bits", "nan", "--group-size", "16"), 1, "expected a finite number"),
        (("--average-bits", "3", "--levels", "2;4"), 2, "no list of whole numbers"),
        (("--average-bits", "3", "--levels", "0,4"), 1, "expected 1 to 32 bits"),
        (("--average-bits", "4.5", "--group-size", "24"), 1, "group size 24 does not divide"),
        (("--sparsity", "1.5"), 1, "feasible range is 0 to 1"),
        (("--average-bits", "5", "--group-size", "16", "--how", "sideways"), 2, "sideways"),
    ],
)
def test_budgets_that_cannot_be(run, work, layers, listing, options, code, message):
    before = listing(work)
    result = run("plan", "scores.safetensors", "--count", "stored", *options, "-o", "plan.json", code=code)
    assert message in " ".join(result.output.replace("│", " ").split())
    assert listing(work) == before


def test_one_of_several_outputs_exists(run, work, layers, listing):
    (work / "plan-5.0.json").write_text("mine")
    before = listing(work)
    line = ("plan", "scores.safetensors", "--average-bits", "4.5", "--average-bits", "5", "--group-size", "16", "-o", "plan.json")
    assert "exists already" in run(*line, code=1).stderr
    assert listing(work) == before
    run(*line, "--overwrite")
    assert Plan.load(work / "plan-5.0.json").kind == "bits"


def test_files_that_are_no_scores(run, work):
    (work / "text.txt").write_text("hello")
    (work / "empty").write_bytes(b"")
    for name in ("text.txt", "empty"):
        assert name in run("plan", name, "--average-bits", "3", code=1).stderr
    assert "no folder" in run("plan", "./none", "--average-bits", "3", code=1).stderr


def test_shapes_of_a_model_are_enough(run, work, tiny):
    for source in (tiny, tiny / "config.json"):
        told = json.loads(run("plan", source, "--average-bits", "5", "--group-size", "16", "--json").stdout)
        assert told["structure"]["blocks"] == 2
        assert ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"] in told["structure"]["ties"]
        assert told["plans"][0]["account"]["achieved"] <= 5
    assert "2 blocks, 14 sites" in run("plan", tiny).stdout


def test_plan_for_70b_from_its_config_in_bounded_time_and_memory(work):
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(work / "big")  # fmt: skip
    program = (
        "import resource, sys\n"
        "from whatmatters.cli.main import main\n"
        "sys.argv = ['whatmatters', 'plan', 'big', '--average-bits', '3.5', '-o', 'plan.json', '--json']\n"
        "try:\n    main()\nfinally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    weights = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert told["structure"]["weights"] == weights
    assert len(told["structure"]["ties"]) == 160
    assert told["plans"][0]["account"]["used"] <= 3.5 * weights
    assert told["plans"][0]["account"]["unused"] < told["plans"][0]["account"]["smallest_step"]
    peak = int(done.stderr.strip().splitlines()[-1]) * 1024
    print(f"70B plan: {seconds:.1f} s, {peak / 1e9:.2f} GB")
    assert peak < 2e9
    assert seconds < 60


def test_experts_are_tied_in_a_plan_from_a_config(run, work):
    MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_local_experts=4, architectures=["MixtralForCausalLM"],
    ).save_pretrained(work / "moe")  # fmt: skip
    told = json.loads(run("plan", "moe", "--average-bits", "4.5", "--group-size", "32", "--json").stdout)
    assert any("experts" in name for name in told["structure"]["ties"][1])
    assert told["structure"]["uncovered"]
