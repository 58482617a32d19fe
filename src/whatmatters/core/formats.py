"""Quantized weights as records, their exact size, and the compressed-tensors format that holds them.

A quantizer leaves two things in a model: the dequantized weights, which every other part of the library simply uses, and one
`QuantizedWeight` a site, from which the checkpoint is written. Both agree to the bit, and so does what `transformers` computes from the
file:

* Symmetric: codes times scale, in the model's dtype. The 16-bit scale of the file is widened first, which is exact.
* Asymmetric: (codes - zero point) times scale, in the scale's own 16-bit dtype, and the product is widened. transformers 5.23 cannot load
  packed zero points the usual way (it expects them unpacked), but does with `"dequantize": true` in the file's own configuration, where
  this is the arithmetic. That way knows only one kind of quantized site, so asymmetric sites must all have the same bits and groups.

Scales take 16 bits whatever the model's dtype, so that the size of a site does not depend on it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from jaxtyping import BFloat16, Float, Float16, Int8
from torch import Tensor, nn

from whatmatters.core.errors import FormatError, InputError, NonFiniteError
from whatmatters.core.sites import is_stack

__all__ = [
    "WIDTHS",
    "QuantizedGrid",
    "QuantizedWeight",
    "attach",
    "attached",
    "check_compressible",
    "compressed_state",
    "dequantize",
    "detach",
    "quantization_config",
    "round_scale",
    "stored_bits",
    "vllm_can_serve",
]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""Bits a code can have in the pack-quantized format; all of them reload bit-equal in transformers."""

DENSE_BITS = 16
"""Levels from here on mean that a site is left as it is."""

_ATTRIBUTE = "_whatmatters_quantized"


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One quantized site: what the checkpoint holds of it.

    Attributes:
        codes: (out, in), signed, within [-2^(bits-1), 2^(bits-1) - 1].
        scale: (out, groups), positive, in a 16-bit dtype: see `round_scale`.
        zero_point: (out, groups), in the range of the codes; None if symmetric.
        bits: width of a code, 2 to 8.
        group_size: consecutive inputs that share a scale; -1 means one scale per output channel.
    """

    codes: Int8[Tensor, "out in"]
    scale: Float16[Tensor, "out groups"] | BFloat16[Tensor, "out groups"]
    zero_point: Int8[Tensor, "out groups"] | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        rows, columns = self.codes.shape
        groups = _groups(columns, self.group_size)
        if self.scale.shape != (rows, groups):
            raise InputError(f"scale has shape {tuple(self.scale.shape)}; expected {(rows, groups)}: (out, groups)")
        if not bool(torch.isfinite(self.scale).all()):
            raise NonFiniteError("a scale is not finite; pass the scales through round_scale")
        if not bool((self.scale > 0).all()):
            raise InputError("a scale is zero or negative; pass the scales through round_scale")
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        for name, values in (("codes", self.codes), ("zero_point", self.zero_point)):
            if values is not None and values.numel() and not (low <= int(values.min()) and int(values.max()) <= high):
                raise InputError(f"{name} leave [{low}, {high}], the range of {self.bits} bits")

    @property
    def symmetric(self) -> bool:
        """Whether codes are signed around zero, without zero points."""
        return self.zero_point is None

    @property
    def kind(self) -> tuple[int, int, bool]:
        """(bits, group size, symmetric): sites of one kind share a group of the configuration."""
        return self.bits, self.group_size, self.symmetric

    @property
    def stored_bits(self) -> int:
        """Bits this site takes on disk."""
        rows, columns = self.codes.shape
        return stored_bits((rows, columns), self.bits, group_size=self.group_size, symmetric=self.symmetric)


@dataclass(frozen=True, eq=False)
class QuantizedGrid:
    """The grid of a quantized site without its codes: what is kept with a model in memory, since the weights themselves tell the codes.

    Attributes:
        scale: (out, groups), positive, in a 16-bit dtype: see `round_scale`.
        zero_point: (out, groups), in the range of the codes; None if symmetric.
        bits: width of a code, 2 to 8.
        group_size: consecutive inputs that share a scale; -1 means one scale per output channel.
    """

    scale: Float16[Tensor, "out groups"] | BFloat16[Tensor, "out groups"]
    zero_point: Int8[Tensor, "out groups"] | None
    bits: int
    group_size: int

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def symmetric(self) -> bool:
        """Whether codes are signed around zero, without zero points."""
        return self.zero_point is None

    @property
    def kind(self) -> tuple[int, int, bool]:
        """(bits, group size, symmetric): sites of one kind share a group of the configuration."""
        return self.bits, self.group_size, self.symmetric

    def with_codes(self, codes: Int8[Tensor, "out in"]) -> QuantizedWeight:
        """The record with these codes."""
        return QuantizedWeight(codes, self.scale, self.zero_point, self.bits, self.group_size)

    def codes_of(self, weight: Float[Tensor, "out in"]) -> Int8[Tensor, "out in"]:
        """Each weight's nearest code: round(w / scale) + zero point, clamped to the code range."""
        codes = (weight.float().unflatten(1, (self.scale.shape[1], -1)) / self.scale.float()[..., None]).round_()
        if self.zero_point is not None:
            codes += self.zero_point.float()[..., None]
        return codes.clamp_(*self.code_range).flatten(1).to(torch.int8)


