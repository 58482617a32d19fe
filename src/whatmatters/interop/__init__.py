"""Interop: our plans and statistics in the files that other tools already read, each refused before any work where a tool cannot hold it.

`tool(name)` gives what a tool can load (bit widths, group sizes, which sites must share a width) and writes its own file from a plan.
"""

from whatmatters.core.errors import UnknownNameError
from whatmatters.interop import gptqmodel, llama_cpp, llm_compressor, transformers, vllm
from whatmatters.interop._common import Tool
from whatmatters.interop.imatrix import Imatrix, imatrix_of, read_imatrix, write_imatrix

__all__ = ["TOOLS", "Imatrix", "Tool", "imatrix_of", "read_imatrix", "tool", "write_imatrix"]

TOOLS: tuple[Tool, ...] = (llama_cpp.TOOL, gptqmodel.TOOL, llm_compressor.TOOL, vllm.TOOL, transformers.TOOL)
"""The tools a plan can be written for."""


def tool(name: str) -> Tool:
    """The tool of that name, as `plan --for` takes it.

    Raises:
        UnknownNameError: no such tool; the known ones are listed.

    Example:
        >>> tool("vllm").levels
        (4, 8)
    """
    for known in TOOLS:
        if known.name == name:
            return known
    raise UnknownNameError(f"no tool named {name!r:.60}; known: {', '.join(known.name for known in TOOLS)}")
