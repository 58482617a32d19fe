"""The folder beside an output that makes a command resumable, and the last step that puts a finished checkpoint in place.

Everything of an unfinished command lies in `<output>.run`: finished blocks, and the checkpoint while it is written. The output appears by
one rename, whole and with its report; then the folder is removed. So after a kill at any moment `--resume` ends with the same bytes.
"""

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from whatmatters.cli.console import LINE, Output
from whatmatters.cli.inputs import quiet_transformers
from whatmatters.core.checkpoint import check_output, save
from whatmatters.core.errors import FileError, ResumeError
from whatmatters.core.ranks import Ranks, current
from whatmatters.core.report import Report

REPORT = "whatmatters.json"
"""Name of the report inside a checkpoint folder."""

PASSING = frozenset({"seconds", "peak_bytes"})
"""What is measured anew in every run and so is not written beside the weights."""


class RunFolder:
    """The run folder of one output. Used in a `with` around all that writes. Where ranks share the work the first one writes.

    Args:
        out: where a stopped run says how it is continued.
        output: the folder to be made.
        resume: continue what is there.
        overwrite: replace the output, and start over where there is an unfinished run.

    Raises:
        FileError: the output exists or cannot be written, or there is an unfinished run and neither `resume` nor `overwrite`.
    """

    def __init__(self, out: Output, output: Path, *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.ranks = current() or Ranks(0, 1)
        self.output = output
        if self.ranks.first:
            check_output(output, overwrite or (resume and (output / REPORT).is_file()))
        self.path = output.with_name(output.name + ".run")
        self.resume, self.overwrite = resume, overwrite
        if self.ranks.first and self.path.exists() and not (resume or overwrite):
            raise FileError(f"{self.path} holds an unfinished run: continue it with --resume, or start over with --overwrite")
        self.began = self.path.exists()

    def finished(self, request: dict[str, Any]) -> Report | None:
        """The report of a checkpoint that an earlier run of the very same request put in place; None if there is none.

        Raises:
            ResumeError: there is one of another request; the message names what changed.
        """
        report = self._finished(request) if self.ranks.first else None
        if self.ranks.size == 1:
            return report
        told, _ = self.ranks.broadcast(0, None if report is None else dataclasses.asdict(report))
        return None if told is None else Report(**told)

    def _finished(self, request: dict[str, Any]) -> Report | None:
        if not (self.resume and (self.output / REPORT).is_file()):
            return None
        report = Report.load(self.output / REPORT)
        before = report.settings.get("request")
        if before == request:
            return report
        if self.overwrite:
            return None
        before = before if isinstance(before, dict) else {}
        changed = sorted(key for key in request.keys() | before.keys() if before.get(key) != request.get(key))
        raise ResumeError(f"{self.output} is finished and was made with other inputs ({', '.join(changed)}); give another output")

    def __enter__(self) -> "RunFolder":
        if self.ranks.first and self.path.exists() and not self.resume:
            shutil.rmtree(self.path)
            self.began = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None or not self.ranks.first or not self.path.is_dir():
            return
        blocks = len(list(self.path.glob("block-*.safetensors")))
        if blocks and not isinstance(error, ResumeError):
            command = shlex.join(argument for argument in LINE.get() if argument != "--resume")
            self.out.note(f"{blocks} finished blocks are kept in {self.path}; continue with: whatmatters {command} --resume")
        elif not blocks and not self.began:
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, model: Any, tokenizer: Any, report: Report, *, format: str) -> None:
        """Write the checkpoint with its report, put it in place, and remove the run folder; it is there, for all ranks, afterwards."""
        if self.ranks.first:
            self._publish(model, tokenizer, report, format)
        if self.ranks.size > 1:
            self.ranks.gather(None)

    def _publish(self, model: Any, tokenizer: Any, report: Report, format: str) -> None:
        staged = self.path / "checkpoint"
        self.path.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            save(model, tokenizer, staged, format=format, overwrite=True)
        lasting(report).save(staged / REPORT)
        self._place(staged)
        self.remove()

    def _place(self, staged: Path) -> None:
        if not os.path.lexists(self.output):
            os.replace(staged, self.output)
            return
        if not self.overwrite:
            raise FileError(f"{self.output} came into being while it was made; it was left alone, the new one is in {staged}")
        replaced = self.path / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(self.output, replaced)
        try:
            os.replace(staged, self.output)
        except BaseException:
            os.replace(replaced, self.output)
            raise

    def remove(self) -> None:
        """Remove what is no longer needed."""
        if self.ranks.first:
            shutil.rmtree(self.path, ignore_errors=True)


def lasting(report: Report) -> Report:
    """The report without what differs from run to run: the same command gives the same bytes."""
    kept = {"rows": _without_passing(report.rows), "settings": _without_passing(report.settings)}
    return dataclasses.replace(report, **kept, seconds=0.0, peak_bytes=0)


def _without_passing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passing(item) for key, item in value.items() if key not in PASSING}
    return [_without_passing(item) for item in value] if isinstance(value, list | tuple) else value


def as_read_back(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON-able value as it comes back from a file: lists for tuples, strings for keys."""
    return json.loads(json.dumps(value))
