"""GPTQModel: a quantize_config.json whose `dynamic` gives every site the bits of the plan by an anchored regular expression.

Checked against its source (7.3.4, `quantization/config.py`): a key "+:^name$" overrides settings of the module of that full name,
"-:^name$" leaves it alone; keys are matched from the start of the name, negative ones first. Widths of 5 to 7 bits exist there only in a
layout of its own ("gptq_p"), which other loaders of GPTQ checkpoints do not read, so they are refused. Nothing was run: it does not build
here.
"""

import math
import re
from collections import Counter
from typing import Any

from whatmatters.core.errors import InputError
from whatmatters.core.formats import DENSE_BITS
from whatmatters.core.plans import Plan
from whatmatters.interop._common import Tool, as_json, group_of, levels_of, structure_of

__all__ = ["TOOL", "quantize_config"]


def quantize_config(plan: Plan) -> dict[str, Any]:
    """Keyword arguments of GPTQModel's `QuantizeConfig`: the plan's most frequent width, and `dynamic` with every site by name."""
    group_size, symmetric = group_of(plan)
    levels = levels_of(plan)
    dynamic: dict[str, dict[str, int]] = {}
    for name, bits in levels.items():
        sign, settings = ("-", {}) if bits >= DENSE_BITS else ("+", {"bits": bits, "group_size": group_size})
        dynamic[f"{sign}:^{re.escape(name)}$"] = settings
    counts = Counter(bits for bits in levels.values() if bits < DENSE_BITS)
    return {"bits": max(counts, key=lambda bits: (counts[bits], bits)), "group_size": group_size, "sym": symmetric, "dynamic": dynamic}


def _problems(plan: Plan) -> list[str]:
    levels = levels_of(plan)
    if all(bits >= DENSE_BITS for bits in levels.values()):
        return ["every site is left as it is, so there is nothing to quantize"]
    return [
        f"{site.name} is a slice of {site.parameter}, and it takes experts apart under names of its own"
        for site in structure_of(plan).sites
        if site.index is not None
    ]


def _stored(shape: tuple[int, int], level: int, group_size: int, symmetric: bool) -> int:
    """Bits of qweight, qzeros (there with symmetric grids too), scales and g_idx."""
    rows, columns = shape
    if level >= DENSE_BITS:
        return DENSE_BITS * rows * columns
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise InputError(f"group size {group_size} does not divide the {columns} inputs; choose a divisor, or -1")
    groups = columns // size
    return 32 * rows * math.ceil(columns * level / 32) + groups * 32 * math.ceil(rows * level / 32) + 16 * groups * rows + 32 * columns


TOOL = Tool(
    name="gptqmodel",
    file="quantize_config.json",
    levels=(2, 3, 4, 8),
    group_sizes=(-1, 16, 32, 64, 128, 256, 512, 1024),
    ties="parameter",
    proof="checked against the source of GPTQModel 7.3.4: nothing was run in it",
    usage='GPTQModel.load(MODEL, QuantizeConfig(**json.load(open("{file}")))).quantize(TEXTS)',
    text=lambda plan: as_json(quantize_config(plan)),
    problems=_problems,
    stored=_stored,
)
