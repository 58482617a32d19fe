"""Measures: one number from a matrix of representations."""

from collections.abc import Callable

import torch
from torch import Tensor

from whatmatters.core.catalog import Entry
from whatmatters.testing.forms import Form


def _subject(seed: int) -> Tensor:
    return torch.randn(96, 12, generator=torch.Generator().manual_seed(seed)) @ torch.diag(torch.linspace(1, 0.1, 12))


def _call(entry: Entry, subject: Tensor, **settings: object) -> float:
    return float(entry.function(subject, **settings))


def _with(place: tuple[int, int], value: float) -> Callable[[Tensor], Tensor]:
    def broken(subject: Tensor) -> Tensor:
        changed = subject.clone()
        changed[place] = value
        return changed

    return broken


FORM = Form(
    subject=_subject,
    call=_call,
    outcome=lambda result, subject: {"value": torch.tensor(result, dtype=torch.float64)},
    bad_subjects={
        "NaN": _with((3, 1), float("nan")),
        "infinity": _with((0, 0), float("inf")),
        "one row": lambda subject: subject[:1],
        "no columns": lambda subject: subject[:, :0],
        "three dimensions": lambda subject: subject[None],
    },
    bad_settings={"eps": [-1.0, float("nan")], "route": ["qr"]},
)
