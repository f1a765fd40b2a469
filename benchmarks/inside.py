"""Times a sweep of activation patching against separate calls of the same program.

python benchmarks/inside.py [--batch-size 48] [--separate 60]

A model of SmolLM2-135M's shape with random parameters, in float32: the residual stream
of each of 30 layers and 16 positions is set to that of another text. One compiled sweep
does all 480; the baseline calls a jitted function for each cell, of which it times as
many as `--separate` says, half of them before the sweep and half after it. Prints
seconds on the wall and of the processor, their ratios, traces, memory and the largest
difference, and writes them to benchmarks/results/inside.json.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from train_step import machine

import jaxlm
from jaxlm.interp.causes.patching import activation_patching, metric_of

LENGTH = 16
CLOCKS = ("wall", "processor")
RESULTS = Path(__file__).parent / "results" / "inside.json"


def metric(logits):
    return logits[0, 100] - logits[0, 200]


def timed(function):
    """Returns seconds on the wall and of the processor, and the result."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = function()
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--separate", type=int, default=60)
    options = parser.parse_args()

    config = dataclasses.replace(jaxlm.preset("smollm2-135m"), dtype="float32")
    params = jax.jit(partial(jaxlm.init, config))(jax.random.key(0))
    draw = np.random.default_rng(0).integers(0, config.vocab_size, (2, 1, LENGTH))
    clean, corrupt = jnp.asarray(draw, jnp.int32)
    taps = (jaxlm.Tap("resid_pre"),)
    read = jax.jit(lambda p, x: jaxlm.forward(config, p, x, taps=taps).trace)
    source = read(params, clean)["resid_pre"]

    traces = []

    def counted(logits):
        traces.append(None)
        return metric(logits)

    run = partial(activation_patching, config, counted, batch_size=options.batch_size)
    start = time.perf_counter()
    compiled = jax.jit(run).lower(params, corrupt, source).compile()
    compile_s = time.perf_counter() - start
    # The same cells follow in a smaller last batch when they do not divide.
    num_traces = len(traces)

    @jax.jit
    def single(params, source, layer, position):
        edit = jaxlm.Edit("resid_pre", "set", source, layer=layer, position=position)
        return metric_of(config, metric, params, corrupt, (edit,))

    shape = config.num_layers, LENGTH
    cells = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
    chosen = np.random.default_rng(1).permutation(cells)[: options.separate]
    single(params, source, *chosen[0]).block_until_ready()
    half = len(chosen) // 2

    def separately(cells):
        return [float(single(params, source, *cell)) for cell in cells]

    before, first = timed(lambda: separately(chosen[:half]))
    sweep, grid = timed(lambda: np.asarray(compiled(params, corrupt, source)))
    after, rest = timed(lambda: separately(chosen[half:]))
    separate = (before + after) / len(chosen) * grid.size
    values = first + rest

    wanted = grid[tuple(chosen.T)]
    result = {
        "machine": machine(),
        "patches": grid.size,
        "batch_size": options.batch_size,
        "traces": num_traces,
        "compile_s": round(compile_s, 2),
        "sweep_s": dict(zip(CLOCKS, sweep.round(2).tolist(), strict=True)),
        "separate_s": dict(zip(CLOCKS, separate.round(2).tolist(), strict=True)),
        "ratio": dict(zip(CLOCKS, (sweep / separate).round(3).tolist(), strict=True)),
        "temporaries_mib": compiled.memory_analysis().temp_size_in_bytes >> 20,
        "largest_difference": float(np.abs(wanted - values).max()),
        "spread": float(grid.std()),
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
