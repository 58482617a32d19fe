"""Plans in the files of other tools: what each file says, read back by an independent reading of the tool's own rules."""

import json
import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core import allocation
from whatmatters.core.checkpoint import save
from whatmatters.core.errors import FileError, FormatError, InputError, InputTypeError, UnknownNameError
from whatmatters.core.formats import stored_bits, vllm_can_serve
from whatmatters.core.plans import Plan
from whatmatters.core.scores import Scores
from whatmatters.core.sites import Structure, structure
from whatmatters.interop import TOOLS, tool
from whatmatters.quantize.rtn import rtn
from whatmatters.testing.families import build

GROUP = 16
WIDE = {"hidden": 256, "intermediate": 512}  # llama.cpp's blocks of 256


def found(family: str = "llama", **settings: int | bool) -> Structure:
    return structure(build(family, **settings))


def plan_of(model: Structure, bits: Callable[[str], int], *, group_size: int = GROUP, symmetric: bool = True) -> Plan:
    return Plan(
        "bits", {site.name: bits(site.name) for site in model.sites}, {"average_bits": 4}, {"achieved": 4.0}, "mine",
        {"group_size": group_size, "symmetric": symmetric}, model,
    )  # fmt: skip


def tied_bits(model: Structure, levels: list[int], seed: int = 0) -> Callable[[str], int]:
    """Random levels that respect the ties."""
    generator = np.random.default_rng(seed)
    chosen = {name: int(generator.choice(levels)) for group in model.groups() for name in group}
    for group in model.groups():
        chosen |= dict.fromkeys(group, chosen[group[0]])
    return chosen.__getitem__


def written(name: str, plan: Plan, folder: Path) -> str:
    return tool(name).write(plan, folder / tool(name).file).read_text()


# llama.cpp


def types_of(text: str, tensors: list[str]) -> dict[str, str | None]:
    """What llama-quantize makes of the file: words split at the first "=", patterns lower-cased and searched, the first that is found."""
    rules = [(word.partition("=")[0].lower(), word.partition("=")[2]) for word in text.split()]
    return {t: next((kind for pattern, kind in rules if re.search(pattern, t)), None) for t in tensors}


LLAMA_TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def test_llama_cpp_gives_every_tensor_the_type_of_its_site(tmp_path: Path) -> None:
    model = found(layers=12, **WIDE)  # 12 blocks: the pattern of block 1 must not find block 11
    plan = plan_of(model, tied_bits(model, [2, 3, 4, 5, 6, 8, 16]))
    kinds = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0", 16: "F16"}
    expected: dict[str, str | None] = {
        f"blk.{layer}.{tensor}.weight": kinds[plan.values[f"model.layers.{layer}.{site}"]]  # type: ignore[index]
        for layer in range(12)
        for site, tensor in LLAMA_TENSORS.items()
    }
    others = ["token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.11.ffn_norm.weight"]
    got = types_of(written("llama.cpp", plan, tmp_path), [*expected, *others])
    assert got == expected | dict.fromkeys(others)


def test_llama_cpp_puts_fused_experts_in_all_their_tensors(tmp_path: Path) -> None:
    model = found("mixtral")
    plan = plan_of(model, lambda name: 8)  # blocks of 32 go into the tiny shapes
    got = types_of(written("llama.cpp", plan, tmp_path), [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "gate_up", "down")])
    assert set(got.values()) == {"Q8_0"}
    uneven = plan_of(model, lambda name: 16 if name.endswith("gate_up_proj[2]") else 8)
    with pytest.raises(FormatError, match=r"gate_up_proj\[0\].*different bits \[8, 16\]"):
        tool("llama.cpp").check(uneven)


def test_llama_cpp_names_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    for family, arch in (("llama", "LLAMA"), ("qwen3", "QWEN3"), ("gpt2", "GPT2")):
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 2)
        for site in found(family).sites:
            from whatmatters.interop.llama_cpp import tensor_names

            assert tensor_names(site) == (names.get_name(f"{site.name}.weight", try_suffixes=(".weight",)),)


def test_llama_cpp_bits_are_those_of_its_blocks() -> None:
    # the table of tools/quantize/quantize.cpp (get_ftype), bits a weight
    table = {2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625, 8: 8.5, 16: 16}
    cost = tool("llama.cpp").cost()
    assert cost is not None
    assert {level: cost((64, 512), level) / (64 * 512) for level in table} == table


