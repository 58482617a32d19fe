"""Calibration on two ranks against one process, one thread each: seconds of the shared part, of all, and that the bits are the same.

python benchmarks/ranks.py [--hidden 512] [--samples 64] [--length 256]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import whatmatters as wm
from whatmatters.core import ranks, walk
from whatmatters.prune import wanda as wanda_module
from whatmatters.quantize import _common
from whatmatters.quantize import rsq as rsq_module

parser = argparse.ArgumentParser()
parser.add_argument("--hidden", type=int, default=512)
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--worker", action="store_true")


def timed(owner: Any, name: str, spent: dict[str, float]) -> None:
    """Replace a function by itself with its time taken."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent["shared"] += time.perf_counter() - start
        return result

    setattr(owner, name, wrapped)


def work(hidden: int, samples: int, length: int) -> dict[str, Any]:
    """Seconds of each method: in statistics, token scores and the passes to the next block (what is shared), and in all."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4, num_attention_heads=8, vocab_size=256)
    ids = torch.randint(256, (samples, length), generator=torch.Generator().manual_seed(0))
    text = wm.Calibration.from_tensors(ids, batch=8)
    spent = {"shared": 0.0}
    timed(_common, "input_statistics", spent)
    timed(wanda_module, "input_statistics", spent)
    timed(rsq_module, "token_weights", spent)
    timed(walk._Inputs, "advance", spent)
    jobs: dict[str, Callable[[Any], object]] = {
        "gptq": lambda model: wm.quantize.gptq(model, text, bits=4, clip_search=False),
        "rsq": lambda model: wm.quantize.rsq(model, text, bits=4, clip_search=False),
        "wanda": lambda model: wm.prune.wanda(model, text),
    }
    result: dict[str, Any] = {}
    for name, job in jobs.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        spent["shared"], start = 0.0, time.perf_counter()
        job(model)
        result[name] = {"shared": spent["shared"], "all": time.perf_counter() - start, "bits": walk.digest_of(model)}
    return result


def main() -> None:
    """Run one process and two ranks, and print the ratios."""
    options = parser.parse_args()
    if options.worker:
        with ranks.join() as ranked:
            result = work(options.hidden, options.samples, options.length)
            if ranked.first:
                print(json.dumps(result))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [__file__, "--worker", *(f"--{n}={getattr(options, n)}" for n in ("hidden", "samples", "length"))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one, two = (
        json.loads(subprocess.run([*start, *line], env=environment, check=True, capture_output=True, text=True).stdout)
        for start in ([sys.executable], launcher)
    )
    print(f"Llama of 4 blocks, hidden {options.hidden}; {options.samples} x {options.length} tokens in micro-batches of 8")
    for name in one:
        a, b = one[name], two[name]
        same = "the same bits" if a["bits"] == b["bits"] else "OTHER BITS"
        shared, whole = a["shared"] / b["shared"], a["all"] / b["all"]
        print(
            f"{name}: shared part {a['shared']:.1f} s -> {b['shared']:.1f} s ({shared:.2f} times as fast), "
            f"all {a['all']:.1f} s -> {b['all']:.1f} s ({whole:.2f}), {same}"
        )


if __name__ == "__main__":
    main()
