"""Weight compander: train with weights that are bounded and pushed away from zero, then fold it away: no cost at inference.

Cakaj, Mehnert, Yang 2023, arXiv 2306.16993. unit weight · score none (implicit) · allocation "democratic": large weights are capped, small
ones magnified · action reparametrize, w = a arctan(v / b). There is no official code and the text of the formula could not be had: the
arctan form is inferred from the abstract; `Compander` is the one place to change it. Where weights are learned through a and b, these are
exponentials: as plain numbers with the weights' learning rate they break training.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whatmatters.core.catalog import door, method
from whatmatters.core.errors import InputError, ModelError, NonFiniteError

__all__ = ["Compander", "compander_groups", "fold_weight_compander", "weight_compander"]

TARGETS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BOUND_SHARE = 0.99
"""Of the bound: where weights beyond it are put if clamping is asked for."""


class Compander(nn.Module):
    """w = a arctan(v / b): odd, increasing, |w| < a pi/2, slope a/b at zero. A parametrization of `torch.nn.utils.parametrize`.

    Args:
        a: reach, above 0: one number, or one for each output channel (out,).
        b: scale of v, above 0, of the same shape.
        learnable: train log a and log b.
        ndim: dimensions of the weight, so that numbers of channels are lined up with its first.

    Raises:
        InputError: a or b is not finite and positive, or their shapes differ.

    Example:
        >>> import torch
        >>> w = torch.tensor([-0.5, 0.0, 0.1])
        >>> compander = Compander(torch.tensor(0.5), torch.tensor(0.25))
        >>> torch.allclose(compander(compander.right_inverse(w)), w)
        True
    """

    def __init__(self, a: Float[Tensor, "*out"], b: Float[Tensor, "*out"], *, learnable: bool = False, ndim: int = 2) -> None:
        super().__init__()
        if a.shape != b.shape or not all(bool((torch.isfinite(x) & (x > 0)).all()) for x in (a, b)):
            raise InputError(f"a is {_told(a)} and b is {_told(b)}; expected finite numbers above 0, of one shape")
        self.tail = (1,) * (ndim - 1) if a.ndim else ()
        self.log_a = nn.Parameter(a.detach().log().clone(), requires_grad=learnable)
        self.log_b = nn.Parameter(b.detach().log().clone(), requires_grad=learnable)

    @property
    def a(self) -> Tensor:
        """Reach, lined up with the weight."""
        return self.log_a.exp().reshape((*self.log_a.shape, *self.tail))

    @property
    def b(self) -> Tensor:
        """Scale of v, lined up with the weight."""
        return self.log_b.exp().reshape((*self.log_b.shape, *self.tail))

    @property
    def bound(self) -> Tensor:
        """a pi/2, which no weight reaches."""
        return self.a * (math.pi / 2)

    def forward(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """w of v, in v's dtype; computed in float32 at least."""
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        return (self.a * torch.atan(wide / self.b)).to(v.dtype)

    def right_inverse(self, w: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """v of w; what makes `module.weight = w` work. Raises InputError for |w| at or above the bound a pi/2."""
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        beyond = int((wide.abs() >= self.bound).sum())
        if beyond:
            raise InputError(f"{beyond} weights at or above the bound a pi/2 = {float(self.bound.min()):.4g}; raise a")
        return (self.b * torch.tan(wide / self.a)).to(w.dtype)


def _told(values: Tensor) -> str:
    return (
        f"{float(values):g}"
        if values.ndim == 0
        else f"a tensor {tuple(values.shape)} from {float(values.min()):g} to {float(values.max()):g}"
    )


@method(
    "weight-compander", paper="2306.16993", job="nn", unit="weight", action="reparametrize", score="none",
    allocation="bounded and magnified", form="parametrization", needs_text=False,
)  # fmt: skip
def weight_compander(
    module: nn.Module,
    *,
    a: float | None = None,
    slope: float = 2.0,
    learnable: bool = False,
    per: str = "layer",
    init: str = "match",
    clamp: bool = False,
    targets: tuple[type[nn.Module], ...] = TARGETS,
    exclude: Collection[str] = (),
) -> nn.Module:
    """Reparametrize the weights of linear and convolution layers in place, for training; `fold_weight_compander` takes it away again.

    Args:
        module: any torch module; biases, norms and embeddings are left alone, so are weights of other layers that share one with a target.
        a: reach: weights stay below a pi/2 in size. None: twice the largest weight at the start, at least 0.2, for each layer (or channel).
        slope: a / b, the magnification of weights near zero, above 0; 1 only bounds, 1 to 2 keeps the learning rate's meaning (near zero
            the effective rate is slope squared times the optimizer's).
        learnable: train a and b too (the paper's extension); give their parameters a tenth of the rate and no decay: `compander_groups`.
        per: "layer", "channel" (one pair for each output channel), "model" (one pair shared by all layers).
        init: "match" leaves the function as it is; "copy" takes the weights as v, which magnifies them.
        clamp: put weights beyond the bound just inside it; else they are refused.
        targets: classes of the layers to reparametrize.
        exclude: names of layers to leave alone.

    Returns:
        The same module.

    Raises:
        InputError: a number out of range, a name to exclude that is no layer, or weights beyond the bound.
        ModelError: no layer to reparametrize, or one that is parametrized already.
        NonFiniteError: NaN or infinity in a weight; the message names it.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> x = torch.ones(1, 4)
        >>> before = layer(x)
        >>> _ = weight_compander(layer, slope=2.0)
        >>> torch.allclose(layer(x), before, atol=1e-6)
        True
        >>> sorted(fold_weight_compander(layer).state_dict())
        ['bias', 'weight']

    References:
        Cakaj, Mehnert, Yang, Weight Compander: A Simple Weight Reparameterization for Regularization, arXiv 2306.16993.
    """
    if (a is not None and not (math.isfinite(a) and a > 0)) or not (math.isfinite(slope) and slope > 0):
        raise InputError(f"a is {a} and slope is {slope}; expected finite numbers above 0")
    if per not in ("layer", "channel", "model") or init not in ("match", "copy"):
        raise InputError(f"per is {per!r} and init is {init!r}; expected 'layer', 'channel' or 'model', and 'match' or 'copy'")
    layers = list(_targets(module, targets, exclude))
    largest = max(float(layer.weight.detach().abs().max()) for _, layer in layers)
    ready: list[tuple[nn.Module, Compander, Tensor]] = []
    shared: Compander | None = None
    for name, layer in layers:
        weight = layer.weight.detach().clone()
        tops = weight.abs().float().flatten(1).amax(1)
        top = tops if per == "channel" else tops.max() if per == "layer" else torch.tensor(largest, device=tops.device)
        reach = torch.full_like(top, a) if a is not None else (2 * top).clamp(min=0.2)
        compander = shared or Compander(reach, reach / slope, learnable=learnable, ndim=weight.ndim)
        shared = compander if per == "model" else None
        beyond = int((weight.abs() >= compander.bound).sum()) if init == "match" else 0
        if beyond and not clamp:
            raise InputError(
                f"{name}: {beyond} weights at or above a pi/2 = {float(compander.bound.min()):.4g}; raise a, or pass clamp=True"
            )
        if beyond:
            limit = BOUND_SHARE * compander.bound
            weight = torch.minimum(torch.maximum(weight, -limit), limit).to(weight.dtype)
        ready.append((layer, compander, weight))
    with torch.no_grad():
        for layer, compander, weight in ready:
            # Registering takes the inverse of the weight it finds, which "copy" has no use for.
            layer.weight.copy_(weight if init == "match" else torch.zeros_like(weight))
            parametrize.register_parametrization(layer, "weight", compander, unsafe=True)
            if init == "copy":
                layer.parametrizations.weight.original.copy_(weight)
    return module


def _targets(module: nn.Module, targets: tuple[type[nn.Module], ...], exclude: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Layers to reparametrize, by name; checked before anything is changed."""
    holders: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        for key, parameter in child.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    known = dict(module.named_modules())
    unknown = sorted(set(exclude) - known.keys())
    if unknown:
        raise InputError(f"no layer {unknown[0]!r} to exclude; module.named_modules() lists them")
    found = [(name, child) for name, child in known.items() if isinstance(child, targets) and name not in exclude]
    parametrized = [name for name, child in found if parametrize.is_parametrized(child, "weight")]
    if parametrized:
        raise ModelError(f"{parametrized[0] or type(module).__name__} is parametrized already; fold or remove that first")
    found = [(name, child) for name, child in found if len(holders[id(child.weight)]) == 1]
    if not found:
        raise ModelError(f"no layer of {', '.join(t.__name__ for t in targets)} with a weight of its own in {type(module).__name__}")
    for name, child in found:
        if not child.weight.is_floating_point():
            raise ModelError(f"{name}.weight is {child.weight.dtype}; quantized weights cannot be reparametrized")
        if not torch.isfinite(child.weight).all():
            raise NonFiniteError(f"{name}.weight holds NaN or infinity")
    yield from found


def _companders(module: nn.Module) -> list[tuple[nn.Module, Compander]]:
    """Layers whose weight is companded."""
    return [
        (child, p) for child in module.modules() if parametrize.is_parametrized(child, "weight")
        for p in child.parametrizations.weight if isinstance(p, Compander)
    ]  # fmt: skip


@door("nn.fold_weight_compander")
def fold_weight_compander(module: nn.Module) -> nn.Module:
    """Put the companded weights in place of v, a and b: the same function, plain parameters, the names that were there before.

    Args:
        module: what `weight_compander` was called on, or a module around it.

    Returns:
        The same module.

    Raises:
        ModelError: nothing in it is companded.

    Example:
        >>> import torch
        >>> layer = weight_compander(torch.nn.Linear(4, 2))
        >>> type(fold_weight_compander(layer)).__name__
        'Linear'
    """
    found = _companders(module)
    if not found:
        raise ModelError(f"nothing in {type(module).__name__} is companded; call weight_compander first")
    for layer, _ in found:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module


@door("nn.compander_groups")
def compander_groups(module: nn.Module, *, lr: float, weight_decay: float = 0.0, scale_lr: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: a and b at a fraction of the learning rate and without decay, all else as given.

    Args:
        module: what `weight_compander` was called on.
        lr: learning rate, above 0.
        weight_decay: decay of everything but a and b, at least 0; it acts on v.
        scale_lr: learning rate of a and b, as a share of `lr`.

    Returns:
        Two groups for a `torch.optim` optimizer, or one if a and b are not learned.

    Raises:
        InputError: a number out of range.

    Example:
        >>> import torch
        >>> layer = weight_compander(torch.nn.Linear(4, 2), learnable=True)
        >>> [len(g["params"]) for g in compander_groups(layer, lr=0.1)]
        [2, 2]
    """
    if lr <= 0 or weight_decay < 0 or scale_lr <= 0:
        raise InputError(f"lr is {lr}, weight_decay {weight_decay}, scale_lr {scale_lr}; expected rates above 0 and a decay of at least 0")
    scales = {id(p): p for _, compander in _companders(module) for p in compander.parameters() if p.requires_grad}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in scales]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}]
    return groups + ([{"params": list(scales.values()), "lr": lr * scale_lr, "weight_decay": 0.0}] if scales else [])
