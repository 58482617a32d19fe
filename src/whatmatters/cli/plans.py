"""`score` and `plan`: find out once what matters, then spend any number of budgets on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from whatmatters.cli import inputs, options
from whatmatters.cli.console import Output, spoken_size, table
from whatmatters.cli.settings import SettingsCommand, accepted, given_settings, option_value
from whatmatters.core.catalog import Entry, get_scorer

if TYPE_CHECKING:
    from whatmatters.core.plans import Plan
    from whatmatters.core.scores import Scores
    from whatmatters.interop import Tool

SHOWN = 8
"""Most important names that are printed."""


class ScoreCommand(SettingsCommand):
    """Takes the settings of a scorer."""

    def entry(self, args: Sequence[str]) -> Entry:
        """The scorer on this line."""
        return get_scorer(option_value(args, "--scorer") or "", when="ahead")


def score(
    model: options.Model,
    scorer: Annotated[str, typer.Option("--scorer", help="A scorer of `whatmatters methods --job score`; its settings are options too.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File for the scores (safetensors).")],
    text: options.Text = None,
    field: options.Field = "text",
    samples: options.Samples = 128,
    length: options.Length = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Score what matters in a model, once: any number of plans is then made from the file."""
    with Output(json) as out:
        entry = get_scorer(scorer, when="ahead")
        if entry.needs_text and text is None:
            raise typer.BadParameter(f"the scorer {entry.slug} learns from text", param_hint="--text")
        from whatmatters.core.checkpoint import check_output

        check_output(output, overwrite)
        inputs.check_text(text, field)
        shapes, found = inputs.load_shapes(model, trust_remote_code)
        if dry_run:
            from whatmatters.cli.estimates import Work, tell_estimate

            tokens = 0 if text is None else samples * inputs.window_length(shapes, length)
            tell_estimate(out, shapes, found, Work(tokens=tokens, gradients=entry.needs_gradients, output=output))
            return
        subject = inputs.load_subject(model, out, trust_remote_code=trust_remote_code)
        calibration = None
        if text is not None:
            learn = inputs.read_texts(text, field=field).learn
            calibration = inputs.calibration_of(subject, learn, samples=samples, length=length, seed=seed)
        offered = accepted(entry, structure=subject.structure, seed=seed, progress=out.progress())
        scores: Scores = entry.function(subject.model, calibration, **{**offered, **given_settings()})
        scores.save(output, overwrite=overwrite)
        layers = scores if scores.unit == "layer" else scores.reduce("mean", to="layer") if scores.unit in ("weight", "channel") else None
        order = [] if layers is None else layers.order()
        out.say(f"{entry.slug}: {len(scores.values)} scores of unit {scores.unit}, scale {scores.scale}")
        if layers is not None:
            stakes = layers.stakes()
            out.say(table(("most important", "score"), [(name, float(stakes.values[name])) for name in order[:SHOWN]]))
        out.say(f"written: {output}")
        budget = "--sparsity 0.5" if scores.unit == "weight" else "--average-bits 3.5"
        result = {
            "output": str(output),
            "scorer": entry.slug,
            "unit": scores.unit,
            "scale": scores.scale,
            "settings": dict(scores.settings),
        }
        plan_name = output.with_name("plan.safetensors" if scores.unit == "weight" else "plan.json")
        out.finish({**result, "order": order}, following=[f"whatmatters plan {output} {budget} -o {plan_name}"])


