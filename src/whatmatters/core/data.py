"""Text in, token windows out: what a model is calibrated on and what it is judged on.

Two ways of cutting, for two purposes:

- `calibration` packs all documents into one stream and draws windows from all of it: no padding, every token equally likely.
- `windows` never lets a window cross documents, so that each carries the document it belongs to: the unit that a bootstrap resamples.

Nothing read here is executed, and the same source, tokenizer and seed give the same windows.
"""

import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatmatters.core.errors import DataError, FileError, InputTypeError, ModelError
from whatmatters.core.seeds import Seed, generator

__all__ = ["Calibration", "calibration", "call_model", "check_fits", "documents", "logits", "windows"]

Source = str | os.PathLike[str] | Tensor | Sequence[str] | Sequence[Tensor]
"""Where text comes from: a path to .txt, .jsonl or .parquet, a list of strings, a tensor of token ids, or a list of 1-D tensors of them."""

READ_LIMIT = 2**28  # characters of a source that calibration draws from: the first quarter of a billion
PIECE = 2**18  # characters tokenized at a time: one huge document must not be tokenized whole for a few windows
OVERSAMPLE = 8  # tokens that windows are drawn from, over tokens drawn, where the text has that many


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows with what is known about them. Frozen; the tensors are the user's own and must not be written to.

    Attributes:
        inputs: int64 token ids (samples, length); for plain torch models also floats (samples, ...).
        valid: bool (samples, length), False where `inputs` is padding; None when nothing is.
        document: int64 (samples,), for each sample the index of the document that it, or its first token, comes from.
        batch: micro-batch size. Fixed here, because sums over other micro-batches round differently.
        source: where the text came from, for people.
        start: int64 (samples,), the position of the first token in its document, for windows that never cross documents; None for others.
        digest: SHA-256 (hexadecimal) of `inputs` and `valid`.
    """

    inputs: Tensor  # plain `Tensor`s: shapes and dtypes are checked below, with errors of ours
    valid: Tensor | None
    document: Tensor
    batch: int = 8
    source: str = "tensors"
    start: Tensor | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        samples, is_ids = len(self.inputs) if self.inputs.dim() else 0, self.inputs.dtype == torch.int64
        if samples == 0 or self.inputs.numel() == 0:
            raise DataError(f"inputs have shape {tuple(self.inputs.shape)}: calibration needs at least one sample")
        if not (is_ids or self.inputs.is_floating_point()):
            raise DataError(f"inputs are {self.inputs.dtype}; expected int64 token ids or floating point features")
        if is_ids and self.inputs.dim() != 2:
            raise DataError(f"token ids have shape {tuple(self.inputs.shape)}; expected (samples, length)")
        if is_ids and int(self.inputs.min()) < 0:
            raise DataError("token ids must not be negative: mark padding with `valid`, not with -100")
        if self.batch < 1:
            raise DataError(f"batch is {self.batch}; expected at least 1")
        for name in ("document", "start"):
            value = getattr(self, name)
            if value is not None and (value.shape != (samples,) or value.dtype != torch.int64):
                raise DataError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected int64 of shape ({samples},)")
        if self.valid is not None:
            if self.valid.dtype != torch.bool or self.valid.shape != self.inputs.shape[:2]:
                expected = tuple(self.inputs.shape[:2])
                raise DataError(f"valid is {self.valid.dtype} of shape {tuple(self.valid.shape)}; expected bool of shape {expected}")
            if not bool(self.valid.any(dim=1).all()):
                raise DataError("a sample without any valid token: drop it")
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.valid):
            if tensor is not None:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    @classmethod
    def from_tensors(
        cls, inputs: Tensor, valid: Tensor | None = None, document: Tensor | None = None, *, batch: int = 8, source: str = "tensors"
    ) -> "Calibration":
        """Calibration data from tensors that exist already: each sample its own document unless told.

        Args:
            inputs: integer token ids (samples, length) or floats (samples, ...).
            valid: bool (samples, length), False at padding.
            document: int64 (samples,), the document each sample comes from.
            batch: micro-batch size, at least 1.
            source: where they came from, for people.

        Raises:
            DataError: no samples, shapes that do not fit, negative ids.

        Example:
            >>> Calibration.from_tensors(torch.zeros(3, 5, dtype=torch.int64)).document
            tensor([0, 1, 2])
        """
        if inputs.dtype in (torch.int32, torch.int16, torch.uint8, torch.int8):
            inputs = inputs.long()
        if document is None:
            document = torch.arange(len(inputs) if inputs.dim() else 0)
        return cls(inputs, valid, document, batch, source)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens (or positions) that are not padding."""
        return int(self.valid.sum()) if self.valid is not None else self.inputs.shape[:2].numel()

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Micro-batches (inputs, valid) of `batch` samples in order; the last may be smaller."""
        for first in range(0, len(self), self.batch):
            part = slice(first, first + self.batch)
            yield self.inputs[part], None if self.valid is None else self.valid[part]

    def strided(self, stride: int) -> "Calibration":
        """The same documents in overlapping windows, each `stride` tokens after the one before.

        Every token after a document's first window then has at least `length - stride` tokens before it. Which tokens of a window are
        new follows from `start`; `evaluate` counts each token once.

        Args:
            stride: from 1 (most context, slowest) to the length of the windows.

        Raises:
            DataError: stride out of range, or these windows are not consecutive pieces of documents (see `windows`).
        """
        length = self.inputs.shape[1]
        if not 1 <= stride <= length:
            raise DataError(f"stride is {stride}; expected 1 to {length}, the length of the windows")
        pieces: list[tuple[int, int, Tensor]] = []
        for document, tokens in self._joined():
            pieces.extend((document, first, tokens[first : first + length]) for first in _starts(len(tokens), length, stride))
        return _pad(pieces, length, batch=self.batch, source=self.source)

    def _joined(self) -> Iterator[tuple[int, Tensor]]:
        """Each document's tokens, put together again from its windows."""
        if self.start is None:
            raise DataError("stride needs windows that follow each other in their documents: cut the text with `data.windows`")
        rows = zip(self.document.tolist(), self.start.tolist(), range(len(self)), strict=True)
        for document, group in itertools.groupby(rows, key=lambda row: row[0]):
            parts: list[Tensor] = []
            for _, start, row in group:
                if start != sum(map(len, parts)):
                    raise DataError(f"the windows of document {document} do not follow each other: they overlap or leave gaps")
                parts.append(self.inputs[row] if self.valid is None else self.inputs[row][self.valid[row]])
            yield document, torch.cat(parts)


