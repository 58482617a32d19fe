"""Scores: what matters, by site. The frozen, saved form of a scorer's answer, from which any number of plans is made.

Higher matters more. Ties break by position everywhere: of two equal units the earlier one counts as the more important.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whatmatters.core.catalog import UNITS
from whatmatters.core.errors import InputError, InputTypeError, MissingExtraError, NonFiniteError
from whatmatters.core.records import (
    PathLike,
    check_name,
    check_names,
    check_settings,
    read_record,
    reading,
    split_tensors,
    take,
    thawed,
    write_record,
)
from whatmatters.core.sites import Site, Structure

__all__ = ["Scores", "level_list"]

SCALES = ("rank", "loss")

_DIMS = {"layer": 0, "channel": 1, "weight": 2, "token": 2}
_INDEX_NAMES = {"channel": ("channel",), "weight": ("row", "column"), "token": ("sample", "position")}
_KEYS = frozenset({"unit", "method", "settings", "scale", "structure", "names"})
_LARGEST_TABLE = 10_000_000


@dataclass(frozen=True, eq=False)
class Scores:
    """The importance of all units of one kind, by site.

    Args:
        unit: what is scored, one of `core.catalog.UNITS`.
        values: "layer": block or site name to a number (0-dimensional tensor); "weight": site to (out, in); "channel": site to (in,);
            "token": block to (samples, length). Floating point; kept as contiguous CPU float32 or float64 copies.
        method: the scorer's name.
        settings: what the scorer was told, JSON-able.
        scale: "rank": only the order means something. "loss": unit "layer" only; each value is a vector of predicted losses, one per level
            of `settings["levels"]`, ascending.
        structure: sizes, blocks and ties of the model that was scored.
        valid: unit "token" only: which positions are tokens and not padding, True for a token.

    Raises:
        InputTypeError: a value is not a floating-point tensor, or a name not text.
        InputError: an unknown unit or scale, a shape that the unit does not have, a name that the structure does not have.
        NonFiniteError: NaN or infinity; the message names the site.

    Example:
        >>> scores = Scores("layer", {"h.0": torch.tensor(0.5), "h.1": torch.tensor(2.0)}, "mine", {})
        >>> scores.order()
        ['h.1', 'h.0']
    """

    unit: str
    values: Mapping[str, Tensor]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scale: str = "rank"
    structure: Structure | None = None
    valid: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        values = {name: _copied(value, _kept(name, value)) for name, value in check_names(self.values).items()}
        valid = self.valid
        if valid is not None:
            valid = {name: _copied(mask, _kept_mask(name, mask)) for name, mask in check_names(valid).items()}
        self._settle(values, valid)

    @classmethod
    def _adopt(
        cls,
        unit: str,
        values: Mapping[str, Tensor],
        method: str,
        settings: Mapping[str, Any],
        scale: str,
        structure: Structure | None,
        valid: Mapping[str, Tensor] | None,
    ) -> "Scores":
        """Scores over tensors nobody else writes to (just computed, or mapped from a file): checked, not copied."""
        scores = object.__new__(cls)
        for name, value in (("unit", unit), ("method", method), ("settings", settings), ("scale", scale), ("structure", structure)):
            object.__setattr__(scores, name, value)
        kept = {name: _kept(name, value) for name, value in check_names(values).items()}
        scores._settle(kept, None if valid is None else {name: _kept_mask(name, mask) for name, mask in check_names(valid).items()})
        return scores

    def _settle(self, values: dict[str, Tensor], valid: dict[str, Tensor] | None) -> None:
        """Check everything and freeze the mappings."""
        object.__setattr__(self, "values", MappingProxyType(values))
        object.__setattr__(self, "valid", None if valid is None else MappingProxyType(valid))
        object.__setattr__(self, "settings", check_settings(self.settings))
        if self.unit not in UNITS:
            raise InputError(f"unit {self.unit!r:.40} is unknown; expected one of {', '.join(UNITS)}")
        if self.scale not in SCALES:
            raise InputError(f"scale {self.scale!r:.40} is unknown; expected 'rank' or 'loss'")
        check_name(self.method, "method")
        self._check_shapes()
        if self.structure is not None:
            self.check_structure(self.structure)
        for name, value in values.items():
            # min and max propagate NaN, and need no boolean copy of a value that may be mapped from disk.
            low, high = torch.aminmax(value)
            if not math.isfinite(low) or not math.isfinite(high):
                raise NonFiniteError(
                    f"scores of {name!r} hold {float(low)} and {float(high)}; expected finite numbers: check the weights there"
                )

    def _check_shapes(self) -> None:
        dims = _DIMS.get(self.unit)
        levels: tuple[int, ...] = ()
        if self.scale == "loss":
            if self.unit != "layer":
                raise InputError(f"unit {self.unit!r} with scale 'loss'; loss tables are for layers only: use scale='rank'")
            levels, dims = self.levels, 1
        for name, value in self.values.items():
            if value.numel() == 0:
                raise InputError(f"scores of {name!r} are empty (shape {tuple(value.shape)}); leave out what has no units")
            if dims is not None and value.dim() != dims:
                raise InputError(f"scores of {name!r} have shape {tuple(value.shape)}; unit {self.unit!r} has {dims} dimensions")
            if levels and len(value) != len(levels):
                raise InputError(f"scores of {name!r} hold {len(value)} losses for the {len(levels)} levels {levels}; expected one each")
        if self.valid is None:
            return
        if self.unit != "token":
            raise InputError(f"valid positions are given for unit {self.unit!r}; expected unit 'token'")
        if set(self.valid) != set(self.values):
            raise InputError("valid positions and values name different blocks; expected one mask for each")
        for name, mask in self.valid.items():
            if mask.shape != self.values[name].shape:
                raise InputError(
                    f"valid of {name!r} has shape {tuple(mask.shape)}; expected that of the scores, {tuple(self.values[name].shape)}"
                )
            if not mask.any():
                raise InputError(f"valid of {name!r} has no valid position; leave out what is all padding")

    def check_structure(self, structure: Structure) -> None:
        """Raise InputError if the scores name or shape anything as the structure does not have it."""
        sites = {site.name: site for site in structure.sites}
        for name, value in self.values.items():
            known = (name in sites and self.unit != "token") or (name in structure.blocks and self.unit not in ("weight", "channel"))
            if self.unit in _DIMS and not known:
                what = {"layer": "block or site", "token": "block"}.get(self.unit, "site")
                raise InputError(
                    f"scores of {name!r}, which is no {what} of the structure; give the structure of the model that was scored"
                )
            if self.unit in ("weight", "channel"):
                expected = sites[name].shape if self.unit == "weight" else sites[name].shape[1:]
                if tuple(value.shape) != expected:
                    raise InputError(f"scores of {name!r} have shape {tuple(value.shape)}; the site has {expected}")

    def _like(self, values: Mapping[str, Tensor], **changed: Any) -> "Scores":
        fields = {"unit": self.unit, "method": self.method, "settings": self.settings, "scale": self.scale,
                  "structure": self.structure, "valid": self.valid}  # fmt: skip
        return Scores._adopt(values=values, **(fields | changed))

    def __reduce__(self) -> tuple[Any, ...]:
        """Scores can be copied and sent to other processes."""
        valid = None if self.valid is None else dict(self.valid)
        return type(self), (self.unit, dict(self.values), self.method, thawed(self.settings), self.scale, self.structure, valid)

    def __repr__(self) -> str:
        return f"Scores({self.method!r}, {len(self.values)} x {self.unit}, scale={self.scale!r})"

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of a loss table, ascending; raises InputError if there are none."""
        if self.scale != "loss":
            raise InputError(f"scores of {self.method!r} have scale {self.scale!r} and no levels; expected scale 'loss'")
        levels = self.settings.get("levels")
        if not isinstance(levels, tuple):
            raise InputError("a loss table needs settings['levels'], the list of its levels in ascending order")
        if level_list(levels) != levels:
            raise InputError(f"settings['levels'] are {levels}; expected ascending order")
        return levels

    def stakes(self) -> "Scores":
        """Scale "rank" from scale "loss": what is lost between the highest level and the lowest. Rank scores are returned as they are.

        Example:
            >>> table = Scores("layer", {"a": torch.tensor([3.0, 1.0])}, "mine", {"levels": [2, 4]}, scale="loss")
            >>> table.stakes().values["a"].item()
            2.0
        """
        if self.scale == "rank":
            return self
        return self._like({name: v[0].double() - v[-1].double() for name, v in self.values.items()}, scale="rank")

    def _flat(self) -> tuple[Float[Tensor, " units"], list[int]]:
        """All values in one vector, padding as minus infinity, and where each name begins (and the end)."""
        pieces = []
        for name, value in self.values.items():
            flat = value.reshape(-1)
            pieces.append(flat if self.valid is None else flat.masked_fill(~self.valid[name].reshape(-1), -math.inf))
        return torch.cat(pieces), np.cumsum([0] + [p.numel() for p in pieces]).tolist()

    def _counted(self) -> int:
        """Number of units, padding left out."""
        if self.valid is not None:
            return sum(int(mask.sum()) for mask in self.valid.values())
        return sum(value.numel() for value in self.values.values())

    def top(self, k: int) -> list[tuple[str, tuple[int, ...], float]]:
        """The k most important units over all sites, most important first; equal ones by position.

        Args:
            k: how many, from 0 to the number of units.

        Returns:
            (site, index inside its tensor, value); padding never appears. A loss table is ranked by its `stakes`.

        Example:
            >>> Scores("channel", {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0])}, "mine", {}).top(2)
            [('a', (1,), 3.0), ('b', (0,), 3.0)]
        """
        from whatmatters.core.allocation import top_k  # allocation stands above scores

        scores = self.stakes()
        count = scores._counted()
        if not 0 <= k <= count:
            raise InputError(f"top {k} of {count} units; expected 0 to {count}")
        flat, starts = scores._flat()
        chosen = top_k(flat, k).nonzero().squeeze(1)
        chosen = chosen[torch.sort(flat[chosen], descending=True, stable=True).indices]
        names = list(scores.values)
        found = []
        for place, value in zip(chosen.tolist(), flat[chosen].tolist(), strict=True):
            number = int(np.searchsorted(starts, place, side="right")) - 1
            index = np.unravel_index(place - starts[number], scores.values[names[number]].shape)
            found.append((names[number], tuple(int(i) for i in index), value))
        return found

    def rank(self) -> "Scores":
        """Scores whose values are ranks over all sites, 0 for the least important; of equal units the later has the lower rank.

        Padding has rank 0. Invariant to any increasing map of the values. A loss table is ranked by its `stakes`.

        Example:
            >>> ranked = Scores("channel", {"a": torch.tensor([1.0, 1.0, 3.0])}, "mine", {}).rank()
            >>> ranked.values["a"].tolist()
            [1.0, 0.0, 2.0]
        """
        scores = self.stakes()
        flat, starts = scores._flat()
        order = torch.sort(flat, descending=True, stable=True).indices
        ranks = torch.empty(len(flat), dtype=torch.float64)
        ranks[order] = torch.arange(scores._counted() - 1, scores._counted() - 1 - len(flat), -1, dtype=torch.float64)
        ranks.clamp_(min=0)
        pieces = {n: ranks[a:b].reshape(v.shape) for (n, v), a, b in zip(scores.values.items(), starts, starts[1:], strict=False)}
        return scores._like(pieces)

    def order(self) -> list[str]:
        """Names, most important first, equal ones by position. Unit "layer"; a loss table is ordered by its `stakes`."""
        self.expect_unit("layer")
        values = {name: value.item() for name, value in self.stakes().values.items()}
        return sorted(values, key=lambda name: -values[name])

    def expect_unit(self, *units: str) -> None:
        """Raise InputTypeError unless the scores are of one of these units."""
        if self.unit not in units:
            raise InputTypeError(
                f"scores of unit {self.unit!r}; expected {' or '.join(map(repr, units))}: reduce them or use another scorer"
            )

    def lift(self, sites: Structure | Iterable[Site]) -> "Scores":
        """Scores by site from scores by block: every site gets its block's score; a score of the site itself goes first.

        Args:
            sites: the sites that are wanted, or a structure for all of its sites.

        Returns:
            Layer scores keyed by site, in the order of `sites`. A block's losses are shared among its sites in proportion to their weights,
            so that their sum stays what it was.

        Raises:
            InputTypeError: the unit is not "layer".
            InputError: neither a site nor its block has a score.

        Example:
            >>> sites = [Site("h.0.fc", "h.0.fc.weight", (4, 2), "h.0")]
            >>> Scores("layer", {"h.0": torch.tensor(2.0)}, "mine", {}).lift(sites).order()
            ['h.0.fc']
        """
        self.expect_unit("layer")
        structure = sites if isinstance(sites, Structure) else self.structure
        wanted = tuple(sites.sites if isinstance(sites, Structure) else sites)
        shared: dict[str, int] = {}
        for site in wanted:
            if site.name not in self.values:
                if site.block not in self.values:
                    raise InputError(
                        f"site {site.name!r} has no score, and neither has its block {site.block!r}; score every block or site"
                    )
                shared[site.block] = shared.get(site.block, 0) + site.size
        values = {}
        for site in wanted:
            if site.name in self.values:
                values[site.name] = self.values[site.name]
            elif self.scale == "loss":
                values[site.name] = self.values[site.block].double() * (site.size / shared[site.block])
            else:
                values[site.name] = self.values[site.block]
        return self._like(values, structure=structure)

    def normalized(self, by: Literal["sum", "max", "minmax", "site"] = "sum") -> "Scores":
        """The same order on a common scale; padding becomes 0 and does not count.

        Args:
            by: "sum": magnitudes add up to 1 over all sites; "max": the largest magnitude is 1; "minmax": from 0 to 1 (all equal: all 0);
                "site": magnitudes add up to 1 within each site, which changes the order between sites.

        Raises:
            InputError: all scores (for "site": of one site) are zero, or the scores are losses.

        Example:
            >>> Scores("layer", {"a": torch.tensor(1.0), "b": torch.tensor(3.0)}, "mine", {}).normalized().values["b"].item()
            0.75
        """
        if self.scale == "loss":
            raise InputError("a loss table is in units of loss and is not normalized; use `stakes()` for an order")
        if by not in ("sum", "max", "minmax", "site"):
            raise InputError(f"normalized by {by!r:.40}; expected 'sum', 'max', 'minmax' or 'site'")
        parts = {name: self._units(name).double() for name in self.values}
        shift, scale = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 1.0)
        if by == "minmax":
            low, high = min(float(p.min()) for p in parts.values()), max(float(p.max()) for p in parts.values())
            shift, scale = dict.fromkeys(parts, low), dict.fromkeys(parts, high - low or 1.0)
        elif by == "site":
            scale = {name: float(part.abs().sum()) for name, part in parts.items()}
        elif by == "sum":
            scale = dict.fromkeys(parts, math.fsum(float(p.abs().sum()) for p in parts.values()))
        else:
            scale = dict.fromkeys(parts, max(float(p.abs().max()) for p in parts.values()))
        for name, divisor in scale.items():
            if divisor == 0 or not math.isfinite(divisor):
                raise InputError(f"scores of {name!r} cannot be normalized by {by!r}: the divisor is {divisor}; use by='minmax'")
        values = {}
        for name, value in self.values.items():
            changed = (value.double() - shift[name]) / scale[name]
            values[name] = (changed if self.valid is None else changed.masked_fill(~self.valid[name], 0.0)).to(value.dtype)
        return self._like(values)

    def _units(self, name: str) -> Tensor:
        """The values of one name, padding left out."""
        value = self.values[name]
        return value if self.valid is None else value[self.valid[name]]

    def reduce(
        self,
        how: Literal["mean", "sum"] = "mean",
        *,
        to: Literal["layer", "channel"] = "layer",
        by: Literal["site", "block"] = "site",
        structure: Structure | None = None,
    ) -> "Scores":
        """One score for each site or block, or for each input channel.

        Args:
            how: mean or sum over the units; padding does not count.
            to: "layer" for one number, "channel" for one per input of a weight.
            by: "site": names as they are; "block": all sites of a block together, each unit counting once (of layer scores: each weight).
            structure: which site belongs to which block, where the scores carry no structure.

        Raises:
            InputTypeError: the unit cannot be reduced to that.
            InputError: `by="block"` without a structure, a site outside all blocks, or a mean of losses.

        Example:
            >>> Scores("weight", {"a": torch.ones(2, 3)}, "mine", {}).reduce("sum").values["a"].item()
            6.0
        """
        for given, known in ((how, ("mean", "sum")), (to, ("layer", "channel")), (by, ("site", "block"))):
            if given not in known:
                raise InputError(f"reduce was told {given!r:.40}; expected {' or '.join(map(repr, known))}")
        structure = structure or self.structure
        if to == "channel":
            self.expect_unit("weight")
            if by == "block":
                raise InputError("channels of different sites cannot be reduced by block; use by='site'")
            return self._like(
                {n: v.double().mean(0) if how == "mean" else v.double().sum(0) for n, v in self.values.items()}, unit="channel"
            )
        if self.scale == "loss" and how == "mean":
            raise InputError("the mean of losses predicts nothing; use how='sum'")
        groups = {name: [name] for name in self.values} if by == "site" else self._by_block(structure)
        sizes = {site.name: site.size for site in structure.sites} if structure is not None else {}
        values = {}
        for name, members in groups.items():
            parts = [self._units(member).double() for member in members]
            if self.unit == "layer":
                weights = [sizes.get(member, 1) if how == "mean" else 1 for member in members]
                total, count = sum(p * w for p, w in zip(parts, weights, strict=True)), sum(weights)
            else:
                total, count = sum(p.sum() for p in parts), sum(p.numel() for p in parts)
            values[name] = torch.as_tensor(total / count if how == "mean" else total, dtype=torch.float64)
        return self._like(values, unit="layer", structure=structure, valid=None)

    def _by_block(self, structure: Structure | None) -> dict[str, list[str]]:
        if structure is None:
            raise InputError("reduce by block needs to know the blocks; give structure=")
        block_of = {block: block for block in structure.blocks} | {site.name: site.block for site in structure.sites}
        groups: dict[str, list[str]] = {block: [] for block in structure.blocks}
        for name in self.values:
            if not block_of.get(name):
                raise InputError(f"{name!r} is in no block of the structure; reduce by='site'")
            groups[block_of[name]].append(name)
        return {block: members for block, members in groups.items() if members}

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row a unit: site, index columns, value. Padding is left out.

        Raises:
            MissingExtraError: pandas is missing.
            InputError: more than ten million units.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("to_frame needs pandas; install it with: pip install 'whatmatters[frames]'") from error
        if (count := sum(v.numel() for v in self.values.values())) > _LARGEST_TABLE:
            raise InputError(f"{count} units make too large a table; reduce() them to channels or layers first")
        frames = []
        for name, value in self.values.items():
            columns: dict[str, Any] = {"site": name}
            labels = ("level",) if self.scale == "loss" else _INDEX_NAMES.get(self.unit, tuple(f"index_{d}" for d in range(value.dim())))
            columns |= {label: axis.reshape(-1) for label, axis in zip(labels, np.indices(tuple(value.shape)), strict=True)}
            if self.scale == "loss":
                columns["level"] = list(self.levels)
            columns["value"] = value.reshape(-1).numpy()
            frame = pandas.DataFrame(columns)
            frames.append(frame if self.valid is None else frame[self.valid[name].reshape(-1).numpy()])
        return pandas.concat(frames, ignore_index=True)

    def plot(self) -> Any:
        """A matplotlib Figure: a bar for each layer, a line for each level of a loss table, or the spread within each site."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(min(24.0, 3 + 0.25 * len(self.values)), 4), layout="constrained")
        axes = figure.add_subplot()
        names = list(self.values)
        places = range(len(names))
        if self.scale == "loss":
            for column, level in enumerate(self.levels):
                axes.plot(places, [float(self.values[name][column]) for name in names], marker=".", label=f"{level} bits")
            axes.legend()
        elif self.unit == "layer":
            axes.bar(places, [float(value) for value in self.values.values()])
        else:
            quantiles = [_quantiles(self._units(name)) for name in names]
            boxes = [{"med": q[2], "q1": q[1], "q3": q[3], "whislo": q[0], "whishi": q[4], "label": ""} for q in quantiles]
            axes.bxp(boxes, positions=list(places), showfliers=False)
        step = max(1, len(names) // 60)
        # Names come from a model and may hold characters that matplotlib would take for mathematics.
        axes.set_xticks(places[::step], [name.replace("$", r"\$") for name in names[::step]], rotation=90, fontsize="small")
        axes.set_ylabel("predicted loss" if self.scale == "loss" else "importance")
        axes.set_title(f"{self.method.replace('$', chr(92) + '$')}, by {self.unit}")
        return figure

    def save(self, path: PathLike, *, overwrite: bool = True) -> None:
        """Write one safetensors file, whole or not at all; everything but the numbers is JSON in its header.

        Raises:
            FileError: it cannot be written, or it exists and `overwrite` is False.
        """
        tensors = {f"values/{name}": value for name, value in self.values.items()}
        tensors |= {f"valid/{name}": mask for name, mask in (self.valid or {}).items()}
        header = {
            "format": "whatmatters.scores",
            "version": 1,
            "unit": self.unit,
            "method": self.method,
            "settings": self.settings,
            "scale": self.scale,
            "structure": None if self.structure is None else self.structure.to_json(),
            "names": list(self.values),
        }
        write_record(path, header, tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: PathLike, *, mmap: bool = False) -> "Scores":
        """Read what `save` wrote.

        Args:
            path: the file.
            mmap: leave the numbers on disk; they are read once, to check that they are finite, and then when they are used.

        Raises:
            FileError: there is no such file or it cannot be read.
            FormatError: it is not exactly what `save` writes.
        """
        with reading(path):
            header, tensors = read_record(path, mmap=mmap)
            fields = take(header, "scores", _KEYS)
            names = fields.pop("names")
            values = split_tensors(tensors, "values", names)
            valid = split_tensors(tensors, "valid", names) if len(tensors) != len(values) else None
            if len(tensors) != len(values) + len(valid or {}):
                raise InputError("tensors that are neither values nor valid positions")
            for name in ("unit", "method", "scale"):
                if not isinstance(fields[name], str):
                    raise InputTypeError(f"{name} is {type(fields[name]).__name__}; expected text")
            if not isinstance(fields["settings"], dict):
                raise InputTypeError(f"settings is {type(fields['settings']).__name__}; expected an object")
            if fields["structure"] is not None:
                fields["structure"] = Structure.from_json(fields["structure"])
            return cls._adopt(values=values, valid=valid, **fields)


def level_list(levels: Iterable[object]) -> tuple[int, ...]:
    """Levels in ascending order: distinct whole bit widths from 1 to 32, at most one of them 16 or more ("left as it is")."""
    found = tuple(levels)
    for level in found:
        if isinstance(level, bool) or not isinstance(level, int):
            raise InputTypeError(f"level {level!r:.20} is {type(level).__name__}; expected a whole number of bits")
        if not 1 <= level <= 32:
            raise InputError(f"level {level} is out of range; expected 1 to 32 bits")
    ascending = tuple(sorted(level for level in found if isinstance(level, int)))
    if not ascending or len(set(ascending)) != len(ascending) or (len(ascending) > 1 and ascending[-2] >= 16):
        raise InputError(f"levels {found}; expected one or more distinct widths, at most one of them 16 or more (left as it is)")
    return ascending


def _kept(name: str, value: Any) -> Float[Tensor, "..."]:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"scores of {name!r} are {type(value).__name__}; expected a tensor")
    if not value.is_floating_point():
        raise InputTypeError(f"scores of {name!r} have dtype {value.dtype}; expected floating point")
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.detach().to(device="cpu", dtype=dtype).contiguous()


def _kept_mask(name: str, mask: Any) -> Bool[Tensor, "..."]:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InputTypeError(f"valid of {name!r} is no boolean tensor; expected True for tokens, False for padding")
    return mask.detach().cpu().contiguous()


def _copied(given: Tensor, kept: Tensor) -> Tensor:
    """`kept`, as a copy if it still shares memory with what was given: the giver may go on writing there."""
    return kept.clone() if kept.untyped_storage().data_ptr() == given.untyped_storage().data_ptr() else kept


def _quantiles(values: Float[Tensor, "..."]) -> list[float]:
    flat = values.reshape(-1)
    return np.quantile(flat[:: max(1, flat.numel() // 1_000_000)].numpy(), (0, 0.25, 0.5, 0.75, 1)).tolist()
