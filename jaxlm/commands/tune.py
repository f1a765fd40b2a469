"""Measure block sizes of attention on this device, and save the best."""

from jaxlm.flags.arguments import TuneArguments
from jaxlm.ops.attention.tuning.tuning import tune
from jaxlm.ops.linear import compute_dtype


def main(chosen: TuneArguments) -> int:
    """Prints the candidates, and where the best is; returns the exit code."""
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
