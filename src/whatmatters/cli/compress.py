"""`quantize` and `prune`: a smaller model with the damage measured, from a method or a plan."""

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from whatmatters.cli import inputs, judge, options
from whatmatters.cli.console import Output, spoken_duration, spoken_size
from whatmatters.cli.settings import SettingsCommand, accepted, given_settings, option_value
from whatmatters.core.catalog import Entry, get_method, get_scorer

if TYPE_CHECKING:
    from torch import nn

    from whatmatters.core.data import Calibration
    from whatmatters.core.plans import Plan
    from whatmatters.core.report import Report
    from whatmatters.core.scores import Scores
    from whatmatters.core.sites import Structure

WITH_TEXT = {"quantize": "rsq", "prune": "wanda"}
WITHOUT_TEXT = {"quantize": "rtn", "prune": "magnitude"}
"""Methods taken where none is named."""

DEFAULT_SCORES = "layer-shift"
DEFAULT_LEVELS = (2, 3, 4, 8)


def chosen_method(job: str, name: str | None, text: str | None, plan: object = None) -> Entry:
    """The method that was named, or the one for what is at hand; a plan for pruning is applied as it is unless a method is named."""
    if job == "prune" and plan is not None and name is None:
        from whatmatters.prune.apply import apply

        return Entry("apply", apply, "method", "prune", "weight", needs_text=False)
    return get_method(name or (WITH_TEXT if text is not None else WITHOUT_TEXT)[job], job)


class QuantizeCommand(SettingsCommand):
    """Takes the settings of a quantizer."""

    def entry(self, args: Sequence[str]) -> Entry:
        """The quantizer on this line."""
        return chosen_method("quantize", option_value(args, "--method"), option_value(args, "--text"))


class PruneCommand(SettingsCommand):
    """Takes the settings of a pruner."""

    def entry(self, args: Sequence[str]) -> Entry:
        """The pruner on this line."""
        return chosen_method("prune", *(option_value(args, option) for option in ("--method", "--text", "--plan")))


Method = Annotated[str | None, typer.Option("--method", help="A method of `whatmatters methods`, which lists its further settings.")]


@dataclass(frozen=True)
class Job:
    """What both commands were told beside the action itself."""

    model: str
    output: Path
    text: str | None
    judge: str | None
    field: str
    samples: int
    length: int | None
    seed: int
    format: str
    allow_uncovered: bool
    no_evaluate: bool
    trust_remote_code: bool
    dry_run: bool
    resume: bool
    overwrite: bool


