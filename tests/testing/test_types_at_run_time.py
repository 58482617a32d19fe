"""The tests run the whole package under jaxtyping and beartype: a wrong shape or type is an error in every room."""

import importlib
import pkgutil
from typing import Any

import jaxtyping
import pytest
import torch

import whatmatters
from whatmatters.core import allocation, formats
from whatmatters.core.scores import Scores
from whatmatters.kernels import gram
from whatmatters.quantize._common import site_bits
from whatmatters.represent.spectrum import RankMeAccumulator
from whatmatters.score import layers


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (allocation.top_k, ("values", 1)),
        (gram.mirror, (torch.zeros(2, 3, dtype=torch.float64),)),
        (formats.stored_bits, ((2.5, 3), 4)),
        (layers.cosine, (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))),
        (site_bits, (object(), None)),
        (importlib.import_module("whatmatters.prune.wanda").importance, (torch.zeros(2, 3), torch.zeros(3))),
        (RankMeAccumulator.update, (RankMeAccumulator(), "rows")),
        (Scores.load, (3,)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_wrong_type_or_shape_is_an_error(function: Any, given: Any) -> None:
    with pytest.raises((jaxtyping.TypeCheckError, TypeError)):
        function(*given)


def test_every_module_is_imported_through_the_hook() -> None:
    """jaxtyping's import hook marks what it has rewritten."""
    names = [info.name for info in pkgutil.walk_packages(whatmatters.__path__, "whatmatters.") if not info.name.endswith("__main__")]
    assert len(names) > 80
    for name in names:
        module = importlib.import_module(name)
        assert type(module.__spec__.loader).__module__.startswith("jaxtyping"), f"{name} is not checked at run time"
