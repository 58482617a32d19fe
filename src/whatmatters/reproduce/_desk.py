"""What experiments on language models share: models with a text of their own, arms that are measured once, and claims about them."""

import copy
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import nn

from whatmatters.core import checkpoint, embedded
from whatmatters.core.checkpoint import atomic_file
from whatmatters.core.data import Calibration, calibration, documents, windows
from whatmatters.core.errors import InputError
from whatmatters.core.evaluate import evaluate, paired_bootstrap
from whatmatters.core.seeds import derived, generator
from whatmatters.reproduce._common import CONFIDENCE, Claim, Tier, below, from_interval

Scale = Literal["smoke", "desk", "gpu"]
"""How much is computed: "smoke" a tiny untrained model in seconds, "desk" minutes on two cores, "gpu" sizes of the papers."""

VOCABULARY = 512
"""Tokens of the untrained model of a smoke run; larger ids are folded into them."""


@dataclass(frozen=True)
class Sizes:
    """How much text an experiment uses.

    Attributes:
        samples: calibration windows of a draw.
        length: tokens in each, and in each window that is judged.
        documents: most documents that are judged, of each split.
        windows: most windows of each of them.
        repeats: calibration draws for each seed; cheap models can have more.
    """

    samples: int
    length: int
    documents: int
    windows: int
    repeats: int = 1


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with text it knows, in three parts that share no document.

    Attributes:
        name: for people.
        tier: "desk", or "public" for a model that the user named.
        model: never changed; experiments work on copies.
        tokenizer: its tokenizer.
        texts: documents by split: "calibration"; "validation", for whatever is chosen by looking; "test", for what is reported.
        sizes: how much of them is used.
        about: where model and text come from, JSON-able.
    """

    name: str
    tier: Tier
    model: nn.Module
    tokenizer: Any
    texts: Mapping[str, Sequence[str]]
    sizes: Sizes
    about: Mapping[str, Any]

    def calibration(self, seed: int) -> Calibration:
        """A draw of calibration windows."""
        drawn = calibration(self.tokenizer, self.texts["calibration"], samples=self.sizes.samples, length=self.sizes.length, seed=seed)
        return self._known(drawn)

    def windows(self, split: str) -> Calibration:
        """The windows of a split that are judged."""
        chosen = self.texts[split][: self.sizes.documents]
        return self._known(windows(self.tokenizer, chosen, self.sizes.length, per_document=self.sizes.windows))

    def copy(self) -> nn.Module:
        """A model to work on."""
        return copy.deepcopy(self.model)

    def _known(self, text: Calibration) -> Calibration:
        size = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        if int(text.inputs.max()) < size:
            return text
        return Calibration(text.inputs % size, text.valid, text.document, text.batch, text.source, text.start)


def subjects(sizes: Mapping[str, Sizes], *, model: str | os.PathLike[str] | None, scale: Scale) -> tuple[list[Subject], list[str]]:
    """The models of an experiment, and notes on those that are not at hand.

    Args:
        sizes: how much text for "embedded", "stories" and "public".
        model: path or hub id of a further model; it is given the text at hand that it predicts best.
        scale: "smoke" for a single tiny untrained model in their place.
    """
    if scale == "smoke":
        return [_untrained(sizes["embedded"])], []
    found, notes = [_embedded(sizes["embedded"])], []
    folder = shared_data()
    if folder is not None and (folder / "stories260k" / "hf").is_dir():
        found.insert(0, _stories(folder, sizes["stories"]))
    else:
        notes.append("stories260k was skipped: set WHATMATTERS_DATA to a folder that holds stories260k and tinystories_text")
    if model is not None:
        found.append(_public(model, sizes["public"], scale))
    return found, notes


def shared_data() -> Path | None:
    """The folder of shared data sets: WHATMATTERS_DATA, or `../shared/data` beside a checkout; None where there is none."""
    given = os.environ.get("WHATMATTERS_DATA")
    folder = Path(given) if given else Path(__file__).parents[4] / "shared" / "data"
    return folder if folder.is_dir() else None


def _embedded(sizes: Sizes) -> Subject:
    model, tokenizer = embedded.load()
    about = {
        "interpreter": embedded.interpreter(),
        "validation": embedded.split_digest("validation"),
        "test": embedded.split_digest("test"),
    }
    return Subject("pylib-lm", "desk", model, tokenizer, _library(), sizes, about)


def _library() -> dict[str, list[str]]:
    """The embedded model's text: every other validation file to calibrate on, the rest to choose by; the test files to judge."""
    validation = embedded.documents("validation")
    return {"calibration": validation[::2], "validation": validation[1::2], "test": embedded.documents("test")}


