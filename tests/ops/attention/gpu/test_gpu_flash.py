"""What is specific to the GPU kernels; test_attention.py checks their results."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import make_spec, normal, plain_request

from jaxlm.ops.attention.gpu import pallas_gpu, specialized_forward, warpgroup
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.reference import reference_attention
from jaxlm.ops.attention.spec import AttentionSpec, Mask

SPEC = AttentionSpec(0.3, Mask(causal=False))


def inputs(T, S, N, H, dtype=jnp.bfloat16):
    """q, k and v of one batch row and one key head."""
    shapes = ((1, T, N, H), (1, S, 1, H), (1, S, 1, H))
    return [jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


def gradients(attention, weight):
    """Returns a function that gives the gradients of a sum over attention, and z."""

    def total(q, k, v):
        z, lse = attention(q, k, v)
        return jnp.sum(z.astype(jnp.float32) * weight) + jnp.sum(lse), z

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))


def ours(spec, **settings):
    settings = GpuSettings(interpret=True, **settings)
    return lambda q, k, v: pallas_gpu.attention(q, k, v, spec, settings=settings)


def test_declines_say_why(monkeypatch):
    def reason(**changes):
        hopper = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
        return pallas_gpu.declines(plain_request(**{**hopper, **changes}))

    for dtype in (jnp.bfloat16, jnp.float16):
        assert reason(dtype=dtype, head_dim=256) is None
    assert reason(dtype=jnp.float32) == "float32 is neither bfloat16 nor float16"
    assert reason(head_dim=260) == "head_dim 260 is above 256"
    assert reason(device_kind="NVIDIA B200").startswith("needs a Hopper GPU, not")
    assert reason() is None  # a CPU has no CUDA runtime
    for runtime, reasons in ((12080, True), (12090, True), (12091, False)):
        # As in benchmarks/results/check_NVIDIA_H100_80GB_HBM3.json.
        client = SimpleNamespace(platform_version=f"PJRT C API\ncuda {runtime}")
        devices = [SimpleNamespace(client=client)]
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        assert bool(reason()) == reasons and reason(causal=False) is None
    monkeypatch.undo()
    q, k, v = inputs(8, 8, 1, 16)
    with pytest.raises(ValueError, match="bfloat16, bfloat16 and float32"):
        pallas_gpu.attention(q, k, v.astype(jnp.float32), SPEC)


def test_settings_are_checked_and_fit():
    for name in ("block_queries", "backward_block_keys", "decode_block_keys"):
        with pytest.raises(ValueError, match=f"^{name} is 96, not 64, 128, 192 or 256"):
            GpuSettings(**{name: 96})
    for head_dim, segments in itertools.product((64, 128, 256), (False, True)):
        q = jnp.zeros((1, 1, 1, head_dim), jnp.bfloat16)
        room = warpgroup.SHARED_BYTES - 8192
        plain = pallas_gpu.default_settings(q, segments, "plain")
        assert plain.backward == "plain"
        # Queries, and the buffers of keys and values.
        rows = plain.block_queries + 2 * plain.buffers * plain.block_keys
        assert 2 * rows * head_dim < room
        # The resident and the streamed side have two matrices each.
        rows = plain.backward_block_queries * (2 + 2 * plain.backward_buffers)
        assert plain.backward_block_queries == plain.backward_block_keys
        assert 2 * rows * head_dim < room
        special = pallas_gpu.default_settings(q, segments, "specialized")
        rows = specialized_forward.BLOCK_QUERIES
        rows += 2 * special.buffers * special.block_keys
        assert 2 * rows * head_dim < room
        assert special.backward == ("plain" if head_dim == 256 else "specialized")
        if head_dim < 256:
            # Two resident blocks; both sides have two matrices.
            rows = 2 * 2 * warpgroup.ROWS
            rows += 2 * special.backward_buffers * special.backward_block_keys
            assert special.backward_block_queries == special.backward_block_keys
            assert 2 * rows * head_dim < room


def test_the_kernels_are_the_faster_ones():
    """As attention_* and backward_NVIDIA_H100_80GB_HBM3.json show."""

    def kinds(head_dim, segments=False):
        q = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.bfloat16)
        found = pallas_gpu.default_settings(q, segments)
        return found.forward, found.backward

    assert kinds(128) == ("specialized", "specialized")
    assert kinds(128, segments=True) == kinds(64) == ("plain", "specialized")
    assert kinds(256) == ("plain", "plain")


@pytest.mark.slow
@pytest.mark.parametrize(
    "hidden, positions, window",
    [(slice(64, 128), [[3, 63]], None), (slice(0, 64), [[72, 127]], 8)],
    ids=["causal", "window"],
)
def test_hidden_blocks_are_not_read(hidden, positions, window):
    """Masking alone would let NaN through, because 0 * NaN is NaN."""
    q, k, v = inputs(2, 128, 1, 16)
    spec = make_spec(0.3, window=window, query_positions=np.array(positions, np.int32))
    k, v = (x.at[:, hidden].set(jnp.nan) for x in (k, v))
    (dq, dk, dv), z = gradients(ours(spec), 1.0)(q, k, v)
    for x in (z, dq, dk, dv):
        assert np.isfinite(np.float32(x)).all()
    assert not np.any(dk[:, hidden]) and not np.any(dv[:, hidden])
    assert np.any(dk) and np.any(dv)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim, settings",
    [
        # dk and dv come from separate kernels.
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
