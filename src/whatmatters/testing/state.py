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
    found: State = {}
    _look(value, "", found, {}, values=True)
    return found


def outline_of(value: Any) -> State:
    """`state_of` without the numbers: types, shapes, devices, modes, hooks, which weights take gradients."""
    found: State = {}
    _look(value, "", found, {}, values=False)
    return found


def changes(before: State, after: State, *, common: bool = False) -> list[str]:
    """Paths that differ between two states; with `common` only those that are in both."""
    paths = [path for path in before if path in after] if common else list(dict.fromkeys([*before, *after]))
    lacking = object()
    return [path or "(itself)" for path in paths if before.get(path, lacking) != after.get(path, lacking)]


def _look(value: Any, path: str, found: State, seen: dict[int, Any], *, values: bool) -> None:
    def inside(part: Any, name: str) -> None:
        _look(part, f"{path}{name}", found, seen, values=values)

    if isinstance(value, Tensor):
        found[path] = _tensor(value, values)
        if value.requires_grad and value.is_leaf:
            inside(value.grad, ".grad")
        return
    if isinstance(value, np.ndarray) and value.dtype != object:
        found[path] = (str(value.dtype), value.shape, value.flags.writeable, value.tobytes() if values else None)
        return
    if value is None or isinstance(value, (bool | int | float | complex | str | bytes, OPAQUE)):
        found[path] = (type(value).__name__, value if isinstance(value, OPAQUE) else repr(value))
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # holds it, so that its id stays its own
    found[path] = type(value).__qualname__
    if isinstance(value, torch.Generator):
        inside(value.get_state(), ".state")
    elif isinstance(value, nn.Module):
        _module(value, inside)
    elif isinstance(value, Mapping):
        found[f"{path}.keys"] = [repr(key) for key in value]
        for key, part in value.items():
            inside(part, f"[{key!r}]")
    elif isinstance(value, list | tuple):
        found[f"{path}.length"] = len(value)
        for place, part in enumerate(value):
            inside(part, f"[{place}]")
    elif isinstance(value, set | frozenset):
        found[f"{path}.items"] = sorted(map(repr, value))
    elif is_dataclass(value):
        for field in fields(value):
            inside(getattr(value, field.name, None), f".{field.name}")
    else:
        attributes = getattr(value, "__dict__", None)
        if attributes is None:
            found[f"{path}.repr"] = repr(value) if type(value).__repr__ is not object.__repr__ else None
            return
        for name, part in attributes.items():
            inside(part, f".{name}")


def _module(module: nn.Module, inside: Any) -> None:
    for name in HOOKS:
        inside(list(getattr(module, name)), f".{name}")
    for name, part in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            for key, item in part.items():
                inside(item, f".{key}")
        elif name == "training" or name == "forward" or not name.startswith("_"):
            inside(part, f".{name}")


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
