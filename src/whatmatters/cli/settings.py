"""The settings of a method or scorer as options: read from its signature, so that a new method needs no line here.

`--r-min 0.01` is the keyword argument `r_min`, `--act-order` and `--no-clip-search` are booleans, `--rotate none` is None, `--levels 2,4` a
sequence, and where Scores are taken the path of a scores file will do.
"""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand

from whatmatters.core.catalog import Entry

PLUMBING = frozenset({"structure", "allow_uncovered", "run_dir", "resume", "progress", "spill_bytes"})
"""Keyword arguments that the command line fills in itself."""

ALIASES = {"asymmetric": "no-symmetric"}


_given: ContextVar[dict[str, Any]] = ContextVar("given_settings")


def settings_of(entry: Entry) -> dict[str, inspect.Parameter]:
    """The keyword-only settings of a method or scorer, by name, without plumbing."""
    parameters = inspect.signature(entry.function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in PLUMBING}


def accepted(entry: Entry, **offered: Any) -> dict[str, Any]:
    """Those of the offered keyword arguments that the entry takes."""
    known = inspect.signature(entry.function).parameters
    return {name: value for name, value in offered.items() if name in known}


def option_name(parameter: inspect.Parameter) -> str:
    """A setting as it is typed, with what follows it."""
    dashed = parameter.name.replace("_", "-")
    if _is_bool(parameter.annotation):
        return f"--{'no-' if parameter.default is True else ''}{dashed}"
    return f"--{dashed} {'|'.join(_spelled(kind) for kind in _members(parameter.annotation)) or '(Python only)'}"


def parsed(entry: Entry, given: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """Keyword arguments from (option without dashes, text) pairs; raises ValueError with a message for people."""
    values: dict[str, Any] = {}
    known = settings_of(entry)
    for option, text in given:
        name, parameter, negated = _named(entry, known, option)
        if _is_bool(parameter.annotation):
            if text is not None:
                raise ValueError(f"--{option} takes no value, and was given {text!r}")
            values[name] = not negated
        elif text is None:
            raise ValueError(f"--{option} needs a value: {option_name(parameter)}")
        else:
            values[name] = _converted(option, text, parameter)
    return values


def _named(entry: Entry, known: dict[str, inspect.Parameter], option: str) -> tuple[str, inspect.Parameter, bool]:
    option = ALIASES.get(option, option)
    name = option.replace("-", "_")
    if name in known:
        return name, known[name], False
    positive = name.removeprefix("no_")
    if positive != name and positive in known and _is_bool(known[positive].annotation):
        return positive, known[positive], True
    shown = ", ".join(option_name(p) for p in known.values()) or "none"
    raise ValueError(f"{entry.slug} has no setting --{option}; its settings: {shown}")


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation that can be typed on a command line: none first, plain text last."""
    alternatives = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    readable = [a for a in alternatives if _reader(a) is not None]
    if readable == [types.NoneType] and len(alternatives) > 1:
        return ()
    return tuple(sorted(readable, key=lambda kind: (kind is not types.NoneType, kind is str)))


def _is_bool(annotation: Any) -> bool:
    return bool in _members(annotation)


def _spelled(kind: Any) -> str:
    if kind is types.NoneType:
        return "none"
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if _is_scores(kind):
        return "SCORES-FILE"
    return {int: "N", float: "X", str: "NAME"}.get(kind, "N,N,...")


def _is_scores(kind: Any) -> bool:
    return getattr(kind, "__qualname__", None) == "Scores" and getattr(kind, "__module__", None) == "whatmatters.core.scores"


def _reader(kind: Any) -> Callable[[str], Any] | None:
    """What reads text as that type; None where nothing does (functions, tensors)."""
    if kind is types.NoneType:
        return _none
    if kind in (bool, int, float, str):
        return kind
    if typing.get_origin(kind) is typing.Literal:
        return lambda text: _choice(text, typing.get_args(kind))
    if typing.get_origin(kind) in (tuple, list, Sequence) and typing.get_args(kind)[0] in (int, float, str):
        item = typing.get_args(kind)[0]
        return lambda text: tuple(item(part) for part in text.split(","))
    if _is_scores(kind):
        return _scores
    return None


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    return next(choice for choice in choices if str(choice) == text)


def _scores(text: str) -> Any:
    from pathlib import Path

    if not Path(text).is_file():
        raise ValueError
    from whatmatters.core.scores import Scores

    return Scores.load(text)


def _converted(option: str, text: str, parameter: inspect.Parameter) -> Any:
    members = _members(parameter.annotation)
    if not members:
        raise ValueError(f"--{option} cannot be given on the command line; use the Python function")
    for kind in members:
        reader = _reader(kind)
        try:
            return reader(text) if reader is not None else None
        except (ValueError, StopIteration):
            continue
    raise ValueError(f"--{option} {text!r} is not what it takes: {option_name(parameter)}")


class SettingsCommand(TyperCommand):
    """A command that takes, beside its own options, the settings of the method that is chosen on its line.

    A subclass says how the method is chosen: `entry(args)`. The catalog is imported only when there is an option to look up.
    """

    def entry(self, args: Sequence[str]) -> Entry:
        """The chosen method or scorer."""
        raise NotImplementedError

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the settings out of the arguments before the command's own options are read."""
        own = {name for param in self.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        rest, given = [], []
        entry: Entry | None = None
        waiting = list(args)
        while waiting:
            token = waiting.pop(0)
            option, equals, value = token.partition("=")
            if not option.startswith("--") or len(option) == 2 or option in own:
                rest.append(token)
                continue
            entry = entry or self.entry(args)
            text: str | None = value if equals else None
            if not equals and waiting and not self._is_flag(entry, option[2:]):
                text = waiting.pop(0)
            given.append((option[2:], text))
        try:
            _given.set(parsed(entry, given) if entry is not None else {})
        except ValueError as error:
            ctx.fail(str(error))
        return super().parse_args(ctx, rest)

    @staticmethod
    def _is_flag(entry: Entry, option: str) -> bool:
        """Whether the option takes no value; an unknown one is treated as if, and refused afterwards."""
        try:
            _, parameter, _ = _named(entry, settings_of(entry), option)
        except ValueError:
            return True
        return _is_bool(parameter.annotation)


def option_value(args: Sequence[str], option: str) -> str | None:
    """What is given after an option on a command line, before it is parsed; the last one counts."""
    value = None
    for place, token in enumerate(args):
        if token == option and place + 1 < len(args):
            value = args[place + 1]
        elif token.startswith(f"{option}="):
            value = token.partition("=")[2]
    return value


def given_settings() -> dict[str, Any]:
    """The settings of the method on the line of the command that runs."""
    return dict(_given.get({}))
