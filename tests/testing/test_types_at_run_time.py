"""Annotations are really enforced while the tests run: in each room private functions are given a wrong shape or a wrong type."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from jaxtyping import AbstractArray, TypeCheckError

import whatmatters

ROOMS = sorted(info.name for info in pkgutil.iter_modules(whatmatters.__path__) if info.ispkg)


def functions(room: str) -> Iterator[Callable[..., Any]]:
    package = importlib.import_module(f"whatmatters.{room}")
    for info in pkgutil.iter_modules(package.__path__):
        if info.name == "__main__":
            continue
        module = importlib.import_module(f"whatmatters.{room}.{info.name}")
        for value in vars(module).values():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and value.__name__ not in getattr(module, "__all__", ()):
                yield value


def first(function: Callable[..., Any]) -> Any:
    return next(iter(inspect.signature(function).parameters.values()), inspect.Parameter("none", inspect.Parameter.POSITIONAL_ONLY))


def takes_a_shape(function: Callable[..., Any]) -> bool:
    """Its first parameter is a tensor with a number of dimensions that is written down."""
    kind = first(function).annotation
    return inspect.isclass(kind) and issubclass(kind, AbstractArray) and not {"*", "."} & set(kind.dim_str)


def takes_a_type(function: Callable[..., Any]) -> bool:
    kind = first(function).annotation
    return inspect.isclass(kind) and not issubclass(kind, AbstractArray) and kind not in (Any, object, inspect.Parameter.empty)


SHAPED = {room: [f for f in functions(room) if takes_a_shape(f)] for room in ROOMS}
TYPED = {room: [f for f in functions(room) if takes_a_type(f)] for room in ROOMS}


def call_with(function: Callable[..., Any], value: object) -> None:
    """The value as the first argument and None for all others that must be given: they are never looked at."""
    needed = [p for p in list(inspect.signature(function).parameters.values())[1:] if p.default is p.empty]
    positional = [None for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    function(value, *positional, **{p.name: None for p in needed if p.kind is p.KEYWORD_ONLY})


@pytest.mark.parametrize("room", [room for room in ROOMS if SHAPED[room]])
def test_a_wrong_shape_raises(room: str) -> None:
    wrong = torch.zeros((1,) * 9)
    for function in SHAPED[room]:
        with pytest.raises(TypeCheckError, match=rf"parameter.*{first(function).name}"):
            call_with(function, wrong)


@pytest.mark.parametrize("room", [room for room in ROOMS if TYPED[room]])
def test_a_wrong_type_raises(room: str) -> None:
    for function in TYPED[room]:
        with pytest.raises(TypeCheckError, match="parameter"):
            call_with(function, object())


def test_each_room_that_has_methods_is_among_them() -> None:
    shaped = {room for room in ROOMS if SHAPED[room]}
    assert {"kernels", "prune", "quantize", "score"} <= shaped
    checked = shaped | {room for room in ROOMS if TYPED[room]}
    empty = {room for room in ROOMS if not list(functions(room))}
    assert set(ROOMS) - checked - empty == set(), "rooms of which nothing is shown to be checked"


def test_shapes_must_agree_with_each_other() -> None:
    from whatmatters.kernels.gram import accumulate_gram

    with pytest.raises(TypeCheckError):
        accumulate_gram(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 5))


def test_every_module_is_imported_through_the_hook() -> None:
    """jaxtyping's import hook marks what it has rewritten."""
    names = [info.name for info in pkgutil.walk_packages(whatmatters.__path__, "whatmatters.") if not info.name.endswith("__main__")]
    assert len(names) > 80
    for name in names:
        module = importlib.import_module(name)
        assert type(module.__spec__.loader).__module__.startswith("jaxtyping"), f"{name} is not checked at run time"
