"""What `--dry-run` tells: time, memory and disk, from the model's shapes and a quick measurement of this machine. Nothing is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whatmatters.cli.console import Output, spoken_duration, spoken_size

if TYPE_CHECKING:
    from torch import nn

    from whatmatters.core.sites import Structure

BACKWARD = 3
"""A pass with gradients takes about three times as long as one without."""


@dataclass(frozen=True)
class Work:
    """What a command is about to do.

    Attributes:
        tokens: tokens that go through the model in plain passes.
        gradients: whether these passes compute gradients.
        solving: "rtn" or "hessian" where the weights of all sites are rounded or solved for; None: nowhere.
        samples: calibration windows of the solving.
        length: tokens in a window.
        models: how many models are in memory.
        output: where something is written, if anything is.
        output_bytes: how much.
    """

    tokens: int = 0
    gradients: bool = False
    solving: str | None = None
    samples: int = 128
    length: int = 512
    models: int = 1
    output: Path | None = None
    output_bytes: int = 0


def tell_estimate(out: Output, shapes: "nn.Module", found: "Structure", work: Work, planned: Mapping[str, Any] | None = None) -> None:
    """Print the estimate; the last thing a dry run does."""
    import psutil

    from whatmatters.core.scan import needs

    needed = needs(shapes, found, samples=work.samples, length=work.length)
    weights = sum(parameter.numel() for parameter in shapes.parameters())
    seconds = 2 * weights * work.tokens / needed.rates["flops_model"] * (BACKWARD if work.gradients else 1)
    disk = work.output_bytes
    if work.solving is not None:
        seconds += needed.seconds[work.solving]
        disk += needed.disk_bytes
    memory = needed.peak_bytes + (work.models - 1) * needed.model_bytes + (needed.model_bytes if work.gradients else 0)
    free_memory = psutil.virtual_memory().available
    estimate = {"seconds": seconds, "memory_bytes": memory, "disk_bytes": disk, "free_memory_bytes": free_memory}
    out.say(f"time: about {spoken_duration(seconds)}")
    out.say(f"memory: at most {spoken_size(memory)}, free {spoken_size(free_memory)}")
    if work.output is not None:
        free_disk = psutil.disk_usage(str(_existing(work.output))).free
        estimate["free_disk_bytes"] = free_disk
        out.say(f"disk: at most {spoken_size(disk)}, free {spoken_size(free_disk)}")
        if disk > free_disk:
            out.note("the disk does not hold that: choose another output folder")
    if memory > free_memory:
        out.note("the free memory may not suffice")
    out.say("dry run: nothing was written")
    out.finish({"dry_run": True, "estimate": estimate, "planned": dict(planned or {})})


def _existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def checkpoint_bytes(shapes: "nn.Module", found: "Structure", levels: Mapping[str, int], group_size: int, symmetric: bool) -> int:
    """Bytes of the checkpoint that comes of a quantization: exact for the sites, 16 bits for the rest."""
    from whatmatters.core.formats import stored_bits

    parameters = {id(p): p.numel() for p in shapes.parameters()}
    sites = sum(site.size for site in found.sites)
    stored = sum(stored_bits(site.shape, levels[site.name], group_size=group_size, symmetric=symmetric) for site in found.sites)
    return stored // 8 + 2 * (sum(parameters.values()) - sites)
