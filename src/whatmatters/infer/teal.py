"""TEAL: for every token each linear reads only the input channels whose activations are largest. The baseline that ignores the weights.

Liu, Ponnusamy, Cai, Guo, Kim, Athiwaratkun 2024, arXiv 2408.14690. unit channel · score |x_j| · allocation as WINA's · action skip. It is
WINA with all column norms taken as one, through the same code. The paper's masks are thresholds; here both are offered.
"""

from torch import nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.sites import Structure
from whatmatters.infer._common import Gating, SparseActivations, sparsify
from whatmatters.infer.wina import readers_of_norms, shares_by

__all__ = ["teal"]


@method(
    "teal", paper="2408.14690", job="infer", unit="channel", action="skip", score="|x|", allocation="top-k or threshold per token",
    kind="baseline", needs_text=False, form="handle",
)  # fmt: skip
def teal(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    sparsity: int | float | None = None,
    allocation: str | Plan = "uniform",
    mask_by: str = "topk",
    transform: bool = False,
    dense_prefix: int = 4,
    step: float = 0.025,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    progress: Progress | None = None,
) -> SparseActivations:
    """Skip, for each token, the input channels of every linear whose activations are smallest; the handle undoes it.

    Args:
        model: any model whose blocks have linears (also Conv1D); changed in place until the handle is undone.
        calibration: data for thresholds and for the greedy search; not needed otherwise.
        sparsity: share of the channels that is skipped, from 0 to below 1; None: 0.5, or what the plan says.
        allocation: "uniform", "greedy", or a plan of kind "ratio" with a share for each site.
        mask_by: "topk": exactly floor(in (1 - s)) channels are kept for each token; "threshold": those above the s-quantile of calibration.
        transform: rotate as WINA does, and gate by magnitude there (the paper's TEAL-transform).
        dense_prefix: positions at the beginning of a sequence that stay dense.
        step: multiplications that go in one step of the greedy search, as a share of d^2.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: leave experts and other weights dense that are no linear of their own.
        progress: told after each block.

    Returns:
        The handle: `undo()`, `report`, `plan`, `costs()`, `counts()`; leaving a `with` undoes too.

    Raises:
        BudgetError: sparsity out of range.
        InputError: an unknown setting, or a number beside a plan.
        DataError: thresholds or a greedy search without calibration data.
        ModelError: experts that were not allowed, or a model that is sparse already.
        NonFiniteError: a weight is NaN, or (as the model runs) an activation.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 1, bias=False))
        >>> _ = model[0].weight.data.fill_(1.0)
        >>> with torch.no_grad(), teal(model, sparsity=0.5):
        ...     model(torch.tensor([[3.0, 1.0, 2.0, 1.0]])).tolist()
        [[5.0]]

    References:
        Liu, Ponnusamy, Cai, Guo, Kim, Athiwaratkun, "Training-Free Activation Sparsity in Large Language Models", 2024, arXiv 2408.14690.
    """
    if not 0 < step <= 1:
        raise InputError(f"step is {step!r:.40}; expected above 0 to 1")
    return sparsify(
        "teal", model, calibration, mask_by=mask_by, dense_prefix=dense_prefix,
        gating=lambda found, sites: Gating(
            norms=lambda site, weight: None, rotations=readers_of_norms(model, found, sites) if transform else {}
        ),
        shares=shares_by("teal", model, calibration, sparsity, allocation, step, progress),
        settings={"sparsity": sparsity, "allocation": allocation if isinstance(allocation, str) else "plan", "mask_by": mask_by,
                  "transform": transform, "dense_prefix": dense_prefix, "step": step},
        found=structure, allow_uncovered=allow_uncovered, progress=progress,
    )  # fmt: skip
