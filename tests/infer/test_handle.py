"""The form "handle", executed over every entry of this room that has it."""

from typing import Any

import pytest
import torch

from whatmatters.core import catalog
from whatmatters.core.catalog import Entry
from whatmatters.core.errors import WhatMattersError
from whatmatters.testing.forms import form

ENTRIES = [entry for entry in catalog.methods("infer") if entry.form == "handle"]


def given(entry: Entry) -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(entry.function).parameters
    return {name: value for name, value in form(entry).samples.items() if name in parameters}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.slug)
def test_calls_change_the_outcome_alike_and_undo_restores_it(entry: Entry) -> None:
    own = form(entry)
    subject, twin = own.subject(0), own.subject(0)
    before = own.outcome(None, subject)
    results = [own.call(entry, each, **given(entry)) for each in (subject, twin)]
    first, second = (own.outcome(result, each) for result, each in zip(results, (subject, twin), strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["logits"], before["logits"])
    assert own.undo is not None
    own.undo(results[0], subject)
    after = own.outcome(None, subject)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.slug)
def test_broken_subjects_and_settings_raise_ours(entry: Entry) -> None:
    import inspect

    own = form(entry)
    for what, broken in own.bad_subjects.items():
        with pytest.raises(WhatMattersError):
            print(what, own.call(entry, broken(own.subject(0)), **given(entry)))
    for name, values in own.bad_settings.items():
        if name in inspect.signature(entry.function).parameters:
            for value in values:
                with pytest.raises(WhatMattersError):
                    print(name, value, own.call(entry, own.subject(0), **{**given(entry), name: value}))
