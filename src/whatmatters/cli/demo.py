"""The main job on the embedded model, from text to page: audit, plans, arms, checkpoint, report. Nothing is downloaded.

Three texts, all files of the running interpreter's standard library that the embedded model never saw, no document in two of them:
the even validation files calibrate, the odd ones audit and choose the best arm, the test files judge.
"""

import copy
import io
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from whatmatters.core import allocation, embedded
from whatmatters.core.checkpoint import atomic_folder, check_output, save
from whatmatters.core.data import Calibration, calibration, logits, windows
from whatmatters.core.errors import ModelError
from whatmatters.core.evaluate import Measurement, compare, evaluate, generate, judging
from whatmatters.core.formats import DENSE_BITS
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress, track
from whatmatters.core.render import change, fixed, megabytes, percent, spread
from whatmatters.core.report import Report, versions
from whatmatters.core.seeds import derived
from whatmatters.core.sites import Structure, structure
from whatmatters.pages import report
from whatmatters.pages.build import arm_part, audit_part, average_bits, model_part, text_part
from whatmatters.pages.results import Arm, Command, Continuation, Reload, Results, Stage, Token, Tokens
from whatmatters.quantize.gptq import gptq
from whatmatters.quantize.rsq import rsq
from whatmatters.quantize.rtn import rtn
from whatmatters.score.audit import Audit, audit
from whatmatters.score.random import random
from whatmatters.score.tokens import score_tokens

__all__ = ["run_demo", "summary_table"]

BITS = 3
AVERAGE = 3.5
LEVELS = (2, 3, 4, 8)
GROUP_SIZE = 128
LOSS_TABLE = "quantization-error"
TOLERANCE = 1e-4
COMPARABLE = 1.15  # the best arm is looked for among those at most this many times as large as the smallest
WIDE = 116  # characters that the whole table needs
PROMPT = 'def read_header(stream, *, strict=False):\n    """Read the header of a stream and return it as a dictionary."""\n'

QUICK_SCORERS = ("activation", "gradient", "layer-shift", "magnitude", "quantization-error", "random", "weight-outliers")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the result of a quick run is a try of the machinery, its numbers mean little."""

    length: int
    calibration: int
    choosing: int
    judging: int
    per_document: int
    new_tokens: int
    reloaded: int
    steps: int
    orders: int
    draws: int
    scorers: tuple[str, ...] | None


FULL = Sizes(
    length=256, calibration=64, choosing=40, judging=80, per_document=3, new_tokens=56, reloaded=4, steps=4, orders=4, draws=3, scorers=None
)
QUICK = Sizes(
    length=64,
    calibration=8,
    choosing=4,
    judging=8,
    per_document=1,
    new_tokens=8,
    reloaded=2,
    steps=2,
    orders=1,
    draws=1,
    scorers=QUICK_SCORERS,
)


@dataclass(frozen=True, eq=False)
class Texts:
    """The three texts of a run."""

    calibrating: Calibration
    choosing: Calibration
    judging: Calibration


class Clock:
    """Wall time of the stages of a run."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stages.append(Stage(name, time.perf_counter() - begin))


