"""Weight compander on small networks that overfit: does it bound weights, empty the range around zero, and improve accuracy?

A perceptron learns scikit-learn's digits from 150 images, clean or with 40 % of the labels wrong, with weight decay alone or with dropout
too: the paper's claim is about gains on top of standard regularization. Each arm chooses its learning rate on validation images.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from whatmatters.core.errors import InputError
from whatmatters.core.progress import Progress, track
from whatmatters.core.seeds import derived, generator
from whatmatters.nn import Compander, compander_groups, fold_weight_compander, weight_compander
from whatmatters.reproduce._common import Experiment, below, certain
from whatmatters.reproduce._desk import check_seeds

DIFFERENCES = (
    "digits and a perceptron of 85,000 weights in place of convolution networks on image benchmarks",
    "the arctan form is inferred from the abstract; the formula's text could not be had",
    "no figure of the paper could be had, so none is compared with",
)
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "bounded (a 0.2, slope 1)": {"a": 0.2, "slope": 1.0, "clamp": True},
    "companded (a 0.2, slope 2)": {"a": 0.2, "slope": 2.0, "clamp": True},
    "companded (a 0.5, slope 2)": {"a": 0.5, "slope": 2.0},
    "learned (start a 0.2, slope 2)": {"a": 0.2, "slope": 2.0, "clamp": True, "learnable": True},
}
RATES = (0.02, 0.05, 0.1)
"""Learning rates that every arm chooses from, by validation accuracy."""
STEPS = {"smoke": 5, "desk": 500, "gpu": 5000}
TRAIN, VALIDATION = 150, 400
SETTINGS = [(noise, dropout) for noise in (0.0, 0.4) for dropout in (0.0, 0.5)]


@dataclass(frozen=True)
class Outcome:
    """One trained network, folded: test accuracy, also with a third of the weights removed at random, and what its weights are like."""

    rate: float
    accuracy: float
    pruned: float
    largest: float
    near_zero: float
    mean: float


def run(
    *,
    model: str | os.PathLike[str] | None = None,
    scale: str = "desk",
    seeds: int = 5,
    output: Path = Path("evidence"),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiment and write `output/weight-compander.json`.

    Args:
        model: not used by this experiment; refused if given.
        scale: "desk" for minutes on two cores, "gpu" for longer training, "smoke" for seconds.
        seeds: draws of the training images and the network, at least 3; 5 are taken where fewer are asked for at the desk scale.
        output: folder of the evidence.
        progress: told after each arm.

    Returns:
        The evidence.

    Raises:
        InputError: fewer than 3 seeds, or a model.
    """
    if model is not None:
        raise InputError("the experiment on weight-compander trains its own networks; leave out --model")
    draws = check_seeds(seeds if scale == "smoke" else max(seeds, 5))
    with Experiment("weight-compander", seeds=draws, differences=DIFFERENCES) as experiment:
        exact(experiment)
        jobs = [(setting, seed, arm) for setting in SETTINGS for seed in draws for arm in ARMS]
        found = {job: chosen(*job, STEPS[scale]) for job in track(jobs, "networks", len(jobs), progress)}
        for setting in SETTINGS:
            judge(experiment, setting, {arm: [found[setting, seed, arm] for seed in draws] for arm in ARMS})
    experiment.write(output, sys.modules[__name__])
    return experiment.record(sys.modules[__name__])


def exact(experiment: Experiment) -> None:
    """The formula's own properties."""
    compander = Compander(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64))
    v = torch.linspace(-1e6, 1e6, 100_001, dtype=torch.float64)
    largest = float(compander(v).abs().max())
    experiment.claims.append(certain("|w| stays below a pi/2 for |v| to 1e6", "exact", largest < 0.5 * math.pi / 2, largest))
    w = torch.linspace(-0.78, 0.78, 1001, dtype=torch.float64)
    error = float((compander(compander.right_inverse(w)) - w).abs().max())
    experiment.claims.append(certain("wrapping leaves every weight as it is: largest error below 1e-12", "exact", error < 1e-12, error))
    network = perceptron(0, 0.0).eval()
    x = torch.randn(32, 64, generator=generator(0))
    weight_compander(network, a=0.5)
    during = network(x)
    difference = float((fold_weight_compander(network)(x) - during).abs().max())
    experiment.claims.append(certain("folding away leaves the outputs as they are, bit for bit", "exact", difference == 0, difference))


