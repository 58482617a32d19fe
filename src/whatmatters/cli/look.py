"""`scan` and `audit`: what a model is made of, and which importance score tells the truth about it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from whatmatters.cli import inputs, options
from whatmatters.cli.console import Output, table
from whatmatters.cli.estimates import Work, tell_estimate

if TYPE_CHECKING:
    from whatmatters.core.data import Calibration
    from whatmatters.score.audit import Audit


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
        following = [
            f"whatmatters audit {model} --text FILE",
            f"whatmatters quantize {model} --method rsq --bits 3 --text FILE --output DIR",
        ]
        out.finish(found.to_json() | {"model": model}, following=following)


def audit(
    model: options.Model,
    text: options.NeededText,
    judge: options.Judge = None,
    scorers: Annotated[
        str | None, typer.Option("--scorers", help="Names of layer scorers, separated by commas. Default: all that this model allows.")
    ] = None,
    by: Annotated[
        Literal["site", "block"], typer.Option("--by", help="What is damaged alone: sites that read the same input, or whole blocks.")
    ] = "site",
    damage: Annotated[
        Literal["quantize", "skip"], typer.Option("--damage", help="Round to --bits, or leave out (only blocks).")
    ] = "quantize",
    bits: Annotated[int, typer.Option("--bits", help="Width that damaged weights are rounded to.")] = 2,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Inputs that share a scale. Default: 128 where that divides.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Points of the damage curves.")] = 4,
    orders: Annotated[int, typer.Option("--orders", min=1, help="Random orders to compare with.")] = 4,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for audit.json, audit.svg and the scores, to make plans from."),
    ] = None,
    field: options.Field = "text",
    samples: options.Samples = 128,
    length: options.Length = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Find out which importance score tells the truth about this model: every layer scorer against measured ablation damage."""
    from whatmatters.core.catalog import get_scorer
    from whatmatters.core.catalog import scorers as known_scorers

    names = None if scorers is None else scorers.split(",")
    with Output(json) as out:
        entries = known_scorers("layer", "ahead") if names is None else [get_scorer(name, "layer", "ahead") for name in names]
        if output is not None:
            from whatmatters.core.checkpoint import check_output

            check_output(output, overwrite)
        inputs.check_text(text, field)
        inputs.check_text(judge, field)
        shapes, found = inputs.load_shapes(model, trust_remote_code)
        if dry_run:
            window = inputs.window_length(shapes, length)
            # Damage is measured once for each unit, and at each step of a curve for each scorer, random, reversed and measured order.
            passes = len(found.groups() if by == "site" else found.blocks) + steps * (len(entries) + orders + 2)
            tokens = inputs.JUDGED_WINDOWS * window * passes + samples * window * sum(entry.needs_text for entry in entries)
            gradients = any(entry.needs_gradients for entry in entries)
            tell_estimate(out, shapes, found, Work(tokens=tokens, length=window, samples=samples, models=2 if gradients else 1))
            return
        subject = inputs.load_subject(model, out, trust_remote_code=trust_remote_code)
        texts = inputs.read_texts(text, judge=judge, field=field)
        calibration = inputs.calibration_of(subject, texts.learn, samples=samples, length=length, seed=seed)
        judged = inputs.judged_windows(subject, texts.judge, length=length, limit=inputs.JUDGED_WINDOWS)

        from whatmatters.score.audit import audit

        result = audit(
            subject.model, calibration, judged, scorers=names, by=by, damage=damage, bits=bits, group_size=group_size, steps=steps,
            orders=orders, seed=seed, structure=subject.structure, progress=out.progress(),
        )  # fmt: skip
        out.say(result.verdict)
        out.say()
        out.say(_agreements(result))
        out.say()
        out.say(_curves(result))
        for name, reason in result.skipped.items():
            out.note(f"left out: {name}: {reason}")
        best = result.best or next((row.scorer for row in result.rows if not row.control), result.rows[0].scorer)
        following = [f"whatmatters score {model} --scorer {best} --text {text} -o scores.safetensors"]
        if output is not None:
            following = [f"whatmatters plan {output / 'scores' / f'{best}.safetensors'} --average-bits 3.5 -o plan.json"]
            _write(result, subject, (calibration, judged), following, output, overwrite)
            out.say(f"written: {output / 'report.html'}")
        out.finish(result.to_json() | {"model": model, "output": None if output is None else str(output)}, following=following)


def _agreements(result: "Audit") -> str:
    """How each scorer did, as a table."""
    percent = f"{100 * result.settings['confidence']:g} %"
    rows = []
    for row in result.rows:
        interval = "" if row.interval is None else f"{row.interval[0]:+.2f} to {row.interval[1]:+.2f}"
        saved = "" if row.saved is None else f"{row.saved:+.0%}"
        chance = "" if row.p_adjusted is None else f"{row.p_adjusted:.2g}"
        name = f"{row.scorer} (control)" if row.control else row.scorer
        rows.append((name, f"{row.spearman:+.2f}", interval, chance, saved, f"{row.seconds:.1f}"))
    return table(("scorer", "rank correlation", f"{percent} interval", "p, adjusted", "loss avoided", "seconds"), rows)


def _curves(result: "Audit") -> str:
    """The damage curves: increase of the loss while more and more of the weights are damaged, least important first."""
    rows = []
    named = [("random orders", result.curve("random"))] + [(c.label, c) for c in result.curves if c.kind != "random"]
    for label, curve in named:
        points = "  ".join(f"{share:.0%}: {rise:+.3f}" for share, rise in zip(curve.shares, curve.increases, strict=True) if share)
        rows.append((label, points))
    return table(("order", "share of the weights damaged: increase of the loss, nats a token"), rows)


def _write(
    result: "Audit",
    subject: inputs.Subject,
    texts: tuple["Calibration", "Calibration"],
    following: list[str],
    output: Path,
    overwrite: bool,
) -> None:
    """The folder of an audit, whole or not at all: numbers, scores that plans can be made of, and the page."""
    from whatmatters.core.checkpoint import atomic_folder
    from whatmatters.pages.build import audit_results, text_part
    from whatmatters.pages.report import render
    from whatmatters.pages.results import Command

    used = [text_part(what, text.source, text, text.digest) for what, text in zip(("scores", "damage"), texts, strict=True)]
    commands = [Command("make a plan of the best score", command) for command in following]
    page = audit_results(subject.name, subject.model, subject.structure, result, used, commands)
    with atomic_folder(output, overwrite=overwrite) as folder:
        page.save(folder)
        render(folder)
        result.save(folder / "audit.json")
        result.plot().savefig(folder / "audit.svg", metadata={"Date": None})
        for name, scores in result.scores.items():
            scores.save(folder / "scores" / f"{name}.safetensors")
