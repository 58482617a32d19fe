"""Corpora too large for memory: cut into pieces, each read once, in batches of about a megabyte, wherever a worker is free.

Text files are cut at byte offsets, parquet files between row groups, compressed files not at all, lists of texts by count. A row that
cannot be read is never dropped in silence: it keeps its place, and comes with its file, its line and the reason.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int64, UInt8

from whatmatters.core.errors import DataError, FileError, InputTypeError, MissingExtraError
from whatmatters.kernels.json_lines import texts_of_lines

PIECE = 2**23
"""Bytes of a file that are one piece of work."""
BLOCK = 2**20
"""Bytes that are read and hashed at a time."""
TEXTS = 2**12
"""Texts of a list that are one piece."""
ROWS = 2**10
"""Rows of a parquet file that are read at a time."""
PACKED = 2**16
"""Bytes of a compressed file that are unpacked at a time."""

REPAIRED, UNREAD, BLANK = 1, 2, 3
"""Notes on a row: read with bytes replaced; not readable; nothing there. 0: in order."""

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = ("", ".gz", ".zst")


@dataclass(frozen=True)
class Piece:
    """A part of a corpus that one worker reads.

    Attributes:
        number: its place among all pieces.
        file: number of the file.
        path: the file; empty for texts in memory.
        kind: ".txt", ".jsonl", ".parquet", or "texts".
        packing: "", ".gz" or ".zst".
        first: first byte, row group or text.
        stop: where the next piece begins; None for compressed files.
        row: row that a parquet piece begins with.
        texts: the texts themselves.
    """

    number: int
    file: int
    path: str
    kind: str
    packing: str = ""
    first: int = 0
    stop: int | None = None
    row: int = 0
    texts: tuple[str, ...] = field(default=(), repr=False)


@dataclass(eq=False)
class Batch:
    """Some rows that follow each other.

    Attributes:
        text: bytes that hold the texts, valid UTF-8.
        begin: where each row's text begins.
        end: where it ends.
        where: what finds the row again: its byte offset in a text file, else its number in the file or list.
        notes: for each row 0, REPAIRED, UNREAD or BLANK.
        reasons: (row of the batch, reason) for rows that are repaired or unread; a row behind the last one is where the file broke off.
    """

    text: UInt8[np.ndarray, " bytes"]
    begin: Int64[np.ndarray, " rows"]
    end: Int64[np.ndarray, " rows"]
    where: Int64[np.ndarray, " rows"]
    notes: UInt8[np.ndarray, " rows"]
    reasons: list[tuple[int, str]]


@dataclass(frozen=True)
class Corpus:
    """Files or texts, checked for being there and of a known kind.

    Attributes:
        files: paths; one empty name for texts in memory.
        texts: texts in memory; None for files.
    """

    files: tuple[str, ...]
    texts: tuple[str, ...] | None = field(default=None, repr=False)

    def pieces(self, column: str) -> list[Piece]:
        """All pieces, in the order of the files; parquet files are checked for the column."""
        made: list[Piece] = []
        if self.texts is not None:
            for first in range(0, len(self.texts), TEXTS):
                part = self.texts[first : first + TEXTS]
                made.append(Piece(len(made), 0, "", "texts", first=first, stop=first + len(part), texts=part))
            return made
        for number, given in enumerate(self.files):
            path = os.path.abspath(given)  # workers may run in another folder
            kind, packing = _kind(path)
            if kind == ".parquet":
                for first, stop, row in _row_groups(path, column):
                    made.append(Piece(len(made), number, path, kind, first=first, stop=stop, row=row))
            elif packing:
                made.append(Piece(len(made), number, path, kind, packing))
            else:
                size = os.path.getsize(path)
                for first in range(0, size, PIECE):
                    made.append(Piece(len(made), number, path, kind, first=first, stop=min(first + PIECE, size)))
        return made

    def fingerprint(self) -> list[Any]:
        """What tells this corpus from another: names, sizes and times of files, or a digest of texts."""
        if self.texts is None:
            stats = [os.stat(path) for path in self.files]
            return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(self.files, stats, strict=True)]
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return [["texts", len(self.texts), digest.hexdigest()]]


def corpus(source: Any, what: str) -> Corpus:
    """Check a source of texts: a path, a list of paths (`pathlib.Path`), or a list of texts (strings).

    Raises:
        InputTypeError: neither paths nor texts.
        FileError: no such file.
        DataError: empty, an unknown kind of file, or a list of strings that are names of files.
        MissingExtraError: .zst without `zstandard`.
    """
    if isinstance(source, str | os.PathLike):
        source = [Path(source)]
    if isinstance(source, bytes | bytearray) or not isinstance(source, Sequence):
        raise InputTypeError(f"{what} is {type(source).__name__}; expected a path, a list of paths or a list of texts")
    if not len(source):
        raise DataError(f"{what} is empty; give at least one text or file")
    if all(isinstance(item, str) for item in source):
        texts = cast(Sequence[str], source)
        if all(_is_file_name(text) for text in texts):
            raise DataError(f"{what} is a list of strings that name files, first {texts[0]!r:.60}; give pathlib.Path, or the texts")
        return Corpus(("",), tuple(texts))
    for item in source:
        if not isinstance(item, os.PathLike):
            raise InputTypeError(f"{what} holds {type(item).__name__}; expected only paths (pathlib.Path) or only texts (str)")
    files = tuple(os.fspath(item) for item in cast(Sequence[os.PathLike[str]], source))
    for path in files:
        if os.path.isdir(path):
            raise FileError(f"{path} is a folder; expected files that end in {', '.join(KINDS)} (the first two also with .gz or .zst)")
        if not os.path.exists(path):
            raise FileError(f"no such file: {path} (to give texts themselves, give a list of strings)")
        _kind(path)
    return Corpus(files)


def _is_file_name(text: str) -> bool:
    return len(text) < 4096 and "\n" not in text and "\0" not in text and text.endswith((*KINDS, *PACKINGS[1:])) and os.path.exists(text)


def _kind(path: str) -> tuple[str, str]:
    stem, last = os.path.splitext(path.lower())
    packing = last if last in PACKINGS[1:] else ""
    kind = os.path.splitext(stem)[1] if packing else last
    if kind not in KINDS or (packing and kind == ".parquet"):
        raise DataError(f"{path} is of an unknown kind; expected .txt or .jsonl, also with .gz or .zst, or .parquet")
    if packing == ".zst":
        _zstandard()
    return kind, packing


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError(".zst files need zstandard: pip install 'whatmatters[zstd]'") from error
    return zstandard


def _row_groups(path: str, column: str) -> Iterator[tuple[int, int, int]]:
    """(first row group, one behind the last, first row) of pieces of about PIECE bytes."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
            kind = file.schema_arrow.field(column).type if column in names else None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None
    if kind is None:
        raise DataError(f"{path}: no column {column!r}; it has {', '.join(map(repr, names[:10]))}")
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value) or pyarrow.types.is_string_view(value)):
        raise DataError(f"{path}: column {column!r} is {kind}; expected strings")
    first, size, row, rows = 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= PIECE or group == metadata.num_row_groups - 1:
            yield first, group + 1, row
            first, size, row = group + 1, 0, rows


