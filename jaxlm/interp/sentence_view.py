"""A few numbers on how a model reads one sentence, to be followed while it trains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.interp.head_scores import induction, previous_token
from jaxlm.interp.lens import lens_depth, logit_lens
from jaxlm.interp.prediction import entropy
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import reshard
from jaxlm.types import Params


class SentenceView(NamedTuple):
    """Means over a sentence, and scores of all heads; f32."""

    entropy: Float[Array, ""]
    """Of the next token, in nats."""
    lens_depth: Float[Array, ""]
    """Layers until the logit lens has the answer."""
    previous: Float[Array, "L N"]
    """How much each head looks at the token before."""
    induction: Float[Array, "L N"]
    """How much each head looks at what followed the same token before."""


def sentence_view(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], length: int
) -> SentenceView:
    """Returns the view of a sentence that is repeated: induction heads need that.

    Works on any mesh; the rows are the same, as many as the batch has shards.

    Args:
      tokens: rows of the sentence, again and again.
      length: of the sentence; entropy and depth are those of its first reading.
    """
    taps = (Tap("resid_post"), Tap("attn_probs"))
    out = forward(config, params, tokens, taps=taps)

    def choice(stream: Float[Array, "B T D"]) -> Int[Array, "B T"]:
        logits = logit_lens(config, params, stream[None])[0]
        return reshard(jnp.argmax(logits, axis=-1), "__")

    depth = lens_depth(jax.lax.map(choice, out.trace["resid_post"]))
    # Few numbers, which no device needs to share.
    probs = reshard(out.trace["attn_probs"], "_____")
    ids = reshard(tokens, "__")
    entropies = reshard(entropy(out.logits), "__")
    return SentenceView(
        jnp.mean(entropies[0, :length]),
        jnp.mean(depth[0, :length], dtype=jnp.float32),
        previous_token(probs)[:, 0],
        induction(probs, ids)[:, 0],
    )
