"""Settings of methods as options: read from signatures, with no list of methods anywhere."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from whatmatters.cli.settings import accepted, option_name, option_value, parsed, settings_of
from whatmatters.core.catalog import Entry, methods, scorers
from whatmatters.core.scores import Scores


def example(
    model: object,
    calibration: object = None,
    *,
    bits: int = 3,
    damping: float = 0.01,
    power: int | float = 1,
    act_order: bool = False,
    clip_search: bool = True,
    symmetric: bool = True,
    rotate: Literal["hadamard", "random"] | None = "hadamard",
    token_scores: str | Scores | Callable[[int], Tensor] = "attention",
    modules: Sequence[str] | None = None,
    levels: Sequence[int] = (4, 2),
    extra: Mapping[str, int] | None = None,
    structure: object = None,
    run_dir: str | None = None,
) -> None:
    """An example."""


ENTRY = Entry("example", example, "method", "quantize", "layer")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("damping", "0.5")], {"damping": 0.5}),
        ([("bits", "4")], {"bits": 4}),
        ([("power", "2")], {"power": 2}),
        ([("power", "0.5")], {"power": 0.5}),
        ([("act-order", None)], {"act_order": True}),
        ([("no-clip-search", None)], {"clip_search": False}),
        ([("asymmetric", None)], {"symmetric": False}),
        ([("rotate", "none")], {"rotate": None}),
        ([("rotate", "random")], {"rotate": "random"}),
        ([("token-scores", "act-norm")], {"token_scores": "act-norm"}),
        ([("token_scores", "act-norm")], {"token_scores": "act-norm"}),
        ([("modules", "*.down_proj,*.up_proj")], {"modules": ("*.down_proj", "*.up_proj")}),
        ([("modules", "none")], {"modules": None}),
        ([("levels", "2,3,4")], {"levels": (2, 3, 4)}),
        ([("damping", "1"), ("bits", "2")], {"damping": 1.0, "bits": 2}),
    ],
)
def test_text_becomes_what_the_signature_says(given, expected):
    assert parsed(ENTRY, given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("bits", "3.5")], "--bits N"),
        ([("damping", "much")], "--damping X"),
        ([("rotate", "sideways")], "hadamard|random"),
        ([("act-order", "yes")], "takes no value"),
        ([("bits", None)], "needs a value"),
        ([("no-bits", None)], "no setting --no-bits"),
        ([("run-dir", "x")], "no setting --run-dir"),
        ([("structure", "x")], "no setting --structure"),
        ([("extra", "1")], "use the Python function"),
    ],
)
def test_what_does_not_fit_is_told(given, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        parsed(ENTRY, given)


def test_a_file_of_scores_is_read(tmp_path):
    path = tmp_path / "scores.safetensors"
    Scores("layer", {"a": torch.tensor(1.0)}, "mine", {}).save(path)
    value = parsed(ENTRY, [("token-scores", str(path))])["token_scores"]
    assert isinstance(value, Scores)
    assert value.method == "mine"


def test_only_what_is_taken_is_offered():
    assert accepted(ENTRY, bits=3, seed=0, structure=None) == {"bits": 3, "structure": None}


def test_options_of_a_line():
    assert option_value(["a", "--method", "rsq", "--bits=3"], "--method") == "rsq"
    assert option_value(["a", "--method=rsq"], "--method") == "rsq"
    assert option_value(["a", "--method"], "--method") is None


@pytest.mark.parametrize("entry", [*methods(), *scorers(when="ahead")], ids=lambda e: e.slug)
def test_every_setting_of_the_catalog_can_be_shown_and_its_default_read_back(entry):
    for parameter in settings_of(entry).values():
        shown = option_name(parameter)
        assert shown.startswith("--")
        value = parameter.default
        if value is inspect.Parameter.empty or isinstance(value, bool):
            continue
        text = "none" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        name = parameter.name.replace("_", "-")
        if "(Python only)" not in shown:
            assert parsed(entry, [(name, text)])[parameter.name] == value
