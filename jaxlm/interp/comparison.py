"""Two prompts, or two checkpoints, beside each other.

Two prompts of as many tokens are compared by their traces, two checkpoints by the trace
of one prompt or by their parameters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import tree
from jaxlm.types import Params


def cosine(x: Float[Array, "*B D"], y: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Returns `x . y / (|x| |y|)` along the last axis, f32; 0 for a zero vector."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-30)


def relative_distance(
    x: Float[Array, "*B D"], y: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """Returns `|x - y| / |x|` along the last axis, f32.

    Of `resid_post` of two prompts it shows in which layer they part, and where.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    length = jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-30)
    return jnp.linalg.norm(x - y, axis=-1) / length


def kl_divergence(
    logits: Float[Array, "*B V"], other: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """Returns `sum_v p_v (log p_v - log q_v)` in nats, f32: p of the first logits."""
    p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    q = jax.nn.log_softmax(other.astype(jnp.float32), axis=-1)
    # A masked id of p adds nothing, whatever q is.
    return jnp.sum(jnp.where(p > -jnp.inf, jnp.exp(p) * (p - q), 0.0), axis=-1)


def parameter_change(
    params: Params, other: Params
) -> dict[str, Float[Array, ""] | Float[Array, " L"]]:
    """Returns `|other - w| / |w|` of each weight by its path, of each layer if stacked.

    Raises:
      ValueError: for parameters of different models.
    """
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, other):
        raise ValueError("these are parameters of two different models")

    def change(name: str, x: Array, y: Array) -> Array:
        axes = tuple(range(int(name.startswith("layers/")), x.ndim))
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        total = jnp.sqrt(jnp.sum(jnp.square(x), axes))
        return jnp.sqrt(jnp.sum(jnp.square(y - x), axes)) / jnp.maximum(total, 1e-30)

    return tree.flatten(tree.map_with_name(change, params, other))
