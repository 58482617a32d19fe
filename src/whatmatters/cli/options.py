"""Options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or `default`: the embedded model.")]

TEXT, RUN = "Text", "Run"
"""Headings of the help."""


def _option(panel: str, name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, **more)


KINDS = "a .txt, .jsonl or .parquet file, or `default`: Python's library, the part the embedded model never saw."
Text = Annotated[str | None, _option(TEXT, "--text", f"Text to learn from: {KINDS}", metavar="FILE")]
NeededText = Annotated[str, _option(TEXT, "--text", f"Text: {KINDS}", metavar="FILE")]
Field = Annotated[str, _option(TEXT, "--field", "Name of the text in each JSON object, or of the parquet column.")]
Samples = Annotated[int, _option(TEXT, "--samples", "Number of token windows that are drawn from the text.", min=1)]
Length = Annotated[int | None, _option(TEXT, "--length", "Tokens in a window. Default: 512, or the model's context if shorter.", min=2)]
Judge = Annotated[
    str | None,
    _option(TEXT, "--judge", "Text to measure damage on. Default: a tenth of --text, which is then not learned from.", metavar="FILE"),
]
NoEvaluate = Annotated[bool, _option(TEXT, "--no-evaluate", "Do not measure the model before and after.")]

Seed = Annotated[int, _option(RUN, "--seed", "Decides every draw.", min=0)]
Json = Annotated[bool, _option(RUN, "--json", "Print one JSON document on stdout and nothing else there.")]
DryRun = Annotated[bool, _option(RUN, "--dry-run", "Only estimate time, memory and disk; check everything; write nothing.")]
Resume = Annotated[bool, _option(RUN, "--resume", "Continue a run that was stopped; it ends with the same bytes.")]
Overwrite = Annotated[bool, _option(RUN, "--overwrite", "Replace the output if it exists, and forget an unfinished run.")]
TrustRemoteCode = Annotated[
    bool, _option(RUN, "--trust-remote-code", "Run code that comes with the model. Only for models whose author you trust.")
]
AllowUncovered = Annotated[
    bool, _option(RUN, "--allow-uncovered", "Go on though some weights inside blocks belong to no site; they stay as they are.")
]

Checkpoint = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the new model.")]
Format = Annotated[
    Literal["auto", "compressed-tensors", "dense"],
    typer.Option("--format", help="How the model is written; `auto` is compressed-tensors for quantized models, dense for others."),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A plan, as `whatmatters plan` writes it.")]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", help="Inputs that share a scale; -1: one scale per output channel. Default: 128, or the plan's."),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Codes with zero points instead of codes signed around zero.")]
Levels = Annotated[str, typer.Option("--levels", help="Bit widths that may be used, such as 2,3,4,8; 16 leaves a site as it is.")]
Count = Annotated[
    Literal["stored", "codes"],
    typer.Option("--count", help="What the average counts: `stored`: all on disk, with scales; `codes`: the papers' bits a weight."),
]


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
