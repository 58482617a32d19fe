"""Capture: what goes into each site and who attends to whom, in any module, without changing what it computes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from whatmatters.core.errors import ModelError
from whatmatters.core.sites import Site

__all__ = ["attention_queries", "attention_received", "settings_of", "site_inputs"]

ATTENTION = "whatmatters_attention"
"""Name under which the listening attention function is registered with transformers."""


Callback = Callable[[str, Tensor, Tensor | None], None]


class _SliceReads(TorchFunctionMode):
    """Sees every linear product whose weight is a slice of a watched 3-D parameter.

    Experts call `functional.linear(x, parameter[i])` (or a matmul with it): no module to hook, so the function call is what is watched.
    """

    def __init__(self, parameters: dict[int, tuple[Tensor, dict[int, str]]], callback: "Callback") -> None:
        super().__init__()
        self.parameters = parameters
        self.callback = callback
        self.rows: Tensor | None = None  # the tokens last picked out by `hidden[index]`: those an expert works on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dim() == 1 and not args[1].is_floating_point():
            self.rows = args[1]
        if func in (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm) and len(args) >= 2:
            weight = args[1]
            owner = self.parameters.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None
            if owner is not None and weight.dim() == 2:
                parameter, names = owner
                name = names.get((weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0))
                if name is not None:
                    rows = self.rows if self.rows is not None and len(self.rows) == len(args[0]) else None
                    self.callback(name, args[0].detach(), rows)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def site_inputs(root: nn.Module, sites: Iterable[Site], callback: Callback, *, root_name: str = "") -> Iterator[None]:
    """Call `callback(site name, input, rows)` each time a site of `root` is used, for the length of a `with`.

    The input is detached, of shape (..., in). `rows` is None, or for an expert the positions of its inputs among all tokens. Sites that
    read the same tensor are called with the same tensor object. Experts must run their plain loop
    (`settings_of(..., _experts_implementation="eager")`), since fused expert kernels have no input for each expert.

    Args:
        root: the model, or one block of it.
        sites: the sites to watch.
        callback: told the name of the site, its input and, for an expert, its rows.
        root_name: the name of `root` in the model whose names the sites have.
    """
    prefix = f"{root_name}." if root_name else ""
    slices: dict[int, tuple[Tensor, dict[int, str]]] = {}
    handles = []

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            callback(name, args[0].detach(), None)

        return hook

    try:
        for site in sites:
            if site.index is None:
                module = root.get_submodule(site.name.removeprefix(prefix)) if site.name != root_name else root
                handles.append(module.register_forward_pre_hook(hook_for(site.name)))
            else:
                parameter = root.get_parameter(site.parameter.removeprefix(prefix))
                slices.setdefault(parameter.untyped_storage().data_ptr(), (parameter, {}))[1][site.index] = site.name
        with _SliceReads(slices, callback) if slices else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def settings_of(root: nn.Module, **settings: object) -> Iterator[None]:
    """Set attributes on every configuration object below `root` that has them; restored afterwards, also after a raise."""
    configs = {id(c): c for m in root.modules() if (c := getattr(m, "config", None)) is not None}
    before: list[tuple[Any, str, object]] = []
    try:
        for config in configs.values():
            for name, value in settings.items():
                if hasattr(config, name):
                    before.append((config, name, getattr(config, name)))
                    setattr(config, name, value)
        yield
    finally:
        for config, name, value in reversed(before):
            setattr(config, name, value)


Listener = Callable[[nn.Module, Tensor, Tensor, Tensor | None, float | None], None]
_listener: ContextVar[Listener | None] = ContextVar("attention_listener", default=None)


def _listening_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    listener = _listener.get()
    if listener is not None:
        unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
        if unknown:
            raise ModelError(
                f"{type(module).__name__} attends with {unknown[0]}, which attention scores do not cover; use another token score"
            )
        listener(module, query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextlib.contextmanager
def attention_queries(root: nn.Module, listener: Listener) -> Iterator[None]:
    """Call `listener(module, query, key, mask, scaling)` at every attention of `root`, for the length of a `with`.

    Query and key are as the attention sees them, positions applied: (batch, heads, length, head size). No attention map is formed here;
    `attention_received` sums one in slices. Works on every transformers model that uses the library's attention interface.

    Raises:
        ModelError: (on use) `root` has no such attention.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _listening_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    token = _listener.set(listener)
    try:
        with settings_of(root, _attn_implementation=ATTENTION):
            yield
    finally:
        _listener.reset(token)


def attention_received(
    query: Float[Tensor, "batch heads length size"],
    key: Float[Tensor, "batch kv_heads length size"],
    mask: Tensor | None = None,
    scaling: float | None = None,
    *,
    causal: bool = True,
    rows: int = 256,
) -> Float[Tensor, "batch length"]:
    """Attention that each token receives, summed over heads and queries: s_t = sum_h sum_q A[h, q, t].

    The map is formed `rows` queries at a time in float32, so memory is O(heads * rows * length), never length squared.

    Args:
        query: queries, positions applied.
        key: keys; heads may be shared by groups of query heads.
        mask: boolean (True = may attend) or additive, broadcastable to (batch, heads, length, length); None: causal or full by `causal`.
        scaling: factor of the scores; None: 1 / sqrt(size).
        causal: with no mask, whether a query sees only keys up to itself.
        rows: queries at a time.

    Returns:
        Sums that add up to heads * (queries that see anything), by sequence.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> attention_received(q, q).sum().item()  # heads * length
        6.0
    """
    batch, heads, length, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
    received = torch.zeros(batch, length, dtype=torch.float32, device=query.device)
    positions = torch.arange(length, device=query.device)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        scores = query[:, :, start:stop].float() @ keys.transpose(-1, -2) * scale
        if mask is None:
            hidden = positions[None, :] > positions[start:stop, None] if causal else None
        elif mask.dtype == torch.bool:
            hidden = ~mask[..., start:stop, :length]
        else:
            scores, hidden = scores + mask[..., start:stop, :length].float(), None
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        # a query that sees nothing (padding) has a row of NaN: it attends to no one
        received += scores.softmax(-1).nan_to_num(0.0).sum((1, 2))
    return received
