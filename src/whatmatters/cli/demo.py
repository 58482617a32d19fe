"""The main job on the embedded model, from text to page: audit, plans, arms, checkpoint, report. Nothing is downloaded.

Three texts, all files of the running interpreter's standard library that the embedded model never saw, no document in two of them:
the even validation files calibrate, the odd ones audit and choose the best arm, the test files judge.
"""

import copy
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
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress, track
from whatmatters.core.render import change, fixed, megabytes, percent, spread
from whatmatters.core.report import Report, versions
from whatmatters.core.seeds import derived
from whatmatters.core.sites import Structure, structure
from whatmatters.pages import report
from whatmatters.pages.build import arm_part, average_bits, model_part, text_part
from whatmatters.pages.results import Arm, Command, Continuation, Reload, Results, Stage, Token, Tokens
from whatmatters.quantize.gptq import gptq
from whatmatters.quantize.rsq import rsq
from whatmatters.quantize.rtn import rtn
from whatmatters.score.quantization_error import quantization_error
from whatmatters.score.tokens import score_tokens

__all__ = ["run_demo", "summary_table"]

BITS = 3
AVERAGE = 3.5
LEVELS = (2, 3, 4, 8)
GROUP_SIZE = 128
TOLERANCE = 1e-4
COMPARABLE = 1.15  # the best arm is looked for among those at most this many times as large as the smallest
PROMPT = 'def read_header(stream, *, strict=False):\n    """Read the header of a stream and return it as a dictionary."""\n'
SCORERS = ("quantization-error", "activation", "gradient", "hessian-diagonal", "layer-shift", "weight-outliers", "magnitude", "random")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the result of a quick run is a try of the machinery, its numbers mean little."""

    length: int
    calibration: int
    auditing: int
    judging: int
    per_document: int
    new_tokens: int
    reloaded: int


FULL = Sizes(length=256, calibration=64, auditing=32, judging=80, per_document=3, new_tokens=64, reloaded=4)
QUICK = Sizes(length=64, calibration=8, auditing=4, judging=8, per_document=1, new_tokens=8, reloaded=2)


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
        output: folder to make: `results.json`, `report.html`, `model/` (the best arm as a checkpoint), `plan.json` if it has one. It appears
            as a whole when everything is done.
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
            audited, scores = _audit(model, texts, found, seed, progress)
        with clock.stage("plans"):
            plans = _plans(model, texts.calibrating, found, audited, scores, seed)
        with clock.stage("arms"):
            made = _arms(model, tokenizer, texts, found, plans, seed, progress)
        best = choose(made)
        with clock.stage("continuations and tokens"):
            shown = [made[0], next(m for m in made if m.part.id == "rtn"), best]
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
            audit=audited,
            arms=tuple(m.part for m in made),
            best=best.part.id,
            reason=_reason(made, best),
            unit="document",
            confidence=0.95,
            prompt=PROMPT,
            continuations=continuations,
            tokens=tokens,
            reload=reload,
            stages=tuple(clock.stages),
            settings={
                "seed": seed, "quick": quick, "threads": torch.get_num_threads(), "bits": BITS, "average_bits": AVERAGE, "levels": list(LEVELS),
                "group_size": GROUP_SIZE, "symmetric": True, "window": sizes.length,
            },
            versions=versions(),
            commands=_commands(output),
            notes=_notes(made),
        )  # fmt: skip
        results.save(folder)
        report.render(folder)
    if console is not None:
        console.print(summary_table(results))
        console.print(str(report.verdict(results)), soft_wrap=True)
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


def _texts(tokenizer: Any, sizes: Sizes, seed: int) -> tuple[Texts, tuple[Any, ...]]:
    validation, test = embedded.documents("validation"), embedded.documents("test")
    found = Texts(
        calibration(tokenizer, validation[::2], samples=sizes.calibration, length=sizes.length, seed=derived(seed, "calibration")),
        windows(tokenizer, validation[1::2], sizes.length, limit=sizes.auditing, per_document=sizes.per_document),
        windows(tokenizer, test, sizes.length, limit=sizes.judging, per_document=sizes.per_document),
    )
    library = f"standard library of {embedded.interpreter()}"
    digests = {split: embedded.split_digest(split) for split in ("validation", "test")}
    return found, (
        text_part("calibrating", f"{library}, validation files, every second", found.calibrating, digests["validation"]),
        text_part("auditing, choosing", f"{library}, the other validation files", found.choosing, digests["validation"]),
        text_part("judging", f"{library}, test files", found.judging, digests["test"]),
    )


def _arms(
    model: nn.Module, tokenizer: Any, texts: Texts, found: Structure, plans: Mapping[str, Plan], seed: int, progress: Progress | None
) -> list[Made]:
    """The dense model first, then every arm made from a copy of it."""
    shared = {"group_size": GROUP_SIZE, "structure": found}
    steps: list[tuple[str, str, str, Callable[[nn.Module], Report], int | Plan]] = [
        ("rtn", f"RTN, {BITS} bits", "baseline", lambda m: rtn(m, bits=BITS, **shared), BITS),
        ("gptq", f"GPTQ, {BITS} bits", "baseline", lambda m: gptq(m, texts.calibrating, bits=BITS, **shared), BITS),
        ("rsq", f"RSQ, {BITS} bits", "method", lambda m: rsq(m, texts.calibrating, bits=BITS, seed=derived(seed, "rsq"), **shared), BITS),
        ("rsq-unrotated", f"RSQ without rotation, {BITS} bits", "method",
         lambda m: rsq(m, texts.calibrating, bits=BITS, rotate=None, **shared), BITS),
    ]  # fmt: skip
    for id, plan in plans.items():
        role = "control" if id == "mixed-random" else "method"
        steps.append((id, MIXED[id].format(scores=plan.method), role, lambda m, plan=plan: gptq(m, texts.calibrating, bits=plan, **shared), plan))
    dense = _measure(model, texts, None)
    dense_size = _size(model, tokenizer)
    part = arm_part("dense", "dense", "dense", levels={}, bits=16.0, measured=dense[1], difference=None, bytes=dense_size, seconds=0.0, peak_bytes=0)
    made = [Made(part, model, dense[0].loss, None)]
    for id, label, role, make, bits in track(steps, "arms", len(steps), progress):
        arm = copy.deepcopy(model)
        done = make(arm)
        chosen, judged = _measure(arm, texts, model)
        levels = {site.name: int(bits.values[site.name]) if isinstance(bits, Plan) else bits for site in found.sites}
        untied = id == "rsq"
        part = arm_part(
            id, label, role, levels=levels, bits=average_bits(levels, found, group_size=GROUP_SIZE), measured=judged,
            difference=compare(dense[1], judged, seed=derived(seed, "bootstrap")), bytes=_size(arm, tokenizer), seconds=done.seconds,
            peak_bytes=done.peak_bytes, note=_untied(model, arm) if untied else "",
        )  # fmt: skip
        made.append(Made(part, arm, chosen.loss, done))
    return made


MIXED = {
    "mixed-scores": f"mixed {AVERAGE} bits by {{scores}}",
    "mixed-optimum": f"mixed {AVERAGE} bits, optimum",
    "mixed-random": f"mixed {AVERAGE} bits, random order",
}


def _measure(model: nn.Module, texts: Texts, original: nn.Module | None) -> tuple[Measurement, Measurement]:
    """On the text that chooses and on the text that judges."""
    return evaluate(model, texts.choosing), evaluate(model, texts.judging, against=original)


def _size(model: nn.Module, tokenizer: Any) -> int:
    """Bytes of the saved folder."""
    with tempfile.TemporaryDirectory(prefix="whatmatters-") as scratch:
        return save(model, tokenizer, Path(scratch) / "model").bytes


def _untied(before: nn.Module, after: nn.Module) -> str:
    """What rotation costs on disk where embeddings and head were one tensor."""
    def numbers(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    if numbers(after) == numbers(before):
        return ""
    return "rotated: embeddings and head are no longer one tensor, and no longer fit 16 bits exactly"


def choose(made: list[Made]) -> Made:
    """The compressed arm, no control, with the least loss on the text that chooses, among those about as small as the smallest.

    Sizes compare within `COMPARABLE`: otherwise the largest would win by being large.
    """
    candidates = [m for m in made if m.part.role in ("baseline", "method")]
    limit = COMPARABLE * min(m.part.bytes for m in candidates)
    return min((m for m in candidates if m.part.bytes <= limit), key=lambda m: m.chosen)


def _reason(made: list[Made], best: Made) -> str:
    candidates = [m for m in made if m.part.role in ("baseline", "method")]
    limit = COMPARABLE * min(m.part.bytes for m in candidates)
    told = (
        f"“{best.part.label}” had the lowest perplexity on the validation files that calibration did not see, among arms at most "
        f"{percent(COMPARABLE - 1, 0)} larger than the smallest. Everything shown here was measured on the test files, which decided nothing."
    )
    larger = [m for m in candidates if m.part.bytes > limit]
    for m in larger:
        better = m.chosen < best.chosen
        told += f" “{m.part.label}” is {megabytes(m.part.bytes)}, so it did not compete{', though its perplexity is lower' if better else ''}."
    return told


def _tokens(model: nn.Module, tokenizer: Any, found: Structure, length: int) -> Tokens:
    """Attention concentration on the beginning of a test file, in the middle block."""
    file = next(file for file in embedded.library_files("test") if file.stat().st_size > 20 * length)
    window = windows(tokenizer, [file.read_text(encoding="utf-8")], length, limit=1)
    block = found.blocks[len(found.blocks) // 2]
    scores = score_tokens(model, window, "attention-concentration", structure=found)
    values = scores.values[block][0].tolist()
    pieces = [tokenizer.decode([token]) for token in window.inputs[0].tolist()]
    return Tokens(
        scores.method, found.blocks.index(block), f"the beginning of {file.name}, one of the test files",
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
        raise ModelError(f"the checkpoint of {best.part.label} reloads with logits that differ by {difference:.1e} of the largest; expected {TOLERANCE}")
    return Reload(best.part.id, folder.name, difference, TOLERANCE, count)


def _judged(values: Tensor, valid: Tensor | None) -> Tensor:
    """Logits at tokens; those at padding mean nothing."""
    return values if valid is None else values[valid]


def _commands(output: Path) -> tuple[Command, ...]:
    checkpoint = shlex.quote(os.fspath(output / "model"))
    return (
        Command("Load the checkpoint of this run with transformers alone", (
            f'python -c "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({os.fspath(output / "model")!r}))"'
        )),
        Command("Judge it on a text of your own", f"whatmatters evaluate {checkpoint} --text my.jsonl"),
        Command("Which score tells the truth about your model", "whatmatters audit MODEL --text my.jsonl"),
        Command(
            "Spend 3.5 bits a weight on it, where they matter",
            "whatmatters quantize MODEL --average-bits 3.5 --levels 2,3,4,8 --layer-scores quantization-error \\\n"
            "    --text my.jsonl --output smaller",
        ),
        Command("Score once, plan for any budget", (
            "whatmatters score MODEL --scorer quantization-error --text my.jsonl -o scores\n"
            "whatmatters plan scores --average-bits 3.25 -o plan.json\n"
            "whatmatters quantize MODEL --plan plan.json --text my.jsonl --output smaller"
        )),
    )  # fmt: skip


def _notes(made: list[Made]) -> tuple[str, ...]:
    told = [f"{m.part.label}: {note}" for m in made if m.report is not None for note in m.report.notes]
    return (
        "Bits are spent on the linear layers inside the blocks; embeddings, norms and the head stay in 16 bits and are counted in every size.",
        "The mixed plans are carried out by GPTQ, with the same calibration windows, so that only the plan differs.",
        *told,
    )


def summary_table(results: Results) -> Table:
    """The arms as a table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for name in ("arm", "size", "perplexity", "change", "95 % interval", "KL", "same top-1", "time"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name != "arm")
    for arm in results.arms:
        style = "bold" if arm.id == results.best else "dim" if arm.role == "control" else None
        cells = [arm.label, megabytes(arm.bytes), fixed(arm.perplexity)]
        if arm.role != "dense":
            cells += [change(arm.change), spread(arm.low, arm.high), fixed(arm.kl, 4), percent(arm.agreement), f"{arm.seconds:.1f} s"]
        table.add_row(*cells, style=style)
    return table
