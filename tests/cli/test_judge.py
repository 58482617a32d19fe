"""`evaluate` and `report`."""

import json

import pytest

from whatmatters.core.checkpoint import load
from whatmatters.core.data import windows
from whatmatters.core.evaluate import compare, evaluate


def test_evaluate_is_what_the_library_measures(run, work, tiny, text, listing):
    told = json.loads(run("evaluate", tiny, "--text", text, "--length", "16", "--json").stdout)
    model, tokenizer = load(tiny)
    expected = evaluate(model, windows(tokenizer, text, 16))
    assert told["perplexity"] == expected.perplexity
    assert told["tokens"] == expected.tokens
    assert listing(work) == {}


def test_evaluate_against_the_original(run, work, tiny, text):
    run("quantize", tiny, "--bits", "3", "--group-size", "16", "-o", "out")
    told = json.loads(run("evaluate", "out", "--text", text, "--length", "16", "--samples", "40", "--against", tiny, "--json").stdout)
    (before, tokenizer), (after, _) = load(tiny), load(work / "out")
    cut = windows(tokenizer, text, 16, limit=40)
    difference = compare(evaluate(before, cut), evaluate(after, cut))
    assert told["damage"]["change_percent"] == pytest.approx(difference.perplexity_change)
    assert told["damage"]["interval_percent"] == pytest.approx(list(difference.perplexity_interval))
    assert told["kl"] == evaluate(after, cut, against=before).kl
    assert told["kl_interval"][0] <= told["kl"] <= told["kl_interval"][1]
    shown = run("evaluate", "out", "--text", text, "--length", "16", "--samples", "40", "--against", tiny).stdout
    assert "KL from the original" in shown
    assert "95% interval over 40 windows" in shown


def test_one_window_has_no_interval_and_json_stays_valid(run, work, tiny, text):
    line = ("evaluate", tiny, "--text", text, "--length", "16", "--samples", "1", "--against", tiny)
    told = json.loads(run(*line, "--json").stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["damage"]["interval_percent"] is told["kl_interval"] is None
    assert "one unit tells nothing about others" in run(*line).stdout


def test_documents_share_the_windows(run, work, tiny):
    lines = [json.dumps({"text": " ".join(f"w{1 + (i + j) % 60}" for j in range(100))}) for i in range(12)]
    (work / "many.jsonl").write_text("\n".join(lines))
    told = json.loads(run("evaluate", tiny, "--text", "many.jsonl", "--length", "16", "--samples", "12", "--json").stdout)
    assert told["documents"] == 12
    other = (work / "other.jsonl").write_text("\n".join(line.replace('"text"', '"body"') for line in lines))
    assert other
    assert "no field 'text'" in run("evaluate", tiny, "--text", "other.jsonl", "--length", "16", code=1).stderr
    run("evaluate", tiny, "--text", "other.jsonl", "--field", "body", "--length", "16", "--samples", "4")


def test_stride_and_dry_run(run, work, tiny, text):
    plain = json.loads(run("evaluate", tiny, "--text", text, "--length", "16", "--samples", "20", "--json").stdout)
    strided = json.loads(run("evaluate", tiny, "--text", text, "--length", "16", "--samples", "20", "--stride", "8", "--json").stdout)
    assert strided["tokens"] > plain["tokens"]
    assert "dry run" in run("evaluate", tiny, "--text", text, "--dry-run").stdout


def test_length_defaults_to_the_context_of_the_model(run, work, tiny, text):
    told = json.loads(run("evaluate", tiny, "--text", text, "--samples", "2", "--json").stdout)
    assert told["tokens"] == 2 * 127


def test_report_of_what_is_no_run(run, work, listing):
    assert "no folder none" in run("report", "none", code=1).stderr
    (work / "empty").mkdir()
    assert "empty" in run("report", "empty", code=1).stderr
    assert list((work / "empty").iterdir()) == []


def test_report_of_a_run(run, work, monkeypatch):
    import whatmatters.pages.report

    monkeypatch.setattr(whatmatters.pages.report, "render", lambda folder: folder / "report.html")
    (work / "run").mkdir()
    assert json.loads(run("report", "run", "--json").stdout)["report"] == "run/report.html"
