"""Who guesses the next tokens of a text, so that the model reads several at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.rules.penalties import History, suffix_matches
from jaxlm.model.block import Block
from jaxlm.model.divisible import divisible_config
from jaxlm.model.kv_cache import SPARE, Cache
from jaxlm.model.transformer import forward
from jaxlm.sharding.rules import reshard
from jaxlm.types import Params

# Draws a token for each row from logits [B, V], by the rules of its text, and returns
# the longer rows and what was drawn (`decoding.Drawn`).
Draw = Callable[[Any, Any], tuple[Any, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptLookup:
    """Guesses that the last tokens of a text go on as they did before in it.

    It costs no other model, and pays where the new text repeats parts of the prompt:
    edits of code, summaries, answers about a document (Saxena 2023,
    github.com/apoorvumang/prompt-lookup-decoding).
    """

    num_speculative_tokens: int = field(default=7, metadata={"static": True})
    """Tokens that are guessed at once."""
    max_ngram: int = field(default=3, metadata={"static": True})
    """The last tokens that are looked for; of the longest matches the newest counts."""
    min_ngram: int = field(default=2, metadata={"static": True})
    """Shorter matches guess nothing."""

    def __post_init__(self):
        _check_number(self)
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"PromptLookup: min_ngram is {self.min_ngram} and max_ngram "
                f"{self.max_ngram}: they must be 1 or more, the first not above the "
                "second"
            )

    def propose(self, history: History) -> Int[Array, "B K"]:
        """Returns the tokens that may come next; -1: no guess."""
        tokens, lengths = history.tokens, history.lengths
        matches = suffix_matches(history, jnp.full_like(lengths, self.max_ngram))
        index = jnp.arange(tokens.shape[1])
        is_match = (matches >= self.min_ngram) & (index < lengths[:, None])
        rank = jnp.where(is_match, matches * tokens.shape[1] + index, -1)
        start = jnp.argmax(rank, axis=1)[:, None]
        # Where the match reaches the end of the text, the text goes around.
        period = jnp.maximum(lengths[:, None] - start, 1)
        ahead = start + jnp.arange(self.num_speculative_tokens) % period
        found = jnp.take_along_axis(tokens, ahead, axis=1)
        return jnp.where(is_match.any(axis=1, keepdims=True), found, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftModel:
    """A smaller model with the same tokens, which writes ahead.

    It draws by the rules, settings and keys of each row, so with the very noise that
    the model itself draws with: where both think alike, they draw the same token.
    """

    config: ModelConfig = field(metadata={"static": True})
    params: Params = field(repr=False)
    """Stacked over layers, as `init` and `load` return them."""
    num_speculative_tokens: int = field(default=4, metadata={"static": True})
    """Tokens that are guessed at once."""

    def __post_init__(self):
        _check_number(self)

    def propose(
        self,
        layers: Any,
        lengths: Int[Array, " B"],
        rows: Any,
        draw: Draw,
        vocab_size: int,
    ) -> tuple[Any, Int[Array, "B K"]]:
        """Returns its cache, and the tokens that it draws next.

        Args:
          layers: its cache (`Cache.layers`) of the first `lengths` - 1 tokens, or more.
          lengths: tokens of each row without the newest.
          rows: `decoding.Rows`, the newest token included.
          vocab_size: of the model that it guesses for.
        """
        # The last token that was accepted may not be in the cache.
        index = jnp.stack([lengths - 1, lengths], axis=1)
        newest = jnp.take_along_axis(rows.history.tokens, index, axis=1)
        cache, logits = self._read(Cache(layers, lengths - 1), newest, vocab_size)
        rows, drawn = draw(logits, rows)

        def step(carry, _):
            cache, rows, tokens = carry
            cache, logits = self._read(cache, tokens[:, None], vocab_size)
            rows, drawn = draw(logits, rows)
            return (cache, rows, drawn.tokens), drawn.tokens

        (cache, *_), more = jax.lax.scan(
            step, (cache, rows, drawn.tokens), length=self.num_speculative_tokens - 1
        )
        return cache.layers, jnp.concatenate([drawn.tokens[None], more]).T

    def _read(
        self, cache: Cache, tokens: Int[Array, "B T"], vocab_size: int
    ) -> tuple[Cache, Float[Array, "B V"]]:
        config = divisible_config(self.config, Block)
        out = forward(
            *(config, self.params, tokens),
            positions=positions_within(self.config, cache, tokens),
            cache=cache,
        )
        assert out.cache is not None and out.logits is not None
        logits = reshard(out.logits[:, -1], "B_")[:, :vocab_size]
        missing = vocab_size - logits.shape[1]
        return out.cache, jnp.pad(logits, ((0, 0), (0, missing)), constant_values=NEVER)


Proposer = PromptLookup | DraftModel


def positions_within(
    config: ModelConfig, cache: Cache, tokens: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Returns the positions of new tokens; guesses beyond the context get its last."""
    index = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    return jnp.minimum(index, config.context_length - 1)


def _check_number(proposer: Any) -> None:
    number = proposer.num_speculative_tokens
    if not isinstance(number, int) or not 1 <= number <= SPARE:
        raise ValueError(
            f"{type(proposer).__name__}: num_speculative_tokens is {number!r}: it must "
            f"be from 1 to {SPARE}"
        )
