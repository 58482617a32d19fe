"""Composability, measured: every layer scorer with every quantizer under two budgets, every token scorer in RSQ, and the bit allocators.

No method of a paper and so no evidence of one: this is what the library's parts give together. Layers are scored as groups of tied sites
and as whole blocks (the papers' unit), each once for each scorer; a plan that two scorers share is quantized and judged once. Controls:
random scores, and uniform bits whose smaller groups spend the same bytes on scales.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import nn

from whatmatters.core import allocation, catalog
from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.data import Calibration
from whatmatters.core.formats import stored_bits
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress, track
from whatmatters.core.report import versions
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure, structure
from whatmatters.quantize.gptq import gptq
from whatmatters.quantize.rsq import rsq
from whatmatters.quantize.rtn import rtn
from whatmatters.reproduce._common import Claim, certain, commit, source_digest
from whatmatters.reproduce._desk import Arms, Measured, Scale, Sizes, Subject, change, check_seeds, difference, pooled, subjects
from whatmatters.reproduce.rsq import permuted
from whatmatters.score.quantization_error import quantization_error

SIZES: dict[Scale, dict[str, Sizes]] = {
    "smoke": {"embedded": Sizes(4, 32, 6, 1)},
    "desk": {"stories": Sizes(24, 256, 200, 2), "embedded": Sizes(24, 256, 48, 1), "public": Sizes(24, 512, 60, 1)},
    "gpu": {"stories": Sizes(128, 512, 350, 2), "embedded": Sizes(128, 512, 80, 4), "public": Sizes(128, 2048, 400, 2)},
}
BUDGETS = (3.0, 3.5)
"""Average bits per weight, counted as stored."""
LEVELS = (2, 3, 4, 8)
GRAINS = ("site", "block")
UNIFORM = ((2, 16), (3, 128), (3, 32), (4, 128))
"""Bits and group size of uniform arms: 2 bits in groups of 16 take 3.0, 3 bits in groups of 32 take 3.5 bits a weight."""
QUANTIZERS: Mapping[str, Callable[..., Any]] = {"RTN": rtn, "GPTQ": gptq, "RSQ": rsq}
TOKEN_BITS = 3


def run(
    *,
    model: str | os.PathLike[str] | None = None,
    scale: Scale = "desk",
    seeds: int = 3,
    output: Path = Path("evidence"),
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Fill the tables and write `output/composability.json`.

    Args:
        model: path or hub id of the model in place of the embedded one.
        scale: "desk" for minutes on two cores, "gpu" for larger sizes, "smoke" for seconds on an untrained model.
        seeds: draws of the random control and of the token table's calibration data, at least 3.
        output: folder of the tables.
        progress: told after each arm.
        scratch: folder to keep measured arms in, so that a run that was cut off goes on.

    Returns:
        The tables.

    Raises:
        InputError: fewer than 3 seeds.
    """
    draws = check_seeds(seeds)
    begin = perf_counter()
    found, _ = subjects(SIZES[scale], model=model, scale=scale)
    subject = found[-1]
    code = source_digest([sys.modules[__name__], *(sys.modules[f.__module__] for f in QUANTIZERS.values())])
    bench = Bench(subject, structure(subject.model), Arms(scratch, code))
    layers, seconds = layer_table(bench, draws, progress)
    allocators, claims = allocator_table(bench)
    record = {
        "slug": "composability",
        "subject": subject.name,
        "about": dict(subject.about),
        "dense_perplexity": bench.dense.perplexity,
        "test_documents": len(bench.dense.counts),
        "test_tokens": int(bench.dense.counts.sum()),
        "calibration_tokens": subject.sizes.samples * subject.sizes.length,
        "levels": LEVELS,
        "group_size": bench.group_size,
        "budgets": BUDGETS,
        "scoring_seconds": seconds,
        "layers": layers,
        "uniform": uniform_table(bench),
        "tokens": token_table(bench, draws, progress),
        "allocators": allocators,
        "claims": [asdict(claim) for claim in claims],
        "seeds": draws,
        "versions": versions(),
        "seconds": round(perf_counter() - begin, 1),
        "commit": commit(),
        "digest": code,
    }
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / "composability.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


