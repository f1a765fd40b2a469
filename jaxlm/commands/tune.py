"""Measure block sizes of attention on this device, and save the best ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxlm.flags import Positional, parse
from jaxlm.ops.attention.tuning import tune
from jaxlm.ops.linear import compute_dtype


@dataclass(frozen=True)
class Arguments:
    """Measure block sizes of attention on this device, and save the best ones."""

    what: Positional[Literal["attention"]]
    """What to tune."""
    implementation: str | None = None
    """Name of one; None: all that have block sizes and run here."""
    batch: int = 4
    length: int = 1024
    """Tokens per row."""
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    window: int | None = None


def main(arguments: Sequence[str], prog: str) -> int:
    """`attention [--batch B] ...`: prints the candidates, and where the best is."""
    chosen = parse(Arguments, arguments, prog=prog)
    for line in tune(
        chosen.implementation,
        batch=chosen.batch,
        length=chosen.length,
        heads=chosen.heads,
        kv_heads=chosen.kv_heads,
        head_dim=chosen.head_dim,
        dtype=compute_dtype(chosen.dtype),
        window=chosen.window,
    ):
        print(line, flush=True)
    return 0
