"""What is special to the Hopper kernels; their results are in test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import make_spec, normal, quick_jit

from jaxlm.ops.attention.gpu import gpu_flash, mosaic
from jaxlm.ops.attention.gpu import pallas_gpu as gpu
from jaxlm.ops.attention.reference import reference_attention
from jaxlm.ops.attention.spec import AttentionSpec, Mask

SPEC = AttentionSpec(0.3, Mask(causal=False))


def inputs(T, S, N, H, dtype=jnp.bfloat16):
    """q, k and v of one row of the batch and one key head."""
    shapes = ((1, T, N, H), (1, S, 1, H), (1, S, 1, H))
    return [jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


def gradients(attention, weight):
    """The result of attention, and the gradients of a sum over it."""

    def total(q, k, v):
        z, lse = attention(q, k, v)
        return jnp.sum(z.astype(jnp.float32) * weight) + jnp.sum(lse), z

    return quick_jit(jax.grad(total, (0, 1, 2), has_aux=True))


def ours(spec, **settings):
    settings = gpu.Settings(interpret=True, **settings)
    return lambda q, k, v: gpu.attention(q, k, v, spec, settings=settings)


def test_declines_say_why():
    for dtype, most in {"bfloat16": 256, "float16": 256, "float32": 128}.items():
        assert gpu_flash.declines(most, dtype) is None
        reason = f"head_dim {most + 4} is above {most}, the most for {dtype}"
        assert gpu_flash.declines(most + 4, dtype) == reason
    assert gpu_flash.declines(64, jnp.int8).startswith("int8 is not one of bfloat16")
    q, k, v = inputs(8, 8, 1, 16)
    with pytest.raises(ValueError, match="bfloat16, bfloat16 and float32"):
        gpu.attention(q, k, v.astype(jnp.float32), SPEC)


def test_settings_are_checked_and_fit():
    for name in ("block_queries", "backward_block_keys"):
        with pytest.raises(ValueError, match="block of 96: not a multiple of 64"):
            gpu.Settings(**{name: 96})
    for head_dim, dtype in ((32, "float16"), (256, "bfloat16"), (128, "float32")):
        forward, backward = gpu_flash.buffers(head_dim, dtype)
        matrix = 64 * head_dim * (6 if dtype == "float32" else 2)
        assert forward >= 1 and backward >= 1
        assert (1 + 2 * forward) * matrix < mosaic.SHARED_BYTES
        assert (2 + 2 * backward) * matrix < mosaic.SHARED_BYTES


def test_float32_is_cut_into_three_without_loss():
    x = normal(0, 1, 8, 4, 16) * np.logspace(-7, 8, 16, dtype=np.float32)
    parts = quick_jit(gpu_flash._parts)(jnp.asarray(x))
    assert parts.dtype == jnp.bfloat16 and parts.shape == (3, *x.shape)
    np.testing.assert_array_equal(np.float64(parts).sum(axis=0), np.float64(x))


@pytest.mark.parametrize(
    "hidden, positions, window",
    [(slice(64, 128), [[3, 63]], None), (slice(0, 64), [[72, 127]], 8)],
    ids=["causal", "window"],
)
def test_hidden_blocks_are_not_read(hidden, positions, window):
    """They may hold anything: a mask would let NaN through, as 0 * NaN is NaN."""
    q, k, v = inputs(2, 128, 1, 16)
    spec = make_spec(0.3, window=window, query_positions=np.array(positions, np.int32))
    k, v = (x.at[:, hidden].set(jnp.nan) for x in (k, v))
    (dq, dk, dv), z = gradients(ours(spec), 1.0)(q, k, v)
    for x in (z, dq, dk, dv):
        assert np.isfinite(np.float32(x)).all()
    assert not np.any(dk[:, hidden]) and not np.any(dv[:, hidden])
    assert np.any(dk) and np.any(dv)


@pytest.mark.parametrize(
    "head_dim, settings",
    [
        # dk and dv come from kernels of their own.
        (136, {}),
        (
            16,
            {
                **{"block_queries": 128, "block_keys": 128, "buffers": 1},
                **{"backward_block_queries": 128, "backward_block_keys": 128},
            },
        ),
    ],
    ids=["wide heads", "large blocks"],
)
def test_other_shapes_give_the_same(head_dim, settings):
    q, k, v = inputs(70, 70, 2, head_dim, jnp.float32)
    if head_dim > 128:
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    spec = make_spec(0.1, soft_cap=2.0, window=50)
    weight = normal(3, *q.shape)
    grads, z = gradients(ours(spec, **settings), weight)(q, k, v)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    right = gradients(lambda q, k, v: reference_attention(q, k, v, spec), weight)
    right_grads, right_z = right(*exact)
    # Results near 1 and gradients near 10, in bfloat16 with 8 bits.
    tolerance = 1e-5 if q.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.float32(z), right_z, atol=tolerance)
    for x, y in zip(grads, right_grads, strict=True):
        scale = np.abs(y).max()
        np.testing.assert_allclose(np.float32(x) / scale, y / scale, atol=tolerance)
