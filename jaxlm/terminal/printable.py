"""Text of unknown origin, made safe to show on a terminal or in a message."""

import re
import reprlib
from typing import Any

# Python 3.11 takes no limits as arguments.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxdict = 8
# Control characters could move the cursor; newlines and tabs are harmless.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Replaces control characters, which could move a terminal's cursor."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def shown(name: Any) -> str:
    """Formats a name for a message: quoted if it is odd."""
    if not isinstance(name, str):
        return f"of type {type(name).__name__}"
    short = name if len(name) <= 120 else f"{name[:100]}..."
    return short if short.isprintable() and " " not in short and short else repr(short)


def one_line(message: str, most: int = 300) -> str:
    """Returns a message as one line: signs that move a cursor escaped, a middle cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    end = most // 3
    return line if len(line) <= most else f"{line[: most - end - 5]} ... {line[-end:]}"


def error_line(error: BaseException, most: int = 300) -> str:
    """Returns what an exception says as one line, or its type if it says nothing."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, most)


def shown_value(value: Any) -> str:
    """Formats a value for a message as `repr` does, but with at most a few parts."""
    return _REPR.repr(value)
