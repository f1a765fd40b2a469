"""What files contain, as messages show it: short, in one line, nothing invisible."""

import reprlib
from typing import Any

# Python 3.11 takes no limits as arguments.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxdict = 8


def shown(name: Any) -> str:
    """Formats a name for a message: quoted if it is odd."""
    if not isinstance(name, str):
        return f"of type {type(name).__name__}"
    short = name if len(name) <= 120 else f"{name[:100]}..."
    return short if short.isprintable() and " " not in short and short else repr(short)


def shown_value(value: Any) -> str:
    """Formats a value for a message as `repr` does, but with at most a few parts."""
    return _REPR.repr(value)
