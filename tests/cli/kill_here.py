"""Run the command line and be killed, by SIGKILL and so without any chance to clean up, at a named point: a helper of test_kill.py.

    python kill_here.py POINT COUNT ARGUMENTS...

COUNT: the point is passed this many times before the kill.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def instead(module: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(module, name)
    setattr(module, name, functools.wraps(original)(around(original)))


class Countdown:
    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def half_written(original: Callable[..., Any], due: Callable[[], bool]) -> Callable[..., Any]:
    """A `save_file` that is killed with half of its bytes on the disk."""

    def save(tensors: Any, path: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(tensors, path, *arguments, **keywords)
        if due():
            size = Path(path).stat().st_size
            with open(path, "r+b") as file:
                file.truncate(size // 2)
                os.fsync(file.fileno())
            kill()
        return result

    return save


def arm(point: str, count: int, output: str) -> None:
    """Put the kill in its place."""
    import torch
    import transformers.modeling_utils

    from whatmatters.core import walk

    due = Countdown(count)

    if point == "solve":  # between two columns of a matrix that is being rounded

        def div(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **keywords: Any) -> Any:
                if sys._getframe(1).f_code.co_name == "round_with_feedback" and due():
                    kill()
                return original(*arguments, **keywords)

            return counted

        instead(torch, "div", div)
    elif point == "block write":
        instead(walk, "save_file", lambda original: half_written(original, due))
    elif point == "commit":  # between two tensors that are copied into the model

        def untie(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: kill() if due() else original(*arguments)

        instead(walk, "_untie", untie)
    elif point == "checkpoint write":
        instead(transformers.modeling_utils, "safe_save_file", lambda original: half_written(original, due))
    elif point in ("before the rename", "after the rename"):

        def replace(original: Callable[..., Any]) -> Callable[..., Any]:
            def moved(source: Any, target: Any) -> None:
                last = os.fspath(target) == output
                if last and point.startswith("before"):
                    kill()
                original(source, target)
                if last:
                    kill()

            return moved

        instead(os, "replace", replace)
    else:
        raise SystemExit(f"no point {point!r}")


if __name__ == "__main__":
    line = sys.argv[3:]
    arm(sys.argv[1], int(sys.argv[2]), line[line.index("-o") + 1])
    sys.argv = ["whatmatters", *line]
    from whatmatters.cli.main import main

    main()
