"""`select dsir`."""

import json
import random
from pathlib import Path

import pytest


def write(path: Path, words: str, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    kinds = words.split("/")
    rows = [" ".join(draw.choices(kinds[i % len(kinds)].split(), k=20)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def corpora(work):
    write(work / "raw.jsonl", "sea ship sail wave/bank bond stock share", 60, 0)
    write(work / "target.jsonl", "sea ship sail wave", 10, 1)
    return work


OPTIONS = ("raw.jsonl", "--target", "target.jsonl", "--count", "10", "--min-tokens", "1", "-j", "1")


def test_dsir_writes_what_it_chose(run, corpora):
    result = run("select", "dsir", *OPTIONS, "-o", "out")
    assert "KL reduction" in result.stdout
    assert result.stdout.splitlines()[-1] == "written: out"
    rows = [json.loads(line)["text"] for line in (corpora / "out" / "raw.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert all(set(row.split()) <= {"sea", "ship", "sail", "wave"} for row in rows)
    assert sorted(path.name for path in corpora.iterdir()) == ["out", "raw.jsonl", "target.jsonl"]
    assert "exists already" in run("select", "dsir", *OPTIONS, "-o", "out", code=1).stderr
    run("select", "dsir", *OPTIONS, "-o", "out", "--overwrite")


def test_dsir_as_json_tells_bad_rows(run, corpora):
    with (corpora / "raw.jsonl").open("a") as file:
        file.write('{"other": 1}\n')
    told = json.loads(run("select", "dsir", *OPTIONS, "-o", "out", "--seed", "3", "--json").stdout)
    assert (told["rows"], told["eligible"], told["count"], told["unread"]) == (61, 60, 10, 1)
    assert told["problems"] == [{"file": "raw.jsonl", "line": 61, "reason": "no field 'text'"}]
    assert told["settings"]["seed"] == 3


def test_dsir_continues_and_refuses(run, corpora):
    run("select", "dsir", *OPTIONS, "-o", "a", "--run-dir", "run")
    assert "resume" in run("select", "dsir", *OPTIONS, "-o", "b", "--run-dir", "run", code=1).stderr
    run("select", "dsir", *OPTIONS, "-o", "b", "--run-dir", "run", "--resume")
    assert (corpora / "a" / "raw.jsonl").read_bytes() == (corpora / "b" / "raw.jsonl").read_bytes()
    assert "61 documents of 60" in run("select", "dsir", *OPTIONS[:4], "61", *OPTIONS[5:], "-o", "c", code=1).stderr
    assert "no such file" in run("select", "dsir", "none.jsonl", *OPTIONS[1:], "-o", "c", code=1).stderr
    run("select", "dsir", "raw.jsonl", "-o", "c", code=2)
