"""Rotations: exact matrices, models that compute what they did (float64, every family), the weights' closed forms, refusals and faults."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from whatmatters.core import walk as walk_module
from whatmatters.core.checkpoint import save
from whatmatters.core.errors import FileError, FormatError, InputError, ModelError, NonFiniteError, ResumeError
from whatmatters.core.sites import structure
from whatmatters.quantize import hadamard, random_orthogonal, rotate
from whatmatters.quantize._rotation import Rotator, rotation
from whatmatters.testing.families import VOCABULARY, build, inputs

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMS norms compute in float32 whatever the model's dtype; here in the dtype of the model."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def one_more(self: Any, hidden: Tensor) -> Tensor:
        return (1 + self.weight) * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps))

    for norm in (LlamaRMSNorm, MixtralRMSNorm, Phi3RMSNorm, Qwen2MoeRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
    monkeypatch.setattr(GemmaRMSNorm, "forward", one_more)


def varied(model: nn.Module) -> nn.Module:
    """No gain stays one and no bias zero, so that nothing is right by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    model.config._experts_implementation = "eager"
    return model.eval()


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def qwen2() -> nn.Module:
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, **SPECIAL, num_key_value_heads=2)))


def one_head() -> nn.Module:
    """Its norm of queries is as wide as the residual stream."""
    return seeded(
        lambda: Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "num_attention_heads": 1}, **SPECIAL, num_key_value_heads=1, head_dim=32))
    )


MODELS = {
    "llama": lambda: build("llama"),
    "llama, tied": lambda: build("llama", tied=True),
    "llama, 24 wide": lambda: build("llama", hidden=24, intermediate=44),
    "llama, 40 wide, 92 inside": lambda: build("llama", hidden=40, intermediate=92),
    "qwen2, with biases": qwen2,
    "qwen3": lambda: build("qwen3"),
    "qwen3, one head": one_head,
    "mixtral": lambda: build("mixtral"),
    "qwen2-moe": lambda: build("qwen2-moe"),
    "phi3, fused": lambda: build("phi3"),
    "gemma, gains one more than their weight": lambda: build("gemma"),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Matrices


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 56, 60, 64, 76, 96, 108, 148, 256])
def test_hadamard_is_orthogonal_with_entries_of_one_size(n: int) -> None:
    q = hadamard(n, seed=3)
    assert torch.allclose(q @ q.T, torch.eye(n).double(), atol=1e-12)
    assert torch.allclose(q.abs(), torch.full((n, n), n**-0.5).double(), atol=1e-14)


def test_hadamard_signs_come_from_the_seed() -> None:
    first, again, other = hadamard(64, 0), hadamard(64, 0), hadamard(64, 1)
    assert torch.equal(first, again)
    ratio = other / first
    assert torch.allclose(ratio, ratio[:, :1].expand(64, 64))
    assert len(ratio[:, 0].round().unique()) == 2


@pytest.mark.parametrize("n", [3, 6, 7, 10, 92, 0, -4])
def test_no_hadamard_of_that_size(n: int) -> None:
    """None exists for 3, 6, 7 and 10; of size 92 one exists that no Paley construction gives."""
    with pytest.raises(InputError, match=rf"size {n}"):
        hadamard(n)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.sampled_from(["hadamard", "random", "online"]), st.integers(0, 2**40))
def test_every_rotation_is_orthogonal_and_applies_as_its_matrix(n: int, mode: str, seed: int) -> None:
    found = rotation(n, mode, seed)
    q = found.matrix().numpy()
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-11)
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.rows(x.double()).numpy(), x.double().numpy() @ q, atol=1e-11)
    np.testing.assert_allclose(found.rows(x).numpy(), x.numpy() @ q.astype(np.float32), atol=1e-4)
    assert found.rows(x.bfloat16()).dtype == torch.bfloat16


def test_random_rotations_are_uniform() -> None:
    """Of a uniform rotation every entry has mean 0 and variance 1/n; without the sign fix the diagonal would lean to one side."""
    draws = torch.stack([random_orthogonal(4, seed) for seed in range(2000)])
    assert draws.mean(0).abs().max() < 5 * 0.5 / 2000**0.5
    assert (draws.square().mean(0) - 0.25).abs().max() < 0.03
    assert not torch.equal(random_orthogonal(4, 0), random_orthogonal(4, 1))
    with pytest.raises(InputError):
        random_orthogonal(0)


# Models


