"""CATS against the masked MLP of a sort in Python."""

import pytest
import torch
from torch.nn import functional

from whatmatters.core.data import Calibration
from whatmatters.core.errors import BudgetError, DataError, ModelError
from whatmatters.infer import cats, teal
from whatmatters.testing.families import build, inputs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hidden_channels_go_by_the_gate_and_not_by_the_product(family: str) -> None:
    model = build(family)
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), cats(model, sparsity=0.75, mask_by="topk") as handle:
        gate = functional.silu(functional.linear(x, mlp.gate_proj.weight))
        order = torch.sort(gate.abs(), dim=-1, descending=True, stable=True).indices[..., :16]
        mask = torch.zeros_like(gate).scatter(-1, order, 1.0)
        expected = functional.linear(gate * mask * functional.linear(x, mlp.up_proj.weight), mlp.down_proj.weight)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mlp(x[:, :1]), expected[:, :1], rtol=1e-4, atol=1e-6)
        assert [row["site"].rpartition(".")[2] for row in handle.report.rows] == ["down_proj"] * 2
        assert handle.counts()[0]["tokens_skipping"] == 1


def test_thresholds_skip_the_asked_share() -> None:
    model = build("llama")
    ids = inputs("llama", samples=16, length=24)
    with torch.no_grad(), cats(model, Calibration.from_tensors(ids), sparsity=0.6) as handle:
        for position in range(24):
            model(ids[:1, position : position + 1])
        assert all(abs(row["kept_share"] - 0.4) < 0.08 for row in handle.counts())


def test_an_mlp_without_an_up_projection_gives_teal_on_its_second_matrix() -> None:
    model, ids = build("gpt2"), inputs("gpt2")
    with torch.no_grad():
        with cats(model, sparsity=0.5, mask_by="topk") as handle:
            own, plan = model(ids).logits, dict(handle.plan.values)
        assert {name.rpartition("h.")[2][2:] for name in plan} == {"mlp.c_proj"}
        gates = dict.fromkeys((site for site in [r["site"] for r in handle.report.rows]), 0.5)
        with teal(model, sparsity=0.0) as other:
            for gate in other._gates:
                gate.keep = 64 if gate.site.name in gates else gate.keep
                gate.positions.prefix = 0
            torch.testing.assert_close(model(ids).logits, own)


def test_the_model_is_as_before_and_bad_input_is_refused() -> None:
    model = build("llama")
    hooks = [len(m._forward_hooks) for m in model.modules()]
    cats(model, sparsity=0.5, mask_by="topk").undo()
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    with pytest.raises(DataError, match="calibration"):
        cats(model)
    with pytest.raises(BudgetError):
        cats(model, sparsity=1.0, mask_by="topk")
    for family in ("mixtral", "sequential"):
        with pytest.raises(ModelError, match="activation"):
            cats(build(family), mask_by="topk", allow_uncovered=True)
