"""Round trips through plain transformers, files that appear whole or not at all, and inputs that must be refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from whatmatters.core.checkpoint import (
    atomic_file,
    atomic_folder,
    check_output,
    check_savable,
    load,
    load_meta,
    save,
    stream_tensors,
)
from whatmatters.core.errors import FileError, FormatError, InputError, ModelError, WhatMattersError
from whatmatters.core.formats import QuantizedWeight, attach, attached, dequantize, round_scale

LLAMA = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": lambda **more: LlamaConfig(**LLAMA, **more),
    "qwen3": lambda **more: Qwen3Config(**LLAMA, head_dim=16, **more),
    "gpt2": lambda **more: GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, **more),
    "mixtral": lambda **more: MixtralConfig(**LLAMA, num_local_experts=4, **more),
}


def build(family: str, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[family](**more), dtype=dtype).eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(60).reshape(3, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits


def rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> QuantizedWeight:
    """Round to nearest, written here so that the quantizers of the library are not needed."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = weight.float().unflatten(1, (1, -1) if group_size == -1 else (-1, group_size))
    if symmetric:
        scale = round_scale(x.abs().amax(-1) / ((high - low) / 2), weight.dtype)
        zero_point, shift = None, 0.0
    else:
        bottom, top = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = round_scale((top - bottom) / (high - low), weight.dtype)
        zero_point = (low - bottom / scale.float()).round().clamp(low, high).to(torch.int8)
        shift = zero_point.float()[..., None]
    codes = (x / scale.float()[..., None] + shift).round().clamp(low, high).flatten(1).to(torch.int8)
    return QuantizedWeight(codes, scale, zero_point, bits, group_size)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def quantize(model: nn.Module, bits: Callable[[int], int], group_size: int, symmetric: bool) -> dict[str, QuantizedWeight]:
    records = {}
    for position, (name, linear) in enumerate(block_linears(model).items()):
        if bits(position) < 16:
            records[name] = rtn(linear.weight.detach(), bits(position), group_size, symmetric)
            with torch.no_grad():
                linear.weight.copy_(dequantize(records[name], linear.weight.dtype))
    attach(model, records)
    return records


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 96)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# Round trips


def assert_reloads(model: nn.Module, folder: Path) -> nn.Module:
    """The stock loader alone gives the same logits, to the bit."""
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert again.dtype == model.dtype
    assert torch.equal(logits(again), logits(model))
    return again


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_models_reload_bit_equal(tmp_path: Path, family: str, symmetric: bool, group_size: int, bits: int) -> None:
    model = build(family)
    quantize(model, lambda _: bits, group_size, symmetric)
    saved = save(model, None, tmp_path / "out")
    assert saved.format == "compressed-tensors"
    assert_reloads(model, saved.path)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_odd_widths_reload_too(tmp_path: Path, bits: int) -> None:
    model = build("llama")
    quantize(model, lambda _: bits, 16, True)
    assert_reloads(model, save(model, None, tmp_path / "out").path)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("levels", [(3, 4, 16), (2, 3, 4, 8), (4, 16)])
def test_mixed_bits_in_one_checkpoint_reload_bit_equal(tmp_path: Path, family: str, levels: tuple[int, ...]) -> None:
    model = build(family)
    records = quantize(model, lambda position: levels[position % len(levels)], 32, True)
    assert len({r.bits for r in records.values()}) == len([b for b in levels if b < 16])
    saved = save(model, tokenizer(), tmp_path / "out")
    assert_reloads(model, saved.path)


