"""The main job on the embedded model, as the README has it: every command is the one that the command before suggests."""

import json
import shlex
import sys

import torch
from transformers import AutoModelForCausalLM

from whatmatters.cli.console import ProgressBars
from whatmatters.core.checkpoint import load
from whatmatters.core.plans import Plan
from whatmatters.core.report import Report
from whatmatters.core.sites import structure

SMALL = ("--samples", "8", "--length", "64")


def following(result) -> list[str]:
    """The first suggested command, as it is typed after the program's name."""
    line = next(line for line in result.stdout.splitlines() if line.startswith("next: whatmatters "))
    return shlex.split(line.removeprefix("next: whatmatters "))


def test_score_plan_quantize_evaluate(run, work):
    suggested = following(run("score", "default", "--scorer", "layer-shift", "--text", "default", *SMALL, "-o", "scores.safetensors"))
    assert suggested == ["plan", "scores.safetensors", "--average-bits", "3.5", "-o", "plan.json"]
    suggested = following(run(*suggested))
    assert suggested == ["quantize", "MODEL", "--plan", "plan.json", "--output", "DIR"]
    plan = Plan.load(work / "plan.json")
    assert plan.account["achieved"] <= 3.5

    suggested = ["default" if word == "MODEL" else "out" if word == "DIR" else word for word in suggested]
    result = run(*suggested, "--method", "gptq", "--text", "default", *SMALL)
    assert {row["site"]: row["bits"] for row in Report.load(work / "out" / "whatmatters.json").rows} == dict(plan.values)

    suggested = following(result)
    assert suggested == ["evaluate", "out", "--text", "default", "--against", "default"]
    told = json.loads(run(*suggested, *SMALL, "--json").stdout)
    assert told["documents"] == 8
    assert told["kl"] > 0

    ours, _ = load(work / "out")
    for site in structure(ours).sites:
        assert site.view(ours)[0].unique().numel() <= 2 ** plan.values[site.name] * site.shape[1] // 128
    plain = AutoModelForCausalLM.from_pretrained(work / "out")
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_one_line_with_the_default_method(run, work):
    line = ("quantize", "default", "--bits", "3", "--group-size", "-1", "--text", "default", *SMALL, "-o", "out", "--json")
    told = json.loads(run(*line).stdout)
    assert told["method"] == "rsq"
    assert told["damage"]["unit"] == "document"
    assert told["weight_bytes"] < told["original_weight_bytes"]


def test_bars_on_a_terminal():
    bars = ProgressBars(sys.stderr)
    try:
        for done in (0, 1, 2):
            bars("work", done, 2)
        bars("work", 0, 3)
        bars("more", 1, 3)
        assert {task.description: (task.completed, task.total) for task in bars.bars.tasks} == {"work": (0, 3), "more": (1, 3)}
    finally:
        bars.close()
