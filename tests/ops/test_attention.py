"""Every implementation of attention against a float64 oracle, in value and gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from ops_case import normal, quick_jit, slope

from jaxlm.ops import blocked, dense
from jaxlm.ops.attention import (
    MASKED,
    AttentionSpec,
    attention_lse,
    attention_scores,
    reference_attention,
)
from jaxlm.ops.dispatch import BLOCKED_FROM, IMPLEMENTATIONS, attention, choose
from jaxlm.ops.mask import attention_mask

B, N, K, H = 2, 6, 3, 8
SCALE = 0.3

SEGMENTS = np.repeat([[1, 2, 3], [1, 1, 2]], 16, axis=1).astype(np.int32)
INDEX = (np.arange(16)[None] + np.array([[5], [31]])).astype(np.int32)
# name -> (queries, keys, options)
OPTIONS = {
    "causal": (48, 48, {}),
    "all keys": (48, 48, {"causal": False}),
    "window": (48, 48, {"window": 9}),
    "soft cap": (48, 48, {"soft_cap": 1.5}),
    "sinks": (48, 48, {"sinks": normal(5, N)}),
    "segments": (48, 48, {"query_segments": SEGMENTS, "key_segments": SEGMENTS}),
    "cache": (16, 48, {"query_index": INDEX, "key_length": INDEX[:, -1] + 1}),
    "cache, window": (16, 48, {"query_index": INDEX, "window": 20}),
    "odd length": (37, 37, {"window": 20, "sinks": normal(5, N)}),
    "odd keys": (16, 47, {"query_index": INDEX}),
    "all but the cap": (
        48,
        48,
        {
            "window": 20,
            "sinks": normal(6, N),
            "query_segments": SEGMENTS,
            "key_segments": SEGMENTS,
        },
    ),
    "everything": (
        37,
        37,
        {
            "window": 20,
            "soft_cap": 2.0,
            "sinks": normal(6, N),
            "query_segments": SEGMENTS[:, :37],
            "key_segments": SEGMENTS[:, :37],
            "key_length": np.array([37, 36], np.int32),
        },
    ),
}
PAIRS = [
    (name, options)
    for name, options in itertools.product(IMPLEMENTATIONS, OPTIONS)
    if not (name == "dense" and "soft_cap" in OPTIONS[options][2])
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in short rows."""
    monkeypatch.setattr(blocked, "BLOCK", 16)
    monkeypatch.setattr(dense, "BLOCK", 16)


def inputs(T, S):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jnp.asarray(normal(i, *shape)) for i, shape in enumerate(shapes)]


