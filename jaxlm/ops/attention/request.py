"""`AttentionRequest`: all that is known of an attention call at trace time."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from jaxlm.ops.attention.spec import AttentionSpec, Mask


def target() -> tuple[str, str]:
    """Returns the platform and kind of the device that is compiled for.

    This is the device of the current mesh, which this machine need not have (when
    compiling ahead of time), else JAX's default device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device: Any = None if mesh.empty else mesh.abstract_device
    device = device or jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform, device.device_kind


def _auto_mesh() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind == AxisType.Auto and size > 1 for kind, size in axes)


@dataclass(frozen=True)
class AttentionRequest:
    """One attention call, with its shapes before a mesh shards batch and heads.

    Each implementation decides from it whether it can run the call.
    """

    q: jax.ShapeDtypeStruct
    """[B, T, N, H]"""
    k: jax.ShapeDtypeStruct
    """[B, S, K, H]; v has the same shape and dtype."""
    spec: AttentionSpec
    """With a `jax.ShapeDtypeStruct` for each array."""
    lse: bool = False
    """Whether the log-sum-exp is requested."""
    ring: bool = False
    """Whether it is called with the keys of one device after the other."""
    platform: str = field(default_factory=lambda: target()[0])
    """cpu, gpu or tpu."""
    device_kind: str = field(default_factory=lambda: target()[1])
    """As JAX names the device, e.g. `TPU v5 lite`."""
    auto_mesh: bool = field(default_factory=_auto_mesh)
    """Whether XLA chooses how arrays are sharded over devices (Auto mesh axes)."""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the queries."""
        return jnp.dtype(self.q.dtype)

    @property
    def num_queries(self) -> int:
        return self.q.shape[1]

    @property
    def num_keys(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]


def request(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    spec: AttentionSpec,
    *,
    lse: bool = False,
) -> AttentionRequest:
    """Builds the request of a call with these arguments on the current device."""
    return AttentionRequest(_shape(q), _shape(k), jax.tree.map(_shape, spec), lse)


def part_of_row(
    whole: AttentionRequest, devices: int, *, ring: bool
) -> AttentionRequest:
    """Returns the request of one of the devices that a row is cut over."""
    B, T, *heads = whole.q.shape
    q = jax.ShapeDtypeStruct((B, T // devices, *heads), whole.q.dtype)
    positions = jax.ShapeDtypeStruct((1, T // devices), jnp.int32)
    mask = replace(whole.spec.mask, query_positions=positions)
    spec = replace(whole.spec, mask=mask)
    return replace(whole, q=q, spec=spec, lse=whole.lse or ring, ring=ring)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def request_of_sizes(
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    segments: bool = False,
    query_positions: bool = False,
    lse: bool = False,
) -> AttentionRequest:
    """Builds a request from plain sizes, without arrays.

    Set `segments` for training, and `query_positions` for a call with a cache.
    """

    def array(present: bool, *shape: int) -> jax.ShapeDtypeStruct | None:
        array_dtype = jnp.float32 if len(shape) == 1 else jnp.int32
        return jax.ShapeDtypeStruct(shape, array_dtype) if present else None

    mask = Mask(
        causal,
        window,
        query_positions=array(query_positions, batch, num_queries),
        query_segments=array(segments, batch, num_queries),
        key_segments=array(segments, batch, num_keys),
    )
    return AttentionRequest(
        jax.ShapeDtypeStruct((batch, num_queries, num_heads, head_dim), dtype),
        jax.ShapeDtypeStruct((batch, num_keys, num_kv_heads, head_dim), dtype),
        AttentionSpec(head_dim**-0.5, mask, soft_cap, sinks=array(sinks, num_heads)),
        lse,
    )
