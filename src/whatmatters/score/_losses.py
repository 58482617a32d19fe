"""Losses of a language model on calibration data: whole, with gradients, from one block on, and with some of its weights damaged."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional

from whatmatters.core.data import Calibration, call_model, check_fits, logits
from whatmatters.core.errors import DataError, InputError, InputTypeError, ModelError, NonFiniteError
from whatmatters.core.evaluate import judging
from whatmatters.core.grids import GridSettings, rounded
from whatmatters.core.sites import Site, Structure, replaced_forward

GROUP_SIZE = 128


class _Stop(Exception):
    """The forward pass has given what was wanted of it."""


def sequence_nats(
    output: Float[Tensor, "samples length vocabulary"], inputs: Int64[Tensor, "samples length"], valid: Tensor | None
) -> tuple[Float64[Tensor, " samples"], Int64[Tensor, " samples"]]:
    """Negative log-likelihood of each sequence, summed over the tokens that have one before them, and how many those are."""
    targets = inputs[:, 1:].to(output.device)
    scores = output[:, :-1]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    nats = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    judged = torch.ones_like(targets, dtype=torch.bool)
    if valid is not None:
        judged = (valid[:, 1:] & valid[:, :-1]).to(output.device)
    return (nats.double() * judged).sum(1), judged.sum(1)


def check_language(model: nn.Module, calibration: Calibration) -> None:
    """Raise DataError unless the data are token ids that this model can be given and that have something to predict."""
    if calibration.inputs.dtype != torch.int64:
        raise DataError(f"inputs are {calibration.inputs.dtype}; the loss of a language model needs int64 token ids")
    check_fits(model, calibration)
    valid = calibration.valid
    if calibration.inputs.shape[1] < 2 or (valid is not None and not bool((valid[:, 1:] & valid[:, :-1]).any())):
        raise DataError("no token has another before it, so there is no loss to measure: give longer text")


@contextmanager
def gradients(model: nn.Module, parameters: Sequence[str]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Evaluation mode with gradients for some parameters only; yields the function that takes a loss and gives theirs.

    Nothing is accumulated in `.grad`. On the way out, also after a raise, every parameter requires a gradient or not as before.
    """
    wanted = [model.get_parameter(name) for name in parameters]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with judging(model), torch.enable_grad():
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            for parameter in wanted:
                parameter.requires_grad_(True)
            yield lambda loss: [
                g if g is not None else torch.zeros_like(p)
                for g, p in zip(torch.autograd.grad(loss, wanted, allow_unused=True), wanted, strict=True)
            ]
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)


@dataclass(frozen=True)
class Documents:
    """How the samples of a text make up its documents, or windows where there is only one document.

    Attributes:
        index: document of each sample, counted from 0.
        counts: judged tokens of each document.
        unit: "document" or "window".
    """

    index: Int64[np.ndarray, " samples"]
    counts: Int64[np.ndarray, " documents"]
    unit: str

    @classmethod
    def of(cls, text: Calibration) -> "Documents":
        """The documents of a text."""
        names, index = np.unique(text.document.numpy(), return_inverse=True)
        unit = "document"
        if len(names) == 1:
            index, unit = np.arange(len(text)), "window"
        judged = torch.full((len(text),), text.inputs.shape[1] - 1)
        if text.valid is not None:
            judged = (text.valid[:, 1:] & text.valid[:, :-1]).sum(1)
        counts = np.bincount(index, weights=judged.numpy()).astype(np.int64)
        return cls(index.astype(np.int64), counts, unit)

    def sums(self, nats: Float64[Tensor, " samples"]) -> Float64[np.ndarray, " documents"]:
        """Nats of each document from those of each sample."""
        return np.bincount(self.index, weights=nats.numpy(), minlength=len(self.counts))


