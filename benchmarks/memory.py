"""Peak memory of GPTQ above the loaded model, against its formula, for 12 and 24 blocks with the block inputs on disk.

    python benchmarks/memory.py

The bound: 2 blocks + inputs and outputs of one block (nothing when they are on disk) + 4 * max(inputs of a site)^2 * 8 bytes of the
float64 statistics + activations of one micro-batch + 64 MB.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HIDDEN, INTERMEDIATE, SAMPLES, LENGTH, BATCH = 768, 2048, 32, 256, 4


def resident(what: str) -> int:
    """Bytes that Linux tells of this process: "VmRSS" now, "VmHWM" at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def measure(blocks: int, spilled: bool) -> dict[str, float]:
    """Peak resident memory above the loaded model, in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from whatmatters.core.data import Calibration
    from whatmatters.core.sites import structure
    from whatmatters.core.walk import steady_memory
    from whatmatters.quantize import _common
    from whatmatters.quantize.gptq import gptq

    steady_memory()  # as the command line does

    small = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    gptq(LlamaForCausalLM(small).eval(), Calibration.from_tensors(torch.zeros(2, 16, dtype=torch.long)), bits=4)  # loads what it imports
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1024, (SAMPLES, LENGTH))
    calibration = Calibration.from_tensors(ids, batch=BATCH)
    with torch.no_grad():
        model(ids[:1, :8])  # what the first call of each kernel allocates is not the walk's
    walk = _common.walk

    def spilling(*args: object, **options: object) -> object:
        return walk(*args, **{**options, "spill_bytes": 0 if spilled else 1 << 40})

    _common.walk = spilling
    # The kernel's own high-water mark, reset here: sampling would miss short peaks.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    gptq(model, calibration, bits=4, group_size=128)
    peak = resident("VmHWM") - before
    block = sum(p.numel() for p in model.get_submodule(structure(model).blocks[0]).parameters()) * 4
    held = 0 if spilled else 2 * SAMPLES * LENGTH * HIDDEN * 4
    tokens = BATCH * LENGTH
    activations = tokens * (6 * HIDDEN + 4 * INTERMEDIATE) * 4 + BATCH * 12 * LENGTH * LENGTH * 4
    bound = 2 * block + held + 4 * INTERMEDIATE**2 * 8 + activations + (64 << 20)
    return {"blocks": blocks, "spilled": spilled, "peak": peak, "bound": bound, "block": block}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "results-memory.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--spilled", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.blocks:
        print(json.dumps(measure(options.blocks, bool(options.spilled))))
        return
    rows = []
    for _ in range(options.rounds):
        for blocks, spilled in ((12, False), (12, True), (24, True)):
            command = [sys.executable, __file__, "--blocks", str(blocks), "--spilled", str(int(spilled))]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            rows.append(row)
            where = "on disk" if spilled else "in memory"
            print(f"{blocks} blocks, inputs {where}: {row['peak'] / 2**20:.0f} MB of {row['bound'] / 2**20:.0f} MB allowed", flush=True)
    median = {n: statistics.median(row["peak"] for row in rows if row["blocks"] == n and row["spilled"]) for n in (12, 24)}
    growth = median[24] / median[12] - 1
    print(f"24 blocks take {100 * growth:+.1f} % against 12, medians of {options.rounds}")
    options.output.write_text(json.dumps({"rows": rows, "growth": growth}, indent=1))


if __name__ == "__main__":
    main()
