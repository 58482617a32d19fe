"""Weight compander against its formula, autograd, and networks trained without it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whatmatters.core.errors import InputError, ModelError, NonFiniteError
from whatmatters.nn import Compander, compander_groups, fold_weight_compander, weight_compander

POSITIVE = st.floats(1e-3, 1e3)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).to(dtype)


def images(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(a=POSITIVE, b=POSITIVE, v=st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=20))
def test_is_the_formula_bounded_odd_and_increasing(a: float, b: float, v: list[float]) -> None:
    compander = Compander(scalar(a), scalar(b))
    given_v = torch.tensor(sorted(v), dtype=torch.float64)
    w = compander(given_v)
    assert w.tolist() == pytest.approx([a * math.atan(x / b) for x in sorted(v)], rel=1e-9)
    assert bool((w.abs() <= a * math.pi / 2 * (1 + 1e-12)).all())
    assert torch.equal(compander(-given_v), -w)
    assert bool((w.diff() >= 0).all())
    assert float(compander(scalar(0.0))) == 0.0


def test_gradient_is_the_formula_and_agrees_with_differences() -> None:
    compander = Compander(scalar(0.5), scalar(0.2), learnable=True)
    v = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    compander(v).sum().backward()
    assert torch.allclose(v.grad, (0.5 / 0.2) / (1 + (v.detach() / 0.2) ** 2))
    assert float(v.grad[4]) == pytest.approx(0.5 / 0.2)
    assert torch.autograd.gradcheck(lambda x, la, lb: torch.func.functional_call(compander, {"log_a": la, "log_b": lb}, (x,)), (
        v.detach().requires_grad_(), scalar(-0.7).requires_grad_(), scalar(-1.6).requires_grad_()))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(a=POSITIVE, b=POSITIVE, share=st.lists(st.floats(-0.99, 0.99), min_size=1, max_size=9))
def test_inverse_gives_back_every_weight_within_the_bound(a: float, b: float, share: list[float]) -> None:
    compander = Compander(scalar(a), scalar(b))
    w = torch.tensor(share, dtype=torch.float64) * a * math.pi / 2
    assert torch.allclose(compander(compander.right_inverse(w)), w, rtol=1e-9, atol=1e-12 * a)
    with pytest.raises(InputError, match="1 weights at or above"):
        compander.right_inverse(scalar(a * math.pi / 2 * 1.001))


def test_small_weights_are_magnified_and_large_ones_are_not() -> None:
    v = torch.linspace(1e-4, 10, 2000, dtype=torch.float64)
    gain = Compander(scalar(0.5), scalar(0.25))(v) / v
    assert float(gain[0]) == pytest.approx(2.0, rel=1e-3)
    assert int((gain.diff() > 0).sum()) == 0
    crossing = float(v[int((gain < 1).int().argmax())])
    assert 0.5 * math.atan(crossing / 0.25) == pytest.approx(crossing, abs=1e-2)
    assert bool((Compander(scalar(0.5), scalar(0.5))(v) <= v).all())


@pytest.mark.parametrize("per", ["layer", "channel", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wrapping_keeps_the_function_and_folding_keeps_what_was_learned(per: str, dtype: torch.dtype) -> None:
    model, x = network(dtype=dtype).eval(), images(dtype=dtype)
    before, keys = model(x), list(model.state_dict())
    weight_compander(model, per=per, learnable=True)
    assert torch.allclose(model(x), before, atol=1e-5 if dtype != torch.bfloat16 else 0.05)
    assert model[0].weight.dtype == dtype
    shape = {"layer": (), "model": (), "channel": (3,)}[per]
    assert model[0].parametrizations.weight[0].log_a.shape == shape
    assert (model[0].parametrizations.weight[0] is model[4].parametrizations.weight[0]) == (per == "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    learned = model(x)
    fold_weight_compander(model)
    assert torch.equal(model(x), learned)
    assert list(model.state_dict()) == keys or sorted(model.state_dict()) == sorted(keys)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert not parametrize.is_parametrized(model)


def test_copy_takes_the_weights_as_v() -> None:
    model = network()
    before = model[4].weight.detach().clone()
    weight_compander(model, a=0.01, slope=1.0, init="copy")
    assert torch.equal(model[4].parametrizations.weight.original, before)
    assert torch.allclose(model[4].weight, 0.01 * torch.atan(before / 0.01))


def test_wide_limit_trains_as_the_plain_network() -> None:
    plain, wrapped = network(dtype=torch.float64), network(dtype=torch.float64)
    weight_compander(wrapped, a=1e4, slope=1.0)
    x, y = images(dtype=torch.float64), torch.arange(8) % 5
    for model in (plain, wrapped):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    fold_weight_compander(wrapped)
    assert not torch.equal(plain[4].weight, network(dtype=torch.float64)[4].weight)
    assert torch.allclose(plain[4].weight, wrapped[4].weight, atol=1e-5)


def test_training_keeps_weights_below_the_bound() -> None:
    model = network()
    weight_compander(model, a=0.3)
    optimizer = torch.optim.SGD(compander_groups(model, lr=1.0), momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.arange(8) % 5).backward()
        optimizer.step()
    fold_weight_compander(model)
    assert 0.3 < float(model[4].weight.abs().max()) < 0.3 * math.pi / 2


def test_groups_give_a_and_b_their_own_rate_and_no_decay() -> None:
    model = weight_compander(network(), learnable=True, per="channel")
    rest, scales = compander_groups(model, lr=0.1, weight_decay=0.01)
    assert (rest["lr"], rest["weight_decay"], scales["weight_decay"]) == (0.1, 0.01, 0.0)
    assert scales["lr"] == pytest.approx(0.01)
    assert sorted(p.numel() for p in scales["params"]) == [3, 3, 5, 5]
    assert len(rest["params"]) + 4 == len(list(model.parameters()))
    assert len(compander_groups(weight_compander(network()), lr=0.1)) == 1


def test_biases_norms_excluded_and_shared_weights_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    weight_compander(model)
    assert [parametrize.is_parametrized(m) for m in (model.embed, model.mid, model.head)] == [False, True, False]
    assert model.head.weight is model.embed.weight
    other = weight_compander(network(), exclude=("0",))
    assert not parametrize.is_parametrized(other[0])
    assert [n for n, _ in other[1].named_parameters()] == ["weight", "bias"]


def test_state_dict_round_trip_in_the_middle_of_training() -> None:
    first = weight_compander(network(0), learnable=True)
    second = weight_compander(network(5), learnable=True)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(images()), second.eval()(images()))
    assert torch.equal(copy.deepcopy(first)(images()), first(images()))


@pytest.mark.parametrize("clamp", [False, True])
def test_weights_beyond_the_bound(clamp: bool) -> None:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = 5.0
    before = copy.deepcopy(model.state_dict())
    if clamp:
        weight_compander(model, a=0.5, clamp=True)
        assert float(model[4].weight[0, 0].detach()) == pytest.approx(0.99 * 0.5 * math.pi / 2, rel=1e-4)
        return
    with pytest.raises(InputError, match="4: 1 weights at or above"):
        weight_compander(model, a=0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_zero_weights_are_fine() -> None:
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    assert float(weight_compander(layer).weight.detach().abs().max()) == 0.0


def test_refusals() -> None:
    for bad in ({"a": 0.0}, {"slope": -1.0}, {"a": math.inf}, {"per": "row"}, {"init": "zero"}, {"exclude": ("9",)}):
        with pytest.raises(InputError):
            weight_compander(network(), **bad)
    with pytest.raises(ModelError, match="no layer of Linear"):
        weight_compander(nn.ReLU())
    with pytest.raises(ModelError, match="parametrized already"):
        weight_compander(weight_compander(network()))
    with pytest.raises(ModelError, match="nothing in Sequential"):
        fold_weight_compander(network())
    broken = network()
    with torch.no_grad():
        broken[4].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"4\.weight"):
        weight_compander(broken)
    with pytest.raises(InputError, match="lr is 0"):
        compander_groups(network(), lr=0.0)
    with pytest.raises(InputError, match="above 0"):
        Compander(scalar(-1.0), scalar(1.0))
