"""RSQ: rotate, score, quantize. GPTQ on a rotated model, listening more to the calibration tokens that the attention listens to.

Sung, Yadav, Li, Yoon, Bansal 2025, arXiv 2503.01820. unit token (by block and sequence) · score attention concentration · allocation a
min-max map to weights, of mean one in each sequence · action weight its term in the layer's reconstruction loss: H = sum w_t x_t x_t'.

As in the official code (ylsung/rsq): weights enter H linearly (`power=2` is the paper's formula), scores come from the block before it is
rounded, on inputs that the rounded blocks before it give. Unlike there: the mean of the embedding is not subtracted, and rotations that a
model would have to compute as it runs (inputs of the down projection, across heads) are left out unless asked for. Differs from `gptq` by
weights and rotation only: with equal token scores and `rotate=None` the result is bit-identical.
"""

import fnmatch
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from whatmatters.core.catalog import door, get_scorer, method
from whatmatters.core.data import Calibration
from whatmatters.core.errors import DataError, InputError
from whatmatters.core.grids import GridSettings
from whatmatters.core.plans import Plan
from whatmatters.core.progress import Progress
from whatmatters.core.report import Report
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure
from whatmatters.core.sites import structure as find_structure
from whatmatters.core.walk import Block
from whatmatters.quantize._common import Rounding, check_groups, check_sites, quantize_blocks, site_bits
from whatmatters.quantize._rotation import Rotator
from whatmatters.score.tokens import (
    TokenContext,
    TokenScorer,
    mean_one,
    normalize_importance,
    resolve_token_scores,
    token_contexts,
    token_frequencies,
)

__all__ = ["expand_dataset", "rsq", "token_weights"]


