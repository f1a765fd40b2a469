"""Checks of shapes in functions inside of functions, prepared once for their code.

jaxtyping prepares the checks of a function when it is defined, in about 10 ms, and one
inside of another is defined in each call of that.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import jaxtyping

_prepare = jaxtyping.jaxtyped
_checked: dict[CodeType, Callable] = {}
_called = threading.local()


def jaxtyped(function: Any = None, *, typechecker: Callable) -> Any:
    """As that of jaxtyping, which adds it to each function of the packages to check."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    code = getattr(function, "__code__", None)
    if code is None or not code.co_flags & inspect.CO_NESTED:
        return _prepare(function, typechecker=typechecker)
    if code not in _checked:

        @functools.wraps(function)
        def the_one_called(*args, **kwargs):
            return _called.functions.pop()(*args, **kwargs)

        _checked[code] = _prepare(the_one_called, typechecker=typechecker)

    @functools.wraps(function)
    def call(*args, **kwargs):
        _called.__dict__.setdefault("functions", []).append(function)
        return _checked[code](*args, **kwargs)

    return call


def install() -> None:
    """For all packages that are imported from now on."""
    jaxtyping.jaxtyped = jaxtyped
