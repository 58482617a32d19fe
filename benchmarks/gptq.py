"""Speed of GPTQ against llm-compressor's: same model, data and settings, processes of two environments alternating in one run.

    python benchmarks/gptq.py [--scale small|block|both] [--rounds 3] [--peer PYTHON]

Timed is calibration and solving, not loading or saving. `small` is a random Llama of over 100M parameters; `block` is one block of the
shape of Llama 3 8B (4096 / 14336). Errors are compared on the dense model's own inputs, by one formula for both. The peer's environment
is made in benchmarks/.peer on the first run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = {
    "small": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
        "vocab_size": 16384, "samples": 32, "length": 512,
    },
    "block": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 512, "samples": 16, "length": 512,
    },
}  # fmt: skip
BITS, GROUP, DAMPING, BATCH = 4, 128, 0.01, 4


def make_model(shape: dict, folder: Path) -> None:
    """A random Llama with correlated activations (a low-rank embedding), its tokenizer-free folder, and random token ids."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in shape.items() if k not in ("samples", "length")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=2048, tie_word_embeddings=True))
    with torch.no_grad():
        rank = shape["hidden_size"] // 8
        table = torch.randn(shape["vocab_size"], rank) @ torch.randn(rank, shape["hidden_size"]) / rank**0.5
        model.model.embed_tokens.weight.copy_(table + 0.1 * torch.randn_like(table))
    model.save_pretrained(folder / "model")
    print(f"model of {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", flush=True)
    ids = torch.randint(0, shape["vocab_size"], (shape["samples"], shape["length"]))
    save_file({"ids": ids}, folder / "ids.safetensors")


