"""Token scores: which calibration tokens a layer's reconstruction should listen to, and how scores become weights.

A token scorer is a function of a `TokenContext`, called for each micro-batch inside a calibration walk, that gives a score to every token
of every sequence; higher matters more. `normalize_importance` maps scores to weights as RSQ does.

Sung, Yadav, Li, Yoon, Bansal 2025, "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", arXiv 2503.01820. unit token ·
score attention received and others · allocation min-max map to [r_min, r_max] per sequence · action weight the Hessian. Order of the
options and default shares follow the official code (ylsung/rsq); unlike there, token frequencies stay aligned with their sequences, bins
hold equal counts also among ties, and the clusters start from tokens drawn at random and not from the first ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from whatmatters.core.capture import attention_queries, attention_received
from whatmatters.core.catalog import door, get_scorer, scorer, with_data
from whatmatters.core.data import Calibration
from whatmatters.core.errors import InputError, InputTypeError, ModelError, NonFiniteError
from whatmatters.core.progress import Progress
from whatmatters.core.scores import Scores
from whatmatters.core.seeds import derived, generator
from whatmatters.core.sites import Structure
from whatmatters.core.walk import Batch, Block, walk
from whatmatters.score._common import structure_of

__all__ = [
    "TokenContext",
    "TokenScorer",
    "activation_change",
    "activation_norm",
    "attention_concentration",
    "cluster_distance",
    "dot_product",
    "first_last_n",
    "first_n",
    "mean_one",
    "normalize_importance",
    "resolve_token_scores",
    "score_tokens",
    "token_contexts",
    "token_frequencies",
    "token_frequency",
    "token_similarity",
    "uniform",
]

TOKENS_PER_CLUSTER = 41
"""The official code has 100 clusters for sequences of 4,096 tokens."""


@dataclass(frozen=True, eq=False)
class TokenContext:
    """What a token scorer is told about one micro-batch at one block. What costs a forward pass is computed when it is first asked for.

    Attributes:
        block: name of the block.
        first: position of the first sequence among all calibration samples.
        ids: the token ids (samples, length), or whatever a plain model was given.
        inputs: x, input of the block.
        valid: False at padding; None when nothing is.
        frequencies: how often each token id occurs in the whole calibration set; None where there are no ids.
        run: gives the block's output and, if asked, the attention each token receives. `token_contexts` makes it.
    """

    block: str
    first: int
    ids: Tensor
    inputs: Float[Tensor, "samples length d"]
    valid: Bool[Tensor, "samples length"] | None = None
    frequencies: Int64[Tensor, " vocabulary"] | None = None
    run: Callable[[bool], tuple[Tensor, Tensor | None]] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, length)."""
        return self.inputs.shape[0], self.inputs.shape[1]

    @cached_property
    def tokens(self) -> Bool[Tensor, "samples length"]:
        """True at tokens, False at padding."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.inputs.device) if self.valid is None else self.valid

    @cached_property
    def outputs(self) -> Float[Tensor, "samples length d"]:
        """y, output of the block with its weights as they are now (before it is quantized)."""
        return self._run(attention=False)[0]

    @cached_property
    def attention_received(self) -> Float[Tensor, "samples length"]:
        """Attention each token receives from the valid tokens of its sequence, summed over heads; raises ModelError without attention."""
        outputs, received = self._run(attention=True)
        self.__dict__.setdefault("outputs", outputs)
        if received is None:
            raise ModelError(f"{self.block} has no attention that can be listened to; choose another token score, such as activation-norm")
        return received

    def _run(self, *, attention: bool) -> tuple[Tensor, Tensor | None]:
        if self.run is None:
            raise InputError("this context has no block to run; make contexts with token_contexts")
        return self.run(attention)


TokenScorer = Callable[[TokenContext], Tensor]
"""Gives a score (samples, length) to each token of a micro-batch; what it gives at padding is ignored."""


def token_frequencies(calibration: Calibration) -> Int64[Tensor, " vocabulary"] | None:
    """How often each token id occurs among the valid tokens of a calibration set; None for inputs that are no ids.

    Example:
        >>> token_frequencies(Calibration.from_tensors(torch.tensor([[0, 2, 2]])))
        tensor([1, 0, 2])
    """
    if calibration.inputs.dtype != torch.int64:
        return None
    ids = calibration.inputs if calibration.valid is None else calibration.inputs[calibration.valid]
    return torch.bincount(ids.reshape(-1).cpu())


def token_contexts(block: Block, frequencies: Tensor | None = None) -> Iterator[TokenContext]:
    """A context for each micro-batch of the block that a walk visits, in order; where ranks share the work, for those of this rank.

    Args:
        block: the visited block; contexts run it with the weights it has when they are asked.
        frequencies: `token_frequencies` of the calibration set, for scorers that use them.

    Raises:
        ModelError: the block's inputs are not sequences of vectors.
    """
    for batch in block.own_batches():
        yield _context(block, batch, frequencies)


def _context(block: Block, batch: Batch, frequencies: Tensor | None) -> TokenContext:
    if batch.hidden.dim() != 3:
        raise ModelError(f"{block.name} is given {tuple(batch.hidden.shape)}; tokens are scored in inputs (samples, length, d)")
    return TokenContext(block.name, batch.first, batch.ids, batch.hidden, batch.valid, frequencies, _runner(block, batch))


def _runner(block: Block, batch: Batch) -> Callable[[bool], tuple[Tensor, Tensor | None]]:
    def run(attention: bool) -> tuple[Tensor, Tensor | None]:
        if not attention:
            return block.run(batch), None
        sums: list[Tensor] = []

        def listener(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
            causal = bool(getattr(module, "is_causal", True))
            sums.append(attention_received(query, key, _of_tokens(mask, batch.valid, causal), scaling, causal=causal))

        with attention_queries(block.module, listener):
            outputs = block.run(batch)
        return outputs, torch.stack(sums).sum(0) if sums else None

    return run


def _of_tokens(mask: Tensor | None, valid: Tensor | None, causal: bool) -> Tensor | None:
    """The attention mask with the queries of padding seeing nothing: what padding attends to says nothing about a token."""
    if valid is None or bool(valid.all()):
        return mask
    queries = valid[:, None, :, None]
    if mask is None:
        length = valid.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=valid.device)
        mask = (seen.tril() if causal else seen)[None, None] & valid[:, None, None, :]
    return mask & queries if mask.dtype == torch.bool else mask.masked_fill(~queries, -torch.inf)


@scorer("attention-concentration", unit="token", when="walk", needs_text=True, paper="2503.01820")
def attention_concentration(context: TokenContext) -> Float[Tensor, "samples length"]:
    """Attention that a token receives in this block, summed over heads and queries: the score RSQ adopted.

    s_t = sum over heads h and queries q of A[h, q, t], where A is the softmax attention of the block before it is quantized. The scores
    of a sequence add up to heads times tokens. Early tokens are seen by more queries: see `position_norm` of `normalize_importance`.

    Args:
        context: one micro-batch at one block.

    Returns:
        Scores in float32, from 0 to heads * length.

    Raises:
        ModelError: the block has no attention of the transformers library.

    Example:
        >>> heard = torch.tensor([[2.5, 0.5]])
        >>> context = TokenContext("h.0", 0, torch.ones(1, 2), torch.ones(1, 2, 4), run=lambda attention: (torch.ones(1, 2, 4), heard))
        >>> attention_concentration(context)
        tensor([[2.5000, 0.5000]])

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    return context.attention_received