def judge(experiment: Experiment, setting: tuple[float, float], found: dict[str, list[Outcome]]) -> None:
    """Claims of one setting: the mechanism, and accuracy against the plain arm, paired over draws."""
    noise, dropout = setting
    where = f"{noise:.0%} wrong labels, dropout {dropout:g}"
    experiment.results[where] = {arm: [vars(outcome) for outcome in outcomes] for arm, outcomes in found.items()}
    plain = found["plain"]
    for arm, outcomes in found.items():
        if arm == "plain":
            continue
        pairs = list(zip(outcomes, plain, strict=True))
        lost = [b.accuracy - a.accuracy for a, b in pairs]
        fall = [(a.accuracy - a.pruned) - (b.accuracy - b.pruned) for a, b in pairs]
        claims: list[tuple[str, list[float], float]] = [
            ("loses less than a point of accuracy against plain training", lost, 0.01),
            ("is more accurate than plain training (loss of accuracy below 0)", lost, 0),
            ("loses less when a third of the weights are removed at random (redundancy)", fall, 0),
        ]
        if "learned" not in arm:
            claims.append(("lowers the largest weight (log ratio)", [math.log(a.largest / b.largest) for a, b in pairs], 0))
        if "bounded" not in arm:
            claims.append(("leaves fewer weights below 0.01 (difference of shares)", [a.near_zero - b.near_zero for a, b in pairs], 0))
            claims.append(("raises the mean size of a weight (minus log ratio)", [math.log(b.mean / a.mean) for a, b in pairs], 0))
        experiment.claims += [below(f"{where}: {arm} {claim}", "desk", effects, bound) for claim, effects, bound in claims]


def chosen(setting: tuple[float, float], seed: int, arm: str, steps: int) -> Outcome:
    """The arm trained at each rate; the one that is best on validation images, judged on test images."""
    noise, dropout = setting
    images, labels = digits(seed)
    learn, check, test = slice(0, TRAIN), slice(TRAIN, TRAIN + VALIDATION), slice(TRAIN + VALIDATION, None)
    targets = labels[learn].clone()
    wrong = torch.randperm(TRAIN, generator=generator(derived(seed, "noise")))[: int(noise * TRAIN)]
    targets[wrong] = (targets[wrong] + 1 + torch.randint(9, (len(wrong),), generator=generator(derived(seed, "labels")))) % 10
    best: tuple[float, float, nn.Module] | None = None
    for rate in RATES:
        network = trained(perceptron(seed, dropout), ARMS[arm], images[learn], targets, rate, steps, seed)
        score = accuracy(network, images[check], labels[check])
        if best is None or score > best[0]:
            best = (score, rate, network)
    assert best is not None
    _, rate, network = best
    weights = torch.cat([layer.weight.detach().flatten() for layer in network if isinstance(layer, nn.Linear)])
    whole = accuracy(network, images[test], labels[test])
    with torch.no_grad():
        draw = generator(derived(seed, "removed"))
        for layer in network:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(torch.rand(layer.weight.shape, generator=draw) > 1 / 3)
    return Outcome(
        rate, whole, accuracy(network, images[test], labels[test]), float(weights.abs().max()),
        float((weights.abs() < 0.01).float().mean()), float(weights.abs().mean()),
    )  # fmt: skip


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """The digits in an order of their own for each seed, standardized by pixel range."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=generator(derived(seed, "digits")))
    return torch.from_numpy(data.data / 16).float()[order], torch.from_numpy(data.target)[order]


def perceptron(seed: int, dropout: float) -> nn.Sequential:
    """64-256-256-10."""
    with torch.random.fork_rng():
        torch.manual_seed(derived(seed, "perceptron"))
        return nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 10)
        )


def trained(
    network: nn.Sequential, arm: dict[str, Any] | None, images: Tensor, targets: Tensor, rate: float, steps: int, seed: int
) -> nn.Sequential:
    """Trained by SGD with momentum, decay 5e-4 and a cosine schedule, and folded."""
    if arm is not None:
        weight_compander(network, **arm)
    optimizer = torch.optim.SGD(compander_groups(network, lr=rate, weight_decay=5e-4), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.random.fork_rng():
        torch.manual_seed(derived(seed, "dropout"))
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(network(images), targets).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    if arm is not None:
        fold_weight_compander(network)
    return network


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).float().mean())
