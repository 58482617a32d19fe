"""Reading what comes from outside: every damage ends in FileError or FormatError, before anything large is allocated."""

import json
import os
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from whatmatters.core import records
from whatmatters.core.errors import FileError, FormatError, InputError, InputTypeError
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Site, Structure

STRUCTURE = Structure(
    ("h.0", "h.1"),
    (Site("h.0.a", "h.0.a.weight", (2, 3), "h.0"), Site("h.1.e[1]", "h.1.e", (3, 2), "h.1", index=1, transposed=True)),
    (("h.0.a",),),
    ("h.0.odd",),
)


def samples() -> dict[str, tuple[Scores | Plan, Callable[..., Scores | Plan]]]:
    """One of everything that is saved, with its reader."""
    weights = {"h.0.a": torch.arange(6.0).reshape(2, 3), "h.1.e[1]": torch.ones(3, 2, dtype=torch.float64)}
    masks = {name: value > 1 for name, value in weights.items()}
    tokens = {"h.0": torch.arange(6.0).reshape(2, 3)}
    account = {"achieved": 3.0, "unused": 0, "smallest_step": None, "filled": []}
    note = {"text": "é$<b>", "list": [1, 2.5, None, True], "nested": {"a": {"b": []}}}
    return {
        "weight": (Scores("weight", weights, "mine", note, structure=STRUCTURE), Scores.load),
        "token": (Scores("token", tokens, "mine", {}, valid={"h.0": tokens["h.0"] < 4}), Scores.load),
        "loss": (Scores("layer", {"h.0": torch.tensor([2.0, 1.0])}, "mine", {"levels": [2, 4]}, scale="loss"), Scores.load),
        "bits": (Plan("bits", {"h.0.a": 3, "h.1.e[1]": 8}, {"average_bits": 5.5}, account, "mine", note, STRUCTURE), Plan.load),
        "ratio": (Plan("ratio", {"h.0.a": 0.1, "h.1.e[1]": 1.0}, {"sparsity": 0.3}, account, "mine"), Plan.load),
        "mask": (Plan("mask", masks, {"sparsity": 0.5}, account, "mine", {}, STRUCTURE), Plan.load),
        "sampling": (Plan("sampling", {"x": torch.tensor([0.1, 1.0])}, {"units": 1}, account, "mine"), Plan.load),
    }


def same(a: Scores | Plan, b: Scores | Plan) -> None:
    for field in ("unit", "scale", "kind", "budget", "account", "method", "settings", "structure"):
        assert getattr(a, field, None) == getattr(b, field, None)
    assert list(a.values) == list(b.values)
    pairs = [(a.values[name], b.values[name]) for name in a.values]
    for masks in (getattr(a, "valid", None), getattr(b, "valid", None)):
        assert (masks is None) == (getattr(a, "valid", None) is None)
    pairs += [(a.valid[name], b.valid[name]) for name in a.valid or {}] if isinstance(a, Scores) and isinstance(b, Scores) else []
    for left, right in pairs:
        assert type(left) is type(right)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        else:
            assert left == right


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(name: str, mmap: bool, tmp_path: Path) -> None:
    record, load = samples()[name]
    record.save(tmp_path / "x")
    loaded = load(tmp_path / "x", mmap=mmap)
    same(record, loaded)
    loaded.save(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_readable_without_us(tmp_path: Path) -> None:
    scores, _ = samples()["weight"]
    scores.save(tmp_path / "s")
    assert torch.equal(load_file(tmp_path / "s")["values/h.0.a"], torch.arange(6.0).reshape(2, 3))
    with safe_open(tmp_path / "s", "pt") as file:
        assert json.loads(file.metadata()["whatmatters"])["unit"] == "weight"
    plan, _ = samples()["bits"]
    plan.save(tmp_path / "p")
    assert json.loads((tmp_path / "p").read_text())["values"] == {"h.0.a": 3, "h.1.e[1]": 8}


def test_a_mapped_file_is_never_written_to(tmp_path: Path) -> None:
    scores, _ = samples()["weight"]
    scores.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    Scores.load(tmp_path / "s", mmap=True).values["h.0.a"].fill_(7)
    assert (tmp_path / "s").read_bytes() == before


def test_overwriting_is_a_choice(tmp_path: Path) -> None:
    for name in ("weight", "bits"):
        record, load = samples()[name]
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileError):
            record.save(tmp_path / name, overwrite=False)
        assert (tmp_path / name).read_text() == "mine"
        record.save(tmp_path / name)
        same(record, load(tmp_path / name))