def documents(source: Source, field: str = "text") -> list[str]:
    """All documents of a text source, the blank ones left out.

    Args:
        source: path to a .txt file (one document), a .jsonl file (one JSON object or string a line) or a .parquet file (one document a
            row), or a sequence of strings.
        field: name of the text in each JSON object, or of the parquet column.

    Returns:
        The documents in order; at least one.

    Raises:
        FileError: no such path, a folder, or not readable.
        InputTypeError: neither a path nor strings.
        DataError: another kind of file, binary or not UTF-8, a malformed line (named), no such field, nothing but blanks.

    Example:
        >>> documents(["One.", "  ", "Two."])
        ['One.', 'Two.']
    """
    return list(_texts(source, field))


def calibration(
    tokenizer: Any,
    source: Source,
    *,
    samples: int = 128,
    length: int = 512,
    seed: Seed = 0,
    field: str = "text",
    batch: int = 8,
) -> Calibration:
    """Calibration windows: documents packed into one stream, from which windows are drawn without overlap.

    Documents, each begun by the tokenizer's beginning (or else end) token, are joined in a random order until there are 8 times the tokens
    asked for, or all; of the windows of that stream, `samples` are drawn. Longer documents give proportionally more windows. Of a very
    large source the first 2**28 characters are used: shuffle it if it is sorted.

    Args:
        tokenizer: a Hugging Face tokenizer; None when `source` is token ids (which are packed as they are).
        source: see `documents`; or token ids: a 1-D tensor (one document), a 2-D one (one a row) or a list of 1-D tensors.
        samples: number of windows, at least 1.
        length: tokens in a window, at least 2.
        seed: decides order and choice.
        field: see `documents`.
        batch: micro-batch size of the result, at least 1.

    Returns:
        `Calibration` of exactly `samples` windows without padding.

    Raises:
        DataError: counts out of range, or fewer tokens than asked for (the message says how many there are).
        FileError: the source cannot be read.

    Example:
        >>> calibration(None, torch.arange(100), samples=3, length=8).inputs.shape
        torch.Size([3, 8])
    """
    _check_counts(samples=(samples, 1), length=(length, 2), batch=(batch, 1))
    draw = generator(seed)
    pieces = _pieces(source, field)
    order = torch.randperm(len(pieces), generator=draw).tolist()
    wanted, total = OVERSAMPLE * samples * length, 0
    stream: list[Tensor] = []
    owners: list[Tensor] = []
    for index, tokens in _tokenized(tokenizer, [pieces[i] for i in order]):
        stream.append(tokens)
        owners.append(torch.full_like(tokens, index))
        total += len(tokens)
        if total >= wanted:
            break
    available = total // length
    if available == 0:
        raise DataError(f"the text has {total} tokens, less than one window of {length}: give more text or a smaller length")
    if available < samples:
        raise DataError(
            f"the text has {total} tokens, enough for {available} windows of {length}, not for the {samples} asked for: "
            f"give more text, or ask for at most {available} samples"
        )
    offset = int(torch.randint(total - available * length + 1, (), generator=draw))
    chosen = torch.randperm(available, generator=draw)[:samples].sort().values
    cut = slice(offset, offset + available * length)
    inputs = torch.cat(stream)[cut].view(available, length)[chosen]
    owner = torch.cat(owners)[cut].view(available, length)[chosen, 0].clone()
    return Calibration(inputs, None, owner, batch, _described(source))


