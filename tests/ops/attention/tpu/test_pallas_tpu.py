"""What is specific to the TPU kernels; test_attention.py checks their results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from marks_case import slow_but
from ops_case import make_spec, normal

from jaxlm.ops.attention.spec import AttentionSpec, Mask, quantize
from jaxlm.ops.attention.tpu import pallas_tpu
from jaxlm.ops.attention.tpu.tpu_blocks import TpuSettings, cut_blocks

SCALE = 0.3
SETTINGS = TpuSettings(16, 16, 16, 16, 16, interpret=True)


def inputs(T, S, N=4, K=2, H=8):
    shapes = ((2, T, N, H), (2, S, K, H), (2, S, K, H))
    return [jnp.asarray(normal(i, *shape)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("splits", slow_but([3], [1, 2, 3, 7]))
def test_splits_of_the_keys_are_merged(splits):
    """Also with more splits than blocks, and rows that fill only some splits."""
    q, k, v = inputs(3, 77)
    values = {
        "query_positions": np.array([[70], [20]], np.int32)
        + np.arange(3, dtype=np.int32),
        "sinks": normal(6, 4),
        "window": 40,
    }
    spec = make_spec(SCALE, **values)
    settings = dataclasses.replace(SETTINGS, decode_splits=splits)
    z, lse = jax.jit(lambda *x: pallas_tpu.attention(*x, settings=settings))(
        q, k, v, spec
    )
    expected = ops_case.attention_and_lse(q, k, v, scale=SCALE, **values)
    np.testing.assert_allclose(z, expected[0], atol=3e-6)
    np.testing.assert_allclose(lse, expected[1], atol=3e-6)


def test_splits_are_not_rounded_before_they_are_merged():
    """257 and -255 have the mean 1, but bf16 cannot represent 257."""
    values = np.repeat([[256.0, 258.0, -255.0]], [16, 16, 32], axis=1)
    v = jnp.asarray(np.tile(values[..., None, None], (1, 1, 1, 8)), jnp.bfloat16)
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 64, 1, 8), jnp.bfloat16)
    spec = AttentionSpec(SCALE, Mask(query_positions=jnp.full((1, 1), 63)))
    settings = dataclasses.replace(SETTINGS, decode_splits=2)
    z, _ = jax.jit(lambda *x: pallas_tpu.attention(*x, settings=settings))(
        q, k, v, spec
    )
    np.testing.assert_array_equal(z, 1)


def test_a_few_queries_are_a_block_of_as_many_rows():
    """Not of 128; keys are in whole lanes."""
    for queries, keys, rows, columns in ((4, 1000, 4, 512), (130, 40, 256, 128)):
        grid = cut_blocks(AttentionSpec(SCALE), queries, keys, (512, 512)).grid
        assert (grid.block_queries, grid.block_keys) == (rows, columns)


@pytest.mark.slow
def test_hidden_blocks_are_not_read():
    """NaN in blocks outside the window or in other segments reaches no result."""
    q, k, v = inputs(64, 64)
    ids = jnp.asarray(np.repeat([[1, 2]], 32, axis=1).repeat(2, axis=0), jnp.int32)
    spec = make_spec(SCALE, window=8, query_segments=ids, key_segments=ids)

    def total(q, k, v):
        z, lse = pallas_tpu.attention(q, k, v, spec, settings=SETTINGS)
        return jnp.sum(z[:, 48:]) + jnp.sum(lse[..., 48:])

    run = jax.jit(jax.grad(total, (0, 1, 2)))
    clean = run(q, k, v)
    # The last 16 queries see the blocks from 32 on.
    broken = run(q, *(x.at[:, :32].set(jnp.nan) for x in (k, v)))
    np.testing.assert_array_equal(clean[0][:, 48:], broken[0][:, 48:])
    for one, other in zip(clean[1:], broken[1:], strict=True):
        np.testing.assert_array_equal(one[:, 32:], other[:, 32:])


def test_int8_has_no_gradient():
    q, k, v = inputs(2, 32)
    (k, key_scale), (v, value_scale) = quantize(k), quantize(v)
    spec = AttentionSpec(
        SCALE,
        Mask(query_positions=jnp.full((2, 2), 31)),
        key_scale=key_scale,
        value_scale=value_scale,
    )

    def total(q):
        return jnp.sum(pallas_tpu.attention(q, k, v, spec, settings=SETTINGS)[0])

    with pytest.raises(ValueError, match="int8 keys has no gradient: dequantize them"):
        jax.eval_shape(jax.grad(total), q)
    with pytest.raises(
        ValueError, match="q, k and v are float32, bfloat16 and float32"
    ):
        pallas_tpu.attention(
            q, q[:, :, :2].astype(jnp.bfloat16), q[:, :, :2], AttentionSpec(1.0)
        )
