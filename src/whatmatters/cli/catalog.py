"""`methods` and `reproduce`: what there is, and how its claims were checked."""

import importlib
import inspect
import json as json_module
import pkgutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whatmatters.cli import options
from whatmatters.cli.console import Output, table
from whatmatters.cli.settings import PLUMBING, option_name, settings_of
from whatmatters.core.catalog import Entry, methods, scorers
from whatmatters.core.errors import UnknownNameError


def list_methods(
    slug: Annotated[
        str | None, typer.Argument(metavar="[SLUG]", help="A method, baseline or scorer, to be told everything about it.")
    ] = None,
    job: Annotated[str | None, typer.Option("--job", help="Only those of one job: score, quantize, prune.")] = None,
    json: options.Json = False,
) -> None:
    """List methods, baselines and scorers; or tell everything about one."""
    with Output(json) as out:
        entries = [*methods(), *scorers()]
        jobs = sorted({entry.job for entry in entries})
        if job is not None and job not in jobs:
            raise UnknownNameError(f"no job named {job!r}; known: {', '.join(jobs)}")
        entries = [entry for entry in entries if job in (None, entry.job)]
        if slug is None:
            out.say(table(("job", "name", "kind", "unit", "paper", "what it does"), [_row(entry) for entry in entries]))
            out.finish({"methods": [_described(entry) for entry in entries]}, following=["whatmatters methods SLUG"])
            return
        found = [entry for entry in entries if slug in (entry.slug, entry.slug.replace("-", "_"))]
        if not found:
            raise UnknownNameError(f"no method named {slug!r}; known: {', '.join(entry.slug for entry in entries)}")
        for entry in found:
            out.say(_page(entry))
        following = [f"whatmatters reproduce {entry.slug}" for entry in found if entry.kind == "method"]
        out.finish({"methods": [{**_described(entry), "doc": inspect.getdoc(entry.function)} for entry in found]}, following=following)


def _row(entry: Entry) -> tuple[str, ...]:
    kind = entry.kind if entry.when is None else f"scorer, {entry.when}"
    return entry.job, entry.slug, kind, entry.unit, entry.paper or "", entry.summary


def _described(entry: Entry) -> dict[str, Any]:
    """An entry, JSON-able."""
    fields = ("slug", "kind", "job", "unit", "paper", "score", "allocation", "action", "when", "needs_text", "needs_gradients", "control")
    settings = [
        {"option": option_name(p), "default": None if p.default is p.empty else repr(p.default), "annotation": str(p.annotation)}
        for p in settings_of(entry).values()
    ]
    return {
        **{name: getattr(entry, name) for name in fields},
        "summary": entry.summary,
        "settings": settings,
        "evidence": evidence(entry.slug),
    }


def _page(entry: Entry) -> str:
    paper = f"arXiv {entry.paper}, https://arxiv.org/abs/{entry.paper}" if entry.paper else "none"
    settings = [
        (option_name(p), "" if p.default is p.empty else repr(p.default)) for p in settings_of(entry).values() if p.name not in PLUMBING
    ]
    parts = [
        f"{entry.slug} ({entry.kind}, job {entry.job}, unit {entry.unit})",
        f"paper: {paper}",
        "",
        inspect.getdoc(entry.function) or "",
        "",
        table(("setting", "default"), settings),
    ]
    claims = (evidence(entry.slug) or {}).get("claims", [])
    if claims:
        rows = [(claim.get("verdict", ""), claim.get("tier", ""), claim.get("claim", "")) for claim in claims]
        parts += ["", table(("verdict", "tier", "claim"), rows)]
    elif entry.kind == "method":
        parts += ["", f"no evidence yet: whatmatters reproduce {entry.slug}"]
    return "\n".join(parts)


def evidence(slug: str) -> dict[str, Any] | None:
    """The record of a method's experiment: in `evidence/` here, or in that of the checkout; None if there is none."""
    for folder in (Path("evidence"), Path(__file__).resolve().parents[3] / "evidence"):
        try:
            record = json_module.loads((folder / f"{slug}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return None


def experiments() -> dict[str, str]:
    """The reproduction experiments there are: slug to module."""
    from whatmatters import reproduce

    names = [info.name for info in pkgutil.iter_modules(reproduce.__path__) if not info.name.startswith("_")]
    return {name.replace("_", "-"): f"whatmatters.reproduce.{name}" for name in names}


def reproduce(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="A method with an experiment, or `all`.")],
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Repeat the experiment on this model too.")] = None,
    scale: Annotated[Literal["desk", "gpu"], typer.Option("--scale", help="`desk`: minutes on two cores; `gpu`: the larger one.")] = "desk",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds or data draws; fewer than 3 prove nothing.")] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the record.")] = Path("evidence"),
    json: options.Json = False,
) -> None:
    """Check a method's claim by experiment, and record the verdict, whichever way it goes."""
    with Output(json) as out:
        known = experiments()
        wanted = sorted(known) if slug == "all" else [slug.replace("_", "-")]
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            raise UnknownNameError(f"no experiment named {slug!r}; known: {', '.join(sorted(known)) or 'none'}")
        progress = out.progress()
        records = {}
        for name in wanted:
            record = importlib.import_module(known[name]).run(model=model, scale=scale, seeds=seeds, output=output, progress=progress)
            records[name] = record
            claims = record.get("claims", []) if isinstance(record, dict) else []
            out.say(name)
            out.say(table(("verdict", "tier", "claim"), [(c.get("verdict", ""), c.get("tier", ""), c.get("claim", "")) for c in claims]))
        out.say(f"written: {output}")
        out.finish({"experiments": records}, following=[f"whatmatters methods {name}" for name in wanted])
