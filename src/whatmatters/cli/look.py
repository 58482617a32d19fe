"""`scan` and `audit`: what a model is made of, and which importance score tells the truth about it."""

from typing import Annotated

import typer

from whatmatters.cli import inputs, options
from whatmatters.cli.console import Output, table


def scan(
    model: options.Model,
    levels: options.Levels = "2,3,4,8",
    group_size: Annotated[int, typer.Option("--group-size", help="Inputs that share a scale; -1: one scale per output channel.")] = 128,
    asymmetric: options.Asymmetric = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration windows, for the estimate of a later quantization.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a window, for the same estimate.")] = inputs.LENGTH,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Look at a model's weights, without any text: sites, sizes, tied groups, outliers, rounding error for each bit width.

    The weights are streamed from the files: the whole model is never in memory.
    """
    widths = options.whole_numbers(levels, "--levels")
    with Output(json) as out:
        from whatmatters.core.scan import scan

        with inputs.quiet_transformers():
            found = scan(
                inputs.source_of(model), levels=widths, group_size=group_size, symmetric=not asymmetric, samples=samples, length=length,
                trust_remote_code=trust_remote_code, progress=out.progress(),
            )  # fmt: skip
        quantized = [level for level in found.levels if level < 16]
        rows = [
            (row["site"], "x".join(map(str, row["shape"])), row["max_over_rms"], row["kurtosis"], *(row["rtn_error"][b] for b in quantized))
            for row in found.rows
        ]
        out.say(table(("site", "shape", "max/rms", "kurtosis", *(f"error {b} bits" for b in quantized)), rows))
        out.say()
        out.say(found.summary())
        following = [f"whatmatters audit {model} --text FILE", f"whatmatters quantize {model} --method rsq --bits 3 --text FILE --output DIR"]
        out.finish(found.to_json() | {"model": model}, following=following)


def audit(model: options.Model, text: options.NeededText, json: options.Json = False) -> None:
    """Find out which importance score tells the truth about this model: every layer scorer against measured ablation damage."""
    with Output(json):
        pass
