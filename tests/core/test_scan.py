"""Scans: measures against numpy and scipy in float64, sizes against saved files, memory in processes of their own."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from whatmatters.core import allocation
from whatmatters.core.checkpoint import load_meta, save
from whatmatters.core.errors import BudgetError, FileError, FormatError, InputError, ModelError, NonFiniteError
from whatmatters.core.scan import Needs, Scan, needs, scan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
from whatmatters.quantize.rtn import rtn
from whatmatters.testing.families import build, causal

GROUP = 16


def saved(family: str, folder: Path, shard: str | None = None, **settings: int | bool) -> Path:
    """A tiny model of a family in a folder, sharded if asked."""
    build(family, **settings).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return folder


def nearest(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Rounding to nearest over the full range with 16-bit scales, written out again."""
    grouped = weight.astype(np.float32).reshape(len(weight), -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / np.float32((2**bits - 1) / 2)
    scale = np.where(scale == 0, 1, scale).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(grouped / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(weight.shape)


def test_measures_are_those_of_numpy_and_scipy() -> None:
    model = build("llama")
    with torch.no_grad():  # an outlier, skew and a shifted mean
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = 0.7
        model.get_submodule("model.layers.0.self_attn.k_proj").weight.exp_().add_(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = scan(model, levels=(3, 8), group_size=GROUP)
    assert [row["site"] for row in result.rows] == [site.name for site in structure(model).sites]
    for row, site in zip(result.rows, structure(model).sites, strict=True):
        w = site.view(model).double().numpy()
        z = (w - w.mean()) / w.std()
        rms = np.sqrt((w**2).mean())
        assert row["max_over_rms"] == pytest.approx(np.abs(w).max() / rms, rel=1e-6)
        assert row["kurtosis"] == pytest.approx(stats.kurtosis(w, axis=None, fisher=False), rel=1e-6)
        assert row["beyond_3"] == (np.abs(z) > 3).mean()
        assert row["zd"] == (z > 1).mean()
        assert row["rms"] == pytest.approx(rms, rel=1e-6)
        for bits in (3, 8):
            error = ((nearest(w, bits, GROUP) - w) ** 2).sum() / (w**2).sum()
            assert row["rtn_error"][bits] == pytest.approx(error, rel=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_normal_site_has_the_numbers_of_the_normal_distribution() -> None:
    model = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 16))  # more than one piece
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)))
        model[2].weight.fill_(0.25)
    row, constant = scan(model, levels=(4,)).rows
    n = 1024 * 2048
    assert abs(row["zd"] - stats.norm.sf(1)) < 4 * math.sqrt(0.16 * 0.84 / n)
    assert abs(row["beyond_3"] - 2 * stats.norm.sf(3)) < 4 * math.sqrt(0.0027 / n)
    assert abs(row["kurtosis"] - 3) < 4 * math.sqrt(24 / n)
    assert (constant["zd"], constant["kurtosis"], constant["flags"]) == (0.0, 0.0, ["constant"])
    assert constant["max_over_rms"] == pytest.approx(1)
    assert "2 is constant" in scan(model, levels=(4,)).notes


@pytest.mark.parametrize("family", causal())
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_streamed_equals_in_memory(family: str, shard: str | None, tmp_path: Path) -> None:
    path = saved(family, tmp_path, shard)
    assert len(list(path.glob("*.safetensors"))) > (shard is not None)
    streamed, held = scan(path, group_size=GROUP), scan(build(family), group_size=GROUP)
    assert streamed.missing == []
    assert streamed.structure == held.structure == structure(build(family))
    assert (streamed.bytes_now, streamed.bytes_at, streamed.average_range) == (held.bytes_now, held.bytes_at, held.average_range)
    for mine, theirs in zip(streamed.rows, held.rows, strict=True):
        assert {k: v for k, v in mine.items() if not isinstance(v, float | dict)} == {
            k: v for k, v in theirs.items() if not isinstance(v, float | dict)
        }
        # experts come as separate matrices, so sums may be in another order
        assert mine["kurtosis"] == pytest.approx(theirs["kurtosis"], rel=1e-9)
        assert mine["rtn_error"] == pytest.approx(theirs["rtn_error"], rel=1e-9)
    total = sum(p.numel() * 4 for p in build(family).parameters())
    assert streamed.bytes_now == total
    assert {row["name"] for row in streamed.outside} == {row["name"] for row in held.outside if row["tied_to"] is None}


