"""Selectors: estimators that are fitted on raw and target texts and then choose k of the raw ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whatmatters.core.catalog import Entry
from whatmatters.testing.forms import Form

__all__ = ["FORM"]

COUNT = 8


def subject(seed: int) -> dict[str, list[str]]:
    """Texts of two kinds of words; the target is of one of them."""
    draw = np.random.default_rng(seed)
    kinds = [["sea", "ship", "sail", "wave", "storm", "harbour"], ["bank", "bond", "stock", "price", "share", "market"]]
    texts = [" ".join(draw.choice(kinds[row % 2], 12)) for row in range(50)]
    return {"raw": texts[:40], "target": texts[40::2]}


def call(entry: Entry, subject: Mapping[str, Any], **settings: Any) -> Any:
    """Build, fit, select. Settings that `select` takes go there, `progress` to both."""
    chosen = {name: settings.pop(name) for name in ("seed", "top_k") if name in settings}
    told = {name: settings.pop(name) for name in ("progress",) if name in settings}
    k = settings.pop("k", COUNT)
    return entry.function(**settings).fit(**subject, **told).select(k, **chosen, **told)


def outcome(selection: Any, subject: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Which were chosen, with what weights, and how near they are to the target."""
    return {
        "indices": torch.from_numpy(selection.indices.copy()),
        "log_weight": torch.from_numpy(selection.log_weight.copy()),
        "inclusion_probability": torch.from_numpy(selection.inclusion_probability.copy()),
        "kl_reduction": torch.tensor(selection.kl_reduction),
    }


FORM = Form(
    subject=subject,
    call=call,
    outcome=outcome,
    samples={"min_tokens": 1, "k": COUNT, "temperature": 20.0, "n_jobs": 1},
    bad_subjects={
        "no raw texts": lambda good: {**good, "raw": []},
        "no target texts": lambda good: {**good, "target": []},
        "blank target": lambda good: {**good, "target": ["", "  "]},
        "numbers for texts": lambda good: {**good, "raw": [1, 2, 3]},
        "no such file": lambda good: {**good, "raw": "no/such/file.jsonl"},
    },
    bad_settings={
        "k": [0, -1, 1000],
        "ngrams": [0, 17],
        "num_buckets": [1, 2**40],
        "hash": ["md5"],
        "tokenizer": ["letters"],
        "target_smoothing": [-1.0, float("nan")],
        "temperature": [0.0, float("inf")],
        "min_tokens": [-1],
        "max_ngrams": [0],
        "n_jobs": [0],
        "engine": ["spark"],
        "kernel": ["cuda"],
    },
)
