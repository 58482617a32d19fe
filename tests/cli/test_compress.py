"""`quantize` and `prune`: every way to say what is wanted, what is written, and how a run is continued."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from whatmatters.cli.inputs import held_out
from whatmatters.core import allocation
from whatmatters.core.checkpoint import load
from whatmatters.core.plans import Plan
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure

GROUP = ("--group-size", "16")


def bits_in(folder) -> dict[str, int]:
    return {row["site"]: row["bits"] for row in Report.load(folder / "whatmatters.json").rows}


def test_quantize_with_text_measures_the_damage(run, work, tiny, text, small):
    result = run("quantize", tiny, "--method", "gptq", "--bits", "3", *GROUP, "--text", text, *small, "-o", "out", "--json")
    told = json.loads(result.stdout)
    assert told["method"] == "gptq"
    assert told["damage"]["perplexity_before"] == pytest.approx(told["before"]["perplexity"], rel=1e-5)
    low, high = told["damage"]["interval_percent"]
    assert low <= told["damage"]["change_percent"] <= high
    assert told["weight_bytes"] == (work / "out" / "model.safetensors").stat().st_size
    assert len(told["rows"]) == 14
    assert told["seconds"] > 0
    assert set(bits_in(work / "out").values()) == {3}
    assert not (work / "out.run").exists()
    assert told["next"] == [f"whatmatters evaluate out --text {text} --against {tiny}"]


def test_output_reloads_in_plain_transformers_as_the_method_left_it(run, work, tiny, text, small):
    run("quantize", tiny, "--method", "rtn", "--bits", "4", *GROUP, "-o", "out")
    model, _ = load(tiny)
    from whatmatters.quantize import rtn

    rtn(model, bits=4, group_size=16)
    again = AutoModelForCausalLM.from_pretrained(work / "out")
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_settings_of_the_method_are_options(run, work, tiny, text, small):
    line = ("quantize", tiny, "--bits", "3", *GROUP, "--text", text, *small, "--no-evaluate", "--method", "rsq")
    told = json.loads(run(*line, "--rotate", "none", "--act-order", "--r-min", "0.1", "--no-clip-search", "-o", "out", "--json").stdout)
    assert told["settings"]["rotate"] is None
    assert told["settings"]["act_order"] is True
    assert told["settings"]["r_min"] == 0.1
    assert told["settings"]["clip_search"] is False
    assert told["damage"] is None


def test_settings_may_stand_before_the_model(run, work, tiny, text, small):
    line = ("quantize", "--damping", "0.05", "--method=gptq", tiny, "--bits", "3", *GROUP, "--text", text, *small, "--no-evaluate")
    assert json.loads(run(*line, "-o", "out", "--json").stdout)["settings"]["damping"] == 0.05


def test_report_beside_the_checkpoint_holds_nothing_of_this_run(run, work, tiny, text, small):
    run("quantize", tiny, "--method", "gptq", "--bits", "3", *GROUP, "--text", text, *small, "-o", "out")
    content = (work / "out" / "whatmatters.json").read_text()
    report = Report.load(work / "out" / "whatmatters.json")
    assert str(work) not in content
    assert str(tiny) not in content
    assert report.seconds == report.peak_bytes == 0
    assert not any("seconds" in row for row in report.rows)
    assert math.isfinite(report.after["perplexity"])
    for file in (work / "out").iterdir():
        assert str(work).encode() not in file.read_bytes()


def test_same_command_gives_the_same_bytes(run, work, tiny, text, small, listing):
    for name in ("a", "b"):
        run("quantize", tiny, "--method", "rsq", "--bits", "3", *GROUP, "--text", text, *small, "-o", name)
    assert listing(work / "a") == listing(work / "b")


def test_other_seed_gives_other_bytes(run, work, tiny, text, small):
    for seed in ("0", "1"):
        run("quantize", tiny, "--bits", "3", *GROUP, "--text", text, *small, "--seed", seed, "--no-evaluate", "-o", f"out{seed}")
    a, b = (load_file(work / f"out{seed}" / "model.safetensors") for seed in "01")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_average_bits_by_layer_scores(run, work, tiny, text, small):
    line = ("--average-bits", "3.5", "--levels", "2,3,4,8", "--layer-scores", "layer-shift", "--count", "codes")
    told = json.loads(run("quantize", tiny, "--method", "gptq", *line, *GROUP, "--text", text, *small, "-o", "out", "--json").stdout)
    found = structure(load(tiny)[0])
    used = sum(site.size * bits_in(work / "out")[site.name] for site in found.sites)
    total = sum(site.size for site in found.sites)
    assert used <= 3.5 * total
    assert told["planned"]["budget"] == {"average_bits": 3.5, "count": "codes"}
    assert told["settings"]["account"]["average_codes"] == used / total


def test_average_bits_with_a_method_that_has_a_budget_of_its_own(run, work, tiny, text, small):
    line = ("--average-bits", "3", "--levels", "2,4", "--count", "codes", "--method", "layerwise-quant")
    run("quantize", tiny, *line, *GROUP, "--text", text, *small, "--no-evaluate", "-o", "out")
    assert set(bits_in(work / "out").values()) == {2, 4}


def test_average_bits_from_a_file_of_scores(run, work, tiny):
    found = structure(load(tiny)[0])
    scores = Scores("layer", {b: torch.tensor(float(i)) for i, b in enumerate(found.blocks)}, "mine", {}, structure=found)
    scores.save(work / "scores.safetensors")
    line = ("--average-bits", "3", "--levels", "2,4", "--count", "codes", "--layer-scores", "scores.safetensors")
    run("quantize", tiny, "--method", "rtn", *line, *GROUP, "-o", "out")
    expected = allocation.bits(scores, 3, (2, 4), count="codes", group_size=16)
    assert bits_in(work / "out") == dict(expected.values)


def test_average_bits_from_weight_scores(run, work, tiny):
    run("score", tiny, "--scorer", "magnitude", "--unit", "weight", "-o", "weights.safetensors")
    assert Scores.load(work / "weights.safetensors").unit == "weight"
    line = ("--average-bits", "3", "--levels", "2,4", "--count", "codes", "--layer-scores", "weights.safetensors")
    assert "average bits: " in run("quantize", tiny, "--method", "rtn", *line, *GROUP, "-o", "out").stdout
    assert set(bits_in(work / "out").values()) == {2, 4}


def test_plan_brings_its_group_size(run, work, tiny):
    found = structure(load(tiny)[0])
    scores = Scores("layer", {b: torch.tensor(float(i)) for i, b in enumerate(found.blocks)}, "mine", {}, structure=found)
    plan = allocation.bits(scores, 4.5, (3, 4), group_size=16, symmetric=True)
    plan.save(work / "plan.json")
    told = json.loads(run("quantize", tiny, "--plan", "plan.json", "-o", "out", "--json").stdout)
    assert told["method"] == "rtn"
    assert told["planned"]["group_size"] == 16
    assert bits_in(work / "out") == dict(plan.values)


def test_asymmetric_and_per_channel(run, work, tiny):
    run("quantize", tiny, "--bits", "4", "--asymmetric", "--group-size", "-1", "-o", "out")
    config = json.loads((work / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["symmetric"], weights["strategy"]) == (False, "channel")


def test_sixteen_bits_leaves_everything_as_it_is(run, work, tiny):
    run("quantize", tiny, "--bits", "16", "-o", "out")
    before, after = load_file(tiny / "model.safetensors"), load_file(work / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)


def test_gpt2_needs_the_dense_format(run, work, saved, listing):
    folder = saved(work / "model", "gpt2")
    before = listing(work)
    result = run("quantize", folder, "--bits", "4", *GROUP, "-o", "out", code=1)
    assert "Conv1D" in result.stderr
    assert listing(work) == before
    run("quantize", folder, "--bits", "4", *GROUP, "--format", "dense", "-o", "out")
    assert len(bits_in(work / "out")) == 8


def test_uncovered_weights_need_leave(run, work, saved):
    folder = saved(work / "model", "mixtral")
    line = ("quantize", folder, "--bits", "4", *GROUP, "--format", "dense", "-o", "out")
    assert "no site covers" in run(*line, code=1).stderr
    assert not (work / "out").exists()
    assert "no site covers" in run(*line, "--allow-uncovered").stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sparsity", "0.5", "--method", "magnitude"), 0.5),
        (("--sparsity", "0.25", "--method", "wanda"), 0.25),
        (("--method", "wanda", "--scope", "2:4"), 0.5),
        (("--method", "sparsegpt", "--pattern", "2:4"), 0.5),
        (("--sparsity", "0.5", "--method", "sparsegpt"), 0.5),
    ],
)
def test_prune(run, work, tiny, text, small, options, expected):
    run("prune", tiny, *options, "--text", text, *small, "-o", "out")
    model = AutoModelForCausalLM.from_pretrained(work / "out")
    found = structure(model)
    zeros = sum(int((site.view(model) == 0).sum()) for site in found.sites)
    assert zeros == pytest.approx(expected * sum(site.size for site in found.sites), rel=0.01)
    if ":" in " ".join(options):
        for site in found.sites:
            assert int((site.view(model).reshape(-1, 4) != 0).sum(1).max()) <= 2


def test_prune_without_text_is_by_magnitude(run, work, tiny):
    result = run("prune", tiny, "--sparsity", "0.5", "-o", "out")
    assert result.stdout.startswith("magnitude:")
    assert "not measured" in result.stderr


def test_mask_plan_is_applied_as_it_is(run, work, tiny):
    model, _ = load(tiny)
    found = structure(model)
    scores = Scores("weight", {site.name: site.view(model).abs() for site in found.sites}, "mine", {}, structure=found)
    plan = allocation.masks(scores, 0.4)
    plan.save(work / "plan.safetensors")
    run("prune", tiny, "--plan", "plan.safetensors", "-o", "out")
    pruned, _ = load(work / "out")
    for site in found.sites:
        assert torch.equal(site.view(pruned) != 0, plan.values[site.name] & (site.view(model) != 0))


def test_ratio_plan_with_repair(run, work, tiny, text, small):
    found = structure(load(tiny)[0])
    scores = Scores("layer", {b: torch.tensor(float(i)) for i, b in enumerate(found.blocks)}, "mine", {}, structure=found)
    allocation.ratios(scores, 0.5).save(work / "plan.json")
    line = ("prune", tiny, "--plan", "plan.json", "--repair", "sparsegpt", "--text", text, *small)
    told = json.loads(run(*line, "-o", "out", "--json").stdout)
    shares = [row["sparsity"] for row in told["rows"]]
    assert shares[0] > shares[-1]


def test_plan_of_the_wrong_kind(run, work, tiny):
    found = structure(load(tiny)[0])
    Plan("ratio", {site.name: 0.5 for site in found.sites}, {}, {}, "mine", structure=found).save(work / "ratio.json")
    Plan("bits", {site.name: 4 for site in found.sites}, {}, {}, "mine", structure=found).save(work / "bits.json")
    assert "kind 'bits'" in run("quantize", tiny, "--plan", "ratio.json", *GROUP, "-o", "out", code=1).stderr
    assert "'mask' or 'ratio'" in run("prune", tiny, "--plan", "bits.json", "-o", "out", code=1).stderr


@pytest.mark.parametrize("options", [("--bits", "3"), ("--average-bits", "3.5", "--method", "rsq")])
def test_dry_run_of_quantize_writes_nothing(run, work, tiny, text, small, listing, options):
    result = run("quantize", tiny, *options, *GROUP, "--text", text, *small, "-o", "out", "--dry-run", "--json")
    estimate = json.loads(result.stdout)["estimate"]
    assert estimate["seconds"] > 0
    assert estimate["memory_bytes"] > 0
    assert estimate["disk_bytes"] > 0
    assert listing(work) == {}


def test_dry_run_estimates_the_size_of_the_checkpoint(work, tiny, run):
    from whatmatters.cli.estimates import checkpoint_bytes
    from whatmatters.cli.inputs import load_shapes

    shapes, found = load_shapes(str(tiny))
    expected = checkpoint_bytes(shapes, found, {site.name: 3 for site in found.sites}, 16, True)
    run("quantize", tiny, "--bits", "3", *GROUP, "-o", "out")
    stored = load_file(work / "out" / "model.safetensors")
    sites = sum(t.nbytes for name, t in stored.items() if ".weight_" in name)
    rest = sum(t.numel() * 2 for name, t in stored.items() if ".weight_" not in name)
    assert expected == sites + rest


def test_dry_run_of_prune_writes_nothing(run, work, tiny, listing):
    assert "dry run" in run("prune", tiny, "--sparsity", "0.5", "-o", "out", "--dry-run").stdout
    assert listing(work) == {}


def interrupt_at(monkeypatch, block: int, error: BaseException) -> None:
    """Raise while the given block is being rounded."""
    from whatmatters.quantize._common import Rounding

    original = Rounding.set

    def set_or_raise(self, *arguments, **keywords):
        if self.block.index == block:
            raise error
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Rounding, "set", set_or_raise)


def test_interrupt_keeps_finished_blocks_and_says_how_to_continue(run, work, tiny, text, small, listing, monkeypatch):
    line = ("quantize", tiny, "--method", "gptq", "--bits", "3", *GROUP, "--text", text, *small)
    run(*line, "-o", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt())
        result = run(*line, "-o", "out", code=1)
    assert "stopped" in result.stderr
    assert f"whatmatters quantize {tiny} --method gptq" in result.stderr
    assert "--resume" in result.stderr
    assert not (work / "out").exists()
    assert (work / "out.run" / "block-00000.safetensors").is_file()

    assert "--resume" in run(*line, "-o", "out", code=1).stderr
    changed = run(*line, "-o", "out", "--resume", "--damping", "0.5", code=1).stderr
    assert "damping" in changed
    assert "(data: was" in run(*line, "--seed", "5", "-o", "out", "--resume", code=1).stderr

    run(*line, "-o", "out", "--resume")
    assert listing(work / "out") == listing(work / "whole")
    assert not (work / "out.run").exists()


def test_interrupt_before_the_first_block_leaves_nothing(run, work, tiny, listing, monkeypatch):
    interrupt_at(monkeypatch, 0, KeyboardInterrupt())
    assert run("quantize", tiny, "--bits", "3", *GROUP, "-o", "out", code=1).stderr.strip().endswith("stopped")
    assert listing(work) == {}


def test_resume_with_another_model_is_refused(run, work, tiny, saved, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt())
        run("quantize", tiny, "--bits", "3", *GROUP, "-o", "out", code=1)
    other = saved(work / "other", seed=1)
    assert "(model: was" in run("quantize", other, "--bits", "3", *GROUP, "-o", "out", "--resume", code=1).stderr


def test_resume_of_what_is_finished_changes_nothing(run, work, tiny, text, small, listing):
    line = ("quantize", tiny, "--bits", "3", "--method", "rtn", *GROUP, "--text", text, *small, "-o", "out")
    run(*line)
    before = listing(work)
    assert "finished already" in run(*line, "--resume").stderr
    assert listing(work) == before
    refused = run("quantize", tiny, "--bits", "4", "--method", "rtn", *GROUP, "--text", text, *small, "-o", "out", "--resume", code=1)
    assert "other inputs (bits)" in refused.stderr
    assert listing(work) == before


def test_resume_without_a_run_begins_one(run, work, tiny):
    run("quantize", tiny, "--bits", "3", *GROUP, "-o", "out", "--resume")
    assert (work / "out").is_dir()


def test_overwrite_replaces_the_output_and_an_unfinished_run(run, work, tiny, listing):
    line = ("quantize", tiny, *GROUP, "-o", "out")
    run(*line, "--bits", "3")
    (work / "out.run").mkdir()
    (work / "out.run" / "run.json").write_text("{}")
    assert "exists already" in run(*line, "--bits", "4", code=1).stderr
    run(*line, "--bits", "4", "--overwrite")
    assert set(bits_in(work / "out").values()) == {4}
    assert {path.name for path in work.iterdir()} == {"out"}


def test_resume_with_overwrite_replaces_what_is_no_checkpoint_of_ours(run, work, tiny):
    (work / "out").mkdir()
    (work / "out" / "mine.txt").write_text("old")
    line = ("quantize", tiny, "--bits", "3", *GROUP, "-o", "out", "--resume")
    assert "exists already" in run(*line, code=1).stderr
    run(*line, "--overwrite")
    assert set(bits_in(work / "out").values()) == {3}
    assert not (work / "out" / "mine.txt").exists()


def test_failed_replacement_puts_the_old_one_back(run, work, tiny, listing, monkeypatch):
    import os

    run("quantize", tiny, *GROUP, "-o", "out", "--bits", "3")
    before = listing(work / "out")
    original = os.replace

    def fails(source, target):
        if str(source).endswith("checkpoint") and str(target) == "out":
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr("os.replace", fails)
    assert "error: [Errno 28] No space left" in run("quantize", tiny, *GROUP, "-o", "out", "--bits", "4", "--overwrite", code=1).stderr
    assert listing(work / "out") == before


def test_what_comes_into_being_meanwhile_is_left_alone(run, work, tiny, monkeypatch):
    from whatmatters.cli import run_folder

    original = run_folder.save

    def save_and_collide(*arguments, **keywords):
        (work / "out").mkdir(exist_ok=True)
        return original(*arguments, **keywords)

    monkeypatch.setattr(run_folder, "save", save_and_collide)
    assert "came into being" in run("quantize", tiny, "--bits", "3", *GROUP, "-o", "out", code=1).stderr
    assert list((work / "out").iterdir()) == []


def test_held_out_never_learns_what_it_judges():
    for count in (1, 3, 9, 10, 25):
        documents = [f"document {i} " + "word " * 50 + "\n" + "last " * 5 for i in range(count)]
        learn, judge = held_out(documents)
        if count < 10:
            assert all(a + b == d for a, b, d in zip(learn, judge, documents, strict=True))
        else:
            assert sorted([*learn, *judge]) == sorted(documents)
        assert judge
    assert held_out(["short"]) == (["short"], [])


def test_text_of_its_own_to_judge_on(run, work, tiny, text, small):
    shutil.copy(text, work / "judge.txt")
    line = ("quantize", tiny, "--bits", "3", "--method", "rtn", *GROUP, "--judge", "judge.txt", "--length", "16", "-o", "out", "--json")
    told = json.loads(run(*line).stdout)
    assert told["damage"]["units"] == 64  # windows: there is one document
    assert told["damage"]["unit"] == "window"
