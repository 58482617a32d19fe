"""Matrix times vector over the channels that matter: the weights of channels that are skipped are never read.

The matrix is stored with each input channel contiguous, W' of shape (in, out); y = sum over the kept j of x_j W'_j. Three faces give the
same product: "reference" (plain torch in float64, the oracle), "bag" (torch's weighted sum of embeddings, any floating dtype and device)
and "compiled" (numba, float32 on the CPU: scores, selection and product in one call).

The compiled face is built once a process, in seconds (`warm_up`). It is not cached on disk: numba's cache is unpickled when it is read,
and nothing here is.
"""

import functools
import importlib.util
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from whatmatters.core.allocation import threshold, top_k
from whatmatters.core.errors import InputError, MissingExtraError, NonFiniteError

__all__ = ["face_for", "sparse_gemv", "sparse_gemv_reference", "warm_up"]

TILE = 2048
"""Outputs that one thread sums at a time: 8 kB, which the first cache holds beside the rows that stream by."""

PARALLEL = 1 << 16
"""Weights to read for each thread: fewer do not pay for waking it."""


def face_for(weight: Float[Tensor, "out in"]) -> str:
    """The fastest face for a matrix: "compiled" for float32 on the CPU with the channels contiguous and numba at hand, else "bag"."""
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.T.is_contiguous()
    return "compiled" if fits and importlib.util.find_spec("numba") is not None else "bag"


def sparse_gemv_reference(
    weight: Float[Tensor, "out in"],
    x: Float[Tensor, " in"],
    norms: Float[Tensor, " in"] | None = None,
    *,
    keep: int | None = None,
    bound: float | None = None,
    signal: Float[Tensor, " in"] | None = None,
    bias: Float[Tensor, " out"] | None = None,
) -> tuple[Float[Tensor, " out"], int]:
    """`sparse_gemv` as a masked product in float64. The oracle of both other faces."""
    mask = _mask(_scores(x, norms, signal), keep, bound)
    y = weight.double() @ torch.where(mask, x.double(), 0.0)
    return (y if bias is None else y + bias.double()).to(x.dtype), int(mask.sum())


