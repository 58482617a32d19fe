"""Walk: go through a model block by block with calibration data, in bounded memory, resumable, and change the model only at the end.

One copy of one block is worked on at a time. The inputs of the current block for all samples are the only activations held, on disk past
a given size. Each finished block is written to the run folder under a fingerprint of model, data and settings; a killed run continues
from there and ends with the same bits. The model itself is changed in one last step, journalled on disk, so that a raise or Ctrl-C before
or inside it leaves every weight as it was.
"""

import contextlib
import copy
import ctypes
import hashlib
import inspect
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from whatmatters.core import offload, ranks
from whatmatters.core.capture import settings_of
from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.data import Calibration, call_model, check_fits
from whatmatters.core.errors import FileError, InputError, ModelError, NonFiniteError, ResumeError
from whatmatters.core.progress import Progress
from whatmatters.core.ranks import Take
from whatmatters.core.sites import Site, Structure, replaced_forward

__all__ = ["Batch", "Block", "WalkResult", "give_memory_back", "steady_memory", "walk"]

SPILL_BYTES = 2 << 30
"""Block inputs are kept in memory up to this size, on disk beyond it."""


class _Stop(Exception):
    """The forward pass has given what was wanted of it."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its way into a block.

    Attributes:
        index: position of the micro-batch.
        first: position of its first sample.
        hidden: input of the block, (samples, ...).
        ids: the calibration inputs it came from, (samples, ...).
        valid: False at padding, (samples, length), or None.
        arguments: the block's other arguments (masks, position embeddings), by name.
    """

    index: int
    first: int
    hidden: Tensor
    ids: Tensor
    valid: Tensor | None
    arguments: dict[str, Any]


@dataclass
class Block:
    """What a visit is given: a copy of a block, its sites, and its inputs if there is calibration data.

    A visit may change parameters and buffers of `module`; nothing of it reaches the model before the walk's last step.

    Attributes:
        index: position of the block.
        name: its name in the model.
        module: the copy, in evaluation mode; experts run their plain loop.
        sites: its sites.
        extras: tensors to keep with the block (by name), given back in `WalkResult`.
    """

    index: int
    name: str
    module: nn.Module
    sites: tuple[Site, ...]
    extras: dict[str, Tensor] = field(default_factory=dict)
    _inputs: "_Inputs | None" = None

    def weight(self, site: Site) -> Tensor:
        """The (out, in) view of a site's weights in the copy."""
        prefix = f"{self.name}."
        parameter = self.module.get_parameter(site.parameter.removeprefix(prefix)).detach()
        if site.index is not None:
            parameter = parameter[site.index]
        return parameter.T if site.transposed else parameter

    def batches(self) -> Iterator[Batch]:
        """The micro-batches, in order; raises ModelError in a walk without data.

        Where ranks share the work every rank is given them all, those of the others through its group: right, and no faster than one
        process. What can be done by one rank for all belongs into `each`.
        """
        yield from self._given.batches(self.index)

    def own_batches(self) -> Iterator[Batch]:
        """The micro-batches whose inputs this rank holds, in order: all of them in a process that works alone."""
        return (self._given.batch(index, self.index) for index in self._given.own)

    def each(self, work: Callable[[Batch], tuple[Any, list[Tensor]]], take: Take) -> None:
        """Do `work` on every micro-batch, on this rank or another, and `take` what it gives, in order, on every rank.

        Args:
            work: gives something JSON-able, and tensors.
            take: is given that and an iterator of the tensors, which are on the CPU if another rank sent them.
        """
        given = self._given
        if given.ranks is not None:
            given.ranks.in_order(len(given.ids), lambda index: work(given.batch(index, self.index)), take)
            return
        for batch in self.own_batches():
            note, tensors = work(batch)
            take(note, iter(tensors))

    @property
    def shared(self) -> bool:
        """Whether other ranks work on this block too."""
        return self._given.ranks is not None

    def place(self, batch: Batch, count: int) -> int:
        """Where a micro-batch stands in a list of `count`: of all micro-batches, or of this rank's own.

        Raises:
            InputError: it is neither.
        """
        if count == len(self._given.ids):
            return batch.index
        if count == len(self._given.own):
            return self._given.own.index(batch.index)
        raise InputError(f"a list of {count} for {len(self._given.ids)} micro-batches; expected one entry for each")

    @property
    def _given(self) -> "_Inputs":
        if self._inputs is None:
            raise ModelError("this walk has no calibration data; pass some")
        return self._inputs

    def run(self, batch: Batch) -> Tensor:
        """Output of the block, as it is now, on a micro-batch; a block that writes into its input writes into a copy."""
        output = self.module(batch.hidden.clone(), **batch.arguments)
        return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class WalkResult:
    """What a walk leaves behind: a row per visited block as the visits returned them, the kept tensors, and the seconds of each block."""

    rows: list[dict[str, Any]]
    extras: dict[str, Tensor]
    seconds: list[float]