@pytest.mark.parametrize("name", samples())
def test_fuzz(name: str, tmp_path: Path) -> None:
    """500 damaged files a reader: cut, bits flipped, bytes replaced, doubled or inserted. Only our two errors, or a valid record."""
    record, load = samples()[name]
    path = tmp_path / "x"
    record.save(path)
    good = path.read_bytes()
    chance = random.Random(name)
    refused = 0
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            place = chance.randrange(len(bad)) if bad else 0
            match chance.randrange(5):
                case 0:
                    del bad[place:]
                case 1 if bad:
                    bad[place] ^= 1 << chance.randrange(8)
                case 2 if bad:
                    bad[place] = chance.choice(b'\0"{}[],:019-eN\xff\\')
                case 3:
                    end = place + chance.randrange(40)
                    bad[place:place] = bad[place:end]
                case _:
                    bad[place : place + chance.randrange(20)] = b""
        path.write_bytes(bad)
        try:
            load(path, mmap=chance.random() < 0.5)
        except (FormatError, FileError) as error:
            refused += str(path) in str(error)
    assert refused > 250


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change the two JSON levels of a saved safetensors record."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["whatmatters"])
    change(outer, inner)
    if isinstance(outer.get("__metadata__", {}).get("whatmatters"), str):
        outer["__metadata__"]["whatmatters"] = json.dumps(inner)
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


