"""Plans: what they refuse, that they stay what they are, and what they tell. Saving and reading: test_records."""

import math
from typing import Any

import pytest
import torch

from whatmatters.core.errors import InputError, InputTypeError, MissingExtraError, NonFiniteError
from whatmatters.core.plans import Plan
from whatmatters.core.sites import Site, Structure

STRUCTURE = Structure(("h.0",), (Site("h.0.a", "h.0.a.weight", (2, 3), "h.0"), Site("h.0.b", "h.0.b.weight", (3, 3), "h.0")))


def plan(kind: str, values: Any, **more: Any) -> Plan:
    return Plan(**({"kind": kind, "values": values, "budget": {}, "account": {}, "method": "mine", "settings": {}} | more))


@pytest.mark.parametrize(
    ("kind", "values", "error"),
    [("votes", {"a": 1}, InputError), ("bits", {}, InputError), ("bits", {"": 3}, InputError), ("bits", {"a": 0}, InputError),
     ("bits", {"a": 33}, InputError), ("bits", {"a": 3.0}, InputTypeError), ("bits", {"a": True}, InputTypeError),
     ("bits", {"a": torch.ones(2, 2)}, InputTypeError), ("ratio", {"a": 1.1}, InputError), ("ratio", {"a": -0.1}, InputError),
     ("ratio", {"a": 10**400}, InputError), ("ratio", {"a": math.nan}, NonFiniteError), ("ratio", {"a": True}, InputTypeError),
     ("mask", {"a": 1}, InputTypeError), ("mask", {"a": torch.ones(2, 2)}, InputTypeError),
     ("mask", {"a": torch.ones(2).bool()}, InputError),
     ("mask", {"a": torch.ones(0, 2).bool()}, InputError), ("sampling", {"a": 0.5}, InputTypeError),
     ("sampling", {"a": torch.tensor([1.5])}, InputError), ("sampling", {"a": torch.tensor([-0.5])}, InputError),
     ("sampling", {"a": torch.tensor([math.nan])}, NonFiniteError), ("sampling", {"a": torch.ones(0)}, InputError),
     ("sampling", {"a": torch.ones(2).bool()}, InputTypeError)],
)  # fmt: skip
def test_refused(kind: str, values: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        plan(kind, values)


def test_a_structure_is_obeyed() -> None:
    plan("bits", {"h.0.a": 3}, structure=STRUCTURE)
    plan("mask", {"h.0.a": torch.ones(2, 3).bool()}, structure=STRUCTURE)
    for kind, values in (("bits", {"h.0.c": 3}), ("ratio", {"h.0": 0.5}), ("mask", {"h.0.a": torch.ones(3, 2).bool()})):
        with pytest.raises(InputError):
            plan(kind, values, structure=STRUCTURE)


def test_it_stays_what_it_is() -> None:
    mask = torch.ones(2, 3).bool()
    budget = {"sparsity": 0.5, "list": [1]}
    made = plan("mask", {"a": mask}, budget=budget)
    mask.fill_(False)
    budget["list"].append(2)  # type: ignore[attr-defined]
    assert made.values["a"].all()
    assert made.budget == {"sparsity": 0.5, "list": (1,)}
    for mapping in (made.values, made.budget, made.account, made.settings):
        with pytest.raises(TypeError):
            mapping["a"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        made.kind = "bits"  # type: ignore[misc]


def test_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = plan(
        "bits", {"h.0.a": 3, "h.0.b": 8}, budget={"average_bits": 6}, account={"achieved": 6.0, "filled": ["h.0.a"]}, structure=STRUCTURE
    )
    assert bits.summary().splitlines() == [
        "bits plan for 2 names from the scores 'mine'", "budget: average_bits=6", "account: achieved=6", "sites: 1 at 8 bits, 1 at 3 bits"
    ]  # fmt: skip
    assert bits.to_frame().values.tolist() == [["h.0.a", 6, 3], ["h.0.b", 9, 8]]
    mask = plan("mask", {"a": torch.tensor([[True, False]])})
    assert mask.to_frame().values.tolist() == [["a", 2, 1]]
    sampling = plan("sampling", {"a": torch.tensor([0.25, 1.0])})
    assert sampling.to_frame().values.tolist() == [["a", 2, 1.25]]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"whatmatters\[frames\]"):
        mask.to_frame()
