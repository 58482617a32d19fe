"""Scan: what a model's weights say without any text: sizes, sites, ties, outliers, rounding error, and what quantizing it would need.

The weights are streamed from the checkpoint, a tensor at a time and each in pieces: the structure comes from the model on the meta device,
so the whole model is never in memory. (Pages of the shard being read are mapped and may stay resident; the system takes them back when it
wants them.)
"""

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatmatters.core.catalog import door
from whatmatters.core.checkpoint import PathLike, check_savable, load_meta, stream_tensors
from whatmatters.core.errors import FormatError, InputError, NonFiniteError, WhatMattersError
from whatmatters.core.evaluate import PeakMemory
from whatmatters.core.formats import DENSE_BITS, WIDTHS, stored_bits
from whatmatters.core.grids import GridSettings, fit_grid, rounded
from whatmatters.core.progress import Progress
from whatmatters.core.sites import Site, Structure, structure
from whatmatters.core.walk import SPILL_BYTES

__all__ = ["Needs", "Scan", "needs", "scan"]

PIECE = 1 << 16
"""Weights measured at a time: they stay in the cache, which halves the time."""

MICRO_BATCH = 8
STATISTIC = 8
"""Bytes of a number of a calibration statistic (float64)."""

SLACK = 64 * 2**20
"""Bytes of everything that does not grow with the model."""


@dataclass(frozen=True)
class Needs:
    """What quantizing a model takes, from its shapes and a few measured rates of this machine. Bytes are upper bounds, seconds a guess that
    counts matrix products and rounding only: a model of a few million weights takes up to three times as long.

    Attributes:
        model_bytes: the loaded model.
        peak_bytes: most memory, the model included: two blocks, the inputs and outputs of one block (of one micro-batch, once they are kept
            on disk), four statistics of the widest input, the activations of one micro-batch or the logits of one window, 64 MB.
        disk_bytes: the run folder at its largest: finished blocks and the inputs kept on disk.
        seconds: by kind of method: "rtn" (rounding to nearest with clip search) and "hessian" (calibration, solve and rounding, as GPTQ).
        rates: what was measured here: FLOP/s of matrix products in the model's dtype, float32 and float64; weights rounded a second.
    """

    model_bytes: int
    peak_bytes: int
    disk_bytes: int
    seconds: dict[str, float]
    rates: dict[str, float]


