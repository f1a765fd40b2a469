"""What `auto` runs on devices that are not here, read from compiled programs.

python benchmarks/attention_choice.py [--kinds v5e H100 ...]

Compiles one call of attention for each kind of training, prefill and decoding, and
finds in the compiled text which implementation it has. Nothing runs on a device.
Results go to benchmarks/results/attention_choice.json, and their table to
docs/attention.md. Needs libtpu and the cuda13 plugin, as `compile_train_step.py` does.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Importing compile_train_step tells libtpu that there is no TPU.
from compile_train_step import devices_of
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.ops.attention.dispatch import attention, choose
from jaxlm.ops.attention.request import AttentionRequest, request_of_sizes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "attention_choice.json"
PAGE = HERE.parent / "docs" / "attention.md"
BEGIN, END = "<!-- what auto runs -->\n", "<!-- end of what auto runs -->"
TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "H100": "h100:1"}

PACKED: dict[str, Any] = {"segments": True}
CACHE: dict[str, Any] = {"query_positions": True}
TRAINING: dict[str, dict[str, Any]] = {
    "packed rows": PACKED,
    "packed rows of 1,000": PACKED | {"num_queries": 1000},
    "packed rows of 32,768": PACKED | {"num_queries": 32768},
    "packed rows, head_dim 64": PACKED | {"head_dim": 64},
    "packed rows, window": PACKED | {"window": 1024},
    "packed rows, sinks": PACKED | {"sinks": True},
    "packed rows, soft cap": PACKED | {"soft_cap": 50.0},
    "one document a row": {},
    "one document a row of 1,000": {"num_queries": 1000},
    "one document a row of 32,768": {"num_queries": 32768},
    "one document a row, window": {"window": 1024},
}
DECODING: dict[str, dict[str, Any]] = {
    "prefill": {},
    "prefill of 1,000, window, sinks": {
        "num_queries": 1000,
        "window": 512,
        "sinks": True,
    },
    "a chunk of a prompt": CACHE | {"num_queries": 512, "num_keys": 4096},
    "decode": CACHE | {"num_queries": 1, "num_keys": 4096},
}


def request_of(sizes: dict[str, Any]) -> AttentionRequest:
    """Returns a request for this device; 4,096 tokens and head_dim 128 by default."""
    sizes = {"num_queries": 4096, "head_dim": 128, **sizes}
    sizes = {"num_keys": sizes["num_queries"], **sizes}
    return request_of_sizes(
        batch=2, num_heads=8, num_kv_heads=4, dtype=jnp.bfloat16, **sizes
    )


def compiled_text(call: AttentionRequest, mesh: Mesh, gradient: bool) -> str:
    """Compiles a call with `auto`, perhaps with its gradient, for the mesh in use."""

    def total(q, k, v, spec):
        z, _ = attention(q, k, v, spec)
        return jnp.sum(z.astype(jnp.float32))

    def whole(x):
        spread = NamedSharding(mesh, P(*(None,) * len(x.shape)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread)

    given = jax.tree.map(whole, (call.q, call.k, call.k, call.spec))
    run = jax.grad(total, (0, 1, 2)) if gradient else total
    return jax.jit(run).lower(*given).compile().as_text()


def implementation_in(text: str) -> str:
    """Returns the implementation that a compiled program has, by what only it has."""
    if "__cudnn$fmha" in text:
        return "cudnn"
    if 'custom_call_target="mosaic_gpu' in text:
        return "pallas_gpu"
    if 'custom_call_target="tpu_custom_call"' in text:
        return "splash" if re.search(r"%splash_mha\w*\S* = ", text) else "pallas_tpu"
    # It alone goes through blocks of queries and keys in loops.
    return "xla" if re.search(r"\bwhile\(", text) else "reference"


def run_target(target: str) -> dict[str, Any]:
    """Compiles all cases for one target."""
    device = devices_of(target)[0]
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    found = {}
    with jax.set_mesh(mesh):
        for name, sizes in {**TRAINING, **DECODING}.items():
            started, call = time.monotonic(), request_of(sizes)
            took = implementation_in(compiled_text(call, mesh, name in TRAINING))
            assert took == choose("auto", call).name, (name, took)
            found[name] = took
            seconds = round(time.monotonic() - started)
            print(f"{target}, {name}: {took} ({seconds} s)", flush=True)
    return {"target": target, "device": device.device_kind, "runs": found}


def table(results: dict[str, Any]) -> str:
    """Returns the table of docs/attention.md."""
    kinds = results["devices"]
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in {**TRAINING, **DECODING}:
        what = f"training, {name}" if name in TRAINING else name
        cells = [f"`{kind['runs'][name]}`" for kind in kinds.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    old = json.loads(RESULTS.read_text())["devices"] if RESULTS.exists() else {}
    devices = {**old, **{kind: run_target(TARGETS[kind]) for kind in options.kinds}}
    ordered = {kind: devices[kind] for kind in TARGETS if kind in devices}
    results = {"jax": jax.__version__, "devices": ordered}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