def test_names_without_the_base_prefix_are_found(tmp_path: Path) -> None:
    path = saved("gpt2", tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, path / "model.safetensors")
    assert scan(path, group_size=GROUP).missing == []


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    plain, tied = build("llama"), build("llama", tied=True)
    vocabulary = plain.get_submodule("lm_head").weight.numel() * 4
    assert scan(plain, group_size=GROUP).bytes_now - scan(tied, group_size=GROUP).bytes_now == vocabulary
    assert [row["tied_to"] for row in scan(tied, group_size=GROUP).outside if row["name"] == "lm_head.weight"] == [
        "model.embed_tokens.weight"
    ]
    assert scan(saved("llama", tmp_path, tied=True), group_size=GROUP).bytes_now == scan(tied, group_size=GROUP).bytes_now


def test_sizes_are_those_of_saved_checkpoints(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = build("llama")
        with torch.no_grad():  # ones are stored in 16 bits without loss, these are not
            for parameter in model.parameters():
                parameter.add_(1e-4 if parameter.dim() == 1 else 0)
        return model

    result = scan(made(), levels=(3, 4, 16), group_size=GROUP)
    for bits in (3, 4):
        model = made()
        rtn(model, bits=bits, group_size=GROUP)
        save(model, None, tmp_path / str(bits))
        with safe_open(tmp_path / str(bits) / "model.safetensors", framework="pt") as file:
            assert result.bytes_at[bits] == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a dict)
    sites = sum(site.size for site in result.structure.sites)
    assert result.bytes_at[16] == 2 * sites + sum(row["bytes"] for row in result.outside)


def test_the_range_is_the_allocators() -> None:
    result = scan(build("llama"), levels=(2, 3, 4), group_size=GROUP)
    low, high = result.average_range
    names = [site.name for site in result.structure.sites]
    scores = Scores("layer", {name: torch.tensor(float(i)) for i, name in enumerate(names)}, "mine", {}, structure=result.structure)
    assert set(allocation.bits(scores, low + 1e-9, (2, 3, 4), group_size=GROUP).values.values()) == {2}
    assert allocation.bits(scores, high - 1e-9, (2, 3, 4), group_size=GROUP).account["achieved"] > high - 0.5
    for outside in (low - 1e-9, high + 1e-9):
        with pytest.raises(BudgetError):
            allocation.bits(scores, outside, (2, 3, 4), group_size=GROUP)


def test_experts_that_shapes_cannot_tell_apart_are_said(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3,
        vocab_size=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    result = scan(tmp_path, group_size=GROUP)
    lost = [row["site"] for row in result.rows if not row["matched"]]
    assert len(lost) == 9
    assert lost[0] == "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert len(result.missing) == 6
    assert result.missing[0] == "model.layers.0.mlp.experts.gate_up_proj[0]"
    assert any(note.startswith("measured under their names") and lost[0] in note for note in result.notes)
    assert result.average_range[0] > 2  # sizes come from the structure and are whole


def test_needs_are_the_bounds_of_the_walk() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=100, dtype="bfloat16"
    )
    model = load_meta(config)
    got = needs(model, structure(model), samples=32, length=16)
    block = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    whole = 3 * block + 2 * (2 * 100 * 64 + 64)
    cached = 2 * 32 * 16 * 64 * 2
    activations = 8 * 16 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert got.model_bytes == whole
    assert got.peak_bytes == whole + 2 * block + cached + 4 * 128**2 * 8 + activations + 64 * 2**20
    assert got.disk_bytes == 3 * 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert got.seconds["hessian"] > got.seconds["rtn"] > 0
    # 4 GiB of inputs are kept on disk, and one micro-batch of them in memory
    large = needs(model, structure(model), samples=2**14, length=2**11)
    assert large.disk_bytes == got.disk_bytes + 2**14 * 2**11 * 64 * 2
    assert large.peak_bytes < got.peak_bytes + 2**28
    assert isinstance(got, Needs)


def test_a_token_goes_through_few_experts() -> None:
    def seconds(active: int) -> float:
        config = MixtralConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=8, num_experts_per_tok=active, vocab_size=100,
        )  # fmt: skip
        model = load_meta(config)
        return needs(model, structure(model), samples=4096, length=4096).seconds["hessian"]

    assert seconds(1) < 0.6 * seconds(8)