@dataclass(frozen=True, eq=False)
class Scan:
    """What a scan found.

    Attributes:
        model: what was scanned.
        structure: blocks, sites, ties, uncovered weights.
        rows: one a site, in site order: "site", "block", "shape", "weights", "tie" (number of its tied group, None if free),
            "max_over_rms", "kurtosis" (3 for a normal distribution), "beyond_3" (share with |z| > 3), "zd" (share with z > 1), "rms",
            "rtn_error" (bits to |W - Q(W)|^2 / |W|^2, rounded to nearest over the full range), "flags". Tensors of the file that no site
            could be found for have a row of their own, with "matched" False.
        outside: parameters in no site, embeddings and norms: "name", "shape", "bytes", "tied_to".
        missing: sites that no tensor of the file was found for.
        levels: bit widths asked about.
        group_size: inputs that share a scale, -1 for a whole row.
        symmetric: without zero points.
        bytes_now: the weights as they are, tied ones once.
        bytes_at: bytes of the whole model by level: every site at that level, as a checkpoint stores it, the rest as it is now.
        average_range: lowest and highest average bits a weight of a plan over these levels, in the stored count.
        needs: what quantizing takes here.
        notes: what a reader must know.
        seconds: time of the scan.
        peak_bytes: memory of the scan above the start.
    """

    model: str
    structure: Structure
    rows: list[dict[str, Any]]
    outside: list[dict[str, Any]]
    missing: list[str]
    levels: tuple[int, ...]
    group_size: int
    symmetric: bool
    bytes_now: int
    bytes_at: dict[int, int]
    average_range: tuple[float, float]
    needs: Needs
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {"structure": self.structure.to_json(), "needs": asdict(self.needs), "levels": list(self.levels)}
        fields["average_range"] = list(self.average_range)
        fields["bytes_at"] = {str(level): size for level, size in self.bytes_at.items()}
        fields["rows"] = [row | {"rtn_error": {str(b): e for b, e in row["rtn_error"].items()}} for row in self.rows]
        return fields

    def summary(self) -> str:
        """What was found, in a few lines of text."""
        found, sites = self.structure, [row for row in self.rows if row["matched"]]
        weights = sum(site.size for site in found.sites)
        lines = [
            f"{self.model}: {len(found.blocks)} blocks, {len(found.sites)} sites with {weights:,} weights, {len(found.ties)} tied groups",
            f"size now {_megabytes(self.bytes_now)}; "
            + ", ".join(f"{level} bits {_megabytes(size)}" for level, size in self.bytes_at.items())
            + f" (group size {self.group_size})",
            f"feasible averages: {self.average_range[0]:.4g} to {self.average_range[1]:.4g} stored bits a weight",
        ]
        if sites:
            peaks = sorted(sites, key=lambda row: -row["max_over_rms"])[:3]
            lines.append("largest outliers (max / rms): " + ", ".join(f"{row['site']} {row['max_over_rms']:.1f}" for row in peaks))
        for level in [b for b in self.levels if b < DENSE_BITS] if sites else []:
            worst = max(sites, key=lambda row: row["rtn_error"][level])
            mean = sum(row["rtn_error"][level] * row["weights"] for row in sites) / sum(row["weights"] for row in sites)
            error = worst["rtn_error"][level]
            lines.append(f"rounding to {level} bits: relative error {mean:.2e} on average, {error:.2e} at worst ({worst['site']})")
        seconds = ", ".join(f"{kind} {_spoken(value)}" for kind, value in self.needs.seconds.items())
        lines.append(
            f"to quantize it here: memory {_megabytes(self.needs.peak_bytes)}, disk {_megabytes(self.needs.disk_bytes)}, about {seconds}"
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def plot(self) -> Any:
        """A matplotlib Figure: outliers above, rounding error for each width below, site by site."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(min(24.0, 4 + 0.12 * len(self.rows)), 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        places = range(len(self.rows))
        above.plot(places, [row["max_over_rms"] for row in self.rows], marker=".", linewidth=0.8, label="max / rms")
        above.plot(places, [row["kurtosis"] for row in self.rows], marker=".", linewidth=0.8, label="kurtosis")
        above.set_yscale("symlog", linthresh=1)
        above.set_ylabel("outliers")
        above.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        for level in [b for b in self.levels if b < DENSE_BITS]:
            below.plot(places, [row["rtn_error"][level] for row in self.rows], marker=".", linewidth=0.8, label=f"{level} bits")
        below.set_yscale("symlog", linthresh=1e-6)
        below.set_ylabel("relative error of rounding")
        below.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        step = max(1, len(self.rows) // 60)
        # Names come from a model and may hold characters that matplotlib would take for mathematics.
        names = [row["site"].replace("$", r"\$") for row in self.rows[::step]]
        below.set_xticks(places[::step], names, rotation=90, fontsize="x-small")
        return figure


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _spoken(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@door("scan")
def scan(
    path_or_model: PathLike | nn.Module,
    *,
    levels: Sequence[int] = (2, 3, 4, 8),
    group_size: int = 128,
    symmetric: bool = True,
    samples: int = 128,
    length: int = 512,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Scan:
    """Look at a model's weights, without any text.

    Args:
        path_or_model: a model folder or hub id, whose weights are streamed; or a model that is in memory.
        levels: bit widths to ask about, 2 to 8 (16: left as it is).
        group_size: inputs that share a scale; -1: one scale per output channel.
        symmetric: codes signed around zero; False: with zero points.
        samples: calibration windows, for what quantizing would need.
        length: tokens a window.
        trust_remote_code: whether code that comes with the model may run.
        progress: told after each site.

    Returns:
        The scan.

    Raises:
        InputError: a level the format cannot hold, or a group size that does not divide a site's inputs.
        NonFiniteError: NaN or infinity; the message names the site.
        FileError: no such folder or model, or no weights in it.
        FormatError: corrupt or missing shards, weights the model needs are not in the files, or a model that is quantized already.
        ModelError: not a causal language model, or no sites.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> [row["site"] for row in scan(model, group_size=4).rows]
        ['0', '2']
    """
    start = time.perf_counter()
    with PeakMemory() as peak:
        if isinstance(path_or_model, nn.Module):
            model, name = path_or_model, type(path_or_model).__name__
            tensors: Iterable[tuple[str, Tensor]] = model.state_dict().items()
        else:
            model, name = load_meta(path_or_model, trust_remote_code=trust_remote_code), os.fspath(path_or_model)
            tensors = stream_tensors(path_or_model)
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            raise FormatError(f"{name} is quantized already; scan the model it was made from")
        found = structure(model)
        settings = GridSettings(group_size, symmetric, clip_search=False)
        chosen = _checked(levels, found, settings)
        reading = _Reading(model, found, chosen, settings, progress)
        for key, tensor in tensors:
            reading.add(key, tensor)
        reading.finish(name)
        needed = needs(model, found, samples=samples, length=length, group_size=group_size, symmetric=symmetric)
    stored = {
        level: sum(stored_bits(site.shape, level, group_size=group_size, symmetric=symmetric) for site in found.sites) for level in chosen
    }
    left = sum(row["bytes"] for row in reading.outside if row["tied_to"] is None)
    weights = sum(site.size for site in found.sites)
    return Scan(
        model=name,
        structure=found,
        rows=reading.rows(),
        outside=reading.outside,
        missing=reading.missing(),
        levels=chosen,
        group_size=group_size,
        symmetric=symmetric,
        bytes_now=reading.bytes,
        bytes_at={level: bits // 8 + left for level, bits in stored.items()},
        average_range=(min(stored.values()) / weights, max(stored.values()) / weights),
        needs=needed,
        notes=[*reading.notes, *_notes(model, found, chosen, settings)],
        seconds=time.perf_counter() - start,
        peak_bytes=peak.bytes,
    )


def _checked(levels: Sequence[int], found: Structure, settings: GridSettings) -> tuple[int, ...]:
    """The levels, ascending; raises InputError for what no site can have."""
    chosen = tuple(sorted(set(levels)))
    bad = [level for level in chosen if level not in WIDTHS and level < DENSE_BITS]
    if not chosen or bad:
        raise InputError(f"levels {tuple(levels)}; expected widths of {WIDTHS}, or {DENSE_BITS} for a site left as it is")
    for site in found.sites:
        try:
            stored_bits(site.shape, chosen[0], group_size=settings.group_size, symmetric=settings.symmetric)
        except InputError as error:
            raise InputError(f"{site.name}: {error}") from None
    return chosen


def _notes(model: nn.Module, found: Structure, levels: tuple[int, ...], settings: GridSettings) -> list[str]:
    notes = []
    if found.uncovered:
        more = f" and {len(found.uncovered) - 1} more" if len(found.uncovered) > 1 else ""
        notes.append(f"no site covers {found.uncovered[0]}{more}: left as it is")
    if levels[0] < DENSE_BITS:
        try:
            bits = {site.name: levels[0] for site in found.sites}
            check_savable(model, bits, group_size=settings.group_size, symmetric=settings.symmetric)
        except WhatMattersError as error:
            notes.append(f"a quantized checkpoint cannot hold it: {str(error).splitlines()[0]}")
    return notes


# Reading


class _Reading:
    """Tensors as they come, each brought to the site it belongs to and measured when the site is whole."""

    def __init__(
        self, model: nn.Module, found: Structure, levels: tuple[int, ...], settings: GridSettings, progress: Progress | None
    ) -> None:
        self.found = found
        self.levels = tuple(level for level in levels if level < DENSE_BITS)
        self.settings = settings
        self.progress = progress
        self.outside: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.bytes = 0
        self.strays: list[dict[str, Any]] = []
        self.unmatched: list[dict[str, Any]] = []
        self.measured: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, list[Tensor]] = {}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.dtypes = {name: parameter.dtype for name, parameter in self.parameters.items()}
        self.known = self.parameters.keys() | {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
        self.sites: dict[str, list[Site]] = {}
        for site in found.sites:
            self.sites.setdefault(site.parameter, []).append(site)
        self.tie = {name: number for number, group in enumerate(found.ties) for name in group}
        self.seen: set[str] = set()

    def add(self, key: str, tensor: Tensor) -> None:
        """One tensor of the file."""
        name = next((n for n in (key, self.prefix + key, key.removeprefix(self.prefix)) if n in self.known), None)
        twin = None if name is None else self._twin(name)
        self.bytes += tensor.nbytes if twin is None else 0
        if name is not None and name in self.sites:
            self.seen.add(name)
            shape = tuple(self.parameters[name].shape)
            if tensor.shape != shape or not tensor.is_floating_point():
                raise FormatError(f"{key} is {tensor.dtype} {tuple(tensor.shape)} in the file; the model has floating point {shape}")
            for site in self.sites[name]:
                part = tensor if site.index is None else tensor[site.index]
                self._part(site, part.T if site.transposed else part)
            return
        expert = self._expert(key, tensor) if name is None else None
        if expert is not None:
            self._part(expert, tensor)
            return
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{key} holds NaN or infinity; repair the checkpoint")
        name = name or self._alike(key, tensor)
        if name is not None:
            self.seen.add(name)
            self.outside.append({"name": name, "shape": list(tensor.shape), "bytes": tensor.nbytes, "tied_to": twin})
        elif self._alone(key, tensor):
            row = {"site": key, "block": "", "shape": list(tensor.shape), "weights": tensor.numel(), "tie": None, "matched": False}
            self.unmatched.append(row | self._measure(key, [tensor], tensor.dtype))
        else:
            self.strays.append({"name": key, "shape": list(tensor.shape), "bytes": tensor.nbytes, "tied_to": None})

    def _alone(self, key: str, tensor: Tensor) -> bool:
        """Whether an unknown tensor is a weight of some block that can be measured for itself."""
        fits = tensor.dim() == 2 and tensor.is_floating_point() and tensor.shape[1] % max(self.settings.group_size, 1) == 0
        return fits and self._block(key) is not None

    def _twin(self, name: str) -> str | None:
        """The parameter seen before that is the very same, for tied embeddings that are stored twice."""
        mine = self.parameters.get(name)
        return next((other["name"] for other in self.outside if mine is not None and self.parameters.get(other["name"]) is mine), None)

    def _block(self, key: str) -> str | None:
        """The block whose number is the first in the name."""
        number = re.search(r"\.(\d+)\.", key)
        return next((block for block in self.found.blocks if number and block.rpartition(".")[2] == number[1]), None)

    def _expert(self, key: str, tensor: Tensor) -> Site | None:
        """The slice a single expert's matrix becomes a part of when the model is loaded: told by block, number and shape alone."""
        numbers = re.findall(r"\.(\d+)(?=\.)", key)
        block = self._block(key)
        if block is None or len(numbers) < 2 or tensor.dim() != 2:
            return None
        fitting = [
            site
            for site in self.found.in_block(block)
            if site.index == int(numbers[-1]) and site.shape[1] == tensor.shape[1] and site.shape[0] % tensor.shape[0] == 0
        ]
        return fitting[0] if len(fitting) == 1 and self._rows(fitting[0]) + len(tensor) <= fitting[0].shape[0] else None

    def _rows(self, site: Site) -> int:
        return site.shape[0] if site.name in self.measured else sum(len(part) for part in self.parts.get(site.name, ()))

    def _alike(self, key: str, tensor: Tensor) -> str | None:
        """The only weight of the same block and shape that no site covers (a router under another name), if it was not seen."""
        block = self._block(key)
        fitting = [
            name
            for name in self.found.uncovered
            if block is not None and name.startswith(f"{block}.") and self.parameters[name].shape == tensor.shape and name not in self.seen
        ]
        return fitting[0] if len(fitting) == 1 else None

    def _part(self, site: Site, part: Tensor) -> None:
        """Some rows of a site; measured once all are there. Their order does not matter to any measure."""
        parts = [*self.parts.pop(site.name, []), part]
        if sum(len(p) for p in parts) < site.shape[0]:
            self.parts[site.name] = parts
            return
        row = {"site": site.name, "block": site.block, "shape": list(site.shape), "weights": site.size, "tie": self.tie.get(site.name)}
        self.measured[site.name] = row | {"matched": True} | self._measure(site.name, parts, self.dtypes[site.parameter])
        if self.progress is not None:
            self.progress("weights", len(self.measured), len(self.found.sites))

    def _measure(self, name: str, parts: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        row = _measures(name, parts, self.levels, self.settings, dtype)
        if "constant" in row["flags"]:
            self.notes.append(f"{name} is constant")
        return row

    def missing(self) -> list[str]:
        """Sites that were not found in the file."""
        return [site.name for site in self.found.sites if site.name not in self.measured]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the sites in their order, then those of tensors without one."""
        return [self.measured[site.name] for site in self.found.sites if site.name in self.measured] + self.unmatched

    def _unseen(self) -> list[str]:
        """Parameters outside all sites that are not in the file, nor tied to one that is."""
        seen = {id(self.parameters[key]) for key in self.seen if key in self.parameters}
        return [key for key, p in self.parameters.items() if key not in self.sites and id(p) not in seen]

    def _place(self, stray: dict[str, Any], unseen: list[str]) -> None:
        """Give a tensor of the file its parameter, if it alone has the shape of the only one that is missing (a head under an old name)."""
        fitting = [key for key in unseen if list(self.parameters[key].shape) == stray["shape"]]
        alike = [other for other in self.strays if other["shape"] == stray["shape"]]
        if len(fitting) == len(alike) == 1:
            self.seen.add(fitting[0])
            self.notes.append(f"{stray['name']} of the file is taken for {fitting[0]}, the only parameter of its shape that the file lacks")
            self.outside.append(stray | {"name": fitting[0]})
        else:
            self.notes.append(f"{stray['name']} of the file is no parameter of the model")
            self.outside.append(stray)

    def finish(self, name: str) -> None:
        """Raise if weights are missing that no unknown tensor can stand for; note what was not matched."""
        unseen = self._unseen()
        for stray in self.strays:
            self._place(stray, unseen)
        unseen = self._unseen()
        # Only experts, which lie in the file one by one, may be among the tensors that were not recognized.
        slices = {site.name for site in self.found.sites if site.index is not None} if self.unmatched else set()
        lacking = [site for site in self.missing() if site not in slices] + ([] if self.unmatched else unseen)
        if lacking:
            raise FormatError(
                f"{name}: {len(lacking)} weights of the model are not in the files, first {lacking[0]}; the checkpoint is incomplete"
            )
        if self.unmatched:
            names = ", ".join(row["site"] for row in self.unmatched[:3])
            more = f" and {len(self.unmatched) - 3} more" if len(self.unmatched) > 3 else ""
            self.notes.append(f"measured under their names in the file, since shapes do not tell which sites they become: {names}{more}")


# Measures


def _pieces(parts: list[Tensor]) -> Iterator[Float[Tensor, "rows in"]]:
    """The rows in float32, a bounded number of weights at a time; copies, which may be written to."""
    for part in parts:
        step = max(1, PIECE // part.shape[1])
        for start in range(0, len(part), step):
            yield part[start : start + step].to(torch.float32, copy=True)


def _measures(name: str, parts: list[Tensor], levels: tuple[int, ...], settings: GridSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Outliers and rounding error of a site given by its rows; two passes, sums in float64."""
    count = sum(part.numel() for part in parts)
    total = squares = peak = 0.0
    for piece in _pieces(parts):
        if not bool(torch.isfinite(piece).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; repair the checkpoint before quantizing or pruning it")
        total += float(piece.sum(dtype=torch.float64))
        squares += float(piece.double().square().sum())
        peak = max(peak, float(piece.abs().max()))
    mean = total / count
    variance = fourth = 0.0
    errors = dict.fromkeys(levels, 0.0)
    for piece in _pieces(parts):
        centred = piece.double().sub_(mean).square_()
        variance += float(centred.sum())
        fourth += float(centred.square_().sum())
        for level in levels:
            errors[level] += float((rounded(piece.to(dtype), level, settings).float() - piece).double().square().sum())
    deviation = math.sqrt(variance / count)
    constant = peak == 0 or deviation <= 1e-7 * peak
    beyond = above = 0
    for piece in _pieces(parts) if not constant else ():
        z = piece.sub_(mean).div_(deviation)
        above += int((z > 1).sum())
        beyond += int((z.abs_() > 3).sum())
    rms = math.sqrt(squares / count)
    return {
        "max_over_rms": peak / rms if rms else 0.0,
        "kurtosis": 0.0 if constant else count * fourth / variance**2,
        "beyond_3": beyond / count,
        "zd": above / count,
        "rms": rms,
        "rtn_error": {level: error / squares if squares else 0.0 for level, error in errors.items()},
        "flags": ["constant"] if constant else [],
    }


# Needs


def needs(
    model: nn.Module, found: Structure, *, samples: int = 128, length: int = 512, group_size: int = 128, symmetric: bool = True
) -> Needs:
    """What quantizing a model takes on this machine; only its shapes are used, so it may be on the meta device.

    Args:
        model: the model.
        found: its structure.
        samples: calibration windows.
        length: tokens a window.
        group_size: inputs that share a scale.
        symmetric: without zero points.

    Returns:
        Memory and disk as the walk bounds them, and times from a quick measurement (about a second).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> needs(model, structure(model), group_size=4).disk_bytes
        768
    """
    dtype = next(model.parameters()).dtype
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    blocks = {name: sum(p.numel() * p.element_size() for p in model.get_submodule(name).parameters()) for name in found.blocks}
    largest = found.in_block(max(found.blocks, key=lambda name: sum(site.size for site in found.in_block(name))))
    width = largest[0].shape[1]
    share = _expert_share(model, found)
    inputs = samples * length * width * dtype.itemsize
    held = 2 * (inputs if inputs <= SPILL_BYTES else min(MICRO_BATCH, samples) * length * width * dtype.itemsize)
    widest = max(site.shape[1] for site in found.sites)
    tokens = min(MICRO_BATCH, samples) * length
    activations = math.ceil(tokens * dtype.itemsize * sum(sum(site.shape) * (share if site.index is not None else 1.0) for site in largest))
    sited = {site.parameter for site in found.sites}
    vocabulary = max((p.shape[0] for name, p in model.named_parameters() if p.dim() == 2 and name not in sited), default=0)
    activations = max(activations, length * vocabulary * dtype.itemsize)
    peak = model_bytes + 2 * max(blocks.values()) + held + 4 * widest**2 * STATISTIC + activations + SLACK
    disk = sum(site.size * dtype.itemsize for site in found.sites) + (inputs if inputs > SPILL_BYTES else 0)
    rates = _rates(dtype, GridSettings(min(group_size, 64) if group_size > 0 else -1, symmetric))
    seconds = _seconds(found, share, samples * length, length, width, rates)
    return Needs(model_bytes, peak, disk, seconds, rates)


def _expert_share(model: nn.Module, found: Structure) -> float:
    """Share of the experts a token goes through, by the configuration; 1 if it does not say."""
    active = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    experts = 1 + max((site.index for site in found.sites if site.index is not None), default=0)
    return min(1.0, active / experts) if isinstance(active, int) and active > 0 else 1.0


def _seconds(found: Structure, share: float, tokens: int, length: int, width: int, rates: dict[str, float]) -> dict[str, float]:
    """Forward passes twice over, half a product for each distinct input's Gram matrix, its factorization, feedback, clip search."""
    weights = sum(site.size for site in found.sites)
    active = sum(site.size * (share if site.index is not None else 1.0) for site in found.sites)
    forward = 2 * tokens * (2 * active + 2 * length * width * len(found.blocks))
    widths = {site.name: site.shape[1] for site in found.sites}
    experts = {site.name for site in found.sites if site.index is not None}
    gram = factor = 0.0
    for group in found.groups():
        # Sites that read one input share its matrix; every expert has one of its own.
        for name in group if experts.issuperset(group) else group[:1]:
            gram += tokens * (share if name in experts else 1.0) * widths[name] ** 2
            factor += widths[name] ** 3 / 3
    feedback = sum(site.size * site.shape[1] for site in found.sites)
    rounding = weights / rates["weights_rounded_per_second"]
    hessian = forward / rates["flops_model"] + (gram + feedback) / rates["flops_float32"] + factor / rates["flops_float64"] + rounding
    return {"rtn": rounding, "hessian": hessian}


def _rates(dtype: torch.dtype, settings: GridSettings) -> dict[str, float]:
    """Speeds of this machine, measured in well under a second."""
    rates = {f"flops_{name}": _flops(kind) for name, kind in (("model", dtype), ("float32", torch.float32), ("float64", torch.float64))}
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    seconds = _timed(lambda: fit_grid(weight, 4, settings, torch.float32))
    return rates | {"weights_rounded_per_second": weight.numel() / seconds}


def _flops(dtype: torch.dtype, size: int = 512) -> float:
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _timed(lambda: a @ a)


def _timed(work: Any) -> float:
    """The quicker of three runs, after one that warms up."""
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
