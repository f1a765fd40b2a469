"""Checks of token ids, where they have values: outside jit."""

from typing import Any

import numpy as np
from jax.core import Tracer
from jaxtyping import Integer


def concrete_values(array: Any) -> np.ndarray | None:
    """Returns the values of an array; None while it is traced, or on other hosts."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def check_ids(name: str, ids: Integer[np.ndarray, "..."], num_ids: int) -> None:
    """Raises ValueError for ids that are not 0 to `num_ids` - 1."""
    wrong = ids[(ids < 0) | (ids >= num_ids)]
    if wrong.size:
        raise ValueError(f"{name} has the id {wrong[0]}: ids are 0 to {num_ids - 1}")
