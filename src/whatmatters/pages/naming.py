"""Short names for people: `model.layers.3.mlp.down_proj` is `mlp.down_proj` in block 3."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from whatmatters.pages.results import Model

__all__ = ["Naming", "by_level", "ranges"]


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as a person lists them.

    Example:
        >>> ranges([0, 2, 3, 4, 7])
        '0, 2–4, 7'
    """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


class Naming:
    """Names of the sites and blocks of one model."""

    def __init__(self, model: Model) -> None:
        self._blocks = {name: index for index, name in enumerate(model.blocks)}
        self._sites = {site.name: site for site in model.sites}
        self._model = model

    def block(self, name: str) -> int:
        """Index of the block that a site or block belongs to, -1 outside all blocks."""
        return self._blocks[name] if name in self._blocks else self._sites[name].block

    def size(self, names: Iterable[str]) -> int:
        """Number of weights of sites, or of all sites of blocks."""
        wanted = set(names)
        blocks = {self._blocks[name] for name in wanted if name in self._blocks}
        return sum(site.size for site in self._model.sites if site.name in wanted or site.block in blocks)

    def block_label(self, name: str) -> str:
        """The index as text, a dash outside all blocks."""
        return str(self.block(name)) if self.block(name) >= 0 else "–"

    def part(self, name: str) -> str:
        """What a site is called inside its block; "whole block" for a block."""
        if name in self._blocks:
            return "whole block"
        block = self._sites[name].block
        return name.removeprefix(f"{self._model.blocks[block]}.") if block >= 0 else name

    def unit(self, names: Sequence[str]) -> str:
        """A unit of sites that go together: "mlp.gate_proj + up_proj"."""
        parts = [self.part(name) for name in names]
        owner = parts[0].rpartition(".")[0]
        rest = [part.removeprefix(f"{owner}.") if owner else part for part in parts[1:]]
        return " + ".join([parts[0], *rest]) if len(parts) <= 4 else f"{parts[0]} and {len(parts) - 1} more"

    def by_part(self, names: Iterable[str], most: int = 3) -> str:
        """Sites told by part and block: "mlp.down_proj in blocks 0, 3–5; self_attn.o_proj in block 2", the most numerous first."""
        blocks: dict[str, list[int]] = {}
        for name in names:
            blocks.setdefault(self.part(name), []).append(self.block(name))
        merged: dict[tuple[int, ...], list[str]] = {}
        for part, found in blocks.items():
            merged.setdefault(tuple(found), []).append(part)
        ordered = sorted(merged.items(), key=lambda item: -len(item[0]) * len(item[1]))
        told = [f"{self.together(parts)} in {self._where(found)}" for found, parts in ordered[:most]]
        left = sum(len(found) * len(parts) for found, parts in ordered[most:])
        return "; ".join(told) + (f"; and {left} more" if left else "")

    def _where(self, blocks: Sequence[int]) -> str:
        if len(set(blocks)) == len(self._model.blocks) > 1:
            return "every block"
        return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {ranges(blocks)}"

    def together(self, parts: Sequence[str]) -> str:
        """Parts of one block without saying their common owner twice."""
        owner = parts[0].rpartition(".")[0]
        if owner and all(part.startswith(f"{owner}.") for part in parts):
            return f"{owner}.{parts[0].removeprefix(owner + '.')}" + "".join(f", {part.removeprefix(owner + '.')}" for part in parts[1:])
        return ", ".join(parts)


def by_level(levels: Mapping[str, int]) -> dict[int, list[str]]:
    """Sites of each level, the lowest first."""
    found: dict[int, list[str]] = {}
    for name, bits in levels.items():
        found.setdefault(bits, []).append(name)
    return dict(sorted(found.items()))
