"""Every implementation of attention against a float64 oracle, in value and gradient."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from marks_case import slow_but
from ops_case import make_spec, normal, slope

from jaxlm.ops.attention import blocked, cached, dense
from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS, Kernel
from jaxlm.ops.attention.gpu import pallas_gpu
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.reference import (
    attention_lse,
    attention_scores,
    reference_attention,
)
from jaxlm.ops.attention.request import request
from jaxlm.ops.attention.spec import (
    MASKED,
    AttentionSpec,
    Mask,
    dequantize,
    quantize,
)
from jaxlm.ops.attention.tpu import pallas_tpu
from jaxlm.ops.attention.tpu.tpu_blocks import TpuSettings

B, N, K = 2, 6, 3
SCALE = 0.3
DEVICE = jax.default_backend()
if DEVICE != "cpu":
    # By default these round f32 operands of matmuls.
    jax.config.update("jax_default_matmul_precision", "highest")


@dataclass(frozen=True)
class Case:
    """How one implementation is tested, in blocks of `unit` tokens."""

    run: Callable
    unit: int = 16
    head_dim: int = 8
    heads: tuple[int, int] = (N, K)
    dtype: type = jnp.float32
    atol: float = 3e-6
    """For f32 sums of tens of terms."""
    slope: float = 1e-4
    """Relative error of the slope of a sum of thousands of results."""


# Kernels run compiled on their own device, and interpreted elsewhere.
CASES = {
    "reference": Case(reference_attention),
    "dense": Case(partial(dense.dense_attention, settings=dense.DenseSettings(16))),
    "xla": Case(
        partial(blocked.blocked_attention, settings=blocked.BlockedSettings(16))
    ),
    "cached": Case(partial(cached.cached_attention, settings=16)),
}
if DEVICE == "gpu":
    # Tensor cores do not multiply f32: results up to 4 are rounded to 11 bits, and so are
    # the probabilities and their gradients.
    settings = {"dtype": jnp.float16, "atol": 5e-3, "slope": 1e-2}
else:
    settings = {"atol": 1e-5}
# Small, because their interpreter is slow; it accepts f32 too.
HOPPER = {"unit": 64, "head_dim": 32, "heads": (2, 1), **settings}
KERNELS = {"pallas_gpu": "plain", "pallas_gpu, specialized": "specialized"}
for name, kind in KERNELS.items():
    settings = GpuSettings(forward=kind, backward=kind, interpret=DEVICE != "gpu")
    run = partial(pallas_gpu.attention, settings=settings)
    CASES[name] = Case(run, **HOPPER)
if DEVICE == "tpu":
    settings = TpuSettings(128, 128, 128, 128, 128)
    run = partial(pallas_tpu.attention, settings=settings)
    CASES["pallas_tpu"] = Case(run, 128, 64)
else:
    settings = TpuSettings(16, 16, 16, 16, 16, interpret=True)
    CASES["pallas_tpu"] = Case(partial(pallas_tpu.attention, settings=settings))


def implementation(name):
    return IMPLEMENTATIONS[name.partition(",")[0]]


def options(names, case):
    """Returns (T, S, values of the spec) with the named options, three blocks long."""
    unit = case.unit
    T = S = 3 * unit
    spec = {}
    if "odd" in names:
        T, S = T - 11, S - 11
    rng = np.random.default_rng(7)
    if "positions" in names:
        T = T - 2 * unit
        start = rng.integers(0, S - T, (B, 1))
        start[-1] = S - T
        spec["query_positions"] = (start + np.arange(T)).astype(np.int32)
    if "all keys" in names:
        spec["causal"] = False
    if "window" in names:
        spec["window"] = unit + 4
    if "soft cap" in names:
        spec["soft_cap"] = 1.5
    if "sinks" in names:
        spec["sinks"] = normal(5, case.heads[0])
    if "segments" in names:
        keys = np.repeat([[1, 2, 3], [1, 1, 2]], unit, axis=1).astype(np.int32)
        spec["key_segments"] = keys[:, :S]
        spec["query_segments"] = keys[:, S - T : S]
        if "positions" in names:
            positions = spec["query_positions"]
            spec["query_segments"] = np.take_along_axis(keys, positions, axis=1)
    return T, S, spec


OPTIONS = [
    (),
    ("all keys",),
    ("window",),
    ("soft cap",),
    ("sinks",),
    ("segments",),
    ("positions",),
    ("odd",),
    # For each pair of options, these have both, either one alone, and neither.
    ("soft cap", "window", "sinks", "segments"),
    ("all keys", "sinks", "positions", "odd"),
    ("all keys", "segments", "positions"),
    ("all keys", "soft cap", "window", "odd"),
    ("window", "positions"),
    ("soft cap", "segments", "positions", "odd"),
    ("window", "sinks", "segments", "positions", "odd"),
]


def able(name, names):
    """Returns whether the implementation supports these options."""
    case = CASES[name]
    T, S, spec = options(names, case)
    q, k, _ = (x.astype(jnp.bfloat16) for x in inputs(T, S, case))
    call = request(q, k, make_spec(SCALE, **spec), lse=True)
    if isinstance(implementation(name), Kernel):
        platform = implementation(name).platform
        kind = {"gpu": "NVIDIA H100", "tpu": "TPU v5 lite"}[platform]
        call = dataclasses.replace(call, platform=platform, device_kind=kind)
    return implementation(name).declines(call) is None


def inputs(T, S, case=CASES["reference"]):
    H, (N, K) = case.head_dim, case.heads
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    # Scores of about one, whatever the head_dim.
    return [
        jnp.asarray(normal(i, *shape) * (8 / H) ** 0.25, case.dtype)
        for i, shape in enumerate(shapes)
    ]


# The specialized kernels have tests of their own in the interpreter: the forward kernel in
# gpu/test_specialized_forward.py, all in test_gpu_check.py.
SHORT = [name for name in CASES if DEVICE == "gpu" or "specialized" not in name]
# Of the kernels that are interpreted, TPUs' is always tried.
QUICK = [name for name in SHORT if DEVICE == "gpu" or "pallas_gpu" not in name]


# With the first of both, each option of a kernel is always tried.
ALWAYS = (
    ("soft cap", "window", "sinks", "segments"),
    ("all keys", "sinks", "positions", "odd"),
)


def marks(name, names):
    """Most combinations are slow, except the reference's.

    They show what single options do, which are tried nightly; the reference's are slow.
    """
    plain = len(names) == 1 or ("pallas" in name and not names)
    if plain and name != "reference" and DEVICE == "cpu":
        return [pytest.mark.nightly]
    combined = name == "reference" and len(names) > 1
    quick = name in QUICK and (combined or names in ((), *ALWAYS))
    return [] if quick else [pytest.mark.slow]


PAIRS = [
    pytest.param(
        name,
        names,
        id=f"{name}: {', '.join(names) or 'causal'}",
        marks=marks(name, names),
    )
    for name, names in itertools.product(SHORT, OPTIONS)
    if able(name, names)
]


def test_every_pair_of_options_is_tried():
    every = sorted({name for names in OPTIONS for name in names})
    for one, other in itertools.combinations(every, 2):
        found = {(one in names, other in names) for names in OPTIONS}
        assert len(found) == 4, (one, other)


@pytest.mark.parametrize("name, names", PAIRS)
def test_value_and_gradient(name, names):
    """Value, log-sum-exp and their slopes in random directions equal the oracle's."""
    case = CASES[name]
    T, S, values = options(names, case)
    q, k, v = inputs(T, S, case)
    spec = make_spec(SCALE, **values)
    expected, expected_lse = ops_case.attention_and_lse(q, k, v, scale=SCALE, **values)
    # The result of a query that sees no key has no meaning.
    seen = np.isfinite(expected_lse)
    weight = normal(4, *q.shape) * seen.swapaxes(1, 2)[..., None]
    lse_weight = normal(5, *seen.shape) * seen

    @jax.jit
    def value_and_grads(q, k, v, sinks):
        def total(q, k, v, sinks):
            z, lse = case.run(q, k, v, dataclasses.replace(spec, sinks=sinks))
            z = z.astype(jnp.float32)
            return jnp.sum(z * weight) + jnp.sum(lse * lse_weight), (z, lse)

        which = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        return jax.grad(total, which, has_aux=True)(q, k, v, sinks)

    grads, (z, lse) = value_and_grads(q, k, v, spec.sinks)
    z = np.where(seen.swapaxes(1, 2)[..., None], z, 0)
    np.testing.assert_allclose(z, expected, atol=case.atol)
    np.testing.assert_allclose(lse[seen], expected_lse[seen], atol=case.atol)

    def oracle(q=q, k=k, v=v, sinks=None):
        given = values if sinks is None else {**values, "sinks": sinks}
        z, lse = ops_case.attention_and_lse(q, k, v, scale=SCALE, **given)
        return np.sum(z * weight) + np.sum(lse[seen] * lse_weight[seen])

    tested = [(q, "q"), (k, "k"), (v, "v")]
    tested += [] if spec.sinks is None else [(values["sinks"], "sinks")]
    for (x, argument), grad in zip(tested, grads, strict=True):
        direction = normal(9, *x.shape)
        right = slope(lambda x, a=argument: oracle(**{a: x}), x, direction)
        ours = np.sum(np.float64(grad) * direction)
        assert ours == pytest.approx(right, rel=case.slope, abs=10 * case.slope), (
            argument
        )
    if "pallas" in name and DEVICE == "cpu":
        return  # Interpreted programs run in one order anyway.
    again = value_and_grads(q, k, v, spec.sinks)
    for one, other in zip(jax.tree.leaves(again[0]), grads, strict=True):
        np.testing.assert_array_equal(one, other)