@dataclass(frozen=True, eq=False)
class Bench:
    """A model to be quantized in many ways, with what all ways share."""

    subject: Subject
    found: Structure
    arms: Arms

    @functools.cached_property
    def group_size(self) -> int:
        """128; one scale per output channel where that does not divide all inputs."""
        return 128 if all(site.shape[1] % 128 == 0 for site in self.found.sites) else -1

    @functools.cached_property
    def dense(self) -> Measured:
        """The model as it is."""
        return self.arms.measure(self.subject, ["dense"], lambda model: {}, self.subject.windows("test"))

    def quantized(self, quantizer: str, bits: int | Plan, *, group_size: int | None = None, seed: int = 0, **settings: Any) -> Measured:
        """The model quantized, judged on the test split; equal plans are made once."""
        group = self.group_size if group_size is None else group_size
        values = bits if isinstance(bits, int) else sorted((name, int(value)) for name, value in bits.values.items())

        def make(model: nn.Module) -> dict[str, Any]:
            shared = {"bits": bits, "group_size": group, "structure": self.found}
            if quantizer == "RTN":
                rtn(model, **shared)  # type: ignore[arg-type]
            else:
                QUANTIZERS[quantizer](model, self.subject.calibration(seed), **shared, **settings)
            return {}

        told = [quantizer, values, group, seed, sorted((name, str(value)) for name, value in settings.items())]
        return self.arms.measure(self.subject, told, make, self.subject.windows("test"))

    def stored(self, bits: int, group_size: int) -> float:
        """Average bits a weight on disk of uniform bits."""
        total = sum(stored_bits(site.shape, bits, group_size=group_size, symmetric=True) for site in self.found.sites)
        return total / sum(site.size for site in self.found.sites)


def layer_table(bench: Bench, draws: Sequence[int], progress: Progress | None) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each scorer, grain, budget and quantizer, and the seconds that scoring by site took; controls are the mean over draws."""
    entries = [entry for entry in catalog.scorers(when="ahead") if entry.unit in ("layer", "weight", "channel")]
    data = bench.subject.calibration(0)
    rows, seconds = [], {}
    jobs = [(entry, by) for entry in entries for by in GRAINS]
    for entry, by in track(jobs, "layer scorers", len(jobs), progress):
        begin = perf_counter()
        seeds = draws if entry.control else draws[:1]
        scored = [scores_of(entry, bench, data, by, seed) for seed in seeds]
        if by == GRAINS[0]:
            seconds[entry.slug] = round((perf_counter() - begin) / len(scored), 2)
        for budget in BUDGETS:
            plans = [planned(scores, budget, bench) for scores in scored]
            for quantizer in QUANTIZERS:
                measured = pooled([bench.quantized(quantizer, plan) for plan in plans])
                rows.append({
                    "scorer": entry.slug, "by": by, "control": entry.control, "budget": budget, "quantizer": quantizer,
                    "how": plans[0].settings["how"], "stored": plans[0].account["average_stored"], **change(bench.dense, measured),
                    "bits": [int(value) for value in plans[0].values.values()],
                })  # fmt: skip
    return rows, seconds


def scores_of(entry: catalog.Entry, bench: Bench, data: Calibration, by: str, seed: int) -> Scores:
    """What a scorer gives, by site or by block."""
    offered = {"unit": "layer", "by": by, "structure": bench.found, "seed": seed, "group_size": bench.group_size, "levels": LEVELS}
    accepted = inspect.signature(entry.function).parameters
    scores: Scores = entry.function(bench.subject.model, data, **{key: value for key, value in offered.items() if key in accepted})
    return scores


def planned(scores: Scores, budget: float, bench: Bench) -> Plan:
    """The optimum where scores are losses, rank order else."""
    how = "optimum" if scores.scale == "loss" else "rank"
    return allocation.bits(scores, budget, LEVELS, how=how, structure=bench.found, group_size=bench.group_size)  # type: ignore[arg-type]


def uniform_table(bench: Bench) -> list[dict[str, Any]]:
    """Uniform bits, with groups that spend the budgets' bytes on scales."""
    sizes = [(bits, group) for bits, group in UNIFORM if all(site.shape[1] % group == 0 for site in bench.found.sites)]
    return [
        {"bits": bits, "group_size": group, "quantizer": quantizer, "stored": bench.stored(bits, group),
         **change(bench.dense, bench.quantized(quantizer, bits, group_size=group))}
        for bits, group in sizes for quantizer in QUANTIZERS
    ]  # fmt: skip