@dataclass(frozen=True, eq=False)
class Made:
    """An arm as it was made: the model, what was done to it, and how it does on both texts."""

    part: Arm
    model: nn.Module
    chosen: float  # loss on the text that chooses
    report: Report | None


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    quick: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Audit, quantize, measure, save and report, on the embedded model and the standard library's held-out files.

    Args:
        output: folder to make: `results.json`, `report.html`, `model/` (the best arm as a checkpoint) and `plan.json` if it has a plan. It
            appears as a whole when everything is done.
        seed: decides calibration windows, random order, rotation and bootstrap.
        progress: told of every stage.
        quick: seconds instead of minutes; too little text for its numbers to mean much.
        overwrite: replace the folder if it exists.
        console: where what is judged on and the table of arms are printed; None: nowhere.

    Returns:
        What `results.json` holds.

    Raises:
        FileError: the folder exists, or cannot be written.
        ModelError: the saved checkpoint does not reload to the same logits.
    """
    check_output(output, overwrite)
    sizes = QUICK if quick else FULL
    clock = Clock()
    with _quiet(), atomic_folder(output, overwrite=overwrite) as folder:
        with clock.stage("load model and text"):
            model, tokenizer = embedded.load()
            found = structure(model)
            texts, parts = _texts(tokenizer, sizes, seed)
        _say(console, f"{embedded.interpreter()}, test files {embedded.split_digest('test')[:16]}, {texts.judging.tokens:,} tokens judged")
        with clock.stage("audit of the scores"):
            audited = audit(
                model, texts.calibrating, texts.choosing, scorers=sizes.scorers, group_size=GROUP_SIZE,
                steps=sizes.steps, orders=sizes.orders, seed=derived(seed, "audit"), structure=found, progress=progress,
            )  # fmt: skip
        with clock.stage("plans"):
            plans = _plans(model, audited, found, sizes.draws, seed)
        with clock.stage("arms"):
            made = _arms(model, tokenizer, texts, found, _recipes(texts.calibrating, found, plans, seed), seed, progress)
        best = choose(made)
        with clock.stage("continuations and tokens"):
            shown = [m for m in made if m.part.role == "dense" or m.part.id == "rtn" or m is best]
            continuations = tuple(
                Continuation(m.part.id, generate(m.model, tokenizer, PROMPT, new_tokens=sizes.new_tokens))
                for m in track(shown, "continue the prompt", len(shown), progress)
            )
            tokens = _tokens(model, tokenizer, found, sizes.length)
        with clock.stage("save and reload"):
            save(best.model, tokenizer, folder / "model")
            reload = _reload(best, folder / "model", texts.judging, sizes.reloaded)
            if best.part.id in plans:
                plans[best.part.id].save(folder / "plan.json")
        results = Results(
            title="pylib-lm, the embedded model",
            model=model_part("pylib-lm", model, found),
            texts=parts,
            interpreter=embedded.interpreter(),
            audit=audit_part(audited),
            arms=tuple(m.part for m in made),
            best=best.part.id,
            reason=_reason(made, best, audited.best),
            unit="document",
            confidence=0.95,
            prompt=PROMPT,
            continuations=continuations,
            tokens=tokens,
            reload=reload,
            stages=tuple(clock.stages),
            settings={
                "seed": seed, "quick": quick, "threads": torch.get_num_threads(), "bits": BITS, "average_bits": AVERAGE,
                "levels": list(LEVELS), "group_size": GROUP_SIZE, "symmetric": True, "tokens_in_a_window": sizes.length,
            },
            versions=versions(),
            commands=_commands(output, audited.best or LOSS_TABLE),
            notes=_notes(made),
        )  # fmt: skip
        results.save(folder)
        report.render(folder)
    if console is not None:
        _show(console, results)
    return results.to_json()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of transformers: every load and save here takes milliseconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False)


def _show(console: Console, results: Results) -> None:
    """The table and the verdict. Files, which have no width, get all columns; narrow terminals those that fit."""
    if console.is_terminal:
        console.print(summary_table(results, whole=console.width >= WIDE))
    else:
        plain = io.StringIO()
        Console(file=plain, width=WIDE).print(summary_table(results))
        console.print(plain.getvalue(), end="", soft_wrap=True, markup=False, highlight=False)
    console.print(str(report.verdict(results)), soft_wrap=True, markup=False, highlight=False)


def _texts(tokenizer: Any, sizes: Sizes, seed: int) -> tuple[Texts, tuple[Any, ...]]:
    validation, test = embedded.documents("validation"), embedded.documents("test")
    found = Texts(
        calibration(tokenizer, validation[::2], samples=sizes.calibration, length=sizes.length, seed=derived(seed, "calibration")),
        windows(tokenizer, validation[1::2], sizes.length, limit=sizes.choosing, per_document=2 if sizes is FULL else 1),
        windows(tokenizer, test, sizes.length, limit=sizes.judging, per_document=sizes.per_document),
    )
    digests = {split: embedded.split_digest(split) for split in ("validation", "test")}
    return found, (
        text_part("calibrating", "standard library: validation files, even", found.calibrating, digests["validation"]),
        text_part("auditing, choosing", "standard library: validation files, odd", found.choosing, digests["validation"]),
        text_part("judging", "standard library: test files", found.judging, digests["test"]),
    )


def _plans(model: nn.Module, audited: Audit, found: Structure, draws: int, seed: int) -> dict[str, Plan]:
    """Bits by the order of the score to trust, by the optimum of the loss table, and by random orders."""
    best = audited.best or next(row.scorer for row in audited.rows if not row.control)
    settings: dict[str, Any] = {"average": AVERAGE, "levels": LEVELS, "structure": found, "group_size": GROUP_SIZE}
    return {
        "mixed-scores": allocation.bits(audited.scores[best], **settings),
        "mixed-optimum": allocation.bits(audited.scores[LOSS_TABLE], how="optimum", **settings),
        **{
            f"mixed-random-{i}": allocation.bits(random(model, by="site", structure=found, seed=derived(seed, "random", i)), **settings)
            for i in range(1, draws + 1)
        },
    }


@dataclass(frozen=True, eq=False)
class Recipe:
    """An arm to be made: `make` quantizes a copy of the model in place."""

    id: str
    label: str
    role: str
    bits: int | Plan
    make: Callable[[nn.Module], Report]

    def levels(self, found: Structure) -> dict[str, int]:
        """Bits of every site."""
        return {s.name: int(self.bits.values[s.name]) if isinstance(self.bits, Plan) else self.bits for s in found.sites}


def _recipes(text: Calibration, found: Structure, plans: Mapping[str, Plan], seed: int) -> list[Recipe]:
    shared: dict[str, Any] = {"group_size": GROUP_SIZE, "structure": found}
    rotation = derived(seed, "rotation")
    uniform: list[tuple[str, str, str, Callable[[nn.Module], Report]]] = [
        ("rtn", "RTN", "baseline", lambda m: rtn(m, bits=BITS, **shared)),
        ("gptq", "GPTQ", "baseline", lambda m: gptq(m, text, bits=BITS, **shared)),
        ("rsq", "RSQ", "method", lambda m: rsq(m, text, bits=BITS, seed=rotation, **shared)),
        ("rsq-unrotated", "RSQ without rotation", "method", lambda m: rsq(m, text, bits=BITS, rotate=None, **shared)),
    ]
    mixed = (
        ("mixed-scores", f"by {plans['mixed-scores'].method}", "method"),
        ("mixed-optimum", "optimum", "method"),
        *((id, f"random {number}", "control") for number, id in enumerate((id for id in plans if "random" in id), 1)),
    )

    def spend(plan: Plan) -> Callable[[nn.Module], Report]:
        return lambda m: gptq(m, text, bits=plan, **shared)

    return [
        *(Recipe(id, f"{label}, {BITS} bits", role, BITS, make) for id, label, role, make in uniform),
        *(Recipe(id, f"mixed {AVERAGE} bits, {label}", role, plans[id], spend(plans[id])) for id, label, role in mixed),
    ]


def _arms(
    model: nn.Module, tokenizer: Any, texts: Texts, found: Structure, recipes: list[Recipe], seed: int, progress: Progress | None
) -> list[Made]:
    """The dense model first, then every arm made from a copy of it."""
    chosen, dense = _measure(model, texts, None)
    part = arm_part("dense", "dense", "dense", levels={}, bits=float(DENSE_BITS), measured=dense, bytes=_size(model, tokenizer))
    made = [Made(part, model, chosen.loss, None)]
    for recipe in track(recipes, "arms", len(recipes), progress):
        arm = copy.deepcopy(model)
        done = recipe.make(arm)
        chosen, judged = _measure(arm, texts, model)
        levels = recipe.levels(found)
        part = arm_part(
            recipe.id, recipe.label, recipe.role, levels=levels, bits=average_bits(levels, found, group_size=GROUP_SIZE), measured=judged,
            difference=compare(dense, judged, seed=derived(seed, "bootstrap")), bytes=_size(arm, tokenizer), seconds=done.seconds,
            peak_bytes=done.peak_bytes, note=_untied(model, arm),
        )  # fmt: skip
        made.append(Made(part, arm, chosen.loss, done))
    return made


def _measure(model: nn.Module, texts: Texts, original: nn.Module | None) -> tuple[Measurement, Measurement]:
    """On the text that chooses and on the text that judges."""
    return evaluate(model, texts.choosing), evaluate(model, texts.judging, against=original)


def _size(model: nn.Module, tokenizer: Any) -> int:
    """Bytes of the saved folder."""
    with tempfile.TemporaryDirectory(prefix="whatmatters-") as scratch:
        return save(model, tokenizer, Path(scratch) / "model").bytes


def _untied(before: nn.Module, after: nn.Module) -> str:
    """What rotation costs on disk where embeddings and head were one tensor."""
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (before, after)]
    if numbers[0] == numbers[1]:
        return ""
    return "rotated: embeddings and head are two tensors now, and no longer fit 16 bits exactly"


def choose(made: list[Made]) -> Made:
    """The compressed arm, no control, with the least loss on the text that chooses, among those about as small as the smallest.

    Sizes compare within `COMPARABLE`: otherwise the largest would win by being large.
    """
    return min(_comparable(made)[0], key=lambda m: m.chosen)


def _comparable(made: list[Made]) -> tuple[list[Made], list[Made]]:
    """Compressed arms, controls left out: those of comparable size, and the larger ones."""
    candidates = [m for m in made if m.part.role in ("baseline", "method")]
    limit = COMPARABLE * min(m.part.bytes for m in candidates)
    return [m for m in candidates if m.part.bytes <= limit], [m for m in candidates if m.part.bytes > limit]


def _reason(made: list[Made], best: Made, trusted: str | None) -> str:
    told = (
        f"“{best.part.label}” had the lowest perplexity on the validation files that calibration did not see, among arms at most "
        f"{percent(COMPARABLE - 1, 0)} larger than the smallest. The numbers here are from the test files, which decided nothing."
    )
    for m in _comparable(made)[1]:
        better = m.chosen < best.chosen
        told += f" “{m.part.label}” did not compete: it takes {megabytes(m.part.bytes)}{', for a lower perplexity' if better else ''}."
    losses = {m.part.id: m.chosen for m in made}
    if trusted not in (None, LOSS_TABLE) and losses["mixed-optimum"] > losses["mixed-scores"]:
        told += f" The exact optimum is only as good as its loss table, {LOSS_TABLE}, which the audit trusts less than {trusted}."
    return told


def _tokens(model: nn.Module, tokenizer: Any, found: Structure, length: int) -> Tokens:
    """Attention concentration in the middle block, on a window from the middle of a test file: files begin with licences and names."""
    file = next(file for file in embedded.library_files("test") if file.stat().st_size > 200 * length)
    cut = windows(tokenizer, [file.read_text(encoding="utf-8")], length)
    window = Calibration.from_tensors(cut.inputs[len(cut) // 2][None], source=file.name)
    block = found.blocks[len(found.blocks) // 2]
    scores = score_tokens(model, window, "attention-concentration", structure=found)
    values = scores.values[block][0].tolist()
    pieces = [tokenizer.decode([token]) for token in window.inputs[0].tolist()]
    return Tokens(
        scores.method, found.blocks.index(block), f"the middle of {file.name}, one of the test files",
        tuple(Token(piece, value) for piece, value in zip(pieces, values, strict=True)),
    )  # fmt: skip


def _reload(best: Made, folder: Path, text: Calibration, count: int) -> Reload:
    """Load the checkpoint with transformers alone, and compare logits with the model in memory.

    Raises:
        ModelError: they are not the same.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    inputs, valid = text.inputs[:count], None if text.valid is None else text.valid[:count]
    with judging(best.model, loaded):
        here, there = (_judged(logits(each, inputs, valid), valid) for each in (best.model, loaded))
    difference = float((here - there).abs().max() / here.abs().max())
    if not difference <= TOLERANCE:
        raise ModelError(
            f"the checkpoint of {best.part.label} reloads with logits that differ by {difference:.1e} of the largest; expected at most "
            f"{TOLERANCE:.0e}: please report this with the versions of torch, transformers and compressed-tensors"
        )
    return Reload(best.part.id, folder.name, difference, TOLERANCE, count)


