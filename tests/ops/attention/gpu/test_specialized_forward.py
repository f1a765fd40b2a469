"""The warp-specialized kernel, in Pallas' interpreter, against the float64 oracle.

The interpreter runs the three warpgroups in parallel and respects their barriers. It
has no register layouts, and its dot products are those of JAX.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from marks_case import slow_but
from ops_case import make_spec, normal

from jaxlm.ops.attention.gpu import warpgroup
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.gpu.specialized_forward import forward
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Mask

SCALE = 0.2
BF16, F16 = jnp.bfloat16, jnp.float16
# From rounding probabilities, and results up to 4, to 8 and to 11 bits.
ERROR = {BF16: 2e-2, F16: 3e-3}
SEGMENTS = np.repeat([[1, 2, 3]], [50, 60, 30], axis=1).astype(np.int32)
# name -> (queries, keys, query heads, key heads, head size, dtype, options)
CASES = {
    # Three blocks of keys for two buffers, some all visible and some partly hidden.
    "causal": (140, 140, 1, 1, 32, BF16, {}),
    "all keys, large heads": (64, 300, 1, 1, 128, F16, {"causal": False}),
    "window, odd lengths": (133, 261, 1, 1, 96, F16, {"window": 70}),
    "positions in a cache, heads share keys": (
        70,
        200,
        2,
        1,
        64,
        BF16,
        {
            "query_positions": np.arange(70, dtype=np.int32)[None] + 100,
        },
    ),
    "all options": (
        120,
        140,
        2,
        2,
        32,
        F16,
        {
            "window": 60,
            "soft_cap": 2.0,
            "sinks": normal(5, 2),
            "query_segments": SEGMENTS[:, :120],
            "key_segments": SEGMENTS,
        },
    ),
}


def prepare(name):
    """Returns queries, keys, values, spec and options."""
    T, S, N, K, H, dtype, options = CASES[name]
    shapes = ((1, T, N, H), *[(1, S, K, H)] * 2)
    q, k, v = (jnp.asarray(normal(i, *x), dtype) for i, x in enumerate(shapes))
    return q, k, v, make_spec(SCALE, **options), options


def run(q, k, v, spec):
    settings = GpuSettings(block_keys=64, interpret=True)
    return jax.jit(lambda *args: forward(*args, settings))(q, k, v, spec)


@pytest.mark.parametrize("name", slow_but(["causal"], CASES))
def test_value(name):
    """Results and log-sum-exps equal the oracle's."""
    q, k, v, spec, options = prepare(name)
    expected, expected_lse = ops_case.attention_and_lse(q, k, v, scale=SCALE, **options)
    z, lse = run(q, k, v, spec)
    assert z.dtype == q.dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(z), expected, atol=ERROR[CASES[name][5]])
    # Products of 16-bit numbers are exact in f32, and their sums nearly so.
    np.testing.assert_allclose(lse, expected_lse, atol=5e-6)


@pytest.mark.slow
def test_hidden_blocks_are_not_read():
    """NaN in them reaches no result."""
    q, k, v, _, _ = prepare("all keys, large heads")
    options = {"window": 30, "query_positions": np.full((1, 64), 150, np.int32)}
    spec = make_spec(SCALE, **options)
    expected = ops_case.attention(q, k, v, scale=SCALE, **options)
    met = np.repeat([False, True, True, False, False], 64)[:300, None, None]
    z, _ = run(q, *(jnp.where(met, x, jnp.nan) for x in (k, v)), spec)
    np.testing.assert_allclose(np.float64(z), expected, atol=ERROR[F16])


@pytest.mark.slow
def test_queries_without_keys():
    """They give zeros and -1e30, alone in a block or beside queries that see keys."""
    q, k, v, _, _ = prepare("positions in a cache, heads share keys")
    index = jnp.where(jnp.arange(70) < 66, -1, 5)[None]
    z, lse = run(q[:, :, :1], k, v, AttentionSpec(SCALE, Mask(query_positions=index)))
    assert not np.any(z[:, :66]) and np.all(lse[..., :66] == MASKED)
    assert np.all(np.any(z[:, 66:], axis=-1)) and np.all(lse[..., 66:] > -100)


@pytest.mark.slow
def test_no_races(monkeypatch):
    """No warpgroup reads what a copy may be writing, or the reverse."""
    params = dataclasses.replace(warpgroup.interpreter(), detect_races=True)
    monkeypatch.setattr(warpgroup, "interpreter", lambda: params)
    q, k, v, spec, _ = prepare("all keys, large heads")
    segments = jnp.repeat(jnp.array([[1, 2]]), 150, axis=1)
    mask = dataclasses.replace(
        spec.mask, query_segments=segments[:, 110:174], key_segments=segments
    )
    spec = dataclasses.replace(spec, mask=mask)
    run(q, k, v, spec)
    # JAX has no public name for this.
    assert not gpu_callbacks.get_races().races_found
