"""Errors: each says what was given, what was expected and what to do.

Every class also subclasses the builtin a Python user would expect, so `except ValueError` keeps working. Errors are raised short where
the fault is; `whatmatters.core.catalog` completes them once, at the public door, with the operation and its settings.
"""


class WhatMattersError(Exception):
    """Base of all errors this library raises on purpose."""


class InputError(WhatMattersError, ValueError):
    """A value is out of its range or does not fit the others."""


class InputTypeError(WhatMattersError, TypeError):
    """A value has the wrong type, or scores have the wrong unit for an action."""


class BudgetError(InputError):
    """A budget cannot be met; the message names the feasible range."""


class ModelError(InputError):
    """The model has no such sites, is not a causal language model, or is shaped in a way the operation cannot handle."""


class NonFiniteError(InputError):
    """NaN or infinity where numbers were expected; the message names the site."""


class DataError(InputError):
    """A text, a data file or a calibration set cannot be used."""


class FileError(WhatMattersError, OSError):
    """A path is missing, exists already, cannot be read or cannot be written."""


class FormatError(InputError):
    """A file is malformed, or a format cannot hold what it was asked to."""


class ResumeError(InputError):
    """A run cannot be resumed: the message names the inputs that changed."""


class UnknownNameError(WhatMattersError, LookupError):
    """No method, scorer or tool of that name; the message lists the known ones."""


class MissingExtraError(WhatMattersError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class RankError(WhatMattersError, RuntimeError):
    """Another rank failed, is gone, or computes something else; the message names it."""
