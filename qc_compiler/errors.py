"""The catalogue of errors: one class per kind of mistake.

`ValueError`'s family is what the user did; an `InvariantError` is what we did. The first line of a message says what
is wrong with which value, since Dynamo shows it behind text of its own.
"""

import difflib
from collections.abc import Iterable


class QuantCacheError(Exception):
    """Base of every error that quantcache raises on purpose."""


class OptionError(QuantCacheError, ValueError):
    """An option has an unknown name or a value it cannot take."""


class PlanError(QuantCacheError, ValueError):
    """A plan file is damaged, or was made for another model or another number of steps."""


class PackedFileError(QuantCacheError, ValueError):
    """A file of packed weights is damaged, or belongs to another model."""


class UnsupportedModelError(QuantCacheError):
    """The model cannot be cached, and `strict` forbids running it as plain Inductor."""


class PassError(QuantCacheError):
    """A pass failed; the message names the pass."""


class InvariantError(PassError):
    """A pass left a graph behind that breaks an invariant of `verify`."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns the end of a sentence that helps with a misspelt name.

    >>> nearest("treshold", ["threshold", "interval"])
    "did you mean 'threshold'? valid: interval, threshold"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"
