"""What was chosen, and how it is written."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from whatmatters.core.checkpoint import PathLike, atomic_folder
from whatmatters.select._corpus import Corpus, copied_rows

__all__ = ["DSIRSelection", "RowProblem"]


@dataclass(frozen=True)
class RowProblem:
    """A row that could not be used as it was.

    Attributes:
        file: path of the file; empty for texts in memory.
        line: its line or row, from 1; one behind the last where a file broke off.
        reason: what was wrong.
    """

    file: str
    line: int
    reason: str


@dataclass(frozen=True, eq=False)
class DSIRSelection:
    """The documents that were chosen, in the order of the corpus.

    Attributes:
        indices: number of each among all rows of all files, from 0; for a list of texts, its index.
        file: number of its file.
        line: its line or row in the file, from 1.
        where: what finds it again: byte offset of the line, or number of the row.
        log_weight: its log importance weight for the target that chose it.
        tokens: its tokens.
        inclusion_probability: probability that it is chosen given the bound on the keys; sum of f / probability over the chosen is an
            unbiased estimate of the sum of f over all eligible.
        target: number of the target that chose it.
        files: names of the files.
        kl_reduction: KL(target || raw) - KL(target || selected), nats, add-0.5 smoothing.
        overlap_with_top_k: share that plain top-k chooses too.
        eligible: rows that could have been chosen.
        rows: all rows of the corpus, blank ones included.
        too_short: rows with fewer tokens than `min_tokens`.
        unread: rows that could not be read.
        repaired: rows that were read with bytes replaced.
        known: rows with the same n-grams as a document of the target: leakage, where the target is what you test on.
        settings: everything that decided the choice.
    """

    indices: Int64[np.ndarray, " k"]
    file: Int64[np.ndarray, " k"]
    line: Int64[np.ndarray, " k"]
    where: Int64[np.ndarray, " k"]
    log_weight: Float64[np.ndarray, " k"]
    tokens: Int64[np.ndarray, " k"]
    inclusion_probability: Float64[np.ndarray, " k"]
    target: Int64[np.ndarray, " k"]
    files: tuple[str, ...]
    kl_reduction: float
    overlap_with_top_k: float
    eligible: int
    rows: int
    too_short: int
    unread: int
    repaired: int
    known: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        named = ("kl_reduction", "overlap_with_top_k", "eligible", "rows", "too_short", "unread", "repaired", "known", "settings")
        return {"count": len(self), "tokens": int(self.tokens.sum()), **{name: getattr(self, name) for name in named}}


def write_selection(selection: DSIRSelection, raw: Corpus, problems: Sequence[RowProblem], output: PathLike, *, overwrite: bool) -> Path:
    """Write the chosen rows, one file for each source file, and `selection.json` and `selection.parquet` beside them."""
    with atomic_folder(output, overwrite=overwrite) as folder:
        names = []
        for number in np.unique(selection.file).tolist():
            path = raw.files[number]
            name = Path(path).name.removesuffix(".gz").removesuffix(".zst") if path else "texts.jsonl"
            names.append(name if len(raw.files) == 1 else f"{number:05d}-{name}")
            _copy(raw, number, selection.where[selection.file == number], folder / names[-1])
        _write_table(selection, folder / "selection.parquet")
        told = {**selection.to_json(), "files": list(raw.files), "written": names, "problems": [asdict(problem) for problem in problems]}
        (folder / "selection.json").write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
    return Path(output)


def _copy(raw: Corpus, number: int, where: Int64[np.ndarray, " rows"], output: Path) -> None:
    path = raw.files[number]
    if path.lower().endswith(".parquet"):
        _copy_parquet(path, where, output)
        return
    with output.open("wb") as file:
        if raw.texts is None:
            file.writelines(copied_rows(path, where))
        else:
            file.writelines(json.dumps({"text": raw.texts[i]}).encode() + b"\n" for i in where.tolist())


def _write_table(selection: DSIRSelection, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = ("indices", "file", "line", "log_weight", "tokens", "inclusion_probability", "target")
    pyarrow.parquet.write_table(pyarrow.table({name: getattr(selection, name) for name in names}), path)


def _copy_parquet(path: str, rows: Int64[np.ndarray, " rows"], output: Path) -> None:
    """Copy rows with all columns, one row group in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file, pyarrow.parquet.ParquetWriter(output, file.schema_arrow) as writer:
        first = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            low, high = np.searchsorted(rows, [first, first + count])
            if high > low:
                writer.write_table(file.read_row_group(group, use_threads=False).take(pyarrow.array(rows[low:high] - first)))
            first += count
