"""What the ranks of `test_ranks.py` run: `torchrun ... ranks_worker.py JOB FOLDER`; also imported there, for one process."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import whatmatters as wm
from whatmatters.core import ranks
from whatmatters.core.data import Calibration
from whatmatters.core.errors import RankError, WhatMattersError
from whatmatters.core.sites import structure
from whatmatters.core.walk import Block, walk
from whatmatters.testing.families import build, inputs


def data(family: str, samples: int = 10, padded: bool = True) -> Calibration:
    """Five micro-batches, so that two ranks have unequal shares, and some padding."""
    tokens = inputs(family, samples=samples, length=24)
    valid = None
    if family != "sequential" and padded:
        valid = torch.ones(tokens.shape, dtype=torch.bool)
        valid[3, 20:] = valid[7, 12:] = False
    return Calibration.from_tensors(tokens, valid, batch=2 if family != "sequential" else 48)


def state(model: nn.Module) -> dict[str, Tensor]:
    """All weights, and the scales of what is quantized: with the weights they decide the codes."""
    from whatmatters.core.formats import attached

    records = {f"{name}.scale": record.scale.clone() for name, record in attached(model).items()}
    return {name: value.clone() for name, value in model.state_dict().items()} | records


def acted(family: str, action: Callable[..., Any], **settings: Any) -> dict[str, Tensor]:
    model = build(family)
    report = action(model, data(family), allow_uncovered=family == "mixtral", **settings)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report.rows]
    return state(model) | {"rows": torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)}


def scored(scorer: Callable[..., Any], family: str = "llama", **settings: Any) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in scorer(build(family), data(family), **settings).values.items()}


def own_visit() -> dict[str, Tensor]:
    """A visit that knows nothing of ranks and sums by itself."""
    sums: dict[str, Tensor] = {}

    def visit(block: Block) -> dict[str, Any]:
        total = torch.zeros(32)
        for batch in block.batches():
            total += block.run(batch).sum((0, 1)) * (1 + batch.first)
        sums[block.name] = total
        for site in block.sites:
            block.weight(site).mul_(0.9)
        return {}

    model = build("llama")
    walk(model, data("llama"), visit, structure=structure(model), settings={})
    return sums | state(model)


JOBS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "gptq": lambda: acted("llama", wm.quantize.gptq, bits=3, group_size=16),
    "gptq at once": lambda: acted("llama", wm.quantize.gptq, bits=4, group_size=16, true_sequential=False, act_order=True),
    "gptq of gpt2": lambda: acted("gpt2", wm.quantize.gptq, bits=3, group_size=-1, symmetric=False),
    "gptq of experts": lambda: acted("mixtral", wm.quantize.gptq, bits=3, group_size=16),
    "gptq of a plain network": lambda: acted("sequential", wm.quantize.gptq, bits=3, group_size=-1),
    "rsq": lambda: acted("llama", wm.quantize.rsq, bits=3, group_size=16),
    "rsq by frequency": lambda: acted("mixtral", wm.quantize.rsq, bits=3, group_size=16, token_scores="token-frequency", rotate=None),
    "rsq by clusters": lambda: acted("llama", wm.quantize.rsq, bits=3, group_size=16, token_scores="cluster-distance"),
    "wanda": lambda: acted("llama", wm.prune.wanda, sparsity=0.5),
    "sparsegpt": lambda: acted("llama", wm.prune.sparsegpt, sparsity=0.5),
    "sparsegpt of experts": lambda: acted("mixtral", wm.prune.sparsegpt, pattern="2:4", sparsity=None),
    "rtn": lambda: acted("llama", lambda model, _, **settings: wm.quantize.rtn(model, **settings), bits=3, group_size=16),
    "layer-shift": lambda: scored(wm.score.layer_shift),
    "activation": lambda: scored(wm.score.activation, "mixtral", unit="weight"),
    "hessian-diagonal": lambda: scored(wm.score.hessian_diagonal, unit="weight"),
    "gradient": lambda: scored(wm.score.gradient, unit="weight"),
    "tokens": lambda: scored(lambda model, text: wm.score.score_tokens(model, text)),
    "a visit of one's own": own_visit,
}
"""Everything whose bits must not depend on the number of ranks."""


def run_all(folder: Path, ranked: ranks.Ranks) -> None:
    for name, job in JOBS.items():
        save_file(job(), folder / f"{name}.{ranked.rank}.safetensors")


def spilled() -> dict[str, Tensor]:
    model = build("llama")

    def visit(block: Block) -> dict[str, Any]:
        for site in block.sites:
            block.weight(site).mul_(0.5)
        return {}

    walk(model, data("llama"), visit, structure=structure(model), settings={}, spill_bytes=0)
    return state(model)


def run_faults(folder: Path, ranked: ranks.Ranks) -> None:
    """A raise on the second rank: it raises there what was raised, and an error of ours on the first; both go on to another walk."""
    told: dict[str, Any] = {}

    def fails_in_visit(model: nn.Module, text: Calibration) -> None:
        def visit(block: Block) -> dict[str, Any]:
            for site in block.sites:
                block.weight(site).mul_(0.5)
            if block.index == 1 and ranked.rank == 1:
                raise MemoryError("no more of it")
            return {}

        walk(model, text, visit, structure=structure(model), settings={})

    def fails_while_others_send(model: nn.Module, text: Calibration) -> None:
        def take(note: Any, tensors: Any) -> None:
            if ranked.rank == 1:
                raise MemoryError("no more of it")

        def visit(block: Block) -> dict[str, Any]:
            block.each(lambda batch: (None, [batch.hidden, batch.hidden]), take)
            return {}

        walk(model, text, visit, structure=structure(model), settings={})

    def fails_in_progress(model: nn.Module, text: Calibration) -> None:
        def progress(label: str, done: int, total: int) -> None:
            if done == 1 and ranked.rank == 1:
                raise KeyboardInterrupt

        wm.quantize.gptq(model, text, bits=3, group_size=16, progress=progress)

    def fails_in_commit(model: nn.Module, text: Calibration) -> None:
        import whatmatters.core.walk as module

        original = module.save_file

        def failing(tensors: Any, path: Path, **options: Any) -> None:
            if "journal-00001" in str(path) and ranked.rank == 1:
                raise OSError("disk full")
            original(tensors, path, **options)

        module.save_file = failing
        try:
            wm.quantize.gptq(model, text, bits=3, group_size=16)
        finally:
            module.save_file = original

    def has_other_data(model: nn.Module, text: Calibration) -> None:
        wm.quantize.gptq(model, data("llama", samples=10 + 2 * ranked.rank), bits=3, group_size=16)

    def has_other_weights(model: nn.Module, text: Calibration) -> None:
        def visit(block: Block) -> dict[str, Any]:
            block.weight(block.sites[0]).mul_(0.5 + ranked.rank / 8)
            return {}

        walk(model, text, visit, structure=structure(model), settings={})

    for case in (fails_in_visit, fails_while_others_send, fails_in_progress, fails_in_commit, has_other_data, has_other_weights):
        model = build("llama")
        before = state(model)
        try:
            case(model, data("llama"))
            told[case.__name__] = "no error"
        except BaseException as error:
            told[case.__name__] = f"{type(error).__name__}: {error}"
        told[f"{case.__name__} left"] = all(torch.equal(before[name], value) for name, value in state(model).items())
    save_file(JOBS["gptq"](), folder / f"after.{ranked.rank}.safetensors")
    (folder / f"faults.{ranked.rank}.json").write_text(json.dumps(told))


def run_killed(folder: Path, ranked: ranks.Ranks) -> None:
    """The second rank is killed in the second block, having left a finished one in the run folder."""
    model = build("llama", layers=3)

    def progress(label: str, done: int, total: int) -> None:
        if done == 1 and ranked.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        wm.quantize.gptq(model, data("llama"), bits=3, group_size=16, run_dir=folder / "run", progress=progress)
    except RankError as error:
        (folder / f"killed.{ranked.rank}.txt").write_text(str(error))
        raise


def run_resumed(folder: Path, ranked: ranks.Ranks) -> None:
    model = build("llama", layers=3)
    wm.quantize.gptq(model, data("llama"), bits=3, group_size=16, run_dir=folder / "run", resume=True)
    save_file(state(model), folder / f"resumed.{ranked.rank}.safetensors")
    save_file(spilled(), folder / f"spilled.{ranked.rank}.safetensors")
    model = build("llama")
    try:  # as the run folder on the first rank says
        wm.quantize.gptq(model, data("llama"), bits=4, group_size=16, run_dir=folder / "run", resume=True)
    except WhatMattersError as error:
        (folder / f"refused.{ranked.rank}.txt").write_text(f"{type(error).__name__}: {error}")


def main() -> None:
    torch.set_num_threads(1)
    job, folder = sys.argv[1], Path(sys.argv[2])
    with ranks.join(timeout=60) as ranked:
        {"all": run_all, "faults": run_faults, "killed": run_killed, "resumed": run_resumed}[job](folder, ranked)


if __name__ == "__main__":
    main()
