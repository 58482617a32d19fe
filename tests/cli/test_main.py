"""The command line as a whole: quick help, exit codes, where output goes, and a package that costs nothing to import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import whatmatters
from whatmatters.cli.console import ProgressLines, error_text, spoken_duration, spoken_size, table
from whatmatters.cli.main import app
from whatmatters.core.catalog import door
from whatmatters.core.errors import InputError

COMMANDS = ("scan", "audit", "score", "plan", "quantize", "prune", "evaluate", "demo", "methods", "reproduce", "report")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_and_imports_no_torch():
    done = python("-X", "importtime", "-m", "whatmatters", "--help")
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "whatmatters.cli.main" in imported
    assert not {"torch", "transformers", "numpy", "scipy"} & imported


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    assert "Usage" in run(command, "--help").stdout


def test_commands_are_those_of_the_vocabulary():
    assert [c.name for c in app.registered_commands] == list(COMMANDS)


def test_package_is_imported_without_torch():
    assert python("-c", "import sys, whatmatters; assert 'torch' not in sys.modules; assert whatmatters.__version__").returncode == 0


def test_public_names_are_the_same_everywhere():
    tree = ast.parse(Path(whatmatters.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    names = {a.asname or a.name for node in checked.body if isinstance(node, ast.ImportFrom) for a in node.names} | {"__version__"}
    assert names == set(whatmatters.__all__)
    for name in whatmatters.__all__:
        assert getattr(whatmatters, name) is not None
    assert set(whatmatters.__all__) <= set(dir(whatmatters))
    assert whatmatters.allocate.bits.__name__ == "bits"
    assert callable(whatmatters.data.calibration)
    with pytest.raises(AttributeError, match="no_such_name"):
        whatmatters.no_such_name  # noqa: B018


def test_wrong_usage_is_exit_2(run):
    assert "--no-such" in run("scan", "x", "--no-such", code=2).output
    assert "nothing" in run("nothing", code=2).output


def test_our_errors_are_one_message_on_stderr(run, work):
    result = run("evaluate", "./none", "--text", "default", code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: no folder './none'")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("line", [["--debug", "scan", "./none"], ["scan", "./none", "--debug"]])
def test_debug_shows_where_anywhere_on_the_line(work, line):
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: no folder './none'" in result.stderr


def test_unexpected_errors_are_no_traceback_either(run, monkeypatch, work):
    monkeypatch.setattr("whatmatters.cli.inputs.load_shapes", lambda *a, **k: 1 // 0)
    result = run("plan", "anything", "--average-bits", "3", code=1)
    assert "unexpected ZeroDivisionError" in result.stderr


def test_interrupt_is_exit_1(run, monkeypatch, work):
    def stopped(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("whatmatters.cli.inputs.load_shapes", stopped)
    assert run("plan", "anything", "--average-bits", "3", code=1).stderr.strip() == "stopped"


def test_version(run):
    assert run("--version").stdout.strip() == f"whatmatters {whatmatters.__version__}"


def test_console_entry_point_is_installed():
    done = subprocess.run([str(Path(sys.executable).with_name("whatmatters")), "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("whatmatters ")


def test_error_text_leaves_the_python_call_out():
    @door("somewhere")
    def fails(value: int) -> None:
        raise InputError(f"{value} is too much")

    with pytest.raises(InputError) as caught:
        fails(3)
    assert "somewhere" in str(caught.value)
    assert error_text(caught.value) == "3 is too much"


def test_spoken_numbers():
    assert [spoken_duration(s) for s in (0.2, 99, 101, 5999, 6001)] == ["0 s", "99 s", "2 min", "100 min", "1.7 h"]
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1 kB", 1_500_000: "1.5 MB", 2.5e9: "2.5 GB", 3e12: "3000 GB"}
    assert {size: spoken_size(size) for size in sizes} == sizes


def test_table_without_rows():
    assert table(("a", "b"), []) == "a  b"


def test_progress_lines_tell_the_time_left(monkeypatch, capsys):
    now = iter([0.0, 2.0, 6.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    lines = ProgressLines(sys.stderr)
    for done in (0, 1, 3, 10):
        lines("work", done, 10)
    shown = capsys.readouterr().err.splitlines()
    # the second step comes 2 s after the first line could have been printed, which is too soon
    assert shown == ["work: 3 of 10, about 14 s left", "work: 10 of 10, 20 s"]


def test_json_leaves_nothing_else_on_stdout(run, tiny, monkeypatch):
    import whatmatters.core.scan

    original = whatmatters.core.scan.scan

    def noisy(*arguments, **keywords):
        print("a library that prints")
        return original(*arguments, **keywords)

    monkeypatch.setattr(whatmatters.core.scan, "scan", noisy)
    result = run("scan", tiny, "--group-size", "16", "--json")
    assert json.loads(result.stdout)["model"] == str(tiny)
    assert "a library that prints" in result.stderr


def test_demo_passes_on_what_it_is_told(run, work, monkeypatch):
    import whatmatters.cli.demo

    calls = []

    def run_demo(output, *, seed, quick, overwrite, progress, console):
        calls.append((output, seed, quick, overwrite, console is None))
        return {"title": "mine"}

    monkeypatch.setattr(whatmatters.cli.demo, "run_demo", run_demo)
    assert "written: demo-run/report.html" in run("demo").stdout
    assert json.loads(run("demo", "-o", "there", "--quick", "--seed", "3", "--overwrite", "--json").stdout)["title"] == "mine"
    assert calls == [(Path("demo-run"), 0, False, False, False), (Path("there"), 3, True, True, True)]
