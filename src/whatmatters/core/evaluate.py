"""Measuring models: perplexity, divergence from the original, size, memory, speed, and whether a difference is more than chance.

A `Measurement` keeps sums per document, so that two models measured on the same text can be compared by a paired bootstrap over
documents: the text is the sample, and neighbouring tokens are not independent of each other.
"""

import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from whatmatters.core.data import Calibration, check_fits, logits
from whatmatters.core.errors import DataError, FileError, InputError, ModelError, NonFiniteError
from whatmatters.core.progress import Progress, track
from whatmatters.core.seeds import Seed, generator

__all__ = [
    "Difference",
    "Latency",
    "Measurement",
    "PeakMemory",
    "compare",
    "evaluate",
    "generate",
    "judging",
    "latency",
    "paired_bootstrap",
    "size_on_disk",
]

CHUNK = 2**22  # logits turned to float32 at a time: 16 MB, whatever the vocabulary
RESAMPLED = 2**22  # bootstrap indices held at a time


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one model did on one text, in sums per document (or per window where the text is a single document).

    Attributes:
        nats: negative log-likelihood of the judged tokens, summed; natural logarithm.
        counts: number of judged tokens.
        hits: number of tokens that were the model's first choice.
        divergence: KL(original || model) in nats, summed over the judged tokens; None without an original.
        agreements: number of tokens where both models' first choices are the same; None without an original.
        document: index of each document (or window).
        unit: "document" or "window".
        text: digest of the windows that were judged, their stride included.
    """

    nats: Float64[np.ndarray, " units"]
    counts: Int64[np.ndarray, " units"]
    hits: Int64[np.ndarray, " units"]
    divergence: Float64[np.ndarray, " units"] | None
    agreements: Int64[np.ndarray, " units"] | None
    document: Int64[np.ndarray, " units"]
    unit: str
    text: str

    @property
    def tokens(self) -> int:
        """Number of judged tokens."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no float."""
        return _exp(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the model's first choice."""
        return int(self.hits.sum()) / self.tokens

    @property
    def kl(self) -> float | None:
        """KL(original || model), nats a token; None without an original."""
        return None if self.divergence is None else float(self.divergence.sum()) / self.tokens

    @property
    def agreement(self) -> float | None:
        """Share of tokens where model and original have the same first choice; None without an original."""
        return None if self.agreements is None else int(self.agreements.sum()) / self.tokens

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON-able values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "kl": self.kl,
            "agreement": self.agreement,
            "tokens": self.tokens,
            f"{self.unit}s": len(self.counts),
            "text": self.text,
        }


@dataclass(frozen=True)
class Difference:
    """How much worse (positive) or better (negative) a second model is than a first one on the same text.

    Attributes:
        log_ratio: difference of the losses in nats a token = logarithm of the ratio of perplexities.
        interval: confidence interval of `log_ratio`; infinite both ways where there is only one unit to resample.
        confidence: of the interval, for example 0.95.
        units: how many documents (or windows) were resampled.
        unit: "document" or "window".
        resamples: number of resamples.
    """

    log_ratio: float
    interval: tuple[float, float]
    confidence: float
    units: int
    unit: str
    resamples: int

    @property
    def perplexity_change(self) -> float:
        """Change of the perplexity in percent."""
        return _percent(self.log_ratio)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """Confidence interval of `perplexity_change`, in percent."""
        low, high = self.interval
        return _percent(low), _percent(high)

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Latency:
    """Median times of a model.

    Attributes:
        prefill: seconds for all inputs at once.
        prefill_per_token: the same, divided by the number of tokens.
        decode: seconds for one more token of each sample with the key-value cache; None for a model without one.
        repeats: measurements behind each median.
    """

    prefill: float
    prefill_per_token: float
    decode: float | None
    repeats: int


