"""The catalog: every method, baseline and scorer registers itself where it is defined; CLI, docs and tests read it from here.

A new method is one file in its job's room. Nothing else lists it: the rooms are searched, and an import that fails is an error, not a
silent absence.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from whatmatters.core.errors import DataError, UnknownNameError, WhatMattersError

P = ParamSpec("P")
R = TypeVar("R")

ROOMS = ("nn", "score", "quantize", "prune", "tune", "infer", "select", "represent")
"""Rooms that hold catalog entries, lowest floor first."""

UNITS = ("weight", "channel", "head", "layer", "token", "pair", "tile", "sample", "feature", "concept", "prototype", "component", "task",
         "path", "model", "cell")  # fmt: skip

PLUGINS = "whatmatters"
"""Group of entry points in which installed packages name modules with scorers and methods of their own."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Floating-point types an entry works in unless it says otherwise."""


@dataclass(frozen=True)
class Entry:
    """One catalog entry: what a method, a baseline or a scorer is and needs.

    `unit` is what it scores or takes; `when` is set for scorers only: "ahead" (a pass of its own, gives `Scores`) or "walk" (called with
    a block's tokens inside a calibration walk). The flags are capabilities, checked by the contract test.
    """

    slug: str
    function: Callable[..., Any]
    kind: str  # "method" | "baseline" | "scorer"
    job: str
    unit: str
    paper: str | None = None
    score: str | None = None
    allocation: str | None = None
    action: str | None = None
    when: str | None = None
    needs_text: bool = False
    needs_gradients: bool = False
    control: bool = False  # a scorer that is meant to know nothing
    form: str = "action"  # how it is called: the name of a file in `whatmatters.testing.forms`
    dtypes: tuple[str, ...] = DTYPES  # floating-point types it works in; it refuses others

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


_entries: dict[tuple[str, str], Entry] = {}


def _register(entry: Entry) -> None:
    key = ("scorer" if entry.kind == "scorer" else "method", entry.slug)
    known = _entries.get(key)
    if known is not None and known.function.__module__ != entry.function.__module__:
        raise RuntimeError(f"two catalog entries named {entry.slug!r}: {known.function.__module__} and {entry.function.__module__}")
    _entries[key] = entry


def _brief(value: object) -> str:
    """A setting as it is shown in an error: models and tensors by type and shape, the rest by a short repr."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__}{tuple(shape)}"
    if isinstance(value, str | int | float | bool | None | tuple | list) and len(repr(value)) <= 60:
        return repr(value)
    return type(value).__name__


def door(operation: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Complete errors of ours once with the operation and its settings: inner code can raise short messages.

    A model that accelerate has offloaded is given to the operation as an ordinary one.

    The class of the error is kept; nested doors add nothing.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        takes_model = "model" in signature.parameters

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                if takes_model:
                    with _at_hand(args, kwargs):
                        return function(*args, **kwargs)
                return function(*args, **kwargs)
            except WhatMattersError as error:
                if not getattr(error, "completed", False):
                    given = signature.bind_partial(*args, **kwargs).arguments
                    shown = ", ".join(f"{name}={_brief(value)}" for name, value in given.items())
                    error.args = (f"{error}\n  in {operation}({shown})",)
                    error.completed = True  # type: ignore[attr-defined]
                raise

        return wrapped

    return decorate


def _at_hand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Weights of the model among the arguments at hand, also where accelerate has offloaded them."""
    model: Any = kwargs.get("model", args[0] if args else None)
    if not hasattr(model, "modules"):
        return contextlib.nullcontext()
    from whatmatters.core.offload import borrowed

    return borrowed(model)


