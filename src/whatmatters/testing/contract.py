"""The contract: what every catalog entry promises, each promise a plain function that raises where it is not kept. Needs no pytest.

`checks(entry)` are those that apply to an entry: general ones, and those of its form. `run(entry)` executes them. A check looks at
parameters, flags and forms and never at a name: a new entry is held to the contract without being listed anywhere.
"""

import contextlib
import dataclasses
import doctest
import functools
import importlib
import inspect
import io
import itertools
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whatmatters.core import catalog
from whatmatters.core.catalog import Entry
from whatmatters.core.errors import WhatMattersError
from whatmatters.testing.forms import Check, Form, form, form_names
from whatmatters.testing.state import (
    State,
    changes,
    global_state,
    kept_random_state,
    outline_of,
    random_state,
    state_of,
)

__all__ = ["Check", "Result", "checks", "every_entry", "run"]

ROOT: Path | None = next((p for p in Path(__file__).resolve().parents if (p / "tests" / "test_contract.py").exists()), None)
"""The checkout that this package is part of, where there is one: evidence, tests and mutations are beside it."""

DEVICE = torch.device("cpu")
"""Where subjects are put; see `on_device`."""


@dataclass(frozen=True)
class Result:
    """What came of one check of one entry: `error` is None where it holds."""

    entry: Entry
    check: str
    seconds: float
    error: BaseException | None


def every_entry() -> list[Entry]:
    """All methods, baselines and scorers there are."""
    return [*catalog.methods(), *catalog.scorers()]


def checks(entry: Entry, *, root: Path | None = None, device_only: bool = False) -> list[Check]:
    """The checks that apply to an entry, in order.

    Args:
        entry: of the catalog, or of the same making.
        root: the checkout, for the checks of what stands beside the package: evidence, tests, mutations, docs. None: leave those out.
        device_only: leave out what is the same on every machine.
    """
    forms = form(entry).checks if entry.form in form_names() else ()
    candidates = [*GENERAL, *forms, *(beside(root) if root is not None else ())]
    return [check for check in candidates if check.applies(entry) and (check.device or not device_only)]


