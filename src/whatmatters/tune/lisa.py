"""LISA: tune all weights of a model at about LoRA's memory, by training a random few of its layers at a time.

Embedding and head always train; every `interval` optimizer steps a fresh draw of middle layers is unfrozen. Pan, Liu, Diao, Pi, Zhang,
Han, Zhang 2024, arXiv 2403.17919. unit layer · score uniform, or any layer scorer's · allocation n layers, drawn without replacement ·
action freeze all others. The official callback keeps the optimizer state of frozen layers, so that its memory grows to that of full
tuning; the paper means it to be dropped, which is the default here (`state="keep"` is the official one). Draws depend on the seed and the
number of the period alone, so a resumed run goes on as it was and ranks agree.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from whatmatters.core.allocation import probabilities, sample
from whatmatters.core.catalog import method
from whatmatters.core.errors import InputError, ModelError
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import derived, generator
from whatmatters.tune._layers import STATES, Layers

__all__ = ["LISA"]


@method(
    "lisa", paper="2403.17919", job="tune", unit="layer", action="tune", score="uniform, or given",
    allocation="layers drawn by probability", form="callback", needs_text=False, needs_gradients=True,
)  # fmt: skip
class LISA(TrainerCallback):
    """Full-weight tuning of a few random layers at a time: a callback of `transformers.Trainer`, or two calls in a loop of one's own.

    Args:
        n_active: layers that train at a time, from 0 (the ends only) to all.
        interval: optimizer steps between two draws, at least 1.
        weights: how likely layers are drawn: Scores of unit "layer" by block, or one non-negative number a layer; inclusion probabilities
            are proportional to them, capped at one. None: all alike, as in the paper.
        layers: names of the layers; None: the blocks of the model.
        always: beginnings of the names of parameters outside the layers that always train; None: all (embedding, head, norms).
        state: what becomes of the optimizer state of a frozen layer: "drop", "keep" or "offload" (to the CPU).
        unbiased: multiply the learning rate of a drawn layer by one over its probability, so that the mean step is that of full tuning
            (of SGD, exactly). Ours, not the paper's.
        seed: of the draws; equal on all ranks.

    Raises:
        InputError: a number out of range, weights of another length, or Scores of another unit.
        ModelError: at the start of training: no layers, or an optimizer that does not hold all parameters.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with LISA(n_active=1, interval=2).attach(model, optimizer) as lisa:
        ...     for step in range(4):
        ...         lisa.before_step(step)
        ...         model(torch.ones(8, 4)).sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [step for step, _ in lisa.history]
        [0, 2]

    References:
        Pan et al., LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, arXiv 2403.17919,
        algorithm 1.
    """

    def __init__(
        self,
        *,
        n_active: int = 2,
        interval: int = 20,
        weights: Scores | Sequence[float] | None = None,
        layers: Sequence[str] | None = None,
        always: Collection[str] | None = None,
        state: str = "drop",
        unbiased: bool = False,
        seed: int = 0,
    ) -> None:
        if n_active < 0 or interval < 1:
            raise InputError(f"n_active is {n_active} and interval {interval}; expected at least 0 layers and at least 1 step")
        if state not in STATES:
            raise InputError(f"state is {state!r}; expected {', '.join(map(repr, STATES))}")
        if isinstance(weights, Scores) and weights.unit != "layer":
            raise InputError(f"weights are scores of unit {weights.unit!r}; expected unit 'layer', one score a block")
        if weights is not None and not isinstance(weights, Scores) and not all(0 <= w < float("inf") for w in weights):
            raise InputError("weights hold a negative number, NaN or infinity; expected one finite number of at least 0 a layer")
        self.n_active, self.interval, self.weights, self.layers = n_active, interval, weights, None if layers is None else tuple(layers)
        self.always, self.state, self.unbiased, self.seed = always, state, unbiased, seed
        self.history: list[tuple[int, tuple[int, ...]]] = []
        self._layers: Layers | None = None
        self._hooks: list[Any] = []
        self._period: int | None = None

    # A loop of one's own

    def attach(self, model: nn.Module, optimizer: Optimizer) -> "LISA":
        """Take over a model and its optimizer until `detach`; a context manager that ends it."""
        self.detach()
        found = Layers(model, optimizer, names=self.layers, always=self.always, state=self.state)
        if self.n_active > len(found.names):
            raise InputError(f"n_active is {self.n_active}; the model has {len(found.names)} layers")
        self._probabilities = self._inclusion(found)
        self._layers, self._period = found, None
        if self.unbiased:
            before: list[tuple[nn.Parameter, Tensor, float]] = []
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: before.extend(self._before())),
                optimizer.register_step_post_hook(lambda *_: self._after(before)),
            ]
        return self

    def _inclusion(self, found: Layers) -> Tensor:
        """Probability that each layer is drawn; they add up to `n_active`."""
        given = self.weights
        if isinstance(given, Scores):
            lacking = [name for name in found.names if name not in given.values]
            if lacking:
                raise InputError(f"the scores lack {lacking[0]}; reduce them to blocks first: scores.reduce('mean', by='block')")
            given = [float(given.values[name]) for name in found.names]
        if given is not None and len(given) != len(found.names):
            raise InputError(f"{len(given)} weights for {len(found.names)} layers; expected one a layer")
        values = torch.ones(len(found.names)) if given is None else torch.tensor(given, dtype=torch.float64)
        if int((values > 0).sum()) < self.n_active:
            raise InputError(f"{int((values > 0).sum())} layers have a weight above 0, fewer than the {self.n_active} to draw")
        return probabilities(values.double(), self.n_active)

    def drawn(self, period: int) -> tuple[int, ...]:
        """The layers of a period, a function of the seed and the period alone."""
        draw = generator(derived(self.seed, "lisa", period))
        # In a random order every pair of layers can meet: sampling is systematic, and neighbours exclude each other.
        order = torch.randperm(len(self._probabilities), generator=draw)
        chosen = order[sample(self._probabilities[order], self.n_active, generator=draw)]
        return tuple(sorted(chosen.tolist()))

    def before_step(self, step: int) -> None:
        """Call it at the beginning of each optimizer step, before the forward pass; `step` counts optimizer steps from 0."""
        if self._layers is None:
            raise ModelError("LISA has no model yet; call attach(model, optimizer) first")
        period = step // self.interval
        if period != self._period:
            chosen = self.drawn(period)
            self._layers.activate(chosen)
            self.history.append((step, chosen))
            self._period = period

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that train now."""
        return () if self._layers is None or self._layers.active is None else self._layers.active

    def memory(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer state, of the tensors there are now."""
        if self._layers is None:
            raise ModelError("LISA has no model yet; call attach(model, optimizer) first")
        return self._layers.memory()

    def detach(self) -> None:
        """Let everything train that did before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._layers is not None:
            self._layers.restore()
            self._layers = None

    def __enter__(self) -> "LISA":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _before(self) -> list[tuple[nn.Parameter, Tensor, float]]:
        """Active layers' parameters before a step, and by how much their step is to be longer."""
        assert self._layers is not None  # hooks live from attach to detach
        return [
            (p, p.detach().clone(), 1 / float(self._probabilities[index]) - 1)
            for index in self.active_layers for p in self._layers.parameters[index]
        ]  # fmt: skip

    @staticmethod
    def _after(before: list[tuple[nn.Parameter, Tensor, float]]) -> None:
        with torch.no_grad():
            for parameter, was, more in before:
                parameter.add_(parameter - was, alpha=more)
        before.clear()

    # transformers.Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the model and its optimizer."""
        optimizer = kwargs["optimizer"]
        self.attach(kwargs["model"], getattr(optimizer, "optimizer", optimizer))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw where a period begins."""
        self.before_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model back."""
        self.detach()
