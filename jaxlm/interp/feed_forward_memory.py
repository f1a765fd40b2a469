"""The feed-forward as a memory: which units fired, and which tokens they promote.

A unit is a key and a value: `mlp_act` says how much it fires at a token, and its row of
the down projection is what it then adds to the residual stream. Source: Geva et al.
2021, arXiv:2012.14913; 2022, arXiv:2203.14680.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.interp.causes.logit_attribution import head_rows, logit_weights
from jaxlm.types import Params


class Units(NamedTuple):
    """Some units of all layers, the strongest first."""

    layers: Int[Array, " n"]
    units: Int[Array, " n"]
    parts: Float[Array, " n"]
    """What each was chosen by."""


def strongest_units(parts: Float[Array, "L F"], count: int) -> Units:
    """Returns the units with the largest |parts|, of all layers together.

    Args:
      parts: of `unit_attribution` at one token, or any other score.
    """
    flat = parts.reshape(-1)
    _, best = jax.lax.top_k(jnp.abs(flat), count)
    layers, units = jnp.divmod(best, parts.shape[1])
    return Units(layers, units, flat[best])


def promoted_tokens(
    config: ModelConfig,
    params: Params,
    layers: Int[Array, " n"],
    units: Int[Array, " n"],
    count: int,
    signs: Float[Array, " n"] | float = 1.0,
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """Returns the tokens whose logits a unit raises most, and by how much.

    `w_out . (gain * unembedding)`: for each unit of activation, where the last norm
    divides by 1. A unit with a negative activation lowers them.

    Args:
      signs: of each unit's activation, for the tokens that it raises as it is.

    Returns:
      Ids, and what they get, f32, the largest first.
    """
    down = params["layers"]["mlp"]["down"][layers, units].astype(jnp.float32)
    weights = logit_weights(config, params, head_rows(config, params))
    signed = down * jnp.reshape(jnp.asarray(signs), (-1, 1))
    raised, ids = jax.lax.top_k(signed @ weights.T, count)
    return ids, raised
