"""Compares attention with its peers on this device, in one run.

python benchmarks/attention.py [--lengths 128 ... 4096] [--rounds 5] [--out FILE]

For each length it times forward, and forward with backward, causal and with a window of
an eighth, of every implementation that can run (`pallas_gpu` with each of its forward
kernels), of `jax.nn.dot_product_attention`, and of JAX's stock Pallas kernel and
tokamax where they run. Rounds alternate between all of them, so that disturbances
affect all; figures are medians. Ratios are the time of `jax.nn.dot_product_attention`
divided by the other's: higher is faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from train_step import measure_peak_flops

from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS
from jaxlm.ops.attention.request import request
from jaxlm.ops.attention.spec import AttentionSpec, Mask
from jaxlm.ops.linear import compute_dtype

RESULTS = Path(__file__).parent / "results"
PEER = "jax.nn"
# More scores than this would not fit in memory.
MAX_SCORES = 2**33
HEADS, KV_HEADS = 8, 2


def peer(q, k, v, window: int | None, function: Callable, **options):
    """Runs jax.nn's function, or tokamax's, which has the same arguments."""
    scale = q.shape[-1] ** -0.5
    options["local_window_size"] = None if window is None else (window - 1, 0)
    return function(q, k, v, scale=scale, is_causal=True, **options)


def stock_pallas(q, k, v, window: int | None):
    """Runs JAX's Pallas kernel of the platform, which does not support GQA."""
    assert window is None
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    if jax.default_backend() == "tpu":
        from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        z = flash_attention(q, k, v, causal=True, sm_scale=scale)
        return z.swapaxes(1, 2)
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, None, causal=True, sm_scale=scale)


def tokamax(q, k, v, window: int | None):
    import tokamax

    kind = "triton" if jax.default_backend() == "gpu" else None
    function = tokamax.dot_product_attention
    return peer(q, k, v, window, function, implementation=kind)


def contestants(q, k, window: int | None) -> dict[str, Callable]:
    """Returns everything that can run here, by name."""
    spec = AttentionSpec(q.shape[-1] ** -0.5, Mask(window=window))
    what = request(q, k, spec)
    jax_nn = partial(peer, window=window, function=jax.nn.dot_product_attention)
    found: dict[str, Callable] = {PEER: jax_nn}
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.declines(what) is None:
            found[name] = lambda q, k, v, run=implementation.run: run(q, k, v, spec)[0]
    if "pallas_gpu" in found:
        from jaxlm.ops.attention.gpu import pallas_gpu

        del found["pallas_gpu"]
        for forward in ("plain", "specialized"):
            settings = pallas_gpu.default_settings(q, forward)
            run = partial(pallas_gpu.attention, spec=spec, settings=settings)
            found[f"pallas_gpu, {forward}"] = lambda *qkv, run=run: run(*qkv)[0]
    if what.platform != "cpu":
        found["tokamax"] = partial(tokamax, window=window)
        if window is None:
            found["stock pallas"] = partial(stock_pallas, window=None)
    return found


def compiled(run: Callable, backward: bool, *arguments) -> Callable:
    def total(q, k, v):
        return jnp.sum(run(q, k, v).astype(jnp.float32))

    timed = jax.jit(jax.grad(total, (0, 1, 2)) if backward else run)
    return timed.lower(*arguments).compile()


def time_one(run: Callable, arguments, seconds: float) -> float:
    """Measures mean seconds per call, over calls that take about `seconds` in total."""
    started = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    count = max(1, int(seconds / max(time.perf_counter() - started, 1e-6)))
    started = time.perf_counter()
    for _ in range(count):
        out = run(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / count


def compare(T: int, head_dim: int, backward: bool, window: int | None, rounds: int):
    """Returns medians in ms, ratios, and which could not run and why."""
    batch = max(1, 8192 // T)
    dtype = compute_dtype("auto")
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    arguments = [
        jax.random.normal(key, (batch, T, n, head_dim), dtype)
        for key, n in zip(keys, sizes, strict=True)
    ]
    programs, failed = {}, {}
    for name, run in contestants(*arguments[:2], window).items():
        has_scores = name in ("reference", "dense", PEER)
        if has_scores and batch * HEADS * T * T > MAX_SCORES:
            failed[name] = "its scores would not fit"
            continue
        try:
            programs[name] = compiled(run, backward, *arguments)
        except Exception as error:  # peers raise classes of their own
            failed[name] = (str(error) or repr(error)).splitlines()[0][:200]
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(time_one(program, arguments, 0.2))
    medians = {name: statistics.median(found) for name, found in times.items()}
    visible = T * T / 2 if window is None else window * (T - window / 2)
    flops = 4 * batch * HEADS * head_dim * visible * (3.5 if backward else 1)
    return {
        "shape": {"B": batch, "T": T, "N": HEADS, "K": KV_HEADS, "H": head_dim},
        "window": window,
        "what": "forward and backward" if backward else "forward",
        "ms": {name: round(1e3 * found, 4) for name, found in medians.items()},
        "tflops": {n: round(flops / found / 1e12, 3) for n, found in medians.items()},
        "ratio": {
            n: round(medians[PEER] / found, 3)
            for n, found in medians.items()
            if PEER in medians
        },
        "failed": failed,
    }


def matrix_peak() -> float:
    """Measures the FLOP/s of a large matmul on this device."""
    if jax.default_backend() == "cpu":
        return measure_peak_flops(compute_dtype("auto"))
    x = jnp.ones((8192, 8192), jnp.bfloat16)
    matmul = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    return 2 * 8192**3 / min(time_one(matmul, (x, x), 0.2) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0]
    peak = matrix_peak()
    found = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "dtype": compute_dtype("auto").name,
        "matrix_peak_tflops": round(peak / 1e12, 2),
        "rows": [],
    }
    name = device.device_kind.replace(" ", "_")
    out = options.out or RESULTS / f"attention_{name}.json"
    for head_dim in options.head_dims:
        for T in options.lengths:
            for window in (None, max(T // 8, 16)):
                for backward in (False, True):
                    row = compare(T, head_dim, backward, window, options.rounds)
                    found["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    out.write_text(json.dumps(found, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
