"""RankMe: one number, without labels, that tells how many directions of an embedding are really used.

Give the embeddings of several self-supervised runs of one method and keep the run with the highest value; a value near one is a collapse.
Garrido, Balestriero, Najman, LeCun 2022, arXiv 2210.02885. unit component (a singular direction) · score share of the singular values ·
allocation none: the entropy of the shares · action rank runs. There is no official code; the formula is the paper's, epsilon included.
Not a thing to optimise: a loss that raises the rank raises this number with nothing gained.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from whatmatters.core.catalog import door, method
from whatmatters.core.errors import InputError, ModelError
from whatmatters.represent.spectrum import EPS, Matrix, RankMeAccumulator, Spectrum, check_eps, spectrum

__all__ = ["RankMeCallback", "rankme", "rankme_from_model", "select_by_rankme"]

K = TypeVar("K")


@method(
    "rankme", paper="2210.02885", job="represent", unit="component", action="rank runs", score="share of the singular values",
    allocation="entropy of the shares", form="measure", needs_text=False,
)  # fmt: skip
def rankme(Z: Matrix | Iterable[Matrix], *, eps: float = EPS, center: bool = False, route: str = "auto") -> float:
    """Effective rank of an embedding matrix: how many directions it really uses, from 1 (collapsed) to min(N, K).

    Args:
        Z: embeddings (N, K), tensor or array, any real dtype; or an iterable of such batches, which is streamed. The paper takes 25,600
            samples of the training set at the projector's output, in evaluation mode.
        eps: what is added to each share of the singular values, at least 0.
        center: subtract the mean row first; the paper does not.
        route: "svd", "gram" or "auto", as in `spectrum`.

    Returns:
        exp of the entropy of the singular values' shares; 0 for a matrix of zeros.

    Raises:
        InputError: not a matrix, fewer than 2 rows or columns, an unknown route, a negative eps.
        NonFiniteError: NaN or infinity; the message tells how many rows.

    Example:
        >>> import torch
        >>> round(rankme(torch.eye(4).repeat(8, 1)), 3)
        4.0

    References:
        Garrido et al., RankMe: Assessing the downstream performance of pretrained self-supervised representations by their rank,
        arXiv 2210.02885, equations 1 and 2.
    """
    return spectrum(Z, eps=eps, center=center, route=route).rankme


@door("represent.rankme_from_model")
def rankme_from_model(
    model: nn.Module, batches: Iterable[Any], *, layer: str | None = None, samples: int = 25_600, eps: float = EPS, center: bool = False
) -> Spectrum:
    """Spectrum of what a layer of a model gives out, in evaluation mode and float32, until enough samples are seen.

    Args:
        model: any torch module; its modes are left as they were.
        batches: what the model is called with, one by one: a tensor, or a mapping of keyword arguments.
        layer: name of the module whose output (n, K) is measured; None: the model's own output.
        samples: rows that are enough.
        eps: what RankMe adds to each share.
        center: measure around the mean.

    Returns:
        The spectrum.

    Raises:
        ModelError: no layer of that name.
        InputError: the layer's output is not a matrix, or fewer than 2 rows came.

    Example:
        >>> import torch
        >>> found = rankme_from_model(torch.nn.Identity(), torch.eye(4).repeat(8, 1).split(8))
        >>> round(found.rankme, 3)
        4.0
    """
    collected = RankMeAccumulator(center=center, eps=eps)
    modes = {m: m.training for m in model.modules()}
    hook = _layer(model, layer).register_forward_hook(lambda module, args, output: collected.update(_rows(output)))
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                _ = model(**batch) if isinstance(batch, Mapping) else model(batch)
                if collected.samples >= samples:
                    break
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    return collected.compute()


def _layer(model: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        return model
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no layer {name!r} ({error}); model.named_modules() lists them") from error


def _rows(output: Any) -> Tensor:
    """The tensor of a layer's output."""
    found = output if isinstance(output, Tensor) else output[0]
    return found.detach()


