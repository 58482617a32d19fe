"""Records, packing and sizes against bit-by-bit Python, compressed-tensors' own decompression, and the tensors really written."""

import copy
import json
import math
from collections import OrderedDict

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from whatmatters.core.errors import FormatError, InputError, NonFiniteError
from whatmatters.core.formats import (
    WIDTHS,
    QuantizedWeight,
    attach,
    attached,
    check_compressible,
    compressed_state,
    dequantize,
    detach,
    quantization_config,
    round_scale,
    stored_bits,
    vllm_can_serve,
)


def random_record(
    rows: int,
    groups: int,
    width: int,
    bits: int,
    symmetric: bool,
    *,
    channel: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedWeight:
    draw = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = 1 if channel else groups
    codes = torch.randint(low, high, (rows, groups * width), generator=draw, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=draw) * 0.1 + 0.001).to(dtype)
    zero_point = None if symmetric else torch.randint(low, high, (rows, groups), generator=draw, dtype=torch.int8)
    return QuantizedWeight(codes, scale, zero_point, bits, -1 if channel else width)


def one_linear(record: QuantizedWeight, dtype: torch.dtype = torch.float32) -> nn.Module:
    rows, columns = record.codes.shape
    model = nn.Sequential(OrderedDict(site=nn.Linear(columns, rows, bias=False, dtype=dtype)))
    with torch.no_grad():
        model.site.weight.copy_(dequantize(record, dtype))
    return model


def scheme(record: QuantizedWeight) -> QuantizationScheme:
    group = {"strategy": "channel"} if record.group_size == -1 else {"strategy": "group", "group_size": record.group_size}
    arguments = QuantizationArgs(num_bits=record.bits, type="int", symmetric=record.symmetric, **group)
    return QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")


records = st.builds(
    random_record,
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    width=st.integers(1, 40),
    bits=st.sampled_from(WIDTHS),
    symmetric=st.booleans(),
    channel=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)