def test_it_says_what_a_checkpoint_cannot_hold(tmp_path: Path) -> None:
    assert any("cannot hold" in note and "expert" in note for note in scan(build("mixtral"), group_size=GROUP).notes)
    assert any("no site covers model.layers.0.mlp.gate.weight" in note for note in scan(build("mixtral"), group_size=GROUP).notes)
    assert scan(saved("llama", tmp_path), group_size=GROUP).notes == []


def test_result_can_be_shown_and_kept(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = scan(saved("llama", tmp_path), group_size=GROUP, progress=lambda label, done, total: steps.append((done, total)))
    assert steps == [(i, 14) for i in range(1, 15)]
    kept = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(kept) == set(Scan.__dataclass_fields__)
    assert kept["rows"][3]["rtn_error"]["4"] == result.rows[3]["rtn_error"][4]
    text = result.summary()
    assert "2 blocks, 14 sites" in text
    assert "rounding to 3 bits" in text
    above, below = result.plot().axes
    assert len(above.lines) == 2
    assert len(below.lines) == 4
    np.testing.assert_allclose(below.lines[1].get_ydata(), [row["rtn_error"][3] for row in result.rows])


# Bad input


def _without(path: Path, name: str) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors")


def _changed(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, path / "model.safetensors")


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 2] = torch.nan
    return tensor


SITE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: _without(path, SITE), FormatError, "not in the files, first model.layers.1.mlp.up_proj"),
        (lambda path: _without(path, "model.norm.weight"), FormatError, "first model.norm.weight"),
        (lambda path: _changed(path, SITE, _nan), NonFiniteError, "model.layers.1.mlp.up_proj holds NaN"),
        (lambda path: _changed(path, "lm_head.weight", _nan), NonFiniteError, "lm_head.weight holds NaN"),
        (lambda path: _changed(path, SITE, lambda t: t[:, :16].clone()), FormatError, r"\(64, 16\) in the file; .*\(64, 32\)"),
        (lambda path: _changed(path, SITE, lambda t: t[0].clone()), FormatError, r"\(32,\) in the file"),
        (lambda path: _changed(path, SITE, lambda t: t.to(torch.int8)), FormatError, "int8"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x10" + bytes(50)), FormatError, "not a readable safetensors"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), FormatError, "pickle"),
        (lambda path: (path / "model.safetensors").unlink(), FileError, "no weights"),
        (lambda path: (path / "config.json").unlink(), FileError, "config.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "t5"}'), ModelError, "not a causal language model"),
        (lambda path: (path / "config.json").write_text('{"model_type": "opt"}'), FormatError, "not in the files, first model.decoder"),
    ],
)
def test_bad_checkpoints(damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path) -> None:
    path = saved("llama", tmp_path)
    damage(path)
    with pytest.raises(error, match=message):
        scan(path, group_size=GROUP)


def test_missing_shard_and_nan_in_an_expert(tmp_path: Path) -> None:
    path = saved("mixtral", tmp_path / "a")
    _changed(path, "model.layers.1.block_sparse_moe.experts.2.w3.weight", _nan)
    with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp.experts.gate_up_proj\[2\] holds NaN"):
        scan(path, group_size=GROUP)
    path = saved("llama", tmp_path / "b", "20KB")
    sorted(path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FormatError, match="index"):
        scan(path, group_size=GROUP)


