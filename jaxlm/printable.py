"""What files contain, as messages show it: short, in one line, nothing invisible."""

import reprlib
from typing import Any

_REPR = reprlib.Repr(maxstring=100, maxother=100, maxlong=100, maxlist=8, maxdict=8)


def shown(name: Any) -> str:
    """Formats a name for a message: quoted if it is odd."""
    if not isinstance(name, str):
        return f"of type {type(name).__name__}"
    short = name if len(name) <= 120 else f"{name[:100]}..."
    return short if short.isprintable() and " " not in short and short else repr(short)


def shown_value(value: Any) -> str:
    """Formats a value for a message as `repr` does, but with at most a few parts."""
    return _REPR.repr(value)
