"""Layer-wise quantization's claims at desk scale: which layers may be lowered first, measured against every other order.

Dumitru et al. 2024, arXiv 2406.17415. With six blocks there are 64 sets of lowered layers and 720 orders; every set is measured once, so
the curve of every order is known and the rank of LIM and ZD among all of them is exact for the judged text. Rounding to nearest in groups
of 64, asymmetric. Controls: random orders, the reverse, the leave-one-out order and the best order of all.
"""

import functools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy import stats
from torch import nn

from whatmatters.core import allocation
from whatmatters.core.data import Calibration
from whatmatters.core.evaluate import evaluate
from whatmatters.core.formats import stored_bits
from whatmatters.core.progress import Progress, track
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import derived, generator
from whatmatters.core.sites import Site, Structure, structure
from whatmatters.quantize.layerwise_quant import bits_sweep, layerwise_quant
from whatmatters.quantize.rtn import rtn
from whatmatters.reproduce._common import Claim, Experiment, certain, digest, from_interval
from whatmatters.reproduce._desk import (
    Arms,
    Measured,
    Scale,
    Sizes,
    Subject,
    check_seeds,
    compared,
    difference,
    pooled,
    shuffles,
    subjects,
)
from whatmatters.score.ablation import ablate
from whatmatters.score.layers import layer_shift, weight_outliers

SIZES: dict[Scale, dict[str, Sizes]] = {
    "smoke": {"embedded": Sizes(4, 32, 6, 1)},
    "desk": {"stories": Sizes(32, 256, 200, 2), "embedded": Sizes(24, 256, 48, 1), "public": Sizes(32, 512, 60, 1)},
    "gpu": {"stories": Sizes(64, 512, 350, 2), "embedded": Sizes(64, 512, 80, 4), "public": Sizes(64, 2048, 400, 2)},
}
PAIRS = ((8, 2), (4, 2))
"""Levels of the layers that stay and of those that are lowered."""
SHUFFLED = 20
"""Random orders that are drawn, beside the exact mean over all orders."""
BEST = 0.25
"""Share of orders among which LIM must be."""
CLOSE = math.log(1.10)
"""A perplexity up to 10 % higher counts as close to the original; the paper's tables call losses of about a tenth of accuracy close."""
RESAMPLES = 1000