class FromBlock:
    """A language model run from one block on, given the inputs which that block has in the intact model.

    What is damaged in a block cannot change what comes before it, so only the rest is run again. The inputs of one block are held at a
    time. Use inside `judging(model)`.

    Args:
        model: a causal language model whose blocks form a chain.
        blocks: their names.
        text: token windows.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], text: Calibration) -> None:
        check_language(model, text)
        self.model = model
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.names = list(blocks)
        self.batches = list(text.batches())
        self.index = 0
        self._inputs: list[Tensor] = []
        self._tuples = False
        self._first: Float64[Tensor, " samples"] | None = None

    def nats(self, number: int) -> tuple[Float64[Tensor, " samples"], Int64[Tensor, " samples"]]:
        """Nats and judged tokens of each sample of a micro-batch, with the weights as they are now; raises NonFiniteError."""
        ids, valid = self.batches[number]
        with self._from_block(number):
            output = logits(self.model, ids, valid)
        nats, counts = sequence_nats(output, ids, valid)
        if not torch.isfinite(nats).all():
            raise NonFiniteError(
                f"the loss of micro-batch {number} is NaN or infinite; the model's activations overflow, or a weight is NaN"
            )
        return nats.cpu(), counts.cpu()

    def all_nats(self) -> Float64[Tensor, " samples"]:
        """Nats of every sample."""
        return torch.cat([self.nats(number)[0] for number in range(len(self.batches))])

    def advance(self) -> None:
        """Go on to the next block; raises ModelError if the blocks do not form a chain."""
        if self._first is None:
            self._first = self.nats(0)[0]
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._tuples = not isinstance(output, Tensor)
            inputs.append(output[0] if self._tuples else output)
            raise _Stop

        handle = self.blocks[self.index].register_forward_hook(keep)
        try:
            for number, (ids, valid) in enumerate(self.batches):
                with self._from_block(number):
                    try:
                        call_model(self.model, ids, valid)
                    except _Stop:
                        continue
                raise ModelError(f"{self.names[self.index]} is not run in a forward pass; expected every block to be")
        finally:
            handle.remove()
        self._inputs, self.index = inputs, self.index + 1
        if not torch.allclose(self.nats(0)[0], self._first, rtol=1e-4, atol=1e-6):
            raise ModelError(
                f"run from {self.names[self.index]} on, {type(self.model).__name__} has another loss: its blocks do not form a chain; "
                "expected each block to take nothing from other blocks than the output of the one before it"
            )

    @contextmanager
    def _from_block(self, number: int) -> Iterator[None]:
        if self.index == 0:
            yield
            return
        hidden = self._inputs[number]
        with replaced_forward(self.blocks[: self.index], lambda *args, **kwargs: (hidden,) if self._tuples else hidden):
            yield


@contextmanager
def damaged(model: nn.Module, sites: Iterable[Site], change: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """Replace the weights of some sites by `change(site, weight)`; the very same bits are put back, also after a raise."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for site in sites:
            weight = site.view(model)
            new = change(site, weight)
            before.append((weight, weight.clone()))
            weight.copy_(new)
        yield
    finally:
        for weight, original in before:
            weight.copy_(original)


@contextmanager
def skipped(model: nn.Module, name: str) -> Iterator[None]:
    """Leave a block out: its input is its output, in the form that its output has."""
    block = model.get_submodule(name)
    forward = block.forward

    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        first = output if isinstance(output, Tensor) else output[0]
        if first.shape != hidden.shape:
            raise ModelError(f"{name} turns {tuple(hidden.shape)} into {tuple(first.shape)}; it cannot be skipped: use damage='quantize'")
        return hidden if isinstance(output, Tensor) else (hidden,)

    with replaced_forward([block], identity):
        yield


@dataclass(frozen=True)
class Rounding:
    """How sites are rounded to the nearest, for measuring what it costs.

    Attributes:
        group_size: inputs that share a scale; -1: one scale per output channel; None: 128 where that divides a site's inputs, else -1.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
    """

    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool = True

    def check(self, found: Structure, levels: Sequence[int]) -> None:
        """Raise InputError, naming the first site, unless the group size divides its inputs and the levels can be rounded to."""
        for bits in levels:
            if isinstance(bits, bool) or not isinstance(bits, int):
                raise InputTypeError(f"{bits!r} bits; expected a whole number")
            if not (2 <= bits <= 8 or bits >= 16):
                raise InputError(f"{bits} bits; expected 2 to 8, or 16 and more for a site left as it is")
        size = self.group_size
        if size is not None and size != -1:
            if size < 1:
                raise InputError(f"group size {size}; expected a positive number of inputs, -1 for one scale per output channel, or None")
            for site in found.sites:
                if site.shape[1] % size:
                    raise InputError(
                        f"group size {size} does not divide the {site.shape[1]} inputs of {site.name}; choose a divisor, -1 or None"
                    )

    def grid(self, site: Site) -> GridSettings:
        """The grid of a site."""
        size = self.group_size
        if size is None:
            size = GROUP_SIZE if site.shape[1] % GROUP_SIZE == 0 else -1
        return GridSettings(size, self.symmetric, self.clip_search)

    def round(self, site: Site, weight: Float[Tensor, "out d"], bits: int) -> Float[Tensor, "out d"]:
        """The weights rounded to the nearest, in their own dtype; 16 bits or more leave them as they are."""
        return weight if bits >= 16 else rounded(weight, bits, self.grid(site))

    def settings(self) -> dict[str, Any]:
        """As scores record it."""
        return {"group_size": self.group_size, "symmetric": self.symmetric, "clip_search": self.clip_search}


def groups_of(found: Structure, by: str) -> dict[str, tuple[Site, ...]]:
    """What is damaged together: a block's sites, or a tied group of sites, by the name of the block or of the group's first site."""
    if by == "block":
        return {block: sites for block in found.blocks if (sites := found.in_block(block))}
    by_name = {site.name: site for site in found.sites}
    return {group[0]: tuple(by_name[name] for name in group) for group in found.groups()}
