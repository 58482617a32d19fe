"""RSQ's claims at desk scale: identities, planted important tokens, small trained models at 3 and 2 bits, and its cost by formula.

Sung, Yadav, Li, Yoon, Bansal 2025, arXiv 2503.01820. Arms under one budget and with one care: round-to-nearest, GPTQ, rotation + GPTQ (the
paper's QuaRot), RSQ, RSQ without rotation, and RSQ with its own token weights shuffled within each sequence (the control: the same
histogram, but the wrong tokens).
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from whatmatters.core.data import Calibration, logits
from whatmatters.core.evaluate import judging
from whatmatters.core.formats import stored_bits
from whatmatters.core.grids import GridSettings, fit_grid
from whatmatters.core.progress import Progress, track
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import derived, generator
from whatmatters.quantize._common import round_with_hessian
from whatmatters.quantize._rotation import rotate
from whatmatters.quantize.gptq import gptq
from whatmatters.quantize.rsq import rsq
from whatmatters.quantize.rtn import rtn
from whatmatters.reproduce._common import Claim, Experiment, below, certain, digest
from whatmatters.reproduce._desk import (
    Arms,
    Measured,
    Scale,
    Sizes,
    Subject,
    change,
    check_seeds,
    compared,
    difference,
    pooled,
    subjects,
)
from whatmatters.score.tokens import TokenContext, attention_concentration, normalize_importance, score_tokens

SIZES: dict[Scale, dict[str, Sizes]] = {
    "smoke": {"embedded": Sizes(4, 32, 6, 1)},
    "desk": {"stories": Sizes(64, 256, 150, 1, repeats=3), "embedded": Sizes(24, 256, 48, 1, repeats=3), "public": Sizes(64, 512, 60, 2)},
    "gpu": {"stories": Sizes(256, 512, 350, 2, repeats=4), "embedded": Sizes(256, 512, 80, 4), "public": Sizes(256, 2048, 400, 4)},
}
GROUPS = {"stories260k": -1, "pylib-lm": 128, "untrained": -1}
"""Inputs that share a scale, by model; 128 for others. The paper's is -1, which the 172 inputs of a stories260k layer need anyway."""

R_MIN = 0.005
"""Weight of the least important token: the paper's released scripts. Never tuned here; `VARIANTS` are measured on validation text only."""
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"r_min": r_min} for r_min in (0.1, 0.05, 0.02, 0.01, 0.005)), {"power": 2}, {"position_norm": "linear"}, {"position_norm": "sqrt"},
    {"expand_factor": 4}, {"importance_settings": {"quantile": 0.95}},
)  # fmt: skip
"""Settings of RSQ that the paper considers; the last r_min is the one that claims are about."""
MARGIN = 0.01
"""How much RSQ may lose to rotation + GPTQ before the sheet's claim is refuted."""

