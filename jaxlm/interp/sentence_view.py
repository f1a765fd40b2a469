"""A few numbers on how a model reads one sentence, to be followed while it trains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.interp.causes.logit_attribution import head_rows, logit_weights
from jaxlm.interp.head_scores import induction, previous_token
from jaxlm.interp.lens import lens_depth, logit_lens
from jaxlm.interp.prediction import entropy
from jaxlm.model.transformer import forward
from jaxlm.ops.embedding import lookup
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import reshard
from jaxlm.types import Params, Trace


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
    memory: Float[Array, " L"] | None
    """What each feed-forward adds to the logit of the token that follows, over the mean
    of all tokens; None for a model whose logits are no sum over layers."""


def sentence_view(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], length: int
) -> SentenceView:
    """Returns the view of a sentence that is repeated: induction heads need that.

    Works on any mesh; the rows are the same, as many as the batch has shards.

    Args:
      tokens: rows of the sentence, again and again.
      length: of the sentence; but for the heads, its first reading is what counts.
    """
    sums = config.norm_placement != "post" and config.final_norm
    sites = ["resid_post", "attn_probs"]
    sites += ["mlp_out_post", "final_norm_div"] if sums else []
    taps = tuple(Tap(site) for site in sites)
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
        _memory(config, params, out.trace, tokens, length) if sums else None,
    )


def _memory(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    tokens: Int[Array, "B T"],
    length: int,
) -> Float[Array, " L"]:
    """Returns the field of `SentenceView`, by direct logit attribution."""
    rows = head_rows(config, params)
    following = reshard(lookup(rows, tokens, jnp.float32), "___")[0, 1 : length + 1]
    mean = reshard(jnp.mean(rows, axis=0, dtype=jnp.float32), "_")
    norm = jax.tree.map(lambda x: reshard(x, "_"), params["final_norm"])
    weights = logit_weights(config, {"final_norm": norm}, following - mean)
    written = reshard(trace["mlp_out_post"], "____")[:, 0, : len(following)]
    divisor = reshard(trace["final_norm_div"], "___")[0, : len(following)]
    parts = jnp.einsum("LTD,TD->LT", written.astype(jnp.float32), weights / divisor)
    return jnp.mean(parts[:, : max(length - 1, 1)], axis=1)
