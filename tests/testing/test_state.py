"""States: two of them are equal exactly if nothing that is looked at changed."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from whatmatters.testing.state import changes, outline_of, state_of


@dataclass(frozen=True)
class Place:
    name: str
    shape: tuple[int, int]


def test_sharing_what_cannot_change_says_nothing() -> None:
    shape = (8, 16)
    shared = [Place("a", shape), Place("b", shape)]
    apart = [Place("a", (int("8"), 16)), Place("b", (int("8"), 16))]
    assert not changes(state_of(shared), state_of(apart))
    assert not changes(state_of([shared[0], shared[0]]), state_of([shared[0], copy.deepcopy(shared[0])]))


def test_a_cycle_ends() -> None:
    told: dict[str, Any] = {"first": (1, [2])}
    told["itself"] = told
    assert not changes(state_of(told), state_of(told))


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda on: on[0].weight.data.add_(1), "[0].weight"),
        (lambda on: on[0].eval(), "[0].training"),
        (lambda on: on[0].register_forward_hook(print), "[0]._forward_hooks"),
        (lambda on: on[0].weight.requires_grad_(False), "[0].weight"),
        (lambda on: setattr(on[0].weight, "grad", torch.ones_like(on[0].weight)), "[0].weight.grad"),
        (lambda on: setattr(on[0], "forward", print), "[0].forward"),
        (lambda on: on[1]["array"].__setitem__(0, 7.0), "[1]['array']"),
        (lambda on: on[1]["list"].append(3), "[1]['list']"),
        (lambda on: on[1].__setitem__("new", 1), "[1]['new']"),
        (lambda on: on[2].manual_seed(1), "[2].state"),
    ],
)
def test_every_change_is_told_with_its_place(change: Any, path: str) -> None:
    on = [nn.Linear(2, 2), {"array": np.array([np.nan, 1.0]), "list": [1]}, torch.Generator()]
    before = state_of(on)
    assert not changes(before, state_of(on)), "NaN is equal to NaN"
    change(on)
    differing = changes(before, state_of(on))
    assert any(found.startswith(path) for found in differing)
    root = path.partition("]")[0]
    assert all(found.startswith(root) for found in differing), "nothing else is told"


def test_an_outline_leaves_the_numbers_out() -> None:
    layer = nn.Linear(2, 2)
    before = outline_of(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    assert not changes(before, outline_of(layer))
    layer.eval()
    assert changes(before, outline_of(layer)) == [".training"]