def _check_bits(bits: int) -> None:
    if bits not in WIDTHS:
        raise InputError(f"{bits} bits per weight cannot be stored; choose from {WIDTHS}, or {DENSE_BITS} to leave a site as it is")


def _groups(columns: int, group_size: int) -> int:
    if group_size == -1:
        return 1
    if group_size < 1:
        raise InputError(f"group size {group_size}; expected a positive number of inputs, or -1 for one scale per output channel")
    if columns % group_size:
        raise InputError(f"group size {group_size} does not divide the {columns} inputs; choose a divisor, or -1 for one scale per channel")
    return columns // group_size


def round_scale(scale: Float[Tensor, "*shape"], model_dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Scales as the file will hold them: quantizers round first and compute their codes from the result.

    Args:
        scale: scales of one site, non-negative; zero where a whole group is zero.
        model_dtype: dtype of the model's weights, which is what the loader turns the scales into.

    Returns:
        Positive scales in a 16-bit dtype: bfloat16 for a bfloat16 model; float16 otherwise, except where a scale of a float32 model
        leaves [2^-16, 2^7], in which float16 is the more exact of the two and codes times scale stay finite. Zero scales become one.

    Raises:
        NonFiniteError: a scale is NaN or infinite.
        InputError: a scale is negative, or too large for the 16 bits.

    Example:
        >>> round_scale(torch.tensor([0.1, 0.0]), torch.float32)
        tensor([0.1000, 1.0000], dtype=torch.float16)
    """
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError("a quantization scale is not finite: the weights have NaN or infinity, or an empty range")
    if bool((scale < 0).any()):
        raise InputError("a quantization scale is negative; expected zero or more")
    filled = torch.where(scale == 0, torch.ones_like(scale), scale)
    fits = bool(((filled >= 2**-16) & (filled <= 2**7)).all())
    narrow = model_dtype == torch.bfloat16 or (model_dtype != torch.float16 and not fits)
    dtype = torch.bfloat16 if narrow else torch.float16
    # The smallest positive value stands in for scales that would round to zero.
    rounded = filled.clamp(min=torch.finfo(torch.bfloat16).tiny if narrow else 2**-24).to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise InputError(f"a quantization scale of {float(filled.max()):.3g} does not fit {dtype}; the weights are too large")
    return rounded


def dequantize(record: QuantizedWeight, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The weights of a record, to the bit what transformers makes of the file.

    Args:
        record: a quantized site.
        dtype: dtype of the model's weights.

    Returns:
        (out, in) in `dtype`.

    Example:
        >>> record = QuantizedWeight(torch.tensor([[-4, 3]], dtype=torch.int8), torch.tensor([[0.5]], dtype=torch.float16), None, 3, -1)
        >>> dequantize(record, torch.float32)
        tensor([[-2.0000,  1.5000]])
    """
    codes = record.codes.unflatten(1, (record.scale.shape[1], -1))
    if record.zero_point is None:
        weight = codes.to(dtype) * record.scale.to(dtype)[..., None]
    else:
        arithmetic = record.scale.dtype
        weight = (codes.to(arithmetic) - record.zero_point.to(arithmetic)[..., None]) * record.scale[..., None]
    return weight.flatten(1).to(dtype)


def stored_bits(shape: tuple[int, int], bits: int, *, group_size: int, symmetric: bool) -> int:
    """Bits a site takes on disk, exactly: packed codes, scales, zero points and the entry that tells the shape.

    Args:
        shape: (out, in).
        bits: width of a code, 2 to 8; 16 or more for a site left as it is.
        group_size: inputs per scale, or -1.
        symmetric: whether there are no zero points.

    Returns:
        Bits: codes fill 32-bit words row by row, scales take 16 bits, zero points fill 32-bit words column by column, the shape entry is
        two 64-bit numbers. 16 bits a weight for a site left as it is.

    Raises:
        InputError: a width the format does not hold, or a group size that does not divide the inputs.

    Example:
        >>> stored_bits((64, 128), 3, group_size=32, symmetric=True) / (64 * 128)  # 3 + 16/32 + the shape entry
        3.515625
    """
    rows, columns = shape
    if bits >= DENSE_BITS:
        return DENSE_BITS * rows * columns
    _check_bits(bits)
    groups = _groups(columns, group_size)
    codes = rows * 32 * math.ceil(columns * bits / 32)
    zero_points = 0 if symmetric else groups * 32 * math.ceil(rows * bits / 32)
    return codes + 16 * rows * groups + zero_points + 2 * 64


def attach(model: nn.Module, records: Mapping[str, QuantizedWeight | QuantizedGrid]) -> None:
    """Keep the records of quantized sites with the model, replacing older ones of the same sites.

    They are a plain attribute: no part of the state dict, copied by `copy.deepcopy`.
    """
    object.__setattr__(model, _ATTRIBUTE, {**attached(model), **records})


def attached(model: nn.Module) -> dict[str, QuantizedWeight | QuantizedGrid]:
    """The records kept with a model, by site; empty if it was not quantized."""
    return dict(getattr(model, _ATTRIBUTE, {}))


def detach(model: nn.Module) -> None:
    """Forget the records of a model, for one whose weights are changed on purpose after quantization."""
    model.__dict__.pop(_ATTRIBUTE, None)


def check_compressible(model: nn.Module, kinds: Mapping[str, tuple[int, int, bool]]) -> None:
    """Refuse what a compressed-tensors checkpoint cannot hold, before any work.

    Args:
        model: the model, may be on the meta device.
        kinds: (bits, group size, symmetric) of each site; sites at 16 bits or more are left as they are.

    Raises:
        FormatError: names the site, the reason and the remedy.
    """
    remedy = 'save with format="dense", or leave it at 16 bits'
    shared = _shared_parameters(model)
    planned = {site: kind for site, kind in kinds.items() if kind[0] < DENSE_BITS}
    for name, (bits, group_size, symmetric) in planned.items():
        if "[" in name:
            raise FormatError(f"{name} is a slice of a larger parameter (an expert), which compressed-tensors cannot hold; {remedy}")
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise FormatError(f"the model has no module {name!r} to quantize; site names are module paths") from None
        if not isinstance(module, nn.Linear):
            raise FormatError(f"{name} is a {type(module).__name__}; compressed-tensors holds torch.nn.Linear only; {remedy}")
        if id(module.weight) in shared:
            raise FormatError(f"the weight of {name} is shared with {shared[id(module.weight)]}; untie them first, or {remedy}")
        try:
            stored_bits((module.out_features, module.in_features), bits, group_size=group_size, symmetric=symmetric)
        except InputError as error:
            raise FormatError(f"{name}: {error}; {remedy}") from None
        if bits == 4 and not symmetric and module.out_features <= 8 and group_size not in (-1, module.in_features):
            # compressed-tensors 0.20 views this one word per group with a stride that torch refuses.
            raise FormatError(f"{name} has {module.out_features} outputs; asymmetric 4-bit groups reload from 9 outputs on; {remedy}")
    different = sorted(set(planned.values()))
    if len(different) > 1 and not all(symmetric for _, _, symmetric in different):
        raise FormatError(
            f"asymmetric sites of different kinds {different} (bits, group size, symmetric) do not reload in transformers; use the same "
            'bits and group size everywhere, symmetric quantization, or format="dense"'
        )
    stacked = [
        f"{name}.{kind}".lstrip(".")
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for kind, parameter in module.named_parameters(recurse=False)
        if is_stack(parameter)
    ]
    if planned and stacked:
        raise FormatError(
            f"{stacked[0]} is a 3-D parameter (experts), which transformers does not reload next to compressed-tensors sites; "
            'save with format="dense"'
        )


def _shared_parameters(model: nn.Module) -> dict[int, str]:
    """Parameters that have more than one name, by identity, with their first name."""
    first: dict[int, str] = {}
    shared: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            shared[id(parameter)] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return shared


def quantization_config(model: nn.Module, records: Mapping[str, QuantizedWeight | QuantizedGrid]) -> dict[str, object]:
    """The `quantization_config` entry of config.json: one group for each kind of site, targets by exact name.

    Linears that are not quantized are listed under `ignore`, which vLLM wants.
    """
    kinds = sorted({record.kind for record in records.values()})
    groups: dict[str, object] = {}
    for number, kind in enumerate(kinds):
        bits, group_size, symmetric = kind
        weights: dict[str, object] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        weights |= {"strategy": "channel", "group_size": None} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        groups[f"group_{number}"] = {"targets": [n for n, r in records.items() if r.kind == kind], "weights": weights}
    config: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in records],
    }
    if not all(symmetric for _, _, symmetric in kinds):
        config["dequantize"] = True
    return config


