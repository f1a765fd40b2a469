"""Which parameters of a test always run."""

from collections.abc import Iterable

import pytest


def slow_but(quick: Iterable, names: Iterable) -> list:
    """Parameters of a test: those in `quick` always run, the others are slow proofs."""
    names, quick = list(names), list(quick)
    assert not (unknown := [name for name in quick if name not in names]), unknown
    return [
        pytest.param(name, marks=[] if name in quick else pytest.mark.slow)
        for name in names
    ]
