"""Offload: a model whose weights accelerate keeps on the CPU or on disk is worked on where they lie, one block on the device at a time.

For the length of an operation the hooks of accelerate are set aside and the parameters become what they stand for: the CPU tensors of the
weights map themselves, or files of the offload folder mapped into memory, which the system reads and drops as it likes. So every action
works on such a model as on any other, writes through, and leaves the hooks as it found them. Weights that accelerate reads from the
checkpoint's own safetensors are first copied into the offload folder: what a user hands in is never written to.
"""

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from whatmatters.core.errors import ModelError

__all__ = ["borrowed", "execution_device", "is_offloaded", "release"]

HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What accelerate puts into the `__dict__` of a module."""


@dataclass(eq=False)
class _Place:
    """One offloaded parameter or buffer.

    Attributes:
        owner: the module that has it.
        kind: "_parameters" or "_buffers".
        key: its name there.
        store: the mapping that holds it, no longer under a prefix.
        name: its name in that mapping.
        before: what the module has while the hooks are in place, on the meta device mostly.
        own: where its values lie.
        installed: what the module has meanwhile.
        version: how often that had been written to when it was put there.
    """

    owner: nn.Module
    kind: str
    key: str
    store: Any
    name: str
    before: Tensor
    own: Tensor = field(init=False)
    installed: Tensor = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.own = self.installed = self.before
        self.version = _version(self.before)

    @property
    def lies(self) -> int:
        """An address that places share whose values are one tensor."""
        return self.own.data_ptr() or -id(self)

    @property
    def now(self) -> Tensor | None:
        return getattr(self.owner, self.kind).get(self.key)

    def put(self, value: Tensor) -> None:
        getattr(self.owner, self.kind)[self.key] = value


@dataclass(eq=False)
class _Loan:
    """What is borrowed at the moment: the device that blocks run on, and the mapped files by the module that uses them."""

    device: torch.device
    areas: dict[nn.Module, list[mmap.mmap]] = field(default_factory=dict)

    def release(self, module: nn.Module | None = None) -> None:
        """Drop the pages of one module, or of all, from this process; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for area in self.areas.get(module, ()) if module is not None else (a for areas in self.areas.values() for a in areas):
                area.madvise(mmap.MADV_DONTNEED)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


_loan: ContextVar[_Loan | None] = ContextVar("loan", default=None)


def release() -> None:
    """Let go of the memory that mapped weights take; nothing without an offloaded model at work."""
    loan = _loan.get()
    if loan is not None:
        loan.release()


def execution_device() -> torch.device | None:
    """The device that blocks of the offloaded model at work are to run on; None where the model is an ordinary one."""
    loan = _loan.get()
    return None if loan is None else loan.device


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of this model elsewhere and brings them as they are needed.

    Example:
        >>> is_offloaded(nn.Linear(2, 2))
        False
    """
    return any(hook.offload for module in model.modules() for hook in _hooks(module))


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on one module that place weights."""
    hook = module.__dict__.get("_hf_hook")
    return [one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "offload")]


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Have an offloaded model as an ordinary one for the length of a `with`; nothing happens to a model that is not offloaded.

    What is written to its parameters meanwhile, or put in their place, is what accelerate's hooks bring afterwards.

    Args:
        model: any model.

    Raises:
        ModelError: accelerate keeps weights in a way that cannot be written to; nothing was changed.

    Example:
        >>> with borrowed(model := nn.Linear(2, 2)):
        ...     model.weight.device.type
        'cpu'
    """
    if not is_offloaded(model):
        yield
        return
    places = _places(model)
    device = next(hook.execution_device for module in model.modules() for hook in _hooks(module) if hook.offload)
    loan = _Loan(torch.device("cpu" if device is None else device))
    for place in places:
        place.own = _values(place, loan)
    with contextlib.ExitStack() as stack:
        stack.callback(_give_back, places)
        stack.callback(_set_hooks, _without_hooks(model))
        _install(model, places)
        stack.enter_context(_on_cpu(model))
        stack.callback(register_module_forward_hook(lambda module, *_: loan.release(module)).remove)
        token = _loan.set(loan)
        stack.callback(_loan.reset, token)
        yield


def _places(model: nn.Module) -> list[_Place]:
    from accelerate.utils import PrefixedDataset

    places: dict[tuple[nn.Module, str], _Place] = {}
    for path, module in model.named_modules():
        for hook in (one for one in _hooks(module) if one.offload):
            kept = [("_parameters", name, value) for name, value in module.named_parameters(recurse=hook.place_submodules)]
            if hook.offload_buffers:
                kept += [("_buffers", name, value) for name, value in module.named_buffers(recurse=hook.place_submodules)]
            for kind, name, before in kept:
                inside, _, key = name.rpartition(".")
                owner = module.get_submodule(inside)
                store: Any = hook.weights_map
                if key in owner._non_persistent_buffers_set:
                    continue
                while isinstance(store, PrefixedDataset):
                    name, store = store.prefix + name, store.dataset
                if not isinstance(store, Mapping):
                    raise ModelError(
                        f"{path}.{key} is offloaded, and its weights map is {type(store).__name__}; expected one of accelerate"
                    )
                places[owner, key] = _Place(owner, kind, key, store, name, before)
    homeless = [n for n, p in model.named_parameters() if p.is_meta and not any(p is place.before for place in places.values())]
    if homeless:
        raise ModelError(f"{homeless[0]} is on the meta device, and no hook of accelerate brings it; load the model with its weights")
    return list(places.values())


def _values(place: _Place, loan: _Loan) -> Tensor:
    """Where the values of a place lie, as a tensor that writes through."""
    from accelerate.utils import OffloadedWeightsLoader, offload_weight

    store, name = place.store, place.name
    if isinstance(store, OffloadedWeightsLoader):
        if name not in store.state_dict:
            folder = store.save_folder
            if store.index[name].get("safetensors_file") is not None:
                if folder is None:
                    raise ModelError(
                        f"{name} is read from the checkpoint itself, which is never written to; load the model with offload_folder=... "
                        "(a folder with room for the weights that are on disk)"
                    )
                os.makedirs(folder, exist_ok=True)
                offload_weight(store[name], name, folder, index=store.index)
            kind = store.index[name]
            return _mapped(Path(folder) / f"{name}.dat", kind["dtype"], kind["shape"], loan.areas.setdefault(place.owner, []))
        store = store.state_dict
    if not isinstance(store, MutableMapping) or not isinstance(store.get(name), Tensor):
        raise ModelError(f"{name} is offloaded into a {type(store).__name__}, which cannot be written to; offload it with accelerate")
    return store[name].detach()


def _mapped(file: Path, dtype: str, shape: list[int], areas: list[mmap.mmap]) -> Tensor:
    kind = getattr(torch, dtype)
    if 0 in shape:
        return torch.empty(shape, dtype=kind)
    with file.open("r+b") as opened:
        area = mmap.mmap(opened.fileno(), 0)
    areas.append(area)
    return torch.frombuffer(area, dtype=kind).view(shape)


def _without_hooks(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Take the hooks off; returns what was there."""
    taken = []
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            had = {name: module.__dict__.pop(name) for name in HOOKED if name in module.__dict__}
            taken.append((module, had))
            plain = had.get("_old_forward")
            if plain is not None and getattr(plain, "__func__", None) is not type(module).forward:
                module.__dict__["forward"] = plain
    return taken


