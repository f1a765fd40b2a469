"""Where attention looks, and how much it brings from there.

Arrays are those of a trace; leading axes, such as the layers, are kept.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def value_weighted(
    probs: Float[Array, "*L B N T S"],
    values: Float[Array, "*L B S K H"],
    output: Float[Array, "*L N H D"],
) -> Float[Array, "*L B N T S"]:
    """Returns `p_ts |v_s W_O|`: the length of what each key adds to each query.

    A first token that takes most of the attention often has a value near 0, and then
    vanishes from this map. Source: Kobayashi et al. 2020, arXiv:2004.10102.

    Args:
      probs: the site `attn_probs`.
      values: the site `v`; query head n reads key head n // G.
      output: `params["layers"]["attn"]["o"]`, of the same layers.
    """
    groups = probs.shape[-3] // values.shape[-2]
    v = jnp.repeat(values.astype(jnp.float32), groups, axis=-2)
    # |v W| for all pairs, by the Gram matrix of W: no [S, N, D] is formed.
    w = output.astype(jnp.float32)
    gram = jnp.einsum("...NHD,...NJD->...NHJ", w, w)
    squares = jnp.einsum("...BSNH,...NHJ,...BSNJ->...BNS", v, gram, v)
    return probs * jnp.sqrt(jnp.maximum(squares, 0.0))[..., None, :]


def sink_mass(
    probs: Float[Array, "*L B N T S"], num_sinks: int = 1
) -> Float[Array, "*L B N"]:
    """Returns the mean probability on the first keys, of all queries after them.

    Source: Xiao et al. 2023, arXiv:2309.17453.
    """
    return jnp.mean(jnp.sum(probs[..., num_sinks:, :num_sinks], axis=-1), axis=-1)
