"""What attention computes: `AttentionSpec`, with the `Mask` of what may be seen.

Every implementation reads these two values. `reference.py` reads them literally and is
the definition; the faster ones are proven against it.

Letters of shapes: B batch, T queries, S keys, N query heads, K key heads, G = N / K,
H head dimension.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Num

# The score of a hidden key: finite, so that a query that sees no key gives no NaN.
MASKED = -1e30


class Tokens(NamedTuple):
    """What a mask knows of some queries or of some keys: int32, of any shape."""

    positions: Any
    segments: Any = None
    """None: all tokens are in one segment."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query may attend to. Key s is at position s."""

    causal: bool = field(default=True, metadata={"static": True})
    """Hide the keys after the query."""
    window: int | None = field(default=None, metadata={"static": True})
    """Number of tokens that a query sees, itself included; None: no limit."""
    # `Any`: see `jaxlm/types.py` on leaves.
    query_positions: Any = None
    """[#B, T] int32: position of each query among the keys; None: 0 to T - 1."""
    query_segments: Any = None
    """[#B, T] int32: attention stays inside a segment (with `key_segments`)."""
    key_segments: Any = None
    """[#B, S] int32."""

    def allowed(self, query: Tokens, key: Tokens, num_keys: int | None = None) -> Any:
        """Where these queries may attend to these keys, as booleans.

        The one definition. Reads none of the mask's arrays, so that it serves whole
        rows as well as the block that a kernel holds.

        Args:
          query, key: integers that broadcast to the shape of the scores.
          num_keys: hide the keys from this position on: a block may reach over the end.

        Returns:
          None where nothing is hidden.
        """
        conditions = []
        if self.causal:
            conditions.append(key.positions <= query.positions)
        if self.window is not None:
            conditions.append(query.positions - key.positions < self.window)
        if query.segments is not None:
            conditions.append(query.segments == key.segments)
        if num_keys is not None:
            conditions.append(key.positions < num_keys)
        allowed = None
        for condition in conditions:
            allowed = condition if allowed is None else allowed & condition
        return allowed

    def queries(self, T: int) -> Tokens:
        """All queries, [#B, T]."""
        positions = self.query_positions
        if positions is None:
            positions = jnp.arange(T)[None]
        return Tokens(positions, self.query_segments)

    def keys(self, S: int) -> Tokens:
        """All keys, [#B, S]."""
        return Tokens(jnp.arange(S)[None], self.key_segments)

    def pairs(
        self, queries: Tokens, keys: Tokens, num_keys: int | None = None
    ) -> Bool[Array, "#B T S"]:
        """`allowed` for every pair of some queries [#B, T] and some keys [#B, S]."""
        rows = jax.tree.map(lambda x: x[:, :, None], queries)
        columns = jax.tree.map(lambda x: x[:, None, :], keys)
        all_true = jnp.ones((*queries.positions.shape, keys.positions.shape[1]), bool)
        allowed = self.allowed(rows, columns, num_keys)
        return all_true if allowed is None else allowed & all_true

    def array(self, T: int, S: int) -> Bool[Array, "#B T S"]:
        """True where query t may attend to key s."""
        return self.pairs(self.queries(T), self.keys(S))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionSpec:
    """What attention computes, apart from its queries, keys and values."""

    scale: float = field(metadata={"static": True})
    """Factor of the scores."""
    mask: Mask = Mask()
    soft_cap: float | None = field(default=None, metadata={"static": True})
    """Scores become cap * tanh(scores / cap)."""
    sinks: Any = None
    """[N]: for each head a logit that takes part in the softmax and has no value."""
    key_scale: Any = None
    """[B, S, K] f32, with `value_scale`: keys and values are int8 and stand for their
    product with it; see `quantize`."""
    value_scale: Any = None
    """[B, S, K] f32."""


def quantize(
    x: Float[Array, "*B H"],
) -> tuple[Int8[Array, "*B H"], Float[Array, "*B"]]:
    """Keys or values in int8, and the scale of each row: x is near int8 * scale.

    Symmetric, by the greatest magnitude of the row; a row of zeros has scale 1.
    """
    x = x.astype(jnp.float32)
    greatest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(greatest > 0, greatest / 127.0, 1.0)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def dequantize(
    k: Num[Array, "B S K H"], v: Num[Array, "B S K H"], spec: AttentionSpec, dtype: Any
) -> tuple[Array, Array, AttentionSpec]:
    """Keys and values in `dtype`, and the spec without their scales."""
    if spec.key_scale is None:
        return k, v, spec
    k = (k.astype(jnp.float32) * spec.key_scale[..., None]).astype(dtype)
    v = (v.astype(jnp.float32) * spec.value_scale[..., None]).astype(dtype)
    return k, v, replace(spec, key_scale=None, value_scale=None)
