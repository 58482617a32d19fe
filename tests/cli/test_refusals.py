"""Bad input: our message, exit code 1 or 2, no traceback, and nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

GROUP = ("--group-size", "16")


def quantize(model: object, text: object, *more: object) -> tuple[object, ...]:
    """A quantization that would work with a good model, a good text and nothing more; what is given twice counts the second time."""
    return ("quantize", model, "--method", "gptq", *GROUP, "--samples", "4", "--length", "16", "--text", text, "-o", "out", *more)


def bert(folder: Path) -> Path:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def pickled(folder: Path) -> Path:
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def with_nan(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def broken_config(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def cut_short(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def changed(alter: Callable[[Path], Path]) -> Callable[[Path, Path], Path]:
    """A copy of the good model with one thing wrong."""

    def made(tiny: Path, work: Path) -> Path:
        shutil.copytree(tiny, work / "model")
        return alter(work / "model")

    return made


MODELS = {
    "no such path": (lambda tiny, work: work / "none", "no folder"),
    "a file": (lambda tiny, work: tiny / "config.json", "is a file"),
    "an empty folder": (lambda tiny, work: (work / "empty").mkdir() or work / "empty", "has no config.json"),
    "not a causal model": (lambda tiny, work: bert(work / "bert"), "not a causal language model"),
    "a pickle only": (changed(pickled), "pickle"),
    "NaN in a weight": (changed(with_nan), "model.layers.1.mlp.up_proj"),
    "a broken config": (changed(broken_config), "is not JSON"),
    "a file cut short": (changed(cut_short), "safetensors"),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["quantize", "prune", "evaluate", "score", "audit", "scan"])
def test_models_that_cannot_be_used(run, work, tiny, text, listing, case, command):
    make, message = MODELS[case]
    model = make(tiny, work)
    before = listing(work)
    windows = ("--samples", "4", "--length", "16")
    line = {
        "quantize": quantize(model, text, "--bits", "3"),
        "prune": ("prune", model, "--sparsity", "0.5", "--method", "wanda", "--text", text, *windows, "-o", "out"),
        "evaluate": ("evaluate", model, "--text", text, *windows),
        "score": ("score", model, "--scorer", "layer-shift", "--text", text, *windows, "-o", "scores"),
        "audit": ("audit", model, "--text", text, *windows, "-o", "found"),
        "scan": ("scan", model, *GROUP),
    }[command]
    result = run(*line, code=1)
    assert result.stderr.strip().splitlines()[-1].startswith("error: "), result.output
    assert message in result.stderr
    assert "unexpected" not in result.stderr
    assert listing(work) == before


def file_of(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(work: Path) -> Path:
        (work / name).write_bytes(content)
        return work / name

    return make


TEXTS = {
    "no such file": (lambda work: work / "none.txt", "no such file"),
    "a folder": (lambda work: work, "is a folder"),
    "empty": (file_of("empty.txt", b""), "holds no text"),
    "blank": (file_of("blank.txt", b" \n\n "), "holds no text"),
    "binary": (file_of("binary.txt", bytes(range(256)) * 50), "binary file"),
    "zero bytes": (file_of("zero.txt", b"w1 w2\0w3"), "binary file"),
    "another kind": (file_of("text.pdf", b"w1 w2"), ".txt, .jsonl or .parquet"),
    "shorter than a window": (file_of("short.txt", b"w1 w2 w3 w4"), "window"),
    "malformed lines": (file_of("bad.jsonl", b'{"text": "w1"}\n{"te'), "line 2"),
    "no parquet": (file_of("bad.parquet", b"PAR1 but not really"), "parquet"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_cannot_be_used(run, work, tiny, listing, case):
    make, message = TEXTS[case]
    text = make(work)
    before = listing(work)
    windows = ("--samples", "4", "--length", "16")
    for line in (
        quantize(tiny, text, "--bits", "3"),
        ("prune", tiny, "--sparsity", "0.5", "--text", text, *windows, "-o", "out"),
        ("score", tiny, "--scorer", "layer-shift", "--text", text, *windows, "-o", "scores"),
        ("audit", tiny, "--text", text, *windows, "-o", "found"),
    ):
        result = run(*line, code=1)
        assert result.stderr.startswith("error: "), result.output
        assert message in result.stderr
        assert "unexpected" not in result.stderr
        assert listing(work) == before


OPTIONS = {
    "bits too low": (("--bits", "1"), 1, "expected one of 2, 3"),
    "bits too high": (("--bits", "9"), 1, "expected one of 2, 3"),
    "bits no number": (("--bits", "three"), 2, "valid integer"),
    "nothing said": ((), 2, "exactly one"),
    "two things said": (("--bits", "3", "--average-bits", "3.5"), 2, "exactly one"),
    "average above the levels": (("--average-bits", "12", "--levels", "2,4"), 1, "feasible range is"),
    "average below the levels": (("--average-bits", "2", "--levels", "2,4"), 1, "feasible range is"),
    "levels that do not exist": (("--average-bits", "10", "--levels", "2,12"), 1, "12 bits"),
    "levels in words": (("--average-bits", "3", "--levels", "two"), 2, "whole numbers"),
    "zero samples": (("--bits", "3", "--samples", "0"), 2, "samples"),
    "windows of one token": (("--bits", "3", "--length", "1"), 2, "length"),
    "windows longer than the context": (("--bits", "3", "--length", "512"), 1, "context of 128"),
    "more windows than text": (("--bits", "3", "--samples", "5000"), 1, "at most"),
    "group size that does not divide": (("--bits", "3", "--group-size", "24"), 1, "does not divide the 32 inputs of model.layers.0"),
    "group size zero": (("--bits", "3", "--group-size", "0"), 1, "group size 0"),
    "group size with an average": (("--average-bits", "4", "--group-size", "24"), 1, "does not divide"),
    "unknown method": (("--bits", "3", "--method", "no-such"), 1, "known: gptq, rtn"),
    "a method of another job": (("--bits", "3", "--method", "wanda"), 1, "known: gptq, rtn"),
    "unknown setting": (("--bits", "3", "--no-such", "1"), 2, "no setting --no-such"),
    "setting out of range": (("--bits", "3", "--damping", "-1"), 1, "damping -1.0"),
    "setting of another type": (("--bits", "3", "--damping", "much"), 2, "--damping X"),
    "unknown layer scorer": (("--average-bits", "4", "--layer-scores", "no-such"), 1, "known: "),
    "token scorer for layers": (("--average-bits", "4", "--layer-scores", "attention-concentration"), 1, "known: "),
    "unknown format": (("--bits", "3", "--format", "gguf"), 2, "gguf"),
    "no such plan": (("--plan", "none.json"), 1, "none.json"),
    "no such scores": (("--average-bits", "4", "--layer-scores", "./none.safetensors"), 1, "known: "),
    "rotation that cannot be saved": (("--bits", "3", "--method", "rsq", "--rotate", "online"), 1, "folds into the weights"),
    "asymmetric mixed bits": (("--average-bits", "3.5", "--levels", "3,4", "--count", "codes", "--asymmetric"), 1, "asymmetric"),
    "no text to judge on": (("--bits", "3", "--judge", "none.txt"), 1, "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be(run, work, tiny, text, listing, case):
    options, code, message = OPTIONS[case]
    result = run(*quantize(tiny, text, *options), code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split()), result.output
    assert "unexpected Error" not in result.stderr
    assert listing(work) == {}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--sparsity", "1.5"), 1, "feasible range is 0 to 1"),
        (("--sparsity", "-0.1"), 1, "feasible range is 0 to 1"),
        ((), 2, "exactly one"),
        (("--sparsity", "0.3", "--scope", "2:4"), 1, "only feasible one is 0.5"),
        (("--scope", "2:5", "--method", "wanda"), 1, "multiple of 5"),
        (("--sparsity", "0.5", "--scope", "sideways"), 1, "sideways"),
        (("--sparsity", "0.5", "--format", "compressed-tensors"), 1, "no site is quantized"),
        (("--sparsity", "0.5", "--method", "gptq"), 1, "known: magnitude"),
    ],
)
def test_pruning_that_cannot_be(run, work, tiny, text, listing, options, code, message):
    windows = ("--samples", "4", "--length", "16")
    result = run("prune", tiny, "--method", "wanda", "--text", text, *windows, *options, "-o", "out", code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert listing(work) == {}


def test_text_that_a_method_needs(run, work, tiny):
    assert "learns from text" in run("quantize", tiny, "--method", "gptq", "--bits", "3", *GROUP, "-o", "out", code=2).output
    assert "needs --text" in run("quantize", tiny, "--method", "rtn", "--average-bits", "4.5", *GROUP, "-o", "out", code=2).output


def test_method_that_takes_an_average_only(run, work, tiny, text):
    line = ("quantize", tiny, "--method", "layerwise-quant", "--text", text, "--bits", "3", "-o", "out")
    assert "takes --average-bits" in run(*line, code=2).output


@pytest.mark.parametrize("command", ["quantize", "prune", "score", "plan", "audit", "demo"])
def test_output_that_exists(run, work, tiny, text, listing, command):
    (work / "out").write_text("mine")
    before = listing(work)
    line = {
        "quantize": quantize(tiny, text, "--bits", "3"),
        "prune": ("prune", tiny, "--sparsity", "0.5", "-o", "out"),
        "score": ("score", tiny, "--scorer", "magnitude", "-o", "out"),
        "plan": ("plan", tiny, "--average-bits", "5", *GROUP, "-o", "out"),
        "audit": ("audit", tiny, "--text", text, "-o", "out"),
        "demo": ("demo", "-o", "out"),
    }[command]
    assert "out exists already" in run(*line, code=1).stderr
    assert listing(work) == before


@pytest.mark.parametrize("command", ["quantize", "prune", "score", "plan", "audit", "demo"])
@pytest.mark.parametrize("output", ["blocked/out", "/proc/out", "", "out/.."])
def test_output_that_cannot_be_written(run, work, tiny, text, listing, command, output):
    if output.startswith("/proc") and not os.path.isdir("/proc"):
        pytest.skip("no read-only folder here")
    (work / "blocked").write_text("a file, no folder")
    before = listing(work)
    line = {
        "quantize": ("quantize", tiny, "--bits", "3", *GROUP),
        "prune": ("prune", tiny, "--sparsity", "0.5"),
        "score": ("score", tiny, "--scorer", "magnitude"),
        "plan": ("plan", tiny, "--average-bits", "5", *GROUP),
        "audit": ("audit", tiny, "--text", text),
        "demo": ("demo",),
    }[command]
    result = run(*line, "-o", output, code=1)
    assert "cannot write" in result.stderr or "does not name an output" in result.stderr
    assert listing(work) == before


def test_model_that_is_quantized_already_is_dense_again(run, work, tiny):
    run("quantize", tiny, "--bits", "4", *GROUP, "-o", "out")
    assert "quantized already" in run("scan", "out", *GROUP, code=1).stderr
    config = json.loads((work / "out" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (work / "out" / "config.json").write_text(json.dumps(config))
    assert "quantized already" in run("evaluate", "out", "--text", "default", code=1).stderr
