"""llm-compressor: a recipe in which its own GPTQ gives every site the bits of the plan, targets by exact name.

Executed where llm-compressor 0.14 is installed in an environment of its own (an optional test): the recipe is parsed, every target matches
its module, and the checkpoint of a one-shot run at 2 to 8 bits reloads in transformers. Its pack-quantized format takes 1 bit too.
"""

from typing import Any

import yaml

from whatmatters.core.formats import WIDTHS
from whatmatters.core.plans import Plan
from whatmatters.interop._common import HEAD, Tool, compressible
from whatmatters.interop.transformers import config

__all__ = ["TOOL", "recipe"]


def recipe(plan: Plan) -> dict[str, Any]:
    """The recipe: one GPTQ stage with a group of targets for each width; what no target names stays as it is."""
    entry: Any = config(plan)
    modifier = {"ignore": [HEAD], "config_groups": entry["config_groups"]}
    return {"quantization_stage": {"quantization_modifiers": {"GPTQModifier": modifier}}}


TOOL = Tool(
    name="llm-compressor",
    file="recipe.yaml",
    levels=WIDTHS,
    group_sizes=None,
    ties="parameter",
    proof="executed with llm-compressor 0.14 (optional test): targets matched, one-shot run reloaded in transformers",
    usage='oneshot(model=MODEL, dataset=DATA, recipe="{file}", output_dir=DIR)',
    text=lambda plan: yaml.safe_dump(recipe(plan), sort_keys=False),
    problems=compressible,
)
