"""LISA against AdamW itself, enumeration over all draws, and a real Trainer."""

import copy
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whatmatters.core.errors import InputError, ModelError
from whatmatters.core.scores import Scores
from whatmatters.testing.families import build, inputs
from whatmatters.tune import LISA, layer_weight_norms


class Tower(nn.Module):
    """An input layer, four middle layers, an output layer."""

    def __init__(self, layers: int = 4, width: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Linear(5, width, dtype=dtype)
            self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers))
            self.head = nn.Linear(width, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 5, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, lisa: LISA | None = None, start: int = 0) -> None:
    for step in range(start, start + steps):
        if lisa is not None:
            lisa.before_step(step)
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_all_layers_at_a_time_is_full_tuning_bit_for_bit() -> None:
    full, ours = Tower(), Tower()
    train(full, adamw(full), 50)
    optimizer = adamw(ours)
    with LISA(n_active=4, interval=7, state="keep").attach(ours, optimizer) as lisa:
        train(ours, optimizer, 50, lisa)
    assert equal(full, ours)


def test_no_layer_is_training_the_ends_alone() -> None:
    by_hand, ours = Tower(), Tower()
    for layer in by_hand.layers:
        layer.requires_grad_(False)
    train(by_hand, torch.optim.AdamW([p for p in by_hand.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1), 20)
    optimizer = adamw(ours)
    with LISA(n_active=0).attach(ours, optimizer) as lisa:
        train(ours, optimizer, 20, lisa)
    assert equal(by_hand, ours)


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_between_switches_only_active_layers_and_ends_change(state: str) -> None:
    model = Tower()
    optimizer = adamw(model)
    with LISA(n_active=2, interval=3, state=state, seed=1).attach(model, optimizer) as lisa:
        for period in range(5):
            before = weights(model)
            train(model, optimizer, 3, lisa, start=3 * period)
            expected = {f"layers.{i}.{kind}" for i in lisa.active_layers for kind in ("weight", "bias")}
            assert changed(before, model) == expected | {f"{end}.{kind}" for end in ("embed", "head") for kind in ("weight", "bias")}
            assert all(p.grad is None for i in range(4) if i not in lisa.active_layers for p in model.layers[i].parameters())
    assert [step for step, _ in lisa.history] == [0, 3, 6, 9, 12]
    assert all(p.requires_grad for p in model.parameters())


def test_dropped_state_is_of_active_layers_only_and_starts_anew() -> None:
    model = Tower()
    optimizer = adamw(model)
    lisa = LISA(n_active=1, interval=5, seed=3).attach(model, optimizer)
    for period in range(6):
        train(model, optimizer, 1, lisa, start=5 * period)
        (active,) = lisa.active_layers
        held = {id(p) for p in optimizer.state}
        ends = [*model.embed.parameters(), *model.head.parameters()]
        assert held == {id(p) for p in [*ends, *model.layers[active].parameters()]}
        moments = sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
        numbers = sum(p.numel() for p in [*ends, *model.layers[active].parameters()])
        assert moments == 8 * numbers
        assert lisa.memory()["optimizer_state"] == moments + 4 * len(optimizer.state)  # and a float32 count of steps each
        if period and lisa.history[-1][1] != lisa.history[-2][1]:
            assert float(optimizer.state[model.layers[active].weight]["step"]) == 1.0
        train(model, optimizer, 4, lisa, start=5 * period + 1)
    assert lisa.memory()["gradients"] == 0
    kept, other = Tower(), None
    other = adamw(kept)
    with LISA(n_active=1, interval=1, state="keep", seed=3).attach(kept, other) as lisa:
        train(kept, other, 40, lisa)
        assert lisa.memory()["optimizer_state"] == sum(8 * p.numel() + 4 for p in kept.parameters())


def test_first_step_of_a_new_layer_is_as_long_as_the_learning_rate() -> None:
    model = Tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with LISA(n_active=1, interval=1, seed=0).attach(model, optimizer) as lisa:
        for step in range(6):
            before = weights(model)
            train(model, optimizer, 1, lisa, start=step)
            if step == 0 or lisa.history[step][1] != lisa.history[step - 1][1]:
                (active,) = lisa.active_layers
                moved = (model.layers[active].weight - before[f"layers.{active}.weight"]).abs()
                assert torch.allclose(moved, torch.full_like(moved, 1e-3), rtol=1e-2)


def test_draws_have_their_frequencies_alone_and_in_pairs() -> None:
    lisa = LISA(n_active=2).attach(model := Tower(layers=5), adamw(model))
    draws = [lisa.drawn(period) for period in range(10_000)]
    assert all(len(set(d)) == 2 for d in draws)
    singles = Counter(i for d in draws for i in d)
    pairs = Counter(draws)
    assert all(abs(singles[i] / 1e4 - 0.4) < 0.015 for i in range(5))
    assert all(abs(pairs[pair] / 1e4 - 0.1) < 0.015 for pair in itertools.combinations(range(5), 2))


def test_weights_and_scores_set_the_frequencies() -> None:
    model = Tower()
    scores = Scores("layer", {f"layers.{i}": torch.tensor(v) for i, v in enumerate([1.0, 1.0, 2.0, 4.0])}, "given", {})
    one, other = LISA(n_active=1, weights=scores), LISA(n_active=1, weights=(1.0, 1.0, 2.0, 4.0))
    for lisa in (one, other):
        lisa.attach(model, adamw(model))
    draws = [one.drawn(period) for period in range(4000)]
    assert draws == [other.drawn(period) for period in range(4000)]
    counted = Counter(d[0] for d in draws)
    assert all(abs(counted[i] / 4000 - p) < 0.03 for i, p in enumerate((0.125, 0.125, 0.25, 0.5)))


def test_unbiased_step_of_sgd_is_full_tuning_on_average_over_all_draws() -> None:
    start = Tower(dtype=torch.float64)
    x, y = batch(0, torch.float64)

    def stepped(chosen: tuple[int, ...] | None) -> dict[str, Tensor]:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        lisa = LISA(n_active=2, unbiased=True).attach(model, optimizer) if chosen is not None else None
        if lisa is not None:
            lisa.drawn = lambda period: chosen
            lisa.before_step(0)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return weights(model)

    full = stepped(None)
    draws = [stepped(chosen) for chosen in itertools.combinations(range(4), 2)]
    for name, value in full.items():
        assert torch.allclose(sum(d[name] for d in draws) / len(draws), value, atol=1e-12)
    assert not torch.allclose(draws[0]["layers.0.weight"], full["layers.0.weight"])


def test_resumed_loop_is_an_unbroken_one(tmp_path: Path) -> None:
    whole = Tower()
    optimizer = adamw(whole)
    with LISA(n_active=2, interval=4).attach(whole, optimizer) as lisa:
        train(whole, optimizer, 22, lisa)
    first = Tower()
    optimizer = adamw(first)
    with LISA(n_active=2, interval=4).attach(first, optimizer) as lisa:
        train(first, optimizer, 10, lisa)
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    second = Tower()
    optimizer = adamw(second)
    saved = torch.load(tmp_path / "state", weights_only=True)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with LISA(n_active=2, interval=4).attach(second, optimizer) as lisa:
        train(second, optimizer, 12, lisa, start=10)
    assert equal(whole, second)
    assert not equal(first, second)


def trainer(folder: Path, callback: LISA, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    ids = inputs("llama", samples=24, length=10)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_steps=4, logging_steps=100, seed=0, disable_tqdm=True, **{"max_steps": 10, **more},
    )  # fmt: skip
    return Trainer(build("llama", layers=4), arguments, train_dataset=data, callbacks=[callback])


def test_inside_a_real_trainer_and_resumed_by_it(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        whole = trainer(tmp_path / "a", lisa := LISA(n_active=1, interval=3))
        whole.train()
        assert [step for step, _ in lisa.history] == [0, 3, 6, 9]  # optimizer steps, not micro-batches
        assert all(p.requires_grad for p in whole.model.parameters())
        resumed = trainer(tmp_path / "b", LISA(n_active=1, interval=3))
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert equal(whole.model, resumed.model)
    plain = build("llama", layers=4)
    assert changed(weights(plain), whole.model) >= {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    drawn = {i for _, chosen in lisa.history for i in chosen}
    untouched = {i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" not in changed(weights(plain), whole.model)}
    assert untouched == set(range(4)) - drawn


def test_parameters_frozen_by_the_user_stay_frozen() -> None:
    model = Tower()
    model.layers[1].bias.requires_grad_(False)
    model.embed.bias.requires_grad_(False)
    optimizer = adamw(model)
    with LISA(n_active=4, interval=1).attach(model, optimizer) as lisa:
        train(model, optimizer, 2, lisa)
        assert not model.layers[1].bias.requires_grad
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embed.bias", "layers.1.bias"]


def test_always_names_what_trains_outside_the_layers() -> None:
    model = Tower()
    before = weights(model)
    optimizer = adamw(model)
    with LISA(n_active=0, always=("head",)).attach(model, optimizer) as lisa:
        train(model, optimizer, 2, lisa)
    assert changed(before, model) == {"head.weight", "head.bias"}


def test_tied_ends_stay_one_tensor() -> None:
    model = build("llama", tied=True)
    optimizer = adamw(model)
    ids = inputs("llama")
    with LISA(n_active=1).attach(model, optimizer) as lisa:
        lisa.before_step(0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert lisa.history[0][0] == 0


@pytest.mark.parametrize("kind", ["l2", "mean_abs"])
def test_norms_of_layers(kind: str) -> None:
    model = build("llama")
    found = layer_weight_norms(model, kind=kind)
    assert list(found) == ["embedding", "model.layers.0", "model.layers.1", "head"]
    flat = torch.cat([p.flatten() for p in model.model.layers[1].parameters()]).double()
    expected = math.sqrt(float((flat**2).sum())) if kind == "l2" else float(flat.abs().mean())
    assert found["model.layers.1"] == pytest.approx(expected, rel=1e-5)


def test_refusals() -> None:
    model = Tower()
    for bad in ({"n_active": -1}, {"interval": 0}, {"state": "forget"}, {"weights": (1.0, -1.0)}):
        with pytest.raises(InputError):
            LISA(**bad)
    for bad, message in (
        ({"n_active": 5}, "the model has 4"), ({"weights": (1.0, 1.0)}, "2 weights for 4"), ({"layers": ("absent",)}, "'absent'"),
        ({"n_active": 2, "weights": (1.0, 0.0, 0.0, 0.0)}, "1 layers have a weight above 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            LISA(**bad).attach(model, adamw(model))
    with pytest.raises(InputError, match="unit 'weight'"):
        LISA(weights=Scores("weight", {"a": torch.ones(2, 2)}, "given", {}))
    with pytest.raises(InputError, match="lack layers"):
        LISA(weights=Scores("layer", {"a": torch.tensor(1.0)}, "given", {})).attach(model, adamw(model))
    with pytest.raises(ModelError, match="does not hold"):
        LISA().attach(model, torch.optim.AdamW(model.head.parameters()))
    with pytest.raises(ModelError, match="call attach"):
        LISA().before_step(0)
    with pytest.raises(ModelError, match="call attach"):
        LISA().memory()
    model.layers[2].requires_grad_(False)
    with pytest.raises(ModelError, match=r"layers\.2"):
        LISA().attach(model, adamw(model))
    with pytest.raises(InputError, match="kind"):
        layer_weight_norms(model, kind="max")
