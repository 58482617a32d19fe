"""CATS: for every token the hidden channels of an MLP are skipped whose gate activation is small. A baseline.

Lee, Lee, Zhang, Tiwari, Mirhoseini 2024, arXiv 2404.08763. unit channel · score |act(gate x)| · allocation a calibrated threshold (or
top-k) per token · action skip. Only the down projection skips here. The rows of the up projection that the paper's kernel skips too are
computed, since their products are multiplied with nothing; so costs are an upper bound. In an MLP without an up projection it is TEAL's
score on the second matrix.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import ModelError
from whatmatters.core.evaluate import judging
from whatmatters.core.progress import Progress
from whatmatters.core.sites import Site, Structure
from whatmatters.infer._common import Gating, SparseActivations, as_plan, exact_share, sparsify

__all__ = ["cats"]


@method(
    "cats", paper="2404.08763", job="infer", unit="channel", action="skip", score="|activation of the gate|",
    allocation="threshold or top-k per token", kind="baseline", form="handle",
)  # fmt: skip
def cats(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    sparsity: int | float = 0.5,
    mask_by: str = "threshold",
    dense_prefix: int = 0,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    progress: Progress | None = None,
) -> SparseActivations:
    """Skip, for each token, the hidden channels of every MLP whose gate activation is smallest; the handle undoes it.

    Args:
        model: a transformers model whose MLPs apply an activation module to a linear's output; changed in place until undone.
        calibration: data for the thresholds; "topk" does without.
        sparsity: share of the hidden channels that is skipped, from 0 to below 1.
        mask_by: "threshold": those above the quantile of calibration are kept; "topk": exactly floor(in (1 - s)) for each token.
        dense_prefix: positions at the beginning of a sequence that stay dense.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: leave experts and other weights dense that are no linear of their own.
        progress: told after each block.

    Returns:
        The handle: `undo()`, `report`, `plan`, `costs()`, `counts()`, about the down projections only; leaving a `with` undoes too.

    Raises:
        BudgetError: sparsity out of range.
        InputError: an unknown setting.
        DataError: thresholds without calibration data.
        ModelError: no such activation, experts that were not allowed, or a model that is sparse already.
        NonFiniteError: a weight is NaN, or (as the model runs) an activation.

    Example:
        >>> from whatmatters.core import embedded
        >>> with cats(embedded.load()[0], sparsity=0.5, mask_by="topk") as handle:
        ...     handle.report.rows[0]["site"], handle.report.rows[0]["kept"]
        ('model.layers.0.mlp.down_proj', 384)

    References:
        Lee, Lee, Zhang, Tiwari, Mirhoseini, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", 2024,
        arXiv 2404.08763.
    """
    share = float(exact_share(sparsity))
    return sparsify(
        "cats", model, calibration, mask_by=mask_by, dense_prefix=dense_prefix,
        gating=lambda found, sites: Gating(norms=lambda site, weight: None, signals=activations_of(model, sites)),
        shares=lambda found, sites, gating, positions: (
            as_plan("cats", dict.fromkeys(gating.signals, share), share, "uniform", found), [s for s in sites if s.name in gating.signals],
        ),
        settings={"sparsity": sparsity, "mask_by": mask_by, "dense_prefix": dense_prefix},
        found=structure, allow_uncovered=allow_uncovered, progress=progress,
    )  # fmt: skip


def activations_of(model: nn.Module, sites: list[Site]) -> dict[str, str]:
    """By name of each down projection, the activation module whose output it reads (times the up projection's, if there is one).

    Found by running the model on two tokens: a module without weights that changes the output of a linear, and the next linear of that
    block with as many inputs that reads something no linear read before.

    Raises:
        ModelError: there is none.
    """
    if not hasattr(model, "config"):
        raise ModelError(f"{type(model).__name__} is no transformers model; its activations can only be seen in those")
    read: list[Tensor] = []  # tensors are kept, so that no other gets their id
    made: list[tuple[Tensor, str]] = []
    pending: dict[str, tuple[str, int]] = {}
    found: dict[str, str] = {}

    def before(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            source, size = pending.get(site.block, ("", 0))
            if size == site.shape[1] and not any(args[0] is tensor for tensor in read):
                found[site.name] = source
                del pending[site.block]
            read.append(args[0])

        return hook

    def after(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, output: made.append((output, site.block))

    def activation(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for tensor, block in made:
                if args and args[0] is tensor and isinstance(output, Tensor) and not torch.equal(output, tensor):
                    pending[block] = (name, output.shape[-1])

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(judging(model))
        for site in sites:
            module = model.get_submodule(site.name)
            stack.callback(module.register_forward_pre_hook(before(site)).remove)
            stack.callback(module.register_forward_hook(after(site)).remove)
        for name, module in model.named_modules():
            if not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
                stack.callback(module.register_forward_hook(activation(name)).remove)
        model(torch.ones((1, 2), dtype=torch.long, device=next(model.parameters()).device))
    if not found:
        raise ModelError(f"no MLP of {type(model).__name__} has an activation module between two linears of its own; use teal or wina")
    return found