@scorer("first-n", unit="token", when="walk", needs_text=True, paper="2503.01820")
def first_n(context: TokenContext, *, share: float | int = 0.125) -> Float[Tensor, "samples length"]:
    """One for the first tokens of each sequence and zero for the rest.

    Args:
        context: one micro-batch at one block.
        share: part of the valid tokens that counts as first, above 0 to 1 (paper: 1/8); at least one token.

    Returns:
        Ones and zeros in float32.

    Raises:
        InputError: share out of range.

    Example:
        >>> first_n(TokenContext("h.0", 0, torch.ones(1, 4), torch.ones(1, 4, 2)), share=0.5)
        tensor([[1., 1., 0., 0.]])

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    return _early(context.tokens, share).float()


@scorer("first-last-n", unit="token", when="walk", needs_text=True, paper="2503.01820")
def first_last_n(context: TokenContext, *, share: float | int = 1 / 32) -> Float[Tensor, "samples length"]:
    """One for the first and the last tokens of each sequence and zero for those between.

    Args:
        context: one micro-batch at one block.
        share: part of the valid tokens at each end, above 0 to 1 (official code: 1/32); at least one token.

    Returns:
        Ones and zeros in float32.

    Raises:
        InputError: share out of range.

    Example:
        >>> first_last_n(TokenContext("h.0", 0, torch.ones(1, 4), torch.ones(1, 4, 2)), share=0.25)
        tensor([[1., 0., 0., 1.]])

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    return (_early(context.tokens, share) | _early(context.tokens.flip(1), share).flip(1)).float()