def with_data(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse, with an error of ours, to be called without calibration data where these have no default."""
    signature = inspect.signature(function)
    parameter = signature.parameters.get("calibration")
    if parameter is None or parameter.default is not inspect.Parameter.empty:
        return function

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if signature.bind_partial(*args, **kwargs).arguments.get("calibration") is None:
            raise DataError("no calibration data; pass some as the second argument, such as data.calibration(tokenizer, text)")
        return function(*args, **kwargs)

    return wrapped


def method(
    slug: str,
    *,
    job: str,
    unit: str,
    action: str,
    paper: str | None = None,
    score: str | None = None,
    allocation: str | None = None,
    kind: str = "method",
    needs_text: bool = True,
    needs_gradients: bool = False,
    form: str = "action",
    dtypes: tuple[str, ...] = DTYPES,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the entry point of a method, or of a baseline with `kind="baseline"` (which needs no evidence).

    Args:
        slug: the name people type, with hyphens.
        job: the room it lives in ("quantize", "prune", ...).
        unit: what its importance is about, one of `UNITS`.
        action: what is done with the plan.
        paper: arXiv id; None for a baseline without one.
        score: the score it uses by default, in words.
        allocation: how a budget becomes a plan, in words.
        kind: "method" or "baseline".
        needs_text: it takes calibration data.
        needs_gradients: it cannot run under `torch.inference_mode`.
        form: how it is called, the name of a file in `whatmatters.testing.forms`: "action" (model, calibration -> Report) is that of
            quantizers and pruners. A class may be registered too; it is returned as it is, and completes its own errors.
        dtypes: floating-point types it works in; it must refuse the others.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        wrapped: Any = function
        if not inspect.isclass(function):
            wrapped = door(f"{job}.{function.__name__}")(with_data(function) if needs_text else function)
        _register(
            Entry(
                slug, wrapped, kind, job, unit, paper, score, allocation, action, needs_text=needs_text, needs_gradients=needs_gradients,
                form=form, dtypes=dtypes,
            )
        )  # fmt: skip
        return wrapped

    return decorate


def scorer(
    name: str,
    *,
    unit: str,
    when: str,
    needs_text: bool = False,
    needs_gradients: bool = False,
    control: bool = False,
    paper: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a scorer. `when="ahead"`: `f(model, calibration=None, *, ...) -> Scores`; `when="walk"`: `f(context) -> Tensor`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        wrapped = door(f"score.{function.__name__}")(with_data(function) if needs_text else function)
        _register(
            Entry(
                name,
                wrapped,
                "scorer",
                "score",
                unit,
                paper,
                when=when,
                needs_text=needs_text,
                needs_gradients=needs_gradients,
                control=control,
                form=when,
            )
        )
        return wrapped

    return decorate


@functools.cache
def _discover() -> None:
    for room in ROOMS:
        package = importlib.import_module(f"whatmatters.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"whatmatters.{room}.{module.name}")
    for plugin in importlib.metadata.entry_points(group=PLUGINS):
        plugin.load()  # an installed package that names itself here registers what it has by being imported


def methods(job: str | None = None) -> list[Entry]:
    """All methods and baselines, sorted by job and slug; of one job if given."""
    _discover()
    found = [e for (family, _), e in _entries.items() if family == "method" and job in (None, e.job)]
    return sorted(found, key=lambda e: (e.job, e.kind != "baseline", e.slug))


def scorers(unit: str | None = None, when: str | None = None) -> list[Entry]:
    """All scorers, sorted by name; of one unit and one time if given."""
    _discover()
    found = [e for (family, _), e in _entries.items() if family == "scorer" and unit in (None, e.unit) and when in (None, e.when)]
    return sorted(found, key=lambda e: e.slug)


def _named(entries: list[Entry], what: str, name: str) -> Entry:
    for entry in entries:
        if name in (entry.slug, entry.slug.replace("-", "_")):
            return entry
    raise UnknownNameError(f"no {what} named {name!r}; known: {', '.join(e.slug for e in entries)}")


def get_method(slug: str, job: str | None = None) -> Entry:
    """The method or baseline named `slug` (hyphens or underscores); raises `UnknownNameError` listing the known ones."""
    return _named(methods(job), f"{job} method" if job else "method", slug)


def get_scorer(name: str, unit: str | None = None, when: str | None = None) -> Entry:
    """The scorer of that name; raises `UnknownNameError` listing the known ones of that unit."""
    return _named(scorers(unit, when), f"{unit} scorer" if unit else "scorer", name)


def open_room(package: str, namespace: dict[str, Any]) -> list[str]:
    """Import every file of a room and put the public names (`__all__`) of each into the room's namespace.

    Called by a room's `__init__`, so that `whatmatters.quantize.rsq` is the function in `quantize/rsq.py` without being listed anywhere.
    Returns the names, for the room's own `__all__`.
    """
    names: list[str] = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for name in getattr(module, "__all__", ()):
            namespace[name] = getattr(module, name)
            names.append(name)
    return sorted(names)