# A kernel's blocks have one shape, grouped or not.
BFLOAT16 = [
    (name, grouped)
    for name, grouped in itertools.product(CASES, (True, False))
    if grouped or "pallas" not in name or DEVICE != "cpu"
]


@pytest.mark.slow
@pytest.mark.parametrize("name, grouped", BFLOAT16)
@pytest.mark.parametrize("queries", ["all", "one"])
def test_bfloat16(name, grouped, queries):
    """bf16 results and gradients are as close to the oracle as rounding to bf16 allows.

    XLA:CPU supports bf16 only in some matmuls, so every shape is tried.
    """
    case = CASES[name]
    S = 3 * case.unit
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(S, S, case))
    if not grouped:
        q = q[:, :, : case.heads[1]]
    spec = AttentionSpec(scale=SCALE)
    if queries == "one":
        q = q[:, -1:]
        spec = AttentionSpec(SCALE, Mask(query_positions=jnp.full((B, 1), S - 1)))

    def total(q, k, v):
        z, _ = case.run(q, k, v, spec)
        return jnp.sum(z.astype(jnp.float32)), z

    grads, z = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert {x.dtype for x in (z, *grads)} == {jnp.dtype(jnp.bfloat16)}
    positions = spec.mask.query_positions
    expected = ops_case.attention(q, k, v, scale=SCALE, query_positions=positions)
    # Probabilities and results are rounded to 8 bits: 2 ** -8 of values up to 4.
    np.testing.assert_allclose(np.float32(z), expected, atol=2e-2)
    exact = jax.jit(
        jax.grad(
            lambda *x: jnp.sum(reference_attention(*x, spec)[0]), argnums=(0, 1, 2)
        )
    )(*(x.astype(jnp.float32) for x in (q, k, v)))
    for one, other in zip(grads, exact, strict=True):
        # Three roundings to 8 bits, in sums that partly cancel.
        near = 0.03 * np.abs(other).max()
        np.testing.assert_allclose(np.float32(one), other, atol=near)


