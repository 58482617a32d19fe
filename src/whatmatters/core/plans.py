"""Plans: what an allocation makes of scores and a budget: bits, masks, ratios or inclusion probabilities, by site.

A plan says what it was asked for (`budget`), what it achieved (`account`) and how (`method`, `settings`); an action needs nothing else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from whatmatters.core.errors import InputError, InputTypeError, MissingExtraError, NonFiniteError
from whatmatters.core.records import (
    PathLike,
    check_name,
    check_names,
    check_settings,
    holds_tensors,
    read_record,
    read_text,
    reading,
    split_tensors,
    take,
    thawed,
    write_record,
    write_text,
)
from whatmatters.core.sites import Structure

__all__ = ["Plan"]

KINDS = ("bits", "mask", "ratio", "sampling")

_WITH_TENSORS = ("mask", "sampling")
_KEYS = frozenset({"kind", "budget", "account", "method", "settings", "structure"})


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a budget goes.

    Args:
        kind: "bits": site to bits a weight (16 or more: left as it is); "mask": site to booleans (out, in), True for a weight that is kept;
            "ratio": site to the share of its weights that goes, from 0 to 1; "sampling": name to inclusion probabilities from 0 to 1.
        values: site or block name to an integer, a boolean tensor, a float or a floating-point tensor, as `kind` says. Tensors are copied.
        budget: what was asked for, JSON-able, such as `{"average_bits": 3.5, "count": "stored"}`.
        account: what came of it, JSON-able: at least "achieved", "unused" and "smallest_step".
        method: the scorer whose scores were spent.
        settings: how they were spent, JSON-able.
        structure: sizes, blocks and ties of the model the plan is for.

    Raises:
        InputTypeError: a value is not of the type its kind says.
        InputError: an unknown kind, a value out of range, a name or a shape that the structure does not have.
        NonFiniteError: NaN in a ratio or a probability.

    Example:
        >>> plan = Plan("bits", {"h.0.fc": 4, "h.1.fc": 2}, {"average_bits": 3}, {"achieved": 3.0}, "mine", {})
        >>> plan.values["h.0.fc"]
        4
    """

    kind: str
    values: Mapping[str, int | float | Tensor]
    budget: Mapping[str, Any]
    account: Mapping[str, Any]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    structure: Structure | None = None

    def __post_init__(self) -> None:
        self._settle(copy=True)

    @classmethod
    def _adopt(
        cls,
        kind: str,
        values: Mapping[str, int | float | Tensor],
        budget: Mapping[str, Any],
        account: Mapping[str, Any],
        method: str,
        settings: Mapping[str, Any],
        structure: Structure | None,
    ) -> "Plan":
        """A plan over tensors nobody else writes to: checked, not copied."""
        plan = object.__new__(cls)
        fields = {"kind": kind, "values": values, "budget": budget, "account": account, "method": method, "settings": settings}
        for name, value in (fields | {"structure": structure}).items():
            object.__setattr__(plan, name, value)
        plan._settle(copy=False)
        return plan

    def _settle(self, *, copy: bool) -> None:
        """Check everything and freeze the mappings."""
        if self.kind not in KINDS:
            raise InputError(f"kind {self.kind!r:.40} is unknown; expected one of {', '.join(KINDS)}")
        check = {"bits": _bits, "mask": _mask, "ratio": _ratio, "sampling": _probabilities}[self.kind]
        values = {name: check(name, value) for name, value in check_names(self.values).items()}
        if copy:
            values = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
        object.__setattr__(self, "values", MappingProxyType(values))
        for name in ("budget", "account", "settings"):
            object.__setattr__(self, name, check_settings(getattr(self, name)))
        check_name(self.method, "method")
        if self.structure is not None and self.kind != "sampling":
            shapes = {site.name: site.shape for site in self.structure.sites}
            for name, value in values.items():
                if name not in shapes:
                    raise InputError(f"the plan names {name!r}, which is no site of the structure; give the structure of that model")
                if isinstance(value, Tensor) and tuple(value.shape) != shapes[name]:
                    raise InputError(f"mask of {name!r} has shape {tuple(value.shape)}; the site has {shapes[name]}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Plans can be copied and sent to other processes."""
        described = [thawed(getattr(self, name)) for name in ("budget", "account")]
        return type(self), (self.kind, dict(self.values), *described, self.method, thawed(self.settings), self.structure)

    def __repr__(self) -> str:
        return f"Plan({self.kind!r}, {len(self.values)} names, budget={dict(self.budget)!r})"

    def summary(self) -> str:
        """What was asked for and what came of it, in a few lines of text.

        Example:
            >>> account = {"achieved": 0.5, "unused": 0, "smallest_step": 1}
            >>> print(Plan("ratio", {"a": 0.5}, {"sparsity": 0.5}, account, "mine", {}).summary())
            ratio plan for 1 names from the scores 'mine'
            budget: sparsity=0.5
            account: achieved=0.5, unused=0, smallest_step=1
        """
        lines = [f"{self.kind} plan for {len(self.values)} names from the scores {self.method!r}"]
        for title, mapping in (("budget", self.budget), ("account", self.account)):
            shown = (
                f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in mapping.items() if key != "filled"
            )
            lines.append(f"{title}: {', '.join(shown)}")
        if self.kind == "bits":
            counts: dict[int, int] = {}
            for value in self.values.values():
                counts[int(value)] = counts.get(int(value), 0) + 1
            lines.append("sites: " + ", ".join(f"{counts[bits]} at {bits} bits" for bits in sorted(counts, reverse=True)))
        return "\n".join(lines)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each name, and its number of weights where the structure tells it.

        Raises:
            MissingExtraError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("to_frame needs pandas; install it with: pip install 'whatmatters[frames]'") from error
        sizes = {site.name: site.size for site in self.structure.sites} if self.structure is not None else {}
        rows = []
        for name, value in self.values.items():
            row: dict[str, Any] = {"site": name}
            if isinstance(value, Tensor):
                total = float(value.sum(dtype=torch.float64))
                row |= {"units": value.numel(), "kept": int(total) if self.kind == "mask" else total}
            else:
                row |= {"weights": sizes.get(name), self.kind: value}
            rows.append(row)
        return pandas.DataFrame(rows)

    def save(self, path: PathLike, *, overwrite: bool = True) -> None:
        """Write the plan, whole or not at all: bits and ratios as readable JSON text, masks and sampling as one safetensors file.

        Raises:
            FileError: it cannot be written, or it exists and `overwrite` is False.
        """
        header = {
            "format": "whatmatters.plan",
            "version": 1,
            "kind": self.kind,
            "budget": self.budget,
            "account": self.account,
            "method": self.method,
            "settings": self.settings,
        }
        structure = None if self.structure is None else self.structure.to_json()
        if self.kind in _WITH_TENSORS:
            tensors = {f"values/{name}": value for name, value in self.values.items() if isinstance(value, Tensor)}
            write_record(path, header | {"structure": structure, "names": list(self.values)}, tensors, overwrite=overwrite)
        else:
            write_text(path, header | {"values": dict(self.values), "structure": structure}, overwrite=overwrite)

    @classmethod
    def load(cls, path: PathLike, *, mmap: bool = False) -> "Plan":
        """Read what `save` wrote, whichever kind it is.

        Args:
            path: the file.
            mmap: leave masks and probabilities on disk; they are read once, to check them, and then when they are used.

        Raises:
            FileError: there is no such file or it cannot be read.
            FormatError: it is not exactly what `save` writes.
        """
        with reading(path):
            if holds_tensors(path):
                header, tensors = read_record(path, mmap=mmap)
                fields = take(header, "plan", _KEYS | {"names"})
                values: Any = split_tensors(tensors, "values", fields.pop("names"))
                if len(values) != len(tensors):
                    raise InputError("tensors that are no values")
            else:
                fields = take(read_text(path), "plan", _KEYS | {"values"})
                values = fields.pop("values")
            for name in ("kind", "method"):
                if not isinstance(fields[name], str):
                    raise InputTypeError(f"{name} is {type(fields[name]).__name__}; expected text")
            for name in ("budget", "account", "settings"):
                if not isinstance(fields[name], dict):
                    raise InputTypeError(f"{name} is {type(fields[name]).__name__}; expected an object")
            if not isinstance(values, dict):
                raise InputTypeError(f"values are {type(values).__name__}; expected an object")
            for name, value in values.items():
                if not isinstance(value, int | float | Tensor):
                    raise InputTypeError(f"the value of {name!r:.60} is {type(value).__name__}; expected a number")
            if fields["structure"] is not None:
                fields["structure"] = Structure.from_json(fields["structure"])
            return cls._adopt(values=values, **fields)


def _bits(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"bits of {name!r} are {type(value).__name__}; expected a whole number")
    if not 1 <= value <= 32:
        raise InputError(f"bits of {name!r} are {value}; expected 1 to 32, 16 or more for a site that is left as it is")
    return value


def _ratio(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputTypeError(f"ratio of {name!r} is {type(value).__name__}; expected a number")
    if value != value:
        raise NonFiniteError(f"ratio of {name!r} is NaN; expected 0 to 1")
    if not 0 <= value <= 1:
        raise InputError(f"ratio of {name!r} is {value}; expected 0 to 1")
    return float(value)


def _mask(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise InputTypeError(f"mask of {name!r} is no boolean tensor; expected True for the weights that are kept")
    if value.dim() != 2 or value.numel() == 0:
        raise InputError(f"mask of {name!r} has shape {tuple(value.shape)}; expected (out, in)")
    return value.detach().cpu().contiguous()


def _probabilities(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InputTypeError(f"probabilities of {name!r} are no floating-point tensor; expected one from 0 to 1 for each unit")
    if value.numel() == 0:
        raise InputError(f"probabilities of {name!r} are empty; leave out what has no units")
    kept = value.detach().to("cpu", torch.float64 if value.dtype == torch.float64 else torch.float32).contiguous()
    low, high = torch.aminmax(kept)
    if not math.isfinite(low) or not math.isfinite(high):
        raise NonFiniteError(f"probabilities of {name!r} hold {float(low)} and {float(high)}; expected 0 to 1")
    if low < 0 or high > 1:
        raise InputError(f"probabilities of {name!r} go from {float(low)} to {float(high)}; expected 0 to 1")
    return kept
