"""The whole state of anything that a call works on, so that "left as it was" can be said of models, data, settings and the process."""

import os
import random
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["changes", "global_state", "kept_random_state", "outline_of", "random_state", "state_of"]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
PLAIN = (bool, int, float, complex, str, bytes)
OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)

State = dict[str, Any]
"""Everything that can be told about a thing, by path."""


def state_of(value: Any) -> State:
    """All that a value is made of, by path: modules (weights, gradients, modes, hooks, attributes), tensors, arrays, containers, objects.

    Two states are equal exactly if nothing that is looked at changed; NaN equals NaN. Copies what it looks at.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = state_of(layer)
        >>> _ = layer.eval()
        >>> changes(before, state_of(layer))
        ['.training']
    """
    return _look(value, values=True)


def outline_of(value: Any) -> State:
    """`state_of` without the numbers: types, shapes, devices, modes, hooks, which weights take gradients."""
    return _look(value, values=False)


def changes(before: State, after: State, *, common: bool = False) -> list[str]:
    """Paths that differ between two states; with `common` only those that are in both."""
    paths = [path for path in before if path in after] if common else list(dict.fromkeys([*before, *after]))
    lacking = object()
    return [path or "(itself)" for path in paths if before.get(path, lacking) != after.get(path, lacking)]


def _look(whole: Any, values: bool) -> State:
    """Without recursion, and without functions made on the way: the run-time type checker would compile each of them anew."""
    found: State = {}
    seen: dict[int, Any] = {}
    left: list[tuple[str, Any]] = [("", whole)]
    while left:
        path, value = left.pop()
        if isinstance(value, Tensor):
            found[path] = _tensor(value, values)
            if value.requires_grad and value.is_leaf:
                left.append((f"{path}.grad", value.grad))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found[path] = (str(value.dtype), value.shape, value.flags.writeable, value.tobytes() if values else None)
        elif value is None or isinstance(value, PLAIN):
            found[path] = (type(value).__name__, repr(value))
        elif isinstance(value, OPAQUE):
            found[path] = value
        elif id(value) not in seen:
            if not _frozen(value):  # what cannot be changed is told wherever it is: whether two places share it says nothing
                seen[id(value)] = value  # holds it, so that its id stays its own
            found[path], parts = _parts(value)
            left += [(f"{path}{name}", part) for name, part in parts]
    return found


def _frozen(value: Any) -> bool:
    """Whether a thing has the same parts for good; such things are in no cycle of their own making."""
    dataclass = getattr(type(value), "__dataclass_params__", None)
    return isinstance(value, tuple | frozenset) or (dataclass is not None and dataclass.frozen)


def _parts(value: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """What is told about a thing itself, and its named parts."""
    kind = type(value).__qualname__
    if isinstance(value, torch.Generator):
        return kind, [(".state", value.get_state())]
    if isinstance(value, nn.Module):
        return kind, _module(value)
    if isinstance(value, Mapping):
        return (kind, [repr(key) for key in value]), [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple | np.ndarray):
        return (kind, len(value)), [(f"[{place}]", part) for place, part in enumerate(value)]
    if isinstance(value, set | frozenset):
        return (kind, sorted(map(repr, value))), []
    if is_dataclass(value):
        return kind, [(f".{field.name}", getattr(value, field.name, None)) for field in fields(value)]
    if hasattr(value, "__dict__"):
        return kind, [(f".{name}", part) for name, part in vars(value).items()]
    return (kind, None if type(value).__repr__ is object.__repr__ else repr(value)), []


def _module(module: nn.Module) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = [(f".{name}", list(getattr(module, name))) for name in HOOKS]
    for name, part in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            parts += [(f".{key}", item) for key, item in part.items()]
        elif not name.startswith("_"):
            parts.append((f".{name}", part))
    return parts


def _tensor(value: Tensor, values: bool) -> tuple[Any, ...]:
    told = (type(value).__name__, str(value.dtype), tuple(value.shape), str(value.device), value.requires_grad)
    if not values or value.is_meta:
        return told
    plain = value.detach().to_dense() if value.layout != torch.strided else value.detach()
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (*told, plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")


def random_state() -> State:
    """The global generators of torch (every device), numpy and Python."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (the global one is what is looked at)
    state = {"torch": torch.random.get_rng_state().numpy().tobytes(), "numpy": (name, np.asarray(keys).tobytes(), *rest)}
    if not type(getattr(__spec__, "loader", None)).__module__.startswith("jaxtyping"):
        state["python"] = random.getstate()  # where annotations are checked at run time, beartype draws from it to look into containers
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [part.cpu().numpy().tobytes() for part in torch.cuda.get_rng_state_all()]
    return state


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give the global generators back as they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def global_state() -> State:
    """What belongs to the process and not to a call: torch's modes, numpy's, warnings, environment, folder, streams."""
    return {
        "torch.get_default_dtype": torch.get_default_dtype(),
        "torch.is_grad_enabled": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled": torch.is_inference_mode_enabled(),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.backends.cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "numpy.geterr": np.geterr(),
        "warnings.filters": list(warnings.filters),
        "os.environ": dict(os.environ),
        "os.getcwd": os.getcwd(),
        "os.listdir": sorted(os.listdir()),
        "sys.stdout": id(sys.stdout),
        "sys.path": list(sys.path),
    }
