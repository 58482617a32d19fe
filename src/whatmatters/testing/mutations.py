"""Seeded mutations: one small error for each entry, which its tests must find. A test that lets it live does not test the method.

`tests/mutations/<job>/<slug>.toml` says `file`, the exact text to `find` in it (once), what to `replace` it with (a flipped sign, a dropped
term), the `test` that must fail, and what it `breaks`, in words. The package is copied, changed in the copy, and never where it stands.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from whatmatters.core.catalog import Entry

__all__ = ["Mutation", "known", "place", "read"]

FAILED = 1
"""What pytest exits with if tests ran and some failed; any other number means that the mutation was not judged."""


@dataclass(frozen=True)
class Mutation:
    """One change of one line of a method, and the test that must notice it. Paths are relative to the repository."""

    file: str
    find: str
    replace: str
    test: str
    breaks: str

    def applied(self, root: Path) -> str:
        """The changed source; raises AssertionError where the text is not there exactly once or the change is none."""
        source = (root / self.file).read_text(encoding="utf-8")
        times = source.count(self.find)
        assert times == 1, f"{self.find!r} is {times} times in {self.file}; choose a text that is there once"
        changed = source.replace(self.find, self.replace)
        assert ast.dump(ast.parse(source)) != ast.dump(ast.parse(changed)), "the replacement changes no code"
        assert (root / self.test.partition("::")[0]).exists(), f"there is no {self.test}"
        return changed

    def killed(self, root: Path, timeout: float = 200.0) -> tuple[bool, str]:
        """Whether the test fails on the changed package, and the end of what it printed."""
        with tempfile.TemporaryDirectory(prefix="whatmatters-mutation-") as folder:
            package = Path(folder) / "src" / "whatmatters"
            shutil.copytree(root / "src" / "whatmatters", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
            (package / "assets").symlink_to(root / "src" / "whatmatters" / "assets")
            (Path(folder) / self.file).write_text(self.applied(root), encoding="utf-8")
            command = [sys.executable, "-m", "pytest", self.test, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
            environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
        return done.returncode == FAILED, f"exit code {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-500:]}"


def place(root: Path, entry: Entry) -> Path:
    """The file that holds an entry's mutation."""
    return root / "tests" / "mutations" / entry.job / f"{entry.slug}.toml"


def read(root: Path, entry: Entry) -> Mutation:
    """The mutation of an entry; raises AssertionError saying what to write where."""
    path = place(root, entry)
    assert path.exists(), (
        f"write {path.relative_to(root)}: a change of one line (file, find, replace), the test that must notice it, what it breaks"
    )
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    assert told.keys() == {"file", "find", "replace", "test", "breaks"}, (
        f"{path.name} tells {sorted(told)}; expected file, find, replace, test, breaks"
    )
    return Mutation(**told)


def known(root: Path) -> dict[str, Path]:
    """All mutations there are: "job/slug" to file."""
    folder = root / "tests" / "mutations"
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/*.toml"))}
