"""Importance matrices of llama.cpp: for each tensor and each of its inputs the mean of x squared, the diagonal of the layer's Hessian.

unit channel · score sum of x^2 over tokens · llama.cpp's own rounding is weighted by it. Both of its formats are read and written: GGUF
("TENSOR.in_sum2" and "TENSOR.counts", which newer releases write) and the older .dat, in which sums are scaled to a number of chunks and
experts share one count. Checked against llama.cpp's source (common/imatrix-loader.cpp, tools/imatrix/imatrix.cpp of 2026). Its converter
reorders the outputs of q and k for some models and never the inputs, so input statistics need no change.
"""

import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from whatmatters.core.checkpoint import PathLike, atomic_file
from whatmatters.core.errors import FileError, FormatError, InputError, NonFiniteError
from whatmatters.core.sites import Structure
from whatmatters.interop.llama_cpp import tensor_names
from whatmatters.score._common import Statistic

__all__ = ["Imatrix", "imatrix_of", "read_imatrix", "write_imatrix"]

ENTRIES = 2**18
NAME = 55
"""Longest name of a tensor: with the suffix and a terminating zero llama.cpp keeps 64 bytes."""
FILE_LIMIT = 2**32
TEXT = 2**16
ALIGNMENT = 32


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Sums of squared inputs.

    Attributes:
        sums: GGUF tensor name to (experts, in), sums of x^2 over tokens; one row for a matrix that is no expert.
        counts: GGUF tensor name to (experts,), number of tokens summed; of a .dat file, of chunks.
        chunk_size: tokens a chunk; 0 where a .dat file does not tell.
        chunks: number of chunks.
        datasets: names of the texts.
    """

    sums: Mapping[str, Float64[Tensor, "_ _"]]
    counts: Mapping[str, Float64[Tensor, "_"]]
    chunk_size: int = 512
    chunks: int = 0
    datasets: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.sums or set(self.sums) != set(self.counts):
            raise InputError("an importance matrix needs sums and counts of the same tensors, of one at least")
        for name, sums in self.sums.items():
            counts = self.counts[name]
            if not name or len(name.encode()) > NAME or not name.isprintable():
                raise InputError(f"tensor name {name!r:.80} is empty, longer than {NAME} bytes or not printable")
            if len(counts) != len(sums) or sums.numel() == 0:
                raise InputError(f"{name}: sums {tuple(sums.shape)}, counts {tuple(counts.shape)}; expected (experts, in) and (experts,)")
            if not bool(torch.isfinite(sums).all() and torch.isfinite(counts).all()):
                raise NonFiniteError(f"{name}: a sum or a count is not finite")
            if bool((sums < 0).any() or (counts < 0).any()):
                raise InputError(f"{name}: a sum of squares or a count is negative")

    def means(self) -> dict[str, Float64[Tensor, "_ _"]]:
        """Mean of x^2 by tensor; one where an expert saw no token, as llama.cpp has it.

        Example:
            >>> two = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
            >>> Imatrix({"blk.0.attn_q.weight": two}, {"blk.0.attn_q.weight": torch.tensor([2.0]).double()}).means()
            {'blk.0.attn_q.weight': tensor([[1., 2.]], dtype=torch.float64)}
        """
        return {
            name: torch.where(count[:, None] > 0, sums / torch.where(count > 0, count, 1.0)[:, None], 1.0)
            for (name, sums), count in zip(self.sums.items(), map(self.counts.__getitem__, self.sums), strict=True)
        }


def imatrix_of(
    statistics: Sequence[Statistic], found: Structure, *, chunk_size: int = 512, chunks: int = 0, dataset: str = "whatmatters"
) -> Imatrix:
    """The importance matrix of input statistics (`score._common.input_statistics`), under the names of a GGUF file.

    Args:
        statistics: sums of x x' or their diagonals, for every input; sites that share an input share a statistic.
        found: the model's structure.
        chunk_size: tokens a calibration window.
        chunks: number of windows.
        dataset: what is told about the text.

    Raises:
        FormatError: a site has no known tensor in a GGUF file.
        InputError: no statistics.
    """
    sites = {site.name: site for site in found.sites}
    experts = {site.parameter: 1 + max(s.index or 0 for s in found.sites if s.parameter == site.parameter) for site in found.sites}
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for statistic in statistics:
        diagonal = statistic.total if statistic.total.dim() == 1 else statistic.total.diagonal()
        for name in statistic.sites:
            site = sites[name]
            for tensor in tensor_names(site):
                if tensor not in sums:
                    sums[tensor] = torch.zeros(experts[site.parameter], site.shape[1], dtype=torch.float64)
                    counts[tensor] = torch.zeros(experts[site.parameter], dtype=torch.float64)
                # Counts are whole numbers there; weighted tokens need not be.
                count = max(1, round(statistic.tokens)) if statistic.tokens else 0
                sums[tensor][site.index or 0] = diagonal.double().cpu() * (count / statistic.tokens if count else 0)
                counts[tensor][site.index or 0] = count
    return Imatrix(sums, counts, chunk_size, chunks, (dataset,))


def write_imatrix(matrix: Imatrix, path: PathLike, *, overwrite: bool = False) -> Path:
    """Write an importance matrix for `llama-quantize --imatrix`, whole or not at all.

    Args:
        matrix: sums and counts.
        path: the file; GGUF if it ends in .gguf, else the older format.
        overwrite: whether it may exist already.

    Returns:
        The path.

    Raises:
        FileError: the file exists, or cannot be written.
    """
    data = _to_gguf(matrix) if os.fspath(path).endswith(".gguf") else _to_dat(matrix)
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def read_imatrix(path: PathLike) -> Imatrix:
    """Read an importance matrix in either format, strictly.

    Raises:
        FileError: there is no such file or it cannot be read.
        FormatError: it is no importance matrix, or breaks its format anywhere; nothing is allocated beyond the file's own size.
    """
    data = _bytes(path)
    try:
        return _from_gguf(_Reader(data)) if data[:4] == b"GGUF" else _from_dat(_Reader(data))
    except InputError as error:  # the constructor's own checks too
        raise FormatError(f"{os.fspath(path)!r} is not an importance matrix: {error}") from error


def _bytes(path: PathLike) -> bytes:
    shown = repr(os.fspath(path))
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{shown} is no regular file; expected an importance matrix of llama.cpp")
        if status.st_size > FILE_LIMIT:
            raise FormatError(f"{shown} has {status.st_size} bytes; an importance matrix has at most {FILE_LIMIT}")
        return Path(path).read_bytes()
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {shown}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise FileError(f"cannot read {shown}: {error}") from error


class _Reader:
    """Little-endian numbers and texts from the front of some bytes; raises FormatError past their end."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.place = 0

    def take(self, size: int) -> memoryview:
        if size < 0 or size > len(self.data) - self.place:
            raise FormatError(f"{size} bytes at {self.place} of {len(self.data)}: truncated, or a wrong length")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self, kind: str) -> str:
        length = self.number(kind)
        if not 0 <= length <= TEXT:
            raise FormatError(f"a text of {length} bytes; expected at most {TEXT}")
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"a text is not UTF-8: {error.reason}") from error

    def floats(self, count: int) -> Float64[Tensor, " values"]:
        if count < 1:
            raise FormatError(f"{count} values; expected one at least")
        with np.errstate(invalid="ignore"):  # NaN is refused later, with the name of its tensor
            return torch.from_numpy(np.frombuffer(self.take(4 * count), dtype="<f4").astype(np.float64))


