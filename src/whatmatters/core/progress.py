"""Progress of long work: a function told (label, done, total). Libraries stay silent with `None`; the command line draws a bar."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""


def track(items: Iterable[T], label: str, total: int, progress: Progress | None) -> Iterator[T]:
    """Yield `items`, telling `progress` before the first and after each.

    Example:
        >>> list(track("ab", "letters", 2, lambda label, done, total: print(label, done, total)))
        letters 0 2
        letters 1 2
        letters 2 2
        ['a', 'b']
    """
    if progress is not None:
        progress(label, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        if progress is not None:
            progress(label, done, total)