def compressed_state(model: nn.Module, records: Mapping[str, QuantizedWeight | QuantizedGrid]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: packed for the sites with a record, the others as they are or in 16 bits where that loses nothing.

    Args:
        model: the model; its weights must be what the records say.
        records: quantized sites; empty for a dense checkpoint.

    Raises:
        FormatError: a site's weight is no longer what its record says.
    """
    state: dict[str, Tensor] = {}
    narrow: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay one tensor
    for name, tensor in model.state_dict().items():
        site, _, kind = name.rpartition(".")
        record = records.get(site) if kind == "weight" else None
        if record is None:
            key = (tensor.data_ptr(), tensor.shape)
            state[name] = narrow[key] = narrow[key] if key in narrow else _narrowed(tensor)
            continue
        if isinstance(record, QuantizedGrid):
            record = record.with_codes(record.codes_of(tensor))
        if not torch.equal(dequantize(record, tensor.dtype), tensor.to(record.codes.device)):
            raise FormatError(
                f"the weight of {site} was changed after it was quantized, so the packed checkpoint would differ from the model; "
                'save with format="dense", or quantize last'
            )
        state[f"{site}.weight_packed"] = pack_to_int32(record.codes, record.bits)
        state[f"{site}.weight_scale"] = record.scale.contiguous()
        state[f"{site}.weight_shape"] = torch.tensor(record.codes.shape, dtype=torch.int64)
        if record.zero_point is not None:
            state[f"{site}.weight_zero_point"] = pack_to_int32(record.zero_point, record.bits, packed_dim=0)
    return state


def _narrowed(tensor: Tensor) -> Tensor:
    """The tensor in 16 bits if that loses nothing, as for a float32 model that was read from a float16 file."""
    if tensor.dtype in (torch.float32, torch.float64) and tensor.device.type != "meta":
        for dtype in (torch.float16, torch.bfloat16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(tensor.dtype), tensor):
                return narrow
    return tensor


VLLM_WIDTHS = (4, 8)
VLLM_GROUP_SIZES = (-1, 32, 64, 128)


def vllm_can_serve(
    levels: Mapping[str, int], *, group_size: int, symmetric: bool = True, ties: Iterable[tuple[str, ...]] = ()
) -> list[str]:
    """What keeps vLLM from serving such a checkpoint, judged by the format alone: nothing was run in vLLM.

    Args:
        levels: bits of each site, 16 or more for sites left as they are.
        group_size: inputs per scale, or -1.
        symmetric: whether there are no zero points.
        ties: groups of sites that read the same input (`Structure.ties`); vLLM fuses them into one matrix.

    Returns:
        One sentence a problem; empty if nothing speaks against it.

    Example:
        >>> vllm_can_serve({"a": 3, "b": 4}, group_size=128)
        ['3 bits (a): released vLLM kernels for this format take 4 and 8 bits']
    """
    problems = []
    for bits in sorted({b for b in levels.values() if b < DENSE_BITS and b not in VLLM_WIDTHS}):
        sites = [name for name, b in levels.items() if b == bits]
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        problems.append(f"{bits} bits ({sites[0]}{more}): released vLLM kernels for this format take 4 and 8 bits")
    quantized = any(bits < DENSE_BITS for bits in levels.values())
    if quantized and group_size not in VLLM_GROUP_SIZES:
        problems.append(f"group size {group_size}: vLLM's kernels take 32, 64, 128 or -1")
    for group in ties:
        different = sorted({levels.get(name, DENSE_BITS) for name in group})
        if len(different) > 1:
            problems.append(f"{', '.join(group)} have different bits {different}: vLLM fuses them into one matrix of one width")
    return problems
