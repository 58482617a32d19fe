"""whatmatters: find out what matters in a model and its data, and spend bits, parameters and compute there.

    import whatmatters as wm

    model, tokenizer = wm.load("path-or-hub-id")
    calibration = wm.data.calibration(tokenizer, "my.jsonl", samples=128, length=512)
    scores = wm.score.layer_shift(model, calibration)
    bits = wm.allocate.bits(scores, average=3.5)
    report = wm.quantize.rsq(model, calibration, bits=bits)
    wm.save(model, tokenizer, "out/")

The names below are imported when they are first used: `import whatmatters` costs milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whatmatters import infer, interop, nn, prune, quantize, represent, score, select, tune
    from whatmatters.core import allocation as allocate
    from whatmatters.core import data, embedded, errors
    from whatmatters.core.checkpoint import load, load_meta, save
    from whatmatters.core.data import Calibration
    from whatmatters.core.evaluate import compare, evaluate
    from whatmatters.core.plans import Plan
    from whatmatters.core.report import Report
    from whatmatters.core.scores import Scores
    from whatmatters.core.sites import structure

    __version__: str

_HOMES = {
    "Calibration": "whatmatters.core.data:Calibration",
    "Plan": "whatmatters.core.plans:Plan",
    "Report": "whatmatters.core.report:Report",
    "Scores": "whatmatters.core.scores:Scores",
    "allocate": "whatmatters.core.allocation",
    "compare": "whatmatters.core.evaluate:compare",
    "data": "whatmatters.core.data",
    "embedded": "whatmatters.core.embedded",
    "errors": "whatmatters.core.errors",
    "evaluate": "whatmatters.core.evaluate:evaluate",
    "infer": "whatmatters.infer",
    "interop": "whatmatters.interop",
    "load": "whatmatters.core.checkpoint:load",
    "load_meta": "whatmatters.core.checkpoint:load_meta",
    "nn": "whatmatters.nn",
    "prune": "whatmatters.prune",
    "quantize": "whatmatters.quantize",
    "represent": "whatmatters.represent",
    "save": "whatmatters.core.checkpoint:save",
    "score": "whatmatters.score",
    "select": "whatmatters.select",
    "structure": "whatmatters.core.sites:structure",
    "tune": "whatmatters.tune",
}
"""Where each public name lives: a module, or a name in one."""

__all__ = [
    "Calibration",
    "Plan",
    "Report",
    "Scores",
    "__version__",
    "allocate",
    "compare",
    "data",
    "embedded",
    "errors",
    "evaluate",
    "infer",
    "interop",
    "load",
    "load_meta",
    "nn",
    "prune",
    "quantize",
    "represent",
    "save",
    "score",
    "select",
    "structure",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("whatmatters")
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = import_module(module)
        if attribute:
            value = getattr(value, attribute)
    else:
        raise AttributeError(f"module 'whatmatters' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
