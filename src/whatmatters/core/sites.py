"""Sites: the named places of a model that hold weights, found from its structure and never from its family's name.

A site is a module path (`model.layers.3.mlp.down_proj`) or a parameter path with a slice (`...experts.gate_up_proj[5]`). Blocks are the
repeated modules a calibration walk goes through. Tied sites read the same input tensor; they are found by running the model once.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.errors import FormatError, ModelError, WhatMattersError
from whatmatters.core.offload import borrowed
from whatmatters.core.records import check_name


@dataclass(frozen=True)
class Site:
    """One weight matrix, seen as (out, in).

    Attributes:
        name: module path, or parameter path with `[index]` for a slice of a 3-D parameter.
        parameter: path of the parameter that stores it.
        shape: (out, in).
        block: name of the block it belongs to, "" outside all blocks.
        index: slice along the first dimension of a 3-D parameter, None for a matrix of its own.
        transposed: the parameter stores (in, out), as Conv1D does.
    """

    name: str
    parameter: str
    shape: tuple[int, int]
    block: str = ""
    index: int | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def view(self, model: nn.Module) -> Tensor:
        """The weights as an (out, in) view of the model's own parameter: writing to it (under `torch.no_grad`) changes the model."""
        weight = model.get_parameter(self.parameter).detach()
        if self.index is not None:
            weight = weight[self.index]
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Attributes:
        blocks: names of the blocks, in the order they run.
        sites: all sites inside blocks, in the order of the parameters.
        ties: groups of site names that read the same input tensor or are slices of one parameter; sites in no group are free.
        uncovered: parameters inside blocks with two or more dimensions that no site covers.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    uncovered: tuple[str, ...] = ()

    def site(self, name: str) -> Site:
        """The site of that name; raises KeyError."""
        return {s.name: s for s in self.sites}[name]

    def in_block(self, block: str) -> tuple[Site, ...]:
        """The sites of one block."""
        return tuple(s for s in self.sites if s.block == block)

    def groups(self) -> list[list[str]]:
        """All sites in groups that must get the same level: the ties, and each free site by itself, in site order."""
        tied = {name: group for group in self.ties for name in group}
        seen: set[str] = set()
        result: list[list[str]] = []
        for site in self.sites:
            if site.name not in seen:
                group = list(tied.get(site.name, (site.name,)))
                seen.update(group)
                result.append(group)
        return result

    def to_json(self) -> dict[str, object]:
        """A JSON-able form; `Structure.from_json` reads it."""
        return {
            "blocks": list(self.blocks),
            "sites": [[s.name, s.parameter, list(s.shape), s.block, s.index, s.transposed] for s in self.sites],
            "ties": [list(g) for g in self.ties],
            "uncovered": list(self.uncovered),
        }

    @classmethod
    def from_json(cls, value: object) -> "Structure":
        """The structure that `to_json` wrote, checked in every part.

        Raises:
            FormatError: anything is missing, unknown, of another type, named twice or tied to what is not there.
        """
        if not isinstance(value, dict) or set(value) != {"blocks", "sites", "ties", "uncovered"}:
            raise FormatError("a structure is not exactly blocks, sites, ties and uncovered")
        blocks = _names(value["blocks"], "blocks")
        sites = tuple(_site(item, frozenset(blocks)) for item in _list(value["sites"], "sites"))
        ties = tuple(_names(item, "ties") for item in _list(value["ties"], "ties"))
        tied = [name for group in ties for name in group]
        known = {site.name for site in sites}
        if len(known) != len(sites) or len(set(tied)) != len(tied) or not known.issuperset(tied) or () in ties:
            raise FormatError("a structure names a site twice, ties a site twice, has an empty tie or ties what is no site")
        return cls(blocks, sites, ties, _names(value["uncovered"], "uncovered"))


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what} of a structure are {type(value).__name__}; expected a list")
    return value


