"""Penalties: rules that make tokens less likely because of those before.

Each takes logits [B, V], the text of each row so far and its settings [B], and returns
logits. Rows are independent, so a mesh may split the batch around them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.infer.rules.filters import NEVER


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The tokens of each row so far."""

    # `Any`: see `jaxlm/types.py` on leaves.
    tokens: Any
    """[B, S] int32: the prompt, the new tokens after it, then anything."""
    lengths: Any
    """[B] int32: tokens of the prompt and new ones."""
    prompt_lengths: Any
    """[B] int32: tokens of the prompt."""

    @property
    def num_new(self) -> Int[Array, " B"]:
        """New tokens of each row."""
        return self.lengths - self.prompt_lengths

    def append(self, tokens: Int[Array, " B"]) -> "History":
        """Returns the history with one more token; a full row's last is replaced."""

        def write(row, token, at):
            return jax.lax.dynamic_update_slice_in_dim(row, token[None], at, axis=0)

        longer = jax.vmap(write)(self.tokens, tokens, self.lengths)
        return History(longer, self.lengths + 1, self.prompt_lengths)


def counts(history: History, num_ids: int, *, new_only: bool) -> Int[Array, "B V"]:
    """Returns how often each id is in the text, or among the new tokens."""

    def one(row, start, end):
        index = jnp.arange(len(row))
        inside = (index >= start) & (index < end)
        return jnp.zeros(num_ids, jnp.int32).at[row].add(inside.astype(jnp.int32))

    start = history.prompt_lengths if new_only else jnp.zeros_like(history.lengths)
    return jax.vmap(one)(history.tokens, start, history.lengths)


def repetition_penalty(
    logits: Float[Array, "B V"], history: History, penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Divides positive logits of ids in the text by the penalty, multiplies others.

    The text is the prompt and the new tokens (Keskar et al. 2019, arXiv:1909.05858).
    """
    seen = counts(history, logits.shape[-1], new_only=False) > 0
    factor = penalty[:, None]
    less = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, less, logits)


def presence_and_frequency_penalty(
    logits: Float[Array, "B V"],
    history: History,
    presence: Float[Array, " B"],
    frequency: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """Subtracts `presence` from ids among the new tokens, and `frequency` each time.

    As in OpenAI's API; the prompt does not count.
    """
    times = counts(history, logits.shape[-1], new_only=True)
    less = presence[:, None] * (times > 0) + frequency[:, None] * times
    return logits - less


def forbid_repeated_ngrams(
    logits: Float[Array, "B V"], history: History, n: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Never draws a token that ends a run of n tokens which is in the text already."""
    matches = suffix_matches(history, n - 1)
    ends = (matches >= (n - 1)[:, None]) & (n > 0)[:, None]
    forbidden = _largest_by_id(history, ends.astype(jnp.int32), logits.shape[-1]) > 0
    return jnp.where(forbidden, NEVER, logits)


def dry_penalty(
    logits: Float[Array, "B V"],
    history: History,
    multiplier: Float[Array, " B"],
    base: Float[Array, " B"],
    allowed_length: Int[Array, " B"],
    breakers: Bool[Array, "B V"],
) -> Float[Array, "B V"]:
    """DRY: subtracts from tokens that would prolong a repetition.

    If the last n tokens were followed by an id before, and n is at least
    `allowed_length`, that id loses multiplier * base ** (n - allowed_length). The
    longest n counts, and no repetition contains a breaker
    (oobabooga/text-generation-webui pull request 5677).
    """
    tokens, lengths = history.tokens, history.lengths
    is_breaker = jnp.take_along_axis(breakers, tokens, axis=1)
    index = jnp.arange(tokens.shape[1])
    before = is_breaker & (index < lengths[:, None])
    last_breaker = jnp.max(jnp.where(before, index, -1), axis=1)
    matches = suffix_matches(history, lengths - 1 - last_breaker)
    matches = jnp.where(is_breaker, 0, matches)
    longest = _largest_by_id(history, matches, logits.shape[-1])
    excess = longest - allowed_length[:, None]
    # A finite penalty, also for long repetitions.
    penalty = multiplier[:, None] * base[:, None] ** excess
    penalty = jnp.minimum(penalty, -NEVER)
    return jnp.where(excess >= 0, logits - penalty, logits)


def suffix_matches(history: History, limits: Int[Array, " B"]) -> Int[Array, "B S"]:
    """For each index, how many tokens right before it equal the last ones of the row.

    At most `limits` are compared. 0 beyond the row's length.
    """
    tokens, lengths = history.tokens, history.lengths
    index = jnp.arange(tokens.shape[1])

    def compare(carry):
        step, alive, earlier, matches = carry
        last = jnp.maximum(lengths - 1 - step, 0)
        suffix = jnp.take_along_axis(tokens, last[:, None], axis=1)
        alive &= (earlier == suffix) & (index > step) & (step < limits)[:, None]
        # `earlier` at index i is the token at i - 1 - step.
        return step + 1, alive, jnp.roll(earlier, 1, axis=1), matches + alive

    alive = index < lengths[:, None]
    start = (jnp.int32(0), alive, jnp.roll(tokens, 1, axis=1), jnp.zeros_like(tokens))
    return jax.lax.while_loop(lambda carry: carry[1].any(), compare, start)[-1]


def _largest_by_id(
    history: History, values: Int[Array, "B S"], num_ids: int
) -> Int[Array, "B V"]:
    """Returns the largest value at the indices of each id; at least 0."""

    def one(row, values, length):
        values = jnp.where(jnp.arange(len(row)) < length, values, 0)
        return jnp.zeros(num_ids, jnp.int32).at[row].max(values)

    return jax.vmap(one)(history.tokens, values, history.lengths)
