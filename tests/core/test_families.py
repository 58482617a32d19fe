"""Every family of the table: score, plan, quantize, prune, save, reload; what families forced the core to ask of a module."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import whatmatters
from whatmatters.core.catalog import scorers
from whatmatters.core.checkpoint import save
from whatmatters.core.data import Calibration, call_model, logits
from whatmatters.core.errors import FormatError, ModelError
from whatmatters.core.evaluate import evaluate
from whatmatters.core.sites import structure
from whatmatters.core.walk import Block, walk
from whatmatters.testing.families import FAMILIES, build, calibration, inputs, reloadable
from whatmatters.testing.support import HEAD, demonstrate, row

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "families.md"
TABLE = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in PAGE.read_text().splitlines() if line.startswith("|")]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_plan_quantize_prune_save_reload(family: str, tmp_path: Path) -> None:
    support = demonstrate(family, tmp_path)
    found, levels = support.found, support.plan.values
    sizes = {site.name: site.size for site in found.sites}
    assert levels.keys() == sizes.keys()
    assert 3 < sum(int(levels[name]) * size for name, size in sizes.items()) / sum(sizes.values()) <= 3.5
    assert all(len({levels[name] for name in group}) == 1 for group in found.ties)
    assert list(support.runs) == ["rtn", "gptq", "wanda"]
    for name, run in support.runs.items():
        assert {r["site"] for r in run.report.rows} == sizes.keys()
        assert run.changed > 1e-3  # what is read back is not the model of before
        assert run.difference <= 1e-4
        if name == "wanda":
            assert all(r["sparsity"] == 0.5 for r in run.report.rows)
        else:
            assert {r["site"]: r["bits"] for r in run.report.rows} == levels
        if FAMILIES[family].loader is None:
            assert run.format == "none"
            assert "no checkpoint that loads by itself" in run.refusal
        else:
            assert run.format == ("dense" if run.refusal or name == "wanda" else "compressed-tensors")
            check_files(run.path, sizes if run.format == "compressed-tensors" else {})
    assert row(support) in TABLE, "scripts/family_page.py writes the table anew"


def check_files(path: Path, packed: dict[str, int]) -> None:
    """A packed checkpoint packs every site and keeps no dense copy; a dense one has nothing packed."""
    with safe_open(path / "model.safetensors", "pt") as file:
        kinds = [name.rpartition(".")[2] for name in file.keys()]  # noqa: SIM118  (not a dict)
    assert kinds.count("weight_packed") == kinds.count("weight_scale") == len(packed)
    config = json.loads((path / "config.json").read_text())
    targets = [t for g in config.get("quantization_config", {"config_groups": {}})["config_groups"].values() for t in g["targets"]]
    assert sorted(targets) == sorted(packed)


def test_the_page_has_a_row_for_each_family_and_no_other() -> None:
    assert TABLE[0] == HEAD
    assert [cells[0] for cells in TABLE[2:]] == list(FAMILIES)


def test_no_family_is_named_in_the_code() -> None:
    """Neither classes nor `model_type`s of the table appear in what finds, captures, walks, scores, changes or saves."""
    configs = [build(family).config for family in reloadable()]
    stems = "|".join(sorted({type(config).__name__.removesuffix("Config").rstrip("0123456789") for config in configs}))
    assert "Llama" in stems
    assert "ViT" in stems
    named, types = re.compile(rf"(?<![A-Za-z])({stems})"), {config.model_type for config in configs}
    source = Path(whatmatters.__file__).parent
    for path in [p for room in ("core", "kernels", "score", "prune", "quantize") for p in (source / room).glob("*.py")]:
        for text in words_of(ast.parse(path.read_text())):
            assert not named.search(text), f"{path.name} names a family: {text[:80]}"
            assert text not in types, f"{path.name} names a family: {text}"


def words_of(tree: ast.Module) -> list[str]:
    """Identifiers and strings of a file, docstrings left out."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.append(node.value)
        words += [value for key in ("id", "attr", "name", "arg") if isinstance(value := getattr(node, key, None), str)]
    return words


