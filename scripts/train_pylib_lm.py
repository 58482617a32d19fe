"""Train a small Llama of Python source from the standard library of the running interpreter, as the embedded model was.

    python scripts/train_pylib_lm.py --output my-pylib-lm             # about two hours on two cores
    python scripts/train_pylib_lm.py --output smoke --steps 20        # does everything, learns nothing

Only the files that the hash rule of `whatmatters.core.embedded` assigns to "train" are read for training, the tokenizer's included; the
validation files are judged at the end, the test files are not touched. The result is a folder that `AutoModelForCausalLM` loads: fp16
tensors, and a `config.json` that says float32. One stage, AdamW, linear warm-up and cosine decay.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whatmatters.core import embedded
from whatmatters.core.checkpoint import atomic_folder, check_output
from whatmatters.core.data import windows
from whatmatters.core.evaluate import evaluate
from whatmatters.core.seeds import generator

VOCABULARY, LENGTH, BATCH = 4096, 512, 8
PEAK_LR, LAST_LR, WARM_UP = 2e-3, 2e-5, 100
END = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no text is unknown; one special token begins and ends documents and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=2 * LENGTH)


def new_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 5.8M parameters with weights drawn from `seed`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2 * LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws initial weights from the global generator
        return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear to `PEAK_LR`, then a half cosine to `LAST_LR`."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return PEAK_LR * (step + 1) / warm_up
    return LAST_LR + (PEAK_LR - LAST_LR) * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def train(model: LlamaForCausalLM, stream: Tensor, steps: int, seed: int, minutes: float) -> int:
    """Train on random windows of the token stream; returns the steps taken, fewer than `steps` when the minutes are over."""
    draw = generator(seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    model.train()
    begin = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts = torch.randint(len(stream) - LENGTH - 1, (BATCH, 1), generator=draw)
        batch = stream[starts + torch.arange(LENGTH + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(scores.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = time.monotonic() - begin
        if step % 50 == 0 or step == steps - 1:
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s, {left / 60:.0f} min left", flush=True)
        if seconds > 60 * minutes:
            return step + 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--steps", type=int, default=3000, help="steps of 8 x 512 tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this many, with the weights of that moment")
    parser.add_argument("--seed", type=int, default=0, help="decides weights and batches")
    settings = parser.parse_args()
    if settings.steps < 1 or not settings.minutes > 0:
        parser.error("--steps must be at least 1 and --minutes more than 0")
    check_output(settings.output)  # before two hours of work, not after

    texts = embedded.documents("train")
    tokenizer = train_tokenizer(texts)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.cat([torch.tensor([tokenizer.bos_token_id, *ids]) for ids in encoded])
    model = new_model(settings.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} files, {len(stream):,} tokens of {embedded.interpreter()}; {parameters:,} parameters", flush=True)
    taken = train(model, stream, settings.steps, settings.seed, settings.minutes)

    model.half().float()  # judge what is stored: the weights as fp16 rounds them
    measured = evaluate(model.eval(), windows(tokenizer, embedded.documents("validation"), LENGTH, per_document=4))
    print(f"validation: {measured.loss:.3f} nats a token, perplexity {measured.perplexity:.2f}")
    with atomic_folder(settings.output) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
        record = {
            "interpreter": embedded.interpreter(),
            "train_digest": embedded.split_digest("train"),
            "steps": taken,
            "seed": settings.seed,
            "validation": measured.summary(),
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {settings.output}")


if __name__ == "__main__":
    main()
