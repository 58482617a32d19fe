"""`evaluate` and `report`: how good a model is, how far it is from its original, and a run as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whatmatters.cli import inputs, options
from whatmatters.cli.console import Output
from whatmatters.core.progress import Progress

if TYPE_CHECKING:
    from whatmatters.core.data import Calibration
    from whatmatters.core.evaluate import Measurement


CHARACTERS = 3
"""A token has at least about this many characters: for estimates."""


def measured(subject: inputs.Subject, windows: "Calibration | None", progress: Progress | None) -> "Measurement | None":
    """What the model does on the windows; None without any."""
    from whatmatters.core.evaluate import evaluate

    return None if windows is None else evaluate(subject.model, windows, progress=progress)


def lasting(measurement: "Measurement | None") -> dict[str, float]:
    """The numbers that are written beside a checkpoint, in as many digits as mean something."""
    if measurement is None:
        return {}
    return {"perplexity": float(f"{measurement.perplexity:.6g}"), "loss": float(f"{measurement.loss:.6g}"), "tokens": measurement.tokens}


def damage(before: "Measurement | None", after: "Measurement | None", seed: int) -> dict[str, Any] | None:
    """How much worse the second is, with its interval over documents; None where one was not measured."""
    from whatmatters.core.evaluate import compare

    if before is None or after is None:
        return None
    difference = compare(before, after, seed=seed)
    return {
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "change_percent": difference.perplexity_change,
        "interval_percent": list(difference.perplexity_interval) if difference.units > 1 else None,
        "confidence": difference.confidence,
        "significant": difference.significant,
        "units": difference.units,
        "unit": difference.unit,
    }


def sentence(damage: Mapping[str, Any]) -> str:
    """The damage in one sentence."""
    interval = "no interval: one unit tells nothing about others"
    if damage["interval_percent"] is not None:
        low, high = damage["interval_percent"]
        interval = f"{low:+.2f} to {high:+.2f} %, {damage['confidence']:.0%} interval over {damage['units']} {damage['unit']}s"
    change = f"{damage['change_percent']:+.2f} %"
    return f"perplexity {damage['perplexity_before']:.6g} -> {damage['perplexity_after']:.6g}: {change} ({interval})"


def evaluate(
    model: options.Model,
    text: options.NeededText,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original: adds the difference, KL and agreement of first choices.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="Overlapping windows, each this many tokens after the one before: more context, slower."),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Judge this many windows. Default: the whole text.")] = None,
    length: options.Length = None,
    field: options.Field = "text",
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Perplexity of a model on a text, and how far it is from its original, with a confidence interval."""
    from whatmatters.core.evaluate import evaluate, paired_bootstrap

    with Output(json) as out:
        inputs.check_text(text, field)
        shapes, found = inputs.load_shapes(model, trust_remote_code)
        if against is not None:
            inputs.load_shapes(against, trust_remote_code)
        if dry_run:
            from whatmatters.cli.estimates import Work, tell_estimate

            models = 1 if against is None else 2
            characters = sum(map(len, inputs.read_documents(text, field)))
            window = inputs.window_length(shapes, length)
            tokens = min(characters // CHARACTERS, window * samples if samples is not None else characters)
            tell_estimate(out, shapes, found, Work(tokens=tokens * (2 * models - 1), models=models, length=window))
            return
        subject = inputs.load_subject(model, out, trust_remote_code=trust_remote_code)
        documents = inputs.read_documents(text, field)
        windows = inputs.judged_windows(subject, documents, length=length, limit=samples)
        progress = out.progress()
        result: dict[str, Any]
        if against is None:
            measurement = evaluate(subject.model, windows, stride=stride, progress=progress)
            result = {"model": model, **measurement.summary()}
        else:
            original = inputs.load_subject(against, out, trust_remote_code=trust_remote_code)
            first = evaluate(original.model, windows, stride=stride, progress=progress)
            measurement = evaluate(subject.model, windows, against=original.model, stride=stride, progress=progress)
            result = {"model": model, "against": against, **measurement.summary(), "original": first.summary()}
            result["damage"] = damage(first, measurement, seed)
            if measurement.divergence is not None:
                _, *around = paired_bootstrap(measurement.divergence, measurement.counts.astype(float), seed=seed)
                result["kl_interval"] = around if len(measurement.counts) > 1 else None
        out.say(
            f"perplexity {measurement.perplexity:.6g}, {measurement.loss:.4g} nats a token, first choice right {measurement.accuracy:.1%}"
        )
        out.say(f"judged: {measurement.tokens} tokens of {len(measurement.counts)} {measurement.unit}s")
        if against is not None:
            out.say(f"{against}: {sentence(result['damage'])}")
            interval = "" if result["kl_interval"] is None else " ({:.4g} to {:.4g})".format(*result["kl_interval"])
            out.say(f"KL from the original {measurement.kl:.4g} nats a token{interval}, same first choice {measurement.agreement:.1%}")
        following = [] if against is not None else [f"whatmatters audit {model} --text {text}"]
        out.finish(result, following=following)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A folder that `whatmatters demo` filled.")],
    json: options.Json = False,
) -> None:
    """Make the self-contained HTML report of a run."""
    from whatmatters.core.errors import FileError

    with Output(json) as out:
        if not run.is_dir():
            raise FileError(f"no folder {run}; expected one that a run has filled")
        from whatmatters.pages.report import render

        page = render(run)
        out.say(f"written: {page}")
        out.finish({"report": str(page)})
