"""What the commands read: a model by its name on the line, and a text, part of which is kept back to judge on."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whatmatters.cli.console import Output

if TYPE_CHECKING:
    from torch import nn

    from whatmatters.core.data import Calibration
    from whatmatters.core.sites import Structure

EMBEDDED = "default"
"""The name of the embedded model, and of the text that goes with it."""

LENGTH = 512
JUDGED_WINDOWS = 64
SMALL = 2**26
"""Texts up to this many bytes are read before the model is loaded, so that a bad one is refused at once."""

HELD_OUT = 10
"""One document in ten is kept back to judge on; of fewer documents, the last tenth of each."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and advice of transformers on stderr for the length of a `with`."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Subject:
    """The model of a command, as it was named and as it is."""

    name: str
    model: Any
    tokenizer: Any
    structure: "Structure"


def source_of(name: str) -> str:
    """The folder or hub id behind a model's name on the line."""
    if name == EMBEDDED:
        from whatmatters.core import embedded

        return str(embedded.path())
    return name


def load_shapes(name: str, trust_remote_code: bool = False) -> "tuple[nn.Module, Structure]":
    """The model without its weights, and its structure: enough to refuse most mistakes in a second."""
    from whatmatters.core.checkpoint import load_meta
    from whatmatters.core.sites import structure

    with quiet_transformers():
        model = load_meta(source_of(name), trust_remote_code=trust_remote_code)
        return model, structure(model)


def load_subject(name: str, out: Output, *, trust_remote_code: bool = False, allow_uncovered: bool = True) -> Subject:
    """The model with its weights, each checked to be finite."""
    import torch

    from whatmatters.core.actions import check_sites
    from whatmatters.core.checkpoint import load
    from whatmatters.core.sites import structure
    from whatmatters.core.walk import steady_memory

    steady_memory()
    source = source_of(name)
    half = _stored_as(source) == "float16" and not torch.cuda.is_available()
    if half:
        out.note("the model says float16, in which a CPU is very slow: it is computed in float32")
    with quiet_transformers():
        model, tokenizer = load(source, trust_remote_code=trust_remote_code, dtype=torch.float32 if half else None)
        found = structure(model)
    check_sites(model, found, allow_uncovered)
    return Subject(name, model, tokenizer, found)


def _stored_as(source: str) -> str | None:
    """The dtype that a local config.json names."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("dtype", config.get("torch_dtype")) if isinstance(config, dict) else None


@dataclass(frozen=True)
class Texts:
    """Documents to learn from and documents to judge on: never the same."""

    learn: Sequence[str]
    judge: Sequence[str]
    name: str


def read_texts(name: str, *, judge: str | None = None, field: str = "text") -> Texts:
    """The documents of a text; those to judge on come from `judge`, or are kept back."""
    if name == EMBEDDED:
        from whatmatters.core import embedded

        return Texts(embedded.documents("validation"), read_documents(judge or EMBEDDED, field), name)
    if judge is not None:
        return Texts(read_documents(name, field), read_documents(judge, field), name)
    learn, kept = held_out(read_documents(name, field))
    return Texts(learn, kept, name)


def read_documents(name: str, field: str = "text") -> list[str]:
    """The documents of a text to judge on; of the embedded one those it was never tuned on."""
    if name == EMBEDDED:
        from whatmatters.core import embedded

        return embedded.documents("test")
    from whatmatters.core.data import documents

    return documents(name, field)


def check_text(name: str | None, field: str = "text") -> None:
    """Refuse a text that cannot be read, before a model is loaded for it."""
    if name is None or name == EMBEDDED:
        return
    if not os.path.isfile(name) or os.path.getsize(name) <= SMALL:
        read_documents(name, field)


def held_out(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to learn from and documents to judge on, decided by position alone.

    Example:
        >>> learn, judge = held_out([str(i) for i in range(20)])
        >>> judge
        ['9', '19']
    """
    if len(documents) >= HELD_OUT:
        return [d for i, d in enumerate(documents) if i % HELD_OUT != HELD_OUT - 1], list(documents[HELD_OUT - 1 :: HELD_OUT])
    learn, judge = [], []
    for document in documents:
        cut = len(document) - len(document) // HELD_OUT
        line = document.rfind("\n", 0, cut) + 1
        cut = line or cut
        learn.append(document[:cut])
        judge.append(document[cut:])
    return learn, [text for text in judge if text.strip()]


def window_length(model: "nn.Module", length: int | None) -> int:
    """The length that was asked for, or 512, or the model's context where that is shorter."""
    if length is not None:
        return length
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(LENGTH, context) if isinstance(context, int) and context > 1 else LENGTH


def calibration_of(subject: Subject, documents: Sequence[str], *, samples: int, length: int | None, seed: int) -> "Calibration":
    """Windows to learn from."""
    from whatmatters.core.data import calibration, check_fits

    data = calibration(subject.tokenizer, documents, samples=samples, length=window_length(subject.model, length), seed=seed)
    check_fits(subject.model, data)
    return data


def judged_windows(subject: Subject, documents: Sequence[str], *, length: int | None, limit: int | None) -> "Calibration":
    """Windows to judge on: all, or a few of every document rather than many of a few."""
    from whatmatters.core.data import check_fits, windows
    from whatmatters.core.errors import DataError

    if not documents:
        raise DataError("the text is too short to keep a tenth of it back to judge on; give --judge FILE, or --no-evaluate")
    each = None if limit is None or len(documents) == 1 else math.ceil(limit / len(documents))
    cut = windows(subject.tokenizer, documents, window_length(subject.model, length), limit=limit, per_document=each)
    check_fits(subject.model, cut)
    return cut
