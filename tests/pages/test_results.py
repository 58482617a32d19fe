"""results.json: what is written is read again, and nothing else is."""

import contextlib
import copy
import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core.errors import FileError, FormatError
from whatmatters.pages.results import Results


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            yield from places(item, (*path, index))


def changed(value, path, new):
    """A copy with one place replaced, or removed for `...`."""
    if not path:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if new is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


@pytest.fixture(scope="module")
def shared():
    make = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["make"]
    value = make(blocks_count=1).to_json()
    value["tokens"]["tokens"] = value["tokens"]["tokens"][:2]
    return json.dumps(value)


@pytest.fixture
def plain(shared):
    return json.loads(shared)


def test_what_is_saved_is_loaded_again(results, tmp_path):
    path = results.save(tmp_path / "run")
    assert path.name == "results.json"
    assert Results.load(tmp_path / "run") == results
    assert Results.load(path) == results


def test_saving_is_deterministic(results, tmp_path):
    assert results.save(tmp_path / "a").read_bytes() == results.save(tmp_path / "b").read_bytes()


def test_a_run_of_an_audit_alone_is_fine(results, replaced):
    alone = replaced(results, arms=(), best=None, continuations=(), reload=None)
    assert Results.parse(json.dumps(alone.to_json())) == alone


def test_whole_numbers_are_read_where_numbers_with_a_point_are_meant(plain):
    plain["arms"][0]["bits"] = 16
    assert Results.from_json(plain).arms[0].bits == 16.0


def test_missing_files(tmp_path):
    with pytest.raises(FileError):
        Results.load(tmp_path / "absent")
    with pytest.raises(FileError):
        Results.load(tmp_path)


def test_every_key_is_needed_and_no_other_allowed(plain):
    for path in [p for p in places(plain) if p and isinstance(p[-1], str)]:
        if (path[0] in ("settings", "versions") and len(path) > 1) or "levels" in path[:-1]:
            continue  # these hold whatever names there are
        with pytest.raises(FormatError):
            Results.from_json(changed(plain, path, ...))
        with pytest.raises(FormatError):
            Results.from_json(changed(plain, (*path[:-1], path[-1] + "_"), 1))


@pytest.mark.parametrize("wrong", [None, True, 1, "text", [], {}, [1], {"a": 1}, -1, 1e300, "", [[]], {"": {}}])
def test_a_wrong_value_anywhere_is_refused_by_our_error_or_makes_equal_sense(plain, wrong):
    refused = 0
    for path in places(plain):
        try:
            read = Results.from_json(changed(plain, path, wrong)) if path else Results.parse(json.dumps(wrong))
        except FormatError:
            refused += 1
        else:
            assert json.loads(json.dumps(read.to_json())) == changed(plain, path, wrong)
    assert refused > 60


def test_parts_that_contradict_each_other(plain):
    for path, new, match in [
        (("best",), "nobody", "no arm is called"),
        (("reload", "arm"), "nobody", "no arm is called"),
        (("continuations", 0, "arm"), "nobody", "no arm is called"),
        (("arms", 1, "id"), "dense", "same id"),
        (("arms", 0, "role"), "method", "exactly one that is dense"),
        (("arms", 1, "role"), "winner", "role"),
        (("arms", 1, "bytes"), 0, "no size"),
        (("arms", 1, "levels"), {"elsewhere": 3}, "lacks"),
        (("model", "sites", 0, "block"), 1, "block that the model lacks"),
        (("model", "sites", 0, "size"), 0, "no weights"),
        (("audit", "damage"), [1.0], "expected as many"),
        (("audit", "units", 0), [], "no list of sites"),
        (("audit", "units", 0), ["elsewhere"], "no list of sites"),
        (("audit", "best"), "nobody", "none of its scorers"),
        (("audit", "scorers", 0, "values"), [1.0], "one score for each unit"),
        (("audit", "curves", 0, "share"), [0.0], "as many shares"),
        (("audit", "curves", 0, "order"), "up", "order"),
        (("version",), 2, "version"),
        (("version",), True, "version"),
        (("format",), "whatmatters.plan", "expected whatmatters.results"),
    ]:
        with pytest.raises(FormatError, match=match):
            Results.from_json(changed(plain, path, new))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"format": 1}', '{"a": NaN}', '{"a": 1, "a": 1}', '{"a": 1e999}', "[" * 100000, '"\\ud800"', b"\xff\xfe"],
)
def test_text_that_is_no_results(text):
    with pytest.raises(FormatError):
        Results.parse(text)


def test_numbers_that_are_not_finite_are_not_read(plain):
    for text in ("NaN", "Infinity", "1e999"):
        broken = json.dumps(plain).replace(json.dumps(plain["arms"][1]["perplexity"]), text)
        with pytest.raises(FormatError):
            Results.parse(broken)


def test_settings_may_not_be_nested_without_end(plain):
    deep: dict = {}
    for _ in range(50):
        deep = {"a": deep}
    with pytest.raises(FormatError, match="deep"):
        Results.from_json(changed(plain, ("settings",), deep))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_give_our_errors_only(shared, data):
    whole = shared.encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    put_in = data.draw(st.none() | st.integers(0, 255))
    broken = whole[:at] if put_in is None else whole[:at] + bytes([put_in]) + whole[at + 1 :]
    with contextlib.suppress(FormatError):
        Results.parse(broken)
