"""The scorer of the guide, executed from its very text: contract, audit, plan, quantize, and the command line through an entry point."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import whatmatters as wm
from whatmatters.core import catalog
from whatmatters.testing import check_plan, check_scorer, check_scores
from whatmatters.testing.families import build, inputs

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "extend.md"


def source() -> str:
    """The first code block of the guide."""
    text = GUIDE.read_text(encoding="utf-8").partition("## A scorer in ten lines\n")[2]
    lines = text.lstrip("\n").split("\n")
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return textwrap.dedent("\n".join(lines[:end]))


def words() -> Any:
    """A tokenizer of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), unk_token="w0")


@pytest.fixture
def spread() -> Any:
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(source(), str(GUIDE), "exec"), names)
    yield names["spread"]
    del catalog._entries["scorer", "spread"]


def test_it_is_ten_lines() -> None:
    assert len([line for line in source().splitlines() if line.strip()]) <= 10


def test_it_keeps_the_contract(spread: Any) -> None:
    assert len(check_scorer(spread)) >= 25


def test_it_works_in_audit_plan_and_quantize(spread: Any) -> None:
    model = build("llama", layers=3)
    data = wm.Calibration.from_tensors(inputs("llama", samples=6, length=16), batch=2)
    judged = wm.Calibration.from_tensors(inputs("llama", samples=6, length=16, seed=2), batch=2)
    audit = wm.score.audit(model, data, judged, scorers=["spread", "magnitude"], by="block", group_size=8, steps=2, orders=1)
    assert {row.scorer for row in audit.rows} >= {"spread", "magnitude"}
    scores = spread(model)
    check_scores(scores)
    plan = wm.allocate.bits(scores, 5.0, (2, 4, 8), group_size=8)
    check_plan(plan, scores)
    report = wm.quantize.gptq(model, data, bits=plan, group_size=8)
    assert {row["site"]: row["bits"] for row in report.rows} == dict(plan.values)
    by_name = wm.quantize.layerwise_quant(
        build("llama", layers=3), data, average_bits=5.0, levels=(2, 4), layer_scores="spread", group_size=8
    )
    assert by_name.rows


def test_the_command_line_sees_it_through_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "my_spread.py").write_text(source())
    metadata = tmp_path / "my_spread-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-spread\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[whatmatters]\nspread = my_spread\n")
    model = build("llama")
    wm.save(model, words(), tmp_path / "model")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "whatmatters"]
    for line in (
        ["methods", "spread", "--json"],
        ["score", str(tmp_path / "model"), "--scorer", "spread", "-o", str(tmp_path / "scores"), "--json"],
        [
            "plan",
            str(tmp_path / "scores"),
            "--average-bits",
            "5",
            "--levels",
            "2,4,8",
            "--group-size",
            "8",
            "-o",
            str(tmp_path / "plan.json"),
        ],
    ):  # fmt: skip
        done = subprocess.run([*command, *line], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "plan.json").read_text())["values"].values()) <= {2, 4, 8}
