"""Parametrizations: a module's weights are expressed in other numbers while it trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import Entry
from whatmatters.testing.forms import Form

Subject = tuple[Any, Tensor]


def _subject(seed: int) -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    return module, torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def _call(entry: Entry, subject: Subject, **settings: object) -> nn.Module:
    return entry.function(subject[0], **settings)


def _outcome(result: nn.Module, subject: Subject) -> dict[str, Tensor]:
    return {"output": result(subject[1]).detach(), **{name: value.detach().clone() for name, value in result.state_dict().items()}}


def _broken(change: Callable[[Any], object]) -> Callable[[Subject], Subject]:
    def broken(subject: Subject) -> Subject:
        with torch.no_grad():
            change(subject[0])
        return subject

    return broken


FORM = Form(
    subject=_subject,
    call=_call,
    outcome=_outcome,
    changes=True,
    bad_subjects={
        "NaN in a weight": _broken(lambda module: module[3].weight.fill_(torch.nan)),
        "no weights": lambda subject: (nn.Sequential(nn.ReLU()), subject[1]),
        "parametrized already": _broken(lambda module: nn.utils.parametrizations.weight_norm(module[3])),
    },
    bad_settings={
        "a": [0.0, -1.0, float("nan"), 1e-6], "slope": [0.0, float("inf")], "per": ["row"], "init": ["zero"], "exclude": [("absent",)],
    },
)  # fmt: skip
