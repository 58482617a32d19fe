"""How well two orders agree, with what chance and another text would do to the number: pure functions over arrays, a row for each order."""

import itertools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy import stats

EXACT_UNITS = 8
"""Up to this many units all permutations are tried."""
PERMUTATIONS = 10_000


def draws(documents: int, resamples: int, draw: torch.Generator) -> Float64[np.ndarray, "resamples documents"]:
    """How often each document is drawn in each resample."""
    chosen = torch.randint(documents, (resamples, documents), generator=draw)
    return (
        torch.zeros(resamples, documents, dtype=torch.float64).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64)).numpy()
    )


def interval(values: Float64[np.ndarray, "resamples *units"], confidence: float | int) -> Any:
    tail = (1 - confidence) / 2
    return np.quantile(values, [tail, 1 - tail], axis=0)


def standard(values: Float64[np.ndarray, "rows units"]) -> Float64[np.ndarray, "rows units"]:
    """Ranks of each row, equal ones sharing theirs, with mean 0 and length 1; all zero where every value is equal."""
    ranks = stats.rankdata(values, axis=1)
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)


def spearman(a: Float64[np.ndarray, "a units"], b: Float64[np.ndarray, "b units"]) -> Float64[np.ndarray, "a b"]:
    """Rank correlation of every row of one with every row of the other; 0 where a row is constant."""
    return standard(a) @ standard(b).T


def permutations(count: int, draw: torch.Generator) -> tuple[Int64[np.ndarray, "permutations units"], bool]:
    """All permutations of few units, or many drawn ones; and whether they are all."""
    if count <= EXACT_UNITS:
        return np.array(list(itertools.permutations(range(count)))), True
    return torch.rand(PERMUTATIONS, count, generator=draw).argsort(1).numpy(), False


def share_above(by_chance: Float64[np.ndarray, " permutations"], observed: float, exact: bool) -> float:
    above = int((by_chance >= observed - 1e-12).sum())
    return above / len(by_chance) if exact else (above + 1) / (len(by_chance) + 1)
