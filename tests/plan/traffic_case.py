"""Compiles, on 8 CPU devices, a scan that gathers matrices; prints what is counted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.plan.traffic import traffic

LAYERS, SIZE = 5, 64


def main():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))

    @jax.shard_map(out_specs=P(("data", "fsdp")))
    def step(x, ws):
        def layer(x, w):
            with jax.named_scope("Block"):
                w = jax.lax.all_gather(w, "fsdp", tiled=True)
                return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, x, ws)
        with jax.named_scope("head"):
            return x + jax.lax.psum(x[0], "data")

    def argument(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=P(*axes))

    with jax.set_mesh(mesh):
        x = argument((8, SIZE), ("data", "fsdp"))
        ws = argument((LAYERS, SIZE, SIZE), None, "fsdp")
        text = jax.jit(step).lower(x, ws).compile().as_text()
    print(json.dumps([dataclasses.asdict(t) for t in traffic(text, mesh.shape)]))


if __name__ == "__main__":
    main()
