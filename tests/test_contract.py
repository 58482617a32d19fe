"""One contract for every catalog entry, found without being told. The checks are in `whatmatters.testing.contract`; here they are executed.

`pytest tests/test_contract.py -k my-slug` runs them on one entry, and so does `python -m whatmatters.testing --entry my-slug`.
"""

import copy
from pathlib import Path

import pytest

from whatmatters.core.catalog import Entry
from whatmatters.testing import contract
from whatmatters.testing.families import build
from whatmatters.testing.forms import Check

ROOT = Path(__file__).parents[1]
LEAST = 25
"""Checks that each entry is held to, at the least."""

ENTRIES = contract.every_entry()
CHECKS = {entry: contract.checks(entry, root=ROOT) for entry in ENTRIES}
CASES = [(entry, check) for entry in ENTRIES for check in CHECKS[entry]]


@pytest.mark.parametrize(("entry", "check"), CASES, ids=[f"{e.job}:{e.slug}:{c.name}" for e, c in CASES])
def test_contract(entry: Entry, check: Check) -> None:
    check.run(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{e.job}:{e.slug}" for e in ENTRIES])
def test_each_entry_is_held_to_many_checks(entry: Entry) -> None:
    names = [check.name for check in CHECKS[entry]]
    assert len(names) == len(set(names)), "two checks have one name"
    assert len(names) >= LEAST, f"{entry.slug} is held to {len(names)} checks; its form may add some"


def test_deep_copies_of_a_quantized_model_keep_its_record() -> None:
    from whatmatters.core.formats import attached
    from whatmatters.quantize import rtn

    model = build("llama")
    rtn(model, bits=4, group_size=8)
    assert attached(copy.deepcopy(model)).keys() == attached(model).keys()
