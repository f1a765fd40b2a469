"""Splash attention, interpreted, against the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import PartitionSpec
from marks_case import slow_but
from ops_case import make_spec, normal, plain_request, slope

from jaxlm.ops.attention.jax_kernels import splash
from jaxlm.ops.attention.reference import reference_attention
from jaxlm.ops.attention.spec import AttentionSpec, Mask

H = 16
SCALE = 0.3
# Their borders are inside blocks.
SEGMENTS = np.repeat([[1, 2, 3]], [100, 60, 96], axis=1).astype(np.int32)
# name -> (queries, keys, query heads, key heads, options)
CASES = {
    "causal": (256, 256, 4, 2, {}),
    "all keys, one key head": (128, 256, 3, 1, {"causal": False}),
    # The first block of keys is hidden from the last block of queries.
    "window, one query head each": (384, 384, 2, 2, {"window": 100}),
    "window, later keys too": (256, 256, 2, 1, {"window": 100, "causal": False}),
    "more keys": (128, 384, 2, 1, {}),
    "more queries": (384, 128, 2, 1, {}),
    # Padded inside, to 256.
    "odd length": (201, 201, 2, 1, {"window": 100}),
    "odd length, all keys": (201, 201, 2, 1, {"causal": False}),
    "odd length, segments": (
        201,
        201,
        2,
        1,
        {"query_segments": SEGMENTS[:, :201], "key_segments": SEGMENTS[:, :201]},
    ),
    "all but the window": (
        256,
        256,
        4,
        2,
        {
            "soft_cap": 2.0,
            "sinks": normal(5, 4),
            "query_segments": SEGMENTS,
            "key_segments": SEGMENTS,
        },
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes several blocks fit in short sequences; three are too many for one kernel."""
    monkeypatch.setattr(splash, "BLOCK", 256)  # in f32 half of it
    monkeypatch.setattr(splash, "FUSED_BLOCKS", 2)


