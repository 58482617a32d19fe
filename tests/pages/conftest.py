"""Results of a run that never happened, with every part filled in."""

import dataclasses
import random

import pytest

from whatmatters.pages.report import page
from whatmatters.pages.results import (
    Arm,
    Audit,
    Command,
    Continuation,
    Curve,
    Model,
    Reload,
    Results,
    Scorer,
    Site,
    Stage,
    Text,
    Token,
    Tokens,
)

PARTS = {"self_attn.q_proj": 65536, "self_attn.k_proj": 32768, "self_attn.v_proj": 32768, "self_attn.o_proj": 65536,
         "mlp.gate_proj": 196608, "mlp.up_proj": 196608, "mlp.down_proj": 196608}  # fmt: skip
SCORERS = ("quantization-error", "activation", "gradient", "hessian-diagonal", "layer-shift", "weight-outliers", "magnitude", "random")
ARMS = (
    ("dense", "dense", "dense", 16.0, 16.44, 11.9),
    ("rtn-3", "RTN, 3 bits", "baseline", 3.13, 17.16, 4.23),
    ("gptq-3", "GPTQ, 3 bits", "baseline", 3.13, 16.83, 4.23),
    ("rsq-3", "RSQ, 3 bits", "method", 3.13, 16.74, 10.6),
    ("rsq-3-plain", "RSQ, 3 bits, no rotation", "method", 3.13, 16.82, 4.23),
    ("mixed-best", "mixed 3.5, by activation", "method", 3.5, 16.71, 4.45),
    ("mixed-optimum", "mixed 3.5, optimum", "method", 3.5, 16.62, 4.45),
    ("mixed-random", "mixed 3.5, random order", "control", 3.5, 17.35, 4.45),
)
CODE = 'def parse(line, *, strict=False):\n    """Split a header."""\n    if not line:\n        raise ValueError("empty line")\n' * 4


def make(blocks_count: int = 6) -> Results:
    draw = random.Random(0)
    blocks = tuple(f"model.layers.{i}" for i in range(blocks_count))
    sites = tuple(Site(f"{block}.{part}", i, size) for i, block in enumerate(blocks) for part, size in PARTS.items())
    groups = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
              ("mlp.down_proj",))  # fmt: skip
    units = tuple(tuple(f"{block}.{part}" for part in group) for block in blocks for group in groups)
    damage = tuple(0.02 * draw.random() ** 3 + 0.001 for _ in units)
    scorers = []
    for place, name in enumerate(SCORERS):
        noise = 0.1 + 0.15 * place
        values = tuple(d * 50 + noise * draw.gauss(0, 1) for d in damage)
        center = 0.93 - 0.16 * place
        scorers.append(Scorer(name, center, center - 0.1 - 0.03 * place, min(0.99, center + 0.12), 0.3 * place, name == "random", values))
    share = tuple(i / 8 for i in range(9))
    curves = [
        Curve("by quantization-error", "score", share, tuple(0.9 * s**4 for s in share)),
        Curve("by measured damage", "damage", share, tuple(0.9 * s**4.6 for s in share)),
        Curve("reversed", "reverse", share, tuple(0.9 * s**0.4 for s in share)),
        *(Curve("at random", "random", share, tuple(0.9 * s ** draw.uniform(0.9, 1.6) for s in share)) for _ in range(4)),
    ]
    audit = Audit(
        "Each part was rounded to 2 bits alone, and the loss measured.", units, damage, tuple(scorers), tuple(curves),
        0.96, "quantization-error", "Trust quantization-error: its order agrees with the damage.",
    )  # fmt: skip
    mixed = {site.name: 2 if "up" in site.name and site.block > 1 else 8 if "v_proj" in site.name else 4 for site in sites}
    arms = []
    for id, label, role, bits, perplexity, size in ARMS:
        change = 100 * (perplexity / 16.44 - 1)
        levels = {} if role == "dense" else mixed if "mixed" in id else dict.fromkeys(mixed, 3)
        note = "rotation unties the embeddings: they are stored twice, in 32 bits" if id == "rsq-3" else ""
        dense = role == "dense"
        arms.append(Arm(id, label, role, bits, levels, perplexity, change, None if dense else change - 0.6, None if dense else change + 0.7,
                        None if dense else 0.02, None if dense else 0.9, int(size * 1e6), 3.2, 2**25, note))  # fmt: skip
    text = "    if header is None:\n        return None\n    return header.strip()\n\n\ndef parse_value(line):\n    return line"
    return Results(
        title="pylib-lm",
        model=Model("pylib-lm", 5770496, blocks, sites),
        texts=(
            Text("calibrating", "validation, even files", 20, 64, 16384, "ab" * 32),
            Text("auditing and choosing", "validation, odd files", 20, 32, 8000, "cd" * 32),
            Text("judging", "test", 28, 80, 19000, "ef" * 32),
        ),
        interpreter="CPython 3.11.7",
        audit=audit,
        arms=tuple(arms),
        best="mixed-optimum",
        reason="Chosen on files that calibration did not see.",
        unit="document",
        confidence=0.95,
        prompt="def parse_header(line):\n",
        continuations=(Continuation("dense", text), Continuation("rtn-3", text[:50] + "line\n"), Continuation("mixed-optimum", text[:95])),
        tokens=Tokens("attention-concentration", 3, "textwrap.py", tuple(Token(t, draw.random() ** 4) for t in _pieces(CODE))),
        reload=Reload("mixed-optimum", "model", 2.3e-6, 1e-4, 4),
        stages=(Stage("load", 1.2), Stage("audit", 40.0), Stage("arms", 70.5)),
        settings={"seed": 0, "group_size": 128, "levels": [2, 3, 4, 8], "audit": {"bits": 2}},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        commands=(Command("Your own model", "whatmatters audit MODEL --text my.jsonl"), Command("Two lines", "one \\\n    two")),
        notes=("Embeddings, norms and the head stay as they are.",),
    )  # fmt: skip


def _pieces(text: str) -> list[str]:
    return [text[i : i + 4] for i in range(0, len(text), 4)]


@pytest.fixture(scope="session")
def results() -> Results:
    return make()


@pytest.fixture(scope="session")
def html(results) -> str:
    return page(results)


@pytest.fixture
def replaced():
    """`dataclasses.replace`, for tests that change one part."""
    return dataclasses.replace
