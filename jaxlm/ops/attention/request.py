"""What a call of attention asks for, as far as it is known when it is traced."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from jaxlm.ops.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Request:
    """Implementations look at this and decline, or not. Sizes are those of one call,
    before a mesh cuts the batch and the heads."""

    platform: str
    """cpu, gpu or tpu."""
    device_kind: str
    """As JAX names the device, e.g. `TPU v5 lite`."""
    dtype: jnp.dtype
    """Of the queries."""
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    window: int | None
    soft_cap: float | None
    sinks: bool
    segments: bool
    query_index: bool
    """Places of the queries are given, as in decoding."""
    key_length: bool
    int8: bool
    """Keys and values are int8, with scales."""
    lse: bool
    """The log-sum-exp is wanted."""
    auto_mesh: bool = False
    """XLA decides how arrays are cut over several devices (Auto mesh axes)."""


def request(q: Array, k: Array, spec: AttentionSpec, *, lse: bool = False) -> Request:
    """The request that a call with these arguments makes of the current device."""
    platform, device_kind = target()
    return Request(
        platform=platform,
        device_kind=device_kind,
        dtype=jnp.dtype(q.dtype),
        num_queries=q.shape[1],
        num_keys=k.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        causal=spec.causal,
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=spec.sinks is not None,
        segments=spec.query_segments is not None,
        query_index=spec.query_index is not None,
        key_length=spec.key_length is not None,
        int8=spec.key_scale is not None,
        lse=lse,
        auto_mesh=_auto_mesh(),
    )


def _auto_mesh() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        kind == AxisType.Auto and size > 1
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )


def target() -> tuple[str, str]:
    """Platform and kind of the device that a program traced now is compiled for.

    That of the mesh in use, which may be one that this machine does not have (when
    compiling ahead of time), else JAX's default device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device: Any = None if mesh.empty else mesh.abstract_device
    device = device or jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform, device.device_kind
