"""Checkpoints: models are read from and written to folders of safetensors, and nothing is ever half-written.

A file or folder is made under a temporary name beside its place, flushed to the disk, and renamed: whoever looks at the path sees the old
content or the new one, also after a crash. What the quantized format holds and how it is packed is in `core.formats`.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import decompress_module
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from whatmatters.core.catalog import door
from whatmatters.core.errors import FileError, FormatError, InputError, ModelError
from whatmatters.core.formats import DENSE_BITS, attached, check_compressible, compressed_state, quantization_config

__all__ = ["Saved", "atomic_file", "atomic_folder", "check_output", "check_savable", "load", "load_meta", "save", "stream_tensors"]

FORMATS = ("auto", "compressed-tensors", "dense")
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

PathLike = str | os.PathLike[str]


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    """Flush a folder's list of names; some file systems refuse that and order renames by themselves."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):
            raise


def check_output(path: PathLike, overwrite: bool = False) -> Path:
    """Refuse an output that cannot be written, before any work is done for it.

    Args:
        path: the file or folder to be made.
        overwrite: whether it may exist already.

    Returns:
        `path` as a Path.

    Raises:
        FileError: it exists and `overwrite` is False, or the nearest existing folder above it is no folder or cannot be written.

    Example:
        >>> import tempfile
        >>> check_output(tempfile.mkdtemp() + "/out").name
        'out'
    """
    target = Path(path)
    if target.name in ("", "..") or "\0" in str(path):
        raise FileError(f"{str(path)!r} does not name an output; give a path that ends in a name")
    if os.path.lexists(target) and not overwrite:
        raise FileError(f"{target} exists already; choose another output or overwrite it on purpose (overwrite=True, --overwrite)")
    parent = target.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise FileError(f"cannot write {target}: {parent} is not a folder")
    try:
        # os.access is not enough: it says yes to root on a read-only mount.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise FileError(f"cannot write {target}: the folder {parent} is not writable ({_reason(error)})") from error
    return target


_UMASK = os.umask(0)
os.umask(_UMASK)
FILE_MODE = 0o666 & ~_UMASK
"""Mode of what is written, as any program would have it: safetensors and temporary files come with 0600."""


@contextmanager
def atomic_file(path: PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """Write a file completely or not at all.

    Args:
        path: the file to make; missing folders above it are made.
        overwrite: whether it may exist already.

    Yields:
        A temporary path in the same folder; what is there when the block ends becomes `path`, when the block raises it is removed.

    Raises:
        FileError: `path` exists and `overwrite` is False, or it cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_file(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = check_output(path, overwrite)
    if target.is_dir():
        raise FileError(f"cannot write the file {target}: it is a folder")
    temporary = _temporary(target, folder=False)
    try:
        yield temporary
        if not temporary.is_file():
            raise FileError(f"nothing was written for {target}")
        os.chmod(temporary, FILE_MODE)
        _sync(temporary)
        if not overwrite and os.path.lexists(target):
            raise FileError(f"{target} came into being while it was written; it was left alone")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.absolute().parent)


@contextmanager
def atomic_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Args:
        path: the folder to make; missing folders above it are made.
        overwrite: whether it may exist already; the old one is then replaced as a whole, and put back if that fails. (A kill between the
            two renames leaves it complete, under a hidden name ending in ".old".)

    Yields:
        A temporary folder beside `path`; when the block ends it becomes `path`, when the block raises it is removed.

    Raises:
        FileError: `path` exists and `overwrite` is False, or it cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out"
        >>> with atomic_folder(target) as temporary:
        ...     _ = (temporary / "a.txt").write_text("1")
        >>> [p.name for p in target.iterdir()]
        ['a.txt']
    """
    target = check_output(path, overwrite)
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink()):
        raise FileError(f"cannot write the folder {target}: it is a file or a link")
    temporary = _temporary(target, folder=True)
    try:
        yield temporary
        for entry in sorted(temporary.rglob("*"), reverse=True):
            if entry.is_dir():
                _sync_folder(entry)
            else:
                _sync(entry)
        _sync_folder(temporary)
        if not overwrite and os.path.lexists(target):
            raise FileError(f"{target} came into being while it was written; it was left alone")
        _swap_in(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(target: Path, *, folder: bool) -> Path:
    """A fresh hidden name beside `target`, with the permissions a plainly made file or folder would have."""
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".partial", dir=parent))
            temporary.chmod(0o777 & ~_UMASK)
        else:
            handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=f".partial{target.suffix}", dir=parent)
            os.close(handle)
            temporary = Path(name)
    except OSError as error:
        raise FileError(f"cannot write {target}: {_reason(error)}") from error
    return temporary


