"""Cross-entropy, from all logits at once or in chunks that never hold them all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.ops.layout import reshape


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array | np.ndarray, "*B"]
) -> Float[Array, "*B"]:
    """Computes -log p of each target, in nats, with an f32 softmax.

    For a text: `cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()`.

    Args:
      logits: any float dtype.
      targets: ids below V.

    Raises:
      ValueError: when the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {logits.shape} need targets of shape {logits.shape[:-1]}, not "
            f"{targets.shape}: the logits of a token belong to the one after it, "
            "logits[:, :-1] to tokens[:, 1:]"
        )
    return _nll_and_lse(logits.astype(jnp.float32), jnp.asarray(targets))[0]


def _nll_and_lse(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns -log p of the targets, and the log-sum-exp of the logits."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    # Compares instead of indexing, so that a sharded vocabulary needs no gather.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return lse - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1), lse


def cross_entropy_sums(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes weighted sums over all tokens, in nats, with an f32 softmax.

    Args:
      logits: any float dtype.
      loss_weights: f32, weight of each token.
      z_loss: weight of log(Z)^2 (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Returns:
      The objective (with the z-loss), and the sum of the cross-entropies alone. Divide
      both by the sum of the weights.
    """
    nll, lse = _nll_and_lse(logits.astype(jnp.float32), targets)
    entropy = jnp.sum(nll * loss_weights)
    if not z_loss:
        return entropy, entropy
    return entropy + z_loss * jnp.sum(jnp.square(lse) * loss_weights), entropy


def chunked_cross_entropy_sums(
    unembed: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden_states: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes `cross_entropy_sums` of `unembed(hidden_states)` in chunks of each row.

    The backward pass recomputes the logits of each chunk, so at most [B, chunk, V] are
    held. `T` need not be a multiple of `chunk`.

    Args:
      unembed: from hidden states to logits.
      chunk: positions per chunk.
    """
    T = hidden_states.shape[1]
    missing = -T % chunk

    def chunks(x: Array) -> Array:
        """[B, T, ...] -> [n, B, chunk, ...]; padding has weight 0."""
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        B, T, *rest = x.shape
        kept = (0, None, 1, *range(2, x.ndim))
        x = reshape(x, (B, T // chunk, chunk, *rest), kept)
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def one_chunk(sums, inputs):
        hidden_states, targets, loss_weights = inputs
        logits = unembed(hidden_states)
        new = cross_entropy_sums(logits, targets, loss_weights, z_loss=z_loss)
        return (sums[0] + new[0], sums[1] + new[1]), None

    start = (jnp.zeros(()), jnp.zeros(()))
    inputs = (chunks(hidden_states), chunks(targets), chunks(loss_weights))
    sums, _ = jax.lax.scan(one_chunk, start, inputs)
    return sums
