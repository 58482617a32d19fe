"""`scan` and `audit`."""

import json

import pytest

from whatmatters.core.scores import Scores
from whatmatters.score.audit import Audit


def test_scan_tells_every_site(run, work, tiny, listing):
    result = run("scan", tiny, "--group-size", "16", "--levels", "2,4")
    assert "2 blocks, 14 sites" in result.stdout
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "error 2 bits" in result.stdout
    assert f"next: whatmatters audit {tiny} --text FILE" in result.stdout
    assert listing(work) == {}


def test_scan_as_json(run, tiny):
    told = json.loads(run("scan", tiny, "--group-size", "16", "--json").stdout)
    assert len(told["rows"]) == 14
    assert told["needs"]["peak_bytes"] > 0
    assert told["bytes_at"]["3"] < told["bytes_now"]


def test_scan_refuses_what_divides_nothing(run, tiny):
    assert "does not divide" in run("scan", tiny, "--group-size", "24", code=1).stderr
    assert "levels" in run("scan", tiny, "--group-size", "16", "--levels", "9", code=1).stderr


AUDIT = ("--scorers", "magnitude,layer-shift,random", "--by", "site", "--bits", "3", "--steps", "2", "--orders", "1")


def test_audit_gives_a_verdict_and_files_to_plan_from(run, work, tiny, text, small):
    result = run("audit", tiny, "--text", text, *small, *AUDIT, "-o", "found")
    assert result.stdout.splitlines()[0].startswith(("Trust ", "No score "))
    assert "random (control)" in result.stdout
    assert "reversed " in result.stdout
    found = Audit.load(work / "found" / "audit.json")
    assert {row.scorer for row in found.rows} == {"magnitude", "layer-shift", "random"}
    assert (work / "found" / "audit.svg").read_text(encoding="utf-8").startswith("<?xml")
    scores = Scores.load(work / "found" / "scores" / "layer-shift.safetensors")
    assert scores.structure is not None
    run("plan", work / "found" / "scores" / "layer-shift.safetensors", "--average-bits", "5", "--group-size", "16")


def test_audit_as_json(run, work, tiny, text, small, listing):
    told = json.loads(run("audit", tiny, "--text", text, *small, *AUDIT, "--json").stdout)
    assert [row["scorer"] for row in told["rows"]] == sorted(
        ("magnitude", "layer-shift", "random"), key=lambda name: -next(r["spearman"] for r in told["rows"] if r["scorer"] == name)
    )
    assert len(told["damage"]) == len(told["units"]) == 8
    assert listing(work) == {}


def test_audit_dry_run(run, work, tiny, text, listing):
    assert "dry run" in run("audit", tiny, "--text", text, "--dry-run").stdout
    assert listing(work) == {}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--scorers", "magnitude,nothing"), 1, "no layer scorer named 'nothing'"),
        (("--by", "sideways"), 2, "sideways"),
        (("--steps", "1"), 2, "steps"),
        (("--bits", "1"), 1, "1 bits"),
    ],
)
def test_audit_refuses(run, work, tiny, text, small, listing, options, code, message):
    assert message in run("audit", tiny, "--text", text, *small, *options, "-o", "found", code=code).output
    assert listing(work) == {}


def test_audit_needs_text(run, tiny):
    assert "--text" in run("audit", tiny, code=2).output
