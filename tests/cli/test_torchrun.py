"""Commands under torchrun: the first rank speaks and writes, once, and what it writes is what one process writes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import whatmatters

MODULES = Path(whatmatters.__file__).parents[1]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MODULES)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "whatmatters"]
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_ranks_write_what_one_process_writes_and_say_it_once(
    work: Path, tiny: Path, text: Path, small: tuple[str, ...], run: Callable, listing: Callable, one_thread: None
) -> None:
    line = ("quantize", tiny, "--text", text, "--bits", 3, "--group-size", 16, *small)
    done = torchrun(*line, "-o", "shared", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)  # one document, so one rank printed it
    assert told["output"] == "shared"
    assert sum(line.startswith("rsq: 2 of 2") for line in done.stderr.splitlines()) == 1
    run(*line, "-o", "alone")
    assert listing(work / "shared") == listing(work / "alone")
    assert sorted(path.name for path in work.iterdir()) == ["alone", "shared"]

    refused = torchrun(*line, "-o", "shared")
    assert refused.returncode != 0
    assert refused.stderr.count("error: shared exists already") == 1
    assert refused.stdout == ""
    again = torchrun(*line, "-o", "shared", "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("shared is finished already") == 1
    assert again.stdout.count("written: shared") == 1


def test_a_command_that_is_not_shared_runs_once() -> None:
    done = torchrun("methods")
    assert done.returncode == 0
    alone = subprocess.run([sys.executable, "-m", "whatmatters", "methods"], capture_output=True, text=True, check=True)
    assert done.stdout == alone.stdout
