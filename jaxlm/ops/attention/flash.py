"""Flash attention with a gradient of its own, for any kernels that compute its parts.

Dao et al. 2022 (arXiv:2205.14135): the forward pass keeps the log-sum-exp of each
query, the backward pass computes the scores again from it. Nothing of size [T, S] is
held.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.spec import MASKED, AttentionSpec


@dataclass(frozen=True)
class FlashKernels:
    """The two halves, and how they run."""

    forward: Callable
    """(q, k, v, spec, settings) -> (z in q's dtype [B T N H], lse [B N T] f32)."""
    backward: Callable
    """(q, k, v, spec, lse, delta, dz, settings) -> (dq, dk, dv), shaped as q, k and v,
    in their dtypes. delta [B N T] f32 is the sum of dz * z, less the gradient of lse;
    lse is huge for queries that see no key. Sums are in the same order every time."""
    settings: Any
    """Block sizes and the like; hashable."""


def flash_attention(
    kernels: FlashKernels,
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """z in q's dtype and the log-sum-exp of the scores, the sink included, f32.

    Both have gradients, but not over int8 keys. A query that sees no key gives zeros,
    and -1e30 or its sink.

    Raises:
      ValueError: for q, k and v of several dtypes.
    """
    int8 = spec.key_scale is not None
    if not int8 and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}")
    return _flash(kernels, q, k, v, spec)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(kernels, q, k, v, spec):
    return kernels.forward(q, k, v, spec, kernels.settings)


def _flash_forward(kernels, q, k, v, spec):
    z, lse = kernels.forward(q, k, v, spec, kernels.settings)
    return (z, lse), (q, k, v, spec, z, lse)


def _flash_backward(kernels, residuals, cotangents):
    q, k, v, spec, z, lse = residuals
    if spec.key_scale is not None:
        raise ValueError("attention over int8 keys has no gradient: dequantize them")
    dz, dlse = cotangents
    delta = jnp.einsum(
        "BTNH,BTNH->BNT", dz, z, preferred_element_type=jnp.float32, precision="highest"
    )
    delta -= dlse
    dspec = jax.tree.map(lambda x: None, spec)
    if spec.sinks is not None:
        share = jnp.exp(spec.sinks.astype(jnp.float32)[:, None] - lse)
        dsinks = -jnp.sum(share * delta, axis=(0, 2))
        dspec = replace(dspec, sinks=dsinks.astype(spec.sinks.dtype))
    # exp(score - lse) is then 0 also where all scores are MASKED.
    lse = jnp.where(lse > MASKED / 2, lse, -MASKED)
    dq, dk, dv = kernels.backward(q, k, v, spec, lse, delta, dz, kernels.settings)
    return dq, dk, dv, dspec


_flash.defvjp(_flash_forward, _flash_backward)
