"""Handles: entries that make a model cheaper to run and return what undoes it: `active`, `undo()`, and a context manager.

The subject holds a tiny language model with its calibration data, and a tiny image model with images. Entries whose unit is "token" are
given the image model, all others the language model; what is asked of the outcome is asked of both.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whatmatters.core.catalog import Entry, methods
from whatmatters.core.data import Calibration
from whatmatters.core.errors import WhatMattersError
from whatmatters.testing.families import build, inputs
from whatmatters.testing.forms import Form


@dataclass(eq=False)
class Subject:
    """What a call is given, and what its outcome is measured on."""

    language: nn.Module
    text: Calibration | None
    ids: Tensor
    vision: nn.Module
    images: Tensor


def tiny_vit(seed: int) -> nn.Module:
    """An image classifier of three blocks with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config).eval()


def _subject(seed: int) -> Subject:
    draw = torch.Generator().manual_seed(seed)
    text = Calibration.from_tensors(inputs("llama", samples=4, length=16, seed=seed), batch=2)
    return Subject(build("llama", seed), text, text.inputs, tiny_vit(seed), torch.randn(4, 3, 32, 32, generator=draw))


def _call(entry: Entry, subject: Subject, **settings: Any) -> Any:
    if entry.unit == "token":
        return entry.function(subject.vision, **settings)
    return entry.function(subject.language, subject.text, **settings)


def _outcome(result: Any, subject: Subject) -> dict[str, Tensor]:
    """Outputs of both models and all their weights, in the bits they have now."""
    with torch.no_grad():
        prefill = subject.language(subject.ids[:1, :8], use_cache=True)
        step = subject.language(subject.ids[:1, 8:9], past_key_values=prefill.past_key_values)
        outputs = {
            "logits": subject.language(subject.ids).logits,
            "decoded": step.logits,
            "classes": subject.vision(subject.images).logits,
        }
    weights = {f"{kind}.{name}": value.detach().clone() for kind, model in (("language", subject.language), ("vision", subject.vision))
               for name, value in model.state_dict().items()}  # fmt: skip
    strides = {f"stride.{name}": torch.tensor(value.stride()) for name, value in subject.language.state_dict().items()}
    return outputs | weights | strides


def _broken(kind: str) -> Any:
    def nan(subject: Subject) -> Subject:
        model = getattr(subject, kind)
        weight = next(p for name, p in model.named_parameters() if p.dim() == 2 and "layer" in name)
        weight.data[0, 0] = float("nan")
        return subject

    return nan


def _both_nan(subject: Subject) -> Subject:
    return _broken("vision")(_broken("language")(subject))


def _no_blocks(subject: Subject) -> Subject:
    return Subject(nn.Identity(), subject.text, subject.ids, nn.Identity(), subject.images)


def _used_twice(subject: Subject) -> Subject:
    """Models that have a handle already: a second one could not be undone in any order."""
    for entry in methods():
        if entry.form == "handle":
            with contextlib.suppress(WhatMattersError):  # the second on one model is refused, as it should be
                _call(entry, subject)
    return subject


FORM = Form(
    subject=_subject,
    call=_call,
    outcome=_outcome,
    samples={"sparsity": 0.5, "allow_uncovered": True, "dense_prefix": 2},
    bad_subjects={"NaN in a weight": _both_nan, "no blocks": _no_blocks, "a handle already": _used_twice},
    bad_settings={
        "sparsity": [-0.1, 1.0, 2, float("nan")],
        "allocation": ["magic"],
        "mask_by": ["luck"],
        "norms": ["none"],
        "dense_prefix": [-1],
        "step": [0.0, -1.0, float("nan")],
    },
    changes=True,
    undo=lambda result, subject: result.undo(),
    without_text=lambda subject: dataclasses.replace(subject, text=None),
)