def _judged(values: Tensor, valid: Tensor | None) -> Tensor:
    """Logits at tokens; those at padding mean nothing."""
    return values if valid is None else values[valid]


def _commands(output: Path, scorer: str) -> tuple[Command, ...]:
    checkpoint = shlex.quote(os.fspath(output / "model"))
    code = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({os.fspath(output / 'model')!r}))"
    return (
        Command("Load the checkpoint of this run with transformers alone", f"python -c {shlex.quote(code)}"),
        Command("Measure it once more, against the original", f"whatmatters evaluate {checkpoint} --text default --against default"),
        Command("Which score tells the truth about your model", "whatmatters audit MODEL --text my.jsonl"),
        Command(
            "Spend 3.5 bits a weight on it, where they matter",
            f"whatmatters quantize MODEL --average-bits {AVERAGE} --levels 2,3,4,8 --layer-scores {scorer} \\\n"
            "    --text my.jsonl --output smaller",
        ),
        Command("Score once, plan for any budget", (
            f"whatmatters score MODEL --scorer {scorer} --text my.jsonl -o scores\n"
            "whatmatters plan scores --average-bits 3.25 -o plan.json\n"
            "whatmatters quantize MODEL --plan plan.json --text my.jsonl --output smaller"
        )),
    )  # fmt: skip


