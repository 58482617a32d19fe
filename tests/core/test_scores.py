"""Scores: what they refuse, that they stay what they are, and their arithmetic against plain Python."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core.errors import InputError, InputTypeError, MissingExtraError, NonFiniteError
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Site, Structure

SITES = (
    Site("h.0.a", "h.0.a.weight", (2, 3), "h.0"),
    Site("h.0.b", "h.0.b.weight", (3, 3), "h.0"),
    Site("h.1.a", "h.1.a.weight", (2, 3), "h.1"),
)
STRUCTURE = Structure(("h.0", "h.1"), SITES)

LISTS = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=5), min_size=1, max_size=4)


def channels(lists: list[list[int]], **more: Any) -> Scores:
    return Scores("channel", {f"s{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(lists)}, "mine", {}, **more)


def layers(**values: float) -> Scores:
    return Scores("layer", {name.replace("_", "."): torch.tensor(v, dtype=torch.float64) for name, v in values.items()}, "mine", {})


def ordered_cells(lists: list[list[int]]) -> list[tuple[str, int, int]]:
    cells = [(f"s{i}", j, v) for i, values in enumerate(lists) for j, v in enumerate(values)]
    return sorted(cells, key=lambda cell: -cell[2])  # Python's sort is stable: ties stay in position order


@settings(max_examples=100, deadline=None)
@given(LISTS, st.data())
def test_top_is_a_stable_sort(lists: list[list[int]], data: st.DataObject) -> None:
    cells = ordered_cells(lists)
    k = data.draw(st.integers(0, len(cells)))
    assert channels(lists).top(k) == [(name, (j,), float(v)) for name, j, v in cells[:k]]
    for wrong in (-1, len(cells) + 1):
        with pytest.raises(InputError, match="top"):
            channels(lists).top(wrong)


@settings(max_examples=100, deadline=None)
@given(LISTS)
def test_rank_counts_from_the_least_important(lists: list[list[int]]) -> None:
    ranked = channels(lists).rank()
    cells = ordered_cells(lists)
    for place, (name, j, _) in enumerate(cells):
        assert ranked.values[name][j] == len(cells) - 1 - place
    assert ranked.scale == "rank"
    tripled = Scores("channel", {n: v**3 for n, v in channels(lists).values.items()}, "mine", {}).rank()
    assert all(torch.equal(tripled.values[name], value) for name, value in ranked.values.items())


def test_top_gives_the_index_inside_a_matrix() -> None:
    scores = Scores("weight", {"a": torch.tensor([[1.0, 9.0], [8.0, 2.0]]), "b": torch.tensor([[8.0, 0.0]])}, "mine", {})
    assert scores.top(3) == [("a", (0, 1), 9.0), ("a", (1, 0), 8.0), ("b", (0, 0), 8.0)]


def test_order_and_stakes() -> None:
    assert layers(a=1.0, b=3.0, c=1.0, d=2.0).order() == ["b", "d", "a", "c"]
    table = Scores("layer", {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([3.0, 0.0])}, "mine", {"levels": [2, 4]}, scale="loss")
    assert table.order() == ["b", "a"]
    assert table.stakes().values["b"] == 3
    assert table.rank().values["a"] == 0
    assert table.top(1) == [("b", (), 3.0)]
    with pytest.raises(InputTypeError, match="layer"):
        channels([[1]]).order()
    with pytest.raises(InputError, match="levels"):
        _ = layers(a=1.0).levels


def test_padding_never_counts() -> None:
    values = {"h.0": torch.tensor([[1.0, 9.0, 4.0], [9.0, 2.0, 9.0]])}
    valid = {"h.0": torch.tensor([[True, False, True], [False, True, False]])}
    scores = Scores("token", values, "mine", {}, valid=valid)
    assert scores.top(3) == [("h.0", (0, 2), 4.0), ("h.0", (1, 1), 2.0), ("h.0", (0, 0), 1.0)]
    with pytest.raises(InputError):
        scores.top(4)
    assert scores.rank().values["h.0"].tolist() == [[0, 0, 2], [0, 1, 0]]
    assert scores.reduce("mean").values["h.0"].item() == pytest.approx(7 / 3)
    assert scores.reduce("sum").values["h.0"] == 7
    assert scores.normalized("sum").values["h.0"].sum().item() == pytest.approx(1)
    assert scores.normalized("max").values["h.0"].max() == 1
    assert scores.normalized("minmax").values["h.0"][0, 1] == 0
    assert len(scores.to_frame()) == 3


def test_lift_gives_every_site_its_blocks_score() -> None:
    lifted = layers(h_0=1.0, h_1=5.0).lift(STRUCTURE)
    assert {n: v.item() for n, v in lifted.values.items()} == {"h.0.a": 1, "h.0.b": 1, "h.1.a": 5}
    assert lifted.structure == STRUCTURE
    own = layers(h_0=1.0, h_1=5.0, h_0_b=7.0).lift(SITES[:2])
    assert {n: v.item() for n, v in own.values.items()} == {"h.0.a": 1, "h.0.b": 7}
    with pytest.raises(InputError, match=r"h\.1\.a"):
        layers(h_0=1.0).lift(SITES)
    with pytest.raises(InputTypeError):
        channels([[1]]).lift(SITES)


def test_lift_shares_a_blocks_losses_by_size() -> None:
    table = Scores("layer", {"h.0": torch.tensor([3.0, 1.0]), "h.1": torch.tensor([2.0, 0.5])}, "mine", {"levels": [2, 4]}, scale="loss")
    lifted = table.lift(STRUCTURE)
    assert lifted.values["h.0.a"].tolist() == pytest.approx([3 * 6 / 15, 6 / 15])
    assert lifted.values["h.0.b"].tolist() == pytest.approx([3 * 9 / 15, 9 / 15])
    assert lifted.values["h.1.a"].tolist() == [2.0, 0.5]
    assert lifted.reduce("sum", by="block").values["h.0"].tolist() == pytest.approx([3.0, 1.0])
    with pytest.raises(InputError, match="mean of losses"):
        lifted.reduce("mean", by="block")


def test_normalized_by_each_rule() -> None:
    scores = channels([[1, -3], [4]])
    expected = {"sum": [1 / 8, -3 / 8, 4 / 8], "max": [1 / 4, -3 / 4, 1], "minmax": [4 / 7, 0, 1], "site": [1 / 4, -3 / 4, 1]}
    for by, numbers in expected.items():
        flat = torch.cat(list(scores.normalized(by).values.values())).tolist()
        assert flat == pytest.approx(numbers)
    assert channels([[2, 2]]).normalized("minmax").values["s0"].tolist() == [0, 0]
    for by in ("sum", "max"):
        with pytest.raises(InputError, match="divisor"):
            channels([[0, 0]]).normalized(by)
    with pytest.raises(InputError, match="s1"):
        channels([[1], [0]]).normalized("site")
    with pytest.raises(InputError, match="loss"):
        Scores("layer", {"a": torch.ones(1)}, "mine", {"levels": [2]}, scale="loss").normalized()


def test_reduce_by_site_block_and_channel() -> None:
    weights = {site.name: torch.arange(float(site.size)).reshape(site.shape) for site in SITES}
    scores = Scores("weight", weights, "mine", {}, structure=STRUCTURE)
    assert scores.reduce("mean").values["h.0.b"].item() == 4
    assert scores.reduce("sum", by="block").values["h.0"].item() == 15 + 36
    assert scores.reduce("mean", by="block").values["h.0"].item() == pytest.approx(51 / 15)
    assert scores.reduce("sum", to="channel").values["h.0.a"].tolist() == [3, 5, 7]
    assert scores.reduce("mean", to="channel").unit == "channel"
    by_site = layers(h_0_a=1.0, h_0_b=2.0, h_1_a=3.0)
    assert by_site.reduce("mean", by="block", structure=STRUCTURE).values["h.0"].item() == pytest.approx((6 * 1 + 9 * 2) / 15)
    with pytest.raises(InputError, match="structure"):
        by_site.reduce(by="block")
    with pytest.raises(InputError, match="no block"):
        layers(x=1.0).reduce(by="block", structure=STRUCTURE)
    with pytest.raises(InputTypeError):
        by_site.reduce(to="channel")
    with pytest.raises(InputError, match="channels of different"):
        scores.reduce(to="channel", by="block")


def test_they_stay_what_they_are() -> None:
    source = torch.ones(2, 3)
    mapping = {"a": source}
    note = {"list": [1]}
    scores = Scores("weight", mapping, "mine", note)
    source.fill_(7)
    mapping["b"] = source
    note["list"].append(2)
    assert scores.values["a"].unique().tolist() == [1]
    assert list(scores.values) == ["a"]
    assert scores.settings == {"list": (1,)}
    with pytest.raises(TypeError):
        scores.values["a"] = source  # type: ignore[index]
    with pytest.raises(TypeError):
        scores.settings["x"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        scores.unit = "layer"  # type: ignore[misc]
    base = torch.ones(3, 2, requires_grad=True)
    kept = Scores("weight", {"a": base.T, "b": base.half(), "c": base.double()}, "mine", {}).values
    assert [v.dtype for v in kept.values()] == [torch.float32, torch.float32, torch.float64]
    assert all(v.is_contiguous() and not v.requires_grad for v in kept.values())
    with torch.no_grad():
        base.zero_()
    assert all(float(v.min()) == 1 for v in kept.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_not_finite_names_the_site(bad: float, dtype: torch.dtype) -> None:
    values = torch.zeros(100, 3, dtype=dtype)
    values[57, 1] = bad
    with pytest.raises(NonFiniteError, match=r"'h\.0\.b'"):
        Scores("weight", {"h.0.a": torch.ones(2, 3), "h.0.b": values}, "mine", {})


ONE = {"a": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"unit": "soul"}, InputError), ({"scale": "log"}, InputError), ({"values": {}}, InputError), ({"method": ""}, InputError),
     ({"values": {"a": torch.ones(3)}}, InputError), ({"values": {"a": torch.ones(0, 3)}}, InputError),
     ({"values": {"": torch.ones(1, 1)}}, InputError),
     ({"values": {"a\n": torch.ones(1, 1)}}, InputError), ({"values": {"a" * 2000: torch.ones(1, 1)}}, InputError),
     ({"values": {"a": torch.ones(2, 3, dtype=torch.int64)}}, InputTypeError), ({"values": {"a": torch.ones(2, 3).bool()}}, InputTypeError),
     ({"unit": "layer"}, InputError), ({"unit": "channel"}, InputError), ({"scale": "loss"}, InputError),
     ({"settings": {"a": math.nan}}, InputError),
     ({"valid": {"a": torch.ones(2, 3).bool()}}, InputError), ({"unit": "token", "valid": {"b": torch.ones(2, 3).bool()}}, InputError),
     ({"unit": "token", "valid": {"a": torch.ones(3, 3).bool()}}, InputError),
     ({"unit": "token", "valid": {"a": torch.zeros(2, 3).bool()}}, InputError),
     ({"unit": "token", "valid": {"a": torch.ones(2, 3)}}, InputTypeError), ({"structure": STRUCTURE}, InputError),
     ({"values": {"h.0.a": torch.ones(3, 2)}, "structure": STRUCTURE}, InputError),
     ({"unit": "channel", "values": {"h.0.b": torch.ones(2)}, "structure": STRUCTURE}, InputError),
     ({"unit": "token", "values": {"h.0.a": torch.ones(2, 2)}, "structure": STRUCTURE}, InputError),
     ({"unit": "weight", "values": {"h.0": torch.ones(2, 2)}, "structure": STRUCTURE}, InputError)],
)  # fmt: skip
def test_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    Scores("weight", ONE, "mine", {})
    with pytest.raises(error):
        Scores(**({"unit": "weight", "values": ONE, "method": "mine", "settings": {}} | fields))


@pytest.mark.parametrize("levels", [None, [4, 2], [2, 2], [2], [2, 4, 8], [0, 4], ["2", "4"], [16, 32], 7])
def test_loss_tables_need_their_levels(levels: Any) -> None:
    with pytest.raises((InputError, InputTypeError)):
        Scores("layer", {"a": torch.ones(2)}, "mine", {} if levels is None else {"levels": levels}, scale="loss")


def test_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores("weight", {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0]])}, "mine", {})
    assert scores.to_frame().values.tolist() == [["a", 0, 0, 1.0], ["a", 0, 1, 2.0], ["b", 0, 0, 3.0]]
    assert list(scores.to_frame().columns) == ["site", "row", "column", "value"]
    assert layers(a=1.0).to_frame().values.tolist() == [["a", 1.0]]
    table = Scores("layer", {"a": torch.tensor([3.0, 1.0])}, "mine", {"levels": [2, 16]}, scale="loss")
    assert table.to_frame().values.tolist() == [["a", 2, 3.0], ["a", 16, 1.0]]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"whatmatters\[frames\]"):
        scores.to_frame()


def test_figures(tmp_path: Path) -> None:
    table = Scores("layer", {"a": torch.tensor([3.0, 1.0])}, "mine", {"levels": [2, 16]}, scale="loss")
    odd = Scores("layer", {"$x_$": torch.tensor(1.0), "\\frac{": torch.tensor(2.0)}, "$$", {})
    for number, scores in enumerate((table, odd, channels([[1, 2, 3], [4]]))):
        figure = scores.plot()
        figure.savefig(tmp_path / f"{number}.svg")
        assert (tmp_path / f"{number}.svg").stat().st_size > 1000
    assert len(odd.plot().axes[0].patches) == 2