def test_bad_settings(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(InputError, match=r"q_proj: group size 24 does not divide the 32 inputs"):
        scan(model, group_size=24)
    for levels in ((), (1, 4), (9,)):
        with pytest.raises(InputError, match="expected widths"):
            scan(model, levels=levels, group_size=GROUP)
    with pytest.raises(FileError, match="no folder"):
        scan(tmp_path / "absent")
    rtn(model, bits=4, group_size=GROUP)
    save(model, None, tmp_path / "out")
    with pytest.raises(FormatError, match="quantized already"):
        scan(tmp_path / "out", group_size=GROUP)


# Time and memory, in processes of their own


def _python(script: str, *arguments: str) -> dict[str, float]:
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


SCAN = """
import json, sys
import torch
from whatmatters.core.scan import scan
torch.set_num_threads(1)
scan(sys.argv[1], levels=(4,))  # everything that is set up once
result = scan(sys.argv[2], levels=(4,))
print(json.dumps({"peak": result.peak_bytes, "now": result.bytes_now}))
"""


def _sharded(folder: Path, layers: int) -> Path:
    """A Llama of 10 MB a layer, a shard for each layer."""
    folder.mkdir()
    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4, vocab_size=64)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weights: dict[str, str] = {}
    for layer in range(layers):
        shapes = {n: tuple(p.shape) for n, p in load_meta(config).named_parameters() if n.startswith(f"model.layers.{layer}.")}
        if layer == 0:
            shapes |= {"model.embed_tokens.weight": (64, 512), "lm_head.weight": (64, 512), "model.norm.weight": (512,)}
        generator = torch.Generator().manual_seed(layer)
        save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, folder / f"model-{layer}.safetensors")
        weights |= dict.fromkeys(shapes, f"model-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return folder


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    warm, small, large = _sharded(tmp_path / "w", 1), _sharded(tmp_path / "s", 4), _sharded(tmp_path / "l", 16)
    few, many = _python(SCAN, str(warm), str(small)), _python(SCAN, str(warm), str(large))
    assert many["now"] > 160e6
    shard = many["now"] / 16
    # Which freed pages the allocator gives back varies by a shard or two; a scan that kept what it read would need twelve more.
    assert many["peak"] < few["peak"] + 4 * shard
    assert many["peak"] < 6 * shard


PLAN = """
import json, resource, time
start = time.perf_counter()
import torch
from transformers import LlamaConfig
from whatmatters.core import allocation
from whatmatters.core.checkpoint import load_meta
from whatmatters.core.scores import Scores
from whatmatters.core.sites import structure
model = load_meta(LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    dtype="bfloat16",
))
found = structure(model)
generator = torch.Generator().manual_seed(0)
values = {site.name: torch.rand((), generator=generator) for site in found.sites}
scores = Scores("layer", values, "synthetic", {}, structure=found)
levels = (2, 3, 4, 8)
ranked = allocation.bits(scores, 3.5, levels)
best = allocation.bits(allocation.loss_from_rank(scores, levels), 3.5, levels, how="optimum")
result = {
    "sites": len(found.sites), "ties": len(found.ties), "weights": sum(site.size for site in found.sites),
    "seconds": time.perf_counter() - start, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}
for name, plan in (("rank", ranked), ("optimum", best)):
    result[name] = [plan.account["used"], plan.account["unused"], plan.account["smallest_step"], plan.values["model.layers.0.mlp.up_proj"]]
    result[name + "_values"] = dict(plan.values)
print(json.dumps(result))
"""


def test_plan_for_70b_on_the_meta_device() -> None:
    got = _python(PLAN)
    # Llama-3-70B: 80 blocks of q, o (8192 x 8192), k, v (1024 x 8192), gate, up, down (28672 x 8192)
    weights = 80 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert (got["sites"], got["ties"], got["weights"]) == (80 * 7, 80 * 2, weights)
    assert got["seconds"] < 60
    assert got["bytes"] < 2e9
    shapes = {"q_proj": (8192, 8192), "o_proj": (8192, 8192), "k_proj": (1024, 8192), "v_proj": (1024, 8192)}
    for how in ("rank", "optimum"):
        used, unused, step, _ = got[how]  # type: ignore[misc]
        total = 0
        values: dict[str, int] = got[f"{how}_values"]  # type: ignore[assignment]
        for name, bits in values.items():
            rows, columns = shapes.get(name.rpartition(".")[2], (28672, 8192))
            total += rows * columns * bits + 16 * rows * columns // 128 + 128  # codes, scales, the entry that tells the shape
        assert total == used
        assert used + unused == math.floor(3.5 * weights)
        assert 0 <= unused < step


def test_a_head_under_an_old_name_is_found_and_nothing_else_is_guessed(tmp_path: Path) -> None:
    """The checkpoint names its head otherwise than the model does; a second stranger of that shape makes it a guess, which is refused."""
    file = saved("gpt-neox", tmp_path) / "model.safetensors"
    result = scan(tmp_path, group_size=GROUP)
    assert any("embed_out.weight of the file is taken for lm_head.weight" in note for note in result.notes)
    assert {row["name"]: row["tied_to"] for row in result.outside}["lm_head.weight"] is None
    tensors = load_file(file)
    save_file(tensors | {"stranger.weight": tensors["embed_out.weight"].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"first lm_head\.weight"):
        scan(tmp_path, group_size=GROUP)
    save_file(tensors | {"stranger.weight": torch.ones(3, 5)}, file, metadata={"format": "pt"})
    assert any("stranger.weight of the file is no parameter" in note for note in scan(tmp_path, group_size=GROUP).notes)
