"""The walk: same activations as the whole model, nothing changed before the last step, every fault undone, resumable to the same bits."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whatmatters.core.walk as walk_module
from whatmatters.core.data import Calibration, call_model
from whatmatters.core.errors import FileError, ModelError, NonFiniteError, ResumeError
from whatmatters.core.sites import structure
from whatmatters.core.walk import Block, walk
from whatmatters.testing.families import FAMILIES, build, inputs


def data(family: str, samples: int = 6, batch: int = 2) -> Calibration:
    return Calibration.from_tensors(inputs(family, samples=samples), batch=batch)


def shrink(block: Block) -> dict[str, Any]:
    """A visit that changes every site."""
    for site in block.sites:
        block.weight(site).mul_(0.5)
    block.extras[f"{block.name}.mark"] = torch.tensor([float(block.index)])
    return {"block": block.name}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(model: nn.Module, visit: Callable[[Block], dict[str, Any]], calibration: Calibration | None, **options: Any) -> Any:
    return walk(model, calibration, visit, structure=structure(model), settings={"test": 1}, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_see_what_they_see_in_the_whole_model(family: str) -> None:
    model, calibration = build(family), data(family)
    expected: dict[str, list[Tensor]] = {}
    names = structure(model).blocks
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, args, kwargs, n=n: expected.setdefault(n, []).append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for n in names
    ]
    with torch.no_grad():
        for ids, valid in calibration.batches():
            call_model(model, ids, valid)
    for handle in handles:
        handle.remove()

    def visit(block: Block) -> dict[str, Any]:
        for batch in block.batches():
            assert torch.allclose(batch.hidden, expected[block.name][batch.index], atol=1e-5)
        return {"batches": batch.index + 1}

    result = run(model, visit, calibration, commit=False)
    assert [row["batches"] for row in result.rows] == [len(list(calibration.batches()))] * len(result.rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spilled", [False, True])
def test_changes_reach_the_model_and_later_blocks(family: str, spilled: bool, tmp_path: Path) -> None:
    model, calibration = build(family), data(family)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for site in structure(twin).sites:
            site.view(twin).mul_(0.5)
    last = [b for b in structure(model).blocks if structure(model).in_block(b)][-1]
    inputs_of_last: list[Tensor] = []

    def visit(block: Block) -> dict[str, Any]:
        if block.name == last:
            inputs_of_last.extend(batch.hidden.clone() for batch in block.batches())
        return shrink(block)

    run(model, visit, calibration, run_dir=tmp_path / "run", spill_bytes=0 if spilled else 1 << 30)
    assert same(weights(model), weights(twin))
    seen: list[Tensor] = []
    handle = twin.get_submodule(last).register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for ids, valid in calibration.batches():
            call_model(twin, ids, valid)
    handle.remove()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(inputs_of_last, seen, strict=True))
    assert not (tmp_path / "run" / "inputs").exists()


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("fault", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_fault_in_a_visit_changes_nothing(at: int, fault: BaseException) -> None:
    model = build("llama").train()
    before, rng = weights(model), torch.random.get_rng_state()

    def visit(block: Block) -> dict[str, Any]:
        shrink(block)
        if block.index == at:
            raise fault
        return {}

    with pytest.raises(type(fault)):
        run(model, visit, data("llama"))
    assert same(weights(model), before)
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("after", range(4))
def test_a_fault_inside_the_last_step_is_undone(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying fails after some tensors: the journal puts the others back, and ties are as they were."""
    model = build("llama", tied=True)
    before = weights(model)
    original = walk_module.save_file
    calls = {"n": 0}

    def failing(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if "journal" in str(path):
            calls["n"] += 1
            if calls["n"] > after:
                raise OSError("disk full")
        original(tensors, path, **options)

    def outside() -> Any:
        yield "lm_head.weight", torch.zeros_like(model.lm_head.weight)
        yield "model.norm.weight", torch.zeros_like(model.model.norm.weight)

    monkeypatch.setattr(walk_module, "save_file", failing)
    if after == 3:
        with pytest.raises(OSError, match="disk full"):
            run(model, shrink, data("llama"), outside=outside)
    else:
        with pytest.raises(OSError, match="disk full"):
            run(model, shrink, None, outside=outside)
    assert same(weights(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_outside_parameters_are_untied_when_given() -> None:
    model = build("llama", tied=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    run(model, shrink, None, outside=lambda: iter([("lm_head.weight", embedding * 2)]))
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.lm_head.weight, embedding * 2)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stopped_run_continues_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    unbroken = build("llama", layers=3)
    expected = run(unbroken, noisy, data("llama"))
    model = build("llama", layers=3)
    visited: list[int] = []

    def visit(block: Block) -> dict[str, Any]:
        if block.index == stop and stop not in visited:
            visited.append(stop)
            raise KeyboardInterrupt
        visited.append(block.index)
        return noisy(block)

    with pytest.raises(KeyboardInterrupt):
        run(model, visit, data("llama"), run_dir=tmp_path)
    result = run(model, visit, data("llama"), run_dir=tmp_path, resume=True)
    assert visited == [*range(stop), stop, *range(stop, 3)]
    assert same(weights(model), weights(unbroken))
    assert result.rows == expected.rows
    assert same(result.extras, expected.extras)


def noisy(block: Block) -> dict[str, Any]:
    """A visit whose result depends on the inputs of the block."""
    total = sum(float(batch.hidden.double().square().sum()) for batch in block.batches())
    for site in block.sites:
        block.weight(site).mul_(1 + total % 0.01)
    block.extras[f"{block.name}.total"] = torch.tensor([total])
    return {"total": total}


@pytest.mark.parametrize("change", ["model", "data", "setting"])
def test_resuming_with_other_inputs_names_what_changed(change: str, tmp_path: Path) -> None:
    model = build("llama")

    def stop(block: Block) -> dict[str, Any]:
        if block.index == 1:
            raise KeyboardInterrupt
        return shrink(block)

    with pytest.raises(KeyboardInterrupt):
        run(model, stop, data("llama"), run_dir=tmp_path)
    other = build("llama", seed=5) if change == "model" else model
    calibration = Calibration.from_tensors(inputs("llama", seed=9), batch=2) if change == "data" else data("llama")
    settings = {"test": 2 if change == "setting" else 1}
    before = weights(other)
    with pytest.raises(ResumeError, match=change):
        walk(other, calibration, shrink, structure=structure(other), settings=settings, run_dir=tmp_path, resume=True)
    assert same(weights(other), before)


def test_a_run_folder_in_use_is_refused_without_resume(tmp_path: Path) -> None:
    model = build("llama")
    run(model, shrink, None, run_dir=tmp_path)
    with pytest.raises(FileError, match="earlier run"):
        run(model, shrink, None, run_dir=tmp_path)


def test_a_damaged_run_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResumeError, match="not a run record"):
        run(build("llama"), shrink, None, run_dir=tmp_path, resume=True)


def test_blocks_that_are_no_chain_are_refused() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) + self.layers[1](x)

    with pytest.raises(ModelError, match="do not form a chain"):
        run(Parallel(), shrink, data("sequential"))


def test_activations_and_weights_that_are_not_finite_are_named() -> None:
    model = build("sequential")

    def spoil(block: Block) -> dict[str, Any]:
        for site in block.sites:
            block.weight(site).fill_(torch.nan)
        return {}

    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        run(model, spoil, data("sequential"))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="0 gives NaN or infinity"):
        run(model, lambda block: {}, data("sequential"))