@pytest.mark.parametrize("mode", ["hadamard", "random", "online"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_before(name: str, mode: str, exact_norms: None) -> None:
    model = varied(MODELS[name]().double())
    ids = inputs("llama", samples=3, length=11)
    before = model(ids).logits
    report = rotate(model, mode=mode, seed=5)
    assert (model(ids).logits - before).abs().max() < 1e-8
    assert before.abs().max() > 0.1
    assert [row["block"] for row in report.rows] == ["model.layers.0", "model.layers.1"]


def test_weights_are_the_closed_forms() -> None:
    """Readers W diag(gain) Q, writers Q'W, values rotated in each head: with dense matrices, and names that only this test knows."""
    model = varied(qwen2().double())
    before = state(model)
    rotator = Rotator(model, structure(model), "hadamard", 0)
    q, h = rotator.stream.matrix(), rotator._of_heads(8).matrix()
    rotate(model)
    after = state(model)
    for layer in ("model.layers.0", "model.layers.1"):
        attention, mlp = before[f"{layer}.input_layernorm.weight"], before[f"{layer}.post_attention_layernorm.weight"]
        expected = {f"self_attn.{name}_proj.weight": before[f"{layer}.self_attn.{name}_proj.weight"] * attention @ q for name in "qkv"}
        expected |= {f"mlp.{name}_proj.weight": before[f"{layer}.mlp.{name}_proj.weight"] * mlp @ q for name in ("gate", "up")}
        expected["mlp.down_proj.weight"] = q.T @ before[f"{layer}.mlp.down_proj.weight"]
        expected["self_attn.v_proj.weight"] = torch.block_diag(h, h).T @ expected["self_attn.v_proj.weight"]
        expected["self_attn.v_proj.bias"] = before[f"{layer}.self_attn.v_proj.bias"] @ torch.block_diag(h, h)
        expected["self_attn.q_proj.bias"] = before[f"{layer}.self_attn.q_proj.bias"]
        expected["self_attn.o_proj.weight"] = q.T @ before[f"{layer}.self_attn.o_proj.weight"] @ torch.block_diag(h, h, h, h)
        expected["input_layernorm.weight"] = expected["post_attention_layernorm.weight"] = torch.ones(32).double()
        for name, value in expected.items():
            assert torch.allclose(after[f"{layer}.{name}"], value, atol=1e-12), name
    assert torch.allclose(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"] @ q, atol=1e-12)
    assert torch.allclose(after["lm_head.weight"], before["lm_head.weight"] * before["model.norm.weight"] @ q, atol=1e-12)
    assert torch.equal(after["model.norm.weight"], torch.ones(32).double())


def test_an_outlier_column_is_spread() -> None:
    model = build("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[:, 5] *= 100

    def peak() -> float:
        return float(weight.detach().abs().max() / weight.detach().square().mean().sqrt())

    before = peak()
    rotate(model)
    assert peak() < 0.7 * before


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.d(y.transpose(1, 2).flatten(2))


class Parallel(nn.Module):
    """One norm is read by attention and a network side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n = nn.RMSNorm(width)
        self.x = Attention(width)
        self.y = nn.Linear(width, 20)
        self.z = nn.Linear(20, width)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.n(hidden)
        return hidden + self.x(normed) + self.z(self.y(normed).relu())


class Own(nn.Module):
    """A causal language model of no family, with names of its own."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, width)
        self.stack = nn.ModuleList(Parallel(width) for _ in range(3))
        self.last = nn.RMSNorm(width)
        self.out = nn.Linear(width, 40)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) * 3.0
        for block in self.stack:
            hidden = block(hidden)
        return self.out(self.last(hidden))


def test_structure_is_found_without_names() -> None:
    model = seeded(Own).double()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.RMSNorm)):
            norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    before = state(model)
    ids = torch.arange(24).reshape(2, 12)
    logits = model(ids)
    rotate(model)
    assert (model(ids) - logits).abs().max() < 1e-10
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"stack.0.x.c.weight", "stack.2.z.bias", "stack.1.x.d.bias", "stack.1.x.c.bias", "out.weight"} <= changed
    assert not {"stack.0.x.a.bias", "stack.0.y.bias", "out.bias"} & changed


def test_training_mode_generator_and_hooks_stay() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    rotate(model)
    assert torch.equal(torch.get_rng_state(), expected)
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == 0
    assert model.config._attn_implementation == build("llama").config._attn_implementation


