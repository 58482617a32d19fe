"""Tiny models of each family, built from config with seeded random weights: one table for every check that runs over families.

What a check has to know of a family is a trait in the table (what it is given, which loader reads it back, whether it predicts the next
token), so that no check and no part of the library names a family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import nn

from whatmatters.core.data import Calibration

__all__ = ["FAMILIES", "VOCABULARY", "Family", "build", "calibration", "causal", "inputs", "reloadable"]

VOCABULARY = 64
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
IMAGE = 8
"""Height and width of the tiny images, in pixels."""

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
"""Sizes of a model whose query heads share key and value heads."""


@dataclass(frozen=True)
class Family:
    """What a check has to know of a family.

    Attributes:
        make: builds the tiny model from the global generator.
        given: what it is given: token ids, images or vectors.
        causal: whether it predicts the next token.
        loader: the stock loader of transformers that reads its checkpoints; None for a model that has none.
    """

    make: Callable[..., nn.Module]
    given: Literal["tokens", "images", "vectors"] = "tokens"
    causal: bool = True
    loader: str | None = "AutoModelForCausalLM"

    @property
    def pads(self) -> bool:
        """Whether samples may be padded."""
        return self.given == "tokens"


def _of(config: str, loader: str = "AutoModelForCausalLM", **settings: Any) -> nn.Module:
    """The model that a stock loader builds from a configuration."""
    built: nn.Module = getattr(transformers, loader).from_config(getattr(transformers, config)(**settings))
    return built


def llama(layers: int = 2, hidden: int = 32, intermediate: int = 64, tied: bool = False) -> nn.Module:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return _of("LlamaConfig", tie_word_embeddings=tied, **GROUPED | SPECIAL | sizes)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def _gpt2() -> nn.Module:
    return _of("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=VOCABULARY, **SPECIAL)


def _gemma2() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return _of("Gemma2Config", head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=layers, **GROUPED, **SPECIAL)


def _gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return _of("Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=layers, **GROUPED, **SPECIAL)


def _opt(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return _of("OPTConfig", max_position_embeddings=128, vocab_size=VOCABULARY, **SPECIAL | {"pad_token_id": 1} | sizes | settings)


def _qwen2_moe() -> nn.Module:
    return _of(
        "Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=64,
        **GROUPED, **SPECIAL,
    )  # fmt: skip


def _vit() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key not in ("max_position_embeddings", "vocab_size")}
    return _of("ViTConfig", "AutoModelForImageClassification", image_size=IMAGE, patch_size=2, num_channels=3, num_labels=5, **sizes)


FAMILIES: dict[str, Family] = {
    "llama": Family(llama),
    "mistral": Family(partial(_of, "MistralConfig", head_dim=8, sliding_window=8, **GROUPED, **SPECIAL)),
    "qwen3": Family(partial(_of, "Qwen3Config", head_dim=8, **GROUPED, **SPECIAL)),
    "gemma": Family(partial(_of, "GemmaConfig", head_dim=8, **GROUPED, **SPECIAL)),
    "gemma2": Family(_gemma2),
    "gemma3": Family(_gemma3),
    "phi": Family(partial(_of, "PhiConfig", **SIZES, **SPECIAL)),
    "phi3": Family(partial(_of, "Phi3Config", **GROUPED, **SPECIAL)),
    "gpt2": Family(_gpt2),
    "gpt-neox": Family(partial(_of, "GPTNeoXConfig", **SIZES, **SPECIAL)),
    "opt": Family(_opt),
    "opt-projected": Family(partial(_opt, do_layer_norm_before=False, word_embed_proj_dim=16)),
    "mixtral": Family(partial(_of, "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **GROUPED, **SPECIAL)),
    "qwen2-moe": Family(_qwen2_moe),
    "bert": Family(partial(_of, "BertConfig", "AutoModelForMaskedLM", **SIZES, **SPECIAL), causal=False, loader="AutoModelForMaskedLM"),
    "bert-encoder": Family(partial(_of, "BertConfig", "AutoModel", **SIZES, **SPECIAL), causal=False, loader="AutoModel"),
    "vit": Family(_vit, given="images", causal=False, loader="AutoModelForImageClassification"),
    "sequential": Family(sequential, given="vectors", causal=False, loader=None),
}


def causal() -> list[str]:
    """Names of the families that predict the next token."""
    return [name for name, family in FAMILIES.items() if family.causal]


def reloadable() -> list[str]:
    """Names of the families whose checkpoints a stock loader reads."""
    return [name for name, family in FAMILIES.items() if family.loader is not None]


def build(family: str, seed: int = 0, **settings: int | bool) -> nn.Module:
    """The tiny model of a family with weights from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family].make(**settings).eval()


def inputs(family: str, samples: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random inputs for a family: token ids (samples, length), images, or vectors (samples * length, 16)."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[family].given == "vectors":
        return torch.randn(samples * length, 16, generator=generator)
    if FAMILIES[family].given == "images":
        return torch.randn(samples, 3, IMAGE, IMAGE, generator=generator)
    return torch.randint(1, VOCABULARY, (samples, length), generator=generator)


def calibration(family: str, samples: int = 6, length: int = 24, seed: int = 1, *, batch: int = 4, padded: bool = False) -> Calibration:
    """The same inputs as calibration data; `padded` marks the end of the last sample as padding, where samples may be padded."""
    given = inputs(family, samples, length, seed)
    if not (padded and FAMILIES[family].pads):
        return Calibration.from_tensors(given, batch=batch)
    valid = torch.ones_like(given, dtype=torch.bool)
    valid[-1, length // 2 :] = False
    return Calibration.from_tensors(given, valid, batch=batch)
