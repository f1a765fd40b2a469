"""Compares attention with its peers on this device, in one run.

python benchmarks/attention.py [--lengths 128 ... 4096] [--rounds 5] [--out FILE]

For each length it times forward, and forward with backward, of every implementation
that can run (`pallas_gpu` also with each kind of its kernels), of
`jax.nn.dot_product_attention`, and of JAX's stock Pallas kernel and tokamax where they
run: with a causal mask, with a window of an eighth, and with rows of eight documents.
Rounds alternate between all of them, so that disturbances affect all; figures are
medians. Ratios are the time of `jax.nn.dot_product_attention` divided by the other's:
higher is faster.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
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
MASKS = ("causal", "window", "packed")


def make_mask(kind: str, batch: int, T: int) -> Mask:
    """Returns a mask of a kind in `MASKS`."""
    if kind == "window":
        return Mask(window=max(T // 8, 16))
    if kind == "packed":
        ends = np.sort(np.random.default_rng(0).integers(1, T, (batch, 7)), axis=1)
        ids = (np.arange(T)[None, :, None] >= ends[:, None]).sum(axis=-1)
        ids = jnp.asarray(ids, jnp.int32)
        return Mask(query_segments=ids, key_segments=ids)
    return Mask()


def visible_scores(mask: Mask, T: int) -> float:
    """Returns the number of scores per row and head that are not hidden."""
    if mask.query_segments is not None:
        lengths = [np.unique(row, return_counts=True)[1] for row in mask.query_segments]
        return sum(float((x.astype(float) ** 2).sum()) for x in lengths) / (
            2 * len(lengths)
        )
    if mask.window is not None:
        return mask.window * (T - mask.window / 2)
    return T * T / 2


def peer(q, k, v, mask: Mask, function: Callable, **options):
    """Runs jax.nn's function, or tokamax's, which has the same arguments."""
    scale = q.shape[-1] ** -0.5
    if mask.window is not None:
        options["local_window_size"] = (mask.window - 1, 0)
    if mask.query_segments is not None:
        options["mask"] = mask.array(q.shape[1], k.shape[1])[:, None]
    return function(q, k, v, scale=scale, is_causal=True, **options)


def stock_pallas(q, k, v):
    """Runs JAX's Pallas kernel of the platform, which does not support GQA."""
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


def tokamax(q, k, v, mask: Mask):
    import tokamax

    kind = "triton" if jax.default_backend() == "gpu" else None
    function = tokamax.dot_product_attention
    return peer(q, k, v, mask, function, implementation=kind)


def contestants(q, k, mask: Mask) -> dict[str, Callable]:
    """Returns everything that can run here, by name."""
    spec = AttentionSpec(q.shape[-1] ** -0.5, mask)
    what = request(q, k, spec)
    jax_nn = partial(peer, mask=mask, function=jax.nn.dot_product_attention)
    found: dict[str, Callable] = {PEER: jax_nn}
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.declines(what) is None:
            found[name] = lambda q, k, v, run=implementation.run: run(q, k, v, spec)[0]
    segments = mask.query_segments is not None
    if "pallas_gpu" in found:
        from jaxlm.ops.attention.gpu import pallas_gpu

        for kernels in ("plain", "specialized"):
            settings = pallas_gpu.default_settings(q, segments, kernels)
            run = partial(pallas_gpu.attention, spec=spec, settings=settings)
            found[f"pallas_gpu, {kernels}"] = lambda *qkv, run=run: run(*qkv)[0]
    if what.platform != "cpu":
        if find_spec("tokamax"):
            found["tokamax"] = partial(tokamax, mask=mask)
        if mask.window is None and not segments:
            found["stock pallas"] = stock_pallas
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


def compare(T: int, head_dim: int, kind: str, rounds: int, seconds: float) -> list:
    """Returns two rows, forward and with backward: medians in ms, ratios, failures."""
    batch = max(1, 8192 // T)
    dtype = compute_dtype("auto")
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    arguments = [
        jax.random.normal(key, (batch, T, n, head_dim), dtype)
        for key, n in zip(keys, sizes, strict=True)
    ]
    mask = make_mask(kind, batch, T)
    failed: dict[tuple[str, bool], str] = {}

    def build(case):
        (name, run), backward = case
        has_scores = name in ("reference", "dense", PEER)
        if has_scores and batch * HEADS * T * T > MAX_SCORES:
            failed[name, backward] = "its scores would not fit"
            return None
        try:
            return compiled(run, backward, *arguments)
        except Exception as error:  # peers raise classes of their own
            reason = (str(error) or repr(error)).splitlines()[0]
            failed[name, backward] = reason[:200]
            return None

    found = contestants(*arguments[:2], mask)
    cases = list(itertools.product(found.items(), (False, True)))
    # Compilers of accelerators run beside each other.
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else 12) as pool:
        built = list(pool.map(build, cases))
    rows = []
    for backward in (False, True):
        programs = {
            name: program
            for ((name, _), which), program in zip(cases, built, strict=True)
            if program is not None and which == backward
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name, program in programs.items():
                times[name].append(time_one(program, arguments, seconds))
        medians = {name: statistics.median(found) for name, found in times.items()}
        flops = 4 * batch * HEADS * head_dim * visible_scores(mask, T)
        flops *= 3.5 if backward else 1
        rows.append(
            {
                "shape": {"B": batch, "T": T, "N": HEADS, "K": KV_HEADS, "H": head_dim},
                "mask": kind,
                "what": "forward and backward" if backward else "forward",
                "ms": {name: round(1e3 * found, 4) for name, found in medians.items()},
                "tflops": {
                    n: round(flops / found / 1e12, 3) for n, found in medians.items()
                },
                "ratio": {
                    n: round(medians[PEER] / found, 3)
                    for n, found in medians.items()
                    if PEER in medians
                },
                "failed": {n: why for (n, w), why in failed.items() if w == backward},
            }
        )
    return rows


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
    parser.add_argument("--masks", choices=MASKS, nargs="+", default=list(MASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each timing")
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
    for head_dim, T, kind in itertools.product(
        options.head_dims, options.lengths, options.masks
    ):
        for row in compare(T, head_dim, kind, options.rounds, options.seconds):
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
