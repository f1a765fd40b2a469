"""The key/value cache: a value that is passed in, returned, and never changed.

Its kinds differ in how a layer holds its tokens, and have one interface (`append`,
`extend`): all tokens; in a ring, where a layer with a window has room for that and a
few more; and either of them in int8, or in 4 bits, two in a byte.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Num, UInt8

from jaxlm.ops.attention.spec import AttentionSpec, Mask, quantize
from jaxlm.ops.layout import layout

# Tokens for which a ring has room beyond its window: as many of its newest ones can be
# taken back, for another continuation.
SPARE = 32
_UNBOUNDED = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (after RoPE) and values of one layer, or of stacked layers."""

    # `Any`: see `jaxlm/types.py` on leaves.
    keys: Any
    """[B, S, K, H], or stacked [L, B, S, K, H]; any float dtype, or int8. In 4 bits
    uint8 [B, S, K, H / 2], see `pack`."""
    values: Any
    """Same shape as the keys."""
    key_scale: Any = None
    """[B, S, K] f32, or stacked: of keys in 8 or 4 bits, see `quantize`; None for
    others."""
    value_scale: Any = None
    """The same for the values."""
    window: int | None = field(default=None, metadata={"static": True})
    """Of a ring: tokens that a query sees. Token p is at index p % S. None: it is at p,
    and the cache holds all."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStacks:
    """Layers of which some have a ring: n stacks, the i-th of layers i, i + n ..."""

    stacks: tuple[LayerCache, ...]
    """n is the period of the kinds of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far."""

    layers: LayerCache | LayerStacks | tuple[LayerCache, ...]
    """Stacked over layers, or one per layer, matching the layout of the parameters."""
    lengths: Any
    """[B] int32: tokens in the cache, also the index where the next one is written."""
    is_empty: bool = field(default=False, metadata={"static": True})
    """Promises that `lengths` are 0. The new tokens then attend to each other only, and
    not to the whole of a cache of which they fill a part."""
    is_kept: bool = field(default=True, metadata={"static": True})
    """Whether the call returns it with the new tokens. If not, nothing of it is
    copied: many continuations of one text read the same value in one program."""
    ends: Any = None
    """[B] int32: new tokens from this index on are padding, which a ring does not keep.
    None: there is no padding."""

    @property
    def max_length(self) -> int:
        """Tokens for which each row has room; rings have room for any number."""
        layers = _parts(self.layers)
        full = [x.keys.shape[-3] for x in layers if x.window is None]
        return min(full, default=_UNBOUNDED)

    @property
    def is_plain(self) -> bool:
        """Whether it holds all tokens, as they were computed."""
        layers = _parts(self.layers)
        return all(x.window is None and x.key_scale is None for x in layers)


def _parts(
    layers: LayerCache | LayerStacks | tuple[LayerCache, ...],
) -> tuple[LayerCache, ...]:
    if isinstance(layers, LayerStacks):
        return layers.stacks
    return layers if isinstance(layers, tuple) else (layers,)


def unstack_layers(
    layers: LayerCache | LayerStacks | tuple[LayerCache, ...], num_layers: int
) -> tuple[LayerCache, ...]:
    """Returns one cache for each layer."""
    stacks = _parts(layers)
    period = len(stacks)
    return tuple(
        jax.tree.map(lambda x, i=i: x[i // period], stacks[i % period])
        for i in range(num_layers)
    )


def stack_layers(
    layers: tuple[LayerCache, ...], period: int
) -> LayerCache | LayerStacks:
    """The inverse of `unstack_layers`; `period` is that of the kinds of layers."""
    if len({jax.tree.structure(layer) for layer in layers}) == 1:
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)
    stacks = (layers[i::period] for i in range(period))
    return LayerStacks(
        tuple(jax.tree.map(lambda *x: jnp.stack(x), *stack) for stack in stacks)
    )


def append(
    cache: LayerCache,
    lengths: Int[Array, " B"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    ends: Int[Array, " B"] | None = None,
) -> LayerCache:
    """Returns one layer's cache with T more tokens in each row, from `lengths` on.

    Args:
      ends: as `Cache.ends`.
    """
    new = _stored(cache, keys, values)

    def write(old: Array, new: Array, start: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), start, axis=0
        )

    if cache.window is None:
        at = lengths
    elif keys.shape[1] == 1 and ends is None:
        at = lengths % cache.keys.shape[1]
    else:
        last = lengths + keys.shape[1] - 1
        if ends is not None:
            last = jnp.minimum(last, ends - 1)
        return jax.tree.map(lambda x, y: _write_ring(x, y, lengths, last), cache, new)
    return jax.tree.map(lambda x, y: jax.vmap(write)(x, y, at), cache, new)


def extend(
    cache: LayerCache,
    lengths: Int[Array, " B"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    spec: AttentionSpec,
    ends: Int[Array, " B"] | None = None,
) -> tuple[LayerCache, Num[Array, "B S K H"], Num[Array, "B S K H"], AttentionSpec]:
    """Adds tokens as `append` does, for queries that see them and those before.

    Args:
      spec: of the attention over a cache that holds all tokens; without positions of
        the queries the cache is empty, and they see the new tokens only.

    Returns:
      The new cache, the keys and values that the queries attend to, and how.
    """
    after = append(cache, lengths, keys, values, ends)
    if spec.mask.query_positions is None:
        return after, keys, values, spec
    seen, mask = after, spec.mask
    if cache.window is not None:
        if keys.shape[1] == 1:
            mask = _last_query(after, lengths)
        else:
            # Those of the ring that the new ones replace are still seen by the first.
            seen, mask = _unrolled(cache, _stored(cache, keys, values), lengths)
    k, v = seen.keys, seen.values
    if seen.key_scale is None:
        k, v = k.astype(keys.dtype), v.astype(values.dtype)
    elif k.dtype == jnp.uint8:
        k, v = unpack(k), unpack(v)
    scales = {"key_scale": seen.key_scale, "value_scale": seen.value_scale}
    return after, k, v, replace(spec, mask=mask, **scales)


def _stored(
    cache: LayerCache, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
) -> LayerCache:
    """Returns tokens in the form in which the cache holds them."""
    if cache.key_scale is None:
        return replace(cache, keys=keys, values=values)
    is_packed = cache.keys.dtype == jnp.uint8
    (keys, key_scale), (values, value_scale) = (
        quantize(x, 4 if is_packed else 8) for x in (keys, values)
    )
    if is_packed:
        keys, values = pack(keys), pack(values)
    return LayerCache(keys, values, key_scale, value_scale, cache.window)


def pack(x: Int8[Array, "*B H"]) -> UInt8[Array, "*B half"]:
    """Packs integers from -8 to 7, two in a byte: x[i] is below x[i + H / 2]."""
    low, high = jnp.split(x.astype(jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)


def unpack(x: UInt8[Array, "*B half"]) -> Int8[Array, "*B H"]:
    """The inverse of `pack`."""
    low, high = (y.astype(jnp.int8) >> 4 for y in (x << 4, x))
    return jnp.concatenate([low, high], axis=-1)


def _ring_positions(last: Int[Array, " B"], size: int) -> Int[Array, "B S"]:
    """Returns the token at each index of a ring whose newest is `last`.

    Negative where there is none yet.
    """
    last = last[:, None]
    return last - (last - jnp.arange(size)) % size


def _write_ring(
    old: Num[Array, "B S *rest"],
    new: Num[Array, "B T *rest"],
    lengths: Int[Array, " B"],
    last: Int[Array, " B"],
) -> Num[Array, "B S *rest"]:
    """Replaces what `new`, from `lengths` to `last`, brings around the ring."""
    index = _ring_positions(last, old.shape[1]) - lengths[:, None]
    newest = _rows_at(new.astype(old.dtype), jnp.clip(index, 0, new.shape[1] - 1))
    is_new = jnp.expand_dims(index >= 0, tuple(range(2, old.ndim)))
    return jnp.where(is_new, newest, old)


def _last_query(ring: LayerCache, lengths: Int[Array, " B"]) -> Mask:
    """Returns what one query sees of a ring that has its own token already."""
    assert ring.window is not None
    positions = _ring_positions(lengths, ring.keys.shape[1])
    seen = (positions >= 0) & (lengths[:, None] - positions < ring.window)
    return Mask(
        causal=False,
        query_positions=lengths[:, None],
        query_segments=jnp.ones_like(lengths)[:, None],
        key_segments=seen.astype(jnp.int32),
    )


def _unrolled(
    ring: LayerCache, new: LayerCache, lengths: Int[Array, " B"]
) -> tuple[LayerCache, Mask]:
    """Returns the tokens of a ring in order with new ones after them."""
    size, num_new = ring.keys.shape[1], new.keys.shape[1]
    positions = lengths[:, None] - size + jnp.arange(size)
    both = jax.tree.map(
        lambda x, y: jnp.concatenate(
            [_rows_at(x, positions % size), y.astype(x.dtype)], axis=1
        ),
        *(ring, new),
    )
    is_there = (positions >= 0).astype(jnp.int32)
    index = jnp.zeros_like(lengths)[:, None] + size + jnp.arange(num_new)
    ones = jnp.ones_like(index)
    mask = Mask(
        window=ring.window,
        query_positions=index,
        query_segments=ones,
        key_segments=jnp.concatenate([is_there, ones], axis=1),
    )
    return both, mask


def _rows_at(
    x: Num[Array, "B S *rest"], index: Int[Array, "B N"]
) -> Num[Array, "B N *rest"]:
    """Returns x[b, index[b]] for each row b."""

    def take(x, index):
        return jax.vmap(lambda row, at: row[at])(x, index)

    sharding = layout(x)
    if sharding is None:
        return take(x, index)
    rows = jax.P(sharding.spec[0], None)
    return jax.shard_map(
        take,
        in_specs=(sharding.spec, rows),
        out_specs=sharding.spec,
        check_vma=False,
    )(x, jax.sharding.reshard(index, rows))