@method(
    "rsq", paper="2503.01820", job="quantize", unit="token", action="quantize", score="attention concentration",
    allocation="weighted Hessian",
)  # fmt: skip
def rsq(
    model: nn.Module,
    calibration: Calibration,
    *,
    bits: int | Plan | Mapping[str, int] = 3,
    group_size: int = 128,
    token_scores: str | Scores | Callable[[TokenContext], Tensor] = "attention-concentration",
    r_min: float = 0.005,
    r_max: float = 1.0,
    power: int | float = 1,
    position_norm: str | None = None,
    importance_settings: Mapping[str, Any] | None = None,
    expand_factor: int = 1,
    rotate: str | None = "hadamard",
    symmetric: bool = True,
    clip_search: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    true_sequential: bool = True,
    modules: Sequence[str] | None = None,
    structure: Structure | None = None,
    allow_uncovered: bool = False,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model in place with a Hessian that weights calibration tokens by their importance, after rotating outliers away.

    Args:
        model: with `rotate`: a causal language model with RMS norms; without: any model whose blocks take sequences of vectors.
        calibration: the sequences whose tokens are weighted.
        bits: bits per weight, 2 to 8 (16 or more: left as it is), or a plan of bits by site.
        group_size: inputs that share a scale; -1: one scale per output channel (the official scripts).
        token_scores: name of a token scorer, a function of a `TokenContext`, or Scores of unit "token" made on the same data (which is a
            departure: the method scores on the inputs that its own rounded blocks give).
        r_min: weight of the least important token of a sequence, from 0 (paper: 0.005 to 0.1).
        r_max: weight of the most important one, above `r_min`.
        power: exponent of the weights: 1 as in the official code, 2 as in the paper's formula.
        position_norm: divide a score by the number of tokens that can see it ("linear") or by its root ("sqrt").
        importance_settings: further settings of `score.normalize_importance`: scale, quantile, bins, mask_lowest.
        expand_factor: use every sequence this many times, rolled to other positions (paper: up to 8); multiplies the time.
        rotate: "hadamard" or "random": rotations that fold into the weights. "online": those, and some the model computes as it runs; it
            cannot be saved then. None: no rotation.
        symmetric: codes signed around zero; False: with zero points.
        clip_search: choose each group's range by the least sum |error|^2.4 instead of its full range.
        act_order: round columns by falling diagonal of the Hessian.
        damping: share of the mean diagonal that is added to the Hessian, > 0.
        true_sequential: collect inputs of each group of sites after the groups before it in the block are rounded.
        modules: patterns of site names ("*.down_proj") whose Hessians are weighted; None: all.
        structure: what `core.sites.structure` found, if at hand.
        allow_uncovered: go on though some weights inside blocks belong to no site; they are rotated where needed, and not rounded.
        seed: decides the rotation.
        run_dir: folder that makes the run resumable.
        resume: continue the run in `run_dir`.
        progress: told after each block.

    Returns:
        A report with a row for each site: bits, relative weight error (of the rotated weight), loss, tokens, seconds. Its notes tell the
        size after untying and departures from the paper.

    Raises:
        InputError: bits, group size, r_min and r_max, damping, patterns or Scores do not fit.
        ModelError: a rotation would change the model, no attention to listen to, or weights that no site covers and that were not allowed.
        NonFiniteError: a weight, an activation or a score is NaN.
        ResumeError: `run_dir` was made with other inputs.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> data = Calibration.from_tensors(torch.arange(32).reshape(2, 16) % 16)
        >>> [row["bits"] for row in rsq(LlamaForCausalLM(config), data, group_size=-1).rows]
        [3, 3, 3, 3, 3, 3, 3]

    References:
        Sung et al., "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", 2025, arXiv 2503.01820.
    """
    if not damping > 0:
        raise InputError(f"damping {damping}; expected a positive share of the Hessian's mean diagonal, such as 0.01")
    options = {"r_min": r_min, "r_max": r_max, "power": power, "position_norm": position_norm, **(importance_settings or {})}
    normalize_importance(torch.tensor([[0.0, 1.0]]), **options)  # refuses settings out of range before any work
    scores_of = resolve_token_scores(token_scores)
    data = expand_dataset(calibration, expand_factor)
    found = find_structure(model) if structure is None else structure
    weighted = _matching(found, modules)
    check_groups(site_bits(bits, found), found, group_size)
    check_sites(model, found, allow_uncovered)
    rotator = None if rotate is None else Rotator(model, found, rotate, seed)
    frequencies = token_frequencies(data)

    def visit(rounding: Rounding) -> None:
        if rotator is not None:
            rotator.rotate(rounding.block.name, rounding.block.module)
        weights = token_weights(rounding.block, scores_of, frequencies, **options)
        rounding.to_feedback(damping=damping, act_order=act_order, true_sequential=true_sequential, weights=weights, weighted=weighted)

    settings = {
        "token_scores": identity(token_scores), **options, "expand_factor": expand_factor, "rotate": rotate, "seed": seed,
        "act_order": act_order, "damping": damping, "true_sequential": true_sequential,
        "modules": None if modules is None else list(modules),
    }  # fmt: skip
    whole = {} if rotator is None else {"start": rotator.start, "outside": rotator.outside, "prepare": rotator.prepare}
    report = quantize_blocks(
        "rsq", model, data, visit, bits=bits, grid=GridSettings(group_size, symmetric, clip_search), settings=settings, found=found,
        allow_uncovered=allow_uncovered, run_dir=run_dir, resume=resume, progress=progress, **whole,
    )  # fmt: skip
    if rotator is not None:
        report.notes += rotator.notes
    if isinstance(token_scores, Scores):
        report.notes.append("departure: token scores were given, not taken from the inputs that the rounded blocks give")
    return report


def token_weights(
    block: Block, scores_of: TokenScorer, frequencies: Tensor | None = None, **options: Any
) -> list[Float64[Tensor, "samples length"]]:
    """Weights of all tokens in one block's Hessians: of mean one in each sequence, so that importance only moves within it.

    Args:
        block: the visited block, before any of its sites is rounded.
        scores_of: what `resolve_token_scores` gave.
        frequencies: `token_frequencies` of the calibration set.
        **options: settings of `normalize_importance`.

    Returns:
        Weights by micro-batch, 0 at padding. Equal scores give exactly ones.
    """
    weights = []
    for context in token_contexts(block, frequencies):
        importance = normalize_importance(scores_of(context), valid=context.valid, **options)
        weights.append(mean_one(importance, context.valid))
    return weights


@door("quantize.expand_dataset")
def expand_dataset(calibration: Calibration, factor: int) -> Calibration:
    """Every sequence `factor` times, rolled by k/factor of its length, so that each token is seen at as many positions.

    Padding stays where it is: only valid tokens are rolled, among themselves. Attention falls on early tokens whatever they are; in the
    expanded set every token is early once.

    Args:
        calibration: sequences of tokens.
        factor: how many copies of each, at least 1; 1 gives the set itself.

    Returns:
        All sequences as they are, then all rolled by the first step, and so on; documents and micro-batch size stay.

    Raises:
        InputError: a factor below 1.
        DataError: more copies than tokens in a sequence, or samples that are no sequences.

    Example:
        >>> expand_dataset(Calibration.from_tensors(torch.tensor([[1, 2, 3, 4]])), 2).inputs.tolist()
        [[1, 2, 3, 4], [3, 4, 1, 2]]

    References:
        Sung et al., 2025, arXiv 2503.01820, section 4.
    """
    if isinstance(factor, bool) or factor < 1:
        raise InputError(f"expand_factor {factor}; expected a whole number of copies, at least 1")
    if factor == 1:
        return calibration
    inputs, valid = calibration.inputs, calibration.valid
    if inputs.dtype != torch.int64 and inputs.dim() < 3:
        raise DataError(f"inputs have shape {tuple(inputs.shape)}; only sequences of tokens can be rolled: use expand_factor=1")
    shortest = inputs.shape[1] if valid is None else int(valid.sum(1).min())
    if factor > shortest:
        raise DataError(f"expand_factor {factor}, but a sequence has {shortest} tokens; expected at most one copy for each token")
    rolled = []
    for k in range(factor):
        copy = inputs.clone()
        for row in range(len(inputs)):
            tokens = slice(None) if valid is None else valid[row]
            own = inputs[row][tokens]
            copy[row][tokens] = own.roll(k * len(own) // factor, 0)
        rolled.append(copy)
    return Calibration(
        torch.cat(rolled), None if valid is None else valid.repeat(factor, 1), calibration.document.repeat(factor), calibration.batch,
        f"{calibration.source}, {factor} rolls",
    )  # fmt: skip


def _matching(found: Structure, patterns: Sequence[str] | None) -> frozenset[str] | None:
    if patterns is None:
        return None
    names = [site.name for site in found.sites]
    matches = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    empty = [pattern for pattern, matched in matches.items() if not matched]
    if empty:
        raise InputError(f"modules: no site is named like {empty[0]!r}; sites are {', '.join(names[:3])}, ...")
    return frozenset(name for matched in matches.values() for name in matched)


def identity(spec: str | Scores | Callable[..., Any]) -> str:
    """What a run's fingerprint says of token scores: a scorer's name, where a function is defined, or the digest of Scores."""
    if isinstance(spec, str):
        return get_scorer(spec, "token", "walk").slug
    if isinstance(spec, Scores):
        digest = hashlib.sha256()
        for name, value in spec.values.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return f"scores of {spec.method}, {digest.hexdigest()}"
    if isinstance(spec, functools.partial):
        return f"{identity(spec.func)} with {spec.args!r} {dict(sorted(spec.keywords.items()))!r}"
    named = spec if hasattr(spec, "__qualname__") else type(spec)
    return f"{named.__module__}.{named.__qualname__}"
