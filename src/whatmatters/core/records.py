"""Records: how Scores and plans are written and strictly read, as safetensors with JSON in the header or as JSON text.

Whatever is read comes from outside: sizes are checked against the file before anything is allocated, unknown and duplicate keys are
refused, and only `FileError` and `FormatError` are raised.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from whatmatters.core.errors import FileError, FormatError, InputError, InputTypeError, WhatMattersError

__all__ = [
    "check_name",
    "check_names",
    "check_settings",
    "frozen",
    "holds_tensors",
    "parse_json",
    "read_record",
    "read_text",
    "reading",
    "split_tensors",
    "take",
    "write_record",
    "write_text",
]

HEADER_LIMIT = 64 * 2**20
"""Bytes of JSON that are read from one file; a mixture with 100,000 expert slices needs about a third."""

NAME_LIMIT = 1000
DEPTH_LIMIT = 32
METADATA_KEY = "whatmatters"

PathLike = str | os.PathLike[str]

_NUMPY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BOOL": np.dtype("?")}


def check_name(name: object, what: str = "name") -> str:
    """A site's or block's name: a printable string that is not too long; raises InputTypeError or InputError."""
    if not isinstance(name, str):
        raise InputTypeError(f"{what} is {type(name).__name__} {name!r:.60}; expected a string")
    if not name or len(name) > NAME_LIMIT or not name.isprintable():
        raise InputError(f"{what} {name!r:.60} is empty, longer than {NAME_LIMIT} characters or not printable; expected a module path")
    return name


def check_names(values: object) -> dict[str, Any]:
    """A non-empty mapping from site or block names, as a dict of its own."""
    if not isinstance(values, Mapping):
        raise InputTypeError(f"values are {type(values).__name__}; expected a mapping from site or block names")
    if not values:
        raise InputError("values are empty; expected at least one site or block")
    return {check_name(name): value for name, value in values.items()}


def check_settings(settings: object) -> Mapping[str, Any]:
    """Settings as a read-only copy; raises if they are not JSON."""
    if not isinstance(settings, Mapping):
        raise InputTypeError(f"settings are {type(settings).__name__}; expected a mapping that JSON can hold")
    return MappingProxyType({key: frozen(value, 1) for key, value in _keys(settings)})


def _keys(mapping: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise InputTypeError(f"settings have the key {key!r:.60}; expected strings only")
        yield frozen(key), value


def frozen(value: Any, depth: int = 0) -> Any:
    """A read-only deep copy of a JSON value (lists become tuples, dicts mapping proxies); raises for anything JSON cannot hold."""
    if depth > DEPTH_LIMIT:
        raise InputError(f"settings are nested deeper than {DEPTH_LIMIT}; expected a shallow description")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"settings hold the text {value!r:.60} that UTF-8 cannot write") from error
        return value
    if isinstance(value, int) and value.bit_length() > 4096:
        raise InputError(f"settings hold a whole number of {value.bit_length()} bits; expected a small one")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"settings hold {value}; JSON knows finite numbers only")
        return float(value)
    if isinstance(value, Mapping):
        return MappingProxyType({key: frozen(item, depth + 1) for key, item in _keys(value)})
    if isinstance(value, list | tuple):
        return tuple(frozen(item, depth + 1) for item in value)
    raise InputTypeError(f"settings hold {type(value).__name__}; expected what JSON can hold: text, numbers, booleans, None, lists, dicts")


def thawed(value: Any) -> Any:
    """The plain dicts and lists of a frozen value: for copies, pickles and JSON."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def _text(header: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(header, default=dict, allow_nan=False, indent=indent)