def quantize(
    model: options.Model,
    output: options.Checkpoint,
    method: Method = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits a weight, the same for all sites: 2 to 8.")] = None,
    plan: options.PlanFile = None,
    average_bits: Annotated[float | None, typer.Option("--average-bits", help="Bits a weight on average, such as 3.5.")] = None,
    levels: Annotated[
        str | None, typer.Option("--levels", help="With --average-bits: the widths that may be used. Default: 2,3,4,8, or the method's.")
    ] = None,
    layer_scores: Annotated[
        str | None,
        typer.Option("--layer-scores", help="With --average-bits: a layer scorer, or a file of `whatmatters score`. Default: layer-shift."),
    ] = None,
    how: Annotated[
        Literal["rank", "optimum"] | None, typer.Option("--how", help="With --average-bits: see `whatmatters plan --help`.")
    ] = None,
    count: options.Count = "stored",
    group_size: options.GroupSize = None,
    asymmetric: options.Asymmetric = False,
    text: options.Text = None,
    judge: options.Judge = None,
    field: options.Field = "text",
    samples: options.Samples = 128,
    length: options.Length = None,
    seed: options.Seed = 0,
    format: options.Format = "auto",
    allow_uncovered: options.AllowUncovered = False,
    no_evaluate: options.NoEvaluate = False,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Quantize a model: give --bits, a --plan, or --average-bits. Settings of the method are options too: --rotate none, --act-order."""
    chosen = options.exactly_one(bits=bits, plan=plan, average_bits=average_bits)
    widths = None if levels is None else options.whole_numbers(levels, "--levels")
    job = Job(
        model, output, text, judge, field, samples, length, seed, format, allow_uncovered, no_evaluate, trust_remote_code, dry_run, resume,
        overwrite,
    )  # fmt: skip
    with Output(json, ranked=True) as out:
        entry = chosen_method("quantize", method, text)
        action = _Quantizing(entry, job, bits, average_bits, widths, layer_scores, how, count, given_settings())
        action.prepare(chosen, plan, group_size, asymmetric)
        perform(out, entry, job, action)


def prune(
    model: options.Model,
    output: options.Checkpoint,
    method: Method = None,
    sparsity: Annotated[float | None, typer.Option("--sparsity", help="Share of the weights that goes, such as 0.5.")] = None,
    plan: options.PlanFile = None,
    text: options.Text = None,
    judge: options.Judge = None,
    field: options.Field = "text",
    samples: options.Samples = 128,
    length: options.Length = None,
    seed: options.Seed = 0,
    format: options.Format = "auto",
    allow_uncovered: options.AllowUncovered = False,
    no_evaluate: options.NoEvaluate = False,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Prune a model: give --sparsity, a --plan, or an n:m pattern (--scope 2:4, --pattern 2:4). Settings of the method are options too."""
    settings = given_settings()
    if pattern_in(settings) is None or sparsity is not None or plan is not None:
        options.exactly_one(sparsity=sparsity, plan=plan)
    job = Job(
        model, output, text, judge, field, samples, length, seed, format, allow_uncovered, no_evaluate, trust_remote_code, dry_run, resume,
        overwrite,
    )  # fmt: skip
    with Output(json, ranked=True) as out:
        entry = chosen_method("prune", method, text, plan)
        action = _Pruning(entry, job, sparsity, settings)
        action.prepare(plan)
        perform(out, entry, job, action)


class _Quantizing:
    """How the bits of a quantization are decided."""

    def __init__(
        self,
        entry: Entry,
        job: Job,
        bits: int | None,
        average: float | None,
        levels: tuple[int, ...] | None,
        layer_scores: str | None,
        how: Literal["rank", "optimum"] | None,
        count: Literal["stored", "codes"],
        settings: dict[str, Any],
    ) -> None:
        self.entry, self.job, self.settings = entry, job, settings
        self.bits, self.average, self.levels, self.how, self.count = bits, average, levels, how, count
        self.layer_scores = layer_scores
        self.plan: Plan | None = None
        self.scores: Scores | None = None
        self.group_size, self.symmetric = 128, True
        self.planned: dict[str, int] = {}

    def prepare(self, chosen: str, plan: Path | None, group_size: int | None, asymmetric: bool) -> None:
        """Read plan and scores; refuse what the method does not take."""
        from whatmatters.core.plans import Plan
        from whatmatters.core.scores import Scores

        if self._takes("average_bits") and chosen != "average_bits":
            raise typer.BadParameter(f"{self.entry.slug} takes --average-bits", param_hint=f"--{chosen}")
        if plan is not None:
            self.plan = Plan.load(plan)
            self.group_size, self.symmetric = made_for(self.plan)
        elif self.average is not None:
            self.layer_scores = self.layer_scores or DEFAULT_SCORES
            if Path(self.layer_scores).is_file():
                scores = Scores.load(self.layer_scores)
                self.scores = scores.reduce("mean") if scores.unit in ("weight", "channel") else scores
            else:
                scorer = get_scorer(self.layer_scores, when="ahead")
                if scorer.needs_text and self.job.text is None:
                    raise typer.BadParameter(f"the scorer {scorer.slug} needs --text FILE", param_hint="--layer-scores")
        if group_size is not None:
            self.group_size = group_size
        if asymmetric:
            self.symmetric = False

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(self.entry.function).parameters

    def check(self, shapes: "nn.Module", found: "Structure") -> dict[str, Any]:
        """Refuse bits that do not fit; returns what is known of the plan before any work."""
        from whatmatters.core import allocation
        from whatmatters.core.checkpoint import check_savable
        from whatmatters.quantize._common import check_groups, site_bits

        if self.average is not None:
            trial = allocation.bits(
                self.scores or equal_scores(found), self.average, self._levels(), how="rank", count=self.count, structure=found,
                group_size=self.group_size, symmetric=self.symmetric,
            )  # fmt: skip
        else:
            trial = None
        levels = self.planned = site_bits(trial or self.plan or self.bits or 0, found)
        if self._takes("group_size"):
            check_groups(levels, found, self.group_size)
            check_savable(shapes, levels, group_size=self.group_size, symmetric=self.symmetric, format=self.job.format)
        plan = trial or self.plan
        told = {} if plan is None else {"account": {k: v for k, v in plan.account.items() if k != "filled"}, "budget": dict(plan.budget)}
        return {"group_size": self.group_size, "symmetric": self.symmetric, "levels": histogram(levels), **told}

    def output_bytes(self, shapes: "nn.Module", found: "Structure") -> int:
        """Bytes of the checkpoint."""
        from whatmatters.cli.estimates import checkpoint_bytes

        return checkpoint_bytes(shapes, found, self.planned, self.group_size, self.symmetric)

    def _levels(self) -> tuple[int, ...]:
        if self.levels is not None:
            return self.levels
        default = inspect.signature(self.entry.function).parameters.get("levels")
        return tuple(default.default) if default is not None and self._takes("average_bits") else DEFAULT_LEVELS

    def request(self) -> dict[str, Any]:
        """What was asked for, JSON-able."""
        plan = None if self.plan is None else {"values": dict(self.plan.values), "budget": dict(self.plan.budget)}
        named: dict[str, Any] = {"bits": self.bits, "plan": plan, "group_size": self.group_size, "symmetric": self.symmetric}
        if self.average is not None:
            scores = self.layer_scores if self.scores is None else {n: v.tolist() for n, v in self.scores.values.items()}
            named |= {"average_bits": self.average, "levels": self._levels(), "layer_scores": scores, "how": self.how, "count": self.count}
        return named

    def run(self, subject: inputs.Subject, calibration: "Calibration | None", common: Mapping[str, Any]) -> "Report":
        """Score if that is still to be done, and quantize."""
        from whatmatters.core import allocation
        from whatmatters.core.checkpoint import check_savable
        from whatmatters.quantize.layerwise_quant import layer_importance

        given: dict[str, Any] = {"group_size": self.group_size, "symmetric": self.symmetric}
        if self.average is None:
            given["bits"] = self.plan or self.bits
        elif self._takes("average_bits"):
            given |= {"average_bits": self.average, "levels": self._levels(), "layer_scores": self.scores or self.layer_scores}
            given |= {"count": self.count, **({"how": self.how} if self.how else {})}
        else:
            scores = layer_importance(
                self.scores or self.layer_scores or DEFAULT_SCORES, subject.model, calibration, subject.structure, seed=self.job.seed,
                progress=common["progress"],
            )  # fmt: skip
            how = self.how or ("optimum" if scores.scale == "loss" else "rank")
            plan = allocation.bits(
                scores, self.average, self._levels(), how=how, count=self.count, structure=subject.structure,
                group_size=self.group_size, symmetric=self.symmetric,
            )  # fmt: skip
            levels = {name: int(value) for name, value in plan.values.items()}
            check_savable(subject.model, levels, group_size=self.group_size, symmetric=self.symmetric, format=self.job.format)
            self.plan = given["bits"] = plan
        chosen = accepted(self.entry, **given, **common)
        report: Report = self.entry.function(subject.model, calibration, **{**chosen, **self.settings})
        if self.plan is not None:
            report.settings["account"] = dict(self.plan.account)
        return report


class _Pruning:
    """How much of each site goes."""

    def __init__(self, entry: Entry, job: Job, sparsity: float | None, settings: dict[str, Any]) -> None:
        self.entry, self.job, self.sparsity, self.settings = entry, job, sparsity, settings
        self.plan: Plan | None = None

    def prepare(self, plan: Path | None) -> None:
        """Read the plan."""
        from whatmatters.core.errors import InputTypeError
        from whatmatters.core.plans import Plan

        self.plan = None if plan is None else Plan.load(plan)
        if self.plan is not None and self.plan.kind == "mask" and self.entry.slug != "apply":
            raise typer.BadParameter("the plan's masks say which weights go: leave out --method", param_hint="--method")
        if self.plan is not None and self.plan.kind not in ("mask", "ratio"):
            raise InputTypeError(
                f"{plan} is a plan of kind {self.plan.kind!r}; pruning takes 'mask' or 'ratio' (plan --sparsity makes them)"
            )

    def check(self, shapes: "nn.Module", found: "Structure") -> dict[str, Any]:
        """Refuse a share that does not fit; returns what is known of the plan before any work."""
        from whatmatters.core.actions import check_names_fit
        from whatmatters.core.checkpoint import check_savable
        from whatmatters.prune._common import site_counts

        check_savable(shapes, {}, format=self.job.format)
        if self.plan is not None:
            check_names_fit(self.plan.values.keys(), found, "the plan")
            return {"account": dict(self.plan.account), "budget": dict(self.plan.budget)}
        pattern = pattern_in(self.settings)
        pruned = sum(site_counts(self.sparsity, pattern or str(self.settings.get("scope", "site")), found).values())
        total = sum(site.size for site in found.sites)
        return {"pruned": pruned, "weights": total, "sparsity": pruned / total}

    def output_bytes(self, shapes: "nn.Module", found: "Structure") -> int:
        """Bytes of the checkpoint: pruned weights are stored as zeros."""
        return sum(parameter.numel() * parameter.element_size() for parameter in shapes.parameters())

    def request(self) -> dict[str, Any]:
        """What was asked for, JSON-able."""
        return {"sparsity": self.sparsity, "plan": None if self.plan is None else plan_digest(self.plan)}

    def run(self, subject: inputs.Subject, calibration: "Calibration | None", common: Mapping[str, Any]) -> "Report":
        """Prune."""
        how = {"plan": self.plan, "sparsity": self.sparsity if self.plan is None else self.plan}
        given = accepted(self.entry, calibration=calibration, **how, **common)
        return self.entry.function(subject.model, **{**given, **self.settings})


def pattern_in(settings: Mapping[str, Any]) -> str | None:
    """The n:m among the settings of a pruner, whatever the setting is called."""
    return next((value for value in settings.values() if isinstance(value, str) and re.fullmatch(r"\d+:\d+", value)), None)


def plan_digest(plan: "Plan") -> str:
    """SHA-256 over the names and values of a plan."""
    digest = hashlib.sha256(plan.kind.encode())
    for name, value in plan.values.items():
        shown = repr(value) if isinstance(value, int | float) else hashlib.sha256(value.numpy().tobytes()).hexdigest()
        digest.update(f"\x1f{name}\x1f{shown}".encode())
    return digest.hexdigest()


def equal_scores(found: "Structure") -> "Scores":
    """Scores that know nothing: what a budget can reach does not depend on them."""
    import torch

    from whatmatters.core.scores import Scores

    blocks = [block for block in found.blocks if found.in_block(block)]
    return Scores("layer", {block: torch.zeros(()) for block in blocks}, "equal", {}, structure=found)


def made_for(plan: "Plan") -> tuple[int, bool]:
    """Group size and symmetry that a plan counted with; 128 and symmetric where it does not say."""
    group_size, symmetric = plan.settings.get("group_size", 128), plan.settings.get("symmetric", True)
    return (group_size if type(group_size) is int else 128), symmetric is not False


def histogram(levels: Mapping[str, int]) -> dict[str, int]:
    """How many sites have how many bits, as JSON has it."""
    counts: dict[str, int] = {}
    for bits in sorted(levels.values()):
        counts[str(bits)] = counts.get(str(bits), 0) + 1
    return counts


def perform(out: Output, entry: Entry, job: Job, action: _Quantizing | _Pruning) -> None:
    """All that both commands do: refuse, load, judge, act, judge again, save, tell."""
    from whatmatters.cli.run_folder import RunFolder

    calibration_parameter = inspect.signature(entry.function).parameters.get("calibration")
    if job.text is None and calibration_parameter is not None and calibration_parameter.default is inspect.Parameter.empty:
        raise typer.BadParameter(f"{entry.slug} learns from text", param_hint="--text")
    if "online" in action.settings.values():
        from whatmatters.core.errors import FormatError

        raise FormatError(
            "a rotation that the model computes as it runs has no place in a checkpoint; choose one that folds into the weights"
        )
    run = RunFolder(out, job.output, resume=job.resume, overwrite=job.overwrite)
    inputs.check_text(job.text, job.field)
    inputs.check_text(job.judge, job.field)
    shapes, found = inputs.load_shapes(job.model, job.trust_remote_code)
    planned = action.check(shapes, found)
    if job.dry_run:
        _estimate(out, entry, job, action, shapes, found, planned)
        return
    subject = inputs.load_subject(job.model, out, trust_remote_code=job.trust_remote_code, allow_uncovered=job.allow_uncovered)
    calibration, judged = _windows(subject, job)
    request = _request(entry, action, subject, calibration, judged)
    if (finished := run.finished(request)) is not None:
        run.remove()
        out.note(f"{job.output} is finished already")
        _tell(out, job, finished, planned)
        return
    progress = out.progress()
    with run:
        before = judge.measured(subject, judged, progress)
        report = action.run(
            subject, calibration,
            {"structure": subject.structure, "allow_uncovered": job.allow_uncovered, "seed": job.seed, "run_dir": run.path,
             "resume": job.resume, "progress": progress},
        )  # fmt: skip
        after = judge.measured(subject, judged, progress)
        report.settings["request"] = request
        report.before, report.after = judge.lasting(before), judge.lasting(after)
        run.publish(subject.model, subject.tokenizer, report, format=job.format)
    _tell(out, job, report, planned, judge.damage(before, after, job.seed))


def _estimate(
    out: Output, entry: Entry, job: Job, action: _Quantizing | _Pruning, shapes: "nn.Module", found: "Structure", planned: Mapping[str, Any]
) -> None:
    """What the command would take."""
    from whatmatters.cli.estimates import Work, tell_estimate

    length = inputs.window_length(shapes, job.length)
    judging = 0 if job.no_evaluate or (job.text is None and job.judge is None) else 2 * inputs.JUDGED_WINDOWS * length
    work = Work(
        tokens=judging, solving="rtn" if job.text is None else "hessian", samples=job.samples, length=length, output=job.output,
        output_bytes=action.output_bytes(shapes, found),
    )  # fmt: skip
    tell_estimate(out, shapes, found, work, planned)


def _windows(subject: inputs.Subject, job: Job) -> "tuple[Calibration | None, Calibration | None]":
    """Windows to learn from, and others to judge on."""
    learn = kept = None
    if job.text is not None:
        texts = inputs.read_texts(job.text, judge=job.judge, field=job.field)
        learn, kept = texts.learn, texts.judge
    elif job.judge is not None:
        kept = inputs.read_documents(job.judge, job.field)
    calibration = judged = None
    if learn is not None:
        calibration = inputs.calibration_of(subject, learn, samples=job.samples, length=job.length, seed=job.seed)
    if kept is not None and not job.no_evaluate:
        judged = inputs.judged_windows(subject, kept, length=job.length, limit=inputs.JUDGED_WINDOWS)
    return calibration, judged


def _request(
    entry: Entry, action: _Quantizing | _Pruning, subject: inputs.Subject, calibration: "Calibration | None", judged: "Calibration | None"
) -> dict[str, Any]:
    """Everything that decides the output's bytes, as JSON reads it back."""
    from whatmatters.cli.run_folder import as_read_back
    from whatmatters.core.walk import digest_of

    settings = {name: value if isinstance(value, str | int | float | None) else repr(value) for name, value in action.settings.items()}
    whole = {
        "method": entry.slug,
        "settings": settings,
        **action.request(),
        "format": action.job.format,
        "seed": action.job.seed,
        "model": digest_of(subject.model),
        "text": None if calibration is None else calibration.digest,
        "judged": None if judged is None else judged.digest,
    }
    return as_read_back(whole)


def _tell(out: Output, job: Job, report: "Report", planned: Mapping[str, Any], damage: Mapping[str, Any] | None = None) -> None:
    """The result, for people and as JSON."""
    from whatmatters.core.evaluate import size_on_disk

    sizes = {"bytes": size_on_disk(job.output), "weight_bytes": weight_bytes(job.output)}
    source = Path(inputs.source_of(job.model))
    original = weight_bytes(source) if source.is_dir() else None
    shown = f"{spoken_size(original)} -> " if original else ""
    timed = f", {spoken_duration(report.seconds)}" if report.seconds else ""
    out.say(f"{report.method}: {len(report.rows)} sites, {shown}{spoken_size(sizes['weight_bytes'])} of weights{timed}")
    account = report.settings.get("account", {})
    if account.get("average_stored") is not None:
        out.say(f"average bits: {account['average_codes']:.4g} in codes, {account['average_stored']:.4g} stored with scales")
    if damage is not None:
        out.say(judge.sentence(damage))
    elif report.after:
        out.say(f"perplexity {report.before['perplexity']:.6g} -> {report.after['perplexity']:.6g}")
    elif not job.no_evaluate:
        out.note("the damage was not measured: give --text or --judge FILE")
    for note in report.notes[:5]:
        out.say(f"note: {note}")
    if len(report.notes) > 5:
        out.say(f"note: {len(report.notes) - 5} more notes are in whatmatters.json")
    out.say(f"written: {job.output}")
    text = job.judge or job.text or "FILE"
    result = {
        "output": str(job.output), "method": report.method, "settings": report.settings, **sizes, "original_weight_bytes": original,
        "planned": dict(planned), "before": report.before, "after": report.after, "damage": damage, "rows": report.rows,
        "notes": report.notes, "seconds": report.seconds, "peak_bytes": report.peak_bytes,
    }  # fmt: skip
    out.finish(result, following=[f"whatmatters evaluate {job.output} --text {text} --against {job.model}"])


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
