"""llama.cpp: the list of tensor types that `llama-quantize --tensor-type-file` reads, a line for each tensor.

Checked against its source (tools/quantize/quantize.cpp and src/llama-quant.cpp of 2026): the file holds NAME=TYPE separated by white space;
NAME is lower-cased and searched as a regular expression in the tensor's name, the first that is found wins. A type whose blocks do not
divide the inputs would silently become another, so such sites are refused here. llama.cpp rounds by itself, best with an importance matrix
(`interop.imatrix`); the plan says only which bits go where. Names follow gguf-py's tensor_mapping.py for Llama-like models, their fused
experts, and GPT-2; nothing was run in llama.cpp, the names were compared with the package gguf.
"""

import re

from whatmatters.core.errors import FormatError, InputError
from whatmatters.core.formats import DENSE_BITS
from whatmatters.core.plans import Plan
from whatmatters.core.sites import Site
from whatmatters.interop._common import Tool, level_of, levels_of, structure_of

__all__ = ["TOOL", "TYPES", "tensor_names"]

TYPES: dict[int, tuple[str, int, int]] = {
    2: ("Q2_K", 256, 84),
    3: ("Q3_K", 256, 110),
    4: ("Q4_K", 256, 144),
    5: ("Q5_K", 256, 176),
    6: ("Q6_K", 256, 210),
    8: ("Q8_0", 32, 34),
}
"""Level to (type, weights in a block, bytes of a block): truly 2.625, 3.4375, 4.5, 5.5, 6.5625 and 8.5 bits a weight."""

DENSE_TYPE = "F16"
"""Type of sites that are left as they are; a tensor that is F16 in the file already is not touched."""

_TENSORS = {
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "attn.c_attn": ("attn_qkv",),
    "attn.c_proj": ("attn_output",),
    "mlp.c_fc": ("ffn_up",),
    "mlp.c_proj": ("ffn_down",),
}
"""A site's name within its block to the tensors that hold it; a fused gate_up parameter becomes two, or stays one for some architectures:
names that a file does not have are ignored there."""


def tensor_names(site: Site) -> tuple[str, ...]:
    """Names of the GGUF tensors a site's weights go to.

    Raises:
        FormatError: the site's name is none that llama.cpp's converter is known to map.

    Example:
        >>> site = Site("model.layers.7.mlp.down_proj", "model.layers.7.mlp.down_proj.weight", (8, 16), "model.layers.7")
        >>> tensor_names(site)
        ('blk.7.ffn_down.weight',)
    """
    within = re.sub(r"\[\d+\]$", "", site.name.removeprefix(f"{site.block}."))
    number = re.search(r"(\d+)$", site.block)
    if within not in _TENSORS or number is None:
        raise FormatError(f"{site.name} has no known tensor in a GGUF file; mapped are {', '.join(_TENSORS)} of numbered blocks")
    return tuple(f"blk.{number[1]}.{tensor}.weight" for tensor in _TENSORS[within])


def _text(plan: Plan) -> str:
    lines: dict[str, str] = {}
    for site in structure_of(plan).sites:
        bits = level_of(plan, site.name)
        for name in tensor_names(site):
            lines[name] = DENSE_TYPE if bits >= DENSE_BITS else TYPES[bits][0]
    return "".join(f"^{name.replace('.', chr(92) + '.')}$={kind}\n" for name, kind in lines.items())


def _problems(plan: Plan) -> list[str]:
    if all(bits >= DENSE_BITS for bits in levels_of(plan).values()):
        return ["every site is left as it is, and it sets types only when it quantizes"]
    problems = []
    for site in structure_of(plan).sites:
        try:
            tensor_names(site)
        except FormatError as error:
            problems.append(str(error))
    return problems


def _stored(shape: tuple[int, int], level: int, group_size: int, symmetric: bool) -> int:
    """Bits of a tensor: whole blocks; its types have scales of their own, so group size and symmetry do not matter."""
    rows, columns = shape
    if level >= DENSE_BITS:
        return DENSE_BITS * rows * columns
    if level not in TYPES:
        raise InputError(f"{level} bits; llama.cpp has types for {', '.join(map(str, TYPES))}")
    kind, block, size = TYPES[level]
    if columns % block:
        raise InputError(f"{kind} packs {block} inputs at a time and does not divide the {columns} there are; use 8 bits or 16 there")
    return rows * (columns // block) * size * 8


TOOL = Tool(
    name="llama.cpp",
    file="tensor-types.txt",
    levels=tuple(TYPES),
    group_sizes=None,
    ties="parameter",
    proof="checked against the source of llama.cpp and the names of the package gguf: nothing was run in it",
    usage="llama-quantize --imatrix IMATRIX --tensor-type-file {file} MODEL-F16.gguf OUT.gguf Q4_K",
    text=_text,
    problems=_problems,
    stored=_stored,
)