TENSOR = "values/h.0.a"
ATTACKS: dict[str, Callable[[dict, dict], object]] = {
    "unknown key": lambda o, i: i.update(extra=1),
    "missing key": lambda o, i: i.pop("scale"),
    "other format": lambda o, i: i.update(format="whatmatters.plan"),
    "version": lambda o, i: i.update(version=2),
    "version true": lambda o, i: i.update(version=True),
    "unit": lambda o, i: i.update(unit="soul"),
    "unit type": lambda o, i: i.update(unit=["weight"]),
    "method": lambda o, i: i.update(method="\0"),
    "settings": lambda o, i: i.update(settings=[1]),
    "surrogate": lambda o, i: i.update(settings={"a": "\ud800"}),
    "surrogate key": lambda o, i: i.update(settings={"\ud800": 1}),
    "names twice": lambda o, i: i.update(names=["h.0.a", "h.0.a"]),
    "names unhashable": lambda o, i: i.update(names=[{}, []]),
    "names number": lambda o, i: i.update(names=7),
    "name of no tensor": lambda o, i: i.update(names=["h.0.a", "h.1.x"]),
    "structure key": lambda o, i: i["structure"].update(more=[]),
    "structure text": lambda o, i: i.update(structure="x"),
    "site twice": lambda o, i: i["structure"]["sites"].append(i["structure"]["sites"][0]),
    "site shape": lambda o, i: i["structure"]["sites"][0].__setitem__(2, [2, -3]),
    "site shape float": lambda o, i: i["structure"]["sites"][0].__setitem__(2, [2, 3.0]),
    "site shape bool": lambda o, i: i["structure"]["sites"][0].__setitem__(2, [True, 6]),
    "site other shape": lambda o, i: i["structure"]["sites"][0].__setitem__(2, [3, 2]),
    "site block": lambda o, i: i["structure"]["sites"][0].__setitem__(3, "nowhere"),
    "site index": lambda o, i: i["structure"]["sites"][0].__setitem__(4, -1),
    "site transposed": lambda o, i: i["structure"]["sites"][0].__setitem__(5, 1),
    "site short": lambda o, i: i["structure"]["sites"][0].pop(),
    "block twice": lambda o, i: i["structure"]["blocks"].append("h.0"),
    "block name": lambda o, i: i["structure"]["blocks"].append("a\nb"),
    "tie unknown": lambda o, i: i["structure"]["ties"].append(["nothing"]),
    "tie empty": lambda o, i: i["structure"]["ties"].append([]),
    "tie twice": lambda o, i: i["structure"]["ties"].append(["h.0.a"]),
    "ties text": lambda o, i: i["structure"].update(ties="h.0.a"),
    "dtype": lambda o, i: o[TENSOR].update(dtype="I32"),
    "dtype list": lambda o, i: o[TENSOR].update(dtype=["F32"]),
    "dtype bool": lambda o, i: o[TENSOR].update(dtype="BOOL", shape=[24]),
    "shape": lambda o, i: o[TENSOR].update(shape=[3, 3]),
    "shape huge": lambda o, i: o[TENSOR].update(shape=[2**62, 2**62]),
    "shape deep": lambda o, i: o[TENSOR].update(shape=[1] * 70 + [6]),
    "shape float": lambda o, i: o[TENSOR].update(shape=[2.0, 3]),
    "offsets overlap": lambda o, i: o[TENSOR].update(data_offsets=[0, 24]),
    "offsets beyond": lambda o, i: o[TENSOR].update(data_offsets=[2**40, 2**40 + 24]),
    "offsets negative": lambda o, i: o[TENSOR].update(data_offsets=[-24, 0]),
    "offsets three": lambda o, i: o[TENSOR]["data_offsets"].append(0),
    "entry key": lambda o, i: o[TENSOR].update(more=1),
    "entry list": lambda o, i: o.update({TENSOR: []}),
    "stray tensor": lambda o, i: o.update({"stray": o.pop(TENSOR)}),
    "empty tensor": lambda o, i: o.update({"values/none": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
    "no metadata": lambda o, i: o.pop("__metadata__"),
    "other metadata": lambda o, i: o["__metadata__"].update(format="pt"),
    "metadata number": lambda o, i: o.update(__metadata__={"whatmatters": 3}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_scores(attack: str, tmp_path: Path) -> None:
    record, _ = samples()["weight"]
    record.save(tmp_path / "x")
    rewritten(tmp_path / "x", lambda outer, inner: None)
    Scores.load(tmp_path / "x")  # rewriting alone does no harm
    rewritten(tmp_path / "x", lambda outer, inner: ATTACKS[attack](outer, inner) and None)
    for mmap in (False, True):
        with pytest.raises(FormatError):
            Scores.load(tmp_path / "x", mmap=mmap)


PLAN_ATTACKS = [
    ('"h.0.a": 3', '"h.0.a": 3, "h.0.a": 4'),
    ('"h.0.a": 3', '"h.0.a": true'),
    ('"h.0.a": 3', '"h.0.a": 3.5'),
    ('"h.0.a": 3', '"h.0.a": 0'),
    ('"h.0.a": 3', '"h.0.a": null'),
    ('"h.0.a": 3', '"h.0.a": [3]'),
    ('"h.0.a": 3', '"h.0.b": 3'),
    ('"h.0.a": 3', '"h.0.a": ' + "9" * 5000),
    ('"average_bits": 5.5', '"average_bits": NaN'),
    ('"average_bits": 5.5', '"average_bits": 1e999'),
    ('"average_bits": 5.5', '"average_bits": ' + "[" * 100_000),
    ('"average_bits": 5.5', '"average_bits": ' + "[" * 100 + "]" * 100),
    ('"kind": "bits"', '"kind": "mask"'),
    ('"kind": "bits"', '"kind": "ratio"'),
    ('"kind": "bits"', '"kind": {}'),
    ('"version": 1', '"version": 1.0'),
    ('"method": "mine"', '"method": 4'),
    ('"format"', '"from"'),
]


@pytest.mark.parametrize("number", range(len(PLAN_ATTACKS)))
def test_attacks_on_plans(number: int, tmp_path: Path) -> None:
    old, new = PLAN_ATTACKS[number]
    record, _ = samples()["bits"]
    record.save(tmp_path / "x")
    text = (tmp_path / "x").read_text()
    assert text.count(old) >= 1
    (tmp_path / "x").write_text(text.replace(old, new, 1))
    with pytest.raises(FormatError):
        Plan.load(tmp_path / "x")


def test_a_number_too_large_for_a_ratio(tmp_path: Path) -> None:
    record, _ = samples()["ratio"]
    record.save(tmp_path / "x")
    text = (tmp_path / "x").read_text()
    (tmp_path / "x").write_text(text.replace('"h.0.a": 0.1', '"h.0.a": ' + "9" * 400))
    with pytest.raises(FormatError):
        Plan.load(tmp_path / "x")


def test_duplicate_keys_in_a_safetensors_header(tmp_path: Path) -> None:
    record, _ = samples()["weight"]
    record.save(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].decode()
    twice = (text.rstrip()[:-1] + "," + text[text.index('"values') :]).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(twice)) + twice + raw[8 + length :])
    with pytest.raises(FormatError, match="twice"):
        Scores.load(tmp_path / "x")


@pytest.mark.parametrize("claim", [2**63 - 1, 2**64 - 1, 10**9, records.HEADER_LIMIT + 1])
def test_a_huge_header_is_refused_before_it_is_read(claim: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", claim))
        file.truncate(2**31)  # sparse: as large as it claims, and free
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (Scores.load, Plan.load):
        with pytest.raises(FormatError, match="header"):
            load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    with path.open("wb") as file:
        file.write(b" " * 8)
        file.truncate(2**31)
    with pytest.raises(FormatError, match="at most"):
        Plan.load(path)


def test_unaligned_tensors_of_another_writer(tmp_path: Path) -> None:
    record, _ = samples()["weight"]
    record.save(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    (tmp_path / "x").write_bytes(struct.pack("<Q", length + 3) + raw[8 : 8 + length] + b"   " + raw[8 + length :])
    for mmap in (False, True):
        same(record, Scores.load(tmp_path / "x", mmap=mmap))


@pytest.mark.parametrize("load", [Scores.load, Plan.load])
def test_paths_that_hold_nothing(load: Callable[..., object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", tmp_path / "loop", "a\0b", "", "x" * 5000, "/dev/null"):
        with pytest.raises(FileError):
            load(path)
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError):
        load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["weight", "bits"])
def test_paths_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    record, _ = samples()[name]
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file" / "x", "a\0b"):
        with pytest.raises(FileError):
            record.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, load = samples()["weight"]
    record.save(tmp_path / "x")

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "save_file", full)
    with pytest.raises(FileError, match="No space"):
        record.save(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    same(record, load(tmp_path / "x"))


def test_settings_are_json_or_refused() -> None:
    kept = records.check_settings({"a": [1, {"b": (True, None)}]})
    assert kept == {"a": (1, {"b": (True, None)})}
    deep: object = 1
    for _ in range(50):
        deep = [deep]
    for bad, error in (({"a": float("nan")}, InputError), ({"a": deep}, InputError), ({"a": "\ud800"}, InputError),
                       ({"a": 2**5000}, InputError),
                       ({"a": {1, 2}}, InputTypeError), ({"a": torch.ones(1)}, InputTypeError), ({3: 1}, InputTypeError),
                       ([1], InputTypeError), ({"a": {2: 1}}, InputTypeError)):  # fmt: skip
        with pytest.raises(error):
            records.check_settings(bad)


def test_shared_storage_is_written_whole(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    scores = Scores._adopt("channel", {"a": base[:4], "b": base[2:], "c": base[:4]}, "mine", {}, "rank", None, None)
    scores.save(tmp_path / "x")
    same(scores, Scores.load(tmp_path / "x"))


def test_structure_round_trip() -> None:
    assert Structure.from_json(json.loads(json.dumps(STRUCTURE.to_json()))) == STRUCTURE
    assert Structure.from_json(Structure((), ()).to_json()) == Structure((), ())
