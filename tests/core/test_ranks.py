"""Ranks: as many as there are, they end with the bits of one process; a fault on one is a fault on all, and none waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import whatmatters as wm
from core import ranks_worker
from whatmatters.core import ranks
from whatmatters.core.errors import InputError
from whatmatters.testing.families import build

HERE = Path(__file__).parent
MODULES = Path(wm.__file__).parents[1]


def torchrun(*command: str, size: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a command with `size` ranks on one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(MODULES), str(HERE)])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads here as in the ranks: products round by how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(str(HERE / "ranks_worker.py"), "all", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("job", ranks_worker.JOBS)
def test_two_ranks_and_one_process_end_with_the_same_bits(job: str, shared: Path) -> None:
    alone = ranks_worker.JOBS[job]()
    for rank in (0, 1):
        assert same(alone, load_file(shared / f"{job}.{rank}.safetensors"))


def test_a_fault_on_one_rank_is_a_fault_on_all_and_changes_nothing(tmp_path: Path) -> None:
    done = torchrun(str(HERE / "ranks_worker.py"), "faults", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"faults.{rank}.json").read_text()) for rank in (0, 1))
    assert all(value is True for told in (first, second) for key, value in told.items() if key.endswith(" left"))
    for case, fault in (
        ("fails_in_visit", "MemoryError: no more of it"),
        ("fails_while_others_send", "MemoryError: no more of it"),
        ("fails_in_progress", "KeyboardInterrupt: "),
        ("fails_in_commit", "OSError: disk full"),
    ):
        assert second[case] == fault
        assert first[case].startswith(f"RankError: rank 1 failed: {fault}")
    for told in (first, second):
        assert told["has_other_data"].startswith("RankError: the ranks of a walk: data is ")
        assert told["has_other_weights"].startswith("RankError: model.layers.0 after its visit: weights is ")
    alone = ranks_worker.JOBS["gptq"]()  # what comes after a fault is as right as ever
    assert all(same(alone, load_file(tmp_path / f"after.{rank}.safetensors")) for rank in (0, 1))


def test_a_killed_rank_ends_the_other_and_the_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    start = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MODULES)}
    command = [sys.executable, str(HERE / "ranks_worker.py"), "killed", str(tmp_path)]
    both = [  # without torchrun, which would end the first rank itself
        subprocess.Popen(command, env={**os.environ, **ours, "RANK": str(rank)}, stderr=subprocess.DEVNULL) for rank in (0, 1)
    ]
    codes = [process.wait(timeout=100) for process in both]
    assert codes == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 50  # well before the timeout of a minute
    assert "another rank is gone or does not answer" in (tmp_path / "killed.0.txt").read_text()
    assert [path.name for path in sorted((tmp_path / "run").glob("block-*"))][:1] == ["block-00000.safetensors"]
    assert len(list((tmp_path / "run").glob("block-*"))) < 3

    model = build("llama", layers=3)
    wm.quantize.gptq(model, ranks_worker.data("llama"), bits=3, group_size=16)
    unbroken = ranks_worker.state(model)

    for path in sorted((tmp_path / "run").glob("block-*"))[1:]:
        path.unlink()
    done = torchrun(str(HERE / "ranks_worker.py"), "resumed", str(tmp_path), size=3)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(3):
        assert same(unbroken, load_file(tmp_path / f"resumed.{rank}.safetensors"))
        assert same(ranks_worker.spilled(), load_file(tmp_path / f"spilled.{rank}.safetensors"))
    assert "ResumeError" in (tmp_path / "refused.0.txt").read_text()
    assert all("RankError: rank 0 failed: ResumeError" in (tmp_path / f"refused.{rank}.txt").read_text() for rank in (1, 2))

    for path in sorted((tmp_path / "run").glob("block-*"))[2:]:
        path.unlink()
    model = build("llama", layers=3)  # two of its blocks were made by three ranks
    wm.quantize.gptq(model, ranks_worker.data("llama"), bits=3, group_size=16, run_dir=tmp_path / "run", resume=True)
    assert same(unbroken, ranks_worker.state(model))


def test_a_process_by_itself_works_alone() -> None:
    with ranks.join() as ranked:
        assert (ranked.rank, ranked.size, ranked.first, ranks.current()) == (0, 1, True, None)
    with pytest.raises(InputError, match="timeout 0"), ranks.join(timeout=0):
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, (1, 2)),
    ],
)
def test_what_counts_as_launched(environment: dict[str, str], expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched() == expected
