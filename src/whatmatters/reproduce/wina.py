"""WINA's claims at desk scale: best subsets, planted column norms, perplexity of small trained models against TEAL, and FLOPs by formula.

Chen, Zhao, Ko, Banbury, Zhuang, Liang, Cameron, Chen 2025, arXiv 2505.19427. Arms under one sparsity, through one code: channels at
random, TEAL (magnitude), WINA (norms everywhere), WINA as the official code gates (norms at k and gate), and the same behind the tensor
transform. Perplexity comes from masked dense products: what is judged here is the mask, never the speed, which `benchmarks/wina.py`
measures.
"""

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn import functional

from whatmatters.core.allocation import top_k
from whatmatters.core.capture import site_inputs
from whatmatters.core.data import Calibration, logits
from whatmatters.core.evaluate import evaluate, judging, paired_bootstrap
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress, track
from whatmatters.core.seeds import derived, generator
from whatmatters.core.sites import structure
from whatmatters.infer._common import column_norms, kept_channels
from whatmatters.infer.teal import teal
from whatmatters.infer.wina import wina
from whatmatters.reproduce._common import CONFIDENCE, Claim, Experiment, below, certain, digest, from_interval
from whatmatters.reproduce._desk import Arms, Measured, Scale, Sizes, Subject, check_seeds, compared, difference, pooled, subjects

SIZES: dict[Scale, dict[str, Sizes]] = {
    "smoke": {"embedded": Sizes(2, 24, 4, 1)},
    "desk": {"stories": Sizes(8, 256, 100, 1), "embedded": Sizes(8, 256, 40, 1), "public": Sizes(16, 512, 40, 1)},
    "gpu": {"stories": Sizes(20, 512, 350, 2), "embedded": Sizes(20, 512, 80, 4), "public": Sizes(20, 2048, 400, 4)},
}
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
ARMS = ("random", "TEAL", "WINA", "WINA, norms at k and gate", "TEAL, transform", "WINA, transform", "WINA as released, transform")
DENSE_PREFIX = 3
"""One percent of a window of 256, as in the official code; set before anything was measured."""
STEP: dict[Scale, float] = {"smoke": 1.0, "desk": 0.125, "gpu": 0.025}
"""Step of the greedy search in d^2; the official one needs thousands of passes through each block."""

DIFFERENCES = (
    "models of 0.26M and 5.8M parameters in place of 7 to 14 billion; perplexity and next-token accuracy of held-out documents in place "
    "of six benchmarks",
    "the first 3 positions of each sequence stay dense, in place of the first 1 % of each forward call",
    "the greedy search takes steps of 0.125 d^2 in place of 0.025, on two windows of 128 tokens in place of 20 samples",
    "an earlier run of the greedy search with steps of 1.0 d^2, which drop whole matrices, gave a perplexity of 20.5 for WINA on pylib-lm "
    "at one half, above the uniform split's 17.8",
    "errors of the greedy search are norms per token, in place of norms along the sequence",
    "the transform rotates the inputs of q, k, v and of gate, up; residual stream, embeddings and head keep their basis, norms their gains",
)