def write_text(path: PathLike, header: Mapping[str, Any], *, overwrite: bool = True) -> None:
    """Write a record without tensors as readable JSON, atomically."""
    from whatmatters.core.checkpoint import atomic_file  # checkpoints stand above records

    text = _text(header, indent=1) + "\n"
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_record(path: PathLike, header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, overwrite: bool = True) -> None:
    """Write one safetensors file with `header` as JSON in its metadata, atomically."""
    from whatmatters.core.checkpoint import atomic_file  # checkpoints stand above records

    text = _text(header)
    if len(text) > HEADER_LIMIT // 2:
        raise FormatError(f"names and settings take {len(text)} bytes; a record holds {HEADER_LIMIT // 2}: split it by blocks")
    with atomic_file(path, overwrite=overwrite) as temporary:
        try:
            # Tensors that share storage are legal here and not in safetensors: those are written from copies.
            save_file(_unshared(tensors), temporary, metadata={METADATA_KEY: text})
        except (OSError, RuntimeError) as error:
            raise FileError(f"cannot write {os.fspath(path)!r}: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        fresh = storage.data_ptr() not in seen and storage.nbytes() == tensor.numel() * tensor.element_size()
        seen.add(storage.data_ptr())
        result[name] = tensor if fresh else tensor.clone()
    return result


@contextmanager
def _opened(path: PathLike) -> Iterator[tuple[Any, int]]:
    """The file and its size; every failure of the system becomes a FileError. Pipes and devices are refused: they could block."""
    shown = repr(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise FileError(f"{shown} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected a file of scores or a plan")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise FileError(f"there is no file {shown}; check the path") from error
    except WhatMattersError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {shown}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise FileError(f"cannot read {shown}: {error}") from error


def holds_tensors(path: PathLike) -> bool:
    """Whether a file is safetensors: its first eight bytes are a small number, so they hold a NUL, which JSON text never does."""
    with _opened(path) as (file, _):
        return b"\0" in file.read(8)


def parse_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object, strictly: no duplicate keys, finite numbers only; raises FormatError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, numbers with too many digits
        raise FormatError(f"not valid JSON: {str(error)[:200] or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise FormatError(f"JSON holds {type(value).__name__}; expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("JSON has a key twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise FormatError(f"JSON holds {name}; expected finite numbers")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise FormatError(f"JSON holds the number {digits[:40]}; expected one that a float can hold")
    return value


def read_text(path: PathLike) -> dict[str, Any]:
    """The JSON object of a text record.

    Raises:
        FileError: there is no such file or it cannot be read.
        FormatError: it is no strict JSON object, or too large.
    """
    with _opened(path) as (file, size):
        if size > HEADER_LIMIT:
            raise FormatError(f"{size} bytes of text; a plan has at most {HEADER_LIMIT}")
        return parse_json(file.read(HEADER_LIMIT))


def read_record(path: PathLike, *, mmap: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON header and the tensors of a safetensors record.

    Args:
        path: the file.
        mmap: leave the tensors on disk and map them into memory, copy-on-write: writing to them never reaches the file.

    Raises:
        FileError: there is no such file or it cannot be read.
        FormatError: it breaks the format anywhere; nothing is allocated before the sizes were checked against the file.
    """
    with _opened(path) as (file, size):
        header, layout, start = _layout(file, size)
        data: np.ndarray
        if mmap and size > start:
            data = np.memmap(file, dtype=np.uint8, mode="c", offset=start, shape=(size - start,))
        else:
            try:
                data = np.fromfile(file, dtype=np.uint8, count=size - start)
            except MemoryError as error:
                raise FormatError(f"{size} bytes do not fit into memory; load with mmap=True") from error
        if data.size != size - start:
            raise FormatError("the file shrank while it was read")
        tensors = {}
        for name, (kind, shape, begin, end) in layout.items():
            piece = data[begin:end]
            if kind == "BOOL" and piece.size and int(piece.max()) > 1:
                raise FormatError(f"tensor {name!r:.80} is boolean and holds bytes other than 0 and 1")
            # Another writer may leave a tensor unaligned; only then it is copied.
            tensors[name] = torch.from_numpy(np.require(piece.view(_NUMPY[kind]), requirements=["A", "W"]).reshape(shape))
        return header, tensors


_Layout = dict[str, tuple[str, tuple[int, ...], int, int]]


def _layout(file: Any, size: int) -> tuple[dict[str, Any], _Layout, int]:
    """Our JSON, each tensor's (kind, shape, begin, end), and where the data start."""
    if size < 8:
        raise FormatError(f"{size} bytes; too short to be safetensors")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(HEADER_LIMIT, size - 8):
        raise FormatError(f"its header claims {length} bytes; the file has {size - 8} and the limit is {HEADER_LIMIT}")
    entries = parse_json(file.read(length))
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {METADATA_KEY} or not isinstance(metadata[METADATA_KEY], str):
        raise FormatError(f"its metadata is not exactly one text {METADATA_KEY!r}; expected a file written by whatmatters")
    layout = {name: _entry(name, entry) for name, entry in entries.items()}
    place = 0
    for name, (_, _, begin, end) in sorted(layout.items(), key=lambda item: item[1][2:]):
        if begin != place:
            raise FormatError(f"tensor {name!r:.80} begins at {begin}; expected {place}: no gaps, no overlaps")
        place = end
    if place != size - 8 - length:
        raise FormatError(f"its tensors take {place} bytes and the file holds {size - 8 - length}: truncated or with a tail")
    return parse_json(metadata[METADATA_KEY]), layout, 8 + length


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r:.80} is not described by exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _NUMPY:
        raise FormatError(f"tensor {name!r:.80} has dtype {kind!r:.20}; expected one of {', '.join(_NUMPY)}")
    for numbers, what in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(numbers, list) or len(numbers) > 8 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise FormatError(f"tensor {name!r:.80} has {what} {numbers!r:.60}; expected a short list of natural numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _NUMPY[kind].itemsize:
        raise FormatError(f"tensor {name!r:.80} of shape {shape} lies at {offsets}; the size does not fit")
    return kind, tuple(shape), offsets[0], offsets[1]


def take(header: dict[str, Any], kind: str, keys: frozenset[str]) -> dict[str, Any]:
    """The fields of a record of `kind`, version 1, with exactly these `keys`; raises FormatError."""
    if header.get("format") != f"whatmatters.{kind}":
        raise FormatError(f"it holds {header.get('format')!r:.60}; expected whatmatters.{kind}")
    if header.get("version") != 1 or type(header.get("version")) is not int:
        raise FormatError(f"it has version {header.get('version')!r:.20}; this release reads version 1")
    fields = {key: value for key, value in header.items() if key not in ("format", "version")}
    if set(fields) != keys:
        odd = sorted(set(fields) ^ keys)
        raise FormatError(f"keys missing or unknown: {str(odd)[:200]}; expected {sorted(keys)}")
    return fields


def split_tensors(tensors: Mapping[str, Tensor], prefix: str, names: Any) -> dict[str, Tensor]:
    """The tensors stored as `prefix/name`, in the order of `names`; raises FormatError if the names are not a list of theirs."""
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        raise FormatError("the order of the names is not a list without repeats")
    stored = {key[len(prefix) + 1 :] for key in tensors if key.startswith(prefix + "/")}
    if stored != set(map(str, names)):
        raise FormatError(f"the names of the {prefix} do not match the tensors stored")
    return {name: tensors[f"{prefix}/{name}"] for name in names}


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Turn whatever is refused while a file is read, also by a constructor, into a FormatError that names the file."""
    try:
        yield
    except FileError:
        raise
    except WhatMattersError as error:
        raise FormatError(f"{os.fspath(path)!r}: {error}") from error
