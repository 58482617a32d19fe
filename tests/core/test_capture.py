"""What capture sees against what the library's own attention and expert loops compute."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.capture import attention_queries, attention_received, settings_of, site_inputs
from whatmatters.core.data import call_model
from whatmatters.core.errors import ModelError
from whatmatters.core.sites import structure
from whatmatters.testing.families import FAMILIES, build, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_every_site_explain_its_output(family: str) -> None:
    model, ids = build(family), inputs(family)
    found = structure(model)
    seen: dict[str, list[Tensor]] = {}
    plain = {s.name: s for s in found.sites if s.index is None}
    outputs: dict[str, Tensor] = {}
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, out, n=n: outputs.__setitem__(n, out.detach())) for n in plain]
    with (
        torch.no_grad(),
        settings_of(model, _experts_implementation="eager"),
        site_inputs(model, found.sites, lambda name, x, rows: seen.setdefault(name, []).append(x)),
    ):
        call_model(model, ids)
    for handle in handles:
        handle.remove()
    assert plain.keys() <= seen.keys()
    for name, site in plain.items():
        bias = getattr(model.get_submodule(name), "bias", None)
        expected = nn.functional.linear(seen[name][0], site.view(model), bias)
        assert torch.allclose(outputs[name], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_experts_see_the_tokens_routed_to_them(family: str) -> None:
    model, ids = build(family), inputs(family)
    found = structure(model)
    routed: list[Tensor] = []
    experts = model.get_submodule("model.layers.0.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda m, args: routed.append((args[0], args[1])))
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}
    sites = [s for s in found.sites if s.index is not None and s.block == "model.layers.0"]
    with (
        torch.no_grad(),
        settings_of(model, _experts_implementation="eager"),
        site_inputs(model, sites, lambda name, x, rows: seen.__setitem__(name, (x, rows))),
    ):
        call_model(model, ids)
    handle.remove()
    hidden, chosen = routed[0]
    for expert in range(4):
        rows = torch.where((chosen == expert).any(-1))[0]
        x, told = seen[f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"]
        assert told is not None
        assert sorted(told.tolist()) == rows.tolist()
        assert torch.equal(x, hidden[told])
        _, down_rows = seen[f"model.layers.0.mlp.experts.down_proj[{expert}]"]
        assert torch.equal(down_rows, told)


def test_settings_are_restored_after_a_raise() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    with attention_queries(model, lambda *args: None):
        assert model.config._attn_implementation != before

    def stop(*args: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        call_listening(model, stop)
    assert model.config._attn_implementation == before


def call_listening(model: nn.Module, listener: Any) -> None:
    with torch.no_grad(), attention_queries(model, listener):
        call_model(model, inputs("llama"))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.given != "vectors" and name != "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_received_sums_the_eager_maps(family: str, padded: bool) -> None:
    if padded and not FAMILIES[family].pads:
        pytest.skip("images have no padding")
    model, ids = build(family), inputs(family, samples=2, length=17)
    valid = torch.ones(ids.shape[:2], dtype=torch.bool) if FAMILIES[family].pads else None
    if padded and valid is not None:
        valid[1, 12:] = False
    received: list[Tensor] = []

    def listener(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        received.append(attention_received(query, key, mask, scaling, rows=5, causal=module.is_causal))

    with torch.no_grad():
        with attention_queries(model, listener):
            listened = call_model(model, ids, valid)[0]
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        out = eager(ids, attention_mask=None if valid is None else valid.long(), output_attentions=True)
        quiet = call_model(model, ids, valid)[0]
    assert torch.equal(listened, quiet)
    assert len(received) == len(out.attentions) == 2
    for ours, theirs in zip(received, out.attentions, strict=True):
        expected = theirs.double()
        if padded:  # the library gives queries in the padding rows of its own; only real queries are compared
            assert torch.isfinite(ours[valid]).all()
            assert torch.allclose(ours[0].double(), expected[0].sum((0, 1)), atol=1e-4)
        else:
            assert torch.allclose(ours.double(), expected.sum((1, 2)), atol=1e-4)


def test_soft_capped_attention_is_refused() -> None:
    model = build("gemma2")
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match="softcap"), torch.no_grad(), attention_queries(model, lambda *args: None):
        call_model(model, inputs("gemma2"))
    assert model.config._attn_implementation == before


def test_causal_sums_add_up_and_fall_for_uniform_attention() -> None:
    query = torch.zeros(1, 3, 6, 4)
    received = attention_received(query, query)
    expected = [3 * sum(1 / (i + 1) for i in range(t, 6)) for t in range(6)]
    assert received[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert float(attention_received(query, query, causal=False).sum()) == pytest.approx(18)
