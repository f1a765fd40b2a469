"""Attention over rows that are cut over devices (context parallelism).

Each device holds some tokens of each row, as queries and as keys. Two ways lead to the
keys of the others, with any mask and the same result:

- `gathered_attention`: each device gets all keys and values of its rows;
- `ring_kernels`: keys and values go around all devices, and each attends to those that
  pass (Liu et al. 2023, arXiv:2310.01889). No device ever holds more than its share.

In a causal mask later tokens see more keys. In zigzag order a row has two pieces for
each of n devices, and device i holds pieces i and 2n - 1 - i, so that all see as many.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxlm.ops.attention.flash import FlashKernels
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Mask
from jaxlm.ops.layout import reshape


def to_zigzag(x: Shaped[Array, "B T ..."], devices: int) -> Shaped[Array, "B T ..."]:
    """Puts whole rows into zigzag order; T is a multiple of 2 * devices."""
    pieces = _in_pieces(x, 2 * devices)
    first, last = pieces[:, :devices], pieces[:, devices:][:, ::-1]
    return _reshape(jnp.stack([first, last], axis=2), x.shape)


def from_zigzag(x: Shaped[Array, "B T ..."], devices: int) -> Shaped[Array, "B T ..."]:
    """The inverse of `to_zigzag`."""
    pieces = _in_pieces(x, 2 * devices)
    first, last = pieces[:, ::2], pieces[:, 1::2][:, ::-1]
    return _reshape(jnp.concatenate([first, last], axis=1), x.shape)


def _in_pieces(x: Array, count: int) -> Array:
    return _reshape(x, (x.shape[0], count, x.shape[1] // count, *x.shape[2:]))


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    """Splits or joins dimensions after the first, which are whole on each device."""
    return reshape(x, shape, (0,) + (None,) * (len(shape) - 1))


# In the names of the operations that exchange keys, for `plan/traffic.py`.
SCOPE = "context_parallel"


@dataclass(frozen=True)
class Cut:
    """How the tokens of a row lie on devices."""

    axis: str
    """The mesh axis that cuts them."""
    devices: int
    zigzag: bool

    def starts(self, device: Any, length: int) -> list[Any]:
        """Returns the first position of each piece that a device holds.

        Args:
          length: tokens of the row that a device holds.
        """
        if not self.zigzag:
            return [device * length]
        size = length // 2
        return [device * size, (2 * self.devices - 1 - device) * size]

    def positions(self, device: Any, length: int) -> Int[Array, " T"]:
        """Returns the position in the row of each token that a device holds."""
        starts = self.starts(device, length)
        index = jnp.arange(length // len(starts))
        return jnp.concatenate([start + index for start in starts])


def gathered_attention(run, cut: Cut, q, k, v, spec: AttentionSpec):
    """Calls `run` with the queries of this device, and all keys.

    Args:
      run: (q, k, v, spec) -> (z, lse).
      q, k, v, spec: what this device holds, in a `shard_map`.
    """

    def whole_rows(x: Array) -> Array:
        with jax.named_scope(SCOPE):
            x = jax.lax.all_gather(x, cut.axis, axis=1, tiled=True)
        return from_zigzag(x, cut.devices) if cut.zigzag else x

    positions = cut.positions(jax.lax.axis_index(cut.axis), q.shape[1])
    k, v, key_segments = jax.tree.map(whole_rows, (k, v, spec.mask.key_segments))
    mask = replace(
        spec.mask, query_positions=positions[None], key_segments=key_segments
    )
    return run(q, k, v, replace(spec, mask=mask))


def ring_kernels(inner: FlashKernels, cut: Cut) -> FlashKernels:
    """Returns kernels for what a device holds, in a `shard_map`, that see whole rows.

    They call `inner` for the keys of one device after the other, and merge the results
    by their log-sum-exp. Going backward, the gradients of keys and values travel with
    them, and come home after a whole round.
    """
    return FlashKernels(_ring_forward, _ring_backward, _Ring(inner, cut))


@dataclass(frozen=True)
class _Ring:
    inner: FlashKernels
    cut: Cut


def _pass_on(cut: Cut, tree: Any) -> Any:
    """Sends arrays to the next device of the ring, and returns those received."""
    pairs = [(i, (i + 1) % cut.devices) for i in range(cut.devices)]
    with jax.named_scope(SCOPE):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, cut.axis, pairs), tree)


def piece_masks(
    mask: Mask, cut: Cut, queries: Any, keys: Any, length: int
) -> list[tuple[slice, Mask]]:
    """Returns the pieces of one device's keys, and the mask of each.

    Args:
      queries, keys: the devices whose queries and keys these are.
      length: tokens of the row that a device holds.
    """
    positions = cut.positions(queries, length)[None]
    starts = cut.starts(keys, length)
    size, masks = length // len(starts), []
    for number, start in enumerate(starts):
        piece = slice(number * size, (number + 1) * size)
        segments = mask.key_segments
        if segments is not None:
            segments = segments[:, piece]
        moved = replace(mask, query_positions=positions - start, key_segments=segments)
        masks.append((piece, moved))
    return masks


def _ring_forward(q, k, v, spec: AttentionSpec, settings: _Ring):
    """See `flash.FlashKernels`."""
    inner, cut = settings.inner, settings.cut
    here, length = jax.lax.axis_index(cut.axis), q.shape[1]

    def attend(step, held, merged):
        """Merges what the queries see of the keys that came here in `step` steps."""
        k, v, segments = held
        z, lse = merged
        mask = replace(spec.mask, key_segments=segments)
        source = (here - step) % cut.devices
        for piece, piece_mask in piece_masks(mask, cut, here, source, length):
            part = replace(spec, mask=piece_mask, sinks=None)
            more, more_lse = inner.forward(
                q, k[:, piece], v[:, piece], part, inner.settings
            )
            total = jnp.logaddexp(lse, more_lse)
            z = z * _share(lse, total) + more * _share(more_lse, total)
            lse = total
        return z, lse

    def step(carry, number):
        held, merged = carry
        following = _pass_on(cut, held)
        return (following, attend(number, held, merged)), None

    held = (k, v, spec.mask.key_segments)
    nothing = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((q.shape[0], q.shape[2], length), MASKED, jnp.float32),
    )
    last = cut.devices - 1
    (held, merged), _ = jax.lax.scan(step, (held, nothing), jnp.arange(last))
    z, lse = attend(last, held, merged)
    if spec.sinks is not None:
        total = jnp.logaddexp(lse, spec.sinks.astype(jnp.float32)[:, None])
        z, lse = z * _share(lse, total), total
    return z.astype(q.dtype), lse


def _share(lse: Float[Array, "B N T"], total: Float[Array, "B N T"]) -> Array:
    """Returns what part of the probability is here, [B T N 1]."""
    return jnp.exp(lse - total).swapaxes(1, 2)[..., None]


def _ring_backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: _Ring):
    """See `flash.FlashKernels`."""
    inner, cut = settings.inner, settings.cut
    here, length = jax.lax.axis_index(cut.axis), q.shape[1]

    def add(step, held, grads):
        """Adds the gradients of the keys that came here in `step` steps."""
        k, v, segments = held
        dq, dk, dv = grads
        mask = replace(spec.mask, key_segments=segments)
        source = (here - step) % cut.devices
        for piece, piece_mask in piece_masks(mask, cut, here, source, length):
            part = replace(spec, mask=piece_mask, sinks=None)
            more = inner.backward(
                *(q, k[:, piece], v[:, piece], part, lse, delta, dz, inner.settings)
            )
            dq += more[0]
            dk = dk.at[:, piece].add(more[1])
            dv = dv.at[:, piece].add(more[2])
        return dq, dk, dv

    def step(carry, number):
        held, grads = carry
        following = _pass_on(cut, held)
        dq, *dkv = add(number, held, grads)
        return (following, (dq, *_pass_on(cut, dkv))), None

    held = (k, v, spec.mask.key_segments)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    last = cut.devices - 1
    (held, grads), _ = jax.lax.scan(step, (held, zeros), jnp.arange(last))
    dq, *dkv = add(last, held, grads)
    dk, dv = _pass_on(cut, dkv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
