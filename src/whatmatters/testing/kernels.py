"""Each kernel's fast path against its reference, on a device and problems of a size where tiles and blocks are met."""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from whatmatters.kernels.feedback import feedback_factor, round_with_feedback, round_with_feedback_reference
from whatmatters.kernels.gram import accumulate_gram, accumulate_gram_reference, mirror
from whatmatters.kernels.prune_feedback import prune_with_feedback, prune_with_feedback_reference
from whatmatters.kernels.sparse_gemv import sparse_gemv, sparse_gemv_reference

__all__ = ["check_kernels"]

WIDTH, OUT, DAMPING = 300, 24, 0.01


def check_kernels(device: str = "cpu") -> dict[str, str | None]:
    """Run every kernel beside its reference.

    Args:
        device: where tensors are put; references run there too.

    Returns:
        For each kernel what is wrong, or None.

    Example:
        >>> set(check_kernels().values())
        {None}
    """
    found: dict[str, str | None] = {}
    for name, check in KERNELS.items():
        try:
            check(torch.device(device))
            found[name] = None
        except Exception as error:  # a kernel that does not run on this device is a finding, not an end
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def _problem(device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights (out, d), and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * WIDTH, WIDTH, generator=draw) @ torch.randn(WIDTH, WIDTH, generator=draw)
    return torch.randn(OUT, WIDTH, generator=draw).to(device), (inputs.double().T @ inputs.double() / len(inputs)).to(device)


def _gram(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs, weights = torch.randn(257, 1100, generator=draw).to(device), torch.rand(257, generator=draw).to(device)
    fast, reference = (torch.zeros(1100, 1100, dtype=torch.float64, device=device) for _ in range(2))
    accumulate_gram(fast, inputs, weights)
    mirror(fast)
    accumulate_gram_reference(reference, inputs, weights)
    error = float((fast - reference).abs().max() / reference.abs().max())
    assert error < 1e-5, f"relative error {error:.1e}"


def _loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    delta = rounded.double() - weight.double()
    return float(((delta @ hessian) * delta).sum())


def _rounding(device: torch.device) -> None:
    weight, hessian = _problem(device)
    scale, zero = torch.full((3, OUT), 0.4, device=device), torch.zeros(3, OUT, device=device)
    group = torch.arange(WIDTH, device=device) // 100
    low, high = torch.full((OUT,), -4.0, device=device), torch.full((OUT,), 3.0, device=device)
    fast, _ = round_with_feedback(weight, feedback_factor(hessian, DAMPING), scale, zero, group, low, high)
    reference = round_with_feedback_reference(weight, hessian, scale, zero, group, low, high, DAMPING).to(device)
    losses = [_loss(weight, codes.float() * 0.4, hessian) for codes in (fast, reference)]
    same = float((fast == reference).double().mean())
    # A code on the edge between two may fall either way in float32, and later ones then follow it.
    assert same > 0.9, f"only {same:.0%} of the codes are the reference's"
    assert abs(losses[0] / losses[1] - 1) < 0.05, f"loss {losses[0]:.4g}, the reference's is {losses[1]:.4g}"


def _pruning(device: torch.device) -> None:
    weight, hessian = _problem(device)

    def choose(cost: Tensor, first: int) -> Tensor:
        return cost >= cost.median(1, keepdim=True).values

    fast, kept = prune_with_feedback(weight.double(), feedback_factor(hessian, DAMPING), choose, 50)
    reference, expected = prune_with_feedback_reference(weight, hessian, choose, 50, DAMPING)
    assert bool((kept == expected.to(device)).all()), "other weights are kept than the reference keeps"
    error = float((fast - reference.to(device)).abs().max())
    assert error < 1e-6, f"largest difference {error:.1e}"


def _sparse_product(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(2)
    x, norms = torch.randn(WIDTH, generator=draw).to(device), torch.rand(WIDTH, generator=draw).to(device)
    for stored in (torch.randn(OUT, WIDTH, generator=draw), torch.randn(WIDTH, OUT, generator=draw).T):  # rows or channels contiguous
        weight = stored.to(device)
        for keep, bound in ((WIDTH // 3, None), (None, 0.2), (0, None)):
            fast, count = sparse_gemv(weight, x, norms, keep=keep, bound=bound)
            reference, expected = sparse_gemv_reference(weight, x, norms, keep=keep, bound=bound)
            assert count == expected, f"{count} channels are kept, the reference keeps {expected}"
            error = float((fast - reference).abs().max())
            assert error < 1e-4, f"largest difference {error:.1e}"


def _ngrams(device: torch.device) -> None:
    if importlib.util.find_spec("numba") is None:
        return  # without numba the reference is what runs
    from whatmatters.kernels.ngrams import Hasher, reference_buckets

    texts = ["Alice went, 2 times; été ÄÖ", "", "x" * 70 + " it's  a_b 3.14", "数学 and ẞ"]
    for hash in ("sha256", "fast"):
        parts = [text.encode() for text in texts]
        ends = np.cumsum([len(part) for part in parts])
        text = np.frombuffer(b"".join(parts), np.uint8)
        fast = Hasher(2, 10_000, hash, face="compiled").hashed(text, ends - [len(part) for part in parts], ends)
        reference = reference_buckets(texts, orders=2, buckets=10_000, hash=hash)
        assert fast.ids.tolist() == reference.ids.tolist(), f"{hash}: other buckets than the reference's"


KERNELS: dict[str, Callable[[torch.device], None]] = {
    "gram": _gram, "round with feedback": _rounding, "prune with feedback": _pruning, "sparse product": _sparse_product,
    "n-grams": _ngrams,
}  # fmt: skip