def _swap_in(temporary: Path, target: Path) -> None:
    """Rename the finished folder to its place; an old one is moved away first, and back if the rename fails."""
    parent = target.absolute().parent
    if not target.exists():
        os.replace(temporary, target)
        _sync_folder(parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".old", dir=parent))
    try:
        os.replace(target, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.replace(temporary, target)
        _sync_folder(parent)
    except BaseException:
        if target.exists():
            os.replace(target, temporary)
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _source(path_or_id: PathLike) -> Path | str:
    """A local folder as a Path, or the id of a model on the hub as a string; raises when it can be neither."""
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise FileError(f"{text} is a file; give the folder that holds {CONFIG} and the safetensors")
    looks_like_path = text.startswith((".", "~", os.sep)) or text.endswith(os.sep) or text.count("/") > 1 or "\\" in text
    try:
        validate_repo_id(text)
    except HFValidationError:
        looks_like_path = True
    if looks_like_path:
        raise FileError(f"no folder {text!r}; expected an existing model folder, or a hub id such as 'owner/name'")
    return text


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order, each with a readable header; an index may name files of this folder only."""
    index = folder / INDEX
    if index.is_file():
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(mapping.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{index} is no index of safetensors files: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
                raise FormatError(f"{index} names {name!r}; expected safetensors files that lie in {folder}")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise FormatError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when read; only safetensors are read: "
                "ask the model's author for them, or convert it where you trust it"
            )
        raise FileError(f"{folder} holds no weights; expected model.safetensors, or shards with {INDEX}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{file} is not a readable safetensors file: {error}") from error
    return files


def _config(source: Path | str, trust_remote_code: bool) -> PretrainedConfig:
    if isinstance(source, Path):
        if not (source / CONFIG).is_file():
            raise FileError(f"{source} has no {CONFIG}; expected a folder as transformers' save_pretrained writes it")
        try:
            known = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{source / CONFIG} is not JSON: {error}") from error
        if not isinstance(known, dict) or not isinstance(known.get("model_type"), str):
            raise FormatError(f"{source / CONFIG} names no model_type; expected a transformers configuration")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileError(f"no folder {str(source)!r} here, and the hub did not give such a model: {_first_line(error)}") from error
    except Exception as error:  # configuration classes check their fields in ways of their own
        raise ModelError(
            f"{source}: transformers {transformers.__version__} cannot read this configuration: {_first_line(error)}"
            + ("" if trust_remote_code else "; a model with its own code needs trust_remote_code=True, if you trust it")
        ) from error
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"{source}: expected a transformers configuration, got {type(config).__name__}")
    _check_causal(config, str(source))
    return config


def _check_causal(config: PretrainedConfig, source: str) -> None:
    if getattr(config, "auto_map", None):
        return
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    built = set(getattr(config, "architectures", None) or ())
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (built and not built & known):
        what = ", ".join(sorted(built)) or config.model_type
        raise ModelError(f"{source} is a {what}, not a causal language model; expected one that AutoModelForCausalLM loads")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tokenizer(source: Path | str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    vocabularies = ("tokenizer*.json", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json")
    if isinstance(source, Path):
        found = {p.name for pattern in vocabularies for p in source.glob(pattern)} - {"tokenizer_config.json"}
        if not found:
            raise FileError(f"{source} holds no tokenizer; expected tokenizer.json (or the family's vocabulary files) beside {CONFIG}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizer backends raise what they like, bare Exception included
        raise FileError(f"the tokenizer of {source} cannot be loaded: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise FileError(f"the tokenizer of {source} cannot be loaded: got {type(tokenizer).__name__}")
    return tokenizer


@door("load")
def load(
    path_or_id: PathLike, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a folder or the hub; only safetensors are read.

    Args:
        path_or_id: a folder as `save_pretrained` or `save` writes it, or a hub id. The network is used only for what is not a folder.
        trust_remote_code: whether code that comes with the model may run.
        dtype: dtype of the weights; None means what config.json says. Computing in float16 on a CPU is very slow: pass torch.float32 for
            a float16 model there.

    Returns:
        The model in eval mode and its tokenizer. A compressed-tensors checkpoint comes back as an ordinary dense model with the quantized
        values: saved again, it is dense.

    Raises:
        FileError: no such folder or model, no config.json, no weights, no tokenizer.
        FormatError: a pickle, corrupt safetensors, or a quantized format other than compressed-tensors.
        ModelError: not a causal language model, unknown to transformers, or weights are missing from the files.

    Example:
        >>> load("no/such/folder")
        Traceback (most recent call last):
        whatmatters.core.errors.FileError: no folder 'no/such/folder'; expected an existing model folder, or a hub id such as 'owner/name'
          in load(path_or_id='no/such/folder')
    """
    source = _source(path_or_id)
    config = _config(source, trust_remote_code)
    method = _quantization_method(config)
    if method not in (None, "compressed-tensors"):
        raise FormatError(f"{source} is quantized already, in the format {method!r}; give the model it was made from")
    if isinstance(source, Path):
        _shards(source)
    tokenizer = _tokenizer(source, trust_remote_code)
    try:
        model, info = _pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise FormatError(f"{source}: corrupt safetensors: {_first_line(error)}") from error
    except OSError as error:
        raise FormatError(f"{source}: no safetensors to read (a pickle is never read): {_first_line(error)}") from error
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{source}: transformers cannot load it: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{source}: {len(missing)} tensors are missing from the files, first {missing[0]!r}; they would be random")
    if method is not None:
        _make_plain(model)
    return model.eval(), tokenizer


def _pretrained(source: Path | str, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, **settings)
    return loaded[0], loaded[1]


def _quantization_method(config: PretrainedConfig) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def _make_plain(model: PreTrainedModel) -> None:
    """Decompress now instead of at the first forward pass, and leave nothing of the quantizer: every action expects plain modules."""
    hook: Any = model.__dict__.pop("ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            decompress_module(module, leave_decompressed=False)
            for name in ("weight_shape", "weight_scale", "weight_zero_point"):
                module._parameters.pop(name, None)
            module.__dict__.pop("forward", None)  # the class's own forward again
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@door("load_meta")
def load_meta(path_or_id: PathLike | PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: all shapes, no weights, whatever its size.

    Args:
        path_or_id: a model folder, a hub id, or a transformers configuration.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The model in eval mode; its parameters hold no memory.

    Raises:
        FileError, FormatError, ModelError: as `load`, for the configuration.

    Example:
        >>> from transformers import LlamaConfig
        >>> sum(p.numel() for p in load_meta(LlamaConfig()).parameters())  # 7B, in milliseconds
        6738415616
    """
    if isinstance(path_or_id, PretrainedConfig):
        config = path_or_id
        _check_causal(config, type(config).__name__)
    else:
        config = _config(_source(path_or_id), trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"transformers cannot build this model: {_first_line(error)}") from error
    return model.eval()


REOPEN = 256 << 20
"""Bytes read from one mapped file before it is opened anew."""


def stream_tensors(path_or_id: PathLike) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint one by one, memory-mapped: the whole model is never in memory.

    Args:
        path_or_id: a model folder, or a hub id (its safetensors are downloaded to the hub's cache).

    Yields:
        (name in the file, tensor). The names are the checkpoint's: experts may lie there one by one.

    Raises:
        FileError: no such folder or model, or no weights in it.
        FormatError: corrupt safetensors, an index that points out of its folder, a pickle.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.ones(2, 3)}, folder + "/model.safetensors")
        >>> [(name, tuple(tensor.shape)) for name, tensor in stream_tensors(folder)]
        [('w', (2, 3))]
    """
    source = _source(path_or_id)
    if isinstance(source, str):
        try:
            source = Path(snapshot_download(source, allow_patterns=["*.safetensors", INDEX, CONFIG]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise FileError(f"no folder {source!r} here, and the hub did not give such a model: {_first_line(error)}") from error
    for file in _shards(source):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        while names:
            # Pages of a mapped file stay resident while it is open: a large file is opened anew after every REOPEN bytes.
            seen = 0
            with safe_open(file, framework="pt") as tensors:
                while names and seen < REOPEN:
                    name = names.pop(0)
                    tensor = tensors.get_tensor(name)
                    seen += tensor.nbytes
                    yield name, tensor
                    del tensor


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        path: the folder.
        format: "compressed-tensors" or "dense".
        bytes: size of all files of the folder.
        weight_bytes: size of the safetensors among them.
    """

    path: Path
    format: str
    bytes: int
    weight_bytes: int


@door("check_savable")
def check_savable(
    model: nn.Module,
    levels: Mapping[str, int],
    *,
    group_size: int = 128,
    symmetric: bool = True,
    format: str = "auto",
) -> None:
    """Refuse before any work what `save` could not write.

    Args:
        model: the model to be quantized, may be on the meta device.
        levels: planned bits of each site, 16 or more for sites left as they are; empty for a model that is not quantized.
        group_size: inputs per scale, or -1.
        symmetric: whether there will be no zero points.
        format: as for `save`; "auto" is compressed-tensors if a site gets less than 16 bits.

    Raises:
        FormatError: names the site the format cannot hold, why, and the remedy.
        InputError: an unknown format.
    """
    quantized = {name: bits for name, bits in levels.items() if bits < DENSE_BITS}
    _check_format(model, format, quantized=bool(quantized))
    if format != "dense":
        check_compressible(model, {name: (bits, group_size, symmetric) for name, bits in quantized.items()})


def _check_format(model: nn.Module, format: str, *, quantized: bool) -> PreTrainedModel:
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}; expected one of {FORMATS}")
    if not isinstance(model, PreTrainedModel):
        raise FormatError(
            f"a {type(model).__name__} is not a transformers model, so it has no checkpoint that loads by itself; "
            "keep its state_dict with safetensors.torch.save_file"
        )
    if getattr(model, "whatmatters_online", False):
        raise FormatError(
            "this model computes something as it runs that no checkpoint holds: use rotate='hadamard' for a rotation, undo() a handle"
        )
    if format == "compressed-tensors" and not quantized:
        raise FormatError('format="compressed-tensors" holds quantized models, and no site is quantized; use format="dense"')
    return model


def _without_place(path: Path) -> None:
    """Take out of a tokenizer's configuration where it was loaded from: the same model gives the same bytes everywhere."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "name_or_path")}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


@door("save")
def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    path: PathLike,
    *,
    format: str = "auto",
    overwrite: bool = False,
) -> Saved:
    """Write a checkpoint that the model's stock loader, such as `AutoModelForCausalLM.from_pretrained(path)`, loads without this library.

    The folder appears as a whole or not at all. Tensors of a float32 model whose values fit 16 bits without loss are stored in 16 bits
    (config.json keeps float32, and so does the loaded model).

    Args:
        model: a transformers model.
        tokenizer: saved beside it; None for a model without one.
        path: the folder to make.
        format: "compressed-tensors" packs the sites that a quantizer left records of; "dense" writes the weights as they are (pruned
            patterns are kept, quantized weights stay at their values but are not packed); "auto" is the first if there are records.
        overwrite: whether to replace an existing folder.

    Returns:
        The folder, the format and the sizes on disk.

    Raises:
        FileError: the folder exists, or cannot be written.
        FormatError: the format cannot hold the model, or a weight was changed after it was quantized.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> save(LlamaForCausalLM(config), None, tempfile.mkdtemp() + "/out").format
        'dense'
    """
    records = attached(model)
    whole = _check_format(model, format, quantized=bool(records))
    if format == "dense":
        records = {}
    check_compressible(whole, {name: record.kind for name, record in records.items()})
    with atomic_folder(path, overwrite=overwrite) as folder:
        try:
            whole.save_pretrained(folder, state_dict=compressed_state(whole, records))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
                _without_place(folder / "tokenizer_config.json")
            if records:
                config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
                config["quantization_config"] = quantization_config(model, records)
                (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for entry in folder.rglob("*"):
                if entry.is_file():
                    entry.chmod(FILE_MODE)
        except OSError as error:
            raise FileError(f"cannot write {os.fspath(path)}: {_reason(error)}") from error
    written = Path(path)
    sizes = {entry: entry.stat().st_size for entry in written.rglob("*") if entry.is_file()}
    return Saved(
        path=written,
        format="compressed-tensors" if records else "dense",
        bytes=sum(sizes.values()),
        weight_bytes=sum(size for entry, size in sizes.items() if entry.suffix == ".safetensors"),
    )
