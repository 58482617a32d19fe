"""A scorer of a user's own: the very text of the guide is run, through the checks, the Python interface and the command line."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from whatmatters.core import catalog
from whatmatters.core.catalog import load_plugin
from whatmatters.core.data import Calibration
from whatmatters.core.errors import FileError, InputError
from whatmatters.testing.families import build, inputs

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "extend.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
SCORER, USE, TOKENS = BLOCKS


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The guide's file in a folder that Python looks into; forgotten afterwards."""
    catalog.scorers()
    known = dict(catalog._entries)
    path = tmp_path / "mine.py"
    path.write_text(SCORER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    catalog._entries.clear()
    catalog._entries.update(known)
    sys.modules.pop("mine", None)


def test_the_scorer_of_the_guide_has_ten_lines() -> None:
    assert len([line for line in SCORER.splitlines() if line.strip()]) <= 10


def test_the_guide_is_true(mine: Path) -> None:
    data = Calibration.from_tensors(inputs("llama", samples=4, length=16), batch=2)
    names = {
        "model": build("llama", hidden=128, intermediate=256, layers=3),
        "calibration": data,
        "text": Calibration.from_tensors(inputs("llama", samples=6, length=16, seed=7)),
    }
    exec(USE, names)
    assert {row.scorer for row in names["found"].rows} == {"row-spread", "magnitude", "random"}
    assert len(set(names["bits"].values.values())) > 1
    assert {row["site"]: row["bits"] for row in names["report"].rows} == dict(names["bits"].values)
    names["model"] = build("llama", hidden=128, intermediate=256)
    exec(TOKENS, names)
    assert names["report"].settings["token_scores"]


def test_the_commands_of_the_guide_work(mine: Path, run, tiny: Path, text: Path, small, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plugin, groups, reading = ("--plugin", mine), ("--group-size", 8), ("--text", text, *small)
    judged = run("audit", tiny, *reading, "--scorers", "row-spread,random", *groups, "--json", *plugin)
    assert {row["scorer"] for row in json.loads(judged.stdout)["rows"]} == {"row-spread", "random"}
    scores, plan, first, second = (tmp_path / name for name in ("scores.safetensors", "plan.json", "first", "second"))
    run(*plugin, "score", tiny, "--scorer", "row-spread", "-o", scores)
    run("plan", scores, "--average-bits", 5, *groups, "-o", plan)
    run("quantize", tiny, "--method", "gptq", "--plan", plan, *reading, "--output", first, "--no-evaluate")
    ahead = ("--average-bits", 5, *groups, f"--plugin={mine}", "--layer-scores", "row-spread")
    run("quantize", tiny, *ahead, *reading, "--output", second, "--no-evaluate")
    assert all((folder / "model.safetensors").exists() for folder in (first, second))


def test_without_the_plugin_the_name_is_unknown(run, tiny: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run("score", tiny, "--scorer", "row-spread", "-o", tmp_path / "scores", code=1)
    assert "no scorer named 'row-spread'" in done.output


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (None, FileError, "no file"),
        ("x = 1\n", InputError, "registers nothing"),
        ("raise ValueError('not today')\n", InputError, "ValueError: not today"),
        ("import no_such_package\n", FileError, "no_such_package"),
        ("def broken(:\n", InputError, "SyntaxError"),
    ],
)
def test_bad_plugins_are_one_message(mine: Path, run, code: str | None, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    path = mine.with_name("other.py")
    if code is not None:
        path.write_text(code, encoding="utf-8")
    with pytest.raises(error, match=message):
        load_plugin(path)
    assert message in run("--plugin", path, "methods", code=1).output


def test_a_name_of_the_library_cannot_be_taken(mine: Path) -> None:
    mine.write_text(SCORER.replace("row-spread", "magnitude"), encoding="utf-8")
    with pytest.raises(InputError, match="two catalog entries named 'magnitude'"):
        load_plugin(mine)


def test_a_module_can_be_named_too(mine: Path) -> None:
    assert [entry.slug for entry in load_plugin("mine")] == ["row-spread"]
    scores = importlib.import_module("mine").row_spread(build("llama"))
    assert all(torch.isfinite(value) for value in scores.values.values())
