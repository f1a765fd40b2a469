"""Cross-entropy, from all logits at once or in chunks that never hold them all."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jaxlm.ops.collectives import all_gather, axes_of, psum_scatter
from jaxlm.ops.ids import check_ids, concrete_values
from jaxlm.ops.layout import layout, reshape


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array | np.ndarray, "*B"]
) -> Float[Array, "*B"]:
    """Computes -log p of each target, in nats, with an f32 softmax.

    For a text: `cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()`.

    Args:
      logits: any float dtype.
      targets: ids below V. Of those that shall not count, take any id, and leave out
        the result.

    Raises:
      ValueError: when the shapes do not fit, and outside jit for an id that is not
        below V, such as the -100 of other libraries.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {logits.shape} need targets of shape {logits.shape[:-1]}, not "
            f"{targets.shape}: the logits of a token belong to the one after it, "
            "logits[:, :-1] to tokens[:, 1:]"
        )
    if (ids := concrete_values(targets)) is not None:
        check_ids("targets", ids, logits.shape[-1])
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


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def chunked_cross_entropy_sums(
    unembed: Callable[[Any, Float[Array, "1 C D"]], Float[Array, "1 C V"]],
    head: Any,
    hidden_states: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes `cross_entropy_sums` of `unembed(head, hidden_states)` in chunks.

    Each device goes through its own tokens. It gathers the head once, in the dtype of
    the hidden states. The gradient is made along with the value: only a chunk's logits
    are ever held, and computed once. That of the head is summed in f32, on each device
    and then over all of them, once.

    Only the objective has a gradient, and only with respect to `head` and
    `hidden_states`.

    Args:
      unembed: from the head and hidden states to logits; closes over no arrays.
      head: a tree of weights.
      chunk: tokens of a device whose logits are held at once.
    """
    run = partial(_chunk_sums, unembed, chunk, z_loss)
    return _on_each_device(run, head, hidden_states, targets, loss_weights)


def _forward(unembed, head, hidden_states, targets, loss_weights, chunk, z_loss):
    run = partial(_chunk_gradients, unembed, chunk, z_loss)
    arguments = (hidden_states, targets, loss_weights)
    sums, (d_head, dx) = _on_each_device(run, head, *arguments, gradients=True)
    d_head = jax.tree.map(lambda g, w: g.astype(w.dtype), d_head, head)
    return sums, (d_head, dx)


def _backward(unembed, chunk, z_loss, gradients, cotangents):
    scale, _ = cotangents
    scaled = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return *scaled, None, None


chunked_cross_entropy_sums.defvjp(_forward, _backward)


def _on_each_device(run, head, x, targets, loss_weights, gradients=False) -> Any:
    """Runs `run` on the tokens of each device, with the whole head; adds up the sums.

    With `gradients`, `run` also returns those of the head, which are added up as well,
    and of the hidden states.
    """
    spec = _spec(x)
    rows = P() if spec is None else P(*spec[:2])
    axes = tuple(axis for entry in rows for axis in axes_of(entry))
    whole = jax.tree.map(lambda w: w.astype(x.dtype), head)
    if not axes:
        return run(whole, x, targets, loss_weights)
    x, targets, loss_weights = jax.sharding.reshard(
        (x, targets, loss_weights), (P(*rows, None), rows, rows)
    )
    cuts: Any = jax.tree.map(_spec, head)
    whole = jax.tree.map(lambda w, cut: all_gather(w, cut, axes), whole, cuts)

    def local(whole, x, targets, loss_weights):
        sums, results = run(whole, x, targets, loss_weights), ()
        if gradients:
            sums, (d_head, dx) = sums
            results = jax.tree.map(lambda g: g[None], d_head), dx
        return jax.lax.psum(sums, axes), results

    on_each: Any = jax.shard_map(
        local,
        in_specs=(P(), rows, rows, rows),
        out_specs=(P(), (P(axes), rows) if gradients else ()),
        axis_names=set(axes),
        check_vma=False,
    )
    sums, results = on_each(whole, x, targets, loss_weights)
    if not gradients:
        return sums
    d_head, dx = results
    d_head = jax.tree.map(lambda g, cut: psum_scatter(g, cut, axes), d_head, cuts)
    return sums, (d_head, dx)


def _spec(x: Array) -> P | None:
    """Returns the partition of an array; None where no mesh axis is Explicit."""
    sharding = layout(x)
    return None if sharding is None else sharding.spec


def _chunk_sums(unembed, chunk, z_loss, head, x, targets, loss_weights):
    def add(sums, inputs):
        x, targets, loss_weights = inputs
        new = cross_entropy_sums(unembed(head, x), targets, loss_weights, z_loss=z_loss)
        return (sums[0] + new[0], sums[1] + new[1]), None

    inputs = [_chunks(a, chunk) for a in (x, targets, loss_weights)]
    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), inputs)[0]


def _chunk_gradients(unembed, chunk, z_loss, head, x, targets, loss_weights):
    def add(carry, inputs):
        x, targets, loss_weights = inputs

        @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def objective(head, x):
            return cross_entropy_sums(
                unembed(head, x), targets, loss_weights, z_loss=z_loss
            )

        # A gradient has the dtype of its weight. The product casts it back, and XLA
        # drops both casts.
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), head)
        sums, (d_head, dx) = objective(wide, x)
        return jax.tree.map(jnp.add, carry, (sums, d_head)), dx

    inputs = [_chunks(a, chunk) for a in (x, targets, loss_weights)]
    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), head)
    start = ((jnp.zeros(()), jnp.zeros(())), zeros)
    (sums, d_head), dx = jax.lax.scan(add, start, inputs)
    B, T, D = x.shape
    dx = reshape(dx, (-1, D), (None, None))[: B * T]
    return sums, (d_head, reshape(dx, x.shape, (None, None, None)))


def _chunks(x: Shaped[Array, "B T ..."], chunk: int) -> Shaped[Array, "n 1 C ..."]:
    """Cuts the tokens into chunks of equal size; padding is 0."""
    B, T, *rest = x.shape
    count = -(-B * T // chunk)
    size = -(-B * T // count)
    x = reshape(x, (B * T, *rest), (None,) * (1 + len(rest)))
    x = jnp.pad(x, ((0, count * size - B * T),) + ((0, 0),) * len(rest))
    return reshape(x, (count, 1, size, *rest), (None,) * (3 + len(rest)))
