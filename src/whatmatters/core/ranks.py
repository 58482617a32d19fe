"""Ranks: processes of one torchrun share the calibration work, and end with the bits of a single process.

Micro-batch i belongs to rank i modulo the number of ranks: that rank alone holds its activations and runs it through the blocks. What a
micro-batch adds to a statistic (a product in float32) is sent to all ranks round by round, and every rank adds the contributions of a
round in the order of the micro-batches. So the additions are those of one process, one by one, whatever the number of ranks; memory is
that of one contribution more. An all-reduce of partial sums would send less and give other bits with every number of ranks.

All messages begin with a header in JSON that also carries a failure: a raise on one rank raises `RankError` on the others at their next
message. Ranks talk through a gloo group of their own, beside whatever group the user's program has.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from whatmatters.core.errors import InputError, RankError

__all__ = ["Ranks", "current", "join", "launched"]

Take = Callable[[Any, Iterator[Tensor]], None]
"""Is given what came with one contribution, JSON-able, and its tensors one by one, on the CPU if another rank sent them."""


def launched() -> tuple[int, int] | None:
    """(rank, number of ranks) where torchrun, or whatever sets the same variables, started more than one process; else None.

    Example:
        >>> launched() is None
        True
    """
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and size.isdecimal() and int(size) > 1 and "MASTER_ADDR" in os.environ):
        return None
    return int(rank), int(size)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in place."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that share the work, as one of them sees them.

    Attributes:
        rank: the number of this one, from 0; rank 0 writes run folders and outputs.
        size: how many there are.
        group: their gloo group; None where there is a single one.
    """

    rank: int
    size: int
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives here, JSON-able, in the order of the ranks.

        Raises:
            RankError: a rank failed or is gone; the message names it.
        """
        return self._exchange({"value": value})

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks, which wait at their next message, that this one has failed."""
        with contextlib.suppress(RankError):
            self._exchange({"error": f"{type(error).__name__}: {error}"})

    def agree(self, what: str, value: Mapping[str, Any]) -> None:
        """Raise RankError, naming the entry, unless every rank gives the same mapping."""
        for rank, theirs in enumerate(told := self.gather(dict(value))):
            for key in told[0]:
                if theirs.get(key) != told[0][key]:
                    raise RankError(
                        f"{what}: {key} is {str(told[0][key])[:80]} on rank 0 and {str(theirs.get(key))[:80]} on rank {rank}; "
                        "every rank needs the same inputs, software, kind of processor and number of threads"
                    )

    def broadcast(self, source: int, note: Any = None, tensors: Sequence[Tensor] = ()) -> tuple[Any, list[Tensor]]:
        """What one rank gives, on every rank; the others' arguments are not looked at."""
        own = list(tensors) if self.rank == source else []
        told = self.gather([note, _kinds(own)] if self.rank == source else None)[source]
        return told[0], list(self._stream(source, told[1], own))

    def in_order(self, count: int, work: Callable[[int], tuple[Any, list[Tensor]]], take: Take) -> None:
        """Do `count` pieces of work, each on one rank, and `take` what they give, in their order, on every rank.

        Args:
            count: how many pieces there are.
            work: does piece i; gives something JSON-able, and tensors, which it gives away.
            take: see `Take`. It must not talk to other ranks.
        """
        for start in range(0, count, self.size):
            mine = start + self.rank
            note, own = work(mine) if mine < count else (None, [])
            fault: BaseException | None = None
            for source, (theirs, kinds) in enumerate(self.gather([note, _kinds(own)])[: count - start]):
                stream = self._stream(source, kinds, own)
                if fault is None:
                    try:
                        take(theirs, stream)
                    except RankError:
                        raise
                    except BaseException as error:
                        fault = error
                for _ in stream:  # the other ranks wait until all of it has gone round
                    pass
            if fault is not None:
                raise fault

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Tell the other ranks if what runs inside the `with` raises, unless the fault came from them."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            if not getattr(error, "ranks_told", False):
                error.ranks_told = True  # type: ignore[attr-defined]
                self.fail(error)
            raise

    def _exchange(self, message: dict[str, Any]) -> list[Any]:
        sent = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _talking():
            dist.all_gather(sizes, torch.tensor([len(sent)]), group=self.group)
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(sent)] = sent
            received = [torch.zeros_like(padded) for _ in sizes]
            dist.all_gather(received, padded, group=self.group)
        messages = [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(received, sizes, strict=True)]
        failed = [f"rank {rank} failed: {told['error']}" for rank, told in enumerate(messages) if "error" in told]
        if failed:
            raise RankError("; ".join(failed))
        return [told["value"] for told in messages]

    def _stream(self, source: int, kinds: list[Any], own: list[Tensor]) -> Iterator[Tensor]:
        """The tensors of one rank, on every rank; those of this rank's own are let go one by one."""
        for dtype, shape in kinds:
            if self.rank == source:
                tensor = own.pop(0)
                carried = tensor.cpu().contiguous()
            else:
                tensor = carried = torch.empty(shape, dtype=getattr(torch, dtype))
            if carried.numel():
                with _talking():
                    dist.broadcast(_bytes(carried), source, group=self.group)
            del carried
            yield tensor


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    return [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises when a process is gone or does not answer
        raise RankError(f"another rank is gone or does not answer: {str(error).splitlines()[0]}") from error


_current: ContextVar[Ranks | None] = ContextVar("ranks", default=None)


def current() -> Ranks | None:
    """The ranks that share the work here; None for a process that works alone."""
    return _current.get()


@contextlib.contextmanager
def join(*, timeout: float | int = 3600.0) -> Iterator[Ranks]:
    """Share the calibration work of what runs inside the `with` among the processes that torchrun started.

    Every rank runs the same program on the same model and data, and each ends with the same weights: save on the first alone. A process
    that was started by itself works alone as always, so that one program serves both.

    Args:
        timeout: seconds that a rank waits for the others, above 0; longer than anything that one of them does alone.

    Yields:
        This rank.

    Raises:
        InputError: the timeout is not positive.
        RankError: another rank failed, is gone, or has other inputs.

    Example:
        >>> with join() as rank:
        ...     rank.first, rank.size
        (True, 1)
    """
    if not timeout > 0:
        raise InputError(f"timeout {timeout}; expected seconds above 0")
    begun = dist.is_available() and not dist.is_initialized() and launched() is not None
    if _current.get() is not None or not (begun or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)):
        yield _current.get() or Ranks(0, 1)
        return
    patience = timedelta(seconds=timeout)
    with _talking():
        if begun:
            dist.init_process_group("gloo", timeout=patience)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=patience))
    token = _current.set(ranks)
    try:
        with ranks.together():
            yield ranks
            ranks.gather("done")
    finally:
        _current.reset(token)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(None if begun else ranks.group)