def test_blocks_that_write_into_their_input_spoil_nothing() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x += self.a(x)
            return x

    model = nn.Sequential(Residual(), Residual())
    calibration = data("sequential")
    before = calibration.inputs.clone()
    expected = [model[0](x.clone()).detach() for x, _ in calibration.batches()]
    run(model, lambda block: compared(block, expected), calibration, commit=False)
    assert torch.equal(calibration.inputs, before)


def compared(block: Block, expected: list[Tensor]) -> dict[str, Any]:
    for _ in range(2):
        for batch in block.batches():
            block.run(batch)
            if block.index == 1:
                assert torch.allclose(batch.hidden, expected[batch.index])
    return {}


def test_measuring_walks_write_nothing(tmp_path: Path) -> None:
    model = build("llama")
    before = weights(model)
    run(model, shrink, data("llama"), commit=False)
    assert same(weights(model), before)


def test_rows_and_extras_are_kept_with_the_run(tmp_path: Path) -> None:
    model = build("llama")
    result = run(model, shrink, None, run_dir=tmp_path)
    assert [row["block"] for row in result.rows] == ["model.layers.0", "model.layers.1"]
    assert [float(result.extras[f"model.layers.{i}.mark"]) for i in range(2)] == [0.0, 1.0]
    assert json.loads((tmp_path / "run.json").read_text())["setting test"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-00000.safetensors", "block-00001.safetensors", "run.json"]