def _early(tokens: Bool[Tensor, "samples length"], share: float | int) -> Bool[Tensor, "samples length"]:
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; expected a part of the sequence above 0, up to 1")
    wanted = (tokens.sum(1, keepdim=True) * share).floor().clamp(min=1)
    return tokens & (tokens.cumsum(1) <= wanted)


@scorer("token-frequency", unit="token", when="walk", needs_text=True, paper="2503.01820")
def token_frequency(context: TokenContext) -> Float[Tensor, "samples length"]:
    """Rare tokens matter: minus the number of times the token's id occurs in the calibration set.

    Args:
        context: one micro-batch at one block, with `frequencies`.

    Returns:
        Negative counts in float32; 0 at padding.

    Raises:
        InputError: the context has no frequencies, as for a model that takes no token ids.

    Example:
        >>> counts = torch.tensor([1, 0, 3])
        >>> token_frequency(TokenContext("h.0", 0, torch.tensor([[2, 0]]), torch.ones(1, 2, 2), frequencies=counts))
        tensor([[-3., -1.]])

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    if context.frequencies is None:
        raise InputError("token frequencies need token ids; this model is given none: choose another token score")
    counts = context.frequencies.to(context.ids.device)[context.ids.masked_fill(~context.tokens.to(context.ids.device), 0)]
    return -(counts.to(context.inputs.device) * context.tokens).float()


@scorer("activation-norm", unit="token", when="walk", needs_text=True, paper="2503.01820")
def activation_norm(context: TokenContext) -> Float[Tensor, "samples length"]:
    """Length of the token's vector where it enters the block, |x_t|.

    Args:
        context: one micro-batch at one block.

    Returns:
        Norms in float32.

    Example:
        >>> activation_norm(TokenContext("h.0", 0, torch.ones(1, 1), torch.tensor([[[3.0, 4.0]]])))
        tensor([[5.]])

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    return context.inputs.float().norm(dim=-1)


@scorer("activation-change", unit="token", when="walk", needs_text=True, paper="2503.01820")
def activation_change(context: TokenContext) -> Float[Tensor, "samples length"]:
    """Tokens that the block changes little matter: -|x_t - y_t|.

    Args:
        context: one micro-batch at one block whose input and output have the same shape.

    Returns:
        Negative distances in float32.

    Raises:
        ModelError: the block's input and output differ in shape.

    Example:
        >>> moved = torch.tensor([[[3.0, 4.0]]])
        >>> activation_change(TokenContext("h.0", 0, torch.ones(1, 1), torch.zeros(1, 1, 2), run=lambda attention: (moved, None)))
        tensor([[-5.]])

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    if context.outputs.shape != context.inputs.shape:
        raise ModelError(
            f"{context.block} turns {tuple(context.inputs.shape)} into {tuple(context.outputs.shape)}: its change is undefined"
        )
    return -(context.inputs.float() - context.outputs.float()).norm(dim=-1)


@scorer("token-similarity", unit="token", when="walk", needs_text=True, paper="2503.01820")
def token_similarity(context: TokenContext) -> Float64[Tensor, "samples length"]:
    """Tokens far from the others of their sequence matter: mean over its tokens j of |x_t - x_j|^2.

    Computed as |x_t|^2 - 2 x_t . mean(x) + mean |x_j|^2, so its cost grows with the length and not with its square.

    Args:
        context: one micro-batch at one block.

    Returns:
        Mean squared distances in float64.

    Example:
        >>> token_similarity(TokenContext("h.0", 0, torch.ones(1, 2), torch.tensor([[[0.0], [2.0]]])))
        tensor([[2., 2.]], dtype=torch.float64)

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    x = context.inputs.double()
    weights = context.tokens.double() / context.tokens.sum(1, keepdim=True)
    center = (x * weights[..., None]).sum(1, keepdim=True)
    # Around the centre the terms stay small, so nothing cancels.
    squares = (x - center).square().sum(-1)
    return squares + (squares * weights).sum(1, keepdim=True)


