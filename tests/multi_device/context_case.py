"""Runs in a child process with 8 CPU devices: attention over rows that are cut.

`main` prints a JSON object: for each case the differences from one device, as shares of
the largest value, and the bytes that a device sends.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.ops.attention.context_parallel import from_zigzag, to_zigzag
from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS, Kernel, attention
from jaxlm.ops.attention.spec import AttentionSpec, Mask
from jaxlm.ops.attention.tpu import pallas_tpu
from jaxlm.ops.attention.tpu.tpu_blocks import TpuSettings
from jaxlm.plan.traffic import traffic
from jaxlm.sharding.mesh import make_mesh

B, T, N, K, H = 2, 64, 4, 2, 8


class Interpreted(Kernel):
    """The TPU's kernel on any device."""

    @property
    def kernels(self):
        settings = TpuSettings(16, 16, 16, 16, interpret=True)
        return lambda q, spec: pallas_tpu.kernels(q, spec, settings)

    def declines(self, request):
        return None


def arrays():
    random = np.random.default_rng(0)
    q, k, v, dz = (
        random.normal(0, 1.5, (B, T, heads, H)).astype(np.float32)
        for heads in (N, K, K, N)
    )
    # The borders are in pieces, not between them; a document of one token too.
    borders = np.array([[5, 6, 23, 50], [11, 12, 33, 63]])
    segments = (np.arange(T) >= borders[..., None]).sum(1).astype(np.int32)
    dlse = random.normal(0, 1, (B, N, T)).astype(np.float32)
    sinks = random.normal(0, 1, N).astype(np.float32)
    return (q, k, v, sinks), (dz, dlse), segments


def run(inputs, cotangents, segments, **options):
    """Returns z, the log-sum-exp and the gradients."""
    window = options.pop("window", 21)

    def call(q, k, v, sinks):
        mask = Mask(window=window, query_segments=segments, key_segments=segments)
        spec = AttentionSpec(0.4, mask, soft_cap=20.0, sinks=sinks)
        return attention(q, k, v, spec, return_lse=True, **options)

    values, backward = jax.vjp(call, *inputs)
    return (*values, *backward(cotangents))


def on_devices(devices, zigzag=True, called_zigzag=None, tensor=1, **options):
    """Compares with one device; `called_zigzag`: what attention is told."""
    inputs, cotangents, segments = arrays()
    on_one = options | {"implementation": "xla"}
    wanted = jax.jit(lambda *a: run(*a, **on_one))(inputs, cotangents, segments)
    options["zigzag"] = zigzag if called_zigzag is None else called_zigzag

    def order(arrange, tree):
        if not zigzag:
            return tree

        def leaf(x):
            if x.ndim == 3:  # the log-sum-exp, [B, N, T]
                return arrange(x.swapaxes(1, 2), devices).swapaxes(1, 2)
            return arrange(x, devices) if x.ndim != 1 else x

        return jax.tree.map(leaf, tree)

    mesh = make_mesh(
        MeshConfig(data=1, context=devices, tensor=tensor),
        jax.devices()[: devices * tensor],
    )
    rows, heads = P(None, "context", "tensor"), P(None, "tensor", "context")
    with jax.set_mesh(mesh):
        arguments = jax.device_put(
            order(
                lambda x, n: to_zigzag(jnp.asarray(x), n),
                (inputs, cotangents, segments),
            ),
            ((rows, rows, rows, P("tensor")), (rows, heads), P(None, "context")),
        )
        program = jax.jit(lambda *a: run(*a, **options)).lower(*arguments).compile()
        found = jax.device_get(program(*arguments))
    found = order(from_zigzag, jax.tree.map(jnp.asarray, found))
    names = ("z", "lse", "dq", "dk", "dv", "dsinks")
    sent = {}
    for transfer in traffic(program.as_text(), mesh.shape):
        sent[transfer.kind] = sent.get(transfer.kind, 0) + transfer.bytes
    return {
        "differences": {
            name: float(jnp.abs(a - b).max() / jnp.abs(b).max())
            for name, a, b in zip(names, found, wanted, strict=True)
        },
        "sent": sent,
    }


RING = {"implementation": "xla", "across": "ring"}
GATHER = {"implementation": "reference", "across": "gather"}
CASES = {
    "ring 4": (4, RING),
    "gather 2, row order": (2, GATHER | {"zigzag": False, "window": None}),
    "wrong order": (2, RING | {"called_zigzag": False}),
    "ring 2, heads 2": (2, RING | {"tensor": 2, "window": None}),
    "gather 4": (4, GATHER),
    "ring 8": (8, RING),
    "gather 8": (8, GATHER),
    "kernel in a ring of 2": (2, {"implementation": "pallas_tpu"}),
}


def main(*cases):
    IMPLEMENTATIONS["pallas_tpu"] = Interpreted("", "cpu", is_flash=True)
    found = {}
    for case in cases:
        devices, options = CASES[case]
        found[case] = on_devices(devices, **options)
    print(json.dumps(found))
