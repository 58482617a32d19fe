"""`kill -9` during a quantization, then `--resume`: the same bytes as an unbroken run, and never a half-written output."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HELPER = Path(__file__).with_name("kill_here.py")
LINE = ("--method", "gptq", "--bits", "3", "--group-size", "16", "--samples", "8", "--length", "16")
POINTS = {
    "solve": 400,  # of 160 columns a block: in the third block
    "checkpoint write": 0,
    "commit": 16,  # of 7 tensors a block: in the third block
}
MORE_POINTS = {
    "solve": 170,
    "block write": 1,
    "commit": 1,
    "before the rename": 0,
    "after the rename": 0,
}
RANDOM_KILLS = 20 - len(POINTS) - len(MORE_POINTS)
"""With the points above: twenty."""


@pytest.fixture(scope="module")
def whole(three, text, tmp_path_factory):
    """The output of a run that nobody stopped, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(folder, "quantize", str(three), "--text", str(text), *LINE, "-o", "out")
    assert done.wait(120) == 0, done.communicate()
    return contents(folder / "out")


def environment() -> dict[str, str]:
    """Other numbers of threads give other bits, and are refused."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(folder: Path, *line: str, helper: tuple[str, ...] = ("-m", "whatmatters")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *helper, *line], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def appearance(process: subprocess.Popen[str], path: Path) -> float:
    """When a path of a running command came into being."""
    while process.poll() is None and not path.exists():
        time.sleep(0.002)
    return time.monotonic()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def state_of(folder: Path) -> dict[str, object]:
    """What a kill left behind, for the record."""
    run = folder / "out.run"
    return {
        "finished_blocks": len(list(run.glob("block-*.safetensors"))),
        "journal": len(list(run.glob("journal-*.safetensors"))),
        "partial_files": len(list(run.rglob("*.partial*"))),
        "output": (folder / "out").exists(),
    }


def kill_at(point: str, count: int, folder: Path, line: tuple[str, ...], expected: dict[str, bytes]) -> dict[str, object]:
    """Run, be killed at a point, check that nothing is half-written, continue, and compare every byte."""
    done = start(folder, point, str(count), *line, helper=(str(HELPER),))
    _, errors = done.communicate(timeout=120)
    assert done.returncode == -signal.SIGKILL, errors
    state = state_of(folder)
    assert state["finished_blocks"] >= 1
    assert not state["output"] or contents(folder / "out") == expected
    return {"point": point, "count": count, **state}


def continue_and_compare(run, monkeypatch, folder: Path, line: tuple[str, ...], expected: dict[str, bytes]) -> None:
    monkeypatch.chdir(folder)
    run(*line, "--resume")
    assert contents(folder / "out") == expected
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_run_continues_to_the_same_bytes(run, tmp_path, monkeypatch, three, text, whole, point):
    line = ("quantize", str(three), "--text", str(text), *LINE, "-o", "out")
    record = kill_at(point, POINTS[point], tmp_path, line, whole)
    print(json.dumps(record))
    if point == "commit":
        assert record["journal"]
    continue_and_compare(run, monkeypatch, tmp_path, line, whole)


@pytest.mark.full
@pytest.mark.parametrize("point", MORE_POINTS)
def test_other_points(run, tmp_path, monkeypatch, three, text, whole, point):
    line = ("quantize", str(three), "--text", str(text), *LINE, "-o", "out")
    print(json.dumps(kill_at(point, MORE_POINTS[point], tmp_path, line, whole)))
    continue_and_compare(run, monkeypatch, tmp_path, line, whole)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_random_kills(run, tmp_path, monkeypatch, saved, text):
    """Killed at moments drawn between the first block's checkpoint and the appearance of the output."""
    model = saved(tmp_path / "model", layers=8, hidden=128, intermediate=384)
    draw = random.Random(0)
    line = (
        "quantize", str(model), "--text", str(text), "--method", "rsq", "--bits", "3", "--group-size", "16",
        "--samples", "40", "--length", "64", "-o", "out",
    )  # fmt: skip
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    process = start(unbroken, *line)
    first = appearance(process, unbroken / "out.run" / "block-00000.safetensors")
    span = appearance(process, unbroken / "out") - first
    assert process.wait(60) == 0, process.communicate()
    expected = contents(unbroken / "out")

    kills: list[dict[str, object]] = []
    attempts = 0
    while len(kills) < RANDOM_KILLS:
        attempts += 1
        assert attempts <= 4 * RANDOM_KILLS, f"only {len(kills)} of {attempts} runs were killed in time"
        folder = tmp_path / f"try{attempts}"
        folder.mkdir()
        process = start(folder, *line)
        appearance(process, folder / "out.run" / "block-00000.safetensors")
        delay = draw.uniform(0, span)
        time.sleep(delay)
        if process.poll() is not None:
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        state = state_of(folder)
        assert not state["output"] or contents(folder / "out") == expected
        kills.append({"point": "random", "seconds_after_first_block": round(delay, 3), **state})
        continue_and_compare(run, monkeypatch, folder, line, expected)
    print(json.dumps(kills))