def read(piece: Piece, column: str, face: str) -> Iterator[Batch]:
    """The rows of a piece, in order."""
    if piece.kind == "texts":
        yield _texts(piece)
    elif piece.kind == ".parquet":
        yield from _parquet(piece, column)
    else:
        for offset, block, broken in _blocks(piece):
            yield _lines(piece, offset, block, broken, column, face)


def _texts(piece: Piece) -> Batch:
    encoded, reasons = [], []
    notes = np.zeros(len(piece.texts), np.uint8)
    for row, text in enumerate(piece.texts):
        try:
            encoded.append(text.encode())
        except UnicodeEncodeError:
            encoded.append(text.encode("utf-8", "replace"))
            reasons.append((row, "a lone surrogate, replaced"))
            notes[row] = REPAIRED
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    where = np.arange(piece.first, piece.first + len(encoded), dtype=np.int64)
    return Batch(np.frombuffer(b"".join(encoded), np.uint8), ends[:-1], ends[1:], where, notes, reasons)


def _parquet(piece: Piece, column: str) -> Iterator[Batch]:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(piece.path) as file:
        row = piece.row
        groups = list(range(piece.first, cast(int, piece.stop)))
        for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=[column], use_threads=False):
            values = batch.column(0).cast(pyarrow.large_binary())
            count = len(values)
            _, offsets, data = values.buffers()
            ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + count + 1]
            text = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
            begin, end = ends[:-1].copy(), ends[1:].copy()
            notes, reasons = np.zeros(count, np.uint8), []
            if values.null_count:
                missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
                notes[missing] = UNREAD
                end[missing] = begin[missing]
                reasons = [(place, f"the field {column!r} is null, not text") for place in missing.tolist()]
            text, begin, end = _repaired(text, begin, end, notes, reasons)
            yield Batch(text, begin, end, np.arange(row, row + count, dtype=np.int64), notes, reasons)
            row += count


def _blocks(piece: Piece) -> Iterator[tuple[int, bytes, str]]:
    """(offset, whole lines, what broke off behind them) of about BLOCK bytes."""
    with open(piece.path, "rb") as file:
        if piece.packing:
            yield from _unpacked_blocks(_unpacked(file, piece.packing))
            return
        if piece.first:
            file.seek(piece.first - 1)
            file.readline()  # the line that began in the piece before belongs there
        place, stop = file.tell(), cast(int, piece.stop)
        while place < stop:
            block = file.read(min(BLOCK, stop - place))
            if not block:
                break
            if not block.endswith(b"\n"):
                block += file.readline()
            yield place, block, ""
            place += len(block)


def _unpacked_blocks(chunks: Iterator[tuple[bytes, str]]) -> Iterator[tuple[int, bytes, str]]:
    offset, parts, size, broken = 0, [], 0, ""
    for chunk, told in chunks:
        broken = told
        parts.append(chunk)
        size += len(chunk)
        if size >= BLOCK and b"\n" in chunk:
            whole, newline, rest = b"".join(parts).rpartition(b"\n")
            yield offset, whole + newline, ""
            offset += len(whole) + 1
            parts, size = [rest], len(rest)
    rest = b"".join(parts)
    if rest or broken:
        yield offset, rest, broken


