"""transformers: the `quantization_config` entry of config.json that makes it load a compressed-tensors checkpoint.

Executed: checkpoints of mixed bits written by this library are reloaded with `AutoModelForCausalLM.from_pretrained` in the tests, and carry
exactly this entry.
"""

from whatmatters.core.formats import WIDTHS, quantization_config
from whatmatters.core.plans import Plan
from whatmatters.interop._common import Tool, as_json, compressible, grids, skeleton, structure_of

__all__ = ["TOOL", "config"]


def config(plan: Plan) -> dict[str, object]:
    """The `quantization_config` of a checkpoint quantized by this plan: one group for each width, targets by exact name."""
    found = structure_of(plan)
    return quantization_config(skeleton(found), grids(plan, found))


TOOL = Tool(
    name="transformers",
    file="quantization_config.json",
    levels=WIDTHS,
    group_sizes=None,
    ties="parameter",
    proof="executed: reloads with AutoModelForCausalLM.from_pretrained, logits equal",
    usage="whatmatters quantize MODEL --plan PLAN --output DIR writes a checkpoint with this entry; AutoModelForCausalLM loads it",
    text=lambda plan: as_json(config(plan)),
    problems=compressible,
)
