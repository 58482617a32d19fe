"""Texts of JSON lines: one field of each object, unescaped, as UTF-8 bytes in one buffer.

The compiled face scans each line once and copies the field as it goes; it checks the grammar of the whole line, and whatever is not
plainly in order (another type, no such field, a number Python would refuse, an error) is left to Python's `json`, which decides. So both
faces give the same texts and the same refusals.
"""

import json

import numpy as np
from jaxtyping import Int64, UInt8

from whatmatters.kernels.ngrams import compiled_face

__all__ = ["Lines", "texts_of_lines"]

LONE = "a lone surrogate, replaced"


class Lines:
    """Texts of some lines.

    Attributes:
        plain: bytes that hold the texts, valid UTF-8.
        begin: where each line's text begins; equal to `end` for lines without one.
        end: where it ends.
        unread: lines without a text, and why.
        repaired: lines whose text had to be changed, and how.
        blank: lines with nothing on them.
    """

    def __init__(
        self,
        plain: UInt8[np.ndarray, " bytes"],
        begin: Int64[np.ndarray, " lines"],
        end: Int64[np.ndarray, " lines"],
        unread: dict[int, str],
        repaired: dict[int, str],
        blank: list[int],
    ) -> None:
        self.plain, self.begin, self.end = plain, begin, end
        self.unread, self.repaired, self.blank = unread, repaired, blank


def texts_of_lines(
    text: UInt8[np.ndarray, " bytes"],
    starts: Int64[np.ndarray, " lines"],
    stops: Int64[np.ndarray, " lines"],
    field: str,
    *,
    face: str = "auto",
) -> Lines:
    """The field's text of each line.

    Args:
        text: bytes of the lines, valid UTF-8.
        starts: where each begins.
        stops: where it ends, without the newline.
        field: name of the field; a line that is a JSON string itself counts as a text too.
        face: see `Hasher`.

    Example:
        >>> text = np.frombuffer(b'{"text": "one"}[1]', np.uint8)
        >>> lines = texts_of_lines(text, np.array([0, 15]), np.array([15, 18]), "text")
        >>> lines.plain[lines.begin[0] : lines.end[0]].tobytes(), lines.unread
        (b'one', {1: "an array, not an object with the field 'text'"})
    """
    count = len(starts)
    begin, end = np.zeros(count, np.int64), np.zeros(count, np.int64)
    compiled = compiled_face(face)
    if compiled is None:
        plain, status, used = np.empty(0, np.uint8), np.full(count, 2, np.uint8), 0
    else:
        plain, status = np.empty(len(text) + 8, np.uint8), np.zeros(count, np.uint8)
        used = compiled.extract(text, starts, stops, np.frombuffer(field.encode("utf-8", "replace"), np.uint8), plain, begin, end, status)
    unread: dict[int, str] = {}
    repaired = dict.fromkeys(np.flatnonzero(status == 1).tolist(), LONE)
    blank = np.flatnonzero(status == 3).tolist()
    added = [plain[:used]]
    for line in np.flatnonzero(status == 2).tolist():
        found, reason = _text(text[starts[line] : stops[line]].tobytes(), field)
        if found is None:
            if reason:
                unread[line] = reason
            else:
                blank.append(line)
            begin[line] = end[line] = 0
            continue
        if reason:
            repaired[line] = reason
        begin[line], end[line] = used, used + len(found)
        used += len(found)
        added.append(np.frombuffer(found, np.uint8))
    return Lines(np.concatenate(added) if len(added) > 1 else plain, begin, end, unread, repaired, blank)


def _text(line: bytes, field: str) -> tuple[bytes | None, str]:
    """A line's text, and what was wrong; neither for a blank line."""
    content = line.decode().removeprefix("\ufeff")
    if not content.strip(" \t\r\n"):
        return None, ""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({str(error)[:100] or type(error).__name__})"
    text = record
    if isinstance(record, dict):
        if field not in record:
            return None, f"no field {field!r}"
        text = record[field]
    elif not isinstance(record, str):
        return None, f"{_kind(record)}, not an object with the field {field!r}"
    if not isinstance(text, str):
        return None, f"the field {field!r} is {_kind(text)}, not text"
    try:
        return text.encode(), ""
    except UnicodeEncodeError:
        # As the compiled face: each lone surrogate becomes U+FFFD.
        return "".join("\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text).encode(), LONE


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
