"""`methods` and `reproduce`: driven by what there is."""

import json
import sys
import types

import pytest

from whatmatters.cli import catalog
from whatmatters.core.catalog import methods, scorers


def test_every_entry_is_listed(run):
    shown = run("methods").stdout
    told = json.loads(run("methods", "--json").stdout)["methods"]
    for entry in (*methods(), *scorers()):
        assert f" {entry.slug} " in shown
        assert entry.slug in {row["slug"] for row in told}


def test_jobs_are_told_apart(run):
    assert {row["job"] for row in json.loads(run("methods", "--job", "prune", "--json").stdout)["methods"]} == {"prune"}
    assert "known: infer, nn, prune, quantize, represent, score, select, tune" in run("methods", "--job", "nothing", code=1).stderr


@pytest.mark.parametrize("entry", [*methods(), *scorers()], ids=lambda e: e.slug)
def test_everything_about_one(run, entry):
    shown = run("methods", entry.slug).stdout
    assert entry.summary in shown
    assert entry.paper is None or f"arxiv.org/abs/{entry.paper}" in shown


def test_unknown_method_lists_the_known(run):
    assert "rsq" in run("methods", "no-such", code=1).stderr


def test_evidence_is_shown(run, work):
    (work / "evidence").mkdir()
    claim = {"claim": "it works", "verdict": "refuted", "tier": "desk"}
    (work / "evidence" / "rsq.json").write_text(json.dumps({"slug": "rsq", "claims": [claim]}))
    assert "refuted  desk  it works" in run("methods", "rsq").stdout
    (work / "evidence" / "rsq.json").write_text("not json")
    run("methods", "rsq")


@pytest.fixture
def experiment(monkeypatch):
    """An experiment named my-method that records how it was called."""
    module = types.ModuleType("whatmatters.reproduce.my_method")
    calls = []

    def run(*, model=None, scale="desk", seeds=3, output=None, progress=None):
        calls.append((model, scale, seeds, str(output)))
        return {"claims": [{"claim": "better", "verdict": "shown", "tier": "planted"}]}

    module.run = run
    monkeypatch.setitem(sys.modules, "whatmatters.reproduce.my_method", module)
    monkeypatch.setattr(catalog, "experiments", lambda: {"my-method": "whatmatters.reproduce.my_method"})
    return calls


def test_reproduce_runs_the_experiment(run, work, experiment):
    shown = run("reproduce", "my_method", "--model", "m", "--seeds", "4", "--scale", "gpu").stdout
    assert "shown    planted  better" in shown
    told = json.loads(run("reproduce", "all", "-o", "elsewhere", "--json").stdout)
    assert told["experiments"]["my-method"]["claims"][0]["verdict"] == "shown"
    assert experiment == [("m", "gpu", 4, "evidence"), (None, "desk", 3, "elsewhere")]


def test_reproduce_lists_the_known(run, experiment):
    assert "known: my-method" in run("reproduce", "nothing", code=1).stderr