def token_table(bench: Bench, draws: Sequence[int], progress: Progress | None) -> list[dict[str, Any]]:
    """A row for each token scorer in RSQ at 3 bits: mean over calibration draws, and the difference to uniform weights."""
    names = ["uniform", *(entry.slug for entry in catalog.scorers("token", "walk") if entry.slug != "uniform"), "permuted"]
    rows: list[dict[str, Any]] = []
    for name in track(names, "token scorers", len(names), progress):
        arms = [
            bench.quantized("RSQ", TOKEN_BITS, seed=seed, token_scores=_control(seed) if name == "permuted" else name) for seed in draws
        ]
        if name == "uniform":
            base = arms
        effect, low, high = difference(pooled(base), pooled(arms))
        rows.append({
            "scorer": name, **change(bench.dense, pooled(arms)), "by_draw": [arm.perplexity for arm in arms],
            "to_uniform": effect, "interval": [low, high],
            "draws_better_than_uniform": int(np.sum([a.loss < b.loss for a, b in zip(arms, base, strict=True)])),
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class _control:
    """Permuted attention scores, named by their seed and not by their address, so that the arm is found again."""

    seed: int

    def __call__(self, context: Any) -> Any:
        return permuted(context, seed=self.seed)


def allocator_table(bench: Bench) -> tuple[dict[str, Any], list[Claim]]:
    """The optimum beside greedy steps and LP rounding, on the model's own loss table, at every budget from 2.2 to 8 bits."""
    table = quantization_error(
        bench.subject.model, bench.subject.calibration(0), levels=LEVELS, group_size=bench.group_size, structure=bench.found
    )
    ways: dict[str, Callable[..., Plan]] = {
        "optimum": functools.partial(allocation.bits, how="optimum"),
        "greedy": allocation.bits_greedy,
        "LP rounding": allocation.bits_lp_rounding,
    }
    lowest = bench.stored(min(LEVELS), bench.group_size)
    budgets = [budget / 10 for budget in range(22, 81) if budget / 10 >= lowest]
    plans = {
        name: [way(table, budget, LEVELS, structure=bench.found, group_size=bench.group_size) for budget in budgets]
        for name, way in ways.items()
    }
    losses = {name: np.array([plan.account["predicted_loss"] for plan in own]) for name, own in plans.items()}
    rows, claims = [], []
    for name in ("greedy", "LP rounding"):
        excess = losses[name] / losses["optimum"] - 1
        worst = int(excess.argmax())
        rows.append({
            "allocator": name, "budgets": len(budgets), "worse_than_optimum": int((excess > 1e-9).sum()),
            "largest_excess_percent": 100 * float(excess[worst]), "at_budget": budgets[worst],
            "mean_excess_percent": 100 * float(excess.mean()),
        })  # fmt: skip
        claim = f"the optimum's predicted loss is never above {name}'s, at {len(budgets)} budgets: least excess"
        claims.append(certain(claim, "desk", float(excess.min()) > -1e-12, float(excess.min())))
    differing = [b for b, row in zip(budgets, losses["greedy"] / losses["optimum"], strict=True) if b < 4 and row > 1 + 1e-9]
    worst_low = max(differing, key=lambda b: losses["greedy"][budgets.index(b)] / losses["optimum"][budgets.index(b)], default=BUDGETS[0])
    measured = [
        {"allocator": name, "budget": budget, "predicted_loss": plan.account["predicted_loss"],
         **change(bench.dense, bench.quantized("RTN", plan))}
        for budget in sorted({*BUDGETS, worst_low}) for name, own in plans.items() for plan in [own[budgets.index(budget)]]
    ]  # fmt: skip
    return {"predicted": rows, "measured_with_RTN": measured}, claims