def _unpacked(file: Any, packing: str) -> Iterator[tuple[bytes, str]]:
    """(bytes, what is wrong behind them): everything up to where a truncated or corrupt file breaks off."""
    make: Callable[[], Any]
    if packing == ".gz":
        make, errors = (lambda: zlib.decompressobj(wbits=31)), (zlib.error,)
    else:
        zstandard = _zstandard()
        make, errors = (lambda: zstandard.ZstdDecompressor().decompressobj()), (zstandard.ZstdError,)
    unpack, begun = make(), False
    while packed := file.read(PACKED):
        while packed:
            try:
                plain = unpack.decompress(packed)
            except errors as error:
                yield b"", f"the {packing} file is corrupt from here on ({error})"
                return
            begun = True
            if plain:
                yield plain, ""
            packed = b""
            if unpack.eof:
                packed, unpack, begun = unpack.unused_data.lstrip(b"\0"), make(), False
    if begun:
        yield unpack.flush() or b"", f"the {packing} file ends early: it is truncated"


def _lines(piece: Piece, offset: int, block: bytes, broken: str, column: str, face: str) -> Batch:
    """The texts of whole lines; a last one without a newline counts, unless the file broke off in it."""
    text = np.frombuffer(block, np.uint8)
    stops = np.flatnonzero(text == 10).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops + 1])
    if not len(block) or block.endswith(b"\n"):
        starts = starts[:-1]
    else:
        stops = np.append(stops, len(block))
    where = starts + offset
    notes, reasons = np.zeros(len(starts), np.uint8), []
    if broken:
        reasons.append((max(0, len(starts) - 1) if len(starts) and not block.endswith(b"\n") else len(starts), broken))
        if len(starts) and not block.endswith(b"\n"):
            notes[-1] = UNREAD
            stops[-1] = starts[-1]
    text, starts, stops = _repaired(text, starts, stops, notes, reasons)
    if piece.kind == ".jsonl":
        found = texts_of_lines(text, starts, stops, column, face=face)
        for row, reason in found.unread.items():
            notes[row] = UNREAD
            reasons.append((row, reason))
        for row, reason in found.repaired.items():
            notes[row] = max(notes[row], REPAIRED)
            reasons.append((row, reason))
        text, begin, end, blank = found.plain, found.begin, found.end, np.array(found.blank, np.int64)
    else:
        begin, end = starts.copy(), stops
        if offset == 0 and block.startswith(b"\xef\xbb\xbf") and len(begin):
            begin[0] += 3
        short = end - begin
        blank = np.flatnonzero((short <= 0) | ((short == 1) & (text[np.minimum(begin, max(0, len(text) - 1))] == 13)))
    notes[blank[notes[blank] == 0]] = BLANK
    return Batch(text, begin, end, where, notes, reasons)


def _repaired(
    text: UInt8[np.ndarray, " bytes"],
    begin: Int64[np.ndarray, " rows"],
    end: Int64[np.ndarray, " rows"],
    notes: UInt8[np.ndarray, " rows"],
    reasons: list[tuple[int, str]],
) -> tuple[UInt8[np.ndarray, " more"], Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """The same rows as valid UTF-8: rows that are not are decoded with replacement characters, and told."""
    if not len(begin) or _is_utf8(text[begin[0] : end[-1]].tobytes()):
        return text, begin, end
    begin, end = begin.copy(), end.copy()
    added, size = [text], len(text)
    for row in range(len(begin)):
        part = text[begin[row] : end[row]].tobytes()
        try:
            part.decode()
        except UnicodeDecodeError as error:
            mended = part.decode("utf-8", "replace").encode()
            begin[row], end[row] = size, size + len(mended)
            added.append(np.frombuffer(mended, np.uint8))
            size += len(mended)
            notes[row] = REPAIRED
            reasons.append((row, f"not UTF-8 at byte {error.start} of the text or line, replaced"))
    return np.concatenate(added), begin, end


def _is_utf8(content: bytes) -> bool:
    if content.isascii():
        return True
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def copied_rows(path: str, where: Int64[np.ndarray, " rows"]) -> Iterator[bytes]:
    """The lines of a text file that begin at these offsets, ascending, each as it stands there with one newline."""
    kind, packing = _kind(path)
    if not packing:
        with open(path, "rb") as file:
            for offset in where.tolist():
                file.seek(offset)
                yield file.readline().rstrip(b"\r\n") + b"\n"
        return
    wanted = iter(where.tolist())
    following = next(wanted, None)
    for offset, block, _ in _blocks(Piece(0, 0, path, kind, packing)):
        while following is not None and following < offset + len(block):
            at = following - offset
            stop = block.find(b"\n", at)
            yield block[at : stop if stop >= 0 else len(block)].rstrip(b"\r\n") + b"\n"
            following = next(wanted, None)