def _set_hooks(taken: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, had in taken:
        module.__dict__.pop("forward", None)
        module.__dict__.update(had)


def _install(model: nn.Module, places: list[_Place]) -> None:
    """Put the values in place of what stands for them; what was one parameter, or is one tensor, is one parameter again."""
    known: dict[int, Tensor] = {}  # by identity of what stood for it, and by where it lies
    for place in places:
        value = place.before
        if value.is_meta:
            value = known.get(id(place.before), known.get(place.lies, place.own))
            if place.kind == "_parameters" and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=place.before.requires_grad)
        known[id(place.before)] = known[place.lies] = value
        place.put(value)
    whole: Any = model
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) and hasattr(model, "get_output_embeddings"):
        # on disk a tied weight lies twice
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        tied, other = getattr(embedding, "weight", None), getattr(head, "weight", None)
        if isinstance(tied, nn.Parameter) and isinstance(other, Tensor) and tied is not other and torch.equal(tied, other):
            head._parameters["weight"] = tied
    for place in places:
        now = place.now
        assert now is not None  # it was put there above
        place.installed, place.version = now, _version(now)


def _give_back(places: list[_Place]) -> None:
    """Write back what does not lie in its place already, and put back what stands for it."""
    shared = [place.lies for place in places]
    here = [(place, now) for place in places if (now := place.now) is not None]
    kept = [(place, now) for place, now in here if now is place.installed]
    replaced = [(place, now) for place, now in here if now is not place.installed]
    with torch.no_grad():
        for place, now in kept:
            if now.data_ptr() != place.own.data_ptr() and _version(now) != place.version:
                place.own.copy_(now)
        for place, now in replaced:
            if now.shape == place.own.shape and now.dtype == place.own.dtype and shared.count(place.lies) == 1:
                place.own.copy_(now)
            else:
                _keep(place, now.detach().cpu())
            meta = torch.empty_like(now, device="meta")
            place.before = nn.Parameter(meta, requires_grad=now.requires_grad) if place.kind == "_parameters" else meta
    for place, _ in here:
        place.put(place.before)


def _keep(place: _Place, value: Tensor) -> None:
    """Hold a value that no longer fits where it lay, or lay there together with another."""
    from accelerate.utils import OffloadedWeightsLoader, offload_weight

    store = place.store
    if isinstance(store, OffloadedWeightsLoader) and place.name not in store.state_dict:
        offload_weight(value, place.name, store.save_folder, index=store.index)
    else:
        (store.state_dict if isinstance(store, OffloadedWeightsLoader) else store)[place.name] = value


@contextlib.contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Bring what lies on an accelerator to the CPU, and back: the device is for one block at a time."""
    tensors = (*model.parameters(), *model.buffers())
    away = [(tensor, tensor.device) for tensor in tensors if tensor.device.type not in ("cpu", "meta")]
    try:
        for tensor, _ in away:
            tensor.data = tensor.data.cpu()
        yield
    finally:
        for tensor, device in away:
            tensor.data = tensor.data.to(device)