def run(
    *,
    model: str | os.PathLike[str] | None = None,
    scale: Scale = "desk",
    seeds: int = 3,
    output: Path = Path("evidence"),
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Run the experiment and write `output/wina.json`.

    Args:
        model: path or hub id of a further causal language model, for the tier "public".
        scale: "desk" for minutes on one core, "gpu" for the paper's sizes, "smoke" for seconds on an untrained model.
        seeds: calibration draws of thresholds and of the greedy search, at least 3.
        output: folder of the evidence.
        progress: told after each arm.
        scratch: folder to keep measured arms in, so that a run that was cut off goes on.

    Returns:
        The evidence.

    Raises:
        InputError: fewer than 3 seeds.
    """
    draws = check_seeds(seeds)
    this = sys.modules[__name__]
    found, notes = subjects(SIZES[scale], model=model, scale=scale)
    arms = Arms(scratch, digest("wina", this))
    with Experiment("wina", seeds=draws, differences=[*DIFFERENCES, *notes]) as experiment:
        exact(experiment, draws=20 if scale == "smoke" else 100)
        planted(experiment, draws=20 if scale == "smoke" else 200)
        for subject in found:
            gated(experiment, subject, draws, (0.5, 0.65) if scale == "smoke" else SPARSITIES, arms, STEP[scale], progress)
            by_site(experiment, subject)
        arithmetic(experiment)
        experiment.results["measured_arms"] = arms.account()
    experiment.write(output, this)
    return experiment.record(this)


# Exact


def linear(weight: Tensor) -> nn.Sequential:
    """A model of one linear."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


def gated_output(entry: Callable[..., Any], weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """W (m * x) of one linear under a handle."""
    model = linear(weight)
    with torch.no_grad(), entry(model, sparsity=sparsity, dense_prefix=0):
        return model(x)


def exact(experiment: Experiment, *, draws: int) -> None:
    """The best subset, special cases, and the transform in float64."""
    subsets = torch.zeros(math.comb(12, 6), 12, dtype=torch.float64)
    for row, kept in zip(subsets, itertools.combinations(range(12), 6), strict=True):
        row[list(kept)] = 1
    excess, formula, unequal, moved = 0.0, 0.0, 0, 0
    for seed in range(draws):
        draw = generator(derived(seed, "subset"))
        basis = torch.linalg.qr(torch.randn(20, 12, generator=draw, dtype=torch.float64)).Q
        weight = basis * torch.randn(12, generator=draw, dtype=torch.float64).exp()
        x = torch.randn(12, generator=draw, dtype=torch.float64)
        errors = ((subsets * x) @ weight.T - weight @ x).square().sum(1)
        own = (gated_output(wina, weight, x[None, None], 0.5)[0, 0] - weight @ x).square().sum()
        excess = max(excess, float(own / errors.min()) - 1)
        dropped = (x * weight.norm(dim=0)).square().sort().values[:6].sum()
        formula = max(formula, abs(float(own / dropped) - 1))
        alike = functional.normalize(weight + 0.3, dim=0)
        unequal += int(not torch.equal(gated_output(wina, alike, x[None, None], 0.5), gated_output(teal, alike, x[None, None], 0.5)))
        scale = 2.0 ** torch.randint(-5, 6, (12,), generator=draw)
        both = [gated_output(wina, w, v[None, None], 0.5) for w, v in ((weight, x), (weight / scale, x * scale))]
        moved += int(not torch.equal(*both))
    model, ids = tiny_llama().double(), torch.randint(64, (2, 16), generator=generator(0))
    shares = {site.name: 0.5 if site.name.endswith("k_proj") else 0.0 for site in structure(model).sites}
    with judging(model):
        dense = logits(model, ids)
        with wina(model, sparsity=0.0, transform=True):
            turned = float((logits(model, ids) - dense).abs().max())
        with wina(model, allocation=Plan("ratio", shares, {}, {}, "mine"), transform=True, dense_prefix=0):
            keys = float((logits(model, ids) - dense).abs().max())
        with wina(model.float(), sparsity=0.5, dense_prefix=3):
            whole, cache, pieces = logits(model, ids[:1]), None, []
            for position in range(16):
                step = model(ids[:1, position : position + 1], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                pieces.append(step.logits)
            apart = float((torch.cat(pieces, 1) - whole).abs().max() / whole.abs().max())
    experiment.claims += [
        certain(f"with orthogonal columns WINA's error is the least of all 924 subsets, {draws} draws: largest excess", "exact",
                excess < 1e-9, excess),
        certain("and its square is the sum of what was dropped, x^2 c^2: largest relative difference", "exact", formula < 1e-10, formula),
        certain(f"with equal norms WINA is TEAL: draws of {draws} that differ", "exact", unequal == 0, unequal),
        certain(f"scaling a channel up and its weights down changes nothing: draws of {draws} that differ", "exact", moved == 0, moved),
        certain("transformed logits are the logits in float64: largest difference below 1e-8", "exact", turned < 1e-8, turned),
        certain("keys of half the heads lose nothing at half the channels, once transformed: largest difference below 1e-8", "exact",
                keys < 1e-8, keys),
        certain("decoding token by token, skipping for real, gives the masked logits of the whole: relative difference below 1e-5", "exact",
                apart < 1e-5, apart),
    ]  # fmt: skip


def tiny_llama() -> nn.Module:
    """An untrained Llama of two blocks with keys for two of four heads, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


# Planted: columns whose norms differ


def planted(experiment: Experiment, *, draws: int) -> None:
    """Gaussian weights, not orthogonal, with log-normal column norms: relative output error of the three masks."""
    rows = []
    for sparsity in (0.25, 0.5, 0.65):
        errors = np.array([planted_draw(seed, sparsity) for seed in range(draws)])
        rows.append({"sparsity": sparsity, **dict(zip(("WINA", "TEAL", "random"), errors.mean(0).tolist(), strict=True))})
        at = f"at {sparsity:.0%} of the channels skipped"
        experiment.claims += [
            below(f"logarithm of WINA's error over TEAL's {at}", "planted", np.log(errors[:, 0] / errors[:, 1]).tolist(), 0.0),
            below(f"logarithm of TEAL's error over that of random channels {at}", "planted", np.log(errors[:, 1] / errors[:, 2]).tolist(),
                  0.0),
        ]  # fmt: skip
    experiment.results["planted"] = {"draws": draws, "rows": rows}


def planted_draw(seed: int, sparsity: float) -> tuple[float, float, float]:
    """Relative errors of WINA, TEAL and random channels on one weight and 16 inputs."""
    draw = generator(derived(seed, "planted"))
    weight = torch.randn(48, 64, generator=draw) * torch.randn(64, generator=draw).mul(0.7).exp()
    x = torch.randn(1, 16, 64, generator=draw)
    whole, keep = x @ weight.T, kept_channels(64, sparsity)
    chance = top_k(torch.rand(x.shape, generator=draw), keep)
    outputs = (gated_output(wina, weight, x, sparsity), gated_output(teal, weight, x, sparsity), torch.where(chance, x, 0) @ weight.T)
    a, b, c = (float((output - whole).norm() / whole.norm()) for output in outputs)
    return a, b, c


# Desk: what a trained model loses


@contextlib.contextmanager
def at_random(model: nn.Module, sparsity: float, seed: int) -> Any:
    """Channels skipped at random at every linear, as many as the other arms skip, the same positions dense."""
    draw = generator(derived(seed, "random channels"))

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        mask = top_k(torch.rand(x.shape, generator=draw), kept_channels(x.shape[-1], sparsity)).to(x.device)
        mask[:, :DENSE_PREFIX] = True
        return (torch.where(mask, x, 0), *args[1:])

    handles = [model.get_submodule(site.name).register_forward_pre_hook(hook) for site in structure(model).sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def arm(name: str, model: nn.Module, sparsity: float, calibration: Calibration | None = None, step: float = 0.0, seed: int = 0) -> Any:
    """The context in which a model is the arm of that name."""
    if name == "random":
        return at_random(model, sparsity, seed)
    entry = teal if name.startswith("TEAL") else wina
    more: dict[str, Any] = {"transform": name.endswith("transform"), "sparsity": sparsity, "dense_prefix": DENSE_PREFIX}
    if "released" in name or "k and gate" in name:
        more["norms"] = "orthogonal_only"
    if "threshold" in name:
        more["mask_by"] = "threshold"
    if "greedy" in name:
        more |= {"allocation": "greedy", "step": step}
    return entry(model, calibration, **more)


def judged(model: nn.Module, text: Calibration, context: Any, **facts: Any) -> dict[str, Any]:
    """One measurement in the form that `Arms` keeps."""
    with context:
        found = evaluate(model, text)
    return {"nats": found.nats.tolist(), "counts": found.counts.tolist(), "seconds": 0.0, "facts": {"hits": found.hits.tolist(), **facts}}


def gated(
    experiment: Experiment, subject: Subject, draws: list[int], sparsities: Sequence[float], arms: Arms, step: float,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Every arm at every sparsity on test text; thresholds and greedy splits on calibration draws at one half."""
    text, model = subject.windows("test"), subject.copy()
    dense = arms.remember([subject.name, "dense", text.digest], lambda: [judged(model, text, contextlib.nullcontext())])[0]
    measured: dict[tuple[str, float], list[Measured]] = {}
    jobs = [(name, sparsity) for sparsity in sparsities for name in ARMS]
    for name, sparsity in track(jobs, subject.name, len(jobs), progress):
        repeats = draws if name == "random" else draws[:1]  # the other masks are decided by nothing but the model and the text
        measured[name, sparsity] = [
            arms.remember([subject.name, name, sparsity, seed, text.digest],
                          lambda: [judged(model, text, arm(name, model, sparsity, seed=seed))])[0]
            for seed in repeats
        ]  # fmt: skip
    drawn = ("TEAL, threshold", "WINA, threshold", "TEAL, greedy", "WINA, greedy")
    for name, seed in track([(n, s) for n in drawn for s in draws], f"{subject.name}, calibrated", len(drawn) * len(draws), progress):
        calibration = subject.calibration(seed)
        if "greedy" in name:
            valid = None if calibration.valid is None else calibration.valid[:2, :128]
            calibration = Calibration.from_tensors(calibration.inputs[:2, :128], valid)
        measured.setdefault((name, 0.5), []).append(
            arms.remember([subject.name, name, seed, step, text.digest],
                          lambda: [judged(model, text, arm(name, model, 0.5, calibration, step))])[0]
        )  # fmt: skip
    rows = []
    for (name, sparsity), found in measured.items():
        mean = pooled(found)
        effect, low, high = difference(dense, mean)
        rows.append({
            "arm": name, "sparsity": sparsity, "perplexity": mean.perplexity, "change_percent": 100 * math.expm1(min(effect, 500.0)),
            "interval_percent": [100 * math.expm1(min(low, 500.0)), 100 * math.expm1(min(high, 500.0))],
            "accuracy": float(np.mean([hits(one).sum() for one in found]) / mean.counts.sum()),
            "by_draw": [one.perplexity for one in found],
        })  # fmt: skip
    experiment.results[subject.name] = {
        "dense_perplexity": dense.perplexity, "dense_accuracy": float(hits(dense).sum() / dense.counts.sum()),
        "test_documents": len(dense.counts), "test_tokens": int(dense.counts.sum()), "greedy_step": step, "arms": rows,
        **subject.about,
    }  # fmt: skip
    experiment.claims += desk_claims(subject, measured, sparsities)


def hits(found: Measured) -> Float64[np.ndarray, " documents"]:
    """Right first choices by document."""
    return np.array(found.facts["hits"], dtype=np.float64)


def desk_claims(subject: Subject, of: Mapping[tuple[str, float], list[Measured]], sparsities: Sequence[float]) -> list[Claim]:
    """What the paper says, each as a difference of nats a token over documents, below 0."""
    claims = []

    def lower(words: str, base: str, own: str, sparsity: float, bound: float = 0.0) -> None:
        effect, low, high = difference(pooled(of[base, sparsity]), pooled(of[own, sparsity]))
        claims.append(from_interval(f"{subject.name} at {sparsity:.0%}: {words}", subject.tier, effect, (low, high), bound))

    for sparsity in sparsities:
        lower("perplexity of WINA is below TEAL's", "TEAL", "WINA", sparsity)
        lower("perplexity of WINA with the transform is below TEAL's with the transform", "TEAL, transform", "WINA, transform", sparsity)
        lower("perplexity of WINA as released (transform, norms at k and gate) is below TEAL's", "TEAL", "WINA as released, transform",
              sparsity)  # fmt: skip
        if sparsity >= 0.5:
            lower("the transform lowers WINA's perplexity", "WINA", "WINA, transform", sparsity)
            lower("perplexity of random channels is more than twice WINA's", "random", "WINA", sparsity, -math.log(2))
            a, b = of["TEAL", sparsity][0], of["WINA", sparsity][0]
            effect, low, high = paired_bootstrap(100 * (hits(a) - hits(b)), a.counts.astype(np.float64), confidence=CONFIDENCE)
            words = "next-token accuracy of WINA is above TEAL's (points, TEAL's minus WINA's)"
            claims.append(from_interval(f"{subject.name} at {sparsity:.0%}: {words}", subject.tier, effect, (low, high), 0.0))
    for kind in ("threshold", "greedy"):
        words = f"{subject.name} at 50%: perplexity of WINA is below TEAL's with {kind}"
        claims += compared(words, subject.tier, of[f"TEAL, {kind}", 0.5], of[f"WINA, {kind}", 0.5])
    greedy = of["WINA, greedy", 0.5]
    words = f"{subject.name} at 50%: the greedy split lowers WINA's perplexity"
    claims += compared(words, subject.tier, of["WINA", 0.5] * len(greedy), greedy)
    return claims


def by_site(experiment: Experiment, subject: Subject) -> None:
    """Relative output error of each linear on the dense model's inputs: where column norms vary, how often is WINA's below TEAL's?"""
    model, text = subject.copy(), subject.windows("test")
    ids = text.inputs[:8]
    found = structure(model)
    sums = {(site.name, s): torch.zeros(3, dtype=torch.float64) for site in found.sites for s in (0.5, 0.65)}

    def note(name: str, x: Tensor, rows: Tensor | None) -> None:
        weight = found.site(name).view(model)
        x = x.reshape(-1, x.shape[-1])
        whole = functional.linear(x, weight)
        for sparsity in (0.5, 0.65):
            keep = kept_channels(x.shape[-1], sparsity)
            errors = [(functional.linear(torch.where(top_k(scores, keep), x, 0), weight) - whole).square().sum()
                      for scores in ((x * column_norms(weight)).abs(), x.abs())]  # fmt: skip
            sums[name, sparsity] += torch.stack([*errors, whole.square().sum()]).double().cpu()

    with judging(model), site_inputs(model, found.sites, note):
        logits(model, ids)
    spread = {site.name: float(column_norms(site.view(model)).std() / column_norms(site.view(model)).mean()) for site in found.sites}
    experiment.results[subject.name]["by_site"] = [
        {
            "site": name,
            "sparsity": sparsity,
            "norm_variation": spread[name],
            "WINA": math.sqrt(float(a / c)),
            "TEAL": math.sqrt(float(b / c)),
        }
        for (name, sparsity), (a, b, c) in sums.items()
    ]  # fmt: skip
    for sparsity in (0.5, 0.65):
        varied = [total for (name, s), total in sums.items() if s == sparsity and spread[name] > 0.05]
        wins = sum(bool(total[0] < total[1]) for total in varied) / max(len(varied), 1)
        experiment.claims.append(certain(
            f"{subject.name} at {sparsity:.0%}: in at least 80 % of the {len(varied)} linears whose norms vary by more than 5 % WINA's "
            "output error is below TEAL's: share", subject.tier, wins >= 0.8, wins,
        ))  # fmt: skip


# Arithmetic: what it saves, by formula

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": {"d": 3584, "kv": 512, "ff": 18944, "layers": 28, "vocabulary": 152064, "fused": False},
    "LLaMA-2-7B": {"d": 4096, "kv": 4096, "ff": 11008, "layers": 32, "vocabulary": 32000, "fused": False},
    "LLaMA-3-8B": {"d": 4096, "kv": 1024, "ff": 14336, "layers": 32, "vocabulary": 128256, "fused": False},
    "Phi-4-14B": {"d": 5120, "kv": 1280, "ff": 17920, "layers": 40, "vocabulary": 100352, "fused": True},
}
WEIGHTS = {
    "Qwen2.5-7B": (1, 1 / 7, 1 / 7, 1, 5.2857, 5.2857, 5.2857), "LLaMA-2-7B": (1, 1, 1, 1, 2.6875, 2.6875, 2.6875),
    "LLaMA-3-8B": (1, 0.25, 0.25, 1, 3.5, 3.5, 3.5), "Phi-4-14B": (1.5, 1, 7, 3.5),
}  # fmt: skip
"""Cost of each projection in the greedy search relative to d^2, as the official code has them."""


def arithmetic(experiment: Experiment) -> None:
    """Costs of the projections, FLOPs saved at 65 % with the output head counted, and what the transform adds."""
    rows = {}
    for name, shape in SHAPES.items():
        d, kv, ff = shape["d"], shape["kv"], shape["ff"]
        costs = [(d + 2 * kv) * d, d * d, 2 * ff * d, ff * d] if shape["fused"] else [d * d, kv * d, kv * d, d * d, ff * d, ff * d, ff * d]
        block, head = sum(costs) * shape["layers"], d * shape["vocabulary"]
        rows[name] = {
            "costs": [cost / d**2 for cost in costs], "reduction_at_65_percent": 0.65 * block / (block + head),
            "linears_gflop": 2 * (block + head) / 1e9, "transform_share_of_a_block": 2 * d * d / sum(costs),
            "reduction_with_transform": (0.65 * block - 2 * d * d * shape["layers"]) / (block + head),
        }  # fmt: skip
    experiment.results["arithmetic"] = rows
    wrong = sum(round(a, 4) != round(b, 4) for name, row in rows.items() for a, b in zip(row["costs"], WEIGHTS[name], strict=True))
    reductions = [row["reduction_at_65_percent"] for row in rows.values()]
    shares = [row["transform_share_of_a_block"] for row in rows.values()]
    experiment.claims += [
        certain("costs of the projections in the greedy search, from the shapes, are the official ones to four digits: how many differ",
                "arithmetic", wrong == 0, wrong),
        certain("multiplications of the linears, head included, fall by 60 to 64 % at 65 %, as printed: least", "arithmetic",
                min(reductions) > 0.595, min(reductions)),
        certain("the same: most", "arithmetic", max(reductions) < 0.645, max(reductions)),
        certain("the transform's 2 d^2 a block cost less than a quarter of the block, which the printed figures leave out: most",
                "arithmetic", max(shares) < 0.25, max(shares)),
    ]  # fmt: skip
