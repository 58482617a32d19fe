"""The command line: one command for each thing a user does, in the order in which they do it.

Exit codes: 0 done, 1 failed (the message says what to do), 2 wrong usage. Nothing heavy is imported until a command runs.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from whatmatters.cli import catalog, compress, judge, look, options, plans, select
from whatmatters.cli.console import LINE, Output, error_text, launched_rank
from whatmatters.core.errors import WhatMattersError

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """The group of all commands: the one place where errors become messages and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the line, so that a stopped run can say how it is continued; `--debug` may stand anywhere on it."""
        rest = [argument for argument in args if argument != "--debug"]
        LINE.set(tuple(rest))
        return super().parse_args(ctx, ["--debug", *rest] if len(rest) < len(args) else rest)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what goes wrong is one message on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except WhatMattersError as error:
            self._failed(ctx, f"error: {error_text(error)}")
        except KeyboardInterrupt:
            self._failed(ctx, "stopped", trace=False)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise  # wrong usage, a wanted end, or a reader that has gone
        except OSError as error:
            self._failed(ctx, f"error: {error}")  # a full disk, mostly
        except Exception as error:
            self._failed(ctx, f"error: unexpected {type(error).__name__}: {error}\n(--debug shows where; please report it)")

    @staticmethod
    def _failed(ctx: Any, message: str, *, trace: bool = True) -> None:
        if trace and ctx.params.get("debug"):
            traceback.print_exc(file=sys.stderr)
        if not launched_rank():  # the first rank is told what befell the others
            print(message, file=sys.stderr)
        raise typer.Exit(1)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Find out what matters in a language model, prove it, and make a smaller model because of it.",
)


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=lambda value: _version(value))
    ] = False,
) -> None:
    """Options of every command."""


def _version(wanted: bool) -> bool:
    if wanted:
        import whatmatters

        print(f"whatmatters {whatmatters.__version__}")
        raise typer.Exit
    return wanted


app.command("scan")(look.scan)
app.command("audit")(look.audit)
app.command("score", cls=plans.ScoreCommand)(plans.score)
app.command("plan")(plans.plan)
app.command("quantize", cls=compress.QuantizeCommand)(compress.quantize)
app.command("prune", cls=compress.PruneCommand)(compress.prune)
app.command("evaluate")(judge.evaluate)
app.add_typer(select.app, name="select")


@app.command("demo")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for report.html, the best plan and its checkpoint.")
    ] = Path("demo-run"),
    seed: options.Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; the numbers then mean little.")] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """The whole job on the embedded model in minutes: audit, plans, quantized checkpoint, report.html."""
    from whatmatters.cli.demo import run_demo
    from whatmatters.core.checkpoint import check_output

    with Output(json) as out:
        check_output(output, overwrite)
        results = run_demo(output, seed=seed, quick=quick, overwrite=overwrite, progress=out.progress(), console=out.console())
        out.say(f"written: {output / 'report.html'}")
        out.finish(results, following=["whatmatters audit MODEL --text FILE"])


app.command("methods")(catalog.list_methods)
app.command("reproduce")(catalog.reproduce)
app.command("report")(judge.report)


def main() -> None:
    """Run the command line and exit with its code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries; downloads keep theirs
    app()
