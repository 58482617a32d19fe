"""The embedded default: a small Llama of Python source, and the text it is judged on, which every machine with Python has.

The model (5.8M parameters, `assets/pylib-lm/SOURCE.md` tells how it was made) was trained on the standard library's own source. The files
that its recipe's hash rule held out are the text of the demo and of the tests: nothing is downloaded. Calibrate on "validation", judge on
"test"; "train" is for training such a model (`scripts/train_pylib_lm.py`) and must never be judged on.
"""

import functools
import hashlib
import importlib.resources
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whatmatters.core.errors import DataError, FileError

__all__ = ["documents", "interpreter", "library_files", "load", "path", "split_digest"]

EXCLUDED = frozenset({"site-packages", "dist-packages", "encodings", "lib2to3", "idlelib", "turtledemo", "tkinter"})
SMALLEST, LARGEST = 200, 800_000  # bytes of a file


def path() -> Path:
    """Folder of the packaged model, in the layout that `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        FileError: the package was installed without its assets, or is not on a file system.

    Example:
        >>> (path() / "model.safetensors").exists()
        True
    """
    folder = Path(str(importlib.resources.files("whatmatters").joinpath("assets", "pylib-lm")))
    if not (folder / "model.safetensors").is_file():
        raise FileError(f"the embedded model is not at {folder}: reinstall whatmatters from a wheel or a checkout that has its assets")
    return folder


def load() -> tuple[nn.Module, Any]:
    """The embedded model in float32 and in evaluation mode, and its tokenizer.

    Returns:
        model: a `LlamaForCausalLM` of 6 layers, hidden size 256, 4,096 tokens.
        tokenizer: its fast tokenizer; `<|endoftext|>` (id 0) begins every document.

    Raises:
        FileError: the assets are not there.

    Example:
        >>> model, tokenizer = load()
        >>> model.dtype, len(tokenizer)
        (torch.float32, 4096)
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = path()
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # 56 tensors load in milliseconds
    try:
        # float32 is said twice, here and in config.json: fp16 as stored would compute about 70 times slower on a CPU.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def library_files(split: str = "train") -> list[Path]:
    """Files of the running interpreter's standard library in one split, in path order.

    A file belongs to "validation", "test" or "train" by the SHA-256 of its path relative to the library, modulo 100: 0-2, 3-5, the rest.
    Left out: folders of data, graphics and third parties, files under 200 or over 800,000 bytes or not UTF-8, repeats of an earlier file.

    Args:
        split: "train", "validation" or "test".

    Returns:
        Absolute paths; inside a virtual environment too they are the base installation's.

    Raises:
        DataError: no such split, or the standard library has no source files in it.

    Example:
        >>> all(file.suffix == ".py" for file in library_files("test"))
        True
    """
    splits = _splits()
    if split not in splits:
        raise DataError(f"split is {split!r}; expected one of {', '.join(splits)}")
    if not splits[split]:
        raise DataError(f"no {split} files under {_library()}: this interpreter has no standard library source, give a text of your own")
    return [_library() / name for name in splits[split]]


def documents(split: str) -> list[str]:
    """Contents of `library_files(split)`, one document a file, in path order.

    Args:
        split: "validation" to calibrate on, "test" to judge on, "train" for training only.

    Raises:
        DataError: no such split, or it is empty.

    Example:
        >>> len(documents("validation")) == len(library_files("validation"))
        True
    """
    return [file.read_text(encoding="utf-8") for file in library_files(split)]


def split_digest(split: str) -> str:
    """SHA-256 (hexadecimal) over the relative paths and contents of a split: equal digests, equal text.

    Example:
        >>> split_digest("test") == split_digest("test") != split_digest("validation")
        True
    """
    digest = hashlib.sha256()
    for file, text in zip(library_files(split), documents(split), strict=True):
        for part in (file.relative_to(_library()).as_posix(), text):
            encoded = part.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def interpreter() -> str:
    """The interpreter whose library is the text, as "CPython 3.11.7"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def _library() -> Path:
    return Path(os.__file__).resolve().parent


@functools.cache
def _splits() -> dict[str, tuple[str, ...]]:
    library = _library()
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    seen: set[bytes] = set()
    for file in sorted(library.rglob("*.py")):
        relative = file.relative_to(library)
        if not EXCLUDED.isdisjoint(relative.parts) or not SMALLEST <= file.stat().st_size <= LARGEST:
            continue
        content = file.read_bytes()
        fingerprint = hashlib.sha256(content).digest()
        if fingerprint in seen or not _is_utf8(content):
            continue
        seen.add(fingerprint)
        splits[_split_of(relative.as_posix())].append(relative.as_posix())
    return {split: tuple(names) for split, names in splits.items()}


def _split_of(name: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 100
    return "validation" if bucket < 3 else "test" if bucket < 6 else "train"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