def test_seeds_decide_the_rotation() -> None:
    models = [build("llama") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        rotate(model, seed=seed)
    assert same(state(models[0]), state(models[1]))
    assert not torch.equal(models[0].lm_head.weight, models[2].lm_head.weight)


def test_half_precision_is_kept() -> None:
    model = build("llama", tied=True).to(torch.bfloat16)
    reference = copy.deepcopy(model).float()
    rotate(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = inputs("llama")
    before, after = reference(ids).logits, model.float()(ids).logits
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_tied_embeddings_become_two_and_reload(tmp_path: Path) -> None:
    model = varied(build("llama", tied=True))
    ids = inputs("llama")
    before = model(ids).logits
    report = rotate(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    size = sum(p.nbytes for p in model.parameters())
    assert any(f"to {size / 1e6:.2f} MB" in note for note in report.notes)
    save(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded(ids).logits - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_equal_gains_are_read_right_whatever_the_norm_adds_to_its_weight(weight: float, tmp_path: Path) -> None:
    """With a weight of equal numbers both readings, gain = weight and gain = 1 + weight, fit the norm's outputs up to a factor."""
    for family, more in (("llama", 0.0), ("gemma", 1.0)):
        if weight + more == 0:
            continue
        model, ids = build(family), inputs(family)
        norms = [p for name, p in model.named_parameters() if p.dim() == 1]
        with torch.no_grad():
            for gain in norms:
                gain.fill_(weight)
        before = model(ids).logits
        rotate(model)
        assert (model(ids).logits - before).abs().max() < 1e-5 * before.abs().max()
        assert all(torch.equal(gain, torch.full_like(gain, 1 - more)) for gain in norms)
        save(model, None, tmp_path / f"{family}")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}").eval()(ids).logits, model(ids).logits)


def test_a_model_without_fused_attention_is_rotated_or_refused_in_our_words() -> None:
    """Soft-capped attention has no fused function; its heads are left alone, and norms after the sublayers need gains that are all one."""
    model, ids = build("gemma2"), inputs("gemma2")
    before = model(ids).logits
    assert any("no rotation within heads" in note for note in rotate(model).notes)
    assert (model(ids).logits - before).abs().max() < 1e-5 * before.abs().max()
    with pytest.raises(ModelError, match="other logits"):
        rotate(varied(build("gemma2")))


def test_online_rotations_are_refused_at_save(tmp_path: Path) -> None:
    model = build("llama")
    rotate(model, mode="online")
    assert hooks(model) == 4  # output and down projection of two blocks
    with pytest.raises(FormatError, match="as it runs"):
        save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Refusals and faults

OTHERS = {
    "layer norms": (lambda: build("gpt2"), r"transformer\.h\.0\.ln_1 \(LayerNorm\) is no RMS norm"),
    "norms of attention and feed-forward outputs": (lambda: varied(build("gemma2")), "other logits"),
    "norms after sublayers": (lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, **SPECIAL, num_key_value_heads=2)), "other logits"),
    "no language model": (lambda: build("sequential"), "for causal language models"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_rotation_would_change_is_refused(name: str) -> None:
    make, told = OTHERS[name]
    model = seeded(make)
    before = state(model)
    with pytest.raises(ModelError, match=told):
        rotate(model)
    assert same(state(model), before)
    assert hooks(model) == 0


def test_a_bias_added_outside_a_matrix_is_noticed() -> None:
    """Nothing tells that this block adds a vector to the stream, except that the logits change."""

    class Adds(Parallel):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.extra = nn.Parameter(torch.linspace(-1, 1, width))

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + self.extra

    model = seeded(Own)
    model.stack[2] = seeded(lambda: Adds(16))
    with pytest.raises(ModelError, match="other logits"):
        rotate(model)


def test_unknown_modes_and_nan_are_refused() -> None:
    with pytest.raises(InputError, match="'givens'; expected one of 'hadamard', 'random', 'online'"):
        rotate(build("llama"), mode="givens")
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        rotate(model)


@pytest.mark.parametrize("writes", range(1, 9))
def test_a_fault_at_any_write_leaves_the_model_as_it_was(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, then for each of two blocks, embedding, head and norm a journal: the n-th file fails."""
    model = build("llama", tied=True)
    before = state(model)
    count = 0
    write = walk_module.save_file

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == writes:
            raise OSError("no space left")
        write(*args, **kwargs)

    monkeypatch.setattr(walk_module, "save_file", failing)
    if writes == 8:  # there are seven
        rotate(model)
        return
    with pytest.raises((OSError, FileError)):
        rotate(model)
    assert same(state(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_a_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    expected, model = build("llama", layers=3), build("llama", layers=3)
    rotate(expected)
    before = state(model)

    def stop(label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(model, run_dir=tmp_path, progress=stop)
    assert same(state(model), before)
    with pytest.raises(ResumeError, match="setting seed"):
        rotate(model, seed=1, run_dir=tmp_path, resume=True)
    rotate(model, run_dir=tmp_path, resume=True)
    assert same(state(model), state(expected))