def make_spec(options):
    arrays = {
        key: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    return AttentionSpec(scale=SCALE, **arrays)


@pytest.mark.parametrize("name, options", PAIRS)
def test_value_and_gradient(name, options):
    """The value, and slopes in random directions, equal the oracle's."""
    T, S, values = OPTIONS[options]
    q, k, v = inputs(T, S)
    spec = make_spec(values)
    weight = normal(4, B, T, N, H)

    @quick_jit
    def value_and_grads(q, k, v, sinks):
        def total(q, k, v, sinks):
            z = IMPLEMENTATIONS[name](q, k, v, dataclasses.replace(spec, sinks=sinks))
            return jnp.sum(z * weight), z

        which = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        return jax.grad(total, which, has_aux=True)(q, k, v, sinks)

    grads, z = value_and_grads(q, k, v, spec.sinks)
    expected = ops_case.attention(q, k, v, scale=SCALE, **values)
    # f32 with sums of some tens of terms.
    np.testing.assert_allclose(z, expected, atol=3e-6)

    def oracle(q=q, k=k, v=v, sinks=None):
        given = values if sinks is None else {**values, "sinks": sinks}
        return np.sum(ops_case.attention(q, k, v, scale=SCALE, **given) * weight)

    tested = [(q, "q"), (k, "k"), (v, "v")]
    tested += [] if spec.sinks is None else [(values["sinks"], "sinks")]
    for (x, argument), grad in zip(tested, grads, strict=True):
        direction = normal(9, *x.shape)
        right = slope(lambda x, a=argument: oracle(**{a: x}), x, direction)
        ours = np.sum(np.float64(grad) * direction)
        assert ours == pytest.approx(right, rel=1e-4, abs=1e-3), argument


@pytest.mark.parametrize("queries", [48, 1])
@pytest.mark.parametrize("heads", [N, K], ids=["grouped", "one query head each"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16(name, heads, queries):
    """bf16 inputs: as near to the oracle as rounding to bf16 allows, and gradients.

    XLA:CPU multiplies bf16 in some forms only, so every shape of product is tried.
    """
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(48, 48))
    q = q[:, -queries:, :heads]
    index = jnp.broadcast_to(jnp.arange(48 - queries, 48), (B, queries))
    spec = AttentionSpec(scale=SCALE, query_index=index if queries == 1 else None)

    def total(q, k, v):
        z = IMPLEMENTATIONS[name](q, k, v, spec)
        return jnp.sum(z.astype(jnp.float32)), z

    grads, z = quick_jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert {x.dtype for x in (z, *grads)} == {jnp.dtype(jnp.bfloat16)}
    last = np.asarray(index)
    expected = ops_case.attention(q, k, v, scale=SCALE, query_index=last)
    # Probabilities and results are rounded to 8 bits: 2 ** -8 of values up to 4.
    np.testing.assert_allclose(np.float32(z), expected, atol=2e-2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_query_head_n_is_served_by_key_head_n_over_g(name):
    q, k, _ = inputs(16, 16)
    v = jnp.broadcast_to(jnp.arange(K, dtype=jnp.float32)[:, None], k.shape)
    z = quick_jit(IMPLEMENTATIONS[name])(q, k, v, AttentionSpec(scale=SCALE))
    np.testing.assert_allclose(z[0, :, :, 0], [[0, 0, 1, 1, 2, 2]] * 16, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_window_off_by_one_is_seen(name):
    q, k, v = inputs(48, 48)
    z = quick_jit(IMPLEMENTATIONS[name])(q, k, v, AttentionSpec(scale=SCALE, window=9))
    for wrong in (8, 10):
        other = ops_case.attention(q, k, v, scale=SCALE, window=wrong)
        assert np.abs(z - other).max() > 0.05
    # The window counts the token itself.
    alone = AttentionSpec(scale=SCALE, window=1)
    z = quick_jit(IMPLEMENTATIONS[name])(q, k, v, alone)
    np.testing.assert_allclose(z, np.repeat(v, N // K, axis=2), atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sinks_take_their_share(name):
    q, k, v = inputs(16, 16)
    run = quick_jit(IMPLEMENTATIONS[name])
    plain = run(q, k, v, AttentionSpec(scale=SCALE))
    none = run(q, k, v, AttentionSpec(scale=SCALE, sinks=jnp.full(N, -1e4)))
    np.testing.assert_allclose(none, plain, atol=1e-6)
    heavy = run(q, k, v, AttentionSpec(scale=SCALE, sinks=jnp.full(N, 30.0)))
    assert np.abs(heavy).max() < 1e-6


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_without_keys_is_finite(name):
    """Padding may see nothing at all; it must not make NaN, backward neither."""
    q, k, v = inputs(16, 16)
    spec = AttentionSpec(scale=SCALE, key_length=jnp.zeros(B, jnp.int32))

    def total(q, k, v):
        return jnp.sum(IMPLEMENTATIONS[name](q, k, v, spec))

    value, grads = quick_jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(16, 16)
    for run in IMPLEMENTATIONS.values():
        z = quick_jit(run)(q * 100, k * 100, v, AttentionSpec(scale=SCALE))
        expected = reference_attention(q * 100, k * 100, v, AttentionSpec(scale=SCALE))
        assert np.isfinite(z).all()
        # Scores reach 3e4, where f32 numbers lie 2e-3 apart.
        np.testing.assert_allclose(z, expected, atol=1e-2)


def test_blocked_never_holds_all_scores(monkeypatch):
    """At 4096 tokens its memory, backward too, is far below one [T, S] matrix."""
    monkeypatch.undo()
    T, heads = 4096, 2
    x = jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32)

    def memory(name):
        def total(q, k, v):
            spec = AttentionSpec(scale=SCALE)
            return jnp.sum(IMPLEMENTATIONS[name](q, k, v, spec))

        compiled = quick_jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * heads * T * T
    assert memory("blocked") < scores / 10
    # The measure sees what it is there for.
    assert memory("reference") >= scores


def test_lse_and_probabilities():
    q, k, _ = inputs(16, 16)
    spec = AttentionSpec(scale=SCALE, window=5, sinks=jnp.asarray(normal(5, N)))
    scores = np.float64(attention_scores(q, k, spec)).reshape(B, N, 16, 16)
    lse = np.float64(attention_lse(jnp.asarray(scores.reshape(B, K, 2, 16, 16)), spec))
    sinks = np.float64(spec.sinks)[:, None, None]
    total = np.exp(scores).sum(-1, keepdims=True) + np.exp(sinks)
    np.testing.assert_allclose(lse.reshape(B, N, 16), np.log(total)[..., 0], atol=1e-5)
    hidden = np.tril(np.ones((16, 16)), -5) + np.triu(np.ones((16, 16)), 1)
    assert ((scores == np.float32(MASKED)) == (hidden > 0)).all()


def test_mask_against_its_definition():
    index, keys = np.array([[3, 4], [0, 7]], np.int32), np.arange(9, dtype=np.int32)
    queries = np.array([[1, 2], [1, 1]], np.int32)
    segments = np.array([[1] * 4 + [2] * 5, [1] * 9], np.int32)
    length = np.array([5, 9], np.int32)
    for causal, window, with_segments, with_length in itertools.product(
        (True, False), (None, 1, 3), (True, False), (True, False)
    ):
        given = {"query_segments": queries, "key_segments": segments}
        mask = attention_mask(
            jnp.asarray(index),
            jnp.asarray(keys),
            causal=causal,
            window=window,
            key_length=jnp.asarray(length) if with_length else None,
            **(jax.tree.map(jnp.asarray, given) if with_segments else {}),
        )
        for b, t, s in itertools.product(range(2), range(2), range(9)):
            seen = (
                (not causal or s <= index[b, t])
                and (window is None or s > index[b, t] - window)
                and (not with_segments or queries[b, t] == segments[b, s])
                and (not with_length or s < length[b])
            )
            assert mask[b, t, s] == seen


def test_auto_takes_the_lean_version_for_long_rows():
    assert choose("auto", 1024, BLOCKED_FROM // 1024) == "blocked"
    assert choose("auto", 1024, BLOCKED_FROM // 1024 - 1) != "blocked"
    # One query has one row of scores.
    assert choose("auto", 1, 100 * BLOCKED_FROM) == "reference"
    # What auto picks can do what is asked.
    assert choose("auto", 64, 64, 50.0) != "dense"
    for name in IMPLEMENTATIONS:
        assert choose(name, 1, 1) == name


def test_nothing_falls_back_silently():
    q, k, v = inputs(16, 16)
    with pytest.raises(ValueError, match="no attention implementation 'flash'"):
        attention(q, k, v, AttentionSpec(scale=1.0), implementation="flash")
    with pytest.raises(ValueError, match="no soft cap"):
        capped = AttentionSpec(scale=1.0, soft_cap=5.0)
        attention(q, k, v, capped, implementation="dense")


def test_dispatch_runs_what_is_named(monkeypatch):
    calls = []
    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(
            IMPLEMENTATIONS, name, lambda q, k, v, spec, n=name: (calls.append(n), q)[1]
        )
    q, k, v = inputs(16, 16)
    for name in IMPLEMENTATIONS:
        attention(q, k, v, AttentionSpec(scale=1.0), implementation=name)
    assert calls == list(IMPLEMENTATIONS)