class _Store:
    """Tensors by number, all of the same kind: in memory, or one file each in a folder once they are many bytes."""

    def __init__(self, folder: Path, budget: int, expected: int) -> None:
        self.folder = folder if expected > budget else None
        self.held: dict[int, Tensor] = {}
        self.kinds: dict[int, tuple[torch.dtype, tuple[int, ...], torch.device]] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self.folder is None:
            self.held[index] = value
            return
        self.kinds[index] = (value.dtype, tuple(value.shape), value.device)
        value.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(self.folder / f"{index}.bin")

    def __getitem__(self, index: int) -> Tensor:
        if self.folder is None:
            return self.held[index]
        dtype, shape, device = self.kinds[index]
        raw = torch.from_numpy(np.fromfile(self.folder / f"{index}.bin", dtype=np.uint8))
        return raw.view(dtype).view(shape).to(device)


class _Inputs:
    """The inputs of the current block for every micro-batch, and the keyword arguments of every block."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        structure: Structure,
        folder: Path,
        spill_bytes: int,
        start: Callable[[Tensor], Tensor],
    ) -> None:
        self.ranks = ranks.current()
        device = offload.execution_device()
        self.ids = [inputs for inputs, _ in calibration.batches()]
        self.valid = [valid for _, valid in calibration.batches()]
        rank, size = (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.size)
        self.own = range(rank, len(self.ids), size)
        self.first = [index * calibration.batch for index in range(len(self.ids))]
        self.store: _Store | None = None
        self.arguments: list[list[dict[str, Any]]] = []  # by micro-batch, by block; equal ones are one object
        blocks = [model.get_submodule(name) for name in structure.blocks]
        with settings_of(model, _experts_implementation="eager"):
            self._check_chain(model, blocks, self.ids[0][:1], None if self.valid[0] is None else self.valid[0][:1])
        for index, (ids, valid) in enumerate(zip(self.ids, self.valid, strict=True)):
            hidden, arguments = self._enter(model, blocks, ids, valid)
            if index in self.own:
                hidden = _moved(start(hidden), device)
                if self.store is None:
                    samples = sum(len(self.ids[i]) for i in self.own)
                    self.store = _Store(folder, spill_bytes, hidden.nbytes // len(ids) * samples)
                self.store[index] = hidden
            self.arguments.append(self._shared(_moved(arguments, device)))
        give_memory_back()

    def _check_chain(self, model: nn.Module, blocks: list[nn.Module], ids: Tensor, valid: Tensor | None) -> None:
        """One real run of one sample: every block must be given exactly what the block before it returned, once."""
        self.tuples = False
        calls = 0
        chained = True
        last: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal calls, chained
            given = _named(module, args, kwargs)[0]
            self.tuples = not isinstance(output, Tensor)
            chained &= module is blocks[min(calls, len(blocks) - 1)] and all(given is one or torch.equal(given, one) for one in last)
            calls += 1
            last[:] = [output[0] if self.tuples else output]

        handles = [block.register_forward_hook(hook, with_kwargs=True) for block in blocks]
        try:
            call_model(model, ids.clone(), valid)
        finally:
            for handle in handles:
                handle.remove()
        if not (chained and calls == len(blocks)):
            raise ModelError(
                f"the {len(blocks)} blocks of {type(model).__name__} do not form a chain ({calls} calls seen in one forward pass); "
                "expected each block to take the output of the block before it"
            )

    def _enter(self, model: nn.Module, blocks: list[nn.Module], ids: Tensor, valid: Tensor | None) -> tuple[Tensor, list[dict[str, Any]]]:
        """Input of the first block and the arguments of each, from a run in which no block computes anything."""
        first: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, others = _named(blocks[len(arguments)], args, kwargs)
            first.append(hidden)
            arguments.append(others)
            if len(arguments) == len(blocks):
                raise _Stop
            return (hidden,) if self.tuples else hidden

        with replaced_forward(blocks, forward), contextlib.suppress(_Stop):
            call_model(model, ids, valid)
        return first[0], arguments

    def _shared(self, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = [a for batch in self.arguments for a in batch]
        result: list[dict[str, Any]] = []
        for one in arguments:
            same = next((k for k in {id(k): k for k in [*known, *result]}.values() if _equal(k, one)), one)
            result.append(same)
        return result

    def batch(self, index: int, block: int, hidden: Tensor | None = None) -> Batch:
        """A micro-batch of this rank's own, or of another with the inputs that it sent."""
        if hidden is None:
            assert self.store is not None  # this rank has micro-batches: the constructor stored them
            hidden = self.store[index]
        return Batch(index, self.first[index], hidden, self.ids[index], self.valid[index], self.arguments[index][block])

    def batches(self, block: int) -> Iterator[Batch]:
        for index in range(len(self.ids)):
            if self.ranks is None:
                yield self.batch(index, block)
            else:
                own = [self.batch(index, block).hidden] if index in self.own else []
                _, [hidden] = self.ranks.broadcast(index % self.ranks.size, str(own[0].device) if own else None, own)
                yield self.batch(index, block, own[0] if own else hidden)

    def advance(self, block: Block) -> None:
        """Replace every input by the block's output: the inputs of the next block."""
        for batch in block.own_batches():
            assert self.store is not None
            output = block.run(batch)
            if not torch.isfinite(output).all():
                raise NonFiniteError(
                    f"{block.name} gives NaN or infinity on micro-batch {batch.index}; check the model's dtype and the data"
                )
            self.store[batch.index] = output


