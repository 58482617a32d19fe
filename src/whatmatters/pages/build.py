"""Parts of `results.json` from the library's own objects."""

from collections.abc import Mapping, Sequence

from torch import nn

from whatmatters.core.data import Calibration
from whatmatters.core.evaluate import Difference, Measurement
from whatmatters.core.formats import DENSE_BITS, stored_bits
from whatmatters.core.report import versions
from whatmatters.core.sites import Structure
from whatmatters.pages import results
from whatmatters.pages.results import Arm, Command, Curve, Model, Results, Scorer, Site, Stage, Text
from whatmatters.score.audit import Audit

__all__ = ["arm_part", "audit_part", "audit_results", "average_bits", "model_part", "text_part"]


def model_part(name: str, model: nn.Module, structure: Structure) -> Model:
    """What a model is, for the page."""
    blocks = {block: index for index, block in enumerate(structure.blocks)}
    sites = tuple(Site(site.name, blocks.get(site.block, -1), site.size) for site in structure.sites)
    return Model(name, sum(parameter.numel() for parameter in model.parameters()), structure.blocks, sites)


def text_part(used_for: str, source: str, windows: Calibration, digest: str) -> Text:
    """What a text was used for; `digest` is that of what the windows were cut from."""
    return Text(used_for, source, len(set(windows.document.tolist())), len(windows), windows.tokens, digest)


def audit_part(found: Audit) -> results.Audit:
    """An audit as the page shows it: of the damage curves only those of the best scorer, its reverse, random orders and the truth."""
    settings = found.settings
    what = f"rounded to {settings['bits']} bits" if settings["damage"] == "quantize" else "left out"
    parts = "block" if settings["by"] == "block" else "group of sites that read the same input"
    leader = next((row.scorer for row in found.rows if not row.control), found.rows[0].scorer)
    kept = {"truth": ("damage", "by measured damage"), "random": ("random", "at random"), "reversed": ("reverse", f"{leader}, reversed"),
            "scorer": ("score", f"by {leader}")}  # fmt: skip
    curves = [
        Curve(kept[curve.kind][1], kept[curve.kind][0], curve.shares, curve.increases)
        for curve in found.curves
        if curve.kind != "scorer" or curve.label == leader
    ]
    return results.Audit(
        how=(
            f"The truth was measured: every {parts} was {what} alone, and the added loss taken on {found.documents} documents "
            "that no score had seen. Scores and damage are compared per weight, because weights are what a plan gives bits to."
        ),
        units=tuple(tuple(members) for members in found.members),
        damage=found.damage,
        scorers=tuple(
            Scorer(
                name=row.scorer,
                correlation=row.spearman,
                low=None if row.interval is None else row.interval[0],
                high=None if row.interval is None else row.interval[1],
                seconds=row.seconds,
                control=row.control,
                values=found.importance[row.scorer],
            )
            for row in found.rows
        ),
        curves=tuple(curves),
        ceiling=found.ceiling,
        best=found.best,
        verdict=found.verdict,
    )


def audit_results(
    name: str, model: nn.Module, structure: Structure, found: Audit, texts: Sequence[Text], commands: Sequence[Command] = ()
) -> Results:
    """Results of an audit alone: what the page shows of it when nothing was compressed."""
    return Results(
        title=name,
        model=model_part(name, model, structure),
        texts=tuple(texts),
        interpreter=None,
        audit=audit_part(found),
        arms=(),
        best=None,
        reason="",
        unit="document",
        confidence=float(found.settings["confidence"]),
        prompt="",
        continuations=(),
        tokens=None,
        reload=None,
        stages=(Stage("audit", found.seconds),),
        settings=dict(found.settings),
        versions=versions(),
        commands=tuple(commands),
        notes=tuple(f"left out: {scorer}: {reason}" for scorer, reason in found.skipped.items()),
    )


def average_bits(levels: Mapping[str, int], structure: Structure, *, group_size: int, symmetric: bool = True) -> float:
    """Stored bits a weight over all sites, scales included; no levels: nothing is quantized."""
    sizes = [
        stored_bits(site.shape, levels.get(site.name, DENSE_BITS), group_size=group_size, symmetric=symmetric) for site in structure.sites
    ]
    return sum(sizes) / sum(site.size for site in structure.sites)


def arm_part(
    id: str,
    label: str,
    role: str,
    *,
    levels: Mapping[str, int],
    bits: float,
    measured: Measurement,
    bytes: int,
    difference: Difference | None = None,
    seconds: float = 0.0,
    peak_bytes: int = 0,
    note: str = "",
) -> Arm:
    """One arm; without `difference` it is the dense model itself, with nothing to differ from."""
    finite = difference is not None and difference.units > 1
    low, high = difference.perplexity_interval if difference is not None and finite else (None, None)
    return Arm(
        id=id,
        label=label,
        role=role,
        bits=bits,
        levels=dict(levels),
        perplexity=measured.perplexity,
        change=0.0 if difference is None else difference.perplexity_change,
        low=low,
        high=high,
        kl=measured.kl,
        agreement=measured.agreement,
        bytes=bytes,
        seconds=seconds,
        peak_bytes=peak_bytes,
        note=note,
    )