DIFFERENCES = (
    "models of 0.26M and 5.8M parameters in place of 7 to 12 billion; the authors expect gains to grow with the length of the context",
    "6,000 to 16,000 calibration tokens in windows of 256, in place of 1,000,000 in windows of 2,048 to 4,096; no dataset expansion",
    "text of the model's own kind in place of WikiText-2; perplexity of held-out documents in place of downstream tasks",
    "only rotations that fold into the weights: the online one of the down projection's input is left out, in both rotated arms",
    "one scale per output channel as in the paper for stories260k, groups of 128 for pylib-lm",
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
    """Run the experiment and write `output/rsq.json`.

    Args:
        model: path or hub id of a further causal language model, for the tier "public".
        scale: "desk" for minutes on two cores, "gpu" for the paper's sizes, "smoke" for seconds on an untrained model.
        seeds: calibration draws, at least 3.
        output: folder of the evidence.
        progress: told after each arm.
        scratch: folder to keep measured arms in, so that a run that was cut off goes on.

    Returns:
        The evidence.

    Raises:
        InputError: fewer than 3 seeds.
        ModelError: the model is not one that RSQ's rotation leaves as it is.
    """
    draws = check_seeds(seeds)
    this = sys.modules[__name__]
    found, notes = subjects(SIZES[scale], model=model, scale=scale)
    arms = Arms(scratch, digest("rsq", this))
    with Experiment("rsq", seeds=draws, differences=[*DIFFERENCES, *notes]) as experiment:
        exact(experiment)
        planted(experiment, draws=6 if scale == "smoke" else 60)
        for subject in found:
            widths = (3,) if scale == "smoke" else (3, 2)
            quantized(experiment, subject, list(range(seeds * subject.sizes.repeats)), widths, arms, progress)
            varied(experiment, subject, draws, widths, VARIANTS[4:6] if scale == "smoke" else VARIANTS, arms, progress)
        arithmetic(experiment)
        experiment.results["measured_arms"] = arms.account()
    experiment.write(output, this)
    return experiment.record(this)


# Exact: identities


def exact(experiment: Experiment) -> None:
    """Special cases that must be equal to something known, bit for bit or to rounding."""
    ids = torch.randint(64, (4, 16), generator=generator(0))
    data = Calibration.from_tensors(ids, batch=2)
    plain, weighted = tiny_llama(), tiny_llama()
    gptq(plain, data, bits=3, group_size=-1)
    rsq(weighted, data, bits=3, group_size=-1, token_scores="uniform", rotate=None)
    unequal = sum(int((a != b).sum()) for a, b in zip(plain.parameters(), weighted.parameters(), strict=True))
    experiment.claims.append(certain("with equal token weights every weight is bit-identical to GPTQ's", "exact", unequal == 0, unequal))
    for claim, count in (("weighting a token by 2 is repeating it", 2), ("weighting a token by 0 is leaving it out", 0)):
        different = sum(codes_differ(seed, count) for seed in range(20))
        experiment.claims.append(certain(f"{claim}: codes that differ in 20 draws", "exact", different == 0, different))
    scores = score_tokens(tiny_llama(), data, attention_concentration)
    error = max(float((value.double().sum(1) / (4 * 16) - 1).abs().max()) for value in scores.values.values())
    claim = "attention received in a sequence adds up to heads x tokens: largest relative error below 1e-5"
    experiment.claims.append(certain(claim, "exact", error < 1e-5, error))
    model = tiny_llama().double()
    with judging(model):
        before = logits(model, ids)
        rotate(model)
        after = logits(model, ids)
    error = float((after - before).abs().max() / before.abs().max())
    claim = "rotated logits are the logits: largest relative difference below 1e-5"  # RMS norms compute in float32
    experiment.claims.append(certain(claim, "exact", error < 1e-5, error))


def tiny_llama() -> nn.Module:
    """An untrained Llama of two blocks, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def codes_differ(seed: int, count: int) -> int:
    """Codes that differ between weighting a fifth of the tokens by `count` and giving each of them `count` times."""
    draw = generator(derived(seed, "repeat", count))
    x = torch.randn(200, 32, generator=draw, dtype=torch.float64) @ torch.randn(32, 32, generator=draw, dtype=torch.float64)
    weight = torch.randn(24, 32, generator=draw)
    grid = fit_grid(weight, 3, GridSettings(-1), torch.float32)
    special = torch.rand(200, generator=draw) < 0.2
    w = torch.where(special, float(count), 1.0).double()
    again = x.repeat_interleave(w.long(), 0)
    results = []
    for hessian in (x.T @ (x * w[:, None]), again.T @ again / 7):  # the scale of a Hessian does not matter
        codes, _ = round_with_hessian([weight], [grid], hessian, damping=0.01, act_order=False)
        results.append(codes[0])
    return int((results[0] != results[1]).sum())


# Planted: a few important tokens of another kind


def planted(experiment: Experiment, *, draws: int) -> None:
    """5 to 10 % of the tokens matter and come from another distribution: does weighting them serve them?"""
    rows = [planted_draw(seed, width=(16, 32, 64)[seed % 3]) for seed in range(draws)]
    experiment.results["planted"] = rows
    ratio = [row["weighted"] / row["uniform"] for row in rows]
    shuffled = [row["permuted"] / row["uniform"] for row in rows]
    wins = sum(value < 1 for value in shuffled) / draws
    tokens = f"in all {draws} draws"
    experiment.claims += [
        certain(f"weights on the tokens that matter lower their error below that of uniform weights {tokens}: largest ratio", "planted",
                max(ratio) < 1, max(ratio)),
        certain(f"permuted weights do not ({tokens}): share of draws that they win", "planted", wins < 1, wins),
        below("logarithm of the error with weights over that with permuted weights", "planted",
              [math.log(row["weighted"] / row["permuted"]) for row in rows], 0.0),
        below("logarithm of the error with weights over that with uniform weights", "planted", [math.log(value) for value in ratio], 0.0),
        certain(f"GPTQ's error is not above round-to-nearest's {tokens}: largest ratio", "planted",
                all(row["gptq_over_rtn"] <= 1 for row in rows), max(row["gptq_over_rtn"] for row in rows)),
    ]  # fmt: skip


def planted_draw(seed: int, *, width: int) -> dict[str, float | int]:
    """Errors of one layer on the tokens that matter, solved at 3 bits with three kinds of token weights.

    Returns:
        "share" of tokens that matter; the weighted error relative to the weighted output with "uniform", "weighted" and "permuted"
        weights; "gptq_over_rtn", the uniform error of GPTQ over that of rounding to the nearest; "price", the uniform error with weights
        over that without.
    """
    draw = generator(derived(seed, "planted"))
    tokens, share = 32 * width, 0.05 + 0.05 * float(torch.rand((), generator=draw))
    matters = torch.zeros(tokens)
    matters[torch.randperm(tokens, generator=draw)[: round(share * tokens)]] = 1
    kinds = [torch.randn(width, width, generator=draw) / width**0.5 for _ in range(2)]
    x = torch.randn(tokens, width, generator=draw)
    x = torch.where(matters[:, None] == 1, x @ kinds[1], x @ kinds[0])
    weight = torch.randn(width, width, generator=draw) / width**0.5
    shuffled = matters[torch.randperm(tokens, generator=draw)]
    data = Calibration.from_tensors(x[None])

    def solved(quantize: Callable[..., Report], *given: Any, **settings: Any) -> Tensor:
        layer = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight)
        quantize(nn.Sequential(layer), *given, bits=3, group_size=-1, **settings)
        return layer.weight.detach()

    def attentive(scores: Tensor) -> Tensor:
        told = Scores("token", {"0": scores[None]}, "planted", {})
        return solved(rsq, data, token_scores=told, r_min=R_MIN, rotate=None)

    uniform, weighted, permuted, nearest = solved(gptq, data), attentive(matters), attentive(shuffled), solved(rtn)
    w = torch.where(matters == 1, 1.0, R_MIN).double()
    scale = error(weight, torch.zeros_like(weight), x, w)
    ones = torch.ones_like(w)
    return {
        "width": width,
        "share": share,
        "uniform": error(weight, uniform, x, w) / scale,
        "weighted": error(weight, weighted, x, w) / scale,
        "permuted": error(weight, permuted, x, w) / scale,
        "gptq_over_rtn": error(weight, uniform, x, ones) / error(weight, nearest, x, ones),
        "price": error(weight, weighted, x, ones) / error(weight, uniform, x, ones),
    }


def error(weight: Tensor, rounded: Tensor, x: Float[Tensor, "tokens d"], w: Float64[Tensor, " tokens"]) -> float:
    """sum_t w_t |(W - rounded W) x_t|^2, in float64."""
    return float((w[:, None] * (x.double() @ (weight - rounded).double().T).square()).sum())


# Desk and public: trained models


def permuted(context: TokenContext, *, seed: int) -> Float[Tensor, "samples length"]:
    """The attention scores of each sequence in a random order: the right histogram on the wrong tokens."""
    scores = attention_concentration(context).clone()
    for row, tokens in enumerate(context.tokens):
        own = scores[row, tokens]
        order = torch.randperm(len(own), generator=generator(derived(seed, context.block, context.first + row)))
        scores[row, tokens] = own[order.to(own.device)]
    return scores


ARMS: Mapping[str, Mapping[str, Any]] = {
    "rotate+GPTQ": {"token_scores": "uniform"},
    "RSQ": {},
    "RSQ, no rotation": {"rotate": None},
    "RSQ, permuted weights": {"token_scores": permuted},
}
"""Settings of `rsq` that make each arm."""


def make_arm(name: str, subject: Subject, bits: int, seed: int, **settings: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """The function that makes an arm of a model: its calibration draw and its rotation come from the seed."""
    group_size = GROUPS.get(subject.name, 128)

    def make(model: nn.Module) -> dict[str, Any]:
        if name == "RTN":
            rtn(model, bits=bits, group_size=group_size)
            return {}
        data = subject.calibration(seed)
        if name == "GPTQ":
            gptq(model, data, bits=bits, group_size=group_size)
            return {}
        own = dict(ARMS[name])
        if own.get("token_scores") is permuted:
            own["token_scores"] = functools.partial(permuted, seed=seed)
        report = rsq(model, data, bits=bits, group_size=group_size, **{"r_min": R_MIN, "seed": seed, **own, **settings})
        return {"notes": report.notes}

    return make


def quantized(
    experiment: Experiment, subject: Subject, draws: list[int], widths: tuple[int, ...], arms: Arms, progress: Progress | None
) -> None:
    """All arms of one model at each bit width and calibration draw, judged on held-out documents, and the claims about them."""
    text = subject.windows("test")
    dense = arms.measure(subject, ["dense"], lambda model: {}, text)
    results: dict[str, Any] = {
        "about": dict(subject.about), "group_size": GROUPS.get(subject.name, 128), "dense_perplexity": dense.perplexity,
        "calibration_tokens": subject.sizes.samples * subject.sizes.length, "draws": draws, "test_documents": len(dense.counts),
        "test_tokens": int(dense.counts.sum()), "text": text.digest, "rows": [],
    }  # fmt: skip
    experiment.results[subject.name] = results
    names = ["RTN", "GPTQ", *ARMS]
    jobs = [(bits, name, seed) for bits in widths for name in names for seed in draws]
    found: dict[tuple[int, str], list[Measured]] = {}
    for bits, name, seed in track(jobs, subject.name, len(jobs), progress):
        told = [bits, name] if name == "RTN" else [bits, name, seed]  # rounding to the nearest draws nothing: once for all seeds
        if name == "RTN" and seed:
            found[bits, name].append(found[bits, name][0])
        else:
            found.setdefault((bits, name), []).append(arms.measure(subject, told, make_arm(name, subject, bits, seed), text))
        arm = found[bits, name][-1]
        row = {"bits": bits, "arm": name, "seed": seed, "perplexity": arm.perplexity, "processor_seconds": round(arm.seconds, 2)}
        results["rows"].append(row)
    results["arms"] = [
        {"bits": bits, "arm": name, **change(dense, pooled(found[bits, name])),
         "by_draw": [arm.perplexity for arm in found[bits, name]],
         "to_rotate_gptq": _interval(found[bits, "rotate+GPTQ"], found[bits, name]),
         "processor_seconds": round(pooled(found[bits, name]).seconds, 2)}
        for bits in widths for name in names
    ]  # fmt: skip
    results["notes"] = found[widths[0], "RSQ"][0].facts.get("notes", [])
    results["weights"] = weight_shares(subject)
    for bits in widths:
        experiment.claims += _claims(subject, bits, {name: found[bits, name] for name in names})


def weight_shares(subject: Subject) -> list[dict[str, Any]]:
    """Where the token weights of each block of the model as it is go: how much the first token has, and how many tokens count.

    Returns:
        For each block "first", the mean share of a sequence's weight on its first token, and "effective", (sum w)^2 / sum w^2 over the
        number of tokens: 1 if all weights are equal.
    """
    scores = score_tokens(subject.model, subject.calibration(0))
    rows = []
    for name, value in scores.values.items():
        w = normalize_importance(value, r_min=R_MIN)
        total = w.sum(1)
        rows.append({"block": name, "first": float((w[:, 0] / total).mean()),
                     "effective": float((total.square() / w.square().sum(1)).mean() / w.shape[1])})  # fmt: skip
    return rows


def _interval(a: list[Measured], b: list[Measured]) -> list[float]:
    """Difference of log perplexity, and its interval over documents."""
    return list(difference(pooled(a), pooled(b)))


def _claims(subject: Subject, bits: int, of: Mapping[str, list[Measured]]) -> list[Claim]:
    at = f"{subject.name}, {bits} bits: log perplexity of"
    pairs = [
        ("GPTQ is below RTN's", "RTN", "GPTQ", 0.0),
        ("rotate+GPTQ is not above GPTQ's by 1 %", "GPTQ", "rotate+GPTQ", math.log1p(MARGIN)),
        ("RSQ is at most that of rotate+GPTQ + 1 %", "rotate+GPTQ", "RSQ", math.log1p(MARGIN)),
        ("RSQ is below that of rotate+GPTQ", "rotate+GPTQ", "RSQ", 0.0),
        ("RSQ is below that of RSQ with permuted weights", "RSQ, permuted weights", "RSQ", 0.0),
        ("RSQ without rotation is below that of GPTQ", "GPTQ", "RSQ, no rotation", 0.0),
    ]
    return [claim for words, base, arm, bound in pairs for claim in compared(f"{at} {words}", subject.tier, of[base], of[arm], bound=bound)]


def varied(
    experiment: Experiment, subject: Subject, draws: list[int], widths: tuple[int, ...], variants: Sequence[Mapping[str, Any]], arms: Arms,
    progress: Progress | None,
) -> None:  # fmt: skip
    """RSQ with other settings, on validation text: told beside the claims, and used for none of them."""
    text = subject.windows("validation")
    seeds = draws if subject.name == "stories260k" else draws[:1]  # seconds an arm, not minutes
    jobs = [(bits, variant) for bits in widths for variant in variants]
    rows = []
    for bits, variant in track(jobs, f"{subject.name}, settings", len(jobs), progress):

        def measured(arm: str, **settings: Any) -> Measured:
            return pooled([
                arms.measure(subject, [bits, arm, seed, settings], make_arm(arm, subject, bits, seed, **settings), text) for seed in seeds
            ])  # fmt: skip

        base, own = measured("rotate+GPTQ"), measured("RSQ", **variant)
        effect, low, high = difference(base, own)
        rows.append({"bits": bits, **variant, "perplexity": own.perplexity, "to_rotate_gptq": effect, "interval": [low, high]})
    experiment.results[subject.name]["settings_on_validation"] = {"draws": len(seeds), "rows": rows}


# Arithmetic: what it costs, by formula

LLAMA3_8B = {"d": 4096, "kv": 1024, "ff": 14336, "heads": 32, "layers": 32, "vocabulary": 128256}


def arithmetic(experiment: Experiment, *, samples: int = 256, length: int = 4096) -> None:
    """Multiplications and bytes that RSQ adds to GPTQ for Llama-3-8B at the paper's size, and what it stores."""
    d, kv, ff, heads = (LLAMA3_8B[key] for key in ("d", "kv", "ff", "heads"))
    tokens = samples * length
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)]
    inputs = [d, d, d, ff]  # q, k and v share theirs, gate and up too
    forward = tokens * sum(rows * columns for rows, columns in shapes) + tokens * length * d  # both attention products, half of them masked
    hessians = tokens * sum(width**2 for width in inputs) / 2  # symmetric
    solves = sum(width**3 / 3 for width in inputs) + sum(rows * columns**2 / 2 for rows, columns in shapes)
    passes = 5  # one for each of the four groups of sites, one for the outputs
    base = passes * forward + hessians + solves
    attention = tokens * length * d / 2  # queries times keys, half of them masked
    weighting = tokens * sum(inputs)
    extra = (attention + weighting) / base
    share = (attention + weighting + forward) / base  # and the pass whose outputs and maps the scores need
    three = [sum(stored_bits(shape, 3, group_size=group, symmetric=True) for shape in shapes) / sum(math.prod(s) for s in shapes)
             for group in (-1, 128)]  # fmt: skip
    untied = LLAMA3_8B["vocabulary"] * d * 2
    experiment.results["arithmetic"] = {
        "model": "Llama-3-8B", "tokens": tokens, "multiplications_per_block": {
            "forward": forward, "hessians": hessians, "solves": solves, "attention_scores": attention, "weighting": weighting},
        "share_without_the_extra_pass": extra, "share_with_the_extra_pass": share,
        "attention_map_bytes_per_sequence": heads * length**2 * 4,
        "stored_bits_per_weight_at_3": {"one scale per output": three[0], "groups of 128": three[1]},
        "bytes_added_if_embeddings_were_tied": untied, "expansion_by_8_calibration_tokens": 8 * tokens,
    }  # fmt: skip
    experiment.claims += [
        certain("scores and weights add less than 5 % to GPTQ's multiplications (Llama-3-8B, 256 x 4,096 tokens), besides one more pass",
                "arithmetic", extra < 0.05, extra),
        certain("with that pass less than a quarter", "arithmetic", share < 0.25, share),
        certain("weights and rotation cost no stored bit: 3 bits in groups of 128 take 3 + 16/128 and the shape entries", "arithmetic",
                abs(three[1] - 3.125 - 7 * 128 / sum(math.prod(s) for s in shapes)) < 1e-9, three[1]),
    ]  # fmt: skip