def _names(value: object, what: str) -> tuple[str, ...]:
    names = tuple(_name(item, what) for item in _list(value, what))
    if len(set(names)) != len(names):
        raise FormatError(f"{what} of a structure hold a name twice")
    return names


def _name(value: object, what: str) -> str:
    try:
        return check_name(value, what)
    except WhatMattersError as error:
        raise FormatError(str(error)) from error


def _site(item: object, blocks: frozenset[str]) -> Site:
    if not isinstance(item, list) or len(item) != 6:
        raise FormatError("a site is not the six of name, parameter, shape, block, index and transposed")
    name, parameter, shape, block, index, transposed = item
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or not 0 < n < 2**40 for n in shape):
        raise FormatError(f"site {name!r:.80} has shape {shape!r:.60}; expected two positive integers")
    if not isinstance(block, str) or (block and block not in blocks):
        raise FormatError(f"site {name!r:.80} is in block {block!r:.60}, which the structure does not have")
    if (index is not None and (type(index) is not int or not 0 <= index < 2**40)) or not isinstance(transposed, bool):
        raise FormatError(
            f"site {name!r:.80} has index {index!r:.20}, transposed {transposed!r:.20}; expected a natural number or null, a boolean"
        )
    return Site(_name(name, "site"), _name(parameter, "parameter"), (shape[0], shape[1]), block, index, transposed)


def _weighty(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters())


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks a walk goes through, in order.

    The blocks are the children of the outermost `nn.ModuleList` with the most weights; of a plain `nn.Sequential`, all its children.

    Raises:
        ModelError: the model has neither.
    """
    if isinstance(model, nn.Sequential):
        return tuple(name for name, _ in model.named_children())
    best: tuple[int, str, nn.ModuleList] | None = None
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if (inside and name.startswith(inside)) or not isinstance(module, nn.ModuleList):
            continue
        inside += (name + ".",)
        weights = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
        if weights and (best is None or weights > best[0]):
            best = (weights, name, module)
    if best is None:
        sequential = [n for n, m in model.named_modules() if isinstance(m, nn.Sequential) and _weighty(m)]
        if not sequential:
            raise ModelError(
                f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of blocks with weights; expected a stack of blocks"
            )
        name = sequential[0]
        return tuple(f"{name}.{child}" for child, _ in model.get_submodule(name).named_children())
    return tuple(f"{best[1]}.{child}" for child, _ in best[2].named_children())


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores (in, out) and says so by `nf`, its number of outputs."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]


def is_stack(parameter: nn.Parameter) -> bool:
    """Whether a parameter is several matrices in one, as transformers keeps the experts of a mixture; (1, n, d) is a table, not a stack."""
    return parameter.dim() == 3 and len(parameter) > 1 and parameter.is_floating_point()


def _sites_in(block: nn.Module, name: str) -> Iterable[Site]:
    for path, module in block.named_modules(prefix=name):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            yield Site(path, f"{path}.weight", (module.out_features, module.in_features), name)
        elif _is_conv1d(module) and isinstance(weight, Tensor):
            yield Site(path, f"{path}.weight", (weight.shape[1], weight.shape[0]), name, transposed=True)
        elif not isinstance(module, nn.modules.conv._ConvNd):
            transposed = bool(getattr(module, "is_transposed", False))
            for key, parameter in module.named_parameters(recurse=False):
                if is_stack(parameter):
                    rows, columns = parameter.shape[1:]
                    shape = (columns, rows) if transposed else (rows, columns)
                    for index in range(parameter.shape[0]):
                        yield Site(f"{path}.{key}[{index}]", f"{path}.{key}", shape, name, index, transposed)


def structure(model: nn.Module, example: Tensor | None = None) -> Structure:
    """Find blocks, sites and ties of a model.

    Works on the meta device too, so a plan for a 70B model needs none of its weights. Ties are found by running the model once on
    `example`: sites of a block that are given the very same tensor are tied. Slices of one parameter are always tied. Mixtures' experts
    are skipped in that run (routing depends on data), so it costs two tokens.

    Args:
        model: any module whose blocks can be found. A transformers model makes its own example of two tokens.
        example: input for other modules, shape as the model takes it; without it only slices of one parameter are tied. A transformers
            model that takes images gets one of its own size; one that takes neither tokens nor images needs an example too.

    Returns:
        The structure; sites in the order of the parameters.

    Raises:
        ModelError: no blocks, or no sites in them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [site.name for site in structure(model).sites]
        ['0', '2']
    """
    with borrowed(model):
        return _structure(model, example)


def _structure(model: nn.Module, example: Tensor | None) -> Structure:
    blocks = find_blocks(model)
    sites: list[Site] = []
    uncovered: list[str] = []
    for name in blocks:
        block = model.get_submodule(name)
        found = list(_sites_in(block, name))
        covered = {site.parameter for site in found}
        sites += found
        uncovered += [n for n, p in block.named_parameters(prefix=name) if p.dim() >= 2 and n not in covered]
    if not sites:
        raise ModelError(f"{type(model).__name__} has no linear weights in its blocks {blocks[0]!r} to {blocks[-1]!r}")
    for site in sites:
        dtype = model.get_parameter(site.parameter).dtype
        if not dtype.is_floating_point:
            raise ModelError(f"{site.name} has weights of {dtype}; expected floating point: load the model before it was quantized")
    return Structure(blocks, tuple(sites), _ties(model, sites, example), tuple(uncovered))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to: a block that writes into its activations gives its sites different inputs in one tensor.

    Tensors made in inference mode do not count; there the first value is taken for all.
    """
    return 0 if tensor.is_inference() else tensor._version


