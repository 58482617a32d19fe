"""Any scorer of a unit fits any action on that unit: every compatible pair is run, and what does not fit is refused."""

from collections.abc import Callable

import pytest

from whatmatters.core import catalog
from whatmatters.testing.pairs import Pair, misfits, pairs

PAIRS = pairs()
MISFITS = list(misfits())


@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
def test_a_compatible_pair_runs(pair: Pair) -> None:
    pair.run()


@pytest.mark.parametrize("refused", [check for _, check in MISFITS], ids=[name for name, _ in MISFITS])
def test_what_does_not_fit_is_refused(refused: Callable[[], None]) -> None:
    refused()


def test_every_scorer_and_every_action_on_a_model_is_in_a_pair() -> None:
    assert {pair.scorer.slug for pair in PAIRS} == {scorer.slug for scorer in catalog.scorers()}
    actions = {pair.action.slug for pair in PAIRS if pair.action is not None}
    assert actions == {entry.slug for entry in catalog.methods() if entry.form == "action"}
