"""The attention mask (`Mask`) and the other options of attention (`AttentionSpec`).

Every implementation takes an `AttentionSpec`. `reference.py` computes it literally and
is the definition; the faster implementations are tested against an oracle that does the
same in float64.

Shape letters: B batch, T queries, S keys, N query heads, K key heads, G = N / K,
H head dimension.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Num

from jaxlm.ops.quantization import round_to_integers

# The score of a hidden key. Finite, so that a query without visible keys gives no NaN.
MASKED = -1e30


class Tokens(NamedTuple):
    """Positions and segments of some queries or some keys: int32, any shape."""

    positions: Any
    segments: Any = None
    """None: all tokens belong to one segment."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys each query may attend to. Key s has position s."""

    causal: bool = field(default=True, metadata={"static": True})
    """Hide keys after the query."""
    window: int | None = field(default=None, metadata={"static": True})
    """Hide keys this many or more positions before the query; None: hide none."""
    # `Any`: see `jaxlm/types.py` on leaves.
    query_positions: Any = None
    """[#B, T] int32: the position of each query among the keys; None: 0 to T - 1."""
    query_segments: Any = None
    """[#B, T] int32: attention stays within a segment. Needs `key_segments`."""
    key_segments: Any = None
    """[#B, S] int32."""

    def allowed(self, query: Tokens, key: Tokens, num_keys: int | None = None) -> Any:
        """Returns where these queries may attend to these keys.

        The only definition of the mask. It does not read the mask's arrays, so it works
        for whole sequences and for the block that a kernel holds.

        Args:
          query, key: tokens whose integers broadcast to the shape of the scores.
          num_keys: hide keys from this position on, for a block that extends past the
            last key.

        Returns:
          Booleans in the shape of the scores, or None if nothing is hidden.
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
        """`allowed` for every pair of the queries [#B, T] and the keys [#B, S]."""
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
    """Everything that defines attention besides its queries, keys and values."""

    scale: float = field(metadata={"static": True})
    """The scores are multiplied by this."""
    mask: Mask = Mask()
    soft_cap: float | None = field(default=None, metadata={"static": True})
    """Scores become cap * tanh(scores / cap)."""
    sinks: Any = None
    """[N]: one logit per head that joins the softmax but has no value."""
    key_scale: Any = None
    """[B, S, K] f32: the keys are int8, to be multiplied by this; see `quantize`."""
    value_scale: Any = None
    """[B, S, K] f32: the same for the values. Set both scales or neither."""


def quantize(
    x: Float[Array, "*B H"], bits: Literal[4, 8] = 8
) -> tuple[Int8[Array, "*B H"], Float[Array, "*B"]]:
    """Quantizes keys or values to int8, with one f32 scale per vector of length H.

    Symmetric: x is close to int8 * scale, with scale = max(|x|) / 127, or 7 for 4 bits.
    A vector of zeros has scale 1.
    """
    dtype = jnp.int8 if bits == 8 else jnp.int4
    values, scale = round_to_integers(x, [-1], dtype)
    return values.astype(jnp.int8), scale[..., 0]


def dequantize(
    k: Num[Array, "B S K H"], v: Num[Array, "B S K H"], spec: AttentionSpec, dtype: Any
) -> tuple[Array, Array, AttentionSpec]:
    """Returns keys and values in `dtype`, and the spec without their scales.

    Without scales in the spec, returns its arguments.
    """
    if spec.key_scale is None:
        return k, v, spec
    k = (k.astype(jnp.float32) * spec.key_scale[..., None]).astype(dtype)
    v = (v.astype(jnp.float32) * spec.value_scale[..., None]).astype(dtype)
    return k, v, replace(spec, key_scale=None, value_scale=None)