def inputs(T, S, N, K, dtype=jnp.float32):
    shapes = ((1, T, N, H), (1, S, K, H), (1, S, K, H))
    return [jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


def interpreted(q, k, v, spec):
    return splash.attention(q, k, v, spec, interpret=True)


def value_and_grads(attention, spec, weight, *arguments):
    """Returns z, and the gradients of sum(z * weight) for q, k, v and any sinks."""

    def total(q, k, v, *sinks):
        given = dataclasses.replace(spec, sinks=sinks[0] if sinks else None)
        z = attention(q, k, v, given)[0]
        return jnp.sum(z * weight), z

    which = tuple(range(len(arguments)))
    grads, z = jax.jit(jax.grad(total, which, has_aux=True))(*arguments)
    return z, grads


QUICK = ("causal", "all but the window")


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_value_and_gradient(name):
    T, S, N, K, options = CASES[name]
    q, k, v = inputs(T, S, N, K)
    spec = make_spec(SCALE, **options)
    weight = normal(4, 1, T, N, H)
    sinks = [] if spec.sinks is None else [spec.sinks]
    z, grads = value_and_grads(interpreted, spec, weight, q, k, v, *sinks)

    def oracle(q, k, v, *sinks):
        given = {**options, "sinks": sinks[0]} if sinks else options
        return ops_case.attention(q, k, v, scale=SCALE, **given)

    arguments = [np.float64(x) for x in (q, k, v, *sinks)]
    # f32 sums of hundreds of terms.
    np.testing.assert_allclose(z, oracle(*arguments), atol=3e-6)
    directions = [normal(9 + i, *x.shape) for i, x in enumerate(arguments)]

    def along(step):
        moved = [x + step * d for x, d in zip(arguments, directions, strict=True)]
        return np.sum(oracle(*moved) * weight)

    ours = sum(
        np.sum(np.float64(g) * d) for g, d in zip(grads, directions, strict=True)
    )
    assert ours == pytest.approx(slope(along, 0.0, 1.0), rel=1e-4, abs=1e-3)
    # The slope is one number; compare every element with the reference, which is tested.
    _, expected = value_and_grads(reference_attention, spec, weight, q, k, v, *sinks)
    for grad, right in zip(grads, expected, strict=True):
        assert grad.dtype == right.dtype
        scale = np.abs(right).max()
        np.testing.assert_allclose(grad, right, atol=1e-5 * scale)


def test_a_window_off_by_one_is_seen():
    q, k, v = inputs(256, 256, 1, 1)
    z, _ = jax.jit(interpreted)(q, k, v, AttentionSpec(SCALE, Mask(window=100)))
    for wrong in (99, 101):
        other = ops_case.attention(q, k, v, scale=SCALE, window=wrong)
        assert np.abs(z - other).max() > 0.05


@pytest.mark.slow
def test_bfloat16():
    """Results and gradients are close to the oracle; those of the sinks stay f32."""
    options = {**CASES["all but the window"][-1], "window": 70}
    q, k, v = inputs(256, 256, 4, 2, jnp.bfloat16)
    spec = make_spec(SCALE, **options)
    weight = normal(4, 1, 256, 4, H)
    arguments = (q, k, v, spec.sinks)
    z, grads = value_and_grads(interpreted, spec, weight, *arguments)
    assert [g.dtype for g in grads] == [x.dtype for x in arguments]
    expected = ops_case.attention(*arguments[:3], scale=SCALE, **options)
    np.testing.assert_allclose(np.float32(z), expected, atol=2e-2)
    exact = [x.astype(jnp.float32) for x in arguments]
    _, right = value_and_grads(reference_attention, spec, weight, *exact)
    for grad, wanted in zip(grads, right, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(np.float32(grad), wanted, atol=2e-2 * scale)


def test_inside_shard_map():
    """The kernel's mask becomes constants of the program, and batch rows are separate."""
    q, k, v = (jnp.concatenate([x, x[:, ::-1]]) for x in inputs(128, 128, 2, 1))
    segments = np.repeat([[1, 2], [3, 3]], 64, axis=1).astype(np.int32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(q, k, v, segments):
        mask = Mask(query_segments=segments, key_segments=segments)
        spec = AttentionSpec(SCALE, mask)
        return interpreted(q, k, v, spec)[0]

    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False
    )
    z = jax.jit(sharded)(q, k, v, segments)
    expected = ops_case.attention(
        q, k, v, scale=SCALE, query_segments=segments, key_segments=segments
    )
    np.testing.assert_allclose(z, expected, atol=3e-6)


# At (97, 1) some blocks have one visible corner; at (94, 14), one hidden corner.
@pytest.mark.parametrize(
    "window", [(0, 0), (99, 0), (None, 0), (99, None), (97, 1), (94, 14)]
)
def test_band_is_the_local_mask(window):
    shape, size = (144, 160), 16
    band = splash._Band(shape, window, 0)
    local = splash_attention_mask.LocalMask(shape, window, 0)
    for row in range(0, shape[0], size):
        for column in range(0, shape[1], size):
            block = (slice(row, row + size), slice(column, column + size))
            assert (band[block] == local[block]).all()


def test_few_blocks_of_a_long_mask_are_computed(monkeypatch):
    monkeypatch.undo()
    computed = []
    compute = splash_attention_mask.LocalMask.__getitem__

    def counted(mask, index):
        computed.append(index)
        return compute(mask, index)

    monkeypatch.setattr(splash_attention_mask.LocalMask, "__getitem__", counted)
    x = jax.ShapeDtypeStruct((1, 32768, 2, 128), jnp.bfloat16)
    spec = AttentionSpec(SCALE, Mask(window=1024))
    z, lse = jax.eval_shape(interpreted, x, x, x, spec)
    assert (z.shape, z.dtype, lse) == (x.shape, x.dtype, None)
    # The edges of the band; there are 64 * 64 blocks, each read several times.
    assert 0 < len(computed) < 64 * 64 / 4


def test_declines(monkeypatch):
    monkeypatch.undo()
    can = {"platform": "tpu", "device_kind": "TPU v5 lite"}
    for changes in (
        {},
        {"dtype": jnp.float32},
        {"causal": False, "soft_cap": 30.0, "sinks": True, "segments": True},
        {"num_keys": 2048, "window": 1},
        {"num_queries": 2048, "window": 1025},
        {"num_queries": 131072, "num_keys": 131072},
        {"head_dim": 512},
        {"num_queries": 1000, "num_keys": 1000},
    ):
        assert splash.declines(plain_request(**can, **changes)) is None
    for changes, reason in (
        ({"platform": "gpu"}, "needs a TPU"),
        ({"dtype": jnp.float16}, "no float16"),
        ({"lse": True}, "no log-sum-exp with a gradient"),
        ({"query_positions": True}, "no query positions"),
        ({"num_queries": 1000}, "lengths must be equal, or multiples of 128"),
        ({"num_keys": 64}, "lengths must be equal, or multiples of 128"),
        ({"head_dim": 576}, "head_dim 576 is over 512"),
        ({"num_queries": 2048, "window": 1024}, "queries without keys"),
        ({"num_queries": 131968, "num_keys": 131968}, "too many blocks"),
    ):
        assert reason in splash.declines(plain_request(**{**can, **changes}))