def windows(
    tokenizer: Any,
    source: Source,
    length: int = 512,
    *,
    limit: int | None = None,
    per_document: int | None = None,
    field: str = "text",
    batch: int = 8,
) -> Calibration:
    """Windows to judge a model on: each document cut from its beginning, none crossing into another.

    A tail shorter than `length` is padded on the right and marked in `valid`, so that nothing of the text is lost; a tail of one token,
    which has nothing to predict, is dropped.

    Args:
        tokenizer: a Hugging Face tokenizer; None when `source` is token ids.
        source: see `calibration`.
        length: tokens in a window, at least 2.
        limit: stop after this many windows.
        per_document: take at most this many of each document, from its beginning. With a limited time, few windows of many documents
            tell more than many windows of few.
        field: see `documents`.
        batch: micro-batch size of the result, at least 1.

    Returns:
        `Calibration` with `document` and `start` set, in the order of the text.

    Raises:
        DataError: counts out of range, or no document has two tokens.
        FileError: the source cannot be read.

    Example:
        >>> cut = windows(None, [torch.arange(5), torch.arange(3)], length=4)
        >>> cut.document, cut.valid
        (tensor([0, 1]), tensor([[ True,  True,  True,  True],
                [ True,  True,  True, False]]))
    """
    _check_counts(length=(length, 2), batch=(batch, 1), limit=(limit, 1), per_document=(per_document, 1))
    pieces: list[tuple[int, int, Tensor]] = []
    for index, tokens in _tokenized(tokenizer, _whole(source, field)):
        cuts = itertools.islice(_starts(len(tokens), length, length), per_document)
        pieces.extend((index, first, tokens[first : first + length]) for first in cuts)
        if limit is not None and len(pieces) >= limit:
            break
    if not pieces:
        raise DataError("no document has two tokens, so there is nothing to predict: give more text")
    return _pad(pieces[:limit], length, batch=batch, source=_described(source))


def call_model(model: nn.Module, inputs: Tensor, valid: Tensor | None = None) -> Any:
    """Run a model on one micro-batch and return what it returns.

    A model whose `forward` takes `input_ids` is called the Hugging Face way, without a key-value cache and with an attention mask only
    where something is padding; any other as `model(inputs)`. Inputs are moved to the model's device.

    Args:
        model: the model, whatever its mode.
        inputs: (samples, length) token ids, or floats (samples, ...).
        valid: (samples, length), False at padding.
    """
    tensors: Iterator[Tensor] = itertools.chain(model.parameters(), model.buffers())
    if hasattr(model, "_hf_hook"):  # accelerate brings inputs and offloaded weights, on the meta device till then, together
        tensors = (tensor for tensor in tensors if not tensor.is_meta)
    inputs = inputs.to(next((tensor.device for tensor in tensors), inputs.device))
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        return model(inputs)
    settings: dict[str, Any] = {}
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        settings["use_cache"] = False
    if valid is not None and not bool(valid.all()):
        settings["attention_mask"] = valid.to(device=inputs.device, dtype=torch.int64)
    return model(input_ids=inputs, **settings)