@scorer("dot-product", unit="token", when="walk", needs_text=True, paper="2503.01820")
def dot_product(context: TokenContext) -> Float64[Tensor, "samples length"]:
    """Tokens that point where the whole sequence points matter: x_t . (sum over its tokens j of x_j).

    Args:
        context: one micro-batch at one block.

    Returns:
        Sums of dot products in float64.

    Example:
        >>> dot_product(TokenContext("h.0", 0, torch.ones(1, 2), torch.tensor([[[1.0], [2.0]]])))
        tensor([[3., 6.]], dtype=torch.float64)

    References:
        Sung et al., 2025, arXiv 2503.01820.
    """
    x = context.inputs.double()
    return (x * (x * context.tokens[..., None]).sum(1, keepdim=True)).sum(-1)


@scorer("cluster-distance", unit="token", when="walk", needs_text=True, paper="2503.01820")
def cluster_distance(
    context: TokenContext, *, tokens_per_cluster: int = TOKENS_PER_CLUSTER, steps: int = 30, seed: int = 0
) -> Float64[Tensor, "samples length"]:
    """Tokens that fit into no cluster of their sequence matter: squared distance to the nearest centre of a k-means.

    Args:
        context: one micro-batch at one block.
        tokens_per_cluster: tokens of a sequence for each cluster, at least 1.
        steps: steps of Lloyd's algorithm, at least 1.
        seed: decides the tokens the clusters start from, differently for each block and sequence.

    Returns:
        Squared distances in float64; 0 at padding.

    Raises:
        InputError: a setting out of range.

    Example:
        >>> x = torch.tensor([[[0.0], [2.0]]])
        >>> cluster_distance(TokenContext("h.0", 0, torch.ones(1, 2), x), tokens_per_cluster=2)
        tensor([[1., 1.]], dtype=torch.float64)

    References:
        Sung et al., 2025, arXiv 2503.01820; Lloyd, "Least squares quantization in PCM", 1982.
    """
    if tokens_per_cluster < 1 or steps < 1:
        raise InputError(f"tokens_per_cluster is {tokens_per_cluster} and steps {steps}; expected at least 1 of each")
    scores = torch.zeros(context.shape, dtype=torch.float64, device=context.inputs.device)
    for row, tokens in enumerate(context.tokens):
        x = context.inputs[row][tokens].double()
        draw = generator(derived(seed, context.block, context.first + row))
        scores[row, tokens] = _lloyd(x, max(1, len(x) // tokens_per_cluster), steps, draw)
    return scores


def _lloyd(x: Float64[Tensor, "tokens d"], clusters: int, steps: int, draw: torch.Generator) -> Float64[Tensor, " tokens"]:
    """Squared distance of each token to the nearest centre after some steps; a cluster that loses all tokens keeps its centre."""
    centers = x[torch.randperm(len(x), generator=draw)[:clusters].to(x.device)]
    for _ in range(steps):
        nearest = torch.cdist(x, centers).argmin(1)
        sizes = torch.bincount(nearest, minlength=clusters)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, x)
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return torch.cdist(x, centers).amin(1).square()


@scorer("uniform", unit="token", when="walk", needs_text=True, control=True)
def uniform(context: TokenContext) -> Float[Tensor, "samples length"]:
    """All tokens alike: the control, with which a weighted Hessian is the plain one.

    Args:
        context: one micro-batch at one block.

    Returns:
        Ones in float32.

    Example:
        >>> uniform(TokenContext("h.0", 0, torch.ones(1, 2), torch.ones(1, 2, 4)))
        tensor([[1., 1.]])

    References:
        The uniform arm of Sung et al., 2025, arXiv 2503.01820.
    """
    return torch.ones(context.shape, device=context.inputs.device)


def normalize_importance(
    scores: Float[Tensor, "samples length"],
    *,
    r_min: float | int = 0.005,
    r_max: float | int = 1.0,
    valid: Bool[Tensor, "samples length"] | None = None,
    position_norm: Literal["linear", "sqrt"] | None = None,
    scale: Literal["square", "sqrt"] | None = None,
    quantile: float | int = 1.0,
    bins: int | None = None,
    mask_lowest: float | int | None = None,
    power: float | int = 1,
) -> Float64[Tensor, "samples length"]:
    """Map token scores to weights, each sequence by itself: its lowest score to `r_min`, its highest to `r_max`, linearly between.

    In this order: `scale`, `position_norm`, the map (with `quantile`), then `mask_lowest` or `bins`, then `power`. A sequence whose scores
    are all equal, or that has a single token, tells nothing: all its weights are one.

    Args:
        scores: higher matters more.
        r_min: weight of the lowest score, from 0 (paper: 0.005 to 0.1).
        r_max: weight of the highest score, above `r_min` (paper: 1).
        valid: False at padding, which gets weight 0 and takes no part in lowest and highest.
        position_norm: divide a score by the number of tokens that can see it in causal attention ("linear") or by its root ("sqrt").
        scale: square the scores or take their root; they must not be negative.
        quantile: what counts as highest, and 1 - quantile as lowest; scores beyond are clamped. Above 0.5, up to 1 (no clamping).
        bins: replace scores by this many equal-count bins with weights evenly spaced from `r_min` to `r_max`.
        mask_lowest: give weight 0 to this part of the tokens (rounded down), the lowest ones, and 1 to the rest. 0 up to below 1.
        power: exponent of the weights: 1 as in the official code, 2 as in the paper's formula, whose R enters the Hessian squared.

    Returns:
        Weights in float64, 0 at padding; not yet of mean one (see `mean_one`).

    Raises:
        InputError: a setting out of range, both `bins` and `mask_lowest`, negative scores under `scale`, a sequence that is all padding.
        NonFiniteError: a score is NaN or infinite.

    Example:
        >>> normalize_importance(torch.tensor([[1.0, 2.0, 3.0]]), r_min=0.5)
        tensor([[0.5000, 0.7500, 1.0000]], dtype=torch.float64)

    References:
        Sung et al., 2025, arXiv 2503.01820, section 3; options as in the official code.
    """
    if not 0 <= r_min < r_max < float("inf"):
        raise InputError(f"r_min is {r_min} and r_max {r_max}; expected 0 <= r_min < r_max")
    if position_norm not in (None, "linear", "sqrt") or scale not in (None, "square", "sqrt"):
        raise InputError(
            f"position_norm is {position_norm!r} and scale {scale!r}; expected None, 'linear' or 'sqrt', and None, 'square' or 'sqrt'"
        )
    if not 0.5 < quantile <= 1:
        raise InputError(f"quantile is {quantile}; expected above 0.5, up to 1")
    if bins is not None and mask_lowest is not None:
        raise InputError("bins and mask_lowest are two maps from the same order; give one of them")
    if bins is not None and bins < 2:
        raise InputError(f"bins is {bins}; expected at least 2")
    if mask_lowest is not None and not 0 <= mask_lowest < 1:
        raise InputError(f"mask_lowest is {mask_lowest}; expected from 0 to below 1")
    if not 0 < power < float("inf"):
        raise InputError(f"power is {power}; expected above 0: 1 as in the official code, 2 as in the paper")
    weights = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
    for row, own in enumerate(scores.double()):
        tokens = torch.ones_like(own, dtype=torch.bool) if valid is None else valid[row].to(own.device)
        s = own[tokens]
        if len(s) == 0:
            raise InputError(f"sequence {row} is all padding; leave it out")
        if not torch.isfinite(s).all():
            raise NonFiniteError(f"token scores of sequence {row} hold NaN or infinity; check the block's activations")
        if scale is not None:
            if bool((s < 0).any()):
                raise InputError(f"scale={scale!r} of negative scores would turn their order around; leave it out for this score")
            s = s.square() if scale == "square" else s.sqrt()
        if position_norm is not None:
            seen_by = torch.arange(len(s), 0, -1, dtype=torch.float64, device=s.device)
            s = s / (seen_by if position_norm == "linear" else seen_by.sqrt())
        weights[row, tokens] = _weights(s, r_min, r_max, quantile, bins, mask_lowest) ** power
    return weights


def _weights(
    s: Float64[Tensor, " tokens"],
    r_min: float | int,
    r_max: float | int,
    quantile: float | int,
    bins: int | None,
    mask_lowest: float | int | None,
) -> Float64[Tensor, " tokens"]:
    if bool((s == s[0]).all()):
        return torch.ones_like(s)
    if bins is not None or mask_lowest is not None:
        rank = torch.empty(len(s), dtype=torch.int64, device=s.device)
        # Of two equals the earlier one is the more important, as everywhere.
        rank[s.sort(descending=True, stable=True).indices] = torch.arange(len(s) - 1, -1, -1, device=s.device)
        if bins is not None:
            return torch.linspace(r_min, r_max, bins, dtype=torch.float64, device=s.device)[rank * bins // len(s)]
        return (rank >= int((mask_lowest or 0) * len(s))).double()
    low, high = (s.min(), s.max()) if quantile == 1 else (s.quantile(1 - quantile), s.quantile(quantile))
    if low == high:
        # All but a few are equal: those above count as highest, the rest as lowest.
        return torch.where(s > high, r_max, r_min).double()
    return (r_min + (s - low) / (high - low) * (r_max - r_min)).clamp(r_min, r_max)


def mean_one(
    weights: Float[Tensor, "samples length"], valid: Bool[Tensor, "samples length"] | None = None
) -> Float[Tensor, "samples length"]:
    """Scale the weights of each sequence so that their mean over its tokens is one: importance then only moves within a sequence.

    Args:
        weights: non-negative, 0 at padding.
        valid: False at padding, which does not count.

    Returns:
        w * tokens / sum(w), sequence by sequence.

    Raises:
        InputError: a negative weight, or a sequence whose weights are all zero.

    Example:
        >>> mean_one(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 1.5000, 0.0000]])
    """
    if bool((weights < 0).any()):
        raise InputError("a token weight is negative; expected zero or more")
    if valid is not None:
        weights = weights * valid
    total = weights.sum(1, keepdim=True)
    if bool((total == 0).any()):
        raise InputError(f"the token weights of sequence {int((total[:, 0] == 0).nonzero()[0])} are all zero; expected one above zero")
    count = weights.shape[1] if valid is None else valid.sum(1, keepdim=True)
    return weights * (count / total)


def resolve_token_scores(spec: str | Scores | Callable[..., Any]) -> TokenScorer:
    """The token scorer that a name, a function or saved Scores stand for, its answers checked.

    Args:
        spec: name of a token scorer in the catalog; a function of a `TokenContext`; or Scores of unit "token", keyed by block, which were
            made on the same calibration data in the same order.

    Returns:
        A function of a `TokenContext` that gives finite scores (samples, length), on the device of the context's inputs.

    Raises:
        UnknownNameError: no token scorer of that name; the message lists them.
        InputTypeError: neither a name, a function nor Scores, or Scores of another unit; when called, also an answer that is no tensor of
            floating point.
        InputError: (when called) an answer of another shape, or Scores without this block or these samples.
        NonFiniteError: (when called) NaN or infinity.

    Example:
        >>> context = TokenContext("h.0", 0, torch.ones(1, 2), torch.ones(1, 2, 4))
        >>> resolve_token_scores("uniform")(context)
        tensor([[1., 1.]])
    """
    if isinstance(spec, str):
        return _checked(get_scorer(spec, "token", "walk").function, spec)
    if isinstance(spec, Scores):
        spec.expect_unit("token")
        return _checked(lambda context: _saved(spec, context), spec.method)
    if callable(spec):
        return _checked(spec, getattr(spec, "__name__", type(spec).__name__))
    raise InputTypeError(
        f"token scores are {type(spec).__name__}; expected a name, a function of a TokenContext, or Scores of unit 'token'"
    )


def _checked(function: Callable[..., Any], name: str) -> TokenScorer:
    def scores_of(context: TokenContext) -> Tensor:
        scores = function(context)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            shown = str(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputTypeError(f"the token scorer {name} gave {shown}; expected a tensor of floating point")
        if scores.shape != context.shape:
            raise InputError(f"the token scorer {name} gave shape {tuple(scores.shape)}; expected {context.shape}: (samples, length)")
        if not torch.isfinite(scores[context.tokens.to(scores.device)]).all():
            raise NonFiniteError(f"the token scorer {name} gave NaN or infinity at {context.block}")
        return scores.to(context.inputs.device)

    return scores_of


def _saved(scores: Scores, context: TokenContext) -> Tensor:
    if context.block not in scores.values:
        raise InputError(f"the token scores of {scores.method!r} have nothing for {context.block}; score this model's blocks")
    value = scores.values[context.block]
    samples, length = context.shape
    if value.shape[1] != length or value.shape[0] < context.first + samples:
        raise InputError(
            f"the token scores of {scores.method!r} have shape {tuple(value.shape)}, not those of sample {context.first + samples} of "
            f"{length} tokens; score the same calibration data"
        )
    return value[context.first : context.first + samples]


@door("score.score_tokens")
@with_data
def score_tokens(
    model: nn.Module,
    calibration: Calibration,
    token_scores: str | Callable[..., Any] = "attention-concentration",
    *,
    structure: Structure | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Scores of every token at every block of the unchanged model, to look at or to reuse.

    A method that scores in its own walk sees the inputs that quantized blocks give; these Scores are of the intact model.

    Args:
        model: any model whose blocks take sequences of vectors; unchanged.
        calibration: the sequences.
        token_scores: name of a token scorer, or a function of a `TokenContext`.
        structure: what `core.sites.structure` found, if at hand.
        progress: told after each block.

    Returns:
        Scores of unit "token", keyed by block, (samples, length) each, padding marked in `valid` and 0.

    Raises:
        UnknownNameError: no such token scorer.
        ModelError: the blocks do not form a chain, or have no attention where the scorer needs it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> data = Calibration.from_tensors(torch.ones(1, 3, 2))
        >>> score_tokens(model, data, "activation-norm").values["0"].shape
        torch.Size([1, 3])
    """
    scores_of = resolve_token_scores(token_scores)
    found = structure_of(model, structure)
    frequencies = token_frequencies(calibration)
    values: dict[str, Tensor] = {}

    def visit(block: Block) -> dict[str, Any]:
        parts: list[Tensor] = []

        def work(batch: Batch) -> tuple[None, list[Tensor]]:
            context = _context(block, batch, frequencies)
            return None, [scores_of(context).masked_fill(~context.tokens, 0.0).cpu()]

        block.each(work, lambda _, scores: parts.extend(scores))
        values[block.name] = torch.cat(parts)
        return {}

    walk(model, calibration, visit, structure=found, settings={}, label="score tokens", commit=False, progress=progress)
    name = token_scores if isinstance(token_scores, str) else getattr(token_scores, "__name__", type(token_scores).__name__)
    valid = None if calibration.valid is None else dict.fromkeys(values, calibration.valid)
    settings = {"data": calibration.digest, "samples": len(calibration)}
    return Scores("token", values, name.replace("_", "-"), settings, structure=found, valid=valid)
