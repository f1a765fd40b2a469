"""Compiles kernels for devices that this machine does not have, in a child process.

Usage: python compile_case.py TARGET IMPLEMENTATION KERNELS [NAMES ...]; prints one JSON
object: name -> figures or error. KERNELS selects the GPU kernels, plain or specialized;
NAMES the cases, else all.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1]))

# Importing compile_train_step tells libtpu that there is no TPU.
import jax
import jax.numpy as jnp
import numpy as np
from compile_train_step import devices_of, figures
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ops_case import make_spec

from jaxlm.ops.attention.dispatch import attention
from jaxlm.ops.attention.gpu import pallas_gpu

ALL = ("sinks", "query_segments", "key_segments", "query_positions")
CACHE = ("query_positions",)
INT8 = ("query_positions", "key_scale", "value_scale")
# name -> (T, S, head_dim, dtype, arrays of the spec, its numbers)
TRAIN = {
    "32k": (32768, 32768, 128, "bfloat16", (), {}),
    "64": (1024, 1024, 64, "bfloat16", (), {}),
    "80, cache, odd lengths": (537, 1030, 80, "bfloat16", CACHE, {}),
    "256": (1024, 1024, 256, "bfloat16", (), {}),
    "float32": (1024, 1024, 128, "float32", (), {}),
    "32, all keys": (1024, 1024, 32, "bfloat16", (), {"causal": False}),
    "everything": (2048, 2048, 128, "bfloat16", ALL, {"window": 700, "soft_cap": 50.0}),
}
DECODE = {
    "decode": (1, 8192, 128, "bfloat16", CACHE, {}),
    "decode 4": (4, 8000, 64, "bfloat16", (*CACHE, "sinks"), {"window": 1024}),
    "decode int8": (1, 8192, 128, "bfloat16", INT8, {}),
}


def compile_case(device, implementation, case, gradient):
    """Returns the figures of one call on one device, with or without its gradient."""
    T, S, H, dtype, arrays, numbers = case
    B, N, K = 2, 8, 4
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    kinds = {
        "sinks": ((N,), jnp.float32),
        "query_segments": ((B, T), jnp.int32),
        "key_segments": ((B, S), jnp.int32),
        "query_positions": ((B, T), jnp.int32),
        "key_scale": ((B, S, K), jnp.float32),
        "value_scale": ((B, S, K), jnp.float32),
    }

    def shape(size, kind):
        spread = NamedSharding(mesh, P(*(None,) * len(size)))
        return jax.ShapeDtypeStruct(size, kind, sharding=spread)

    def total(q, k, v, given):
        spec = make_spec(0.1, **numbers, **given)
        z, lse = attention(
            q, k, v, spec, implementation=implementation, return_lse=True
        )
        return jnp.sum(z.astype(jnp.float32)) + jnp.sum(lse)

    kind = jnp.int8 if "key_scale" in arrays else dtype
    keys = shape((B, S, K, H), kind)
    given = {name: shape(*kinds[name]) for name in arrays}
    run = jax.grad(total, (0, 1, 2)) if gradient else total
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(shape((B, T, N, H), dtype), keys, keys, given)
        return figures(lowered.compile())


def main():
    target, implementation, kernels, *names = sys.argv[1:]
    device = devices_of(target)[0]
    if target.startswith("h100"):
        # Whatever the shape, where `auto` would choose between the two.
        default = pallas_gpu.default_settings
        pallas_gpu.settings_for = lambda q, segments: default(q, segments, kernels)
    # Decoding has one kernel.
    cases = TRAIN if kernels == "plain" else TRAIN | DECODE
    found = {}
    for name, case in cases.items():
        if names and name not in names:
            continue
        try:
            found[name] = compile_case(device, implementation, case, name in TRAIN)
        except Exception as error:  # compilers raise no common class
            found[name] = {"error": str(error)[:500]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
