"""The demo: the quick variant end to end, its promises checked without its own help."""

import io
import json
import time

import pytest
import torch

from whatmatters.cli import demo
from whatmatters.core import embedded
from whatmatters.core.errors import FileError
from whatmatters.core.evaluate import size_on_disk


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from rich.console import Console

    folder = tmp_path_factory.mktemp("demo") / "run"
    console = Console(record=True, width=140, file=io.StringIO())
    told = []
    begin = time.process_time()
    results = demo.run_demo(folder, quick=True, console=console, progress=lambda *step: told.append(step))
    return folder, results, console.export_text(), told, time.process_time() - begin


def test_it_takes_seconds(run):
    assert run[4] < 60


def test_everything_is_written(run):
    folder, results, _, _, _ = run
    assert {p.name for p in folder.iterdir()} >= {"results.json", "report.html", "model"}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    html = (folder / "report.html").read_text()
    for arm in results["arms"]:
        assert arm["label"] in html
    assert not [p for p in folder.parent.iterdir() if p != folder]


def test_the_arms_the_job_asks_for_are_there(run):
    arms = {arm["id"]: arm for arm in run[1]["arms"]}
    assert set(arms) == {"dense", "rtn", "gptq", "rsq", "rsq-unrotated", "mixed-scores", "mixed-optimum", "mixed-random-1"}
    for name, arm in arms.items():
        if name == "dense":
            continue
        assert arm["kl"] > 0
        assert 0 < arm["agreement"] <= 1
        assert arm["low"] <= arm["change"] <= arm["high"]
        assert arm["bytes"] < arms["dense"]["bytes"]
    assert all(set(arms[name]["levels"].values()) == {3} for name in ("rtn", "gptq", "rsq", "rsq-unrotated"))
    for name in ("mixed-scores", "mixed-optimum", "mixed-random-1"):
        assert set(arms[name]["levels"].values()) <= {2, 3, 4, 8}
        assert arms[name]["bits"] <= 3.5
    assert arms["mixed-random-1"]["role"] == "control"
    assert arms["rsq"]["bytes"] > arms["rsq-unrotated"]["bytes"]
    assert "embeddings" in arms["rsq"]["note"]


def test_at_least_six_scorers_are_audited_and_one_is_a_control(run):
    scorers = run[1]["audit"]["scorers"]
    assert len(scorers) >= 6
    assert any(s["control"] for s in scorers)


def test_the_checkpoint_reloads_without_us_and_is_as_large_as_told(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, results, _, _, _ = run
    best = next(arm for arm in results["arms"] if arm["id"] == results["best"])
    assert size_on_disk(folder / "model") == best["bytes"]
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    ids = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)("def f(x):", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    assert results["reload"]["difference"] <= results["reload"]["tolerance"] == 1e-4


def test_text_is_apart_and_recorded(run):
    _, results, told, _, _ = run
    texts = {text["used_for"]: text for text in results["texts"]}
    assert texts["judging"]["digest"] == embedded.split_digest("test")
    assert texts["calibrating"]["digest"] == embedded.split_digest("validation")
    assert results["interpreter"] == embedded.interpreter()
    assert embedded.interpreter() in told
    assert embedded.split_digest("test")[:16] in told
    assert results["stages"]
    assert all(stage["seconds"] >= 0 for stage in results["stages"])


def test_the_texts_share_no_document():
    tokenizer = embedded.load()[1]
    texts, _ = demo._texts(tokenizer, demo.QUICK, 0)
    rows = [{tuple(row) for row in text.inputs.tolist()} for text in (texts.calibrating, texts.choosing, texts.judging)]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    assert not rows[0] & rows[2]


def test_the_table_names_every_arm(run):
    _, results, told, _, _ = run
    for arm in results["arms"]:
        assert arm["label"] in told


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_is_whole_in_files_and_fits_narrow_terminals(run, terminal):
    from rich.console import Console

    results = demo.Results.load(run[0])
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, record=True)
    demo._show(console, results)
    told = console.export_text()
    lines = told[: told.index("From ")].splitlines()
    assert ("KL" in lines[0]) is not terminal
    assert all(len(line.rstrip()) <= (80 if terminal else demo.WIDE) for line in lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in told
    if not terminal:
        assert [line[: len(arm.label)] for arm, line in zip(results.arms, lines[1:], strict=True)] == [arm.label for arm in results.arms]


def test_progress_comes_to_an_end(run):
    last = {}
    for label, done, total in run[3]:
        last[label] = (done, total)
    assert last
    assert all(done == total for done, total in last.values())


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileError):
        demo.run_demo(tmp_path, quick=True)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def made(id, role, size, chosen):
    from whatmatters.pages.results import Arm

    part = Arm(id, id, role, 3.0, {}, 10.0, 0.0, None, None, None, None, size, 0.0, 0, "")
    return demo.Made(part, torch.nn.Identity(), chosen, None)


def test_the_best_arm_is_neither_larger_nor_a_control_nor_decided_by_the_judging_text():
    arms = [made("dense", "dense", 1000, 1.0), made("a", "baseline", 100, 2.0), made("b", "method", 110, 1.9),
            made("large", "method", 200, 1.5), made("lucky", "control", 100, 1.2)]  # fmt: skip
    assert demo.choose(arms).part.id == "b"
    told = demo._reason(arms, demo.choose(arms), None)
    assert "“large” did not compete" in told
    assert "for a lower perplexity" in told
    arms += [made("mixed-scores", "method", 100, 1.0), made("mixed-optimum", "method", 100, 1.1)]
    assert "which the audit trusts less than fisher" in demo._reason(arms, demo.choose(arms), "fisher")
    assert "loss table" not in demo._reason(arms, demo.choose(arms), "quantization-error")


def test_stages_are_timed():
    clock = demo.Clock()
    with clock.stage("a"):
        time.sleep(0.01)
    assert [s.name for s in clock.stages] == ["a"]
    assert clock.stages[0].seconds >= 0.01
