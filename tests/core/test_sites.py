"""Blocks, sites and ties, found from structure in every family."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from whatmatters.core.errors import FormatError, ModelError
from whatmatters.core.sites import Structure, find_blocks, structure
from whatmatters.testing.families import FAMILIES, build

EXPECTED = {
    # family: (blocks, sites in a block, sizes of the tie groups in a block, uncovered in a block)
    "llama": (2, 7, [3, 2], []),
    "qwen3": (2, 7, [3, 2], []),
    "gpt2": (2, 4, [], []),
    "mixtral": (2, 4 + 8, [3, 4, 4], ["mlp.gate.weight"]),
    "qwen2-moe": (2, 4 + 8 + 4, [3, 4, 4, 3], ["mlp.gate.weight"]),  # the gate of the shared expert reads what the expert reads
    "mistral": (2, 7, [3, 2], []),
    "gemma": (2, 7, [3, 2], []),
    "gemma2": (2, 7, [3, 2], []),
    "gemma3": (2, 7, [3, 2], []),
    "phi": (2, 6, [4], []),  # attention and feed-forward read one norm
    "phi3": (2, 4, [], []),  # fused
    "gpt-neox": (2, 4, [], []),  # fused; attention and feed-forward have norms of their own
    "opt": (2, 6, [3], []),
    "opt-projected": (2, 6, [3], []),
    "bert": (2, 6, [3], []),
    "bert-encoder": (2, 6, [3], []),
    "vit": (2, 6, [3], []),
    "sequential": (5, None, [], []),
}


def test_every_family_is_expected() -> None:
    assert EXPECTED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", EXPECTED)
def test_transformers_families(family: str) -> None:
    model = build(family)
    found = structure(model)
    blocks, sites, ties, uncovered = EXPECTED[family]
    assert len(found.blocks) == blocks
    for block in found.blocks:
        assert sites is None or len(found.in_block(block)) == sites
        assert [len(group) for group in found.ties if group[0].startswith(block + ".")] == ties
        assert [name.removeprefix(block + ".") for name in found.uncovered if name.startswith(block + ".")] == uncovered
    matrices = sum(p.numel() for b in found.blocks for p in model.get_submodule(b).parameters() if p.dim() >= 2)
    left = sum(model.get_parameter(name).numel() for name in found.uncovered)
    assert sum(site.size for site in found.sites) == matrices - left


def test_ties_of_a_llama_are_what_serving_engines_fuse() -> None:
    found = structure(build("llama"))
    assert found.ties[:2] == (
        tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    )


def test_a_plain_network_needs_an_example_for_its_ties() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x)
            return self.a(y) + self.b(y) + self.c(y + 0)

    model = nn.Sequential(Twins(), Twins())
    assert structure(model).ties == ()
    assert structure(model, torch.ones(1, 4)).ties == (("0.a", "0.b"), ("1.a", "1.b"))


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_out_by_in_and_write_through(family: str) -> None:
    model = build(family)
    for site in structure(model).sites:
        view = site.view(model)
        assert tuple(view.shape) == site.shape
        with torch.no_grad():
            view[0, 1] = 17.0
        parameter = model.get_parameter(site.parameter)
        stored = parameter if site.index is None else parameter[site.index]
        assert (stored[1, 0] if site.transposed else stored[0, 1]) == 17.0


def test_conv1d_sites_compute_like_a_linear_with_their_view() -> None:
    model = build("gpt2")
    site = next(s for s in structure(model).sites if s.name.endswith("c_attn"))
    x = torch.randn(3, site.shape[1], generator=torch.Generator().manual_seed(0))
    module = model.get_submodule(site.name)
    assert torch.allclose(module(x), nn.functional.linear(x, site.view(model), module.bias), atol=1e-6)


def test_the_search_leaves_no_hooks_and_works_without_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=100)
        )
    found = structure(model)
    assert len(found.sites) == 21
    assert len(found.ties) == 6
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_survives_json(family: str) -> None:
    found = structure(build(family))
    assert Structure.from_json(found.to_json()) == found


def test_malformed_json_is_refused() -> None:
    with pytest.raises(FormatError):
        Structure.from_json({"blocks": [1], "sites": [["a"]], "ties": [], "uncovered": []})


def test_modules_without_blocks_or_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="expected a stack of blocks"):
        find_blocks(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="no linear weights"):
        structure(nn.Sequential(nn.ReLU(), nn.Tanh()))


def test_groups_cover_each_site_once() -> None:
    found = structure(build("mixtral"))
    names = [name for group in found.groups() for name in group]
    assert sorted(names) == sorted(site.name for site in found.sites)
