"""Importance matrices: numbers against hooks on the model, formats against bytes written by hand and against the package gguf."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core.data import Calibration
from whatmatters.core.errors import FileError, FormatError, InputError, NonFiniteError
from whatmatters.core.sites import structure
from whatmatters.core.walk import Block, walk
from whatmatters.interop import Imatrix, imatrix_of, read_imatrix, write_imatrix
from whatmatters.score._common import Statistic, input_statistics
from whatmatters.testing.families import build, inputs


def small() -> Imatrix:
    generator = torch.Generator().manual_seed(0)
    sums = {
        "blk.0.attn_q.weight": torch.rand(1, 8, generator=generator, dtype=torch.float64) * 100,
        "blk.0.ffn_up_exps.weight": torch.rand(3, 5, generator=generator, dtype=torch.float64) * 10,
    }
    counts = {"blk.0.attn_q.weight": torch.tensor([1000.0]).double(), "blk.0.ffn_up_exps.weight": torch.tensor([7.0, 0.0, 900.0]).double()}
    return Imatrix(sums, counts, 512, 2, ("wiki.txt",))


def test_statistics_are_the_mean_square_of_every_input() -> None:
    model = build("llama")
    ids = inputs("llama")
    found = structure(model)
    expected: dict[str, torch.Tensor] = {}

    def note(name: str):  # type: ignore[no-untyped-def]
        return lambda module, args: expected.__setitem__(name, args[0].double().square().flatten(0, 1).mean(0))

    hooks = [model.get_submodule(site.name).register_forward_pre_hook(note(site.name)) for site in found.sites]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    statistics: list[Statistic] = []

    def visit(block: Block) -> dict[str, object]:
        statistics.extend(input_statistics(block, block.sites, kind="diagonal"))
        return {}

    walk(model, Calibration.from_tensors(ids), visit, structure=found, settings={}, commit=False)
    means = imatrix_of(statistics, found).means()
    assert len(means) == 14
    tensors = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for layer in range(2):
        for site, tensor in tensors.items():
            torch.testing.assert_close(means[f"blk.{layer}.{tensor}.weight"][0], expected[f"model.layers.{layer}.{site}"])


def test_experts_go_to_rows_and_unseen_ones_count_nothing() -> None:
    found = structure(build("mixtral"))
    seen = Statistic(torch.full((32,), 6.0, dtype=torch.float64), 1.5, ["model.layers.1.mlp.experts.gate_up_proj[2]"])
    matrix = imatrix_of([seen], found)
    assert set(matrix.sums) == {f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "gate_up")}
    assert matrix.counts["blk.1.ffn_up_exps.weight"].tolist() == [0, 0, 2, 0]  # a whole number, the mean unchanged
    means = matrix.means()["blk.1.ffn_up_exps.weight"]
    assert means[2].tolist() == [4.0] * 32
    assert means[0].tolist() == [1.0] * 32


def test_gguf_round_trip_is_exact_to_float32(tmp_path: Path) -> None:
    path = write_imatrix(small(), tmp_path / "imatrix.gguf")
    got = read_imatrix(path)
    assert (got.chunk_size, got.chunks, got.datasets) == (512, 2, ("wiki.txt",))
    assert list(got.sums) == list(small().sums)
    for name, sums in small().sums.items():
        assert torch.equal(got.sums[name], sums.float().double())
        assert torch.equal(got.counts[name], small().counts[name])
    with pytest.raises(FileError, match="exists already"):
        write_imatrix(small(), path)


def test_gguf_is_what_its_own_package_reads(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = write_imatrix(small(), tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data for t in reader.tensors}
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"], small().sums["blk.0.ffn_up_exps.weight"].float())
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.counts"], [[7], [0], [900]])
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["wiki.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 128)
    writer.add_tensor("x.in_sum2", np.arange(8, dtype=np.float32).reshape(2, 4))
    writer.add_tensor("x.counts", np.array([[1], [2]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_imatrix(tmp_path / "theirs.gguf")
    assert got.sums["x"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (got.chunks, got.chunk_size, got.datasets) == (5, 128, ("a", "b"))


def test_dat_is_the_bytes_llama_cpp_reads(tmp_path: Path) -> None:
    matrix = small()
    data = write_imatrix(matrix, tmp_path / "imatrix.dat").read_bytes()
    place = 0

    def integer() -> int:
        nonlocal place
        place += 4
        return struct.unpack_from("<i", data, place - 4)[0]

    got = {}
    for _ in range(integer()):
        length = integer()
        name = data[place : place + length].decode()
        place += length
        calls, values = integer(), integer()
        got[name] = np.frombuffer(data, "<f4", values, place) / calls  # as llama-quantize divides
        place += 4 * values
        assert calls == {"blk.0.attn_q.weight": 2, "blk.0.ffn_up_exps.weight": 2}[name]  # chunks of 512 tokens, rounded up
    assert integer() == 2
    assert data[place + 4 :] == b"wiki.txt"
    for name, mean in matrix.means().items():
        np.testing.assert_allclose(got[name], mean.flatten(), rtol=1e-6)
    again = read_imatrix(tmp_path / "imatrix.dat")
    for name, mean in matrix.means().items():
        torch.testing.assert_close(again.means()[name].flatten(), mean.flatten(), rtol=1e-6, atol=0)


def test_dat_without_a_tail_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii1sii2f", 1, 1, b"x", 4, 2, 8.0, 2.0))
    assert read_imatrix(path).means()["x"].tolist() == [[2.0, 0.5]]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["dat", "gguf"]))
def test_damaged_files_raise_our_error_only(data: st.DataObject, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = bytearray(_BYTES.setdefault(suffix, _written(suffix, tmp_path_factory)))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(whole)
    with contextlib.suppress(FormatError):
        read_imatrix(path)


_BYTES: dict[str, bytes] = {}


def _written(suffix: str, factory: pytest.TempPathFactory) -> bytes:
    return write_imatrix(small(), factory.mktemp("imatrix") / f"i.{suffix}").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        struct.pack("<i", 0),
        struct.pack("<i", 2**31 - 1),
        struct.pack("<ii", 1, -5),
        struct.pack("<ii1sii", 1, 1, b"x", 1, 2**30),  # more values than bytes
        struct.pack("<ii1siif", 1, 1, b"x", 1, 1, float("nan")),
        struct.pack("<ii1siif", 1, 1, b"x", 1, 1, -1.0),
        struct.pack("<ii1siifi1siif", 2, 1, b"x", 1, 1, 1.0, 1, b"x", 1, 1, 1.0),  # a name twice
        struct.pack("<ii1siifii", 1, 1, b"x", 1, 1, 1.0, 3, 0) + b"tail",
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        # an array of arrays
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 2**40),
        # two tensors over the same bytes, larger than the file together
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q9sIQQIQ", 9, b"x.in_sum2", 2, 2**40, 2**40, 0, 0),
    ],
)
def test_attacks_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        read_imatrix(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "a\0b"):
        with pytest.raises(FileError):
            read_imatrix(path)


def test_bad_matrices_are_refused() -> None:
    one = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(InputError, match="one at least"):
        Imatrix({}, {})
    with pytest.raises(InputError, match="expected"):
        Imatrix({"x": one}, {"x": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(NonFiniteError, match="x"):
        Imatrix({"x": one / 0}, {"x": torch.ones(1, dtype=torch.float64)})
    with pytest.raises(InputError, match="negative"):
        Imatrix({"x": -one}, {"x": torch.ones(1, dtype=torch.float64)})
    with pytest.raises(InputError, match="longer"):
        Imatrix({"x" * 56: one}, {"x" * 56: torch.ones(1, dtype=torch.float64)})
    with pytest.raises(FormatError, match="no known tensor"):
        imatrix_of([Statistic(torch.ones(16, dtype=torch.float64), 1.0, ["0"])], structure(build("sequential")))
