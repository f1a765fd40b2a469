"""Oracles in float64 NumPy, from the definitions, and finite differences."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention.request import AttentionRequest, request_of_sizes
from jaxlm.ops.attention.spec import AttentionSpec, Mask


def normal(seed, *shape):
    """Draws f32 numbers from N(0, 1)."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_request(**asked) -> AttentionRequest:
    """Makes an `AttentionRequest` of plain sizes, with only the given options."""
    device = {x: asked.pop(x) for x in ("platform", "device_kind") if x in asked}
    sizes = {"num_queries": 1024, "num_keys": 1024, "num_heads": 4, "num_kv_heads": 2}
    asked = {"batch": 2, **sizes, "head_dim": 80, "dtype": jnp.bfloat16, **asked}
    return dataclasses.replace(request_of_sizes(**asked), **device)


def make_spec(scale, **options) -> AttentionSpec:
    """Makes a spec from the options of `attention_and_lse`."""
    options = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }
    of_mask = {field.name for field in dataclasses.fields(Mask)} & set(options)
    mask = Mask(**{name: options.pop(name) for name in of_mask})
    return AttentionSpec(scale, mask, **options)


def slope(function, x, direction, step=1e-5):
    """Computes a central difference of a float64 function along `direction`."""
    x, direction = np.float64(x), np.float64(direction)
    high, low = function(x + step * direction), function(x - step * direction)
    return (high - low) / (2 * step)


def attention(q, k, v, **spec):
    """Returns the first result of `attention_and_lse`."""
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
    query_positions=None,
):
    """Computes attention by definition, one query at a time, in float64.

    A query that sees no key gives zeros and -inf.
    """
    q, k, v = np.float64(q), np.float64(k), np.float64(v)
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    out, lse = np.zeros_like(q), np.full((B, N, T), -np.inf)
    keys = np.arange(S)
    for b in range(B):
        for t in range(T):
            position = t if query_positions is None else query_positions[b, t]
            seen = np.ones(S, bool)
            if causal:
                seen &= keys <= position
            if window is not None:
                seen &= position - keys < window
            if query_segments is not None:
                seen &= query_segments[b, t] == key_segments[b]
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
