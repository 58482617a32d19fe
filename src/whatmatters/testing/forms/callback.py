"""Callbacks of a training loop: attached to a model and its optimizer, told of each step, detached."""

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import Entry
from whatmatters.testing.families import build, inputs
from whatmatters.testing.forms import Form

Subject = tuple[nn.Module, Tensor]


def _subject(seed: int) -> Subject:
    return build("llama", seed), inputs("llama", samples=4, length=12, seed=seed + 1)


def _call(entry: Entry, subject: Subject, **settings: object) -> object:
    model, ids = subject
    tuner = entry.function(**settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with tuner.attach(model, optimizer):
        for step in range(4):
            tuner.before_step(step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return tuner


def _outcome(result: object, subject: Subject) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in subject[0].state_dict().items()}


def _quantized(subject: Subject) -> Subject:
    weight = subject[0].get_parameter("model.layers.0.mlp.up_proj.weight")
    subject[0].get_submodule("model.layers.0.mlp.up_proj").weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    return subject


FORM = Form(
    subject=_subject,
    call=_call,
    outcome=_outcome,
    samples={"n_active": 1, "interval": 2},
    bad_subjects={
        "no layers": lambda subject: (nn.Linear(4, 4), subject[1]),
        "a layer frozen by its user": lambda subject: (subject[0].requires_grad_(False), subject[1]),
        "quantized weights": _quantized,
    },
    bad_settings={"n_active": [-1, 99], "interval": [0], "state": ["forget"], "weights": [(1.0,), (-1.0, 1.0)], "layers": [("absent",)]},
    changes=True,
)
