"""The embedded model and its text: what it is, which files it may be judged on, and that it predicts them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from whatmatters.core import embedded
from whatmatters.core.data import windows
from whatmatters.core.errors import DataError, FileError
from whatmatters.core.evaluate import evaluate

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_pylib_lm.py"


@pytest.fixture(scope="module")
def loaded():
    return embedded.load()


def test_it_computes_in_float32_though_stored_in_half(loaded):
    model, _ = loaded
    stored = load_file(embedded.path() / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(embedded.path()).dtype == torch.float32  # so says config.json, without us
    assert json.loads((embedded.path() / "config.json").read_text())["dtype"] == "float32"
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_770_496
    assert not model.training
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name), tensor.float())


def test_these_are_the_published_weights():
    digest = hashlib.sha256((embedded.path() / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (embedded.path() / "SOURCE.md").read_text()


def test_loading_is_quiet(loaded, capfd):
    embedded.load()
    assert capfd.readouterr() == ("", "")


def test_the_tokenizer_loses_nothing(loaded):
    _, tokenizer = loaded
    text = "def f(x):\n\treturn 'é \u4e2d \U0001f600'  # \x00\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert len(tokenizer) == 4096


def test_missing_assets_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileError, match="reinstall whatmatters"):
        embedded.path()


# ---------------------------------------------------------------- the text


def test_every_file_is_in_the_split_that_its_path_says():
    library = Path(os.__file__).resolve().parent
    seen = []
    for split, first, last in (("validation", 0, 2), ("test", 3, 5), ("train", 6, 99)):
        files = embedded.library_files(split)
        assert files == sorted(files)
        for file in files:
            name = file.relative_to(library).as_posix()
            assert first <= int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 <= last
        seen += files
        texts = embedded.documents(split)
        assert [file.read_text(encoding="utf-8") for file in files] == texts
    assert len(set(seen)) == len(seen) > 200
    contents = [file.read_bytes() for file in seen]
    assert len(set(contents)) == len(contents)  # no text is in two splits
    assert all(200 <= len(content) <= 800_000 for content in contents)
    left_out = {"site-packages", "encodings", "lib2to3", "idlelib", "turtledemo", "tkinter"}
    assert not any(left_out & set(file.relative_to(library).parts) for file in seen)


def test_all_other_files_are_left_out_for_a_reason():
    library = Path(os.__file__).resolve().parent
    taken = {file for split in ("train", "validation", "test") for file in embedded.library_files(split)}
    contents = {file.read_bytes() for file in taken}
    for file in library.rglob("*.py"):
        if file not in taken and not embedded.EXCLUDED & set(file.relative_to(library).parts):
            content = file.read_bytes()
            assert not 200 <= len(content) <= 800_000 or content in contents or not embedded._is_utf8(content), file


def test_the_library_is_the_same_inside_a_virtual_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    python = next(path for path in (tmp_path / "v" / "bin" / "python", tmp_path / "v" / "Scripts" / "python.exe") if path.exists())
    code = "import os; from pathlib import Path; print(Path(os.__file__).resolve().parent)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert all(file.is_relative_to(found) for file in embedded.library_files("test"))


@pytest.fixture
def fake_library(tmp_path, monkeypatch):
    library = tmp_path / "python3"
    library.mkdir()
    monkeypatch.setattr(embedded, "_library", lambda: library)
    embedded._splits.cache_clear()
    yield library
    embedded._splits.cache_clear()


def names_of(split):
    """File names in `split`, from a search of the hash rule."""
    ranges = {"validation": range(3), "test": range(3, 6), "train": range(6, 100)}
    for number in range(10_000):
        name = f"m{number}.py"
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 in ranges[split]:
            yield name


def test_the_rules_on_a_library_made_for_it(fake_library):
    names = names_of("test")
    good, short, long, latin, repeat = (next(names) for _ in range(5))
    first, second = sorted([good, repeat])
    (fake_library / first).write_text("a" * 200)
    (fake_library / second).write_text("a" * 200)
    (fake_library / short).write_text("b" * 199)
    (fake_library / long).write_text("c" * 800_001)
    (fake_library / latin).write_bytes(b"\xe9" * 300)
    (fake_library / "tkinter").mkdir()
    (fake_library / "tkinter" / "a.py").write_text("d" * 300)
    (fake_library / "other.txt").write_text("e" * 300)
    assert embedded.library_files("test") == [fake_library / first]
    with pytest.raises(DataError, match="no validation files"):
        embedded.library_files("validation")
    digest = embedded.split_digest("test")
    (fake_library / first).write_text("A" * 200)
    assert embedded.split_digest("test") != digest


def test_names_and_contents_make_the_digest(fake_library):
    names = names_of("test")
    first, second = next(names), next(names)
    (fake_library / first).write_text("a" * 200)
    digest = embedded.split_digest("test")
    (fake_library / first).rename(fake_library / second)
    embedded._splits.cache_clear()
    assert embedded.split_digest("test") != digest


def test_unknown_splits_are_refused():
    for read in (embedded.library_files, embedded.documents, embedded.split_digest):
        with pytest.raises(DataError, match="'dev'; expected one of train, validation, test"):
            read("dev")


def test_the_interpreter_is_named():
    name, version = embedded.interpreter().split()
    assert version.startswith(".".join(map(str, sys.version_info[:3])))
    assert name.lower() == sys.implementation.name


# ---------------------------------------------------------------- the model on the text


def test_it_predicts_files_it_has_not_seen(loaded):
    model, tokenizer = loaded
    measured = evaluate(model, windows(tokenizer, embedded.documents("test"), 256, per_document=1, limit=16))
    assert measured.loss < 3.3  # 2.4 to 2.8 on most choices of windows; an untrained one has 8.3
    assert measured.accuracy > 0.35


@pytest.mark.full
@pytest.mark.skipif(embedded.interpreter() != "CPython 3.11.7", reason="the figures are of Python 3.11.7's library")
def test_the_published_loss(loaded):
    model, tokenizer = loaded
    ids = [torch.tensor([0, *tokenizer(text, verbose=False)["input_ids"]]) for text in embedded.documents("test")]
    measured = evaluate(model, windows(None, torch.cat(ids), 512, limit=60))
    assert round(measured.loss, 3) == 2.777


@pytest.mark.full
def test_the_training_script_makes_a_model_that_loads(tmp_path):
    command = [sys.executable, SCRIPT, "--steps", "2", "--output", tmp_path / "lm"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout
    assert "validation: " in printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "lm"), AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert model.dtype == torch.float32
    assert {tensor.dtype for tensor in load_file(tmp_path / "lm" / "model.safetensors").values()} == {torch.float16}
    assert tokenizer.decode(tokenizer("x = 'é'\n")["input_ids"]) == "x = 'é'\n"
    record = json.loads((tmp_path / "lm" / "training.json").read_text())
    text = windows(tokenizer, embedded.documents("validation"), 512, per_document=4)
    assert evaluate(model, text).loss == pytest.approx(record["validation"]["loss"], rel=1e-5)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode != 0
    assert "exists already" in again.stderr
    shutil.rmtree(tmp_path / "lm")
