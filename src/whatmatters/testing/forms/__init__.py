"""Forms: how catalog entries of one kind are called, so that one contract can be executed over all of them.

An entry names its form (`@method(..., form="action")`); the form of that name is the file `forms/<name>.py`, which defines `FORM`. A form
knows parameters by name and never an entry: a new method of a known form needs no line here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whatmatters.core.catalog import Entry
from whatmatters.core.errors import UnknownNameError

__all__ = ["Check", "Form", "always", "form", "form_names"]


def always(entry: Entry) -> bool:
    """Applies to every entry."""
    return True


@dataclass(frozen=True)
class Check:
    """One check of the contract.

    Attributes:
        name: what holds, as words joined by hyphens.
        run: raises AssertionError, with a message that says what the entry's author must do, where it does not hold.
        applies: whether the entry makes the promise that is checked at all; what does not apply is not counted.
        device: the answer may depend on the machine it runs on.
    """

    name: str
    run: Callable[[Entry], None]
    applies: Callable[[Entry], bool] = always
    device: bool = True


@dataclass(frozen=True)
class Form:
    """How entries of one form are called.

    Attributes:
        subject: seed -> a fresh tiny thing that the call works on (a model with its data, a matrix, texts); equal for equal seeds.
        call: (entry, subject, **settings) -> result; does the whole of what the entry is for: a class is built and used.
        outcome: (result, subject after the call) -> tensors by name that say all that the call did; equal in two equal calls.
        samples: settings that make sense for the tiny subject, by the name of the parameter; used where an entry has the parameter.
        bad_subjects: what is wrong -> function from a good subject to a broken one; a call on it must raise an error of ours.
        bad_settings: name of a parameter -> values that must each raise an error of ours, where an entry has the parameter.
        changes: the call is meant to change its subject (a pruner does, a measure does not).
        undo: undoes the call, for those that return a handle: the subject must then be as before.
        atomic: a call that changes its subject does so in one last step: one that is interrupted leaves it bit for bit as it was.
        without_text: from a subject to the same without calibration text; entries that need text must then raise, the others must work.
            A form without it is for entries with `needs_text=False`.
        cast: (subject, dtype) -> the same subject in another floating-point type; entries must work in the types they claim.
        checks: what holds for entries of this form only.
    """

    subject: Callable[[int], Any]
    call: Callable[..., Any]
    outcome: Callable[[Any, Any], Mapping[str, Tensor]]
    samples: Mapping[str, Any] = field(default_factory=dict)
    bad_subjects: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    bad_settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    changes: bool = False
    undo: Callable[[Any, Any], None] | None = None
    atomic: bool = False
    without_text: Callable[[Any], Any] | None = None
    cast: Callable[[Any, torch.dtype], Any] | None = None
    checks: Sequence[Check] = ()


def form_names() -> list[str]:
    """Names of all forms there are."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def form(entry: Entry) -> Form:
    """The form of an entry.

    Raises:
        UnknownNameError: there is no file of that name.
    """
    if entry.form not in form_names():
        raise UnknownNameError(f"{entry.slug} has the form {entry.form!r}; known: {', '.join(form_names())}")
    found = importlib.import_module(f"{__name__}.{entry.form}").FORM
    if not isinstance(found, Form):
        raise UnknownNameError(f"FORM of {entry.form!r} is a {type(found).__name__}, not a Form")
    return found
