"""Directions of the residual stream from pairs of texts, to steer a model by.

A vector is added by an edit, in `forward` and in `generate`:
`Edit("resid_post", "add", strength * vector, layer=layer)`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params


def last_token_values(
    config: ModelConfig,
    params: Params,
    rows: Sequence[Int[np.ndarray, " _"]] | Sequence[Sequence[int]],
    layer: int,
    *,
    site: str = "resid_post",
) -> Float[Array, "B *_"]:
    """Returns a site at the last token of each row, f32, from one pass.

    Rows may have different lengths: shorter ones are filled up, and what comes after a
    token does not change it.
    """
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row

    @jax.jit
    def read(params: Params, tokens: Array, last: Array) -> Array:
        taps = (Tap(site, (layer,)),)
        out = forward(config, params, tokens, taps=taps, head=False, stop=layer + 1)
        values = out.trace[site][0]
        return values[jnp.arange(len(last)), last].astype(jnp.float32)

    return read(params, tokens, lengths - 1)


def steering_vector(
    positive: Float[Array, "P *D"], negative: Float[Array, "P *D"]
) -> Float[Array, "*D"]:
    """Returns the mean of `positive - negative` over pairs of texts.

    Source: Rimsky et al. 2023, arXiv:2312.06681 (contrastive activation addition);
    Turner et al. 2023, arXiv:2308.10248.

    Args:
      positive, negative: of `last_token_values`, a pair in each row.
    """
    return jnp.mean(positive - negative, axis=0)