def _stories(folder: Path, sizes: Sizes) -> Subject:
    model, tokenizer = checkpoint.load(folder / "stories260k" / "hf")
    return Subject("stories260k", "desk", model, tokenizer, _tales(folder), sizes, {"text": "tinystories_text/stories_800.json"})


def _tales(folder: Path) -> dict[str, list[str]]:
    tales = json.loads((folder / "tinystories_text" / "stories_800.json").read_text(encoding="utf-8"))
    return {"calibration": tales[:300], "validation": tales[300:450], "test": tales[450:]}


def _public(model: str | os.PathLike[str], sizes: Sizes, scale: Scale) -> Subject:
    loaded, tokenizer = checkpoint.load(model)
    if scale == "gpu" and torch.accelerator.is_available():
        nn.Module.to(loaded, torch.accelerator.current_accelerator())
    texts = {"standard library": _library()}
    folder = shared_data()
    if folder is not None:
        texts["tinystories"] = _tales(folder)
        text = documents(folder / "wikitext2_valid" / "valid.txt")[0]
        articles = ["\n = " + part for part in text.split("\n = ") if len(part) > 200]  # every section is a document
        texts["wikitext2"] = {"calibration": articles[::2], "validation": articles[1::4], "test": articles[3::4]}

    def nats_per_byte(name: str) -> float:
        some = [text[:2000] for text in texts[name]["validation"][:8]]
        measured = evaluate(loaded, windows(tokenizer, some, min(sizes.length, 256), per_document=1))
        return float(measured.nats.sum()) / sum(len(text.encode()) for text in some)

    best = min(texts, key=nats_per_byte)
    return Subject(str(model), "public", loaded, tokenizer, texts[best], sizes, {"text": best})


def _untrained(sizes: Sizes) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = embedded.load()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    return Subject("untrained", "desk", model, tokenizer, _library(), sizes, {"text": "standard library"})


@dataclass(frozen=True, eq=False)
class Measured:
    """What one arm gave.

    Attributes:
        nats: negative log-likelihood of each document.
        counts: judged tokens of each.
        seconds: processor time that making the arm took, judging it left out.
        facts: whatever else the arm wants to be remembered, JSON-able.
    """

    nats: Float64[np.ndarray, " documents"]
    counts: Int64[np.ndarray, " documents"]
    seconds: float
    facts: Mapping[str, Any]

    @property
    def loss(self) -> float:
        """Nats a token: the logarithm of the perplexity."""
        return float(self.nats.sum() / self.counts.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))


