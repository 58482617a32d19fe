"""What a user's own scorer, plan or method must keep, and tiny models to try it on. Needs nothing that only our tests have.

    from whatmatters.testing import check_plan, check_scorer, check_scores

    check_scorer(my_scorer)                        # a scorer of one's own: everything that the library's own are held to
    check_scores(scores)                           # the laws of Scores
    check_plan(plan, scores)                       # the laws of plans

`python -m whatmatters.testing` runs the contract and the kernels on the device at hand.
"""

from collections.abc import Callable
from typing import Any

from whatmatters.core.catalog import Entry, door, get_method, scorers, with_data
from whatmatters.core.errors import InputError
from whatmatters.testing.contract import Result, run
from whatmatters.testing.laws import check_plan, check_scores

__all__ = ["check_method", "check_plan", "check_scorer", "check_scores"]


def check_scorer(
    function: Callable[..., Any], *, unit: str = "layer", when: str = "ahead", needs_text: bool = False, needs_gradients: bool = False,
    control: bool = False,
) -> list[Result]:  # fmt: skip
    """Hold a scorer of one's own to the contract of the library's scorers; it need not be registered.

    One that is registered with `@scorer` is held to what it said there; the other arguments then say nothing.

    Args:
        function: `f(model, calibration=None, *, ...) -> Scores` for `when="ahead"`, `f(context) -> Tensor` for `when="walk"`.
        unit: what it scores: "layer" or "weight" ahead, "token" in a walk.
        when: "ahead" or "walk".
        needs_text: it cannot do without calibration data.
        needs_gradients: it cannot run under `torch.inference_mode`.
        control: it is meant to know nothing.

    Returns:
        The results of all checks, every one of which holds.

    Raises:
        InputError: another `when`.
        AssertionError: checks do not hold; the message lists them and says what to do.

    Example:
        >>> import torch
        >>> from whatmatters.core.scores import Scores
        >>> from whatmatters.core.sites import structure
        >>> def depth(model, calibration=None):
        ...     '''Later blocks matter more.'''
        ...     found = structure(model)
        ...     return Scores("layer", {name: torch.tensor(float(i)) for i, name in enumerate(found.blocks)}, "depth", {}, structure=found)
        >>> depth.__module__ = "my_package"
        >>> len(check_scorer(depth, control=True)) > 15
        True
    """
    if when not in ("ahead", "walk"):
        raise InputError(f"when is {when!r}; expected 'ahead' or 'walk'")
    registered = next((entry for entry in scorers() if entry.function is function), None)
    if registered is not None:
        return _all_hold(registered)
    name = getattr(function, "__name__", type(function).__name__).replace("_", "-").strip("-").lower()
    wrapped = door(f"user.{name.replace('-', '_')}")(with_data(function) if needs_text else function)
    flags: dict[str, Any] = {"needs_text": needs_text, "needs_gradients": needs_gradients, "control": control}
    entry = Entry(name, wrapped, "scorer", "score", unit, when=when, form=when, **flags)
    return _all_hold(entry)


def check_method(slug: str) -> list[Result]:
    """Hold a method or baseline of the catalog to the contract.

    Args:
        slug: its name, with hyphens or underscores.

    Returns:
        The results of all checks, every one of which holds.

    Raises:
        UnknownNameError: no method of that name.
        AssertionError: checks do not hold; the message lists them and says what to do.

    Example:
        >>> len(check_method("rankme")) > 25
        True
    """
    return _all_hold(get_method(slug))


def _all_hold(entry: Entry) -> list[Result]:
    results = run(entry)
    failed = [f"{result.check}: {result.error}" for result in results if result.error is not None]
    if failed:
        raise AssertionError(f"{entry.slug} breaks {len(failed)} of {len(results)} checks:\n  " + "\n  ".join(failed))
    return results