def unpack_row(words: list[int], bits: int, count: int) -> list[int]:
    """A row of codes read as one long little-endian number."""
    stream = sum((word & 0xFFFFFFFF) << (32 * position) for position, word in enumerate(words))
    return [((stream >> (bits * i)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(records)
def test_the_packed_words_hold_the_codes_bit_by_bit(record: QuantizedWeight) -> None:
    state = compressed_state(one_linear(record), {"site": record})
    rows, columns = record.codes.shape
    assert state["site.weight_shape"].tolist() == [rows, columns]
    for words, codes in zip(state["site.weight_packed"].tolist(), record.codes.tolist(), strict=True):
        assert unpack_row(words, record.bits, columns) == codes
    if record.zero_point is not None:
        packed = state["site.weight_zero_point"].T.tolist()
        for words, column in zip(packed, record.zero_point.T.tolist(), strict=True):
            assert unpack_row(words, record.bits, rows) == column


@settings(max_examples=60, deadline=None)
@given(records, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_dequantize_is_what_compressed_tensors_computes(record: QuantizedWeight, dtype: torch.dtype) -> None:
    rows, groups = record.scale.shape
    assume(record.symmetric or record.bits != 4 or rows > 8 or groups == 1)  # refused: see check_compressible
    state = {k.removeprefix("site."): v for k, v in compressed_state(one_linear(record), {"site": record}).items()}
    if record.symmetric:  # this is how transformers' loader gives the scale to the decompressor
        state["weight_scale"] = state["weight_scale"].to(dtype)
    theirs = PackedQuantizationCompressor.decompress(state, scheme(record))["weight"].to(dtype)
    assert torch.equal(dequantize(record, dtype), theirs)


@settings(max_examples=40, deadline=None)
@given(records)
def test_symmetric_float32_weights_are_the_exact_products(record: QuantizedWeight) -> None:
    exact = record.codes.double().unflatten(1, (record.scale.shape[1], -1)) * record.scale.double()[..., None]
    symmetric = QuantizedWeight(record.codes, record.scale, None, record.bits, record.group_size)
    assert torch.equal(dequantize(symmetric, torch.float32).double(), exact.flatten(1))


@settings(max_examples=60, deadline=None)
@given(records)
def test_stored_bits_counts_every_byte_written(record: QuantizedWeight) -> None:
    written = compressed_state(one_linear(record), {"site": record})
    assert record.stored_bits == 8 * sum(t.numel() * t.element_size() for t in written.values())


def test_stored_bits_by_hand() -> None:
    # 10 inputs at 3 bits: 30 bits, one word a row; 2 scales a row; shape entry.
    assert stored_bits((4, 10), 3, group_size=5, symmetric=True) == 4 * 32 + 4 * 2 * 16 + 128
    # Asymmetric: 4 zero points of 3 bits fill one word for each of the 2 groups.
    assert stored_bits((4, 10), 3, group_size=5, symmetric=False) == 4 * 32 + 4 * 2 * 16 + 2 * 32 + 128
    assert stored_bits((4, 11), 3, group_size=-1, symmetric=True) == 4 * 64 + 4 * 16 + 128  # 33 bits need two words
    assert stored_bits((4, 10), 16, group_size=3, symmetric=True) == 640
    assert stored_bits((4096, 4096), 4, group_size=128, symmetric=True) / 4096**2 == pytest.approx(4.125, abs=1e-5)


@pytest.mark.parametrize(("bits", "group_size"), [(1, -1), (9, -1), (0, -1), (4, 3), (4, 0), (4, -2), (4, 11)])
def test_stored_bits_refuses(bits: int, group_size: int) -> None:
    with pytest.raises(InputError):
        stored_bits((4, 10), bits, group_size=group_size, symmetric=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_rounded_scales_are_close_positive_and_stay(values: list[float], dtype: torch.dtype) -> None:
    scale = torch.tensor(values, dtype=torch.float32)
    rounded = round_scale(scale, dtype)
    assert rounded.dtype in (torch.float16, torch.bfloat16)
    assert bool((rounded > 0).all())
    assert torch.equal(round_scale(rounded.float(), dtype).float(), rounded.float())
    normal = scale > 1e-37
    error = (rounded.double() - scale.double()).abs()[normal] / scale.double()[normal]
    assert bool((error <= 2**-8).all())
    assert bool((rounded[scale == 0] == 1).all())


def test_scale_dtype_follows_the_loader() -> None:
    ordinary, wide = torch.tensor([0.01, 0.3]), torch.tensor([1e-7, 0.3])
    assert round_scale(ordinary, torch.float32).dtype == torch.float16
    assert round_scale(wide, torch.float32).dtype == torch.bfloat16
    assert round_scale(ordinary, torch.bfloat16).dtype == torch.bfloat16  # the loader turns it into bfloat16 anyway
    assert round_scale(wide, torch.float16).dtype == torch.float16
    assert float(round_scale(torch.tensor([1e-12]), torch.float16)) == 2**-24


def test_round_scale_refuses() -> None:
    with pytest.raises(NonFiniteError):
        round_scale(torch.tensor([1.0, math.nan]), torch.float32)
    with pytest.raises(InputError, match="negative"):
        round_scale(torch.tensor([-1.0]), torch.float32)
    with pytest.raises(InputError, match="too large"):
        round_scale(torch.tensor([1e6]), torch.float16)


def int8(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.parametrize(
    ("codes", "scale", "zero_point", "bits", "group_size", "message"),
    [
        ([[0, 4]], [[1.0]], None, 3, -1, "leave"),
        ([[0, -5]], [[1.0]], None, 3, -1, "leave"),
        ([[0, 1]], [[1.0]], [[4]], 3, -1, "zero_point leave"),
        ([[0, 1]], [[0.0]], None, 3, -1, "zero or negative"),
        ([[0, 1]], [[math.inf]], None, 3, -1, "not finite"),
        ([[0, 1]], [[1.0]], None, 3, 1, "shape"),
        ([[0, 1]], [[1.0]], None, 1, -1, "1 bits"),
        ([[0, 1, 0]], [[1.0]], None, 3, 2, "does not divide"),
    ],
)
def test_a_record_that_cannot_be_is_refused(codes, scale, zero_point, bits, group_size, message) -> None:
    zero = None if zero_point is None else int8(zero_point)
    with pytest.raises(InputError, match=message):
        QuantizedWeight(int8(codes), torch.tensor(scale, dtype=torch.float16), zero, bits, group_size)


def test_records_travel_with_the_model_but_not_in_its_state() -> None:
    record = random_record(4, 2, 8, 4, True)
    model = one_linear(record)
    names = set(model.state_dict())
    attach(model, {"site": record})
    other = random_record(4, 2, 8, 3, True)
    twin = copy.deepcopy(model)
    attach(model, {"site": other})
    assert set(model.state_dict()) == names
    assert attached(model)["site"] is other
    assert torch.equal(attached(twin)["site"].codes, record.codes)
    attached(model).clear()
    assert attached(model)
    detach(model)
    assert attached(model) == {}
    assert attached(twin)
    detach(model)


def test_a_changed_weight_is_noticed() -> None:
    record = random_record(4, 2, 8, 4, True)
    model = one_linear(record)
    with torch.no_grad():
        model.site.weight[2, 3] += 1e-6
    with pytest.raises(FormatError, match="site was changed"):
        compressed_state(model, {"site": record})


def test_dense_tensors_take_16_bits_only_where_that_loses_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False), c=nn.Linear(8, 8, bias=False)))
    with torch.no_grad():
        model.a.weight.copy_(torch.randn(8, 8, generator=draw).half())
        model.b.weight.copy_(torch.randn(8, 8, generator=draw).bfloat16() * 2.0**20)
        model.c.weight.copy_(torch.randn(8, 8, generator=draw))
    model.d = nn.Linear(8, 8, bias=False)
    model.d.weight = model.a.weight
    state = compressed_state(model, {})
    assert [state[f"{n}.weight"].dtype for n in "abc"] == [torch.float16, torch.bfloat16, torch.float32]
    assert state["d.weight"].data_ptr() == state["a.weight"].data_ptr()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name].float(), tensor)


def tied() -> nn.Module:
    model = nn.Sequential(OrderedDict(a=nn.Linear(32, 32), b=nn.Linear(32, 32)))
    model.b.weight = model.a.weight
    return model


@pytest.mark.parametrize(
    ("model", "kinds", "message"),
    [
        (nn.Sequential(OrderedDict(a=Conv1D(32, 32))), {"a": (4, -1, True)}, "a is a Conv1D"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 32))), {"a.experts.up[3]": (4, -1, True)}, r"a.experts.up\[3\] is a slice"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 32))), {"b": (4, -1, True)}, "no module 'b'"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 32))), {"a": (4, 20, True)}, "a: group size 20 does not divide"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 32))), {"a": (9, -1, True)}, "a: 9 bits"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 8))), {"a": (4, 16, False)}, "a has 8 outputs"),
        (tied(), {"b": (4, -1, True)}, "shared with a.weight"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 32), b=nn.Linear(32, 32))), {"a": (4, -1, False), "b": (3, -1, False)}, "asymmetric"),
        (nn.Sequential(OrderedDict(a=nn.Linear(32, 32), b=nn.Linear(32, 32))), {"a": (4, -1, False), "b": (4, -1, True)}, "asymmetric"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(model: nn.Module, kinds, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        check_compressible(model, kinds)
    if len(kinds) == 1:
        check_compressible(model, {name: (16, g, s) for name, (_, g, s) in kinds.items()})


def test_three_dimensional_experts_are_refused_and_convolutions_are_not() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(32, 32), conv=nn.Conv1d(4, 4, 3)))
    check_compressible(model, {"a": (4, -1, True)})
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(FormatError, match=r"experts\.up is a 3-D parameter"):
        check_compressible(model, {"a": (4, -1, True)})
    check_compressible(model, {})


