"""The logit lens: what the model would say from each layer, if it were the last.

`jacobian_lens.py` has a lens that reads earlier layers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import unembed
from jaxlm.types import Params


def logit_lens(
    config: ModelConfig, params: Params, stream: Float[Array, "L B T D"]
) -> Float[Array, "L B T V"]:
    """Returns `unembed(final_norm(x))` of each value of the residual stream, f32.

    Of `resid_post` the last layer's is the model's own prediction. Source:
    nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return unembed(config, params, stream, norm=True)


def stream_norms(stream: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Returns the Euclidean length of each vector, f32.

    The same as a tap with `reduce="norm"`, which keeps nothing else.
    """
    return jnp.linalg.norm(stream.astype(jnp.float32), axis=-1)


def lens_depth(choices: Int[Array, "L *B"]) -> Int[Array, "*B"]:
    """Returns how many layers the answer needs: from then on it stays the last one's.

    Args:
      choices: the likeliest token after each layer, of `logit_lens`.
    """
    same = jnp.flip(choices == choices[-1], axis=0)
    return choices.shape[0] - jnp.sum(jnp.cumprod(same, axis=0), axis=0) + 1
