"""Parts of `results.json` from the library's own objects."""

from collections.abc import Mapping

from torch import nn

from whatmatters.core.data import Calibration
from whatmatters.core.evaluate import Difference, Measurement
from whatmatters.core.formats import DENSE_BITS, stored_bits
from whatmatters.core.sites import Structure
from whatmatters.pages.results import Arm, Model, Site, Text

__all__ = ["arm_part", "average_bits", "model_part", "text_part"]


def model_part(name: str, model: nn.Module, structure: Structure) -> Model:
    """What a model is, for the page."""
    blocks = {block: index for index, block in enumerate(structure.blocks)}
    sites = tuple(Site(site.name, blocks.get(site.block, -1), site.size) for site in structure.sites)
    return Model(name, sum(parameter.numel() for parameter in model.parameters()), structure.blocks, sites)


def text_part(used_for: str, source: str, windows: Calibration, digest: str) -> Text:
    """What a text was used for; `digest` is that of what the windows were cut from."""
    return Text(used_for, source, len(set(windows.document.tolist())), len(windows), windows.tokens, digest)


def average_bits(levels: Mapping[str, int], structure: Structure, *, group_size: int, symmetric: bool = True) -> float:
    """Stored bits a weight over all sites, scales included; no levels: nothing is quantized."""
    total = sum(site.size for site in structure.sites)
    return (
        sum(stored_bits(site.shape, levels.get(site.name, DENSE_BITS), group_size=group_size, symmetric=symmetric) for site in structure.sites)
        / total
    )


def arm_part(
    id: str,
    label: str,
    role: str,
    *,
    levels: Mapping[str, int],
    bits: float,
    measured: Measurement,
    difference: Difference | None,
    bytes: int,
    seconds: float,
    peak_bytes: int,
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