def test_llama_cpp_refuses_what_would_become_another_type() -> None:
    model = found()  # 32 inputs: k-quants pack 256
    with pytest.raises(FormatError, match=r"q_proj.*packs 256 inputs"):
        tool("llama.cpp").check(plan_of(model, lambda name: 4))
    tool("llama.cpp").check(plan_of(model, lambda name: 8))
    with pytest.raises(FormatError, match="left as it is"):
        tool("llama.cpp").check(plan_of(model, lambda name: 16))


def test_llama_cpp_refuses_names_it_cannot_map() -> None:
    model = structure(build("sequential"))
    with pytest.raises(FormatError, match="0 has no known tensor"):
        tool("llama.cpp").check(plan_of(model, lambda name: 16 if name != "0" else 8))


@pytest.mark.parametrize("average", [2.7, 3.5, 4.5, 6.1])
def test_averages_mean_bits_of_the_tool(average: float, tmp_path: Path) -> None:
    model = found(layers=3, **WIDE)
    scores = Scores("layer", {site.name: torch.tensor(float(i % 5)) for i, site in enumerate(model.sites)}, "mine", {}, structure=model)
    it = tool("llama.cpp")
    plan = allocation.bits(scores, average, it.levels, cost=it.cost(), structure=it.structure(model))
    bits = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 272}  # bytes for 256 weights
    sizes = {f"blk.{s.block.split('.')[-1]}.{LLAMA_TENSORS[s.name.split('.', 3)[-1]]}.weight": s.size for s in model.sites}
    got = types_of(written("llama.cpp", plan, tmp_path), list(sizes))
    used = sum(sizes[name] // 256 * bits[kind] * 8 for name, kind in got.items() if kind)
    assert used <= average * sum(sizes.values())
    assert used == plan.account["used"]


# GPTQModel


def dynamic_get(dynamic: dict[str, dict[str, int]], name: str) -> dict[str, int] | bool | None:
    """GPTQModel's rule: negative keys first, then in order; anchored at the start; the first match decides."""
    for key in sorted(dynamic, key=lambda key: not key.startswith("-")):
        if re.match(key[2:], name):
            return False if key.startswith("-:") else dynamic[key]
    return None


def test_gptqmodel_gives_every_module_its_bits(tmp_path: Path) -> None:
    model = found(layers=12)
    plan = plan_of(model, tied_bits(model, [2, 3, 4, 8, 16], seed=3))
    settings = json.loads(written("gptqmodel", plan, tmp_path))
    assert set(settings) == {"bits", "group_size", "sym", "dynamic"}
    assert settings["sym"] is True
    assert settings["bits"] in (2, 3, 4, 8)
    for name, bits in plan.values.items():
        assert dynamic_get(settings["dynamic"], name) == (False if bits == 16 else {"bits": bits, "group_size": GROUP})
    assert dynamic_get(settings["dynamic"], "lm_head") is None
    assert dynamic_get(settings["dynamic"], "model.layers.0.self_attn.q_proj_extra") is None


@given(rows=st.integers(1, 70), groups=st.integers(1, 5), size=st.sampled_from([16, 32]), bits=st.sampled_from([2, 3, 4, 8]))
def test_gptqmodel_bits_are_those_of_its_buffers(rows: int, groups: int, size: int, bits: int) -> None:
    columns = groups * size
    buffers = [  # as its GroupedQuantLinear registers them
        np.zeros((math.ceil(columns * bits / 32), rows), np.int32),
        np.zeros((groups, math.ceil(rows * bits / 32)), np.int32),
        np.zeros((groups, rows), np.float16),
        np.zeros(columns, np.int32),
    ]
    cost = tool("gptqmodel").cost(group_size=size)
    assert cost is not None
    assert cost((rows, columns), bits) == 8 * sum(b.nbytes for b in buffers)


def test_gptqmodel_refuses_experts_and_odd_widths() -> None:
    with pytest.raises(FormatError, match=r"experts.*slice"):
        tool("gptqmodel").check(plan_of(found("mixtral"), lambda name: 4))
    with pytest.raises(FormatError, match="5 bits, it takes 2, 3, 4, 8"):
        tool("gptqmodel").check(plan_of(found(), lambda name: 5))
    with pytest.raises(FormatError, match="nothing to quantize"):
        tool("gptqmodel").check(plan_of(found(), lambda name: 16))


# compressed-tensors: transformers, vLLM, llm-compressor


@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_checkpoint_carries_this_very_entry(symmetric: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build("llama")
    levels = [3, 4, 16] if symmetric else [4, 16]
    plan = plan_of(structure(model), tied_bits(structure(model), levels, seed=1), symmetric=symmetric)
    entry = json.loads(written("transformers", plan, tmp_path))
    rtn(model, bits=plan, group_size=GROUP, symmetric=symmetric)
    save(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == entry
    ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(reloaded, model(ids).logits, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), group_size=st.sampled_from([-1, 16, 32]))
def test_vllm_refuses_exactly_what_its_format_rules_do(data: st.DataObject, group_size: int) -> None:
    model = _LLAMA
    values = {site.name: data.draw(st.sampled_from([3, 4, 4, 4, 8, 16])) for site in model.sites}
    if data.draw(st.booleans()):
        values |= {name: values[group[0]] for group in model.ties for name in group}
    plan = plan_of(model, values.__getitem__, group_size=group_size)
    refused = vllm_can_serve(values, group_size=group_size, ties=model.ties)
    if refused:
        with pytest.raises(FormatError, match="vllm cannot load"):
            tool("vllm").check(plan)
    else:
        tool("vllm").check(plan)


_LLAMA = found()


def test_compressed_tensors_refuses_what_it_cannot_hold() -> None:
    for name in ("transformers", "llm-compressor"):
        with pytest.raises(FormatError, match="expert"):
            tool(name).check(plan_of(found("mixtral"), lambda site: 4))
        with pytest.raises(FormatError, match="Conv1D"):
            tool(name).check(plan_of(found("gpt2"), lambda site: 4))
        with pytest.raises(FormatError, match="3-D parameter"):
            tool(name).check(plan_of(found("mixtral"), lambda site: 16 if "[" in site else 4))
    mixed = plan_of(found(), lambda name: 3 if "mlp" in name else 4, symmetric=False)
    with pytest.raises(FormatError, match="asymmetric sites of different kinds"):
        tool("transformers").check(mixed)


def test_recipe_says_the_plan(tmp_path: Path) -> None:
    plan = plan_of(_LLAMA, tied_bits(_LLAMA, [2, 4, 8, 16], seed=2), group_size=-1)
    stage = yaml.safe_load(written("llm-compressor", plan, tmp_path))["quantization_stage"]["quantization_modifiers"]
    assert list(stage) == ["GPTQModifier"]
    got = {}
    for group in stage["GPTQModifier"]["config_groups"].values():
        assert group["weights"]["strategy"] == "channel"
        assert group["weights"]["symmetric"] is True
        got |= dict.fromkeys(group["targets"], group["weights"]["num_bits"])
    assert got == {name: bits for name, bits in plan.values.items() if bits != 16}


RUN = """
import json, sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from compressed_tensors.utils import match_named_modules
from transformers import AutoModelForCausalLM
recipe, model, out = sys.argv[1:]
modifier = Recipe.create_instance(recipe).modifiers[0]
found = {}
for group in modifier.resolve_quantization_config().config_groups.values():
    for name, _ in match_named_modules(AutoModelForCausalLM.from_pretrained(model), group.targets, modifier.ignore):
        found[name] = group.weights.num_bits
ids = [[(7 * i + 3 * j * j) % 60 + 1 for j in range(32)] for i in range(16)]
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 16})
oneshot(model=model, dataset=data, max_seq_length=32, num_calibration_samples=16, output_dir=out, recipe=recipe)
print("RESULT" + json.dumps([type(modifier).__name__, found]))
"""


def test_llm_compressor_runs_the_recipe(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    python = os.environ.get("WHATMATTERS_LLMCOMPRESSOR_PYTHON")
    if not python:
        pytest.skip("no environment with llm-compressor: set WHATMATTERS_LLMCOMPRESSOR_PYTHON to its interpreter")
    model = build("llama")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    save(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0"), tmp_path / "model")
    plan = plan_of(structure(model), tied_bits(structure(model), [2, 3, 4, 5, 6, 7, 8, 16], seed=2))
    assert len(set(plan.values.values())) >= 6
    recipe = tool("llm-compressor").write(plan, tmp_path / "recipe.yaml")
    run = subprocess.run(
        [python, "-c", RUN, str(recipe), str(tmp_path / "model"), str(tmp_path / "out")], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kind, matched = json.loads(run.stdout.rpartition("RESULT")[2])
    expected = {name: bits for name, bits in plan.values.items() if bits != 16}
    assert (kind, matched) == ("GPTQModifier", expected)
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        reloaded(torch.ones(1, 4, dtype=torch.long))  # decompresses
    for site in structure(model).sites:
        weight = site.view(reloaded)
        bits = expected.get(site.name, 16)
        points = max(len(torch.unique(group)) for group in weight.reshape(-1, GROUP))
        assert 2 ** (min(bits, 4) - 1) < points <= 2**bits, site.name


# All tools


@pytest.mark.parametrize("name", [t.name for t in TOOLS])
def test_every_tool_takes_the_plan_made_for_it(name: str, tmp_path: Path) -> None:
    it = tool(name)
    model = found(layers=3, **WIDE)
    scores = Scores("layer", {site.name: torch.tensor(float(i % 7)) for i, site in enumerate(model.sites)}, "mine", {}, structure=model)
    plan = allocation.bits(scores, 6.0, it.levels, cost=it.cost(group_size=128), structure=it.structure(model), group_size=128)
    assert len(set(plan.values.values())) > 1
    path = it.write(plan, tmp_path / it.file)
    assert path.read_text() == it.text(plan)
    assert Plan.load(_saved(plan, tmp_path)).values == plan.values  # a plan that was saved and loaded gives the same file
    assert it.text(Plan.load(tmp_path / "plan.json")) == path.read_text()
    with pytest.raises(FileError, match="exists already"):
        it.write(plan, path)
    it.write(plan, path, overwrite=True)
    assert it.proof


def _saved(plan: Plan, folder: Path) -> Path:
    plan.save(folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.parametrize("name", [t.name for t in TOOLS])
def test_bad_plans_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    it = tool(name)
    site = _LLAMA.sites[0]
    mask = Plan("mask", {site.name: torch.ones(site.shape, dtype=torch.bool)}, {}, {}, "mine")
    lacking = Plan("bits", {site.name: 4}, {}, {}, "mine", {"group_size": GROUP}, _LLAMA)
    shapeless = Plan("bits", {site.name: 4}, {}, {}, "mine", {"group_size": GROUP})
    seven = plan_of(_LLAMA, lambda name: 7 if it.levels == (4, 8) or 7 not in it.levels else 1)
    undivided = plan_of(_LLAMA, lambda name: 4, group_size=24)
    for plan, error in (
        (mask, InputTypeError), (shapeless, InputError), (lacking, FormatError), (seven, FormatError), (undivided, FormatError),
    ):  # fmt: skip
        with pytest.raises(error):
            it.write(plan, tmp_path / it.file)
    assert list(tmp_path.iterdir()) == []


def test_ties_are_those_the_tool_needs() -> None:
    mixed = plan_of(_LLAMA, lambda name: 8 if name.endswith("k_proj") else 4, group_size=32)
    with pytest.raises(FormatError, match=r"q_proj.*k_proj.*different bits \[4, 8\]"):
        tool("vllm").check(mixed)
    for name in ("gptqmodel", "transformers", "llm-compressor"):
        tool(name).check(mixed)
        assert tool(name).structure(_LLAMA).ties == ()
    experts = found("mixtral")
    assert all("[" in name for group in tool("llama.cpp").structure(experts).ties for name in group)
    assert len(tool("llama.cpp").structure(experts).ties) == 4


def test_unknown_tools_list_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"'ollama'; known: llama\.cpp, gptqmodel, llm-compressor, vllm, transformers"):
        tool("ollama")


def test_errors_tell_three_problems_and_count_the_rest() -> None:
    with pytest.raises(FormatError, match="and 11 more"):
        tool("vllm").check(plan_of(_LLAMA, lambda name: 3, group_size=32))


def test_cost_of_compressed_tensors_is_the_stored_count() -> None:
    assert tool("vllm").cost() is None
    assert stored_bits((64, 128), 4, group_size=128, symmetric=True) == 64 * 128 * 4 + 16 * 64 + 128