def timed(owner: object, name: str, spent: dict[str, float], key: str) -> None:
    """Replace a function by one that adds its wall time to `spent[key]`."""
    function = getattr(owner, name)

    def wrapped(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - start

    setattr(owner, name, wrapped)


def run_ours(folder: Path) -> dict[str, float]:
    """Our GPTQ on the saved model; the rounded weights go to ours.safetensors."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    import whatmatters.quantize._common as common
    import whatmatters.score._common as score_common
    from whatmatters.core.data import Calibration
    from whatmatters.core.sites import structure
    from whatmatters.quantize.gptq import gptq

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    calibration = Calibration.from_tensors(load_file(folder / "ids.safetensors")["ids"], batch=BATCH)
    spent: dict[str, float] = {}
    timed(score_common, "accumulate_gram", spent, "hessian")
    timed(common, "feedback_factor", spent, "factor")
    timed(common, "round_with_feedback", spent, "solve")
    start = time.perf_counter()
    gptq(model, calibration, bits=BITS, group_size=GROUP, clip_search=False, damping=DAMPING, true_sequential=False)
    spent["total"] = time.perf_counter() - start
    save_file({s.name: s.view(model).clone() for s in structure(model).sites}, folder / "ours.safetensors")
    return spent


def run_peer(folder: Path) -> dict[str, float]:
    """llm-compressor's GPTQ on the same."""
    import llmcompressor.modifiers.gptq.base as base
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.pipelines.sequential import SequentialPipeline
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = load_file(folder / "ids.safetensors")["ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a", unk_token="a")
    spent: dict[str, float] = {}
    for name, key in (("accumulate_hessian", "hessian"), ("quantize_weight", "solve")):
        if hasattr(base, name):
            timed(base, name, spent, key)
    call = SequentialPipeline.__call__

    def pipeline(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent["total"] = time.perf_counter() - start

    SequentialPipeline.__call__ = staticmethod(pipeline)
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    recipe = GPTQModifier(
        ignore=["lm_head"], actorder=None, dampening_frac=DAMPING, config_groups={"g": {"targets": ["Linear"], "weights": weights}}
    )
    oneshot(
        model=model, processor=tokenizer, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        batch_size=BATCH, shuffle_calibration_samples=False, pipeline="sequential",
    )  # fmt: skip
    layers = {
        n: m.weight.detach().clone().contiguous() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    }
    save_file(layers, folder / "peer.safetensors")
    return spent


def errors(folder: Path) -> dict[str, float]:
    """tr(D H D') / tr(W H W') summed over sites, H from the dense model's inputs, in float64, for both results."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from whatmatters.core.data import Calibration
    from whatmatters.core.sites import structure
    from whatmatters.core.walk import Block, walk
    from whatmatters.score._common import input_statistics

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    calibration = Calibration.from_tensors(load_file(folder / "ids.safetensors")["ids"], batch=BATCH)
    results = {who: load_file(folder / f"{who}.safetensors") for who in ("ours", "peer")}
    lost = dict.fromkeys(results, 0.0)

    def visit(block: Block) -> dict:
        sites = {s.name: s for s in block.sites}
        for statistic in input_statistics(block, block.sites):
            hessian = statistic.total.float()
            for name in statistic.sites:
                weight = block.weight(sites[name])
                whole = float(((weight @ hessian) * weight).sum())
                for who, tensors in results.items():
                    delta = tensors[name].to(weight.dtype) - weight
                    lost[who] += float(((delta @ hessian) * delta).sum()) / whole
        return {}

    with torch.no_grad():
        walk(model, calibration, visit, structure=structure(model), settings={}, commit=False)
    return lost


def product_bound(shape: dict) -> dict[str, float]:
    """Seconds that the matrix products of calibration and solving alone take at this machine's float32 rate."""
    import torch

    a = torch.randn(2048, 2048)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    rate = 5 * 2 * 2048**3 / (time.perf_counter() - start)
    d, f, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = d * shape["num_key_value_heads"] // shape["num_attention_heads"]
    tokens = shape["samples"] * shape["length"]
    weights = d * d * 2 + 2 * d * kv + 3 * d * f
    flops = {
        "forward": 2 * 2 * tokens * weights,
        "hessian": tokens * (3 * d * d + f * f),
        "solve": (3 * d**3 + f**3) / 3 + (d + 2 * kv + d + 2 * f) * d * d + d * f * f,
    }
    return {"rate_gflops": rate / 1e9, **{key: layers * value / rate for key, value in flops.items()}}


def peer_python() -> Path:
    """The peer's interpreter; its environment is made if it is not there."""
    folder = HERE / ".peer"
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", "-r", str(HERE / "requirements-llmcompressor.txt")], check=True)
    return folder / "bin" / "python"


def worker(python: Path | str, who: str, folder: Path) -> dict[str, float]:
    """Run one side in a process of its own and read the JSON on its last line."""
    done = subprocess.run([str(python), __file__, "--worker", who, "--folder", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument("--output", type=Path, default=HERE / "results-gptq.json")
    parser.add_argument("--worker", choices=["ours", "peer", "make", "errors"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        jobs = {"ours": run_ours, "peer": run_peer, "errors": errors}
        print("\n" + json.dumps(jobs[options.worker](options.folder)))
        return
    peer = options.peer or peer_python()
    results = {}
    for scale in SHAPES if options.scale == "both" else [options.scale]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(SHAPES[scale], folder)
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
            for _ in range(options.rounds):
                for who, python in (("ours", sys.executable), ("peer", peer)):
                    runs[who].append(worker(python, who, folder))
                    print(scale, who, {k: round(v, 2) for k, v in runs[who][-1].items()}, flush=True)
            ratios = [a["total"] / b["total"] for a, b in zip(runs["ours"], runs["peer"], strict=True)]
            lost = worker(sys.executable, "errors", folder)
            results[scale] = {
                "shape": SHAPES[scale], "runs": runs, "time_ratio": statistics.median(ratios), "time_ratios": ratios,
                "error": lost, "error_ratio": lost["ours"] / lost["peer"], "bound_seconds": product_bound(SHAPES[scale]),
            }  # fmt: skip
            print(f"{scale}: time ratio {results[scale]['time_ratio']:.3f}, error ratio {results[scale]['error_ratio']:.4f}", flush=True)
    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
