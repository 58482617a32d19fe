"""Options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or `default`: the embedded model.")]

Text = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="FILE", help="Text to learn from: .txt, .jsonl, .parquet, or `default`: Python's library, the part the embedded model never saw."
    ),
]  # fmt: skip
NeededText = Annotated[
    str, typer.Option("--text", metavar="FILE", help="Text: .txt, .jsonl, .parquet, or `default`: Python's library, held out.")
]
Field = Annotated[str, typer.Option("--field", help="Name of the text in each JSON object, or of the parquet column.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Number of token windows that are drawn from the text.")]
Length = Annotated[
    int | None, typer.Option("--length", min=2, help="Tokens in a window. Default: 512, or the model's context if that is shorter.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides every draw.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only estimate time, memory and disk; check everything; write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped; it ends with the same bytes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists, and forget an unfinished run.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Only for models whose author you trust.")
]
AllowUncovered = Annotated[
    bool, typer.Option("--allow-uncovered", help="Go on though some weights inside blocks belong to no site; they stay as they are.")
]

Checkpoint = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the new model.")]
Format = Annotated[
    Literal["auto", "compressed-tensors", "dense"],
    typer.Option("--format", help="How the model is written; `auto` is compressed-tensors for quantized models, dense for others."),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", metavar="FILE", help="Text to measure the damage on. Default: a tenth of --text, which is then not learned from."),
]  # fmt: skip
NoEvaluate = Annotated[bool, typer.Option("--no-evaluate", help="Do not measure the model before and after.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A plan, as `whatmatters plan` writes it.")]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", help="Inputs that share a scale; -1: one scale per output channel. Default: 128, or what the plan was made for."),
]  # fmt: skip
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Codes with zero points instead of codes signed around zero.")]
Levels = Annotated[str, typer.Option("--levels", help="Bit widths that may be used, such as 2,3,4,8; 16 leaves a site as it is.")]
Count = Annotated[
    Literal["stored", "codes"],
    typer.Option("--count", help="What the average counts: `stored`: all bytes on disk, scales included; `codes`: the papers' bits a weight."),
]  # fmt: skip


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of a list such as "2,3,4,8"; a usage error if it is none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers such as 2,3,4,8", param_hint=option) from None


def exactly_one(**given: object) -> str:
    """The name of the one option that was given; a usage error unless it is exactly one."""
    present = [name for name, value in given.items() if value is not None]
    names = " or ".join("--" + name.replace("_", "-") for name in given)
    if len(present) != 1:
        told = "none of them was given" if not present else "more than one was given"
        raise typer.BadParameter(f"{told}; expected exactly one of them", param_hint=names)
    return present[0]
