"""The decode kernel for Hopper, in Pallas' interpreter, against the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from marks_case import slow_but
from ops_case import make_spec, normal

from jaxlm.ops.attention.gpu import gpu_decode, warpgroup
from jaxlm.ops.attention.gpu.gpu_decode import best_splits, forward
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Mask, quantize

SCALE = 0.2
BF16, F16 = jnp.bfloat16, jnp.float16
# From rounding probabilities, and results up to 4, to 8 and to 11 bits.
ERROR = {BF16: 2e-2, F16: 3e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes as in the kernel; `positions` has the position of each row's last query."""

    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: type
    splits: int
    positions: tuple[int, ...] | None
    options: dict = dataclasses.field(default_factory=dict)
    int8: bool = False


SEGMENTS = np.repeat([[1, 2, 3]], [70, 80, 50], axis=1).astype(np.int32)
CASES = {
    "one query": Case(1, 200, 6, 3, 64, BF16, 1, (57, 190)),
    "splits": Case(1, 513, 6, 3, 128, BF16, 3, (512, 200)),
    "one block, more splits": Case(4, 37, 6, 1, 32, F16, 3, (36, 20)),
    "window": Case(8, 200, 3, 3, 96, F16, 3, (199, 90), {"window": 70}),
    "all keys": Case(1, 200, 2, 1, 64, BF16, 3, None, {"causal": False}),
    "the first queries": Case(8, 37, 2, 2, 32, F16, 1, None),
    "two blocks of rows": Case(8, 200, 12, 1, 32, F16, 3, (199,), {"window": 150}),
    "int8": Case(1, 513, 6, 3, 64, BF16, 3, (500, 60), int8=True),
    "all options": Case(
        4,
        200,
        4,
        2,
        32,
        F16,
        3,
        (180,),
        {
            "window": 100,
            "soft_cap": 2.0,
            "sinks": normal(5, 4),
            "query_segments": SEGMENTS[:, 146:150],
            "key_segments": SEGMENTS,
        },
        int8=True,
    ),
}


def prepare(case):
    """Returns (q, k, v, spec), the dequantized keys and values, and the options."""
    B = len(case.positions or (0, 0))
    shapes = ((B, case.T, case.N, case.H), *[(B, case.S, case.K, case.H)] * 2)
    q, k, v = (jnp.asarray(normal(i, *x), case.dtype) for i, x in enumerate(shapes))
    options = dict(case.options)
    if case.positions is not None:
        last = np.array(case.positions, np.int32)[:, None]
        options["query_positions"] = last - np.arange(case.T, dtype=np.int32)[::-1]
    scales, meant = {}, (k, v)
    if case.int8:
        (k, scales["key_scale"]), (v, scales["value_scale"]) = map(quantize, (k, v))
        scale = (scales["key_scale"], scales["value_scale"])
        meant = [
            np.float64(x) * np.float64(s)[..., None]
            for x, s in zip((k, v), scale, strict=True)
        ]
    spec = make_spec(SCALE, **options, **scales)
    return (q, k, v, spec), meant, options


def run(q, k, v, spec, splits):
    settings = GpuSettings(decode_splits=splits, interpret=True)
    return jax.jit(lambda *args: forward(*args, settings))(q, k, v, spec)


@pytest.mark.parametrize("name", slow_but(["all options"], CASES))
def test_value(name):
    """Results and log-sum-exps equal the oracle's; blocks that no query of a row can
    see are not read."""
    case = CASES[name]
    (q, k, v, spec), meant, options = prepare(case)
    expected, expected_lse = ops_case.attention_and_lse(
        q, *meant, scale=SCALE, **options
    )
    if case.positions is not None and not case.int8:
        last = np.array(case.positions)[:, None]
        block = np.arange(case.S) // 64
        hidden = block > last // 64
        if spec.mask.window is not None:
            hidden |= block < (last - case.T + 1 - spec.mask.window + 1) // 64
        k, v = (jnp.where(hidden[..., None, None], jnp.nan, x) for x in (k, v))
    z, lse = run(q, k, v, spec, case.splits)
    assert z.dtype == case.dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(z), expected, atol=ERROR[case.dtype])
    # Products of 16-bit numbers are exact in f32, and their sums nearly so.
    np.testing.assert_allclose(lse, expected_lse, atol=5e-6)


def test_splits_are_merged_without_rounding():
    """257 and -255 have the mean 1, but bf16 cannot represent 257."""
    values = np.repeat([[256, 258, -255]], [32, 32, 64], axis=1)
    v = jnp.asarray(np.tile(values[..., None, None], (1, 1, 1, 16)), BF16)
    q, k = jnp.zeros((1, 1, 1, 16), BF16), jnp.zeros((1, 128, 1, 16), BF16)
    z, _ = run(q, k, v, AttentionSpec(SCALE, Mask(causal=False)), 2)
    assert np.all(z == 1)


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0], np.float32)])
def test_a_row_without_keys(sinks):
    """It gives zeros, and the sink or -1e30, beside a row that has keys."""
    case = Case(1, 64, 2, 1, 32, F16, 2, (-1, 40), {"sinks": sinks})
    (q, k, v, spec), _, _ = prepare(case)
    z, lse = run(q, k, v, spec, case.splits)
    assert not np.any(z[0]) and np.all(np.isfinite(np.float32(z[1])))
    np.testing.assert_allclose(lse[0, :, 0], [MASKED] * 2 if sinks is None else sinks)


@pytest.mark.slow
def test_no_races(monkeypatch):
    """No thread reads what a copy may be writing, or the reverse."""
    params = dataclasses.replace(warpgroup.interpreter(), detect_races=True)
    monkeypatch.setattr(warpgroup, "interpreter", lambda: params)
    case = Case(1, 300, 1, 1, 32, BF16, 1, (299,), {"sinks": normal(5, 1)}, int8=True)
    (q, k, v, spec), _, _ = prepare(case)
    run(q, k, v, spec, 1)
    # JAX has no public name for this.
    assert not gpu_callbacks.get_races().races_found


def test_best_splits():
    """Splits fill all multiprocessors, and none is tiny."""

    def splits(B, S, K):
        return best_splits((B, S, K, 128), 4 * K)

    assert splits(1, 1 << 17, 8) == 33 == -(-2 * gpu_decode.MULTIPROCESSORS // 8)
    assert splits(1, 1024, 8) == 4
    assert splits(1, 100, 8) == 1
    assert splits(64, 1 << 17, 8) == 1
