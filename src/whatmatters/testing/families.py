"""Tiny models of each family, built from config with seeded random weights: one table for every check that runs over families."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 64
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def llama(layers: int = 2, hidden: int = 32, intermediate: int = 64, tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=tied, **SPECIAL,
        )
    )  # fmt: skip


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            vocab_size=VOCABULARY, max_position_embeddings=128, **SPECIAL,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=VOCABULARY, **SPECIAL))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY, max_position_embeddings=128, **SPECIAL,
        )
    )  # fmt: skip


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "mixtral": mixtral, "sequential": sequential}


def build(family: str, seed: int = 0, **settings: int | bool) -> nn.Module:
    """The tiny model of a family with weights from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family](**settings).eval()


def inputs(family: str, samples: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random inputs for a family: token ids, or vectors for the plain network."""
    generator = torch.Generator().manual_seed(seed)
    if family == "sequential":
        return torch.randn(samples * length, 16, generator=generator)
    return torch.randint(1, VOCABULARY, (samples, length), generator=generator)
