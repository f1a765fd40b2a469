"""JAX's Mosaic kernel for Hopper GPUs: what it is asked for, and what it is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from jax.experimental.pallas.ops.gpu import attention_mgpu
from ops_case import normal, plain_request

from jaxlm.ops.attention.jax_kernels import mosaic_gpu
from jaxlm.ops.attention.spec import AttentionSpec

CAN = plain_request(
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    dtype=jnp.dtype(jnp.float16),
    num_queries=1024,
    num_keys=1024,
    head_dim=128,
    causal=False,
)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_arguments_mean_what_the_spec_says(monkeypatch, head_dim):
    """JAX's reference of the kernel, with the same arguments, equals the oracle."""
    configs = []

    def reference(q, k, v, config):
        configs.append(config)
        z = attention_mgpu.attention_reference(q, k, v, causal=config.causal)
        return z.astype(q.dtype)

    monkeypatch.setattr(attention_mgpu, "attention", reference)
    shapes = ((1, 128, 2, head_dim), (1, 128, 1, head_dim), (1, 128, 1, head_dim))
    q, k, v = (
        jnp.asarray(normal(i, *shape), jnp.float16) for i, shape in enumerate(shapes)
    )
    spec = AttentionSpec(scale=0.1, causal=False)
    z, lse = mosaic_gpu.attention(q, k, v, spec)
    expected = ops_case.attention(q, k, v, scale=0.1, causal=False)
    assert (z.dtype, lse) == (jnp.float16, None)
    # The scaled queries and the results are rounded to 11 bits.
    np.testing.assert_allclose(np.float32(z), expected, atol=4e-3)
    [config] = configs
    assert config.has_backward_blocks
    # Two groups of queries, two steps of keys and of values, of 2 bytes, beside each
    # other: a Hopper GPU shares 227 KiB.
    tokens = 2 * config.block_q + 2 * config.max_concurrent_steps * config.block_kv
    assert 2 * tokens * head_dim < 227 * 1024


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"device_kind": "NVIDIA GH200 480GB", "head_dim": 256},
        {"num_queries": 128, "num_keys": 256, "head_dim": 64},
    ],
)
def test_does(asked):
    assert mosaic_gpu.declines(dataclasses.replace(CAN, **asked)) is None


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({"platform": "cpu", "device_kind": "cpu"}, "needs a Hopper GPU"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "needs a Hopper GPU"),
        ({"device_kind": "NVIDIA B200"}, "needs a Hopper GPU"),
        ({"dtype": jnp.dtype(jnp.bfloat16)}, "no bfloat16, only float16"),
        ({"causal": True}, "no gradient with a causal mask"),
        ({"window": 100}, "no window"),
        ({"soft_cap": 30.0}, "no soft cap"),
        ({"sinks": True}, "no sinks"),
        ({"segments": True}, "no segments"),
        ({"query_index": True}, "no places of queries"),
        ({"key_length": True}, "no lengths of keys"),
        ({"lse": True}, "no log-sum-exp with a gradient"),
        ({"head_dim": 80}, "head_dim 80 is not a multiple of 64"),
        ({"head_dim": 320}, "head_dim 320 is over 256"),
        ({"num_queries": 64}, "lengths must be multiples of 128"),
        ({"num_keys": 1000}, "lengths must be multiples of 128"),
    ],
)
def test_declines(asked, reason):
    assert mosaic_gpu.declines(dataclasses.replace(CAN, **asked)) == reason
