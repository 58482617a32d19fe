"""Speed and memory of sparse activation on this CPU: one product, decoding, and what masks do not save.

    python benchmarks/wina.py [--part gemv|decode|memory|all] [--threads 1 2] [--sparsity 0.65] [--rounds 5]

gemv: a float32 linear (in 4096, out 11008), dense and sparse calls alternating over four matrices of each, so that none is found in a
cache; norms, top-k and gather are inside the timed call. The bound is a streaming read of as many bytes as the kept weights have.
decode: greedy decoding with a key-value cache of a random Llama of over 100M parameters; dense and sparse copies take turns by token.
memory: resident memory before and after the weights of that model are laid out anew. Each part runs in a process of its own. Building
the compiled kernel takes seconds once a process, when the handle is made, and is not timed. Prefill goes through masked dense products;
its time is printed too, since it is no speed-up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LLAMA = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
    "vocab_size": 16384, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
IN, OUT, MATRICES = 4096, 11008, 4


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def streaming() -> Callable[[Any], Any]:
    """Adds up the rows of a matrix that lie one after the other, by all of numba's threads: what reading its bytes once costs at least."""
    import numba
    import numpy as np

    @numba.njit(parallel=True, fastmath=True)
    def read(rows):  # type: ignore[no-untyped-def]
        count, width = rows.shape
        parts = numba.get_num_threads()
        total = np.zeros(parts)
        for part in numba.prange(parts):
            sums = np.zeros(width, np.float32)
            for row in range(part * count // parts, (part + 1) * count // parts - 3, 4):
                for o in range(width):
                    sums[o] += rows[row, o] + rows[row + 1, o] + rows[row + 2, o] + rows[row + 3, o]
            total[part] = sums.sum()
        return total

    return read


def gemv(threads: int, sparsity: float, rounds: int) -> dict[str, Any]:
    import numba
    import torch
    from torch import nn

    import whatmatters as wm

    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)

    def linear() -> nn.Sequential:
        layer = nn.Linear(IN, OUT, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_(generator=draw).mul_(0.02)
        return nn.Sequential(layer)

    dense = [linear() for _ in range(MATRICES)]
    sparse = [linear() for _ in range(MATRICES)]
    for a, b in zip(dense, sparse, strict=True):
        b.load_state_dict(a.state_dict())
    handles = [wm.infer.wina(model, sparsity=sparsity, dense_prefix=0) for model in sparse]
    x = [torch.randn(1, 1, IN, generator=draw) for _ in range(16)]
    times: dict[str, list[float]] = {"dense": [], "sparse": [], "bag": [], "stream": []}
    read = streaming()
    kept = handles[0].report.rows[0]["kept"]
    size = kept * OUT // 2048
    rows = [model[0].weight.detach().T.numpy().reshape(-1, 2048)[:size] for model in sparse]
    from whatmatters.kernels.sparse_gemv import sparse_gemv

    norms = [torch.linalg.vector_norm(model[0].weight.detach(), dim=0) for model in sparse]
    with torch.inference_mode():
        read(rows[0])
        for turn in range(rounds + 1):
            for i in range(MATRICES):
                vector = x[(turn * MATRICES + i) % len(x)]
                took = {
                    "dense": seconds(lambda: dense[i](vector)),
                    "sparse": seconds(lambda: sparse[i](vector)),
                    "bag": seconds(lambda: sparse_gemv(sparse[i][0].weight, vector.view(-1), norms[i], keep=kept, face="bag")),
                    "stream": seconds(lambda: read(rows[(i + 2) % MATRICES])),
                }
                if turn:
                    for name, value in took.items():
                        times[name].append(value)
    middle = {name: statistics.median(values) for name, values in times.items()}
    kept_bytes = kept * OUT * 4
    return {
        "threads": threads, "sparsity": sparsity, "calls": len(times["dense"]), "face": handles[0].report.rows[0]["face"],
        "milliseconds": {name: 1e3 * value for name, value in middle.items()},
        "speedup": middle["dense"] / middle["sparse"], "speedup_without_numba": middle["dense"] / middle["bag"],
        "share_of_the_bandwidth_bound": middle["stream"] / middle["sparse"],
        "dense_gb_per_s": IN * OUT * 4 / middle["dense"] / 1e9, "sparse_gb_per_s": kept_bytes / middle["sparse"] / 1e9,
        "stream_gb_per_s": kept_bytes / middle["stream"] / 1e9,
    }  # fmt: skip


def llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def decode(threads: int, sparsity: float, rounds: int) -> dict[str, Any]:
    import torch

    import whatmatters as wm

    torch.set_num_threads(threads)
    models = {"dense": llama(), "sparse": llama()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with wm.infer.wina(models["sparse"], sparsity=sparsity) as handle, torch.inference_mode():
        prompt = torch.randint(0, LLAMA["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(1))
        prefill: dict[str, list[float]] = {name: [] for name in models}
        state: dict[str, Any] = {}
        for _ in range(3):
            for name, model in models.items():
                prefill[name].append(seconds(lambda: state.__setitem__(name, model(prompt, use_cache=True))))
        caches = {name: output.past_key_values for name, output in state.items()}
        tokens = {name: output.logits[:, -1:].argmax(-1) for name, output in state.items()}
        for step in range(12 * rounds):
            for name, model in models.items():
                start = time.perf_counter()
                output = model(tokens[name], past_key_values=caches[name], use_cache=True)
                tokens[name] = output.logits[:, -1:].argmax(-1)
                if step >= 4:
                    times[name].append(time.perf_counter() - start)
        skipping = min(row["tokens_skipping"] for row in handle.counts())
        costs = handle.costs()
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "threads": threads, "sparsity": sparsity, "parameters": sum(p.numel() for p in models["dense"].parameters()), "config": LLAMA,
        "tokens": len(times["dense"]), "tokens_that_skipped_at_every_site": skipping,
        "milliseconds_a_token": {name: 1e3 * value for name, value in middle.items()}, "speedup": middle["dense"] / middle["sparse"],
        "prefill_time_to_dense": statistics.median(prefill["sparse"]) / statistics.median(prefill["dense"]),
        "reduction_of_macs_in_blocks": costs["reduction"], "reduction_of_bytes_in_blocks": costs["bytes_reduction"],
    }  # fmt: skip


def memory(threads: int, sparsity: float, rounds: int) -> dict[str, Any]:
    """Resident memory, with everything that is loaded once (numba, the compiled kernel) loaded before the first reading."""
    import psutil
    import torch

    import whatmatters as wm
    from whatmatters.core.evaluate import PeakMemory
    from whatmatters.kernels.sparse_gemv import warm_up

    torch.set_num_threads(threads)
    model = llama()
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        model(token)
        warm_up()
        before = psutil.Process().memory_info().rss
        with PeakMemory() as peak:
            handle = wm.infer.wina(model, sparsity=sparsity, dense_prefix=0)
        model(token)
        after = psutil.Process().memory_info().rss
        handle.undo()
        undone = psutil.Process().memory_info().rss
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "weights_mb": weights / 1e6, "rss_before_mb": before / 1e6, "rss_sparse_mb": after / 1e6, "rss_undone_mb": undone / 1e6,
        "growth": after / before - 1, "growth_to_weights": (after - before) / weights, "peak_above_mb": peak.bytes / 1e6,
        "seconds": handle.report.seconds,
    }  # fmt: skip


PARTS = {"gemv": gemv, "decode": decode, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsity", type=float, default=0.65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results-wina.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print("\n" + json.dumps(PARTS[options.part](options.threads[0], options.sparsity, options.rounds)))
        return
    results: dict[str, list[Any]] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for part in PARTS if options.part == "all" else [options.part]:
        results[part] = []
        for threads in options.threads if part != "memory" else options.threads[:1]:
            command = [sys.executable, __file__, "--worker", "--part", part, "--threads", str(threads),
                       "--sparsity", str(options.sparsity), "--rounds", str(options.rounds)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{part} failed:\n{done.stderr[-3000:]}")
            results[part].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(part, json.dumps(results[part][-1], indent=1), flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
