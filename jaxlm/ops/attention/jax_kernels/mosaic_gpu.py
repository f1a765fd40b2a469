"""JAX's attention kernel for Hopper GPUs, written in Pallas for Mosaic.

It is an example of JAX's, in float16 and without a mask: for a comparison, by name.
"""

import re

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.spec import AttentionSpec

# Two groups of warps take a block of queries each.
BLOCK = 64
LENGTHS = 2 * BLOCK


def declines(request: Request) -> str | None:
    """Why the kernel cannot do this, or None."""
    # It multiplies by wgmma, which no other generation has.
    hopper = re.search(r"\bG?H\d", request.device_kind)
    if request.platform != "gpu" or not hopper:
        return "needs a Hopper GPU"
    # Its memory on the chip is declared float16, so bfloat16 does not compile.
    if request.dtype != jnp.float16:
        return f"no {request.dtype}, only float16"
    for asked, name in (
        (request.causal, "gradient with a causal mask"),
        (request.window is not None, "window"),
        (request.soft_cap is not None, "soft cap"),
        (request.sinks, "sinks"),
        (request.segments, "segments"),
        (request.query_index, "places of queries"),
        (request.key_length, "lengths of keys"),
        (request.lse, "log-sum-exp with a gradient"),
    ):
        if asked:
            return f"no {name}"
    if request.head_dim % 64:
        return f"head_dim {request.head_dim} is not a multiple of 64"
    if request.head_dim > 256:
        return f"head_dim {request.head_dim} is over 256"
    if request.num_queries % LENGTHS or request.num_keys % LENGTHS:
        return f"lengths must be multiples of {LENGTHS}"
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], None]:
    """Attention over all keys, all float16; never the log-sum-exp."""
    # Not at the top: it imports JAX's tests' helpers, and only this call needs it.
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=BLOCK,
        # Shared memory holds two such blocks of keys and of values.
        block_kv=2 * BLOCK if q.shape[3] <= 128 else BLOCK,
        max_concurrent_steps=2,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
    )
    # The kernel has no scale of its own.
    q = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    return attention_mgpu.attention(q, k, v, config), None