# ---- the walk: every block is given what the model gives it


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_a_walk_do_what_they_do_in_the_model(family: str) -> None:
    """Outputs of every block on padded samples, at every position that is no padding."""
    model, data = build(family), calibration(family, padded=True, batch=2)
    found = structure(model)
    whole: dict[str, list[Tensor]] = {name: [] for name in found.blocks}

    def keep(name: str) -> Any:
        return lambda module, args, output: whole[name].append(output if isinstance(output, Tensor) else output[0])

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in found.blocks]
    with torch.no_grad():
        for ids, valid in data.batches():
            call_model(model, ids, valid)
    for handle in handles:
        handle.remove()

    def visit(block: Block) -> dict[str, Any]:
        for batch in block.batches():
            mine, theirs = block.run(batch), whole[block.name][batch.index]
            if batch.valid is not None:
                mine, theirs = mine[batch.valid], theirs[batch.valid]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        return {}

    result = walk(model, data, visit, structure=found, settings={}, commit=False)
    assert len(result.rows) == sum(1 for name in found.blocks if found.in_block(name))


class Masked(nn.Module):
    """A block whose mask comes by position, as encoders of transformers pass it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *rest: Tensor) -> Tensor:
        return self.linear(x) * (1.0 if mask is None else mask) + sum(rest, torch.zeros(()))


class Stack(nn.Module):
    """Calls its blocks with a mask by position, or with more than their `forward` names."""

    def __init__(self, unnamed: bool = False, by_name: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Masked(), Masked()])
        self.unnamed, self.by_name = unnamed, by_name

    def forward(self, x: Tensor) -> Tensor:
        mask = (x.sum(-1, keepdim=True) > 0).float()
        for block in self.blocks:
            x = block(x=x, mask=mask) if self.by_name else block(x, mask, mask) if self.unnamed else block(x, mask)
        return x


@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_by_position_reach_the_block(by_name: bool) -> None:
    model, x = Stack(by_name=by_name), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    last: list[Tensor] = []

    def visit(block: Block) -> dict[str, Any]:
        last[:] = [block.run(batch) for batch in block.batches()]
        assert all(batch.arguments.keys() == {"mask"} for batch in block.batches())
        return {}

    walk(model, Calibration.from_tensors(x), visit, structure=structure(model), settings={}, commit=False)
    assert torch.allclose(last[0], model(x))


def test_arguments_without_a_name_are_refused() -> None:
    model = Stack(unnamed=True)
    with pytest.raises(ModelError, match="Masked is called with 3 arguments that its forward does not name"):
        walk(model, Calibration.from_tensors(torch.ones(2, 4)), lambda block: {}, structure=structure(model), settings={}, commit=False)


# ---- structure


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_needs_no_weights(family: str) -> None:
    with torch.device("meta"):
        model = build(family)
    assert structure(model) == structure(build(family))


def test_a_model_that_does_not_say_what_it_takes_needs_an_example() -> None:
    model = build("vit")
    ties = structure(model).ties
    assert len(ties) == 2
    model.config.image_size = [8, 8]  # height and width
    assert structure(model).ties == ties
    model.main_input_name = "spectrum"
    assert structure(model).ties == ()
    assert structure(model, inputs("vit", samples=1)).ties == ties


def test_a_table_of_one_slice_is_no_stack_of_matrices() -> None:
    """Positions (1, n, d) are added, not multiplied with: they are reported, not quantized."""

    class Positions(nn.Module):
        def __init__(self, slices: int) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(4, 4), nn.Parameter(torch.zeros(slices, 3, 4))

    assert structure(nn.Sequential(Positions(1))).uncovered == ("0.table",)
    assert [site.name for site in structure(nn.Sequential(Positions(2))).sites] == ["0.table[0]", "0.table[1]", "0.linear"]


# ---- what is refused


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.causal and family.given == "tokens"])
def test_a_model_that_fills_in_masks_has_no_loss_of_the_next_token(family: str) -> None:
    model, data = build(family), calibration(family)
    with pytest.raises(ModelError, match=r"does not predict the next token|expected logits"):
        logits(model, data.inputs)
    with pytest.raises(ModelError):
        evaluate(model, data)
    with pytest.raises(ModelError):
        next(s for s in scorers("layer", "ahead") if s.slug == "ablation").function(model, data)


def test_what_has_no_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no checkpoint that loads by itself"):
        save(build("sequential"), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("whole", reloadable())
def test_the_body_without_its_head_reloads_too(whole: str, tmp_path: Path) -> None:
    """Names lose their first part when `AutoModel` reads a checkpoint with a head; what is saved then must reload all the same."""
    save(build(whole), None, tmp_path / "whole")
    model = transformers.AutoModel.from_pretrained(tmp_path / "whole").eval()
    save(model, None, tmp_path / "body")
    again = transformers.AutoModel.from_pretrained(tmp_path / "body").eval()
    with torch.no_grad():
        assert torch.equal(call_model(model, inputs(whole))[0], call_model(again, inputs(whole))[0])