@door("represent.select_by_rankme")
def select_by_rankme(ranks: Mapping[K, float], *, plateau: float = 0.01, prefer: str = "first") -> K:
    """The setting to keep from a sweep of one hyperparameter: the highest RankMe, at one end of its plateau (the paper's section 4).

    Args:
        ranks: RankMe by setting, in the order of the sweep; all of one method, architecture, width and number of samples.
        plateau: settings within this share of the highest count as equal, 0 to 1.
        prefer: which end of those to take: the side from which the rank begins to fall is for the user to say.

    Returns:
        The setting.

    Raises:
        InputError: no settings, a value that is not finite, a plateau out of range, or another `prefer`.

    Example:
        >>> select_by_rankme({0.1: 10.0, 1.0: 30.0, 10.0: 29.9, 100.0: 12.0}, prefer="last")
        10.0
    """
    if not ranks or not all(math.isfinite(value) for value in ranks.values()):
        raise InputError(f"ranks are {dict(ranks)}; expected at least one setting, each with a finite value")
    if not 0 <= plateau <= 1:
        raise InputError(f"plateau is {plateau}; expected a share between 0 and 1")
    if prefer not in ("first", "last"):
        raise InputError(f"prefer is {prefer!r}; expected 'first' or 'last'")
    highest = max(ranks.values())
    equal = [setting for setting, value in ranks.items() if value >= highest * (1 - plateau)]
    return equal[0] if prefer == "first" else equal[-1]


class RankMeCallback(TrainerCallback):
    """RankMe of a layer while a model trains, over the newest outputs: a collapse is seen when it happens.

    Works as a `transformers.Trainer` callback (the value is put into the Trainer's logs as "rankme") and in a loop of one's own. The layer
    is listened to in training mode, which is what costs nothing; compare its values with each other only.

    Args:
        layer: name of the module whose output (n, K) is measured; None: the model's own output.
        every: steps between two values, at least 1.
        rows: newest outputs that are kept, at least 2.
        eps: what RankMe adds to each share.
        center: measure around the mean.

    Raises:
        InputError: every or rows too small.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> watcher = RankMeCallback(every=2, rows=16)
        >>> with watcher.watch(model):
        ...     for _ in range(4):
        ...         _ = model(torch.eye(4).repeat(4, 1))
        ...         _ = watcher.step()
        >>> [step for step, _ in watcher.history]
        [2, 4]
    """

    def __init__(self, *, layer: str | None = None, every: int = 100, rows: int = 2048, eps: float = EPS, center: bool = False) -> None:
        if every < 1 or rows < 2:
            raise InputError(f"every is {every} and rows is {rows}; expected at least 1 step and 2 rows")
        self.layer, self.every, self.rows, self.eps, self.center = layer, every, rows, check_eps(eps), center
        self.history: list[tuple[int, float]] = []
        self.steps = 0
        self._kept: list[Tensor] = []
        self._hook: Any = None

    def watch(self, model: nn.Module) -> "RankMeCallback":
        """Begin to listen; a context manager that ends it."""
        self._unhook()
        self._hook = _layer(model, self.layer).register_forward_hook(self._keep)
        return self

    def __enter__(self) -> "RankMeCallback":
        return self

    def __exit__(self, *error: object) -> None:
        self._unhook()

    def step(self) -> float | None:
        """Count a step; every `every` steps the value, which is also added to `history`."""
        self.steps += 1
        return self._measure(self.steps) if self.steps % self.every == 0 else None

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._kept.append(_rows(output).float().cpu())
        while sum(map(len, self._kept)) - len(self._kept[0]) >= self.rows:
            del self._kept[0]

    def _measure(self, step: int) -> float:
        if not self._kept:
            raise ModelError(f"layer {self.layer!r} gave nothing out before step {step}; name one that the model calls")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newest rows are few by intent
            value = spectrum(torch.cat(self._kept)[-self.rows :], eps=self.eps, center=self.center).rankme
        self.history.append((step, value))
        return value

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._kept = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to listen."""
        self.watch(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` optimizer steps."""
        if state.global_step % self.every == 0:
            self._measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put the newest value into the logs, and into the history, which the Trainer has written by now."""
        if self.history:
            for place in (logs, state.log_history[-1] if state.log_history else None):
                if place is not None:
                    place["rankme"] = self.history[-1][1]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self._unhook()
