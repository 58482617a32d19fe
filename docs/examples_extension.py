"""Docstrings here say "Example:", as people write; the parser of the docs knows "Examples:" as the section that holds code."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Renames the section before the docstring is parsed."""

    def on_instance(self, *, obj: Object, **options: Any) -> None:
        """Called for every object that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
