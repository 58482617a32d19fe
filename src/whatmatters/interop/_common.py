"""What the files of all tools share: what a tool is, how a plan is checked for it, and the model's skeleton that a plan remembers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from whatmatters.core.allocation import Cost
from whatmatters.core.checkpoint import PathLike, atomic_file, check_output
from whatmatters.core.errors import FormatError, InputError, InputTypeError
from whatmatters.core.formats import DENSE_BITS, QuantizedGrid, check_compressible, stored_bits
from whatmatters.core.plans import Plan
from whatmatters.core.sites import Structure

__all__ = ["HEAD", "Tool", "as_json", "compressible", "grids", "group_of", "level_of", "levels_of", "skeleton", "structure_of"]

Stored = Callable[[tuple[int, int], int, int, bool], int]
"""Bits a tool stores for a site, from (out, in), level, group size and whether symmetric; InputError where it cannot."""

SHOWN = 3
"""Problems told in one error."""

HEAD = "lm_head"
"""Output head of causal language models in transformers: a linear outside the blocks, which no plan touches."""


@dataclass(frozen=True)
class Tool:
    """A tool that takes a plan of bits in a file of its own.

    Attributes:
        name: as people type it.
        file: usual name of the file.
        levels: bit widths it can load, ascending; 16 or more (a site left as it is) always goes.
        group_sizes: group sizes it can load, None for any that divides the inputs.
        ties: sites that must share a level: "inputs" for those that read the same input (and experts of one parameter), "parameter" for
            experts of one parameter only.
        proof: what was executed and what was only checked against the tool's source.
        usage: the command or call that takes the file; `{file}` stands for its path.
        text: writes the file's content for a plan that passed all checks.
        problems: what else the tool cannot hold of a plan, one sentence each.
        stored: bits the tool stores for a site; None where that is what `core.formats.stored_bits` says.
    """

    name: str
    file: str
    levels: tuple[int, ...]
    group_sizes: tuple[int, ...] | None
    ties: Literal["inputs", "parameter"]
    proof: str
    usage: str
    text: Callable[[Plan], str]
    problems: Callable[[Plan], list[str]]
    stored: Stored | None = None

    def cost(self, *, group_size: int = 128, symmetric: bool = True) -> Cost | None:
        """What `allocate.bits(cost=)` takes, so that an average means bits in this tool's own file; None where its count "stored" does.

        Example:
            >>> from whatmatters.interop import tool
            >>> tool("llama.cpp").cost()((256, 256), 4) / 256**2
            4.5
        """
        if self.stored is None:
            return None
        stored = self.stored
        return lambda shape, level: stored(shape, level, group_size, symmetric)

    def structure(self, found: Structure) -> Structure:
        """The structure with the ties this tool asks for, for `allocate.bits(structure=)`."""
        if self.ties == "inputs":
            return found
        sliced = {site.name for site in found.sites if site.index is not None}
        return replace(found, ties=tuple(group for group in found.ties if sliced.issuperset(group)))

    def check(self, plan: Plan) -> None:
        """Refuse, before any work, a plan that this tool cannot load.

        Args:
            plan: a plan of bits with its structure. Group size and symmetry are those of its settings, 128 and symmetric without any.

        Raises:
            InputTypeError: a plan of another kind.
            InputError: a plan without structure.
            FormatError: names the sites and what the tool takes.
        """
        if plan.kind != "bits":
            raise InputTypeError(f"a {plan.kind!r} plan for {self.name}; expected a plan of kind 'bits' (allocate.bits makes one)")
        found = structure_of(plan)
        problems = [*self._levels(plan), *self._groups(plan, found), *self._tied(plan, found), *self.problems(plan)]
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise FormatError(f"{self.name} cannot load this plan: {'; '.join(problems[:SHOWN])}{more}")

    def write(self, plan: Plan, path: PathLike, *, overwrite: bool = False) -> Path:
        """Write this tool's own file for a plan, whole or not at all.

        Args:
            plan: a plan of bits that `check` accepts.
            path: the file to make.
            overwrite: whether it may exist already.

        Returns:
            The path.

        Raises:
            InputTypeError, InputError, FormatError: as `check`; nothing is written.
            FileError: the file exists, or cannot be written.
        """
        target = check_output(path, overwrite)
        self.check(plan)
        with atomic_file(target, overwrite=overwrite) as temporary:
            temporary.write_text(self.text(plan), encoding="utf-8")
        return target

    def _levels(self, plan: Plan) -> list[str]:
        taken = ", ".join(map(str, self.levels))
        return [
            f"{name} has {bits} bits, it takes {taken} (or 16 to leave a site as it is)"
            for name, bits in plan.values.items()
            if isinstance(bits, int) and bits < DENSE_BITS and bits not in self.levels
        ]

    def _groups(self, plan: Plan, found: Structure) -> list[str]:
        group_size, symmetric = group_of(plan)
        if self.group_sizes is not None and group_size not in self.group_sizes:
            return [f"group size {group_size}, it takes {', '.join(map(str, self.group_sizes))}"]
        problems = []
        for site in found.sites:
            bits = level_of(plan, site.name)
            try:
                if bits in self.levels and self.stored is None:
                    stored_bits(site.shape, bits, group_size=group_size, symmetric=symmetric)
                elif bits in self.levels and self.stored is not None:
                    self.stored(site.shape, bits, group_size, symmetric)
            except InputError as error:
                problems.append(f"{site.name}: {error}")
        return problems

    def _tied(self, plan: Plan, found: Structure) -> list[str]:
        problems = []
        for group in self.structure(found).ties:
            different = sorted({level_of(plan, name) for name in group})
            if len(different) > 1:
                problems.append(f"{', '.join(group[:4])} have different bits {different}, it keeps them in one matrix of one width")
        return problems


def structure_of(plan: Plan) -> Structure:
    """The structure a plan was made for; raises InputError without one, FormatError if the plan leaves out a site."""
    found = plan.structure
    if found is None:
        raise InputError("the plan knows no shapes and ties; make it from scores with a structure (allocate.bits does)")
    lacking = [site.name for site in found.sites if site.name not in plan.values]
    if lacking:
        raise FormatError(f"the plan has no bits for {lacking[0]} and {len(lacking) - 1} more; give every site, 16 to leave one as it is")
    return found


def level_of(plan: Plan, name: str) -> int:
    """Bits of a site."""
    bits = plan.values[name]
    if not isinstance(bits, int):
        raise InputTypeError(f"bits of {name} are {type(bits).__name__}; expected a plan of kind 'bits'")
    return bits


def levels_of(plan: Plan) -> dict[str, int]:
    """Bits of every site of a plan."""
    return {name: level_of(plan, name) for name in plan.values}


def group_of(plan: Plan) -> tuple[int, bool]:
    """Group size and symmetry a plan was made for: its settings, 128 and symmetric without any."""
    group_size, symmetric = plan.settings.get("group_size", 128), plan.settings.get("symmetric", True)
    if type(group_size) is not int or not isinstance(symmetric, bool):
        raise InputTypeError(f"the plan's settings have group_size {group_size!r:.40}, symmetric {symmetric!r:.40}; expected int and bool")
    return group_size, symmetric


def skeleton(found: Structure) -> nn.Module:
    """The modules a structure remembers, by name, on the meta device, and the usual output head: what format checks need of a model."""
    root = nn.Module()
    for site in found.sites:
        path, _, leaf = site.parameter.rpartition(".")
        if site.index is None:
            parent, _, name = site.name.rpartition(".")
            rows, columns = site.shape
            with torch.device("meta"):
                linear = Conv1D(rows, columns) if site.transposed else nn.Linear(columns, rows, bias=False)
            _descend(root, parent).add_module(name, linear)
        elif site.index == 0:
            count = sum(other.parameter == site.parameter for other in found.sites)
            _descend(root, path).register_parameter(leaf, nn.Parameter(torch.empty(count, *site.shape, device="meta")))
    if not hasattr(root, HEAD):
        root.add_module(HEAD, nn.Linear(1, 1, bias=False, device="meta"))
    return root


def _descend(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in path.split(".") if path else ():
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def grids(plan: Plan, found: Structure) -> dict[str, QuantizedGrid]:
    """Empty grids of the sites a plan quantizes, on the meta device: what `core.formats.quantization_config` needs of them."""
    group_size, symmetric = group_of(plan)
    result: dict[str, QuantizedGrid] = {}
    for site in found.sites:
        bits = level_of(plan, site.name)
        if bits < DENSE_BITS:
            shape = (site.shape[0], 1 if group_size == -1 else site.shape[1] // group_size)
            zero = None if symmetric else torch.empty(shape, dtype=torch.int8, device="meta")
            result[site.name] = QuantizedGrid(torch.empty(shape, dtype=torch.float16, device="meta"), zero, bits, group_size)
    return result


def compressible(plan: Plan) -> list[str]:
    """What a compressed-tensors checkpoint cannot hold of a plan."""
    group_size, symmetric = group_of(plan)
    try:
        check_compressible(skeleton(structure_of(plan)), {name: (bits, group_size, symmetric) for name, bits in levels_of(plan).items()})
    except FormatError as error:
        return [str(error)]
    return []


def as_json(value: Any) -> str:
    """Readable JSON text, the same on every machine."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