def plan(
    source: Annotated[
        str, typer.Argument(metavar="SCORES|MODEL", help="A file of scores; or a model or its config, of which only the shapes are read.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File for the plan; the budget joins its name if there are several."),
    ] = None,
    average_bits: Annotated[
        list[float] | None, typer.Option("--average-bits", help="Bits a weight on average. May be given several times.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option("--sparsity", help="Share of the weights that goes: masks from weight scores, ratios from layer scores."),
    ] = None,
    levels: Annotated[
        str | None, typer.Option("--levels", help="Bit widths that may be used; 16 leaves a site as it is. Default: 2,3,4,8.")
    ] = None,
    how: Annotated[
        Literal["rank", "optimum"] | None,
        typer.Option(
            "--how", help="`rank`: demote the least important first; `optimum`: least predicted loss. Default: what the scores are."
        ),
    ] = None,
    count: options.Count = "stored",
    group_size: options.GroupSize = None,
    asymmetric: options.Asymmetric = False,
    tool: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TOOL", help="Write that tool's own file too, and keep to what it can load: llama.cpp, gptqmodel, ..."
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="Where weights compete for --sparsity: all, site, row, or n:m such as 2:4.")
    ] = "all",
    floor: Annotated[float, typer.Option("--floor", help="Least share that goes of any site (ratios).")] = 0.0,
    cap: Annotated[float, typer.Option("--cap", help="Largest share that goes of any site (ratios).")] = 1.0,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Spend budgets on scores: exact plans of bits, masks or ratios. No model and no text is needed any more.

    Given a model or a config, its sites, ties and sizes are told, and plans are made in which all layers matter alike (position decides).
    """
    widths = None if levels is None else options.whole_numbers(levels, "--levels")
    budgets: list[tuple[str, float | None]] = [("bits", value) for value in average_bits or []]
    budgets += [("sparsity", value) for value in sparsity or []]
    if ":" in scope and not budgets:
        budgets = [("sparsity", None)]
    if len(set(budgets)) < len(budgets):
        raise typer.BadParameter("the same budget is given twice", param_hint="--average-bits or --sparsity")
    with Output(json) as out:
        scores, sites = _scores_of(source, trust_remote_code)
        if not budgets and sites is None:
            raise typer.BadParameter("no budget was given", param_hint="--average-bits or --sparsity")
        if tool is not None and any(kind != "bits" for kind, _ in budgets):
            raise typer.BadParameter("other tools take plans of bits: give --average-bits", param_hint="--for")
        target = None if tool is None else _tool(tool)
        outputs = _outputs(output, budgets, target, overwrite=overwrite)
        if sites is not None:
            out.say(sites)
        plans: list[Plan] = []
        for kind, value in budgets:
            if kind == "bits":
                made = _bits(scores, value, widths, how, count, group_size or 128, not asymmetric, target)
            else:
                made = _thinned(scores, value, scope, floor, cap)
            if target is not None:
                target.check(made)
            plans.append(made)
        results = []
        for made, (path, beside) in zip(plans, outputs, strict=True):
            out.say(made.summary())
            shown = _sized(made)
            if "bytes" in shown:
                out.say(f"size of the sites: {spoken_size(shown['bytes'])} (16 bits: {spoken_size(shown['bytes_at_16_bits'])})")
            if path is not None and not dry_run:
                made.save(path, overwrite=overwrite)
                out.say(f"written: {path}")
                shown["output"] = str(path)
                if target is not None and beside is not None:
                    target.write(made, beside, overwrite=overwrite)
                    out.say(f"written: {beside}, for {target.name} ({target.proof})")
                    out.say(f"use it: {target.usage.format(file=beside)}")
                    shown["tool"] = {"name": target.name, "file": str(beside), "proof": target.proof, "usage": target.usage}
            results.append(shown)
        action = "quantize" if plans and plans[0].kind == "bits" else "prune"
        path = outputs[0][0] if outputs else None
        following = [f"whatmatters {action} MODEL --plan {path} --output DIR"] if path is not None and not dry_run else []
        out.finish({"structure": _counted(scores), "plans": results}, following=following)


def _scores_of(source: str, trust_remote_code: bool) -> "tuple[Scores, str | None]":
    """Saved scores; or equal ones for the shapes of a model, and its sites in words."""
    from whatmatters.cli.compress import equal_scores
    from whatmatters.core.scores import Scores

    path = Path(source)
    if path.is_file() and path.name != "config.json":
        return Scores.load(path), None
    _, found = inputs.load_shapes(str(path.parent) if path.name == "config.json" else source, trust_remote_code)
    shapes: dict[tuple[int, int], int] = {}
    for site in found.sites:
        shapes[site.shape] = shapes.get(site.shape, 0) + 1
    total = sum(site.size for site in found.sites)
    rows = [(f"{a} x {b}", number, number * a * b) for (a, b), number in shapes.items()]
    text = f"{len(found.blocks)} blocks, {len(found.sites)} sites, {total} weights, {len(found.ties)} tied groups\n"
    text += table(("out x in", "sites", "weights"), rows)
    if found.ties:
        text += f"\nfirst tied group: {', '.join(found.ties[0][:6])}" + (" ..." if len(found.ties[0]) > 6 else "")
    if found.uncovered:
        text += f"\nnot covered by any site: {', '.join(found.uncovered[:3])}" + (" ..." if len(found.uncovered) > 3 else "")
    return equal_scores(found), text + "\nno scores: all layers count alike, so position decides"


def _tool(name: str) -> "Tool":
    from whatmatters.interop import tool

    return tool(name)


def _outputs(
    output: Path | None, budgets: Sequence[tuple[str, float | None]], tool: "Tool | None", *, overwrite: bool
) -> list[tuple[Path | None, Path | None]]:
    """The plan's file and the tool's file for each budget, each checked to be writable."""
    from whatmatters.core.checkpoint import check_output

    result: list[tuple[Path | None, Path | None]] = []
    for _, value in budgets:
        if output is None:
            result.append((None, None))
            continue
        path = output if len(budgets) == 1 else output.with_name(f"{output.stem}-{value}{output.suffix}")
        beside = None if tool is None else path.with_name(f"{path.stem}-{tool.file}")
        for each in (path, beside):
            if each is not None:
                check_output(each, overwrite)
        result.append((path, beside))
    return result


def _bits(
    scores: "Scores",
    average: float | None,
    levels: tuple[int, ...] | None,
    how: Literal["rank", "optimum"] | None,
    count: Literal["stored", "codes"],
    group_size: int,
    symmetric: bool,
    tool: "Tool | None",
) -> "Plan":
    """A plan of bits; with a tool, of its widths and ties, counted as it stores them."""
    from whatmatters.cli.compress import DEFAULT_LEVELS
    from whatmatters.core import allocation
    from whatmatters.core.errors import FormatError

    if scores.unit in ("weight", "channel"):
        scores = scores.reduce("mean", to="layer")
    limits: dict[str, Any] = {}
    known = scores.levels if scores.scale == "loss" else DEFAULT_LEVELS
    chosen = levels or known
    if tool is not None:
        foreign = [level for level in levels or () if level not in tool.levels and level < allocation.DENSE]
        if foreign:
            raise FormatError(f"{tool.name} cannot load {foreign[0]} bits; it takes {', '.join(map(str, tool.levels))}, or 16")
        chosen = tuple(level for level in chosen if level in tool.levels or level >= allocation.DENSE) or tool.levels
        cost = tool.cost(group_size=group_size, symmetric=symmetric)
        limits = {} if cost is None else {"cost": cost}
        if scores.structure is not None:
            limits["structure"] = tool.structure(scores.structure)
    if how is None:
        how = "optimum" if scores.scale == "loss" else "rank"
    return allocation.bits(scores, average, chosen, how=how, count=count, group_size=group_size, symmetric=symmetric, **limits)


def _thinned(scores: "Scores", sparsity: float | None, scope: str, floor: float, cap: float) -> "Plan":
    """Masks from weight scores, ratios from layer scores."""
    from whatmatters.core import allocation

    if scores.unit == "weight":
        return allocation.masks(scores, sparsity, scope=scope)
    return allocation.ratios(scores, 0.0 if sparsity is None else sparsity, floor=floor, cap=cap)


def _counted(scores: "Scores") -> dict[str, Any]:
    found = scores.structure
    if found is None:
        return {}
    return {
        "blocks": len(found.blocks),
        "sites": len(found.sites),
        "weights": sum(site.size for site in found.sites),
        "ties": [list(group) for group in found.ties],
        "uncovered": list(found.uncovered),
    }


def _sized(plan: "Plan") -> dict[str, Any]:
    """What a plan is and costs, JSON-able."""
    shown: dict[str, Any] = {"kind": plan.kind, "budget": dict(plan.budget), "account": dict(plan.account), "scores": plan.method}
    if plan.kind in ("bits", "ratio"):
        shown["values"] = dict(plan.values)
    stored, weights = plan.account.get("average_stored"), plan.account.get("weights")
    if plan.kind == "bits" and stored is not None and weights is not None:
        shown |= {"bytes": round(stored * weights) // 8, "bytes_at_16_bits": 2 * weights}
    return shown