def _ties(model: nn.Module, sites: list[Site], example: Tensor | None) -> tuple[tuple[str, ...], ...]:
    by_input: dict[tuple[str, int, int], list[str]] = {}  # the version rises when a block writes into its activations
    by_parameter: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    whole = {site.name: site.block for site in sites if site.index is None}
    for site in sites:
        if site.index is not None:
            by_parameter.setdefault(site.parameter, []).append(site.name)
    device = next(model.parameters()).device
    example = _example(model, device) if example is None else example
    if example is not None:
        alive: list[object] = []  # keeps the tensors, so that ids stay theirs

        def note(name: str, block: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                alive.append(args[0])
                version = 0 if args[0].is_inference() else args[0]._version  # under inference_mode there is none
                by_input.setdefault((block, id(args[0]), version), []).append(name)

            return hook

        owners = {modules[parameter.rpartition(".")[0]] for parameter in by_parameter}
        handles = [modules[name].register_forward_pre_hook(note(name, block)) for name, block in whole.items()]
        config: Any = getattr(model, "config", None)
        padding = getattr(config, "pad_token_id", None)
        try:
            if padding is not None:
                config.pad_token_id = None  # a warning about padding would read the ids, which meta tensors do not have
            with torch.no_grad(), replaced_forward(owners, lambda hidden, *args, **kwargs: hidden):
                model(example, use_cache=True) if "use_cache" in inspect.signature(model.forward).parameters else model(example)
        finally:
            if padding is not None:
                config.pad_token_id = padding
            for handle in handles:
                handle.remove()
    groups = [tuple(dict.fromkeys(group)) for group in [*by_input.values(), *by_parameter.values()]]
    order = {site.name: i for i, site in enumerate(sites)}
    return tuple(sorted((g for g in groups if len(g) > 1), key=lambda g: order[g[0]]))


def _example(model: nn.Module, device: torch.device) -> Tensor | None:
    """The smallest input that a transformers model says it takes: two tokens or one image; None if it does not say."""
    takes = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if takes == "input_ids":
        return torch.zeros((1, 2), dtype=torch.long, device=device)
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if takes != "pixel_values" or not isinstance(channels, int) or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(
        (1, channels, height, width), dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()), device=device
    )


@contextlib.contextmanager
def replaced_forward(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of each module's own for the length of a `with`; all is as before afterwards, also after a raise."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
