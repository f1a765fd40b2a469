"""Times a sweep of activation patching against separate calls of the same program.

python benchmarks/inside.py [--batch-size 48] [--separate 60]

A model of SmolLM2-135M's shape with random parameters, in float32: the residual stream
of each of 30 layers and 16 positions is set to that of another text. One compiled sweep
does all 480; the baseline calls a jitted function for each cell, of which it times as
many as `--separate` says, half of them before the sweep and half after it. Prints
seconds on the wall and of the processor, their ratios, traces, memory and the largest
difference, and writes them to benchmarks/results/inside.json.

python benchmarks/inside.py --peer-python PATH

Times TransformerLens beside it instead, in a Python that has it: the same model, texts
and machine, in float32 on one core. Writes benchmarks/results/inside_peer.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timed_tasks import Task, measured
from train_step import machine

import jaxlm
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.interp.causes.logit_attribution import head_attribution, logit_direction
from jaxlm.interp.causes.patching import activation_patching, metric_of
from jaxlm.model.trace import absent_sites

LENGTH, LONG = 16, 128
METRIC = 100, 200
CLOCKS = ("wall", "processor")
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "inside.json"
PEER_RESULTS = HERE / "results" / "inside_peer.json"


def metric(logits):
    return logits[0, METRIC[0]] - logits[0, METRIC[1]]


def timed(function):
    """Returns seconds on the wall and of the processor, and the result."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = function()
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def compare(python: str, separate: int) -> None:
    """Times what both can do: seconds of the processor, on one core."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    config = dataclasses.replace(jaxlm.preset("smollm2-135m"), dtype="float32")
    params = jax.jit(partial(jaxlm.init, config))(jax.random.key(0))
    random = np.random.default_rng(0)
    clean, corrupt = random.integers(0, config.vocab_size, (2, 1, LENGTH))
    long = random.integers(0, config.vocab_size, (1, LONG))
    shape = config.num_layers, LENGTH
    cells = random.permutation(list(np.ndindex(shape)))[:separate]

    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder) / "model", config, params, None)
        texts = [clean.tolist(), corrupt.tolist()]
        command = [python, str(HERE / "peer_inside.py"), f"{folder}/model"]
        command += [
            "--texts",
            json.dumps(texts),
            "--long-text",
            json.dumps(long.tolist()),
        ]
        command += [
            "--metric",
            json.dumps(METRIC),
            "--cells",
            json.dumps(cells.tolist()),
        ]
        command += ["--threads", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peer = json.loads(done.stdout.splitlines()[-1])

    tasks, compiled = _our_tasks(config, params, clean, corrupt, long)
    figures, results = measured(tasks)
    theirs = peer["tasks"]
    # Of the cells that the peer computed.
    per_cell = theirs["sweep"]["processor_s"] / len(cells)
    theirs["sweep"] |= {"cells": len(cells), "processor_s": per_cell * np.prod(shape)}
    grid, heads = np.asarray(results["sweep"]), np.asarray(results["head_attribution"])
    result = {
        "machine": machine(),
        "versions": {**peer["versions"], "jax": jax.__version__},
        "tokens": {"sweep": LENGTH, "others": LONG},
        "transformer_lens": theirs,
        "jaxlm": figures,
        "compile_s": compiled,
        "processor_ratio": {
            name: round(figures[name]["processor_s"] / theirs[name]["processor_s"], 3)
            for name in tasks
        },
        "largest_difference": {
            "sweep": float(np.abs(grid[tuple(cells.T)] - peer["cells"]).max()),
            "head_attribution": float(np.abs(heads.ravel() - peer["heads"]).max()),
        },
        "largest_value": {
            "sweep": float(np.abs(grid).max()),
            "head_attribution": float(np.abs(heads).max()),
        },
    }
    print(json.dumps(result, indent=1))
    PEER_RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _our_tasks(config, params, clean, corrupt, long):
    """Returns the peer's tasks in jaxlm, and the seconds that each took to compile."""
    absent = absent_sites(config)
    every = tuple(jaxlm.Tap(site) for site in jaxlm.SITES if site not in absent)

    def read(taps, params, tokens):
        out = jaxlm.forward(config, params, tokens, taps=taps)
        return out.logits, out.trace

    def attribution(params, tokens):
        taps = tuple(
            jaxlm.Tap(site, positions=(-1,)) for site in ("head_out", "final_norm_div")
        )
        trace = jaxlm.forward(config, params, tokens, taps=taps, head=False).trace
        direction = logit_direction(config, params, *METRIC)
        return head_attribution(config, params, trace, direction)[:, 0, 0]

    def sweep(params, clean, corrupt):
        source = read((jaxlm.Tap("resid_pre"),), params, clean)[1]["resid_pre"]
        return activation_patching(config, metric, params, corrupt, source)

    programs = {
        "forward": (partial(read, ()), long),
        "cache_all_sites": (partial(read, every), long),
        "cache_resid_post": (partial(read, (jaxlm.Tap("resid_post"),)), long),
        "head_attribution": (attribution, long),
        "sweep": (sweep, clean, corrupt),
    }
    tasks, seconds = {}, {}
    for name, (function, *rows) in programs.items():
        inputs = params, *(jnp.asarray(row, jnp.int32) for row in rows)
        start = time.perf_counter()
        program = jax.jit(function).lower(*inputs).compile()
        seconds[name] = round(time.perf_counter() - start, 2)
        run = partial(lambda program, *x: jax.block_until_ready(program(*x)), program)
        tasks[name] = Task(partial(run, *inputs))
    return tasks, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--separate", type=int, default=60)
    parser.add_argument("--peer-python", help="Python with TransformerLens")
    options = parser.parse_args()
    if options.peer_python is not None:
        compare(options.peer_python, options.separate)
        return

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