def test_asymmetric_beside_dense_sites_reloads(tmp_path: Path) -> None:
    model = build("llama")
    quantize(model, lambda position: (4, 16)[position % 2], 32, False)
    again = assert_reloads(model, save(model, None, tmp_path / "out").path)
    assert all(type(m) is nn.Linear for m in block_linears(again).values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_reload_bit_equal(tmp_path: Path, symmetric: bool, dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    quantize(model, lambda _: 4, 32, symmetric)
    again = assert_reloads(model, save(model, None, tmp_path / "out").path)
    for name, linear in block_linears(model).items():
        assert torch.equal(again.get_submodule(name).weight, linear.weight)


def test_tiny_weights_and_empty_groups_reload_bit_equal(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        linears = list(block_linears(model).values())
        linears[0].weight[:, :32] = 0
        linears[1].weight.mul_(1e-6)
        linears[2].weight[3] = 0
    records = quantize(model, lambda _: 4, 32, True)
    assert {r.scale.dtype for r in records.values()} == {torch.float16, torch.bfloat16}
    assert float(linears[0].weight.detach()[:, :32].abs().max()) == 0
    assert float(linears[1].weight.detach().abs().max()) > 0
    assert_reloads(model, save(model, None, tmp_path / "out").path)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bits", [3, 16])
def test_tied_embeddings_stay_tied(tmp_path: Path, tie: bool, bits: int) -> None:
    model = build("llama", tie_word_embeddings=tie)
    quantize(model, lambda _: bits, 32, True)
    again = assert_reloads(model, save(model, None, tmp_path / "out").path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tie
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tie


def test_linears_with_bias_reload(tmp_path: Path) -> None:
    model = build("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.bias.normal_(generator=torch.Generator().manual_seed(0))
    quantize(model, lambda _: 4, 32, True)
    assert_reloads(model, save(model, None, tmp_path / "out").path)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_dense_models_reload_bit_equal(tmp_path: Path, family: str) -> None:
    model = build(family)
    saved = save(model, None, tmp_path / "out")
    assert saved.format == "dense"
    assert_reloads(model, saved.path)


def test_a_pruned_pattern_survives(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for linear in block_linears(model).values():
            groups = linear.weight.unflatten(1, (-1, 4))
            groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0.0)
    again = assert_reloads(model, save(model, None, tmp_path / "out").path)
    for linear in block_linears(again).values():
        assert bool(((linear.weight.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all())


def test_a_model_of_a_16_bit_file_is_stored_in_16_bits_and_loads_as_float32(tmp_path: Path) -> None:
    half = build("llama", torch.float16)
    model = build("llama")
    model.load_state_dict(half.state_dict())
    saved = save(model, tokenizer(), tmp_path / "out")
    tensors = load_file(saved.path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert json.loads((saved.path / "config.json").read_text())["dtype"] == "float32"
    again, _ = load(saved.path)
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def test_dense_format_on_request_keeps_the_quantized_values(tmp_path: Path) -> None:
    model = build("llama")
    quantize(model, lambda _: 4, 32, True)
    saved = save(model, None, tmp_path / "out", format="dense")
    assert saved.format == "dense"
    assert "quantization_config" not in json.loads((saved.path / "config.json").read_text())
    assert_reloads(model, saved.path)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_size_of_the_sites_is_what_stored_bits_says(tmp_path: Path, symmetric: bool) -> None:
    model = build("llama", torch.bfloat16)
    levels = (3, 4, 8, 16) if symmetric else (3, 16)
    records = quantize(model, lambda position: levels[position % len(levels)], 32, symmetric)
    saved = save(model, None, tmp_path / "out")
    planned = {n: records[n].stored_bits if n in records else 16 * m.weight.numel() for n, m in block_linears(model).items()}
    written = dict.fromkeys(planned, 0)
    with safe_open(saved.path / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            site = name.rpartition(".")[0]
            if site in written:
                tensor = file.get_tensor(name)
                written[site] += 8 * tensor.numel() * tensor.element_size()
    assert written == planned
    assert saved.weight_bytes == (saved.path / "model.safetensors").stat().st_size
    assert saved.bytes == sum(p.stat().st_size for p in saved.path.iterdir())


def test_tokenizer_and_generation_settings_are_kept(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.max_new_tokens = 7
    quantize(model, lambda _: 4, 32, True)
    save(model, tokenizer(), tmp_path / "out")
    again, words = load(tmp_path / "out")
    assert again.generation_config.max_new_tokens == 7
    assert words("w3 w5 nothing")["input_ids"] == [3, 5, 0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_load_turns_a_quantized_checkpoint_into_plain_modules(tmp_path: Path, symmetric: bool) -> None:
    model = build("llama")
    quantize(model, lambda position: (3, 4)[position % 2] if symmetric else 4, 32, symmetric)
    save(model, tokenizer(), tmp_path / "out")
    plain, _ = load(tmp_path / "out")
    assert set(plain.state_dict()) == set(model.state_dict())
    assert not plain.training
    assert not plain._forward_pre_hooks
    assert all(type(m) is nn.Linear and "forward" not in vars(m) for m in block_linears(plain).values())
    assert all(p.is_floating_point() for p in plain.parameters())
    assert torch.equal(logits(plain), logits(model))
    assert attached(plain) == {}
    save(plain, tokenizer(), tmp_path / "again")
    assert_reloads(model, tmp_path / "again")


def test_a_sharded_checkpoint_loads_and_streams(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    tokenizer().save_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "out")[0]), logits(model))
    streamed = dict(stream_tensors(tmp_path / "out"))
    assert set(streamed) == set(model.state_dict())
    assert all(torch.equal(streamed[name], tensor) for name, tensor in model.state_dict().items())


def test_load_takes_a_dtype(tmp_path: Path) -> None:
    save(build("llama"), tokenizer(), tmp_path / "out")
    assert load(tmp_path / "out", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_large_model_costs_nothing_on_the_meta_device(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                         vocab_size=128256)  # fmt: skip
    model = load_meta(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == 70_553_706_496
    FAMILIES["llama"](architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    small = load_meta(tmp_path)
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in build("llama").named_parameters()}
    check_savable(small, dict.fromkeys(block_linears(small), 4), group_size=32)


# Refusals


def test_save_refuses_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for model, levels, group_size, message in (
        (build("gpt2"), {"transformer.h.0.attn.c_attn": 4}, 32, "c_attn is a Conv1D"),
        (build("mixtral"), {"model.layers.0.mlp.experts.gate_up_proj[1]": 4}, 32, "slice of a larger parameter"),
        (build("mixtral"), {"model.layers.0.self_attn.q_proj": 4}, 32, "3-D parameter"),
        (build("llama"), {"model.layers.0.self_attn.q_proj": 4}, 48, "group size 48 does not divide"),
        (build("llama", tie_word_embeddings=True), {"lm_head": 4}, 32, "shared with model.embed_tokens"),
        (nn.Sequential(nn.Linear(8, 8)), {}, -1, "not a transformers model"),
    ):
        with pytest.raises(FormatError, match=message):
            check_savable(model, levels, group_size=group_size)
        if levels:
            check_savable(model, levels, group_size=group_size, format="dense")
    with pytest.raises(FormatError, match="no site is quantized"):
        check_savable(build("llama"), {"model.layers.0.self_attn.q_proj": 16}, format="compressed-tensors")
    with pytest.raises(InputError, match="unknown format"):
        save(build("llama"), None, out, format="gguf")
    with pytest.raises(FormatError, match="not a transformers model"):
        save(nn.Sequential(nn.Linear(8, 8)), None, out)
    with pytest.raises(FormatError, match="no site is quantized"):
        save(build("llama"), None, out, format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_changed_after_quantization_is_not_saved(tmp_path: Path) -> None:
    model = build("llama")
    quantize(model, lambda _: 4, 32, True)
    name, linear = list(block_linears(model).items())[3]
    with torch.no_grad():
        linear.weight[0, 0] += 0.5
    with pytest.raises(FormatError, match=f"{name} was changed"):
        save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    save(model, None, tmp_path / "out", format="dense")


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match="exists already"):
        save(build("llama"), None, out)
    assert (out / "mine.txt").read_text() == "mine"
    save(build("llama"), None, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    save(build("llama"), tokenizer(), folder)
    return folder


def damaged(good: Path, to: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(good, to)
    change(to)
    return to


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def _to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _index(content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileError, "no config.json"),
        (lambda f: (f / "config.json").write_text("{not json"), FormatError, "not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), FormatError, "model_type"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), FormatError, "not JSON"),
        (_edit_config(model_type="no-such-family"), ModelError, "cannot read this configuration"),
        (_edit_config(hidden_size="wide"), ModelError, "hidden_size"),
        (_edit_config(architectures=["LlamaForSequenceClassification"]), ModelError, "not a causal language model"),
        (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), FormatError, "quantized already"),
        (_edit_config(hidden_size=32), ModelError, "cannot load"),
        (_to_pickle, FormatError, "only safetensors are read"),
        (lambda f: (f / "model.safetensors").unlink(), FileError, "no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!"), FormatError, "not a readable safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), FormatError, "not a readable safetensors"),
        (_drop_a_tensor, ModelError, "model.norm.weight"),
        (_no_tokenizer, FileError, "no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), FileError, "tokenizer"),
        (_index({"weight_map": {"a": "../../etc/model.safetensors"}}), FormatError, "lie in"),
        (_index({"weight_map": {"a": "/etc/passwd"}}), FormatError, "lie in"),
        (_index({"weight_map": {"a": "missing.safetensors"}}), FormatError, "lie in"),
        (_index({"weight_map": {"a": ["model.safetensors"]}}), FormatError, "no index"),
        (_index({"weight_map": {"a": 3}}), FormatError, "lie in"),
        (_index({"weights": {}}), FormatError, "no index"),
        (_index("nonsense"), FormatError, "no index"),
        (_index("[" * 100_000), FormatError, "no index"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(good: Path, tmp_path: Path, change, kind: type[WhatMattersError], message: str) -> None:
    folder = damaged(good, tmp_path / "bad", change)
    with pytest.raises(kind, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["no/such/folder", "./nothing", "/nothing/here", "nothing/", "~/no-such-folder", "a b", "", "x" * 200])
def test_a_path_that_is_not_there_never_reaches_the_network(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    for read in (load, load_meta, lambda p: list(stream_tensors(p))):
        with pytest.raises(FileError, match="folder"):
            read(text)


def test_an_unknown_hub_id_says_so() -> None:
    for read in (load, load_meta, lambda p: list(stream_tensors(p))):
        with pytest.raises(FileError, match="nobody/nothing"):
            read("nobody/nothing")


def test_a_file_is_not_a_folder(good: Path) -> None:
    with pytest.raises(FileError, match="is a file"):
        load(good / "model.safetensors")


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        for read in (load, load_meta):
            with pytest.raises(ModelError, match="not a causal language model"):
                read(tmp_path / name)
    with pytest.raises(ModelError, match="not a causal language model"):
        load_meta(T5Config())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SafetensorError("bad offsets"), FormatError),
        (OSError("no file named model.safetensors"), FormatError),
        (ImportError("x"), ModelError),
    ],
)
def test_what_the_loader_raises_becomes_an_error_of_ours(
    good: Path, error: Exception, kind: type[WhatMattersError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(kind, match=str(error)):
        load(good)


def test_a_configuration_that_cannot_be_built_is_refused() -> None:
    config = FAMILIES["llama"]()
    config.hidden_act = "no-such-activation"
    with pytest.raises(ModelError, match="cannot build"):
        load_meta(config)


def test_code_in_a_checkpoint_is_not_run(good: Path, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
        _edit_config(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})(folder)

    with pytest.raises(ModelError, match="trust_remote_code"):
        load(damaged(good, tmp_path / "bad", plant))
    assert not (tmp_path / "ran").exists()


# Files that appear whole or not at all


class Fault(OSError):
    """A failure planted by a test."""


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> list[int]:
    """Make the `number`-th call of `os.name` fail; the list counts the calls."""
    real, calls = getattr(os, name), [0]

    def patched(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            raise Fault(5, "planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, patched)
    return calls


def write_file(target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text("new")


def write_folder(target: Path) -> None:
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.txt").write_text("new")
        (temporary / "a.txt").write_text("new")


def content(target: Path) -> object:
    if target.is_dir():
        return {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    return target.read_text() if target.exists() else None


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failure_at_any_step_leaves_the_old_or_the_new(tmp_path: Path, write, existing: bool, call: str) -> None:
    finished = False
    for number in range(1, 30):
        folder = tmp_path / str(number)
        folder.mkdir()
        target = folder / "out"
        new: object = "new" if write is write_file else {"a.txt": "new", "sub/b.txt": "new"}
        old: object = None
        if existing:
            old = "old" if write is write_file else {"old.txt": "old"}
            if write is write_file:
                target.write_text("old")
            else:
                target.mkdir()
                (target / "old.txt").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, call, number)
            try:
                write(target)
            except (Fault, FileError):
                assert calls[0] >= number
        assert content(target) in (old, new)
        left = {p.name for p in folder.iterdir()} - {"out"}
        # Only deleting the replaced folder may fail quietly: the new one is in its place already.
        assert not left or (call == "open" and content(target) == new and all(name.endswith(".old") for name in left))
        if calls[0] < number:
            assert content(target) == new
            finished = True
            break
    assert finished
    assert number > 1


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_inside_is_passed_on_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    for context in (atomic_file, atomic_folder):

        def half(context=context) -> None:
            with context(tmp_path / "out") as temporary:
                (temporary if context is atomic_file else temporary / "x").write_text("half")
                raise error

        with pytest.raises(type(error)):
            half()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write", "replace"])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_process_killed_in_between_leaves_the_target_absent(tmp_path: Path, write, step: str) -> None:
    target = tmp_path / "out"
    child = os.fork()
    if child == 0:  # os._exit ends the process without any clean-up, as a kill does
        die = lambda *_, **__: os._exit(9)  # noqa: E731
        if step == "replace":
            os.replace = die
        else:
            os.fsync = die
        write(target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not target.exists()
    write(target)
    assert content(target) == ("new" if write is write_file else {"a.txt": "new", "sub/b.txt": "new"})


def test_atomic_outputs_refuse(tmp_path: Path) -> None:
    existing = tmp_path / "there"
    existing.write_text("old")
    for context in (atomic_file, atomic_folder):
        with pytest.raises(FileError, match="exists already"), context(existing, overwrite=False):
            pytest.fail("the work began")
        with pytest.raises(FileError, match="is not a folder"), context(existing / "below"):
            pytest.fail("the work began")
    with pytest.raises(FileError, match="is a folder"), atomic_file(tmp_path):
        pytest.fail("the work began")
    with pytest.raises(FileError, match="is a file or a link"), atomic_folder(existing, overwrite=True):
        pytest.fail("the work began")
    with pytest.raises(FileError, match="nothing was written"), atomic_file(tmp_path / "new") as temporary:
        temporary.unlink()
    for name in ("", "..", "a\0b"):
        with pytest.raises(FileError, match="does not name an output"):
            check_output(name)
    assert existing.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def folder() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("theirs")

    def file() -> None:
        with atomic_file(tmp_path / "f", overwrite=False) as temporary:
            temporary.write_text("new")
            (tmp_path / "f").write_text("theirs")

    for write in (folder, file):
        with pytest.raises(FileError, match="came into being"):
            write()
    assert content(tmp_path / "out") == {"theirs": "theirs"}
    assert content(tmp_path / "f") == "theirs"


def test_an_unwritable_place_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for context in (atomic_file, atomic_folder):
        with pytest.raises(FileError, match="not writable \\(Permission denied\\)"), context(tmp_path / "new" / "out"):
            pytest.fail("the work began")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = build("llama")
    quantize(model, lambda _: 4, 32, True)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(FileError, match="No space left"):
        save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_new_output_has_ordinary_permissions(tmp_path: Path) -> None:
    write_file(tmp_path / "file")
    write_folder(tmp_path / "folder")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").touch()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