@pytest.mark.parametrize("name", slow_but(QUICK, SHORT))
def test_query_head_n_is_served_by_key_head_n_over_g(name):
    case = CASES[name]
    if case.heads[1] == 1:
        case = dataclasses.replace(case, heads=(4, 2))
    N, K = case.heads
    q, k, _ = inputs(case.unit, case.unit, case)
    v = jnp.broadcast_to(jnp.arange(K, dtype=k.dtype)[:, None], k.shape)
    z, _ = jax.jit(case.run)(q, k, v, AttentionSpec(scale=SCALE))
    served = np.repeat(np.arange(K), N // K)
    np.testing.assert_allclose(z[0, :, :, 0], [served] * case.unit, atol=1e-6)


@pytest.mark.parametrize("name", slow_but(QUICK, SHORT))
def test_a_window_off_by_one_is_seen(name):
    case = CASES[name]
    q, k, v = inputs(3 * case.unit, 3 * case.unit, case)
    run = jax.jit(case.run)
    z, _ = run(q, k, v, AttentionSpec(SCALE, Mask(window=9)))
    for wrong in (8, 10):
        other = ops_case.attention(q, k, v, scale=SCALE, window=wrong)
        assert np.abs(z - other).max() > 0.05
    # The window counts the token itself.
    z, _ = run(q, k, v, AttentionSpec(SCALE, Mask(window=1)))
    np.testing.assert_allclose(
        z, np.repeat(v, q.shape[2] // k.shape[2], axis=2), atol=case.atol
    )


@pytest.mark.parametrize("name", slow_but(QUICK, SHORT))
def test_sinks_take_their_share(name):
    case = CASES[name]
    q, k, v = inputs(case.unit, case.unit, case)
    run = jax.jit(lambda spec: case.run(q, k, v, spec)[0])
    plain = run(AttentionSpec(scale=SCALE))
    none = run(AttentionSpec(scale=SCALE, sinks=jnp.full(q.shape[2], -1e4)))
    np.testing.assert_allclose(none, plain, atol=1e-6)
    heavy = run(AttentionSpec(scale=SCALE, sinks=jnp.full(q.shape[2], 30.0)))
    assert np.abs(heavy).max() < 1e-6


@pytest.mark.parametrize("name", slow_but(QUICK, SHORT))
def test_a_row_without_keys_is_finite(name):
    """Padding may see no key; it must not give NaN, forward or backward."""
    case = CASES[name]
    q, k, v = inputs(case.unit, case.unit, case)
    positions = jnp.full((B, case.unit), -1, jnp.int32)
    spec = AttentionSpec(SCALE, Mask(query_positions=positions))

    def total(q, k, v):
        return jnp.sum(case.run(q, k, v, spec)[0])

    value, grads = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", slow_but(QUICK, SHORT))
@pytest.mark.parametrize("queries", [1, 20])
def test_one_row_of_positions_serves_the_batch(name, queries):
    case = CASES[name]
    q, k, v = inputs(queries, 2 * case.unit, case)
    positions = np.arange(queries, dtype=np.int32)[None] + case.unit
    values = {"query_positions": positions, "window": case.unit}
    z, _ = jax.jit(case.run)(q, k, v, make_spec(SCALE, **values))
    values["query_positions"] = np.repeat(positions, B, axis=0)
    expected = ops_case.attention(q, k, v, scale=SCALE, **values)
    np.testing.assert_allclose(z, expected, atol=case.atol)


@pytest.mark.parametrize("name", slow_but(QUICK, SHORT))
def test_large_scores_do_not_overflow(name):
    case = CASES[name]
    q, k, v = inputs(case.unit, case.unit, case)
    large = (q * 100, k * 100, v, AttentionSpec(scale=SCALE))
    z, lse = jax.jit(case.run)(*large)
    expected = jax.jit(reference_attention)(*large)
    # Scores reach 3e4, where f32 numbers are 2e-3 apart.
    np.testing.assert_allclose(z, expected[0], atol=1e-2)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


EXTRAS = ("plain", "window, soft cap, sinks", "int8")


@pytest.mark.parametrize("name", [n for n in SHORT if n != "dense"])
@pytest.mark.parametrize("queries", slow_but([1], [1, 8]))
@pytest.mark.parametrize("extra", slow_but(["window, soft cap, sinks", "int8"], EXTRAS))
def test_decoding(name, queries, extra):
    """A few queries at the end of ragged rows, also with int8 keys and values."""
    case = CASES[name]
    S = 3 * case.unit - 5
    q, k, v = inputs(queries, S, case)
    start = np.array([[S - queries], [case.unit - 3]])
    values = {"query_positions": (start + np.arange(queries)).astype(np.int32)}
    if extra == "window, soft cap, sinks":
        values |= {"window": case.unit + 3, "soft_cap": 1.5}
        values["sinks"] = normal(5, case.heads[0])
    spec = make_spec(SCALE, **values)
    if extra == "int8":
        (k8, key_scale), (v8, value_scale) = quantize(k), quantize(v)
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        spec = dataclasses.replace(spec, **scales)
        rounded = [
            x * np.float32(s)[..., None]
            for x, s in ((k8, key_scale), (v8, value_scale))
        ]
        # The whole range of int8 is used, and rounding is at most half a step.
        assert np.abs(np.int32(k8)).max(axis=-1).min() == 127
        assert np.abs(rounded[0] - k).max() <= np.max(key_scale) / 2 + 1e-6
        k, v = rounded
        if implementation(name).int8:
            z, lse = jax.jit(case.run)(q, k8, v8, spec)
        else:
            z, lse = jax.jit(case.run)(q, *dequantize(k8, v8, spec, q.dtype))
    else:
        z, lse = jax.jit(case.run)(q, k, v, spec)
    expected = ops_case.attention_and_lse(q, k, v, scale=SCALE, **values)
    np.testing.assert_allclose(z, expected[0], atol=case.atol)
    np.testing.assert_allclose(lse, expected[1], atol=case.atol)


def test_long_rows_never_hold_all_scores():
    """At 32768 tokens, forward and backward use far less than one [T, S] matrix."""
    T, heads = 32768, 2

    def memory(run, length):
        def total(q, k, v):
            z, lse = run(q, k, v, AttentionSpec(scale=SCALE))
            return jnp.sum(z) + jnp.sum(lse)

        shape = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*(shape,) * 3).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(blocked.blocked_attention, T) < 4 * T * T / 100
    # The measurement would show such a matrix.
    assert memory(reference_attention, 4096) >= 4 * heads * 4096**2


def test_lse_and_probabilities():
    q, k, _ = inputs(16, 16)
    spec = make_spec(SCALE, window=5, sinks=normal(5, N))
    scores = np.float64(attention_scores(q, k, spec)).reshape(B, N, 16, 16)
    lse = np.float64(attention_lse(jnp.asarray(scores.reshape(B, K, 2, 16, 16)), spec))
    sinks = np.float64(spec.sinks)[:, None, None]
    total = np.exp(scores).sum(-1, keepdims=True) + np.exp(sinks)
    np.testing.assert_allclose(lse.reshape(B, N, 16), np.log(total)[..., 0], atol=1e-5)
    hidden = np.tril(np.ones((16, 16)), -5) + np.triu(np.ones((16, 16)), 1)
    assert ((scores == np.float32(MASKED)) == (hidden > 0)).all()


def test_mask_against_its_definition():
    positions, S = np.array([[3, 4], [0, 7]], np.int32), 9
    queries = np.array([[1, 2], [1, 1]], np.int32)
    segments = np.array([[1] * 4 + [2] * 5, [1] * 9], np.int32)
    for causal, window, with_segments, num_keys in itertools.product(
        (True, False), (None, 1, 3), (True, False), (None, 5)
    ):
        given = {"query_segments": queries, "key_segments": segments}
        given = jax.tree.map(jnp.asarray, given) if with_segments else {}
        mask = Mask(causal, window, query_positions=jnp.asarray(positions), **given)
        found = mask.pairs(mask.queries(2), mask.keys(S), num_keys)
        found = np.broadcast_to(found, (2, 2, S))
        for b, t, s in itertools.product(range(2), range(2), range(S)):
            seen = (
                (not causal or s <= positions[b, t])
                and (window is None or s > positions[b, t] - window)
                and (not with_segments or queries[b, t] == segments[b, s])
                and (num_keys is None or s < num_keys)
            )
            assert found[b, t, s] == seen
