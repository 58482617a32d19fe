"""Rounding with feedback: the factor, the paper's algorithm in float64, the loss identity, and the case without correlations."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from whatmatters.core.errors import NonFiniteError
from whatmatters.kernels import feedback
from whatmatters.kernels.feedback import feedback_factor, round_with_feedback, round_with_feedback_reference


def problem(out: int, d: int, groups: int, seed: int, symmetric: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * d + 2, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return {
        "weight": torch.randn(d, out, generator=g).T,  # not contiguous
        "hessian": x.T @ x / len(x),
        "scale": torch.rand(groups, out, generator=g) * 0.3 + 0.2,
        "zero": torch.zeros(groups, out) if symmetric else torch.randint(-4, 4, (groups, out), generator=g).float(),
        "group": torch.arange(d) * groups // d,
        "low": torch.full((out,), -4.0),
        "high": torch.full((out,), 3.0),
    }


def fast(p: dict[str, Tensor], damping: float) -> tuple[Tensor, Tensor]:
    factor = feedback_factor(p["hessian"], damping)
    return round_with_feedback(p["weight"], factor, p["scale"], p["zero"], p["group"], p["low"], p["high"])


def values(p: dict[str, Tensor], codes: Tensor) -> Tensor:
    return ((codes.double() - p["zero"][p["group"]].T) * p["scale"][p["group"]].T).double()


def loss_of(p: dict[str, Tensor], codes: Tensor, damping: float) -> Tensor:
    d = len(p["hessian"])
    damped = p["hessian"] + damping * p["hessian"].diagonal().mean() * torch.eye(d, dtype=torch.float64)
    error = p["weight"].double() - values(p, codes)
    return ((error @ damped) * error).sum(1)


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 12), damping=st.sampled_from([1e-4, 0.01, 1.0]), seed=st.integers(0, 1000))
def test_the_factor_is_upper_triangular_and_gives_back_the_damped_hessian(d: int, damping: float, seed: int) -> None:
    hessian = problem(1, d, 1, seed)["hessian"]
    factor = feedback_factor(hessian, damping)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-9, atol=1e-9 * float(damped.abs().max()))
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)  # the paper's factor is ours inverted
    torch.testing.assert_close(inverse @ factor, torch.eye(d, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_damping_is_added_until_an_indefinite_matrix_factors() -> None:
    hessian = torch.tensor([[1.0, 1.4], [1.4, 1.0]], dtype=torch.float64)  # eigenvalues 2.4 and -0.4
    factor = feedback_factor(hessian, 0.1)
    added = (factor @ factor.T - hessian).diagonal()
    torch.testing.assert_close(added, torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("hessian", [[[1.0, 9.0], [9.0, 1.0]], [[torch.nan, 0.0], [0.0, 1.0]], [[torch.inf, 0.0], [0.0, 1.0]]])
def test_a_hopeless_hessian_is_refused(hessian: list[list[float]]) -> None:
    with pytest.raises(NonFiniteError, match=r"damping|calibration"):
        feedback_factor(torch.tensor(hessian, dtype=torch.float64), 0.01)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(0, 4), d=st.integers(1, 20), groups=st.integers(1, 3), symmetric=st.booleans(), block=st.integers(1, 9),
    sub=st.integers(1, 5), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_fast_and_reference_give_the_same_codes(out: int, d: int, groups: int, symmetric: bool, block: int, sub: int, seed: int) -> None:
    p = problem(out, d, min(groups, d), seed, symmetric)
    expected = round_with_feedback_reference(p["weight"], p["hessian"], p["scale"], p["zero"], p["group"], p["low"], p["high"], 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "BLOCK", block)
        patch.setattr(feedback, "SUB_BLOCK", sub)
        codes, loss = fast(p, 0.01)
    # a value on the border of two codes may go either way in float32, and all columns after it then differ rightly
    wanted = targets(p, expected, 0.01) / p["scale"][p["group"]].T.double()
    assume(out == 0 or float(((wanted - wanted.floor()) - 0.5).abs().min()) > 1e-3)
    assert codes.shape == (out, d)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(loss, loss_of(p, codes, 0.01), rtol=1e-3, atol=1e-4)


def targets(p: dict[str, Tensor], codes: Tensor, damping: float) -> Tensor:
    """What each column wants to be, given the codes before it: the minimum over all columns still to come, solved directly."""
    d = len(p["hessian"])
    damped = p["hessian"] + damping * p["hessian"].diagonal().mean() * torch.eye(d, dtype=torch.float64)
    weight, error = p["weight"].double(), p["weight"].double() - values(p, codes)
    columns = [
        weight[:, j] + torch.linalg.solve(damped[j:, j:], (error[:, :j] @ damped[:j, j:]).T)[0] if j else weight[:, 0] for j in range(d)
    ]
    return torch.stack(columns, 1)


def test_each_column_is_rounded_from_its_conditional_optimum() -> None:
    p = problem(5, 13, 2, 3)
    codes, _ = fast(p, 0.01)
    nearest = (targets(p, codes, 0.01) / p["scale"][p["group"]].T).round().clamp(-4, 3)
    assert torch.equal(codes.double(), nearest)


def test_without_correlations_it_rounds_to_nearest() -> None:
    p = problem(6, 150, 3, 0) | {"hessian": torch.eye(150, dtype=torch.float64)}
    codes, loss = fast(p, 0.01)
    nearest = (p["weight"] / p["scale"][p["group"]].T).round().clamp(-4, 3)
    assert torch.equal(codes.float(), nearest)
    torch.testing.assert_close(loss, loss_of(p, codes, 0.01), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_feedback_beats_rounding_to_nearest_where_inputs_are_correlated(seed: int) -> None:
    p = problem(16, 48, 1, seed)
    codes, _ = fast(p, 0.01)
    nearest = (p["weight"] / p["scale"][p["group"]].T).round().clamp(-4, 3).to(torch.int8)
    assert loss_of(p, codes, 0.0).sum() < 0.8 * loss_of(p, nearest, 0.0).sum()


def test_the_weights_are_left_as_they_are() -> None:
    p = problem(3, 17, 1, 0)
    before = p["weight"].clone()
    fast(p, 0.01)
    assert torch.equal(p["weight"], before)
