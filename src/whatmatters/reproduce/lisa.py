"""LISA against full tuning, the ends alone, and LoRA: a small transformer moves to another domain of digits.

Eight rows of an 8x8 digit are eight tokens. Six layers learn 900 upright digits, then 400 inverted and rotated ones. Every arm chooses its
learning rate on validation images of the new domain; accuracy is of other images, of the new domain and of the old one; bytes are those of
live optimizer tensors.
"""

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from whatmatters.core.errors import InputError
from whatmatters.core.progress import Progress, track
from whatmatters.core.seeds import derived, generator
from whatmatters.reproduce._common import Experiment, below, certain
from whatmatters.reproduce._desk import check_seeds
from whatmatters.tune import LISA

DIFFERENCES = (
    "a transformer of 0.2M parameters on digits in place of 2 to 70 billion on instructions; accuracy in place of MT-Bench",
    "six layers, so that one active layer is a sixth of them; the paper's is a sixteenth and less",
    "the always-training ends are 1 % of the weights here, 4 % in LLaMA-2-7B",
    "no run on a public model: `model` is not used",
)
STEPS = {"smoke": 4, "desk": 300, "gpu": 3000}
RATES = (3e-4, 1e-3, 3e-3)
LAYERS, WIDTH, BATCH, INTERVAL, RANK = 6, 64, 32, 10, 4
PRETRAIN, TUNE, VALIDATION = 900, 400, 150


@dataclass(frozen=True)
class Outcome:
    """One tuned model: the rate it chose, accuracy on the new and the old domain, and the most bytes of optimizer state and gradients."""

    rate: float
    new: float
    old: float
    state_bytes: int
    gradient_bytes: int