DIFFERENCES = (
    "models of 5 and 6 blocks (0.26M and 5.8M parameters) in place of 32 and more: shares of layers are coarse",
    "perplexity of held-out documents in place of accuracy on downstream tasks",
    "calibration on text of the model's own kind in place of PG-19",
    "round-to-nearest in groups of 64, asymmetric (stories260k: one scale per output channel, as 64 does not divide its 172), "
    "GPTQ and RSQ in place of Quanto and GPT-Q; SpQR-like dynamic quantization was not tried",
    "'close to the original' is a perplexity at most 10 % higher, a bound of ours",
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
    """Run the experiment and write `output/layerwise-quant.json`.

    Args:
        model: path or hub id of a further causal language model, for the tier "public".
        scale: "desk" for minutes on two cores, "gpu" for larger sizes, "smoke" for seconds on an untrained model.
        seeds: calibration draws, at least 3.
        output: folder of the evidence.
        progress: told after each part.
        scratch: folder to keep measured arms in, so that a run that was cut off goes on.

    Returns:
        The evidence.

    Raises:
        InputError: fewer than 3 seeds.
    """
    draws = check_seeds(seeds)
    this = sys.modules[__name__]
    found, notes = subjects(SIZES[scale], model=model, scale=scale)
    arms = Arms(scratch, digest("layerwise-quant", this))
    with Experiment("layerwise-quant", seeds=draws, differences=[*DIFFERENCES, *notes]) as experiment:
        exact(experiment)
        for subject in found:
            ranked = Ranking.of(subject, draws)
            lowered(experiment, subject, ranked, arms, PAIRS[:1] if scale == "smoke" else PAIRS, progress)
            dropped(experiment, subject, ranked, arms, progress)
            backends(experiment, subject, ranked, draws, arms, progress)
        arithmetic(experiment)
    experiment.write(output, this)
    return experiment.record(this)


# Exact: closed forms


class Adding(nn.Module):
    """A block that maps x to scale * x + offset."""

    def __init__(self, scale: float, offset: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(len(offset), len(offset), dtype=offset.dtype)
        with torch.no_grad():
            self.linear.weight.copy_(scale * torch.eye(len(offset)))
            self.linear.bias.copy_(offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """scale * x + offset."""
        return self.linear(x)


def exact(experiment: Experiment) -> None:
    """LIM of blocks whose cosine is known, and ZD of distributions whose tail is known."""
    x, zero = torch.tensor([[[3.0, 4.0, 0.0]]], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    orthogonal = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)  # as long as x
    data = Calibration.from_tensors(x)
    cases = [("identity", 1.0, zero, -1.0), ("x to -x", -1.0, zero, 1.0), ("x to 7 x", 7.0, zero, -1.0),
             ("adding an orthogonal vector of equal length", 1.0, orthogonal, -1 / math.sqrt(2))]  # fmt: skip
    for name, scale, offset, expected in cases:
        value = float(layer_shift(nn.Sequential(Adding(scale, offset)), data).values["0"])
        claim = f"LIM of {name} is {expected:.6g}: error below 1e-12"
        experiment.claims.append(certain(claim, "exact", abs(value - expected) < 1e-12, abs(value - expected)))
    draw, size = generator(0), 1_000_000
    uniform = torch.rand(size, generator=draw, dtype=torch.float64).clamp(1e-12, 1 - 1e-12).numpy()
    for name, family in (("normal", stats.norm), ("uniform", stats.uniform), ("Laplace", stats.laplace), ("exponential", stats.expon)):
        share = outliers(family.ppf(uniform))
        expected = float(family.sf(family.mean() + family.std()))
        bound = 3 * math.sqrt(expected * (1 - expected) / size)
        claim = f"ZD of {name} weights is {expected:.6f}: error within 3 standard errors of a million weights"
        experiment.claims.append(certain(claim, "exact", abs(share - expected) < bound, abs(share - expected)))
    mirrored = outliers(-stats.expon.ppf(uniform))
    experiment.claims.append(certain("ZD is one-sided: 0 for mirrored exponential weights", "exact", mirrored == 0, mirrored))


def outliers(values: np.ndarray) -> float:
    """ZD of a layer with these weights."""
    layer = nn.Linear(1000, len(values) // 1000, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(values).view(-1, 1000))
    return -float(weight_outliers(nn.Sequential(layer)).values["0"])


# Desk: which layers may be lowered


@dataclass(frozen=True, eq=False)
class Ranking:
    """How a subject's layers are ranked, on the model as it is; orders have the least important first.

    Attributes:
        found: its structure.
        shift: LIM scores of each calibration draw.
        shift_orders: the order of each.
        outlier_order: the order of ZD.
    """

    found: Structure
    shift: list[Scores]
    shift_orders: list[list[str]]
    outlier_order: list[str]

    @classmethod
    def of(cls, subject: Subject, draws: Sequence[int]) -> "Ranking":
        """The rankings of a subject."""
        found = structure(subject.model)
        shift = [layer_shift(subject.model, subject.calibration(seed), structure=found) for seed in draws]
        orders = [scores.order()[::-1] for scores in shift]
        return cls(found, shift, orders, weight_outliers(subject.model, structure=found).order()[::-1])


def grouping(found: Structure) -> int:
    """Groups of 64; one scale per output channel where that does not divide all inputs."""
    return 64 if all(site.shape[1] % 64 == 0 for site in found.sites) else -1


def lowered(
    experiment: Experiment, subject: Subject, ranked: Ranking, arms: Arms, pairs: Sequence[tuple[int, int]], progress: Progress | None
) -> None:
    """Every order's curve of log perplexity over the number of lowered layers, for each pair of levels."""
    text, blocks, group_size = subject.windows("test"), list(ranked.found.blocks), grouping(ranked.found)
    random_orders, population = shuffles(blocks, SHUFFLED)
    dense = arms.measure(subject, ["dense"], lambda model: {}, text)
    results: dict[str, Any] = {
        "about": dict(subject.about), "blocks": len(blocks), "group_size": group_size, "dense_perplexity": dense.perplexity,
        "test_documents": len(dense.counts), "test_tokens": int(dense.counts.sum()), "text": text.digest,
        "orders": {"LIM": [_numbers(order, blocks) for order in ranked.shift_orders], "ZD": _numbers(ranked.outlier_order, blocks)},
        "population": f"all {len(population)} orders" if len(population) > SHUFFLED else f"{SHUFFLED} random orders", "levels": [],
    }  # fmt: skip
    experiment.results[subject.name] = results
    for pair in track(pairs, f"{subject.name}, orders", len(pairs), progress):
        alone = ablate(
            subject.model, subject.windows("validation"), bits=pair[1], group_size=group_size, symmetric=False, structure=ranked.found
        )
        oracle = alone.scores.order()[::-1]
        orders = {
            **{f"LIM {draw}": order for draw, order in enumerate(ranked.shift_orders)},
            **{f"reverse LIM {draw}": order[::-1] for draw, order in enumerate(ranked.shift_orders)},
            "ZD": ranked.outlier_order, "reverse ZD": ranked.outlier_order[::-1], "leave one out": oracle, "first to last": blocks,
            **{f"random {number}": order for number, order in enumerate(random_orders)},
            **{f"order {number}": order for number, order in enumerate(population)},
        }  # fmt: skip
        curves = swept(subject, orders, pair, group_size, ranked.found, arms, text)
        judge_orders(experiment, subject, pair, curves, len(population), len(ranked.shift_orders), results)


@dataclass(frozen=True, eq=False)
class Curves:
    """What each order gives.

    Attributes:
        sets: what was measured: one entry for each set of lowered layers.
        steps: for each order the entry of every step, from no lowered layer to all.
        lowered: numbers of the layers in each set.
    """

    sets: list[Measured]
    steps: dict[str, list[int]]
    lowered: list[list[int]]

    def losses(self, order: str) -> list[float]:
        """Log perplexity at every step."""
        return [self.sets[i].loss for i in self.steps[order]]

    def mean(self, orders: Sequence[str]) -> Measured:
        """The mean over steps and orders, document by document."""
        return pooled([self.sets[i] for order in orders for i in self.steps[order]])


def swept(
    subject: Subject, orders: Mapping[str, Sequence[str]], pair: tuple[int, int], group_size: int, found: Structure, arms: Arms,
    text: Calibration,
) -> Curves:  # fmt: skip
    """Measure every set of lowered layers that an order goes through, once."""
    blocks = list(found.blocks)
    path = {(name, step): frozenset(order[:step]) for name, order in orders.items() for step in range(len(order) + 1)}
    known: dict[frozenset[str], int] = {}
    for chosen in path.values():
        known.setdefault(chosen, len(known))

    def compute() -> list[dict[str, Any]]:
        measured: list[dict[str, Any]] = []

        def measure(model: nn.Module) -> float:
            judged = evaluate(model, text)
            measured.append({"nats": judged.nats.tolist(), "counts": judged.counts.tolist(), "seconds": 0.0, "facts": {}})
            return judged.loss

        bits_sweep(subject.copy(), orders, measure, levels=pair, group_size=group_size, symmetric=False, structure=found)
        return measured

    sets = arms.remember([subject.name, "sweep", pair, sorted(map(sorted, known)), text.digest], compute)
    steps = {name: [known[path[name, step]] for step in range(len(order) + 1)] for name, order in orders.items()}
    return Curves(sets, steps, [_numbers(sorted(chosen, key=blocks.index), blocks) for chosen in known])


def judge_orders(
    experiment: Experiment, subject: Subject, pair: tuple[int, int], curves: Curves, population: int, draws: int, results: dict[str, Any]
) -> None:
    """Claims about one subject at one pair of levels."""
    high, low = pair
    at = f"{subject.name}, {high} to {low} bits: mean over lowered layers of log perplexity"
    everyone = [f"order {number}" for number in range(population)]
    shift, against = [f"LIM {draw}" for draw in range(draws)], [f"reverse LIM {draw}" for draw in range(draws)]
    means = {name: curves.mean(names) for name, names in (("LIM", shift), ("reverse LIM", against), ("random", everyone),
             ("ZD", ["ZD"]), ("reverse ZD", ["reverse ZD"]), ("leave one out", ["leave one out"]))}  # fmt: skip

    def lower(a: str, b: str) -> Claim:
        effect, *interval = difference(means[b], means[a])
        return from_interval(f"{at}: {a} is below {b}", subject.tier, effect, (interval[0], interval[1]), 0.0)

    share = {name: better_orders(curves, own, everyone) for name, own in
             (("LIM", shift), ("ZD", ["ZD"]), ("leave one out", ["leave one out"]))}  # fmt: skip
    best, *interval = share["LIM"]
    experiment.claims += [
        lower("LIM", "random"),
        lower("random", "reverse LIM"),
        from_interval(f"{at}: LIM is among the best {BEST:.0%} of orders (share that is better)", subject.tier, best,
                      (interval[0], interval[1]), BEST),
        lower("ZD", "reverse ZD"),
        lower("ZD", "random"),
    ]  # fmt: skip
    close = {name: close_share(curves, names) for name, names in (("LIM", shift), ("random", everyone), ("ZD", ["ZD"]))}
    told = f"{subject.name}, {high} to {low} bits: share of layers lowered before perplexity is 10 % above that of all at {high} bits"
    experiment.claims += [
        certain(f"{told}, in LIM order: at least 25 %", subject.tier, close["LIM"] >= 0.25, close["LIM"]),
        certain(f"{told}: more in LIM order than in the mean random one (difference)", subject.tier,
                close["LIM"] > close["random"], close["LIM"] - close["random"]),
    ]  # fmt: skip
    named = ["ZD", "reverse ZD", "leave one out", "first to last", *(f"random {number}" for number in range(SHUFFLED))]
    ranked = sorted(everyone, key=lambda name: curves.mean([name]).loss)
    results["levels"].append({
        "levels": list(pair),
        "mean_log_perplexity": {name: value.loss for name, value in means.items()}
        | {"best order": curves.mean(ranked[:1]).loss, "worst order": curves.mean(ranked[-1:]).loss},
        "curves": {"LIM": np.mean([curves.losses(name) for name in shift], axis=0).tolist(),
                   "reverse LIM": np.mean([curves.losses(name) for name in against], axis=0).tolist(),
                   "mean of all orders": np.mean([curves.losses(name) for name in everyone], axis=0).tolist(),
                   "best order": curves.losses(ranked[0]), **{name: curves.losses(name) for name in named}},
        "share_of_orders_that_are_better": {name: {"share": s, "interval": [a, b]} for name, (s, a, b) in share.items()},
        "rank_among_sets": [rank_among_sets(curves, shift[0], step) for step in range(1, len(curves.steps[shift[0]]) - 1)],
        "share_lowered_while_close": close,
        "sets": [{"lowered": lowered, "log_perplexity": measured.loss}
                 for lowered, measured in zip(curves.lowered, curves.sets, strict=True)] if len(curves.sets) <= 64 else [],
    })  # fmt: skip


def better_orders(curves: Curves, orders: Sequence[str], everyone: Sequence[str]) -> tuple[float, float, float]:
    """Share of all orders whose mean log perplexity is below that of some orders (mean over those), and its interval over documents."""
    nats = np.stack([measured.nats for measured in curves.sets])
    counts = curves.sets[0].counts.astype(np.float64)
    paths = np.array([curves.steps[name] for name in everyone])

    def share(losses: Float64[np.ndarray, " sets"]) -> float:
        means = losses[paths].mean(1)
        return float(np.mean([(means < losses[curves.steps[order]].mean() - 1e-12).mean() for order in orders]))

    draw = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=generator(derived(0, "orders"))).numpy()
    shares = [share(nats[:, chosen].sum(1) / counts[chosen].sum()) for chosen in draw]
    low, high = np.quantile(shares, [0.025, 0.975])
    return share(nats.sum(1) / counts.sum()), float(low), float(high)


def close_share(curves: Curves, orders: Sequence[str]) -> float:
    """Share of layers that can be lowered, one after another, while perplexity stays close to that of none lowered; mean over orders."""
    shares = []
    for order in orders:
        losses = np.array(curves.losses(order))
        over = np.flatnonzero(losses - losses[0] > CLOSE)
        shares.append((int(over[0]) - 1 if len(over) else len(losses) - 1) / (len(losses) - 1))
    return float(np.mean(shares))


def rank_among_sets(curves: Curves, order: str, step: int) -> dict[str, int]:
    """Where the set that an order lowers stands among all measured sets of the same size; 1 is the least loss."""
    own = curves.sets[curves.steps[order][step]].loss
    same = [measured.loss for lowered, measured in zip(curves.lowered, curves.sets, strict=True) if len(lowered) == step]
    return {"lowered": step, "rank": 1 + sum(loss < own for loss in same), "sets": len(same)}


def _numbers(order: Sequence[str], blocks: Sequence[str]) -> list[int]:
    return [blocks.index(name) for name in order]


# Desk: lowering against dropping, and other quantizers


def dropped(experiment: Experiment, subject: Subject, ranked: Ranking, arms: Arms, progress: Progress | None) -> None:
    """The least important layers, in LIM order of the first draw: quantized to 4 or 2 bits, or left out, the rest at 8 bits."""
    text, order, group_size = subject.windows("test"), ranked.shift_orders[0], grouping(ranked.found)
    counts = list(range(1, len(order)))
    curves = {low: swept(subject, {"LIM": order}, (8, low), group_size, ranked.found, arms, text) for low in (4, 2)}
    skipped = []
    for count in track(counts, f"{subject.name}, dropping", len(counts), progress):
        make = functools.partial(drop, blocks=order[:count], ranked=ranked, group_size=group_size)
        skipped.append(arms.measure(subject, ["drop", order[:count]], make, text))
    without = pooled(skipped)
    rows: dict[str, Any] = {"dropped": [arm.loss for arm in skipped]}
    for low, words in (
        (4, "quantizing to 4 bits is below dropping"),
        (2, "at 2 bits, the paper's exception, quantizing is below dropping"),
    ):
        kept = [curves[low].sets[i] for i in curves[low].steps["LIM"][1:-1]]
        effect, *interval = difference(without, pooled(kept))
        claim = f"{subject.name}: mean log perplexity with 1 to {len(counts)} of the least important layers lowered: {words}"
        experiment.claims.append(from_interval(claim, subject.tier, effect, (interval[0], interval[1]), 0.0))
        rows[f"quantized to {low} bits"] = [arm.loss for arm in kept]
    experiment.results[subject.name]["dropping"] = {"layers": counts, "log_perplexity": rows}


def drop(model: nn.Module, blocks: Sequence[str], ranked: Ranking, group_size: int) -> dict[str, Any]:
    """Quantize a model to 8 bits and take blocks out of it."""
    bits_at = dict.fromkeys((site.name for site in ranked.found.sites), 8)
    rtn(model, bits=bits_at, group_size=group_size, symmetric=False, structure=ranked.found)
    parent, _, _ = blocks[0].rpartition(".")
    kept = [model.get_submodule(name) for name in ranked.found.blocks if name not in blocks]
    owner, _, attribute = parent.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.ModuleList(kept))
    return {}


def backends(
    experiment: Experiment, subject: Subject, ranked: Ranking, draws: Sequence[int], arms: Arms, progress: Progress | None
) -> None:
    """GPTQ and RSQ with half of the layers at 4 bits and half at 2, by LIM and by its reverse."""
    text, group_size = subject.windows("test"), grouping(ranked.found)
    rows = []
    jobs = [(backend, name) for backend in ("rtn", "gptq", "rsq") for name in ("LIM", "reverse LIM")]
    found: dict[tuple[str, str], list[Measured]] = {}
    for backend, name in track(jobs, f"{subject.name}, quantizers", len(jobs), progress):
        for seed in draws:
            scores = ranked.shift[seed] if name == "LIM" else reversed_scores(ranked.shift[seed])

            def make(model: nn.Module, backend: str = backend, scores: Scores = scores, seed: int = seed) -> dict[str, Any]:
                layerwise_quant(
                    model, None if backend == "rtn" else subject.calibration(seed), average_bits=3, levels=(4, 2), layer_scores=scores,
                    count="codes", backend=backend, group_size=group_size, symmetric=False, structure=ranked.found,
                    backend_settings={"seed": seed} if backend == "rsq" else None,
                )  # fmt: skip
                return {}

            # Rounding to the nearest draws nothing: draws with the same order share one arm.
            told = ["backend", backend, scores.order(), *([] if backend == "rtn" else [seed])]
            found.setdefault((backend, name), []).append(arms.measure(subject, told, make, text))
        rows.append({"backend": backend, "order": name, "perplexity": pooled(found[backend, name]).perplexity,
                     "by_draw": [arm.perplexity for arm in found[backend, name]]})  # fmt: skip
    for backend in ("rtn", "gptq", "rsq"):
        claim = (
            f"{subject.name}, {backend} at an average of 3 bits (levels 4 and 2): log perplexity with LIM is below that with its reverse"
        )
        experiment.claims += compared(claim, subject.tier, found[backend, "reverse LIM"], found[backend, "LIM"])
    experiment.results[subject.name]["backends"] = rows


def reversed_scores(scores: Scores) -> Scores:
    """The opposite order."""
    return Scores("layer", {name: -value for name, value in scores.values.items()}, "reverse", {}, structure=scores.structure)


# Arithmetic


def arithmetic(experiment: Experiment) -> None:
    """LLaMA-2-13B's numbers: 30 layers at 4 bits and 10 at 2, packed bytes, and what scales add."""
    d, ff, layers = 5120, 13824, 40
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (ff, d), "up": (ff, d), "down": (d, ff)}
    blocks = tuple(f"layers.{i}" for i in range(layers))
    sites = tuple(Site(f"{block}.{name}", f"{block}.{name}.weight", shape, block) for block in blocks for name, shape in shapes.items())
    found = Structure(blocks, sites)
    scores = Scores("layer", {block: torch.tensor(float(i)) for i, block in enumerate(blocks)}, "position", {}, structure=found)
    plan = allocation.bits(scores, 3.5, (4, 2), count="codes", group_size=64)
    low = [block for block in blocks if plan.values[f"{block}.q"] == 2]
    weights = sum(site.size for site in sites)
    codes = sum(site.size * int(plan.values[site.name]) for site in sites)
    rows: dict[str, Any] = {"lowered": len(low), "average_codes": codes / weights, "weights": weights}
    experiment.claims += [
        certain("LLaMA-2-13B at an average of 3.5 with levels 4 and 2: 30 layers at 4 bits and 10 at 2", "arithmetic",
                len(low) == 10 and codes * 2 == 7 * weights, len(low)),
    ]  # fmt: skip
    for group in (32, 64, 128):
        mixed = sum(stored_bits(site.shape, int(plan.values[site.name]), group_size=group, symmetric=True) for site in sites)
        uniform = sum(stored_bits(site.shape, 4, group_size=group, symmetric=True) for site in sites)
        formula = codes + sum(16 * site.size // group + 128 for site in sites)
        rows[f"groups of {group}"] = {
            "bytes": mixed // 8, "bytes_at_4_bits": uniform // 8, "scale_bits_per_weight": 16 / group, "average_stored": mixed / weights,
        }  # fmt: skip
        claim = f"packed size in groups of {group}: codes, 16 bits a scale (16/{group} = {16 / group} bits a weight), 128 a site: bits off"
        experiment.claims.append(certain(claim, "arithmetic", mixed == formula, mixed - formula))
    experiment.results["arithmetic"] = rows