def logits(model: nn.Module, inputs: Tensor, valid: Tensor | None = None) -> Float[Tensor, "samples length vocabulary"]:
    """Logits of a causal language model on one micro-batch, from the Hugging Face output object or a plain tensor.

    Raises:
        ModelError: the model gives no (samples, length, vocabulary) logits, or they are not of the next token: a model says by
            `can_generate` that it fills in what is masked.
    """
    output = call_model(model, inputs, valid)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != inputs.shape or not output.is_floating_point():
        shown = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"{type(model).__name__} gives {shown}; expected logits (samples, length, vocabulary) of a causal language model")
    if not getattr(model, "can_generate", lambda: True)():
        raise ModelError(f"{type(model).__name__} does not predict the next token; expected a causal language model")
    return output


def check_fits(model: nn.Module, data: Calibration) -> None:
    """Raise `DataError` if the windows cannot be this model's: ids outside its vocabulary, or longer than the context it was built for."""
    if data.inputs.dtype != torch.int64:
        return
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embeddings, "num_embeddings", None)
    largest = int(data.inputs.max())
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(f"the text has token id {largest}, the model knows {vocabulary}: tokenize it with the model's own tokenizer")
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < data.inputs.shape[1]:
        raise DataError(f"windows of {data.inputs.shape[1]} tokens, but the model has a context of {context}: use length={context}")


def _check_counts(**counts: tuple[int | None, int]) -> None:
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise DataError(f"{name} is {value}; expected at least {least}")


def _described(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Tensor):
        return f"token ids of shape {tuple(source.shape)}"
    return f"{len(source)} documents" if isinstance(source[0], str) else f"{len(source)} tensors of token ids"


def _starts(tokens: int, length: int, stride: int) -> Iterator[int]:
    """Beginnings of the windows of a document: each has a token that no earlier one predicted."""
    for first in range(0, tokens, stride):
        if tokens - first >= 2:
            yield first
        if first + length >= tokens:
            return