def _to_dat(matrix: Imatrix) -> bytes:
    means = matrix.means()
    parts = [struct.pack("<i", len(means))]
    for name, mean in means.items():
        most = float(matrix.counts[name].max())
        calls = max(1, math.ceil(most / matrix.chunk_size)) if matrix.chunk_size else max(1, int(most))
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", calls, mean.numel())]
        parts.append((mean * calls).numpy().astype("<f4").tobytes())
    dataset = matrix.datasets[-1].encode() if matrix.datasets else b""
    return b"".join([*parts, struct.pack("<ii", matrix.chunks, len(dataset)), dataset])


def _from_dat(reader: _Reader) -> Imatrix:
    entries = reader.number("i")
    if not 1 <= entries <= ENTRIES:
        raise FormatError(f"{entries} entries; expected 1 to {ENTRIES}")
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for _ in range(entries):
        name = reader.text("i")
        if name in sums:
            raise FormatError(f"tensor {name!r:.80} twice")
        calls, values = reader.number("i"), reader.number("i")
        sums[name] = reader.floats(values)[None]
        counts[name] = torch.tensor([max(calls, 1)], dtype=torch.float64)
    chunks = 0
    datasets: tuple[str, ...] = ()
    if reader.place < len(reader.data):
        chunks = reader.number("i")
        datasets = (reader.text("i"),)
    if reader.place < len(reader.data) or chunks < 0:
        raise FormatError("bytes follow the last entry" if chunks >= 0 else f"{chunks} chunks")
    return Imatrix(sums, counts, 0, chunks, datasets)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY = 4, 8, 9
_F32 = 0