def _notes(made: list[Made]) -> tuple[str, ...]:
    told = [f"{m.part.label}: {note}" for m in made if m.report is not None for note in m.report.notes]
    return (
        "Bits are spent on the linear layers inside the blocks. Embeddings, norms and the head stay as they are; every size counts them.",
        "The mixed plans are carried out by GPTQ, with the same calibration windows, so that only the plan differs. The optimum is the "
        f"exact one of the loss table {LOSS_TABLE}; random orders draw a score for every site.",
        *told,
    )


def summary_table(results: Results, *, whole: bool = True) -> Table:
    """The arms as a table for the terminal; not `whole`: only the columns that 80 characters hold."""
    table = Table(box=None, pad_edge=False)
    names = ("arm", "size", "perplexity", "change", "95 % interval", *(("KL", "same top-1", "time") if whole else ()))
    for name in names:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name != "arm")
    for arm in results.arms:
        style = "bold" if arm.id == results.best else "dim" if arm.role == "control" else None
        cells = [arm.label, megabytes(arm.bytes), fixed(arm.perplexity)]
        if arm.role != "dense":
            cells += [change(arm.change), spread(arm.low, arm.high), fixed(arm.kl, 4), percent(arm.agreement), f"{arm.seconds:.1f} s"]
        table.add_row(*cells[: len(names)], style=style)
    return table
