"""RankMe's claim on small self-supervised runs: does a label-free rank find the runs that a labelled probe finds?

VICReg and SimCLR encoders are trained on scikit-learn's digits (which every machine has), RankMe is read from the projector's output, and
a linear probe judges by labels: on the projector's output, on the representation before it, and on digits of another source (MNIST, where
the shared data are at hand). The baseline is alpha-ReQ; the oracle is the probe itself.
"""

import itertools
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from whatmatters.core.errors import InputError
from whatmatters.core.progress import Progress, track
from whatmatters.core.seeds import derived, generator
from whatmatters.represent import rankme, select_by_rankme, spectrum
from whatmatters.reproduce._common import Experiment, below, certain
from whatmatters.reproduce._desk import check_seeds, shared_data

DIFFERENCES = (
    "8x8 digits and encoders of 50,000 parameters in place of ImageNet and ResNet-50; 20 epochs; a projector of 64 outputs",
    "the other source is MNIST at 8x8 in place of iNaturalist, Places205 and others",
    "a probe on the representation saturates here (all runs within two points), so the paper's main claim can hardly be seen on it",
)
VICREG = [("vicreg", inv, cov) for inv in (25.0, 200.0) for cov in (0.0, 0.1, 1.0, 10.0)]
"""Sweep of VICReg: weight of the invariance, weight of the covariance term; the variance term's weight is 25."""
SIMCLR = [("simclr", tau, 0.0) for tau in (0.02, 0.1, 0.5, 2.0)]
EPOCHS = {"smoke": 1, "desk": 20, "gpu": 200}
BATCH = 128


@dataclass(frozen=True)
class Run:
    """One trained encoder: its setting, RankMe and alpha-ReQ of the projector's output, and probes by labels (shares of right answers)."""

    family: str
    strength: float
    covariance: float
    rank: float
    alpha: float
    probe_projector: float
    probe_representation: float
    probe_other: float | None


def run(
    *,
    model: str | os.PathLike[str] | None = None,
    scale: str = "desk",
    seeds: int = 3,
    output: Path = Path("evidence"),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiment and write `output/rankme.json`.

    Args:
        model: not used by this experiment; refused if given.
        scale: "desk" for minutes on two cores, "gpu" for longer training, "smoke" for seconds.
        seeds: trained copies of each setting, at least 3.
        output: folder of the evidence.
        progress: told after each trained encoder.

    Returns:
        The evidence.

    Raises:
        InputError: fewer than 3 seeds, or a model.
    """
    if model is not None:
        raise InputError("the experiment on rankme trains its own encoders; leave out --model")
    draws = check_seeds(seeds)
    with Experiment("rankme", seeds=draws, differences=DIFFERENCES) as experiment:
        exact(experiment)
        planted(experiment)
        sweep = VICREG[::3] if scale == "smoke" else VICREG + SIMCLR
        jobs = [(seed, setting) for seed in draws for setting in sweep]
        done = [(seed, trained(seed, *setting, EPOCHS[scale])) for seed, setting in track(jobs, "encoders", len(jobs), progress)]
        desk(experiment, {seed: [r for s, r in done if s == seed] for seed in draws})
    experiment.write(output, sys.modules[__name__])
    return experiment.record(sys.modules[__name__])


def exact(experiment: Experiment) -> None:
    """Closed forms."""
    values = np.array([0.8**k for k in range(24)])
    left = torch.linalg.qr(torch.randn(400, 24, generator=generator(0), dtype=torch.float64))[0]
    Z = left * torch.from_numpy(values)
    error = max(abs(rankme(Z, eps=0.0, route=route) / math.exp(stats.entropy(values)) - 1) for route in ("svd", "gram"))
    experiment.claims.append(
        certain("equals exp of scipy's entropy of the singular values, SVD and streamed: 1e-9", "exact", error < 1e-9, error)
    )
    zeros = torch.zeros(8192, 2048)
    zeros[0, 0] = zeros[1, 1] = 1.0
    error = abs(rankme(zeros) - 2 * math.exp(-2046 * 1e-7 * math.log(1e-7)))
    experiment.claims.append(
        certain("epsilon adds its closed form r exp(-m eps ln eps): 2.0066 for r 2, m 2046", "exact", error < 2e-6, error)
    )


def planted(experiment: Experiment) -> None:
    """Representations of known rank: the pixels of the digits, cut to their first k principal directions."""
    (train, labels), (test, answers) = digits()
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False)[2]
    ranks, probes = [], []
    kept = (1, 2, 3, 5, 8, 12, 20, 40)
    for k in kept:
        low = (train - mean) @ directions[:k].T
        ranks.append(rankme(low @ directions[:k], center=True))
        probes.append(probe(low, labels, (test - mean) @ directions[:k].T, answers))
    experiment.results["truncated_pixels"] = {"kept": kept, "rankme": ranks, "probe": probes}
    increasing = all(a < b for row in (ranks, probes) for a, b in itertools.pairwise(row))
    experiment.claims.append(
        certain(
            "pixels cut to k principal directions: RankMe and the probe both rise with k, eight values", "planted", increasing, ranks[-1]
        )
    )


def desk(experiment: Experiment, runs: dict[int, list[Run]]) -> None:
    """Trained encoders: correlation inside a family, and what choosing by RankMe costs against choosing by labels."""
    experiment.results["runs"] = {str(seed): [vars(r) for r in found] for seed, found in runs.items()}
    inside = {seed: [r for r in found if r.family == "vicreg"] for seed, found in runs.items()}
    collapse = [
        math.log(
            next(r.rank for r in found if (r.strength, r.covariance) == (25.0, 0.0)) / max(r.rank for r in found if r.strength == 25.0)
        )
        for found in inside.values()
    ]
    experiment.claims.append(
        below(
            "without a covariance term VICReg collapses: log ratio of RankMe to that of the best run below log 1/3",
            "desk",
            collapse,
            math.log(1 / 3),
        )
    )
    for target, name in (("probe_projector", "the same output"), ("probe_representation", "the representation"), ("probe_other", "MNIST")):
        if any(getattr(r, target) is None for found in inside.values() for r in found):
            continue
        bound = 0.9 if target == "probe_projector" else 0.5
        correlations = [-spearman([r.rank for r in found], [getattr(r, target) for r in found]) for found in inside.values()]
        claim = f"VICReg: minus the rank correlation of RankMe with a probe on {name}, below -{bound}"
        experiment.claims.append(below(claim, "desk", correlations, -bound))
        for family in ("vicreg", "simclr"):
            lost, other = [], []
            for found in runs.values():
                mine = [r for r in found if r.family == family]
                if mine:
                    chosen = select_by_rankme({i: r.rank for i, r in enumerate(mine)})
                    scores = [getattr(r, target) for r in mine]
                    nearest = min(range(len(mine)), key=lambda i: abs(mine[i].alpha - 1) if math.isfinite(mine[i].alpha) else math.inf)
                    lost.append(max(scores) - scores[chosen])
                    other.append(scores[nearest] - scores[chosen])
            if len(lost) >= 3:
                experiment.claims.append(
                    below(f"{family}: the run chosen by RankMe is less than a point below the best by labels on {name}", "desk", lost, 0.01)
                )
                experiment.claims.append(
                    below(
                        f"{family}: the run chosen by alpha-ReQ (alpha nearest 1) is not better than RankMe's on {name} by a point",
                        "desk",
                        other,
                        0.01,
                    )
                )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(stats.spearmanr(a, b).statistic)


# Data, training, probes


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,300 images to learn from and 497 to judge, (samples, 64) in 0 to 1, with labels."""
    data = load_digits()
    images, labels = torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=generator(0))
    first, rest = order[:1300], order[1300:]
    return (images[first], labels[first]), (images[rest], labels[rest])


