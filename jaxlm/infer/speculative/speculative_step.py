"""One step of speculative decoding: several tokens of a text in one pass of the model.

After the token that the model draws come guesses (`proposals.py`). The model reads all
of them at once, and then draws at each place as it would without them: by the same
rules, with the key of that token. A guess is kept while it is the token drawn, and the
first other token is drawn again by the next step. So the text is the one that decoding
token by token writes, whatever was guessed, greedy or sampled.

For a guess without chance that accepts as often as rejection sampling does (Leviathan
et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), and the token drawn
after a rejection follows their residual distribution. A draft model that samples uses
the same noise as the model (Daliri et al. 2024, arXiv:2408.07978).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.infer.speculative.proposals import Draw


def keep_drawn(
    draw: Draw,
    first: Any,
    rows: Any,
    proposals: Int[Array, "B K"],
    logits: Float[Array, "B K+1 V"],
) -> tuple[Any, Float[Array, "B V"], Any]:
    """Draws token after token while the guesses are what is drawn.

    Args:
      first: the `Drawn` of the token before the guesses.
      rows: with that token.
      proposals: -1 where there is none.
      logits: after that token and after each guess.

    Returns:
      The rows with the guesses kept, the logits of their next token, and all K + 1
      tokens drawn: those that are not part of the text are not `inside`.
    """
    num_proposals = proposals.shape[1]
    drawn = jax.tree.map(
        lambda x: jnp.stack([x, *[jnp.zeros_like(x)] * num_proposals], axis=1), first
    )
    # The text may have ended with the first token.
    proposals = jnp.where(rows.is_done[:, None], -1, proposals)

    def goes_on(carry):
        i, _, _, alive, _ = carry
        return (i < num_proposals) & alive.any()

    def one(carry):
        i, rows, own, alive, drawn = carry
        longer, new = draw(own, rows)
        kept = alive & (new.tokens == at(proposals, i))
        rows = _where(kept, longer, rows)
        own = _where(kept, at(logits, i + 1), own)
        new = new._replace(inside=new.inside & kept)

        def put(x, y):
            return jax.lax.dynamic_update_index_in_dim(x, y, i + 1, axis=1)

        drawn = jax.tree.map(put, drawn, new)
        return i + 1, rows, own, kept & ~rows.is_done, drawn

    def at(x, i):
        return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    start = (jnp.int32(0), rows, logits[:, 0], ~rows.is_done, drawn)
    _, rows, own, _, drawn = jax.lax.while_loop(goes_on, one, start)
    is_proposed = jnp.pad(proposals >= 0, ((0, 0), (1, 0)))
    return rows, own, drawn._replace(is_proposed=is_proposed)


def read_guesses(
    read: Callable[[Any, Int[Array, "B T"]], tuple[Any, Float[Array, "B T V"], Any]],
    cache: Any,
    first: Int[Array, " B"],
    proposals: Int[Array, "B K"],
) -> tuple[Any, Float[Array, "B K+1 V"], Any]:
    """Reads a token and the guesses after it; the token alone where none is guessed.

    Args:
      read: (cache, tokens) -> cache with these, logits, hits.
    """
    num_proposals = proposals.shape[1]

    def all_tokens(cache):
        tokens = jnp.concatenate([first[:, None], jnp.maximum(proposals, 0)], axis=1)
        return read(cache, tokens)

    def one_token(cache):
        cache, logits, hits = read(cache, first[:, None])
        missing = ((0, 0), (0, num_proposals), (0, 0))
        return cache, jnp.pad(logits, missing), hits

    return jax.lax.cond((proposals >= 0).any(), all_tokens, one_token, cache)


def _where(mask: Bool[Array, " B"], x: Any, y: Any) -> Any:
    def choose(x, y):
        return jnp.where(jnp.expand_dims(mask, tuple(range(1, x.ndim))), x, y)

    return jax.tree.map(choose, x, y)