class Arms:
    """Measures arms, each once; with a folder they are kept, so that an experiment that was cut off goes on where it was.

    Args:
        scratch: folder to keep them in; None: keep nothing. What is kept belongs to one state of the code: `code` is part of its key.
        code: digest of the experiment's code.
    """

    def __init__(self, scratch: Path | None, code: str) -> None:
        self.scratch = scratch
        self.code = code
        self.known: dict[str, list[Measured]] = {}
        self.kept = 0

    def measure(
        self,
        subject: Subject,
        name: Sequence[object],
        make: Callable[[nn.Module], Mapping[str, Any]],
        text: Calibration,
    ) -> Measured:
        """Make an arm of a copy of the subject's model and judge it.

        Args:
            subject: the model.
            name: what tells this arm from others of the subject, the calibration draw included.
            make: changes the model it is given; returns facts to be remembered.
            text: what it is judged on.
        """

        def compute() -> list[dict[str, Any]]:
            model = subject.copy()
            begin = time.process_time()
            facts = dict(make(model))
            seconds = time.process_time() - begin
            judged = evaluate(model, text)
            return [{"nats": judged.nats.tolist(), "counts": judged.counts.tolist(), "seconds": seconds, "facts": facts}]

        return self.remember([subject.name, *name, text.digest], compute)[0]

    def remember(self, name: Sequence[object], compute: Callable[[], list[dict[str, Any]]]) -> list[Measured]:
        """What `compute` gives, or gave under the same name and code."""
        key = hashlib.sha256(json.dumps([self.code, *map(str, name)]).encode()).hexdigest()[:24]
        if key not in self.known:
            path = None if self.scratch is None else self.scratch / f"{key}.json"
            if path is not None and path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
                self.kept += 1
            else:
                found = compute()
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_file(path) as temporary:
                        temporary.write_text(json.dumps(found), encoding="utf-8")
            self.known[key] = [
                Measured(np.array(f["nats"]), np.array(f["counts"], dtype=np.int64), f["seconds"], f["facts"]) for f in found
            ]
        return self.known[key]

    def account(self) -> dict[str, Any]:
        """How much was measured: the evidence's own seconds leave out what an earlier start had measured."""
        seconds = sum(arm.seconds for arms in self.known.values() for arm in arms)
        return {"measured": len(self.known), "kept_from_an_earlier_start": self.kept, "processor_seconds": round(seconds, 1)}


def pooled(arms: Sequence[Measured]) -> Measured:
    """The mean over calibration draws, document by document."""
    return Measured(np.mean([arm.nats for arm in arms], axis=0), arms[0].counts, float(np.mean([arm.seconds for arm in arms])), {})


def difference(a: Measured, b: Measured) -> tuple[float, float, float]:
    """loss(b) - loss(a) in nats a token, with its interval by a paired bootstrap over documents."""
    return paired_bootstrap(b.nats - a.nats, a.counts.astype(np.float64), confidence=CONFIDENCE)


def change(a: Measured, b: Measured) -> dict[str, Any]:
    """How much the perplexity rises from `a` to `b`, in percent, with its interval over documents."""
    effect, low, high = (100 * float(np.expm1(value)) for value in difference(a, b))
    return {"perplexity": b.perplexity, "change_percent": effect, "interval_percent": [low, high]}


def compared(claim: str, tier: Tier, a: Sequence[Measured], b: Sequence[Measured], bound: float = 0.0) -> list[Claim]:
    """Two claims that loss(b) - loss(a) is below `bound`: over calibration draws (t), and over documents of the mean draw (bootstrap)."""
    effect, low, high = difference(pooled(a), pooled(b))
    return [
        below(f"{claim} (over calibration draws)", tier, [y.loss - x.loss for x, y in zip(a, b, strict=True)], bound),
        from_interval(f"{claim} (over documents)", tier, effect, (low, high), bound),
    ]


def check_seeds(seeds: int) -> list[int]:
    """0, 1, ... ; raises InputError below three."""
    if isinstance(seeds, bool) or seeds < 3:
        raise InputError(f"seeds is {seeds}; expected at least 3 draws, or no interval means anything")
    return list(range(seeds))


def shuffles(names: Sequence[str], count: int, *, limit: int = 720) -> tuple[list[list[str]], list[list[str]]]:
    """Some random orders of names, and the population they are judged in: all orders if these are at most `limit`, else the random ones."""
    drawn = []
    for number in range(count):
        order = torch.randperm(len(names), generator=generator(derived(0, "order", number))).tolist()
        drawn.append([names[i] for i in order])
    total = int(np.prod(np.arange(1, len(names) + 1), dtype=np.float64))
    return drawn, [list(order) for order in itertools.permutations(names)] if total <= limit else drawn