def other_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """MNIST's digits at 8x8, 3,000 to fit a probe and 3,000 to judge it; None where the shared data are absent."""
    folder = shared_data()
    files = sorted((folder / "mnist").glob("*.npz")) if folder is not None else []
    if not files:
        return None
    held = np.load(files[0], allow_pickle=False)
    images = functional.adaptive_avg_pool2d(torch.from_numpy(held["images"]).float()[:, None] / 255, 8).flatten(1)
    labels = torch.from_numpy(held["labels"]).long()
    order = torch.randperm(len(images), generator=generator(1))
    first, rest = order[:3000], order[3000:6000]
    return (images[first], labels[first]), (images[rest], labels[rest])


def probe(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor) -> float:
    """Share of right answers of a logistic regression on standardized features."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a collapsed encoder's probe need not converge
        fitted = LogisticRegression(max_iter=300).fit(((train - mean) / std).numpy(), labels.numpy())
    return float(fitted.score(((test - mean) / std).numpy(), answers.numpy()))


def views(images: Tensor, draw: torch.Generator) -> Tensor:
    """One random view of each image: shift by at most one pixel, brightness, noise."""
    square = functional.pad(images.view(-1, 8, 8), (1, 1, 1, 1))
    down = torch.randint(3, (len(images),), generator=draw)
    across = torch.randint(3, (len(images),), generator=draw)
    rows = (down[:, None] + torch.arange(8))[:, :, None]
    columns = (across[:, None] + torch.arange(8))[:, None, :]
    shifted = square[torch.arange(len(images))[:, None, None], rows, columns].flatten(1)
    brightness = 0.7 + 0.6 * torch.rand(len(images), 1, generator=draw)
    return shifted * brightness + 0.1 * torch.randn(shifted.shape, generator=draw)


def vicreg_loss(a: Tensor, b: Tensor, invariance: float, covariance: float) -> Tensor:
    """Bardes et al. 2022, with a variance term of weight 25."""
    loss = invariance * functional.mse_loss(a, b)
    for z in (a, b):
        around = z - z.mean(0)
        cov = around.T @ around / (len(z) - 1)
        loss = loss + 25 * functional.relu(1 - (around.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + covariance * (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1] / 2
    return loss


def simclr_loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent, Chen et al. 2020."""
    z = functional.normalize(torch.cat([a, b]))
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(z)).roll(len(a))
    return functional.cross_entropy(logits, partner)


def trained(seed: int, family: str, strength: float, covariance: float, epochs: int) -> Run:
    """Train one encoder and measure it; labels are seen by the probes only."""
    (train, labels), (test, answers) = digits()
    with torch.random.fork_rng():
        torch.manual_seed(derived(seed, "rankme", family, strength, covariance))
        encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        projector = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    draw = generator(derived(seed, "views", family, strength, covariance))
    optimizer = torch.optim.Adam([*encoder.parameters(), *projector.parameters()], lr=1e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=draw)].split(BATCH)[:-1]:
            a, b = projector(encoder(views(batch, draw))), projector(encoder(views(batch, draw)))
            loss = vicreg_loss(a, b, strength, covariance) if family == "vicreg" else simclr_loss(a, b, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        h_train, h_test = encoder(train), encoder(test)
        z_train, z_test = projector(h_train), projector(h_test)
        found = spectrum(z_train)
        far = other_digits()
        elsewhere = None if far is None else probe(encoder(far[0][0]), far[0][1], encoder(far[1][0]), far[1][1])
    return Run(
        family, strength, covariance, found.rankme, found.alpha_req, probe(z_train, labels, z_test, answers),
        probe(h_train, labels, h_test, answers), elsewhere,
    )  # fmt: skip
