"""Offload: what accelerate keeps on the CPU or on disk ends with the bits of the model in memory, and with its hooks as they were."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import whatmatters as wm
from whatmatters.core.data import Calibration, call_model
from whatmatters.core.errors import ModelError
from whatmatters.core.offload import borrowed, execution_device, is_offloaded, release
from whatmatters.core.sites import structure
from whatmatters.testing.families import build, inputs


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, folder / "offload")


def parts(model: nn.Module) -> dict[str, str]:
    """The first block stays, the others and the head go to disk."""
    first, *rest = structure(model).blocks
    stack, _, _ = first.rpartition(".")
    outside = [name for name, _ in model.get_submodule(stack.rpartition(".")[0]).named_children()]
    base = stack.rpartition(".")[0]
    others = {f"{base}.{name}": "cpu" for name in outside if f"{base}.{name}" != stack}
    return {**others, first: "cpu", **dict.fromkeys(rest, "disk"), "lm_head": "cpu"}


def in_parts(model: nn.Module, folder: Path) -> nn.Module:
    return dispatch_model(model, parts(model), offload_dir=folder / "offload")


def read_from_disk(model: nn.Module, folder: Path) -> nn.Module:
    placed = {**parts(model), **dict.fromkeys(structure(model).blocks, "disk")}
    model.save_pretrained(folder / "checkpoint")
    return AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", device_map=placed, offload_folder=folder / "offload", dtype=torch.float32
    )


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": on_cpu,
    "disk": on_disk,
    "parts": in_parts,
    "checkpoint": read_from_disk,
}

ACTIONS: dict[str, Callable[[nn.Module, Calibration], object]] = {
    "gptq": lambda model, text: wm.quantize.gptq(model, text, bits=3, group_size=16),
    "rsq": lambda model, text: wm.quantize.rsq(model, text, bits=3, group_size=16),
    "rtn": lambda model, text: wm.quantize.rtn(model, bits=4, group_size=16),
    "wanda": lambda model, text: wm.prune.wanda(model, text, sparsity=0.5),
    "sparsegpt": lambda model, text: wm.prune.sparsegpt(model, text, sparsity=0.5),
}


def data(samples: int = 4) -> Calibration:
    return Calibration.from_tensors(inputs("llama", samples=samples), batch=2)


def state(model: nn.Module) -> dict[str, Tensor]:
    with borrowed(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(model: nn.Module) -> list[tuple[object, ...]]:
    """Everything accelerate put there, by identity, and the devices of all tensors."""
    own = ("_hf_hook", "_old_forward", "forward")
    found = [(name, *(module.__dict__.get(key) for key in own), len(module._forward_hooks)) for name, module in model.named_modules()]
    return [*found, *((name, str(p.device), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False))]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return call_model(model, inputs("llama", samples=2)).logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_ends_with_the_bits_of_one_in_memory(way: str, action: str, tied: bool, tmp_path: Path) -> None:
    here = build("llama", tied=tied)
    away = WAYS[way](build("llama", tied=tied), tmp_path)
    assert is_offloaded(away)
    before = hooks(away)
    assert torch.equal(logits(here), logits(away))
    ACTIONS[action](here, data())
    ACTIONS[action](away, data())
    assert hooks(away) == before
    assert same(state(here), state(away))
    assert torch.equal(logits(here), logits(away))
    assert here.config.tie_word_embeddings == away.config.tie_word_embeddings
    for model, name in ((here, "here"), (away, "away")):
        wm.save(model, None, tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("here", "away")]
    assert same(*files)
    assert hooks(away) == before


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("way", ["cpu", "disk", "parts"])
def test_other_families(family: str, way: str, tmp_path: Path) -> None:
    here, away = build(family), WAYS[way](build(family), tmp_path)
    for model in (here, away):
        wm.quantize.gptq(model, data(), bits=3, group_size=16, allow_uncovered=True)
    assert same(state(here), state(away))
    assert torch.equal(logits(here), logits(away))


@pytest.mark.parametrize("way", WAYS)
def test_scores_and_measurements_are_those_of_the_model_in_memory(way: str, tmp_path: Path) -> None:
    here, away = build("llama"), WAYS[way](build("llama"), tmp_path)
    before = hooks(away), state(away)
    scorers: tuple[Callable[..., Any], ...] = (wm.score.layer_shift, wm.score.activation, wm.score.gradient, wm.score.magnitude)
    for scorer in scorers:
        values = [scorer(model, data()).values for model in (here, away)]
        assert same(*values)
    assert structure(here) == structure(away)
    assert wm.evaluate(here, data()).perplexity == wm.evaluate(away, data()).perplexity
    assert hooks(away) == before[0]
    assert same(before[1], state(away))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_fault_leaves_weights_and_hooks_as_they_were(way: str, fault: BaseException, tmp_path: Path) -> None:
    away = WAYS[way](build("llama"), tmp_path)
    before = hooks(away), state(away)

    def progress(label: str, done: int, total: int) -> None:
        if done == 1:
            raise fault

    with pytest.raises(type(fault)):
        wm.quantize.gptq(away, data(), bits=3, group_size=16, progress=progress)
    assert hooks(away) == before[0]
    assert same(before[1], state(away))
    assert execution_device() is None


def test_the_checkpoint_itself_is_never_written_to(tmp_path: Path) -> None:
    model = read_from_disk(build("llama"), tmp_path)
    files = sorted((tmp_path / "checkpoint").iterdir())
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    wm.quantize.gptq(model, data(), bits=3, group_size=16)
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == before


def test_what_cannot_be_written_to_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny = build("llama")
    tiny.save_pretrained(tmp_path / "checkpoint")
    placed = {**parts(tiny), **dict.fromkeys(structure(tiny).blocks, "disk")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", device_map=placed, dtype=torch.float32)
    before = hooks(model)
    with pytest.raises(ModelError, match="never written to; load the model with offload_folder="):
        wm.quantize.gptq(model, data(), bits=3, group_size=16)
    assert hooks(model) == before

    frozen = cpu_offload(build("llama"))
    for module in frozen.modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            hook.weights_map.dataset = (("a", 1),)
    with pytest.raises(ModelError, match="weights map is tuple; expected one of accelerate"):
        wm.quantize.rtn(frozen, bits=4, group_size=16)

    lost = cpu_offload(build("llama"))
    lost.model.norm.weight = nn.Parameter(torch.empty(32, device="meta"))
    lost.model.norm.__dict__.pop("_hf_hook")
    with pytest.raises(ModelError, match=r"norm\.weight is on the meta device"):
        wm.quantize.rtn(lost, bits=4, group_size=16)


def test_what_is_put_in_place_of_a_parameter_is_kept(tmp_path: Path) -> None:
    for number, way in enumerate((on_cpu, on_disk)):
        model = way(build("llama"), tmp_path / str(number))
        with borrowed(model):
            model.model.norm.weight = nn.Parameter(torch.full((32,), 2.0))
            wider = nn.Parameter(torch.ones(80, 32))
            model.lm_head.weight = wider
            release()
            assert execution_device() == torch.device("cpu")
        after = state(model)
        assert after["model.norm.weight"].tolist() == [2.0] * 32
        assert torch.equal(after["lm_head.weight"], wider)
        assert logits(model).shape[-1] == 80


def test_offloaded_buffers_come_too(tmp_path: Path) -> None:
    def stack() -> nn.Module:
        draw = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)).eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        return model

    here, away = stack(), disk_offload(stack(), tmp_path / "offload", offload_buffers=True)
    text = Calibration.from_tensors(inputs("sequential"), batch=16)
    for model in (here, away):
        wm.quantize.gptq(model, text, bits=3, group_size=-1)
    assert same(state(here), state(away))


LARGE = """
import json, sys
from pathlib import Path
import torch
from accelerate import disk_offload, init_empty_weights
from accelerate.utils import offload_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=32, num_attention_heads=8, vocab_size=64)
folder = Path(sys.argv[2])
if sys.argv[1] == "make":
    torch.manual_seed(0)
    offload_state_dict(folder, LlamaForCausalLM(config).state_dict())
    raise SystemExit

import whatmatters as wm
from whatmatters.core.data import Calibration

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

with init_empty_weights():
    model = LlamaForCausalLM(config)
disk_offload(model.eval(), folder, execution_device="cpu")
text = Calibration.from_tensors(torch.arange(256).reshape(8, 32) % 64, batch=2)
wm.quantize.gptq  # what is imported counts as there before
before = peak()
wm.quantize.gptq(model, text, bits=4, clip_search=False)
after = peak()
print(json.dumps({"size": sum(p.numel() * 4 for p in model.parameters()), "before": before, "after": after}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_model_on_disk_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(wm.__file__).parents[1])}
    for job in ("make", "quantize"):
        command = [sys.executable, "-c", LARGE, job, str(tmp_path / "offload")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["size"] > 200e6
    assert told["after"] - told["before"] < told["size"] * 0.6, told
