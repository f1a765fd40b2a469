"""Oracles in float64 NumPy, written from the definitions, and finite differences."""

from functools import partial

import jax
import numpy as np

from jaxlm.ops.attention.request import Request

# Tiny programs spend their time in the compiler: it need not try hard.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = partial(jax.jit, compiler_options=FAST)


def normal(seed, *shape):
    """f32 numbers from N(0, 1)."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_request(**asked):
    """A `Request` with no options but those given."""
    nothing = dict.fromkeys(
        ("sinks", "segments", "query_index", "key_length", "int8", "lse"), False
    )
    plain = {"causal": True, "window": None, "soft_cap": None, "num_heads": 4}
    return Request(**{**nothing, **plain, "num_kv_heads": 2, **asked})


def slope(function, x, direction, step=1e-5):
    """Central difference of a float64 function along `direction`."""
    x, direction = np.float64(x), np.float64(direction)
    high, low = function(x + step * direction), function(x - step * direction)
    return (high - low) / (2 * step)


def attention(q, k, v, **spec):
    """`attention_and_lse`, the first of the two."""
    return attention_and_lse(q, k, v, **spec)[0]


def attention_and_lse(
    q,
    k,
    v,
    *,
    scale,
    causal=True,
    window=None,
    soft_cap=None,
    sinks=None,
    query_segments=None,
    key_segments=None,
    query_index=None,
    key_length=None,
):
    """Attention by its definition, one query at a time, in float64.

    A query that sees no key gives zeros and -inf.
    """
    q, k, v = np.float64(q), np.float64(k), np.float64(v)
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    out, lse = np.zeros_like(q), np.full((B, N, T), -np.inf)
    keys = np.arange(S)
    for b in range(B):
        for t in range(T):
            place = t if query_index is None else query_index[b, t]
            seen = np.ones(S, bool)
            if causal:
                seen &= keys <= place
            if window is not None:
                seen &= place - keys < window
            if query_segments is not None:
                seen &= query_segments[b, t] == key_segments[b]
            if key_length is not None:
                seen &= keys < key_length[b]
            for n in range(N):
                head = n // (N // K)
                scores = k[b, seen, head] @ q[b, t, n] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores)
                total = weights.sum()
                if sinks is not None:
                    total += np.exp(np.float64(sinks[n]))
                if total > 0:
                    out[b, t, n] = weights / total @ v[b, seen, head]
                    lse[b, n, t] = np.log(total)
    return out, lse