def sparse_gemv(
    weight: Float[Tensor, "out in"],
    x: Float[Tensor, " in"],
    norms: Float[Tensor, " in"] | None = None,
    *,
    keep: int | None = None,
    bound: float | None = None,
    signal: Float[Tensor, " in"] | None = None,
    bias: Float[Tensor, " out"] | None = None,
    face: str | None = None,
) -> tuple[Float[Tensor, " out"], int]:
    """W x over the channels whose score |x_j| c_j is among the `keep` largest, or at least `bound`; no gradient.

    Args:
        weight: (out, in); its transpose should be contiguous, or the rows to read are copied first.
        x: one vector of inputs.
        norms: c, float32; None: all one.
        keep: how many channels are kept, equal scores by position.
        bound: or: the smallest score that is kept.
        signal: what is scored in place of x.
        bias: added to the product.
        face: "compiled" or "bag"; None: what `face_for` says.

    Returns:
        The product, in the dtype of x, and how many channels were kept.

    Raises:
        InputError: not exactly one of keep and bound, keep out of range, or an unknown face.
        NonFiniteError: a score is NaN or infinite, so that which channels matter is undefined.
        MissingExtraError: "compiled" without numba.

    Example:
        >>> y, kept = sparse_gemv(torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([3.0, 2.0, 1.0]), keep=2, face="bag")
        >>> y.tolist(), kept
        ([23.0], 2)
    """
    if (keep is None) == (bound is None) or (keep is not None and not 0 <= keep <= len(x)):
        raise InputError(f"keep={keep}, bound={bound} for {len(x)} channels; expected one of the two, keep from 0 to {len(x)}")
    face = face or face_for(weight)
    if face == "compiled":
        return _by_loop(weight, x, norms, keep, bound, signal, bias)
    if face != "bag":
        raise InputError(f"face {face!r:.40} is unknown; expected 'compiled' or 'bag'")
    mask = _mask(_scores(x, norms, signal), keep, bound)
    chosen = mask.nonzero()[:, 0]
    rows, out = weight.detach().T.contiguous(), len(weight)
    parts = next(n for n in (8, 4, 2, 1) if out % n == 0)  # a bag for each part of the outputs, so that threads can share the work
    bags = chosen * parts + torch.arange(parts, device=x.device)[:, None]
    if len(chosen):
        given = x.detach()[chosen].to(rows.dtype).expand(parts, -1).contiguous()
        y = functional.embedding_bag(bags, rows.view(-1, out // parts), mode="sum", per_sample_weights=given).reshape(-1).to(x.dtype)
    else:
        y = x.new_zeros(out)
    return y if bias is None else y + bias.detach(), len(chosen)


def _scores(x: Float[Tensor, " in"], norms: Float[Tensor, " in"] | None, signal: Float[Tensor, " in"] | None) -> Float[Tensor, " in"]:
    scores = (x if signal is None else signal).detach().float()
    scores = (scores if norms is None else scores * norms).abs()
    if not bool((scores < torch.inf).all()):
        _refuse()
    return scores


def _mask(scores: Float[Tensor, " in"], keep: int | None, bound: float | None) -> Tensor:
    return top_k(scores, keep) if keep is not None else threshold(scores, bound if bound is not None else 0.0)


def _refuse() -> None:
    raise NonFiniteError("an activation is NaN or infinite, so which channels matter is undefined; check the model's dtype and weights")


def _by_loop(
    weight: Tensor, x: Tensor, norms: Tensor | None, keep: int | None, bound: float | None, signal: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, int]:
    rows = weight.detach().T
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows.dtype != torch.float32 or not rows.is_contiguous():
        raise InputError(f"the compiled face takes float32 on the CPU with contiguous channels, not {weight.dtype}; use face='bag'")
    select, gather = _compiled()
    x = x.detach().contiguous()
    given, y = x.numpy(), torch.empty(rows.shape[1])
    empty = _EMPTY.numpy()
    index = select(
        given if signal is None else signal.detach().contiguous().numpy(),
        empty if norms is None else norms.numpy(),
        -1 if keep is None else keep,
        0.0 if bound is None else bound,
    )
    if index is None:
        _refuse()
    job = (rows.numpy(), given, index, empty if bias is None else bias.detach().numpy(), y.numpy())
    threads = min(torch.get_num_threads(), len(index) * len(y) // PARALLEL)
    if threads > 1 and (share := _shared()) is not None:
        share(*job, threads)
    else:
        gather(*job, 0, len(y))
    return y, len(index)


_EMPTY = torch.empty(0)


def warm_up() -> None:
    """Build the compiled face, if numba is at hand, so that no product waits for it."""
    if importlib.util.find_spec("numba") is not None:
        sparse_gemv(torch.zeros(1, 1).T, torch.zeros(1), keep=1, face="compiled")
        if torch.get_num_threads() > 1:
            _shared()


@functools.cache
@no_type_check  # numba compiles the plain functions, not functions that check their arguments
def _compiled() -> Any:
    """Selection and product in machine code, without the interpreter's lock. Sums may be reordered; NaN stays NaN."""
    try:
        import numba
        import numpy as np
    except ImportError as error:
        raise MissingExtraError("the compiled sparse kernel needs numba; install it with: pip install 'whatmatters[fast]'") from error
    fast = {"contract", "reassoc", "nsz", "arcp"}

    def largest(scores, keep, index):
        # Scores are not negative, so their bits have the order of their values: the top twelve bits find the stretch that holds the bound.
        bits = scores.view(np.uint32)
        counts = np.zeros(2048, np.int64)
        for j in range(len(scores)):
            counts[bits[j] >> 20] += 1
        place, need = 2047, keep
        while need > counts[place]:
            need -= counts[place]
            place -= 1
        near = np.empty(counts[place], np.float32)
        found = 0
        for j in range(len(scores)):
            if bits[j] >> 20 == place:
                near[found] = scores[j]
                found += 1
        bound = np.sort(near)[found - need]
        ties = keep
        for j in range(len(scores)):
            ties -= scores[j] > bound
        kept = 0
        for j in range(len(scores)):
            equal = scores[j] == bound
            index[kept] = j
            kept += (scores[j] > bound) or (equal and ties > 0)
            ties -= equal
        return kept

    largest = numba.njit(largest, nogil=True)

    def select(signal, norms, keep, bound):
        size = len(signal)
        scores = np.empty(size, np.float32)
        bad = 0
        for j in range(size):
            score = abs(signal[j] * norms[j]) if len(norms) else abs(signal[j])
            scores[j] = score
            bad += not (score < np.inf)
        if bad:
            return None
        index = np.empty(size + 1, np.int64)
        kept = 0
        if keep > 0:
            kept = largest(scores, keep, index)
        elif keep < 0:
            for j in range(size):
                index[kept] = j
                kept += scores[j] >= bound
        return index[:kept]

    def gather(rows, x, index, bias, y, first, last):
        kept = len(index)
        whole = kept - kept % 4
        sums = np.empty(TILE, np.float32)
        for low in range(first, last, TILE):
            high = min(low + TILE, last)
            sums[:] = 0
            for at in range(0, whole, 4):
                a, b, c, d = index[at], index[at + 1], index[at + 2], index[at + 3]
                xa, xb, xc, xd = x[a], x[b], x[c], x[d]
                # Slices, so that the loop below has nothing but contiguous reads and becomes vector instructions.
                wa, wb, wc, wd = rows[a, low:high], rows[b, low:high], rows[c, low:high], rows[d, low:high]
                for o in range(high - low):
                    sums[o] += xa * wa[o] + xb * wb[o] + xc * wc[o] + xd * wd[o]
            for at in range(whole, kept):
                xa, wa = x[index[at]], rows[index[at], low:high]
                for o in range(high - low):
                    sums[o] += xa * wa[o]
            if len(bias):
                y[low:high] = sums[: high - low] + bias[low:high]
            else:
                y[low:high] = sums[: high - low]

    return numba.njit(select, fastmath=fast, nogil=True), numba.njit(gather, fastmath=fast, nogil=True)


@functools.cache
@no_type_check
def _shared() -> Any:
    """The product with its outputs divided among threads; None where numba's threads must not be used by two callers at once."""
    import numba
    import numpy as np

    gather = _compiled()[1]

    @numba.njit(parallel=True)
    def share(rows, x, index, bias, y, parts):
        out = len(y)
        for part in numba.prange(parts):
            low, high = part * out // parts // 16 * 16, (part + 1) * out // parts // 16 * 16
            gather(rows, x, index, bias, y, low, out if part == parts - 1 else high)

    share(np.zeros((1, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64), np.zeros(0, np.float32), np.zeros(1, np.float32), 1)
    return share if numba.threading_layer() in ("omp", "tbb") else None