def test_the_configuration_is_one_that_compressed_tensors_reads() -> None:
    model = nn.Sequential(OrderedDict((n, nn.Linear(64, 8)) for n in "abcd"))
    made = {
        "a": random_record(8, 2, 32, 3, True),
        "b": random_record(8, 2, 32, 4, True),
        "c": random_record(8, 1, 64, 4, True, channel=True),
    }
    config = json.loads(json.dumps(quantization_config(model, made)))
    assert config["ignore"] == ["d"]
    assert "dequantize" not in config
    read = QuantizationConfig.model_validate(config)
    found = {target: group.weights for group in read.config_groups.values() for target in group.targets}
    assert {n: (w.num_bits, str(w.strategy), w.group_size) for n, w in found.items()} == {
        "a": (3, "group", 32),
        "b": (4, "group", 32),
        "c": (4, "channel", None),
    }
    assert quantization_config(model, {"a": random_record(8, 2, 32, 3, False)})["dequantize"] is True


def test_vllm_problems() -> None:
    assert vllm_can_serve({"q": 4, "k": 4, "o": 8, "d": 16}, group_size=128, ties=[("q", "k")]) == []
    problems = vllm_can_serve({"q": 4, "k": 3, "o": 3}, group_size=48, ties=[("q", "k")])
    assert len(problems) == 3
    assert "3 bits (k and 1 more)" in problems[0]
    assert "48" in problems[1]
    assert "[3, 4]" in problems[2]
    assert vllm_can_serve({"q": 16}, group_size=48) == []
    assert vllm_can_serve({"q": 4}, group_size=-1, ties=[("q", "v")])  # v is left dense
