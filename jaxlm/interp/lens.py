"""Lenses: what the model would say from each layer, if it had to.

The logit lens takes each layer for the last. The Jacobian lens first moves a value of
an earlier layer to the end, by the average derivative of the last layer by it, and so
reads layers that the logit lens cannot.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.linear import compute_dtype
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params


def logit_lens(
    config: ModelConfig, params: Params, stream: Float[Array, "L B T D"]
) -> Float[Array, "L B T V"]:
    """Returns `unembed(final_norm(x))` of each value of the residual stream, f32.

    Of `resid_post` the last layer's is the model's own prediction. Source:
    nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return unembed(config, params, stream, norm=True)


def jacobian_lens(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    skip: int = 16,
    batch_size: int = 16,
) -> Float[Array, "L D D"]:
    """Returns the mean Jacobian of the last layer's stream by each layer's, f32.

    `J_l = mean over p of sum over q >= p of d resid_post[L-1, q] / d resid_post[l, p]`,
    over the positions from `skip` on and over the rows, from D backward passes through
    one forward pass. `J_l x` is then what a value x of layer l contributes to the end:
    give `transported(J, stream)` to `logit_lens`. Average it over some hundred texts of
    128 tokens; rows of one call share their memory. Source: Gurnee et al. 2026,
    "Verbalizable representations form a global workspace in language models".

    Args:
      skip: first tokens, whose attention and values are unlike the others'.
      batch_size: backward passes at once: a bound on memory.
    """
    shape = (config.num_layers, *tokens.shape, config.model_dim)
    last = Tap("resid_post", (config.num_layers - 1,))

    def end(change: Array) -> Array:
        edits = (Edit("resid_post", "add", change),)
        out = forward(config, params, tokens, taps=(last,), edits=edits, head=False)
        return jnp.sum(out.trace["resid_post"][0, :, skip:].astype(jnp.float32), (0, 1))

    _, backward = jax.vjp(end, jnp.zeros(shape, compute_dtype(config.dtype)))

    def row(direction: Float[Array, " D"]) -> Float[Array, "L D"]:
        (gradient,) = backward(direction)
        return jnp.mean(gradient[:, :, skip:].astype(jnp.float32), axis=(1, 2))

    rows = jax.lax.map(row, jnp.eye(config.model_dim), batch_size=batch_size)
    return rows.swapaxes(0, 1)


def transported(
    jacobian: Float[Array, "L D D"], stream: Float[Array, "L B T D"]
) -> Float[Array, "L B T D"]:
    """Returns `J_l x` of each value of `resid_post`, f32."""
    return jnp.einsum("LED,LBTD->LBTE", jacobian, stream.astype(jnp.float32))


def stream_norms(stream: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Returns the Euclidean length of each vector, f32.

    The same as a tap with `reduce="norm"`, which keeps nothing else.
    """
    return jnp.linalg.norm(stream.astype(jnp.float32), axis=-1)


def stream_alignment(
    addends: Float[Array, "*B D"], stream: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """Returns the cosine of what is added to the stream and of the stream, f32.

    1 makes it longer, 0 turns it, a negative value takes from it.
    """
    x, y = addends.astype(jnp.float32), stream.astype(jnp.float32)
    lengths = stream_norms(x) * stream_norms(y)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-30)


def lens_depth(choices: Int[Array, "L *B"]) -> Int[Array, "*B"]:
    """Returns how many layers the answer needs: from then on it stays the last one's.

    Args:
      choices: the likeliest token after each layer, of `logit_lens`.
    """
    same = jnp.flip(choices == choices[-1], axis=0)
    return choices.shape[0] - jnp.sum(jnp.cumprod(same, axis=0), axis=0) + 1
