"""`select`: choose samples or features."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from whatmatters.cli import options
from whatmatters.cli.console import Output, table

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Choose from what there is too much of: documents that look like a target.",
)

SHOWN = 10
"""Rows that could not be used which are told on the terminal; all are in selection.json or found by line."""


@app.command("dsir")
def dsir(
    raw: Annotated[
        list[Path], typer.Argument(metavar="RAW...", help="Files to choose from: .txt or .jsonl (also .gz, .zst), or .parquet.")
    ],
    target: Annotated[list[Path], typer.Option("--target", metavar="FILE", help="Text of the wanted kind; may be given several times.")],
    count: Annotated[int, typer.Option("--count", min=1, help="How many documents to choose.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the chosen documents.")],
    top_k: Annotated[bool, typer.Option("--top-k", help="The largest weights, without noise.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Above 1: more variety.")] = 1.0,
    length_normalize: Annotated[bool, typer.Option("--length-normalize", help="Rank by weight per token.")] = False,
    min_tokens: Annotated[int, typer.Option("--min-tokens", min=0, help="Shorter documents are not chosen.")] = 100,
    smoothing: Annotated[float, typer.Option("--smoothing", help="Added to the target's counts; 0.1 to 1 for a small target.")] = 0.0,
    ngrams: Annotated[int, typer.Option("--ngrams", min=1, help="Runs of 1 to this many words count.")] = 2,
    buckets: Annotated[int, typer.Option("--buckets", min=2, help="Buckets that they are hashed into.")] = 10_000,
    hash: Annotated[
        Literal["fast", "sha256"], typer.Option("--hash", help="`sha256` is that of data-selection; `fast` is several times faster.")
    ] = "sha256",
    separate: Annotated[bool, typer.Option("--separate-targets", help="Choose for each target file by itself.")] = False,
    field: options.Field = "text",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes; -1: one for each processor.")] = -1,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", help="Where the work is done; the answer is the same.")] = "local",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Folder a stopped run continues from. Default: OUTPUT.run.")
    ] = None,
    resume: options.Resume = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Choose the documents of a huge corpus that are distributed as a small target is (DSIR)."""
    import shutil
    import warnings

    from whatmatters.core.checkpoint import check_output
    from whatmatters.select.dsir import DSIR

    with Output(json) as out:
        check_output(output, overwrite)
        folder = run_dir or output.with_name(output.name + ".run")
        if overwrite and not resume and (folder / "run.json").exists():
            shutil.rmtree(folder)
        selector = DSIR(
            ngrams=ngrams, num_buckets=buckets, hash=hash, target_smoothing=smoothing, temperature=temperature,
            length_normalize=length_normalize, min_tokens=min_tokens, separate_targets=separate, field=field, n_jobs=jobs, engine=engine,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            progress = out.progress()
            try:
                selector.fit(raw=raw, target=target, run_dir=folder, resume=resume, progress=progress)
                chosen = selector.select(count, top_k=top_k, seed=seed, progress=progress)
            except KeyboardInterrupt:
                out.note(f"{folder} keeps what is done: the same command with --resume continues")
                raise
        selector.write(chosen, output, overwrite=overwrite)
        if run_dir is None:
            shutil.rmtree(folder)
        for warning in told:
            out.note(f"note: {warning.message}")
        problems = selector.problems_
        for problem in problems[:SHOWN]:
            out.note(f"{problem.file}, line {problem.line}: {problem.reason}")
        if len(problems) > SHOWN:
            out.note(f"... and more: {output / 'selection.json'}")
        found = chosen.to_json()
        out.say(
            table(
                ("rows", "eligible", "chosen", "tokens", "too short", "unread", "repaired", "known from target", "KL reduction"),
                [(
                    found["rows"], found["eligible"], found["count"], found["tokens"], found["too_short"], found["unread"],
                    found["repaired"], found["known"], chosen.kl_reduction,
                )],
            )
        )  # fmt: skip
        out.say(f"written: {output}")
        listed = [{"file": p.file, "line": p.line, "reason": p.reason} for p in problems]
        out.finish(found | {"output": str(output), "problems": listed})
