"""What every action on a model asks before it changes anything: are all weights covered and finite, is the plan for this model?"""

from collections.abc import Collection

import torch
from torch import nn

from whatmatters.core.errors import InputError, ModelError, NonFiniteError
from whatmatters.core.offload import release
from whatmatters.core.sites import Structure

__all__ = ["check_names_fit", "check_sites"]


def check_sites(model: nn.Module, found: Structure, allow_uncovered: bool) -> list[str]:
    """Notes for the report about weights that no site covers.

    Raises:
        ModelError: there are such weights and they were not allowed.
        NonFiniteError: a weight is NaN or infinite; the message names the site.
    """
    if found.uncovered and not allow_uncovered:
        shown = ", ".join(found.uncovered[:3]) + (f" and {len(found.uncovered) - 3} more" if len(found.uncovered) > 3 else "")
        raise ModelError(f"{shown}: weights inside blocks that no site covers; they stay as they are with allow_uncovered=True")
    for site in found.sites:
        if not torch.isfinite(site.view(model)).all():
            raise NonFiniteError(f"{site.name} holds NaN or infinity; repair the checkpoint before quantizing or pruning it")
        release()
    return [f"left as it is (no site covers it): {name}" for name in found.uncovered]


def check_names_fit(given: Collection[str], found: Structure, what: str) -> None:
    """Raise InputError unless `given` names exactly the sites of the model; `what` is what names them, in words."""
    names = {site.name for site in found.sites}
    lacking = [site.name for site in found.sites if site.name not in given]
    foreign = [name for name in given if name not in names]
    if lacking or foreign:
        told = f"lacks {lacking[0]}" if lacking else f"has {foreign[0]}, which the model has not"
        raise InputError(f"{what} does not fit the model: it {told}; make it from scores of this model")