class Digits(nn.Module):
    """Rows of a digit as tokens, a pre-norm encoder, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(torch.randn(8, WIDTH) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True) for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class LowRank(nn.Module):
    """LoRA's update of a weight: W + B A, B zero at the start."""

    def __init__(self, weight: Tensor, draw: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(RANK, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def run(
    *,
    model: str | os.PathLike[str] | None = None,
    scale: str = "desk",
    seeds: int = 4,
    output: Path = Path("evidence"),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiment and write `output/lisa.json`.

    Args:
        model: not used by this experiment; refused if given.
        scale: "desk" for minutes on two cores, "gpu" for longer training, "smoke" for seconds.
        seeds: pretrained models, at least 3; 4 are taken where fewer are asked for at the desk scale.
        output: folder of the evidence.
        progress: told after each arm.

    Returns:
        The evidence.

    Raises:
        InputError: fewer than 3 seeds, or a model.
    """
    if model is not None:
        raise InputError("the experiment on lisa trains its own models; leave out --model")
    draws = check_seeds(seeds if scale == "smoke" else max(seeds, 4))
    with Experiment("lisa", seeds=draws, differences=DIFFERENCES) as experiment:
        exact(experiment)
        arithmetic(experiment)
        jobs = [(seed, arm) for seed in draws for arm in ARMS]
        pretrained: dict[int, Digits] = {}
        found: dict[str, list[Outcome]] = {arm: [] for arm in ARMS}
        for seed, arm in track(jobs, "arms", len(jobs), progress):
            if seed not in pretrained:
                pretrained[seed] = learned(seed, STEPS[scale])
            found[arm].append(chosen(pretrained[seed], arm, seed, STEPS[scale]))
        judge(experiment, found, pretrained)
    experiment.write(output, sys.modules[__name__])
    return experiment.record(sys.modules[__name__])


def exact(experiment: Experiment) -> None:
    """All layers at a time, with their state kept, is AdamW."""
    images, labels = domain(0, rotated=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Digits()
    full, ours = copy.deepcopy(start), copy.deepcopy(start)
    tuned(full, "full", 1e-3, images[:TUNE], labels[:TUNE], 30, 0)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    with LISA(n_active=LAYERS, interval=7, state="keep").attach(ours, optimizer) as lisa:
        loop(ours, optimizer, images[:TUNE], labels[:TUNE], 30, 0, lisa.before_step)
    unequal = sum(int((p != q).sum()) for p, q in zip(full.parameters(), ours.parameters(), strict=True))
    claim = "all layers at a time with kept state is AdamW on all parameters: weights that differ after 30 steps"
    experiment.claims.append(certain(claim, "exact", unequal == 0, unequal))


def arithmetic(experiment: Experiment) -> None:
    """Bytes for LLaMA-2-7B in 16 bits: embedding, head, final norm and two of 32 layers, against all."""
    width, wide, vocabulary, layers = 4096, 11008, 32000, 32
    layer = 4 * width * width + 3 * width * wide + 2 * width
    ends = 2 * vocabulary * width + width
    total = ends + layers * layer
    active = ends + 2 * layer
    experiment.results["llama_2_7b"] = {"parameters": total, "active": active, "state_bytes_float32": 8 * active, "full": 8 * total}
    experiment.claims.append(certain("LLaMA-2-7B has 6,738,415,616 parameters", "arithmetic", total == 6_738_415_616, total))
    share = active / total
    experiment.claims.append(certain("two of its 32 layers and the ends: below a tenth of its state", "arithmetic", share < 0.1, share))
    ours, full = (2 * total + (2 + 4) * trained for trained in (active, total))
    claim = "weights, gradients and moments in 16 bits: LISA with two layers is below 24 GB, full tuning above it"
    experiment.claims.append(certain(claim, "arithmetic", ours < 24e9 < full, ours / 1e9))


def judge(experiment: Experiment, found: dict[str, list[Outcome]], pretrained: dict[int, Digits]) -> None:
    """The sheet's ordering, paired over pretrained models."""
    experiment.results["arms"] = {arm: [vars(o) for o in outcomes] for arm, outcomes in found.items()}
    experiment.results["before_tuning"] = [
        {"new": accuracy(model, *judged(seed, rotated=True)), "old": accuracy(model, *judged(seed, rotated=False))}
        for seed, model in pretrained.items()
    ]
    new = {arm: [o.new for o in outcomes] for arm, outcomes in found.items()}

    def differences(a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(new[a], new[b], strict=True)]

    for less, more, bound, words in (
        ("ends", "lisa 1", 0.0, "the ends alone are less accurate than LISA with one layer"),
        ("lisa 1", "lisa 2", 0.01, "LISA with one layer is less than a point more accurate than with two"),
        ("full", "lisa 2", 0.02, "full tuning is less than two points more accurate than LISA with two layers"),
        ("lora", "lisa 2", 0.0, "LoRA is less accurate than LISA with two layers (the paper's claim)"),
    ):
        experiment.claims.append(below(f"{words}: difference of accuracy on the new domain", "desk", differences(less, more), bound))
    for arm in ("lisa 1", "lisa 2"):
        shares = [a.state_bytes / b.state_bytes for a, b in zip(found[arm], found["full"], strict=True)]
        experiment.claims.append(below(f"{arm}: most bytes of optimizer state, to full tuning's, below a half", "desk", shares, 0.5))
        forgotten = [b.old - a.old for a, b in zip(found[arm], found["full"], strict=True)]
        experiment.claims.append(below(f"{arm} forgets the old domain less than full tuning (accuracy)", "desk", forgotten, 0))


# Data, training


def domain(seed: int, *, rotated: bool) -> tuple[Tensor, Tensor]:
    """All digits but those of pretraining, (n, 8 rows, 8), in an order for each seed; inverted and turned by a quarter if asked."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=generator(derived(seed, "lisa digits")))[PRETRAIN:]
    images = torch.from_numpy(data.images / 16).float()[order]
    return (1 - images).rot90(1, (1, 2)) if rotated else images, torch.from_numpy(data.target)[order]


def judged(seed: int, *, rotated: bool) -> tuple[Tensor, Tensor]:
    """Images that neither training nor the choice of a rate has seen."""
    images, labels = domain(seed, rotated=rotated)
    return images[TUNE + VALIDATION :], labels[TUNE + VALIDATION :]


def learned(seed: int, steps: int) -> Digits:
    """A model that knows upright digits."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=generator(derived(seed, "lisa digits")))[:PRETRAIN]
    images, labels = torch.from_numpy(data.images / 16).float()[order], torch.from_numpy(data.target)[order]
    with torch.random.fork_rng():
        torch.manual_seed(derived(seed, "lisa model"))
        model = Digits()
    loop(model, torch.optim.AdamW(model.parameters(), lr=1e-3), images, labels, steps, seed, lambda step: None)
    return model


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int, seed: int,
    before: Callable[[int], object], after: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """The five lines."""
    draw = generator(derived(seed, "lisa batches"))
    for step in range(steps):
        before(step)
        batch = torch.randint(len(images), (BATCH,), generator=draw)
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        after()
        optimizer.step()
        optimizer.zero_grad()


def tuned(model: nn.Module, arm: str, rate: float, images: Tensor, labels: Tensor, steps: int, seed: int) -> tuple[int, int]:
    """Tune in place; the most bytes of optimizer state and of gradients that were seen."""
    most = [0, 0]
    lisa: LISA | None = None
    if arm == "lora":
        draw = generator(derived(seed, "lora"))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.layers:  # type: ignore[union-attr]
            for module, key in ((layer.self_attn, "in_proj_weight"), (layer.self_attn.out_proj, "weight"), (layer.linear1, "weight"),
                                (layer.linear2, "weight")):  # fmt: skip
                parametrize.register_parametrization(module, key, LowRank(getattr(module, key), draw))
        for part in (model.embed, model.head):
            for parameter in part.parameters():  # type: ignore[union-attr]
                parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    if arm == "ends" or arm.startswith("lisa"):
        active = 0 if arm == "ends" else int(arm.split()[1])
        lisa = LISA(n_active=active, interval=INTERVAL, seed=seed).attach(model, optimizer)

    def measure() -> None:
        held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        most[0] = max(most[0], sum(v.nbytes for v in held))
        most[1] = max(most[1], sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    loop(model, optimizer, images, labels, steps, seed, lisa.before_step if lisa else lambda step: None, measure)
    if lisa is not None:
        lisa.detach()
    return most[0], most[1]


ARMS = ("full", "ends", "lisa 1", "lisa 2", "lora")


def chosen(pretrained: Digits, arm: str, seed: int, steps: int) -> Outcome:
    """The arm tuned at each rate; the one that is best on validation images, judged on test images."""
    images, labels = domain(seed, rotated=True)
    check = slice(TUNE, TUNE + VALIDATION)
    best: tuple[float, Outcome] | None = None
    for rate in RATES:
        model = copy.deepcopy(pretrained)
        state, gradients = tuned(model, arm, rate, images[:TUNE], labels[:TUNE], steps, seed)
        score = accuracy(model, images[check], labels[check])
        if best is None or score > best[0]:
            outcome = Outcome(
                rate, accuracy(model, *judged(seed, rotated=True)), accuracy(model, *judged(seed, rotated=False)), state, gradients
            )
            best = (score, outcome)
    assert best is not None  # there are rates
    return best[1]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
