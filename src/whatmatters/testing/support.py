"""What works on a family of models, found out by doing it: from scores to a checkpoint that a stock loader of transformers reads.

The table of docs/guide/families.md is made of these records by scripts/family_page.py, and a test holds it to them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from whatmatters.core.allocation import bits
from whatmatters.core.checkpoint import check_savable, save
from whatmatters.core.data import Calibration, call_model
from whatmatters.core.errors import DataError, FormatError, ModelError
from whatmatters.core.plans import Plan
from whatmatters.core.report import Report
from whatmatters.core.sites import Structure, structure
from whatmatters.prune.wanda import wanda
from whatmatters.quantize.gptq import gptq
from whatmatters.quantize.rsq import rsq
from whatmatters.quantize.rtn import rtn
from whatmatters.score.activation import activation
from whatmatters.score.gradient import gradient
from whatmatters.testing.families import FAMILIES, build, calibration

__all__ = ["HEAD", "Run", "Support", "demonstrate", "outputs", "row"]

AVERAGE, LEVELS, GROUP = 3.5, (2, 3, 4, 8), 8


@dataclass(frozen=True)
class Run:
    """One action on a model, saved and read back.

    Attributes:
        report: what the action reports.
        format: how it was saved: "compressed-tensors", "dense", or "none" for what has no checkpoint.
        refusal: why it was not saved as compressed-tensors (or not at all), in our error's words; empty if it was.
        path: the checkpoint.
        changed: largest change of the outputs by the action, relative to the largest output.
        difference: largest difference of the outputs after reading it back, on the same scale.
    """

    report: Report
    format: str
    refusal: str
    path: Path
    changed: float
    difference: float


@dataclass(frozen=True)
class Support:
    """What was done with a family.

    Attributes:
        family: its name in the table of families.
        model: its class.
        found: blocks, sites and ties.
        plan: bits by site, made of scores by site.
        runs: quantizing by the plan with "rtn" and "gptq", pruning with "wanda".
        rsq: "rotated", "rotate=None" or "refused", with norm gains that are not all the same.
        loss: whether scores that need the loss of the next token work.
    """

    family: str
    model: str
    found: Structure
    plan: Plan
    runs: dict[str, Run]
    rsq: str
    loss: bool


def demonstrate(family: str, folder: Path) -> Support:
    """Score, plan, quantize, prune, save and read back the tiny model of a family.

    It begins, as a user does, with what a stock loader read. Samples are padded where they may be.

    Args:
        family: its name in the table of families.
        folder: an empty folder for checkpoints.

    Returns:
        The record; nothing in it is judged.

    Example:
        >>> import tempfile
        >>> demonstrate("llama", Path(tempfile.mkdtemp())).runs["gptq"].difference
        0.0
    """
    model, data = build(family), calibration(family, padded=True)
    if FAMILIES[family].loader is not None:
        save(model, None, folder / "original")
        model = _read(family, folder / "original")
    found = structure(model)
    plan = bits(activation(model, data, by="site", structure=found), AVERAGE, LEVELS, count="codes")
    levels = {name: int(level) for name, level in plan.values.items()}
    runs = {}
    for name in ("rtn", "gptq", "wanda"):
        changed = copy.deepcopy(model)
        if name == "wanda":
            report = wanda(changed, data, allow_uncovered=True)
        else:
            quantize = rtn if name == "rtn" else gptq
            report = quantize(changed, data, bits=plan, group_size=GROUP, allow_uncovered=True)
        runs[name] = _saved(family, folder / name, model, changed, report, {} if name == "wanda" else levels, data)
    return Support(family, type(model).__name__, found, plan, runs, _rsq(family, data), _has_loss(model, data))


def _read(family: str, folder: Path) -> nn.Module:
    loader = getattr(transformers, FAMILIES[family].loader or "")
    model: nn.Module = loader.from_pretrained(folder, use_safetensors=True)
    return model.eval()


def _saved(
    family: str, folder: Path, before: nn.Module, model: nn.Module, report: Report, levels: Mapping[str, int], data: Calibration
) -> Run:
    """Save in the format that holds the model, the packed one if it can, and read it back."""
    reference, expected = outputs(before, data), outputs(model, data)
    changed = float((expected - reference).abs().max() / expected.abs().max())
    refusal = ""
    try:
        check_savable(model, levels, group_size=GROUP)
    except FormatError as error:
        refusal = str(error)
    if FAMILIES[family].loader is None:
        return Run(report, "none", refusal, folder, changed, 0.0)
    saved = save(model, None, folder, format="dense" if refusal else "auto")
    again = outputs(_read(family, folder), data)
    return Run(report, saved.format, refusal, folder, changed, float((again - expected).abs().max() / expected.abs().max()))


def outputs(model: nn.Module, data: Calibration) -> Tensor:
    """What a model gives for the data: logits, or hidden states where it has no head."""
    with torch.no_grad():
        output = call_model(model, data.inputs, data.valid)
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result


def _has_loss(model: nn.Module, data: Calibration) -> bool:
    try:
        gradient(model, data)
    except (ModelError, DataError):
        return False
    return True


def _rsq(family: str, data: Calibration) -> str:
    for rotate, told in (("hadamard", "rotated"), (None, "rotate=None")):
        model = build(family)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        try:
            rsq(model, data, rotate=rotate, group_size=GROUP, allow_uncovered=True)
        except ModelError:
            continue
        return told
    return "refused"


HEAD = (
    "family", "model", "sites in a block", "tied", "in no site", "quantized", "pruned", "outputs after reload", "read by",
    "RSQ", "loss-based scores",
)  # fmt: skip


def row(support: Support) -> tuple[str, ...]:
    """A row of the table in the guide."""
    family, found = FAMILIES[support.family], support.found
    block = found.blocks[-1]
    tied = [[name.removeprefix(f"{block}.") for name in group] for group in found.ties if group[0].startswith(f"{block}.")]
    groups = [_stack(group) or " + ".join(name.rpartition(".")[2] for name in group) for group in tied]
    uncovered = [name.removeprefix(f"{block}.") for name in found.uncovered if name.startswith(f"{block}.")]
    difference = max(run.difference for run in support.runs.values())
    reload = "no checkpoint" if family.loader is None else "the same bits" if difference == 0 else f"within {difference:.0e}"
    return (
        support.family, support.model, str(len(found.in_block(block))), ", ".join(groups) or "none", ", ".join(uncovered) or "none",
        support.runs["gptq"].format, support.runs["wanda"].format, reload, family.loader or "none", support.rsq,
        "yes" if support.loss else "refused",
    )  # fmt: skip


def _stack(group: list[str]) -> str:
    """Slices of one parameter in few words."""
    return f"{len(group)} x {group[0].partition('[')[0].rpartition('.')[2]}" if group[0].endswith("]") else ""
