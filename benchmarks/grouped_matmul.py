"""Compares the products of a mixture's experts with their peers on this device.

python benchmarks/grouped_matmul.py [--tokens 8192] [--out FILE]

At the shapes of OLMoE's experts (64, of which a token takes 8) and of a layer that
decodes one token, times the rows times the matrices, the gradient of the rows, and that
of the matrices: by each implementation of `grouped_matmul` that can, and by the kernels
for Hopper that come with JAX. Groups are uneven. Errors are relative, to f32 products
of one group after the other; each is run twice, to see that the bits are the same.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.experts.grouped_matmul import IMPLEMENTATIONS
from jaxlm.ops.linear import compute_dtype

RESULTS = Path(__file__).parent / "results"
EXPERTS, TAKEN, D, F = 64, 8, 2048, 1024
# XLA for GPUs repeats the rows for each expert, and tunes such products for minutes.
MAX_REPEATED = 4 * 2**30


def stock_kernels() -> tuple[Callable, Callable]:
    """Returns JAX's kernels for Hopper, with the best sizes that were tried."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import (
        transposed_ragged_dot,
    )

    tiles = {"block_m": 128, "block_n": 128, "block_k": 64}
    tiles |= {"max_concurrent_steps": 4, "grid_block_n": 8}

    def rows(x, w, sizes, axis):
        return ragged_dot(x, w, group_sizes=sizes, transpose_rhs=axis == 2, **tiles)

    def matrices(x, g, sizes):
        return transposed_ragged_dot(x, g, group_sizes=sizes, **tiles)

    return rows, matrices


def contestants(num_bytes: int) -> dict[str, tuple[Callable, Callable]]:
    """Returns what can run with rows of so many bytes."""
    found = dict(IMPLEMENTATIONS)
    if jax.default_backend() == "cpu":
        del found["kernel"]  # the interpreter
    elif EXPERTS * num_bytes > MAX_REPEATED:
        del found["ragged_dot"]
    if "H100" in jax.devices()[0].device_kind:
        found["jax, pallas for Hopper"] = stock_kernels()
    return found


def products(tokens: int) -> Iterator[tuple[str, int, Callable, tuple]]:
    """Yields what is multiplied: name, FLOPs, (rows, matrices) -> program, its inputs.

    The program has the inputs as arguments, too.
    """
    M, rng = tokens * TAKEN, np.random.default_rng(0)
    sizes = rng.multinomial(M, rng.dirichlet(np.full(EXPERTS, 5.0)))
    if tokens == 1:
        sizes = rng.permutation(np.repeat([1, 0], [TAKEN, EXPERTS - TAKEN]))
    sizes = jnp.asarray(sizes, jnp.int32)
    dtype, keys = compute_dtype("auto"), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (M, D), dtype)
    w = (jax.random.normal(keys[1], (EXPERTS, D, F)) * D**-0.5).astype(dtype)
    g = jax.random.normal(keys[2], (M, F), dtype)
    flops = 2 * M * D * F
    yield "rows", flops, lambda rows, _: partial(rows, axis=1), (x, w, sizes)
    if tokens > 1:
        yield "their gradient", flops, lambda r, _: partial(r, axis=2), (g, w, sizes)
        yield "that of matrices", flops, lambda _, m: m, (x, g, sizes)


def one_by_one(name: str, inputs: tuple) -> np.ndarray:
    """Multiplies one group after the other, in f32."""
    *pair, sizes = (np.asarray(x) for x in inputs)
    ends = np.cumsum(sizes)
    found = []
    with jax.default_matmul_precision("highest"):
        for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
            a = jnp.asarray(pair[0][start:end], jnp.float32)
            if name == "that of matrices":
                found.append(a.T @ jnp.asarray(pair[1][start:end], jnp.float32))
                continue
            w = jnp.asarray(pair[1][group], jnp.float32)
            found.append(a @ (w if name == "rows" else w.T))
    join = np.stack if name == "that of matrices" else np.concatenate
    return join([np.asarray(x) for x in found])


def measure(program: Callable, inputs: tuple, right: np.ndarray) -> dict:
    compiled = jax.jit(program).lower(*inputs).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    first, again = (np.asarray(compiled(*inputs), np.float32) for _ in range(2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*inputs) for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return {
        "ms": round(1e3 * statistics.median(times), 4),
        "temporaries_mib": round(temporaries / 2**20, 1),
        "error": float(np.linalg.norm(first - right) / np.linalg.norm(right)),
        "same_twice": bool(np.array_equal(first, again)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 512, 1])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kind = jax.devices()[0].device_kind.replace(" ", "_")
    out = options.out or RESULTS / f"grouped_matmul_{kind}.json"
    found: dict = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    found["shape"] = {"experts": EXPERTS, "taken": TAKEN, "D": D, "F": F}
    found["products"] = []
    for tokens in options.tokens:
        for name, flops, choose, inputs in products(tokens):
            right = one_by_one(name, inputs)
            row: dict = {"tokens": tokens, "product": name}
            for implementation, pair in contestants(inputs[0].nbytes).items():
                try:
                    one = measure(choose(*pair), inputs, right)
                    one["tflops"] = round(flops / one["ms"] / 1e9, 1)
                except Exception as error:  # peers raise classes of their own
                    one = {"failed": (str(error) or repr(error)).splitlines()[0][:200]}
                row[implementation] = one
            found["products"].append(row)
            print(json.dumps(row), flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
