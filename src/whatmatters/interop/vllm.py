"""vLLM: the `quantization_config` of a compressed-tensors checkpoint, restricted to what its released kernels take.

Format-checked only: nothing was run in vLLM. Its kernels for pack-quantized weights take 4 and 8 bits, groups of 32, 64, 128 or a whole
channel, and it fuses q/k/v and gate/up, so sites that read the same input must share a width: the rules of `core.formats.vllm_can_serve`.
"""

from whatmatters.core.formats import VLLM_GROUP_SIZES, VLLM_WIDTHS
from whatmatters.interop._common import Tool, as_json, compressible
from whatmatters.interop.transformers import config

__all__ = ["TOOL"]


TOOL = Tool(
    name="vllm",
    file="quantization_config.json",
    levels=VLLM_WIDTHS,
    group_sizes=VLLM_GROUP_SIZES,
    ties="inputs",
    proof="format-checked only: nothing was run in vLLM",
    usage="whatmatters quantize MODEL --plan PLAN --output DIR writes a checkpoint with this entry; then: vllm serve DIR",
    text=lambda plan: as_json(config(plan)),
    problems=compressible,
)
