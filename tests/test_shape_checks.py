"""Functions inside of functions are checked, each with its own variables."""

import beartype
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float


def made(factor, inner=None, rows=None):
    @jaxtyping.jaxtyped(typechecker=beartype.beartype)
    def times(x: Float[np.ndarray, "n n"], by=factor) -> Float[np.ndarray, "n n"]:
        return by * (x if inner is None else inner(x))[:rows]

    return times


def test_each_call_is_of_its_own_function_and_checked():
    square = np.ones((2, 2))
    two, six, cut = made(2), made(3, inner=made(2)), made(1, rows=1)
    assert two(square)[0, 0] == 2
    assert (six(square)[0, 0], six(square, by=5)[0, 0]) == (6, 10)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameters of .*times"):
        six(np.ones((2, 3)))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"return value of .*times"):
        cut(square)
    assert two(square)[0, 0] == 2