def evaluate(
    model: nn.Module,
    text: Calibration,
    *,
    against: nn.Module | None = None,
    stride: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Judge a causal language model on token windows.

    Every token that has one before it in its window is judged once, the log-probabilities in float32 and the sums in float64. Logits of
    one micro-batch are the most that is held (two with `against`); they are turned to float32 in pieces of 16 MB.

    Args:
        model: a Hugging Face causal language model, or any module that maps ids (samples, length) to logits (samples, length, vocabulary).
        text: windows from `data.windows`, or others; padding is not judged.
        against: the original, to get KL(original || model) and the agreement of first choices.
        stride: judge overlapping windows, each this many tokens after the one before, so that tokens have at least `length - stride`
            tokens of context; needs windows from `data.windows`. None: the windows as they are, whose first tokens are not judged.
        batch: windows in a micro-batch; by default the text's own.
        progress: told of each micro-batch.

    Returns:
        `Measurement`, with one entry a document in ascending order; one a window where there is only one document.

    Raises:
        DataError: the inputs are not token ids or not this model's, nothing to judge, or a stride that does not fit.
        ModelError: the model gives no logits, or `against` has another vocabulary.
        NonFiniteError: NaN in the logits, or a token of probability zero.

    Example:
        >>> model = nn.Embedding(5, 5)
        >>> same = evaluate(model, Calibration.from_tensors(torch.tensor([[0, 1, 2], [2, 3, 4]])), against=model)
        >>> same.tokens, same.kl, same.agreement
        (4, 0.0, 1.0)

    References:
        Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", 1977.
    """
    if text.inputs.dtype != torch.int64:
        raise DataError(f"inputs are {text.inputs.dtype}; a language model is judged on int64 token ids")
    batch = text.batch if batch is None else batch
    if batch < 1:
        raise DataError(f"batch is {batch}; expected at least 1")
    if stride is not None:
        text = text.strided(stride)
    models = [model] if against is None else [model, against]
    for each in models:
        check_fits(each, text)
    judged = _judged(text)
    if not bool(judged.any()):
        raise DataError("no token has another before it, so there is nothing to judge: give longer text")
    sums = torch.zeros(len(text), 4 if against is not None else 2, dtype=torch.float64)
    with judging(*models):
        starts = range(0, len(text), batch)
        for first in track(starts, "evaluate", len(starts), progress):
            rows = slice(first, first + batch)
            sums[rows] = _micro_batch(models, text.inputs[rows], None if text.valid is None else text.valid[rows], judged[rows], first)
    return _measurement(text, judged.sum(dim=1), sums)


def _judged(text: Calibration) -> Bool[Tensor, "samples length"]:
    """Which tokens count: valid ones after a valid one, each position of a document once."""
    valid = torch.ones_like(text.inputs, dtype=torch.bool) if text.valid is None else text.valid
    judged = torch.zeros_like(valid)
    judged[:, 1:] = valid[:, 1:] & valid[:, :-1]
    if text.start is not None:
        covered: dict[int, int] = {}
        for row, (document, start) in enumerate(zip(text.document.tolist(), text.start.tolist(), strict=True)):
            end = covered.get(document, 0)
            judged[row, : max(0, end - start)] = False
            covered[document] = max(end, start + int(valid[row].sum()))
    return judged


def _micro_batch(models: list[nn.Module], inputs: Tensor, valid: Tensor | None, judged: Tensor, first: int) -> Float64[Tensor, "rows sums"]:
    """Per window: nats, hits, and with two models also divergence and agreements."""
    longest = inputs.shape[1]
    if valid is not None:
        longest = int(valid.any(dim=0).nonzero().max()) + 1  # columns that are padding in all windows cost time and tell nothing
        valid = valid[:, :longest]
    outputs = [logits(each, inputs[:, :longest], valid) for each in models]
    if len(outputs) == 2 and outputs[0].shape != outputs[1].shape:
        raise ModelError(f"the models give {outputs[0].shape[-1]} and {outputs[1].shape[-1]} logits a token; expected one vocabulary")
    window, position = judged[:, :longest].nonzero(as_tuple=True)
    targets = inputs[window, position]
    sums = torch.zeros(len(inputs), 2 * len(models), dtype=torch.float64)
    for piece in torch.arange(len(window)).split(max(1, CHUNK // outputs[0].shape[-1])):
        rows, columns = window[piece], position[piece] - 1
        values = _per_token([output[rows.to(output.device), columns.to(output.device)] for output in outputs], targets[piece])
        bad = ~torch.isfinite(values).all(dim=1)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"NaN, or a probability of zero, for the token at position {int(position[piece][at])} of window {first + int(rows[at])}: "
                "the model's weights or activations overflow, or a weight is NaN"
            )
        sums.index_add_(0, rows, values)
    return sums


def _per_token(scores: list[Float[Tensor, "tokens vocabulary"]], targets: Int64[Tensor, " tokens"]) -> Float64[Tensor, "tokens sums"]:
    log_probabilities = torch.log_softmax(scores[0].float(), dim=-1)
    best = log_probabilities.argmax(dim=-1)
    target = targets.to(best.device)
    columns = [-log_probabilities.gather(1, target[:, None])[:, 0], best == target]
    if len(scores) == 2:
        original = torch.log_softmax(scores[1].float(), dim=-1).to(best.device)
        probabilities = original.exp()
        terms = probabilities * (original - log_probabilities)
        terms.masked_fill_(probabilities == 0, 0.0)  # 0 log 0 is 0, also where both models rule a token out
        columns += [terms.sum(dim=-1, dtype=torch.float64), original.argmax(dim=-1) == best]
    return torch.stack([column.double().cpu() for column in columns], dim=1)


def _measurement(text: Calibration, counts: Int64[Tensor, " samples"], sums: Float64[Tensor, "samples sums"]) -> Measurement:
    units, index = np.unique(text.document.numpy(), return_inverse=True)
    unit = "document"
    if len(units) == 1:
        units, index, unit = np.arange(len(text)), np.arange(len(text)), "window"
    totals = np.zeros((len(units), sums.shape[1] + 1))
    np.add.at(totals, index, torch.cat([counts[:, None].double(), sums], dim=1).numpy())  # in sample order: the same bits every time
    some = totals[:, 0] > 0
    totals, units = totals[some], units[some]
    whole = totals.astype(np.int64)
    pair = sums.shape[1] == 4
    return Measurement(
        nats=totals[:, 1].copy(),
        counts=whole[:, 0].copy(),
        hits=whole[:, 2].copy(),
        divergence=totals[:, 3].copy() if pair else None,
        agreements=whole[:, 4].copy() if pair else None,
        document=units.astype(np.int64),
        unit=unit,
        text=text.digest,
    )


def compare(a: Measurement, b: Measurement, *, seed: Seed = 0, resamples: int = 2000, confidence: float = 0.95) -> Difference:
    """Compare two models measured on the same text: a paired bootstrap over its documents.

    The statistic is the token-weighted difference of the losses, sum(nats_b - nats_a) / sum(tokens), which is the logarithm of the ratio
    of the perplexities. It is recomputed on `resamples` draws of documents with replacement; the interval is that of the percentiles.

    Args:
        a: the model to compare with, usually the original.
        b: the model that is compared.
        seed: decides the draws; the same seed gives the same interval.
        resamples: number of draws, at least 100.
        confidence: between 0 and 1.

    Returns:
        `Difference`; positive means that `b` is worse.

    Raises:
        InputError: measured on different text, or a setting out of range.

    Example:
        >>> text = Calibration.from_tensors(torch.tensor([[0, 1, 2], [2, 3, 4]]))
        >>> measured = evaluate(nn.Embedding(5, 5), text)
        >>> compare(measured, measured).interval
        (0.0, 0.0)

    References:
        Koehn, "Statistical significance tests for machine translation evaluation", 2004.
    """
    if a.text != b.text or not np.array_equal(a.counts, b.counts):
        raise InputError("the two were measured on different text or with different strides; a paired comparison needs the same windows")
    estimate, low, high = paired_bootstrap(
        b.nats - a.nats, a.counts.astype(np.float64), seed=seed, resamples=resamples, confidence=confidence
    )
    return Difference(estimate, (low, high), confidence, len(a.counts), a.unit, resamples)


def paired_bootstrap(
    numerators: Float64[np.ndarray, " units"],
    denominators: Float64[np.ndarray, " weights"],
    *,
    seed: Seed = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Percentile bootstrap of the ratio sum(numerators) / sum(denominators), units drawn with replacement.

    For a comparison the numerators are the differences of paired sums; for one arm they are its sums, for example
    `paired_bootstrap(m.divergence, m.counts.astype(float))` for the interval of a KL.

    Args:
        numerators: one value a unit.
        denominators: one positive weight a unit.
        seed: decides the draws.
        resamples: number of draws, at least 100.
        confidence: between 0 and 1.

    Returns:
        (estimate, low, high); low and high are infinite where there is only one unit, which tells nothing about others.

    Raises:
        InputError: shapes, weights or settings out of range.

    Example:
        >>> paired_bootstrap(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
        (0.5, 0.5, 0.5)

    References:
        Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.
    """
    if len(numerators) != len(denominators) or len(numerators) == 0:
        raise InputError(f"{len(numerators)} numerators and {len(denominators)} denominators; expected as many of both, at least one")
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all() and (denominators > 0).all()):
        raise InputError("numerators must be finite and denominators positive")
    if resamples < 100:
        raise InputError(f"resamples is {resamples}; expected at least 100, 2000 for a 95 % interval")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; expected between 0 and 1, for example 0.95")
    units = len(numerators)
    estimate = float(numerators.sum() / denominators.sum())
    if units == 1:
        return estimate, -math.inf, math.inf
    draw = generator(seed)
    ratios = []
    for count in _parts(resamples, max(1, RESAMPLED // units)):
        chosen = torch.randint(units, (count, units), generator=draw).numpy()
        ratios.append(numerators[chosen].sum(axis=1) / denominators[chosen].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return estimate, float(low), float(high)


def _parts(total: int, most: int) -> Iterator[int]:
    for first in range(0, total, most):
        yield min(most, total - first)


@contextmanager
def judging(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on the way out, also after a raise, the modes of all modules and the RNG are as they were."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    # no_grad, not inference_mode: buffers that a model caches in its forward must stay usable for training.
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def generate(model: nn.Module, tokenizer: Any, prompt: str, *, new_tokens: int = 64) -> str:
    """The model's greedy continuation of a prompt: the same every time, without the prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue; may be empty if the tokenizer has a beginning or end token.
        new_tokens: the most tokens to add, at least 1.

    Raises:
        InputError: `new_tokens` out of range, nothing to start from, or more than the model's context holds.
        ModelError: the model gives no logits.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = ([] if begin is None else [begin]) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens}; expected at least 1")
    if not ids:
        raise InputError("the prompt is empty and the tokenizer has no beginning token: give a prompt")
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < len(ids) + new_tokens:
        raise InputError(f"{len(ids)} tokens of prompt and {new_tokens} new ones; the model has a context of {context}: ask for fewer")
    # Not `model.generate`: it fills in what the checkpoint recommends (penalties), which would hide what compression did.
    sequence, cache, fed = torch.tensor([ids]), None, 0
    with judging(model):
        while sequence.shape[1] < len(ids) + new_tokens:
            scores, cache = _next_scores(model, sequence[:, fed:], cache)
            fed = sequence.shape[1] if cache is not None else 0
            token = scores.argmax().cpu().view(1, 1)
            if int(token) == tokenizer.eos_token_id:
                break
            sequence = torch.cat([sequence, token], dim=1)
    return tokenizer.decode(sequence[0, len(ids) :], skip_special_tokens=True)


def _next_scores(model: nn.Module, new: Int64[Tensor, "1 new"], cache: Any) -> tuple[Float[Tensor, " vocabulary"], Any]:
    """Logits after the last token, and the key-value cache that saves feeding the sequence again (None for models without one)."""
    if not hasattr(model, "generate"):
        return logits(model, new)[0, -1], None
    output = model(input_ids=new.to(next(model.parameters()).device), past_key_values=cache, use_cache=True)
    return output.logits[0, -1], output.past_key_values


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files in a folder and below, links followed once.

    Raises:
        FileError: no such path.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"no such path: {path}")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in {file.resolve() for file in files})


class PeakMemory:
    """Peak memory of a piece of work, above what the process held when it began.

    A thread reads the resident set size every 5 ms; where the operating system's own record for the process rises meanwhile, that is
    taken too, so that a short peak between two reads is not missed when it is the highest of the process.

    Attributes:
        start: resident bytes at the beginning.
        peak: highest resident bytes seen.

    Example:
        >>> with PeakMemory() as memory:
        ...     block = torch.ones(2**22)
        >>> memory.bytes >= 0
        True
    """

    def __init__(self, *, interval: float = 0.005) -> None:
        """Args: interval: seconds between two reads."""
        if interval <= 0:
            raise InputError(f"interval is {interval}; expected seconds above 0")
        self.start = 0
        self.peak = 0
        self._interval = interval
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._record = 0

    @property
    def bytes(self) -> int:
        """Peak above the start; readable during the work too."""
        return max(0, self.peak - self.start)

    def __enter__(self) -> "PeakMemory":
        self._done.clear()
        self._record = _record_rss()
        self.start = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True, name="peak-memory")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self._read()
        record = _record_rss()
        if record > self._record:
            self.peak = max(self.peak, record)

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self._read()

    def _read(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)


def _record_rss() -> int:
    """Highest resident bytes of this process so far, 0 where the system keeps no such record."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def latency(model: nn.Module, inputs: Int64[Tensor, "samples length"], *, repeats: int = 5) -> Latency:
    """Median seconds of a forward pass over `inputs`, and of decoding one more token after it with the key-value cache.

    One pass warms up and is not counted. The numbers hold for this machine, its thread count and its load.

    Args:
        model: a Hugging Face causal language model, or a module that maps ids to logits (then `decode` is None).
        inputs: token ids.
        repeats: measurements of each, at least 1.

    Raises:
        InputError: `repeats` out of range.
        ModelError: the model gives no logits.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; expected at least 1")
    with judging(model):
        chosen = logits(model, inputs)[:, -1:].argmax(dim=-1)
        prefill = statistics.median(_seconds(lambda: logits(model, inputs), chosen.device) for _ in range(repeats))
        decode = _decode_seconds(model, inputs, chosen, repeats)
    return Latency(prefill, prefill / inputs.numel(), decode, repeats)


def _decode_seconds(model: nn.Module, inputs: Tensor, chosen: Tensor, repeats: int) -> float | None:
    if not hasattr(model, "generate"):
        return None
    # One token of room in the model's context is enough: the cache is cut back after each measurement.
    cache = model(
        input_ids=inputs[:, :-1].to(chosen.device) if inputs.shape[1] > 1 else inputs.to(chosen.device), use_cache=True
    ).past_key_values
    if cache is None or not hasattr(cache, "crop"):
        return None
    times = []
    for _ in range(repeats + 1):
        times.append(_seconds(lambda: model(input_ids=chosen, past_key_values=cache, use_cache=True), chosen.device))
        cache.crop(-1)
    return statistics.median(times[1:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _percent(log_ratio: float) -> float:
    try:
        return 100 * math.expm1(log_ratio)
    except OverflowError:
        return math.inf