def _to_gguf(matrix: Imatrix) -> bytes:
    tensors: dict[str, np.ndarray] = {}
    for name, sums in matrix.sums.items():
        tensors[f"{name}.in_sum2"] = sums.numpy().astype("<f4")
        tensors[f"{name}.counts"] = matrix.counts[name].numpy().astype("<f4")[:, None]
    names = matrix.datasets or ("",)
    metadata = [
        _text("general.type") + struct.pack("<I", _STRING) + _text("imatrix"),
        _text("imatrix.datasets") + struct.pack("<IIQ", _ARRAY, _STRING, len(names)) + b"".join(map(_text, names)),
        _text("imatrix.chunk_count") + struct.pack("<II", _U32, matrix.chunks),
        _text("imatrix.chunk_size") + struct.pack("<II", _U32, matrix.chunk_size),
    ]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata)), *metadata]
    offset = 0
    for name, values in tensors.items():
        parts.append(_text(name) + struct.pack("<IQQIQ", 2, values.shape[1], values.shape[0], _F32, offset))
        offset += _padded(values.nbytes)
    head = b"".join(parts)
    body = [values.tobytes().ljust(_padded(values.nbytes), b"\0") for values in tensors.values()]
    return b"".join([head.ljust(_padded(len(head)), b"\0"), *body])


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _value(reader: _Reader, kind: int) -> Any:
    if kind == _STRING:
        return reader.text("Q")
    if kind == _ARRAY:
        item, length = reader.number("I"), reader.number("Q")
        if item == _ARRAY or length > ENTRIES:
            raise FormatError(f"an array of kind {item} and length {length}; expected a short one that is not nested")
        return [_value(reader, item) for _ in range(length)]
    if kind not in _KINDS:
        raise FormatError(f"metadata of the unknown kind {kind}")
    return reader.number(_KINDS[kind])


def _from_gguf(reader: _Reader) -> Imatrix:
    reader.take(4)
    version, tensors, pairs = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3) or tensors > 3 * ENTRIES or pairs > 1000:
        raise FormatError(f"GGUF version {version} with {tensors} tensors and {pairs} settings; expected version 2 or 3, and fewer")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text("Q")
        if key in metadata:
            raise FormatError(f"setting {key!r:.80} twice")
        metadata[key] = _value(reader, reader.number("I"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise FormatError(f"alignment {alignment!r:.40}; expected a power of two")
    places: dict[str, tuple[list[int], int]] = {}
    for _ in range(tensors):
        name = reader.text("Q")
        dimensions = reader.number("I")
        if name in places or not 1 <= dimensions <= 4:
            raise FormatError(f"tensor {name!r:.80} twice, or with {dimensions} dimensions")
        shape = [reader.number("Q") for _ in range(dimensions)]
        if reader.number("I") != _F32:
            raise FormatError(f"tensor {name!r:.80} is not float32")
        places[name] = (shape, reader.number("Q"))
    start = _padded(reader.place, alignment)
    if sum(4 * math.prod(shape) for shape, _ in places.values()) > len(reader.data):
        raise FormatError("its tensors are larger than the file: they overlap, or it is truncated")
    values = {}
    for name, (shape, offset) in places.items():
        if offset % alignment:
            raise FormatError(f"tensor {name!r:.80} lies at {offset}, which {alignment} does not divide")
        reader.place = min(start + offset, len(reader.data))
        values[name] = reader.floats(math.prod(shape)).reshape(math.prod(shape[1:]), shape[0])
    return _assembled(values, metadata)


def _assembled(values: dict[str, Tensor], metadata: dict[str, Any]) -> Imatrix:
    names = [name.removesuffix(".in_sum2") for name in values if name.endswith(".in_sum2")]
    odd = [name for name in values if not name.endswith((".in_sum2", ".counts", ".in_sum"))]
    if odd:
        raise FormatError(f"tensor {odd[0]!r:.80} is neither in_sum2, in_sum nor counts of another")
    lacking = [name for name in names if f"{name}.counts" not in values]
    if lacking:
        raise FormatError(f"{lacking[0]!r:.80} has sums and no counts")
    told = {key: metadata.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size")}
    datasets = metadata.get("imatrix.datasets", [])
    if any(type(value) is not int or not 0 <= value < 2**32 for value in told.values()):
        raise FormatError(f"chunks {told}; expected natural numbers")
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise FormatError("datasets are no list of texts")
    sums = {name: values[f"{name}.in_sum2"] for name in names}
    counts = {name: values[f"{name}.counts"].reshape(-1) for name in names}
    return Imatrix(sums, counts, told["chunk_size"], told["chunk_count"], tuple(datasets))
