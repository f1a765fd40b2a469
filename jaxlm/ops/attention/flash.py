"""The custom gradient of flash attention, shared by all kernels.

Dao et al. 2022 (arXiv:2205.14135): the forward pass saves the log-sum-exp of each
query, from which the backward pass recomputes the probabilities. Nothing of size [T, S]
is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.spec import MASKED, AttentionSpec


@dataclass(frozen=True)
class FlashKernels:
    """A forward and a backward kernel, and their settings."""

    forward: Callable
    """(q, k, v, spec, settings) -> (z in q's dtype [B T N H], lse [B N T] f32)."""
    backward: Callable
    """(q, k, v, spec, lse, delta, dz, settings) -> (dq, dk, dv), in the shapes and
    dtypes of q, k and v. delta [B N T] f32 is the sum of dz * z over H, minus the
    gradient of lse; lse is huge for queries that see no key. Must be deterministic:
    sums are always in the same order."""
    settings: Any
    """Block sizes and the like; hashable."""


def flash_attention(
    kernels: FlashKernels,
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Runs the kernels as a differentiable function.

    Returns:
      z in q's dtype, and the log-sum-exp of the scores, sinks included, f32. For a
      query that sees no key, they are zeros, and -1e30 or the sink.

    Raises:
      ValueError: if q, k and v differ in dtype, unless k and v are int8; and for a
        gradient with int8 keys.
    """
    int8 = spec.key_scale is not None
    if not int8 and not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one "
            "dtype"
        )
    return _flash(kernels, q, k, v, spec)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(kernels, q, k, v, spec):
    return kernels.forward(q, k, v, spec, kernels.settings)


def _flash_forward(kernels, q, k, v, spec):
    z, lse = kernels.forward(q, k, v, spec, kernels.settings)
    # What a remat policy can keep, so that the kernel does not run again.
    z, lse = (
        checkpoint_name(z, "attention_output"),
        checkpoint_name(lse, "attention_lse"),
    )
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
    # So that exp(score - lse) is 0 even where all scores are MASKED.
    lse = jnp.where(lse > MASKED / 2, lse, -MASKED)
    dq, dk, dv = kernels.backward(q, k, v, spec, lse, delta, dz, kernels.settings)
    return dq, dk, dv, dspec


_flash.defvjp(_flash_forward, _flash_backward)