def _pad(pieces: list[tuple[int, int, Tensor]], length: int, *, batch: int, source: str) -> Calibration:
    """(document, start, tokens) of at most `length` tokens as one `Calibration`. Padding is id 0: no valid token sees or predicts it."""
    inputs = torch.zeros(len(pieces), length, dtype=torch.int64)
    valid = torch.zeros(len(pieces), length, dtype=torch.bool)
    for row, (_, _, tokens) in enumerate(pieces):
        inputs[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
    document, start = (torch.tensor([piece[i] for piece in pieces], dtype=torch.int64) for i in (0, 1))
    return Calibration(inputs, None if bool(valid.all()) else valid, document, batch, source, start)


Piece = tuple[int, bool, str | Tensor]
"""A document's index, whether this is its beginning, and its text or token ids."""


def _whole(source: Source, field: str) -> Iterator[Piece]:
    """Documents, one by one, each as a single piece."""
    if _is_ids(source):
        yield from ((index, False, ids) for index, ids in enumerate(_id_documents(source)))
    else:
        yield from ((index, True, text) for index, text in enumerate(_texts(source, field)))


def _pieces(source: Source, field: str) -> list[Piece]:
    """Documents of the first `READ_LIMIT` characters (or ids), long ones in pieces of `PIECE`."""
    pieces: list[Piece] = []
    size = 0
    for index, begins, content in _whole(source, field):
        for first in range(0, len(content), PIECE):
            pieces.append((index, begins and first == 0, content[first : first + PIECE]))
        size += len(content)
        if size >= READ_LIMIT:
            break
    return pieces


def _tokenized(tokenizer: Any, pieces: Sequence[Piece] | Iterator[Piece]) -> Iterator[tuple[int, Tensor]]:
    """(document, tokens) of each piece in order, tokenized in groups of about `PIECE` characters: a consumer that stops saves the rest."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[2])
        if size >= PIECE:
            yield from _tokenized_group(tokenizer, group)
            group, size = [], 0
    yield from _tokenized_group(tokenizer, group)


def _tokenized_group(tokenizer: Any, group: list[Piece]) -> Iterator[tuple[int, Tensor]]:
    texts = [content for _, _, content in group if isinstance(content, str)]
    if texts and not callable(tokenizer):
        raise InputTypeError(f"tokenizer is {tokenizer!r}; text needs the model's tokenizer (only token ids go without)")
    # verbose=False: a document longer than the model's context is expected here, it is cut afterwards.
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    for index, begins, content in group:
        if isinstance(content, Tensor):
            yield index, content
            continue
        separator = getattr(tokenizer, "bos_token_id", None)
        if separator is None:
            separator = getattr(tokenizer, "eos_token_id", None)
        yield index, torch.tensor([separator] * (begins and separator is not None) + list(next(encoded)), dtype=torch.int64)


def _is_ids(source: Source) -> bool:
    return isinstance(source, Tensor) or (isinstance(source, Sequence) and any(isinstance(item, Tensor) for item in source))


def _id_documents(source: Source) -> list[Tensor]:
    if isinstance(source, Tensor) and source.dim() not in (1, 2):
        raise DataError(f"token ids have shape {tuple(source.shape)}; expected (length,) or (documents, length)")
    rows: list[Any] = [source] if isinstance(source, Tensor) and source.dim() == 1 else list(cast(Sequence[Any], source))
    for index, ids in enumerate(rows):
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            shown = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise DataError(f"document {index} is {shown}; expected a 1-D tensor of integer token ids")
    return [ids.detach().cpu().long() for ids in rows]


def _texts(source: Source, field: str) -> Iterator[str]:
    """Documents of a text source, blanks left out, checked for what a tokenizer cannot take; raises if there is none."""
    if isinstance(source, str | os.PathLike):
        where, texts = os.fspath(source), _from_file(Path(source), field)
    elif isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        where, texts = "the list", _from_list(source)
    else:
        raise InputTypeError(f"a text source is {type(source).__name__}; expected a path, a list of strings or token ids")
    found = False
    for place, text in texts:
        if not text.isspace() and text:
            _check_encodable(text, place)
            found = True
            yield text
    if not found:
        raise DataError(f"{where} holds no text: every document is empty or blank")


def _check_encodable(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a lone surrogate at character {error.start}; expected text that UTF-8 can hold") from None


def _from_list(texts: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputTypeError(f"document {index} of the list is {type(text).__name__}; expected a string")
        yield f"document {index} of the list", text


def _from_file(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each document in a file."""
    readers = {".txt": _from_txt, ".jsonl": _from_jsonl, ".parquet": _from_parquet}
    if path.is_dir():
        raise FileError(f"{path} is a folder; expected a .txt, .jsonl or .parquet file")
    if not path.exists():
        raise FileError(f"no such file: {path} (to give text itself, give a list of strings)")
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} ends in {path.suffix or 'no suffix'!r}; text is read from .txt, .jsonl or .parquet files")
    try:
        yield from readers[path.suffix.lower()](path, field)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def _decoded(content: bytes, place: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text (byte {error.start}): a binary file, or another encoding") from None
    if "\0" in text:
        raise DataError(f"{place} has a zero byte at character {text.index(chr(0))}: a binary file")
    return text


def _from_txt(path: Path, field: str) -> Iterator[tuple[str, str]]:
    text = _decoded(path.read_bytes(), str(path)).removeprefix("\ufeff")
    yield str(path), text.replace("\r\n", "\n")


def _from_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            content = _decoded(line, place).removeprefix("\ufeff")
            if content.isspace():
                continue
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not valid JSON ({error})") from None
            text = record
            if isinstance(record, dict):
                if field not in record:
                    raise DataError(f"{place}: no field {field!r}; it has {_listed(list(record))}")
                text = record[field]
            if not isinstance(text, str):
                raise DataError(f"{place}: the text is {type(text).__name__}; expected a string, or an object with a string {field!r}")
            yield place, text


def _from_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise DataError(f"{path}: no column {field!r}; it has {_listed(schema.names)}")
            kind = schema.field(field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column {field!r} is {kind}; expected strings")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is not None:
                        yield f"{path}, row {row}", text
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's fault, not the content's
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "none"
