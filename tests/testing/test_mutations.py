"""One small error in each method, which its tests must find: all of them in `make test-full`, a few that change from day to day otherwise.

That each entry has a mutation whose text is there exactly once is part of the contract, and so of every run.
"""

import datetime
from pathlib import Path

import pytest

from whatmatters.testing.contract import every_entry
from whatmatters.testing.mutations import Mutation, known, place, read

ROOT = Path(__file__).parents[2]
MUTATIONS = {f"{entry.job}/{entry.slug}": entry for entry in every_entry() if place(ROOT, entry).exists()}
EACH_DAY = 2


def survivors(names: list[str]) -> dict[str, str]:
    judged = {name: read(ROOT, MUTATIONS[name]).killed(ROOT) for name in names}
    return {name: told for name, (killed, told) in judged.items() if not killed}


def test_each_mutation_belongs_to_an_entry() -> None:
    assert set(known(ROOT)) == set(MUTATIONS), "a mutation of what is no entry any more"


def test_the_mutations_of_the_day_are_killed() -> None:
    names = sorted(MUTATIONS)
    first = datetime.date.today().toordinal() * EACH_DAY
    assert not survivors([names[(first + i) % len(names)] for i in range(EACH_DAY)])


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_mutation_is_killed(name: str) -> None:
    assert not survivors([name])


def test_a_mutation_that_changes_nothing_that_is_tested_survives() -> None:
    told = Mutation("src/whatmatters/quantize/rtn.py", "Report:\n", "Report:  \n", "tests/core/test_grids.py", "nothing")
    with pytest.raises(AssertionError, match="changes no code"):
        told.applied(ROOT)
    message = "bits per weight"  # a docstring is code that no test of grids reads
    told = Mutation("src/whatmatters/quantize/rtn.py", f"bits: {message}", "bits: other", "tests/core/test_grids.py", "nothing")
    killed, printed = told.killed(ROOT)
    assert not killed
    assert "passed" in printed
    with pytest.raises(AssertionError, match="0 times"):
        Mutation("src/whatmatters/quantize/rtn.py", "no such text", "x", "tests/core/test_grids.py", "nothing").applied(ROOT)