def _named(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What a block was called with: its input, which is the first that its class's `forward` takes, and all other arguments by name.

    Raises:
        ModelError: arguments without a name.
    """
    names = list(inspect.signature(type(block).forward).parameters.values())[1:]
    if len(args) > len(names) or any(p.kind is p.VAR_POSITIONAL for p in names[: len(args)]):
        raise ModelError(f"{type(block).__name__} is called with {len(args)} arguments that its forward does not name; expected named ones")
    others = {p.name: value for p, value in zip(names, args, strict=False)} | kwargs
    return others.pop(names[0].name), others


def _moved(value: Any, device: torch.device | None) -> Any:
    """A value with its tensors, wherever they are inside tuples, lists and mappings, on a device; as it is for None."""
    if device is None or isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (tuple, list) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return a is b or bool(a == b)


def digest_of(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, one tensor at a time."""
    return _digest(model.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(memoryview(plain))
        offload.release()
    return digest.hexdigest()


class _Run:
    """The run folder: `run.json` with the fingerprint, one file per finished block, the journal of the last step."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any] | None, resume: bool) -> None:
        """A folder without a fingerprint is a temporary one: nothing in it needs to outlive a crash."""
        self.folder = folder
        self.durable = fingerprint is not None
        if fingerprint is None:
            return
        record = folder / "run.json"
        if record.exists():
            if not resume:
                raise FileError(f"{folder} holds an earlier run; resume it, or remove the folder")
            try:
                before = json.loads(record.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ResumeError(f"{record} is not a run record ({error}); remove {folder} and start again") from error
            changed = sorted(key for key in fingerprint.keys() | before.keys() if fingerprint.get(key) != before.get(key))
            if changed:
                told = "; ".join(f"{key}: was {_short(before.get(key))}, is {_short(fingerprint.get(key))}" for key in changed)
                raise ResumeError(f"the run in {folder} was made with other inputs ({told}); give the same ones, or start a new run")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(record) as temporary:
                temporary.write_text(json.dumps(fingerprint, indent=1, sort_keys=True), encoding="utf-8")

    def path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def write(self, index: int, tensors: dict[str, Tensor], row: dict[str, Any], seconds: float) -> None:
        metadata = {"row": json.dumps(row), "seconds": json.dumps(seconds)}
        self.save(self.path(index), tensors, metadata)

    def save(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        if not self.durable:
            save_file(kept, path, metadata=metadata)
            return
        with atomic_file(path) as temporary:
            save_file(kept, temporary, metadata=metadata)

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any], float]:
        with safe_open(self.path(index), framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return tensors, json.loads(metadata["row"]), json.loads(metadata["seconds"])


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _fingerprint(model: nn.Module, calibration: Calibration | None, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": digest_of(model),
        "data": calibration.digest if calibration is not None else None,
        "batch": calibration.batch if calibration is not None else None,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        **{f"setting {key}": json.loads(json.dumps(value)) for key, value in settings.items()},
    }


EXTRA = "extra:"


def walk(
    model: nn.Module,
    calibration: Calibration | None,
    visit: Callable[[Block], dict[str, Any]],
    *,
    structure: Structure,
    settings: dict[str, Any],
    label: str = "blocks",
    start: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    outside: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
    prepare: Callable[[str, nn.Module], object] | None = None,
    commit: bool = True,
    run_dir: str | Path | None = None,
    resume: bool = False,
    spill_bytes: int = SPILL_BYTES,
    progress: Progress | None = None,
) -> WalkResult:
    """Visit every block with its inputs, then commit the changed tensors to the model in one journalled step.

    The inputs of a block are the outputs of the blocks before it as their visits left them.

    Args:
        model: the model; unchanged until the last step, and if anything raises.
        calibration: data whose activations go through the blocks; None for a walk over weights alone.
        visit: called with each block that has sites; returns a JSON-able row for the report.
        structure: blocks and sites of the model.
        settings: everything that determines the result, JSON-able; part of the fingerprint.
        label: what is shown as progress.
        start: applied to the inputs of the first block (a rotation of the residual stream, say).
        outside: gives (parameter name, new value) for parameters outside the blocks, one at a time, at the last step. A name that is tied
            to another parameter of the model is untied.
        prepare: given the name and the copy of each block before anything else, also of blocks that an earlier run finished: for hooks.
        commit: False for visits that only measure: then nothing is copied into the model.
        run_dir: folder of the run; None: a temporary one, so not resumable. Removed by the caller when its result is safe.
        resume: continue the run in `run_dir` if there is one.
        spill_bytes: block inputs larger than this are kept on disk.
        progress: told after each block.

    Returns:
        Rows and kept tensors of all blocks.

    Raises:
        DataError: the data are not this model's.
        ModelError: the blocks do not form a chain.
        NonFiniteError: a block's output is not finite.
        ResumeError: `run_dir` was made with other inputs; the message names them.
        FileError: `run_dir` holds a run and `resume` is False.
    """
    if calibration is not None:
        check_fits(model, calibration)
    with contextlib.ExitStack() as stack:
        group = ranks.current()
        if group is not None:
            stack.enter_context(group.together())
        identity = _fingerprint(model, calibration, settings) if run_dir is not None or group is not None else None
        if group is not None:
            group.agree("the ranks of a walk", identity or {})
            run_dir = run_dir if group.first else None  # one rank writes; the others are told what it reads
        folder = Path(run_dir) if run_dir is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whatmatters-")))
        training = {m: m.training for m in model.modules()}
        stack.callback(_set_modes, training)
        stack.enter_context(torch.no_grad())
        model.eval()
        run = _Run(folder, identity, resume) if run_dir is not None else None
        scratch = _Run(folder, None, True) if run is None else run
        spill = folder / "inputs"
        stack.callback(shutil.rmtree, spill, ignore_errors=True)
        inputs = _Inputs(model, calibration, structure, spill, spill_bytes, start) if calibration is not None else None
        rows: list[dict[str, Any]] = []
        extras: dict[str, Tensor] = {}
        seconds: list[float] = []
        total = len(structure.blocks)
        if progress is not None:
            progress(label, 0, total)
        for index, name in enumerate(structure.blocks):
            original = model.get_submodule(name)
            sites = structure.in_block(name)
            device = offload.execution_device()
            own = copy.deepcopy(original)
            block = Block(index, name, own if device is None else own.to(device), sites, _inputs=inputs)
            if prepare is not None:
                prepare(name, block.module)
            with settings_of(block.module, _experts_implementation="eager"):
                finished = run.read(index) if run is not None and run.path(index).exists() else None
                if group is not None:
                    finished = _told(group, finished)
                if finished is not None:
                    changed, row, spent = finished
                    _load_into(block, changed)
                    if run is None:
                        scratch.write(index, changed, row, spent)
                else:
                    before = time.perf_counter()
                    row = visit(block) if sites else {}
                    spent = time.perf_counter() - before
                    changed = _changes(block, original)
                    if group is not None:
                        group.agree(f"{name} after its visit", {"weights": _digest(changed)})
                    if commit or run is not None:
                        scratch.write(index, changed, row, spent)
                extras |= {key.removeprefix(EXTRA): value for key, value in changed.items() if key.startswith(EXTRA)}
                del changed
                give_memory_back()
                if sites:
                    rows.append(row)
                    seconds.append(spent)
                if inputs is not None and index + 1 < total:
                    inputs.advance(block)
            del block, own
            give_memory_back()
            if progress is not None:
                progress(label, index + 1, total)
        del inputs
        agreed = (lambda: None) if group is None else (lambda: group.gather(None))
        agreed()
        if commit:
            _commit(model, scratch, total, outside, agreed)
        return WalkResult(rows, extras, seconds)


def _told(group: ranks.Ranks, finished: tuple[dict[str, Tensor], dict[str, Any], float] | None) -> Any:
    """A finished block as the first rank, which has the run folder, read it; None if it is still to be visited."""
    changed, row, spent = finished or ({}, {}, 0.0)
    note, tensors = group.broadcast(0, None if finished is None else [list(changed), row, spent], list(changed.values()))
    return None if note is None else (dict(zip(note[0], tensors, strict=True)), *note[1:])


def give_memory_back() -> None:
    """Return freed memory to the system where the C library can: its allocator would keep it, and the peak grow with every block."""
    offload.release()
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def steady_memory() -> None:
    """For programs, not libraries: have glibc give every tensor of 4 MB or more back to the system as soon as it is freed.

    It does so from 32 MB on in any case; below, it keeps pieces, and peaks vary by tens of MB from run to run. Takes about 5 % more time on
    models whose tensors are that small. Holds for the whole process and cannot be undone.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 << 20)


M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""


def _libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _set_modes(training: dict[nn.Module, bool]) -> None:
    for module, was in training.items():
        module.training = was


def _changes(block: Block, original: nn.Module) -> dict[str, Tensor]:
    before = original.state_dict()
    after = block.module.state_dict()
    changed = {f"{block.name}.{key}": value for key, value in after.items() if not torch.equal(value, before[key].to(value.device))}
    for name, value in changed.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NonFiniteError(f"{name} became NaN or infinity; nothing was changed")
    return changed | {EXTRA + key: value for key, value in block.extras.items()}


def _load_into(block: Block, changed: dict[str, Tensor]) -> None:
    state = block.module.state_dict()
    for name, value in changed.items():
        if not name.startswith(EXTRA):
            state[name.removeprefix(f"{block.name}.")].copy_(value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _commit(
    model: nn.Module, run: _Run, blocks: int, outside: Callable[[], Iterator[tuple[str, Tensor]]] | None, agreed: Callable[[], object]
) -> None:
    """Copy all finished tensors into the model. What is overwritten is first written to disk, and put back if anything raises.

    `agreed` is called when all is copied: it raises if another rank could not.
    """
    journal: list[Path] = []
    untied: list[tuple[nn.Module, str, nn.Parameter]] = []
    config = getattr(model, "config", None)
    was_tied = getattr(config, "tie_word_embeddings", None)

    def changes() -> Iterator[dict[str, Tensor]]:
        for index in range(blocks):
            yield {k: v for k, v in run.read(index)[0].items() if not k.startswith(EXTRA)}
        if outside is not None:
            for name, value in outside():
                yield {name: value}

    def target(name: str) -> Tensor:
        owner, key = _owner(model, name)
        value = getattr(owner, key)
        if not isinstance(value, Tensor):
            raise ModelError(f"{name} is not a tensor of the model")
        return value.detach()

    try:
        for number, tensors in enumerate(changes()):
            if not tensors:
                continue
            for name in tensors:
                _untie(model, name, untied)
            path = run.folder / f"journal-{number:05d}.safetensors"
            run.save(path, {name: target(name) for name in tensors})
            journal.append(path)
            for name, value in tensors.items():
                target(name).copy_(value)
            offload.release()
        agreed()
    except BaseException:
        for path in journal:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    target(name).copy_(file.get_tensor(name))
        for owner, key, parameter in reversed(untied):
            setattr(owner, key, parameter)
        if untied:
            config.tie_word_embeddings = was_tied  # type: ignore[union-attr]
        raise
    finally:
        for path in journal:
            path.unlink(missing_ok=True)
    if untied and config is not None:
        config.tie_word_embeddings = False


def _untie(model: nn.Module, name: str, untied: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Give a parameter that another module holds too a storage of its own."""
    owner, key = _owner(model, name)
    parameter = owner._parameters.get(key)
    holders = [m for m in model.modules() if any(p is parameter for p in m._parameters.values())]
    if parameter is not None and len(holders) > 1:
        untied.append((owner, key, parameter))
        setattr(owner, key, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