def run(
    entry: Entry, *, root: Path | None = None, device_only: bool = False, device: str | torch.device = "cpu",
    told: Callable[[Result], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Execute all checks of an entry; one that fails does not stop the others.

    Args:
        entry: of the catalog, or of the same making.
        root: see `checks`.
        device_only: see `checks`.
        device: where models and tensors are put.
        told: given each result as it comes.
    """
    results = []
    with on_device(device):
        for check in checks(entry, root=root, device_only=device_only):
            start = time.perf_counter()
            error: BaseException | None = None
            try:
                check.run(entry)
            except KeyboardInterrupt:
                raise
            except Exception as caught:
                error = caught
            results.append(Result(entry, check.name, time.perf_counter() - start, error))
            if told is not None:
                told(results[-1])
    return results


@contextlib.contextmanager
def on_device(device: str | torch.device) -> Iterator[None]:
    """Put subjects on a device inside the `with`."""
    global DEVICE
    before, DEVICE = DEVICE, torch.device(device)
    _baseline.cache_clear()
    try:
        yield
    finally:
        DEVICE = before
        _baseline.cache_clear()


# ---- calling an entry


def parameters(entry: Entry) -> Mapping[str, inspect.Parameter]:
    """The parameters of the entry point, by name."""
    return inspect.signature(entry.function).parameters


def settings(entry: Entry) -> dict[str, Any]:
    """The form's samples that the entry takes."""
    return {name: value for name, value in form(entry).samples.items() if name in parameters(entry)}


def subject(entry: Entry, seed: int = 0) -> Any:
    """A fresh subject on the device."""
    return moved(form(entry).subject(seed))


def moved(value: Any) -> Any:
    """Modules and tensors on the device; data sets and the rest stay where they are."""
    if DEVICE.type == "cpu":
        return value
    if isinstance(value, nn.Module | Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple | list):
        return type(value)(map(moved, value))
    return {name: moved(part) for name, part in value.items()} if isinstance(value, dict) else value


def call(entry: Entry, on: Any, **more: Any) -> Any:
    """Call the entry with the samples and what is given."""
    return form(entry).call(entry, on, **{**settings(entry), **more})


def outcome(entry: Entry, result: Any, on: Any) -> dict[str, Tensor]:
    """All that the call did, copied."""
    told = {name: value.detach().clone() for name, value in form(entry).outcome(result, on).items()}
    assert told, f"the form {entry.form!r} says nothing about what {entry.slug} did; let `outcome` return tensors"
    return told


def outcome_of(entry: Entry, seed: int = 0, **more: Any) -> dict[str, Tensor]:
    """All that a call on a fresh subject does."""
    on = subject(entry, seed)
    return outcome(entry, call(entry, on, **more), on)


@functools.lru_cache(maxsize=4)
def _baseline(entry: Entry) -> tuple[Any, dict[str, Tensor]]:
    """Result and outcome of the plain call, made once for all checks that only look at them."""
    on = subject(entry)
    before = global_state()
    result = call(entry, on)
    _switched.setdefault(entry, [name for name in changes(before, global_state()) if name.startswith(("torch.", "numpy."))])
    return result, outcome(entry, result, on)


_switched: dict[Entry, list[str]] = {}
"""What the very first call of an entry changed: what is switched once for the whole process is not seen to change a second time."""


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return not changes(state_of(dict(first)), state_of(dict(second)))


def raised(entry: Entry, what: str, on: Any, advice: str, **more: Any) -> None:
    """A call must raise an error of ours, the subject being left as it was."""
    before = state_of(on)
    try:
        call(entry, on, **more)
    except WhatMattersError as error:
        differing = changes(before, state_of(on))
        assert not differing, f"refusing {what} changed the subject at {differing[:3]}; refuse before any work"
        if not inspect.isclass(entry.function):
            named = re.search(r"\n  in \w+\.\w+\(", str(error))
            assert named, f"the message about {what} does not name the operation; raise inside the entry point: {error}"
        assert len(str(error).partition("\n  in ")[0]) >= 15, f"the message about {what} says too little: {error}"
        assert isinstance(error, ValueError | TypeError | LookupError | OSError | ImportError), (
            f"{type(error).__name__} has no builtin base"
        )
        return
    except Exception as error:
        if type(error).__module__.startswith("jaxtyping"):
            return  # annotations are checked at run time here, and this one refused it before the entry could
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}; {advice}") from error
    raise AssertionError(f"{what} was taken; {advice}")


# ---- documentation and form


def ours(entry: Entry) -> bool:
    """Whether the entry belongs to the library, whose house rules it then keeps."""
    return module_of(entry).startswith("whatmatters.")


def module_of(entry: Entry) -> str:
    """Name of the module that defines the entry point."""
    return getattr(inspect.unwrap(entry.function), "__module__", "") or ""


def sections(entry: Entry) -> dict[str, str]:
    """The parts of the docstring, by heading; its beginning is the "Summary"."""
    text = inspect.getdoc(entry.function) or ""
    parts = re.split(r"^(Args|Returns|Raises|Example|References|Attributes):\n", text, flags=re.MULTILINE)
    return {"Summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def explained(entry: Entry) -> set[str]:
    """Names of the parameters that the docstring explains: those at the least indentation of its Args."""
    lines = [line for line in sections(entry).get("Args", "").splitlines() if line.strip()]
    margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    found = (re.match(" " * margin + r"\**([A-Za-z_]\w*)(?: \([^)]*\))?:", line) for line in lines)
    return {match[1] for match in found if match}


def settled(entry: Entry) -> dict[str, inspect.Parameter]:
    """The parameters without `**`."""
    return {name: p for name, p in parameters(entry).items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def summary_is_one_sentence(entry: Entry) -> None:
    assert entry.summary.endswith("."), f"end the first line of the docstring with a full stop: {entry.summary!r}"
    assert 10 <= len(entry.summary) <= 140, f"the first line of the docstring has {len(entry.summary)} characters; expected 10 to 140"


def docstring_has_its_sections(entry: Entry) -> None:
    wanted = {"Args", "Example"} | (set() if inspect.isclass(entry.function) else {"Returns"})
    assert wanted <= sections(entry).keys(), f"the docstring lacks {sorted(wanted - sections(entry).keys())}"


def errors_are_documented(entry: Entry) -> None:
    text = sections(entry).get("Raises", "")
    known = {name for name in vars(importlib.import_module("whatmatters.core.errors")) if name.endswith("Error")}
    named = set(re.findall(r"^\s*([A-Z]\w*Error)\b", text, flags=re.MULTILINE))
    assert named, "say in the section Raises which errors a caller meets"
    assert named <= known, f"{sorted(named - known)} are no errors of whatmatters.core.errors"


def parameters_are_explained(entry: Entry) -> None:
    lacking = settled(entry).keys() - explained(entry)
    assert not lacking, f"the section Args does not explain {sorted(lacking)}"


def explanations_have_their_parameter(entry: Entry) -> None:
    foreign = explained(entry) - parameters(entry).keys()
    assert not foreign, f"the section Args explains {sorted(foreign)}, which are no parameters"


def example_runs(entry: Entry) -> None:
    text = sections(entry).get("Example", "")
    assert ">>>" in text, "show a call in the section Example, with >>>"
    module = inspect.getmodule(inspect.unwrap(entry.function))
    names = dict(vars(module)) if module is not None else {}
    test = doctest.DocTestParser().get_doctest(text, names, entry.slug, None, 0)
    told = io.StringIO()
    with kept_random_state():
        failed = doctest.DocTestRunner(verbose=False).run(test, out=told.write).failed
    assert not failed, f"the example fails:\n{told.getvalue()}"


def paper_is_cited(entry: Entry) -> None:
    assert entry.paper is not None
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.paper) or "/" in entry.paper, f"{entry.paper!r} is no arXiv id"
    module = inspect.getmodule(inspect.unwrap(entry.function))
    assert entry.paper in (getattr(module, "__doc__", "") or ""), f"name arXiv {entry.paper} in the docstring of the module"
    assert entry.paper in sections(entry).get("References", ""), f"name arXiv {entry.paper} in the section References"


def settings_are_keyword_only(entry: Entry) -> None:
    for name, parameter in settled(entry).items():
        takes_default = parameter.default not in (parameter.empty, None)
        assert not takes_default or parameter.kind is parameter.KEYWORD_ONLY, (
            f"{name} has a default and can be given by position: put it after *"
        )


def defaults_are_immutable(entry: Entry) -> None:
    for name, parameter in parameters(entry).items():
        wrong = isinstance(parameter.default, list | dict | set | bytearray | Tensor | np.ndarray | torch.Generator | nn.Module)
        assert not wrong, f"the default of {name} is a {type(parameter.default).__name__}, which can be changed: use None or a tuple"


def everything_is_annotated(entry: Entry) -> None:
    lacking = [name for name, parameter in parameters(entry).items() if parameter.annotation is parameter.empty]
    assert not lacking, f"annotate {lacking}: annotations are checked when the tests run"
    returned = inspect.signature(entry.function).return_annotation
    assert inspect.isclass(entry.function) or returned is not inspect.Signature.empty, "annotate what is returned"


def slug_is_a_literal(entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.slug), f"{entry.slug!r}: use lower case, digits and single hyphens"
    module = inspect.getmodule(inspect.unwrap(entry.function))
    source = inspect.getsource(module) if module is not None else ""
    assert f'"{entry.slug}"' in source, f'write "{entry.slug}" in the file that registers it, so that it is found by searching'


def kind_and_unit_are_known(entry: Entry) -> None:
    assert entry.kind in ("method", "baseline", "scorer"), f"kind {entry.kind!r}; expected method, baseline or scorer"
    assert entry.unit in catalog.UNITS, f"unit {entry.unit!r}; expected one of {', '.join(catalog.UNITS)}"
    assert entry.job in catalog.ROOMS, f"job {entry.job!r}; expected one of {', '.join(catalog.ROOMS)}"
    assert entry.kind == "scorer" or entry.action, "say what is done with the plan: action=..."
    assert entry.kind != "scorer" or entry.when in ("ahead", "walk"), f"when is {entry.when!r}; expected 'ahead' or 'walk'"
    assert set(entry.dtypes) <= set(catalog.DTYPES) and entry.dtypes, f"dtypes are {entry.dtypes}; expected some of {catalog.DTYPES}"


def file_is_where_it_belongs(entry: Entry) -> None:
    name = module_of(entry)
    room, file = name.split(".")[1], name.rpartition(".")[2]
    assert room == entry.job, f"the entry says job {entry.job!r} and stands in the room {room!r}"
    module = importlib.import_module(name)
    public = inspect.unwrap(entry.function).__name__
    assert public in getattr(module, "__all__", ()), f"put {public!r} into __all__ of {name}"
    assert getattr(importlib.import_module(f"whatmatters.{room}"), public) is not None, f"whatmatters.{room} does not export {public}"
    if entry.kind != "scorer":
        assert file == entry.slug.replace("-", "_"), f"a method's file has its name: {entry.slug.replace('-', '_')}.py, not {file}.py"


def both_spellings_are_found(entry: Entry) -> None:
    find = catalog.get_scorer if entry.kind == "scorer" else catalog.get_method
    for name in (entry.slug, entry.slug.replace("-", "_")):
        assert find(name) == entry, f"{name!r} finds another entry: choose a slug that no other has"


def registering_twice_is_one_entry(entry: Entry) -> None:
    count = len(every_entry())
    catalog._register(entry)
    assert len(every_entry()) == count, "registering again added an entry"
    stranger = functools.partial(len)
    stranger.__module__ = "elsewhere"
    try:
        catalog._register(Entry(entry.slug, stranger, entry.kind, entry.job, entry.unit))
    except RuntimeError:
        return
    finally:
        catalog._register(entry)
    raise AssertionError(f"another module could register {entry.slug!r} too")


def listed_for_people_and_machines(entry: Entry) -> None:
    from whatmatters.cli.catalog import _described

    text = json.dumps(_described(entry), allow_nan=False)
    assert entry.summary in json.loads(text)["summary"], "the command line tells another summary"


def form_is_known(entry: Entry) -> None:
    assert entry.form in form_names(), f"form {entry.form!r}; expected one of {', '.join(form_names())}, or add forms/{entry.form}.py"


def required_settings_have_a_sample(entry: Entry) -> None:
    required = {name for name, p in parameters(entry).items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    lacking = required - form(entry).samples.keys()
    assert not lacking, f"give {sorted(lacking)} a default, or a line in the samples of the form {entry.form!r}"


# ---- what a call does


def same_call_gives_the_same_bits(entry: Entry) -> None:
    """Also under other states of the global generators: see below."""
    _, first = _baseline(entry)
    assert same(first, outcome_of(entry)), "two equal calls gave different results; draw with a generator made from `seed`"


def outcome_depends_on_the_subject(entry: Entry) -> None:
    _, first = _baseline(entry)
    assert not same(first, outcome_of(entry, seed=1)), (
        "another subject gave the very same outcome; look at what is given, or say control=True"
    )


def global_randomness_is_left_alone(entry: Entry) -> None:
    _, first = _baseline(entry)
    for seed in (1, 2):
        on = subject(entry)
        with kept_random_state():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  (the global one is what must not be touched)
            before = random_state()
            result = call(entry, on)
            drawn = changes(before, random_state())
            assert not drawn, f"the global generator of {', '.join(drawn)} was used; draw from core.seeds.generator(seed)"
            assert same(first, outcome(entry, result, on)), "the result depends on a global generator; draw from core.seeds.generator(seed)"


def process_is_left_as_found(entry: Entry) -> None:
    _baseline(entry)
    on = subject(entry)
    before = global_state()
    call(entry, on)
    differing = [*_switched.get(entry, ()), *changes(before, global_state())]
    assert not differing, f"{', '.join(differing)} is not as it was; restore it in a finally or a context manager"


def nothing_is_printed(entry: Entry) -> None:
    on = subject(entry)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        call(entry, on)
    told = out.getvalue() + err.getvalue()
    assert not told.strip(), f"printed {told.strip()[:60]!r}; tell `progress`, or put it into the result"


def inputs_are_not_modified(entry: Entry) -> None:
    on = subject(entry)
    parts = unchangeable(form(entry), on)
    before = state_of(parts)
    call(entry, on)
    differing = changes(before, state_of(parts))
    assert not differing, f"the call changed what it was given at {differing[:3]}; work on a copy"


def unchangeable(how: Form, on: Any) -> Any:
    """The parts of a subject that no call may change: all, or all but the modules and parameters of a form that changes them."""
    if not how.changes:
        return on
    if isinstance(on, nn.Module | nn.Parameter):
        return None
    if isinstance(on, tuple | list):
        return [unchangeable(how, part) for part in on]
    if dataclasses.is_dataclass(on) and not isinstance(on, type):
        return [unchangeable(how, getattr(on, field.name)) for field in dataclasses.fields(on)]
    return {name: unchangeable(how, part) for name, part in on.items()} if isinstance(on, dict) else on


def settings_are_not_modified(entry: Entry) -> None:
    given = settings(entry)
    before = state_of(given)
    form(entry).call(entry, subject(entry), **given)
    differing = changes(before, state_of(given))
    assert not differing, f"the call changed the settings it was given at {differing[:3]}; copy them"


def modes_and_hooks_are_left_as_found(entry: Entry) -> None:
    """Of everything that is there before and after; what a call adds to a module is its own affair."""
    on = subject(entry)
    for place, module in enumerate(modules_of(on)):
        module.train(place % 2 == 0)
        break
    kept = ("training", "_hooks", "_pre_hooks", ".forward", ".grad")

    def told() -> State:
        return {path: value for path, value in outline_of(on).items() if any(word in path for word in kept)}

    before = told()
    call(entry, on)
    after = told()
    differing = changes(before, after, common=True)
    left = [
        path for path in after if path not in before and (path.endswith(".forward") or "_hooks" in path) and "parametrizations" not in path
    ]
    assert not differing, f"{differing[:3]} is not as it was; restore modes and hooks in a finally or a context manager"
    added = [path for path in left if after[path] not in (("list", 0), "list")] if form(entry).undo is None else []
    assert not added, f"{added[:3]} was left in the module; remove it, or give the form `undo`"


def modules_of(on: Any) -> list[nn.Module]:
    """The modules of a subject."""
    if isinstance(on, nn.Module):
        return [on]
    parts = on.values() if isinstance(on, dict) else on if isinstance(on, tuple | list) else ()
    return [module for part in parts for module in modules_of(part)]


def undoing_gives_the_subject_back(entry: Entry) -> None:
    on, undo = subject(entry), form(entry).undo
    before = state_of(on)
    result = call(entry, on)
    assert undo is not None
    undo(result, on)
    differing = changes(before, state_of(on))
    assert not differing, f"undone, {differing[:3]} is not as it was"


def defaults_survive_a_call(entry: Entry) -> None:
    function: Any = inspect.unwrap(entry.function)
    function = function.__init__ if inspect.isclass(function) else function
    told = (function.__defaults__, function.__kwdefaults__)
    before = state_of(told)
    call(entry, subject(entry))
    assert not changes(before, state_of(told)), "a call changed a default; use None or a tuple as the default"


def two_calls_share_nothing(entry: Entry) -> None:
    first, second = (call(entry, subject(entry)) for _ in range(2))
    common = mutable_parts(first).keys() & mutable_parts(second).keys() - mutable_parts(settings(entry)).keys()
    shared = [mutable_parts(first)[key] for key in common]
    assert not shared, f"two results share {shared[:3]}: make it anew in each call"


def mutable_parts(value: Any) -> dict[int, str]:
    """Identity and path of all lists, dictionaries, sets, arrays and tensors inside a value."""
    found: dict[int, str] = {}
    seen: dict[int, Any] = {}
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        path, part = left.pop()
        if id(part) in seen or isinstance(part, type) or inspect.isroutine(part) or inspect.ismodule(part):
            continue
        seen[id(part)] = part
        if isinstance(part, Tensor | np.ndarray | list | dict | set):
            found[id(part)] = path or "itself"
        if isinstance(part, Mapping):
            left += [(f"{path}[{key!r}]", item) for key, item in part.items()]
        elif isinstance(part, list | tuple):
            left += [(f"{path}[{place}]", item) for place, item in enumerate(part)]
        elif hasattr(part, "__dict__") and not isinstance(part, Tensor):
            left += [(f"{path}.{name}", item) for name, item in vars(part).items()]
    return found


def outcome_is_finite(entry: Entry) -> None:
    _, told = _baseline(entry)
    wrong = [name for name, value in told.items() if not bool(torch.isfinite(value).all())]
    assert not wrong, f"{wrong[:3]} hold NaN or infinity on an ordinary subject"


def saves(entry: Entry) -> bool:
    """Whether the result can be saved and its class loads; a call that fails is met by the checks before."""
    try:
        result, _ = _baseline(entry)
    except Exception:
        return False
    return callable(getattr(result, "save", None)) and callable(getattr(type(result), "load", None))


def result_survives_a_file(entry: Entry) -> None:
    on = subject(entry)
    result = call(entry, on)
    first = outcome(entry, result, on)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        result.save(path)
        files = [file for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
        assert files, "`save` wrote nothing at its path"
        for file in files:
            head = file.read_bytes()[:2]
            assert head[:1] != b"\x80" and head != b"PK", f"{file.name} looks like a pickle; write safetensors and JSON"
        loaded = type(result).load(path)
        assert same(first, outcome(entry, loaded, on)), "what was saved and loaded differs"


def describes_itself(entry: Entry) -> bool:
    """Whether the result has `to_json`."""
    try:
        return callable(getattr(_baseline(entry)[0], "to_json", None))
    except Exception:
        return False


def result_is_strict_json(entry: Entry) -> None:
    json.loads(json.dumps(_baseline(entry)[0].to_json(), allow_nan=False))


# ---- interruptions and refusals


def tells_progress(entry: Entry) -> bool:
    """Whether the entry takes `progress`."""
    return "progress" in parameters(entry)


def progress_is_told_in_order(entry: Entry) -> None:
    told: list[tuple[str, int, int]] = []
    call(entry, subject(entry), progress=lambda label, done, total: told.append((label, done, total)))
    assert told, "`progress` was never called"
    for label, steps in itertools.groupby(told, key=lambda step: step[0]):
        rows = list(steps)
        assert label and len({total for _, _, total in rows}) == 1, f"{label!r} tells several totals"
        done = [number for _, number, _ in rows]
        assert done == sorted(done) and done[0] >= 0 and done[-1] == rows[0][2], (
            f"{label!r} tells {done} of {rows[0][2]}; count up to the total"
        )


def interrupted(entry: Entry, at: int | None) -> None:
    """Raise KeyboardInterrupt at a call of progress (None: the last); all must be as before."""
    counted: list[int] = []
    call(entry, subject(entry), progress=lambda label, done, total: counted.append(done))
    wanted = len(counted) - 1 if at is None else at
    assert 0 <= wanted < len(counted), f"`progress` was told {len(counted)} times; tell it at the beginning and at the end"
    on, how = subject(entry), form(entry)
    for module in modules_of(on):
        module.train()
    whole = how.atomic or not how.changes
    look = state_of if whole else outline_of
    before, process = look(on), global_state()
    calls = itertools.count()

    def progress(label: str, done: int, total: int) -> None:
        if next(calls) == wanted:
            raise KeyboardInterrupt

    try:
        call(entry, on, progress=progress)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the interruption was swallowed; do not catch KeyboardInterrupt, or raise it again")
    differing = changes(before, look(on), common=not whole)
    assert not differing, f"interrupted, {differing[:3]} is not as it was; restore it in a finally"
    assert not changes(process, global_state()), f"interrupted, {changes(process, global_state())} is not as it was"


def bad_subjects_are_refused(entry: Entry) -> None:
    for what, broken in form(entry).bad_subjects.items():
        raised(entry, what, moved(broken(form(entry).subject(0))), "refuse it with an error of whatmatters.core.errors")


def has_bad_settings(entry: Entry) -> bool:
    """Whether the form knows bad values of a parameter of the entry."""
    return any(name in parameters(entry) and values for name, values in form(entry).bad_settings.items())


def bad_settings_are_refused(entry: Entry) -> None:
    for name, values in form(entry).bad_settings.items():
        for value in values if name in parameters(entry) else ():
            raised(entry, f"{name}={value!r}", subject(entry), "refuse it with an error that says what was expected", **{name: value})


def unknown_settings_are_refused(entry: Entry) -> None:
    on = subject(entry)
    before = state_of(on)
    try:
        call(entry, on, no_such_setting=1)
    except TypeError:
        assert not changes(before, state_of(on)), "an unknown setting was refused after work was done"
    else:
        raise AssertionError("no_such_setting=1 was taken; a mistyped setting must not pass in silence")


# ---- flags


def works_without_gradients(entry: Entry) -> None:
    on = subject(entry)
    for module in modules_of(on):
        module.requires_grad_(False)
    with torch.inference_mode():
        told = outcome(entry, call(entry, on), on)
    assert same(_baseline(entry)[1], told), "the outcome is another one without gradients: say needs_gradients=True"


def gradients_are_really_needed(entry: Entry) -> None:
    on = subject(entry)
    try:
        with torch.inference_mode():
            told = outcome(entry, call(entry, on), on)
    except Exception:
        return
    assert not same(_baseline(entry)[1], told), "it runs under inference_mode all the same: say needs_gradients=False"


def knows_text(entry: Entry) -> bool:
    """Whether the form can take the text away."""
    return form(entry).without_text is not None


def text_is_needed_as_claimed(entry: Entry) -> None:
    without = form(entry).without_text
    if without is None:
        assert not entry.needs_text, f"the form {entry.form!r} has no text: say needs_text=False, or give the form `without_text`"
        return
    on = moved(without(form(entry).subject(0)))
    if entry.needs_text:
        raised(entry, "a call without text", on, "ask for calibration data with a DataError, or say needs_text=False")
        return
    assert outcome(entry, call(entry, on), on), "say needs_text=True"  # text may be used where it is given


def dtypes_are_as_claimed(entry: Entry) -> None:
    how = form(entry)
    assert how.cast is not None
    for name in catalog.DTYPES:
        dtype = getattr(torch, name)
        on = moved(how.cast(how.subject(0), dtype))
        if name not in entry.dtypes:
            raised(entry, f"a subject in {name}", on, f"refuse it, or name {name} in dtypes=")
            continue
        told = outcome(entry, call(entry, on), on)
        assert all(bool(torch.isfinite(value).all()) for value in told.values()), f"not finite in {name}: leave it out of dtypes="
        wrong = {str(p.dtype) for module in modules_of(on) for p in module.parameters() if p.is_floating_point()} - {str(dtype)}
        assert not wrong, f"a module in {name} came back with {sorted(wrong)}"


# ---- beside the package


def beside(root: Path) -> list[Check]:
    """Checks of what stands beside the package in its repository."""

    def evidence_is_fresh(entry: Entry) -> None:
        from whatmatters.reproduce._common import digest

        path = root / "evidence" / f"{entry.slug}.json"
        assert path.exists(), f"there is no {path.name}: run `whatmatters reproduce {entry.slug}`"
        record = json.loads(path.read_text(encoding="utf-8"))
        keys = {"slug", "claims", "results", "seeds", "versions", "seconds", "peak_bytes", "commit", "digest"}
        assert keys <= record.keys(), f"the evidence lacks {sorted(keys - record.keys())}"
        assert record["claims"], "the evidence holds no claim"
        for claim in record["claims"]:
            lacking = {"claim", "tier", "verdict", "effect", "interval", "smallest_effect"} - claim.keys()
            assert not lacking, f"a claim lacks {sorted(lacking)}"
            assert claim["verdict"] in ("shown", "refuted", "inconclusive"), f"verdict {claim['verdict']!r}"
            assert claim["tier"] in ("exact", "planted", "desk", "public", "arithmetic"), f"tier {claim['tier']!r}"
        assert len(record["seeds"]) >= 3, "fewer than 3 seeds prove nothing"
        experiment = importlib.import_module(f"whatmatters.reproduce.{entry.slug.replace('-', '_')}")
        assert record["digest"] == digest(entry.slug, experiment), f"the code has changed since: run `whatmatters reproduce {entry.slug}`"

    def has_tests_and_a_page(entry: Entry) -> None:
        for path in (
            root / "tests" / entry.job / f"test_{entry.slug.replace('-', '_')}.py",
            root / "docs" / "methods" / f"{entry.slug}.md",
        ):
            assert path.exists(), f"write {path.relative_to(root)}"

    def has_a_mutation(entry: Entry) -> None:
        from whatmatters.testing.mutations import read

        mutation = read(root, entry)
        mutation.applied(root)

    return [
        Check("evidence-is-fresh", evidence_is_fresh, lambda entry: ours(entry) and entry.kind == "method", device=False),
        Check("has-tests-and-a-page", has_tests_and_a_page, lambda entry: ours(entry) and entry.kind == "method", device=False),
        Check("has-a-mutation", has_a_mutation, ours, device=False),
    ]


def _at(place: int | None) -> Callable[[Entry], None]:
    return lambda entry: interrupted(entry, place)


def _has(part: str) -> Callable[[Entry], bool]:
    return lambda entry: bool(getattr(form(entry), part))


def _takes_no_more(entry: Entry) -> bool:
    return not any(p.kind is p.VAR_KEYWORD for p in parameters(entry).values())


GENERAL: Sequence[Check] = (
    Check("summary-is-one-sentence", summary_is_one_sentence, device=False),
    Check("docstring-has-its-sections", docstring_has_its_sections, ours, device=False),
    Check("errors-are-documented", errors_are_documented, lambda entry: ours(entry) and entry.kind != "scorer", device=False),
    Check("parameters-are-explained", parameters_are_explained, ours, device=False),
    Check("explanations-have-their-parameter", explanations_have_their_parameter, ours, device=False),
    Check("example-runs", example_runs, ours, device=False),
    Check("paper-is-cited", paper_is_cited, lambda entry: ours(entry) and entry.paper is not None, device=False),
    Check("settings-are-keyword-only", settings_are_keyword_only, device=False),
    Check("defaults-are-immutable", defaults_are_immutable, device=False),
    Check("everything-is-annotated", everything_is_annotated, ours, device=False),
    Check("slug-is-a-literal", slug_is_a_literal, ours, device=False),
    Check("kind-and-unit-are-known", kind_and_unit_are_known, device=False),
    Check("file-is-where-it-belongs", file_is_where_it_belongs, ours, device=False),
    Check("both-spellings-are-found", both_spellings_are_found, ours, device=False),
    Check("registering-twice-is-one-entry", registering_twice_is_one_entry, ours, device=False),
    Check("listed-for-people-and-machines", listed_for_people_and_machines, ours, device=False),
    Check("form-is-known", form_is_known, device=False),
    Check("required-settings-have-a-sample", required_settings_have_a_sample, device=False),
    Check("same-call-gives-the-same-bits", same_call_gives_the_same_bits),
    Check("outcome-depends-on-the-subject", outcome_depends_on_the_subject, lambda entry: not entry.control),
    Check("global-randomness-is-left-alone", global_randomness_is_left_alone),
    Check("process-is-left-as-found", process_is_left_as_found),
    Check("nothing-is-printed", nothing_is_printed, device=False),
    Check("inputs-are-not-modified", inputs_are_not_modified),
    Check("settings-are-not-modified", settings_are_not_modified, lambda entry: bool(settings(entry)), device=False),
    Check("modes-and-hooks-are-left-as-found", modes_and_hooks_are_left_as_found, lambda entry: bool(modules_of(form(entry).subject(0)))),
    Check("undoing-gives-the-subject-back", undoing_gives_the_subject_back, _has("undo")),
    Check("defaults-survive-a-call", defaults_survive_a_call, device=False),
    Check("two-calls-share-nothing", two_calls_share_nothing, device=False),
    Check("outcome-is-finite", outcome_is_finite),
    Check("result-survives-a-file", result_survives_a_file, saves),
    Check("result-is-strict-json", result_is_strict_json, describes_itself, device=False),
    Check("progress-is-told-in-order", progress_is_told_in_order, tells_progress, device=False),
    Check("first-interruption-leaves-no-trace", _at(0), tells_progress),
    Check("second-interruption-leaves-no-trace", _at(1), tells_progress),
    Check("last-interruption-leaves-no-trace", _at(None), tells_progress),
    Check("bad-subjects-are-refused", bad_subjects_are_refused, _has("bad_subjects")),
    Check("bad-settings-are-refused", bad_settings_are_refused, has_bad_settings),
    Check("unknown-settings-are-refused", unknown_settings_are_refused, _takes_no_more, device=False),
    Check("works-without-gradients", works_without_gradients, lambda entry: not entry.needs_gradients),
    Check("gradients-are-really-needed", gradients_are_really_needed, lambda entry: entry.needs_gradients),
    Check("text-is-needed-as-claimed", text_is_needed_as_claimed),
    Check("dtypes-are-as-claimed", dtypes_are_as_claimed, _has("cast")),
)
"""In the order in which an author will want to read them: what is wrong with the file, with the call, with its promises."""
