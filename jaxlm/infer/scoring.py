"""Log-probabilities of given texts, as the forward pass of training computes them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxlm.config import ModelConfig
from jaxlm.infer.check_arguments import check_count, row_ids
from jaxlm.infer.decoding.timed_program import TimedProgram
from jaxlm.infer.prefill import PREFILL_TOKENS, bucket
from jaxlm.infer.rules.filters import NEVER
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.loss import cross_entropy
from jaxlm.sharding.rules import batch_parts, reshard
from jaxlm.types import Params

# Tokens of all rows whose logits are held at once.
LOGIT_TOKENS = 1024


class Scored(NamedTuple):
    """What the model thinks of the tokens of a text after the first."""

    logprobs: Float[np.ndarray, " _"]
    """Log-probability of each, nats, f32."""
    is_largest: Bool[np.ndarray, " _"]
    """Whether greedy sampling would have taken it."""


def score(
    config: ModelConfig,
    params: Params,
    texts: Sequence[Sequence[int]]
    | Sequence[Integer[np.ndarray, " _"]]
    | Integer[np.ndarray | Array, "B _"],
    *,
    num_tokens: int | None = None,
    block: type[Block] = Block,
) -> list[Float[np.ndarray, " _"]]:
    """Computes how likely each token of a text is after those before it.

    Texts of similar length are computed together, in batches of bounded memory and of
    few sizes.

    Args:
      params: stacked over layers, as `init` and `load` return them.
      texts: rows of token ids, at least one each; lengths may differ.
      num_tokens: the probabilities are those among ids below this, as in `generate`.
        None takes `config.vocab_size`.
      block: what computes a layer; see `Block`.

    Returns:
      For each text the log-probabilities (nats, f32) of all tokens but the first: one
      fewer than the text has.

    Raises:
      ValueError: for arguments of another type, an empty text, an id outside the
        vocabulary, a text that is longer than the context, or logits that are not
        finite.
    """
    scored = score_tokens(config, params, texts, num_tokens=num_tokens, block=block)
    return [text.logprobs for text in scored]


def score_tokens(
    config: ModelConfig,
    params: Params,
    # `score` checks the type.
    texts: Any,
    *,
    num_tokens: int | None = None,
    block: type[Block] = Block,
) -> list[Scored]:
    """As `score`, and also tells which tokens are the most likely ones."""
    check_model(config, params, block)
    num_tokens = config.vocab_size if num_tokens is None else num_tokens
    check_count("num_tokens", num_tokens, 1, config.vocab_size)
    rows = row_ids(texts, num_tokens)
    for i, row in enumerate(rows):
        if len(row) > config.context_length:
            raise ValueError(
                f"text {i} has {len(row)} tokens, more than the model's context of "
                f"{config.context_length}: cut it into parts"
            )
    none = Scored(np.zeros(0, np.float32), np.zeros(0, bool))
    scores = [none] * len(rows)
    program = _program(config, block)
    for width, numbers in _batches(config, rows):
        # So many rows are a power of two and fill each device of a mesh.
        num_rows = -(-_power_of_two(len(numbers)) // batch_parts()) * batch_parts()
        tokens = np.zeros((num_rows, width), np.int32)
        for new, number in zip(tokens, numbers, strict=False):
            new[: len(rows[number])] = rows[number]
        parts = program(params, tokens, np.int32(num_tokens))
        joined = [_joined(np.asarray(part), num_rows, width) for part in parts]
        for row, number in enumerate(numbers):
            scores[number] = Scored(
                *(values[row, : len(rows[number]) - 1] for values in joined)
            )
    if not all(np.isfinite(text.logprobs).all() for text in scores):
        raise ValueError(
            "the model's logits are not finite: its parameters hold NaN or infinities, "
            "or the compute dtype overflows (compute in float32)"
        )
    return scores


def _batches(
    config: ModelConfig, rows: list[Int[np.ndarray, " _"]]
) -> list[tuple[int, list[int]]]:
    """Returns widths, each with the numbers of the rows that are padded to it."""
    by_width: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        width = bucket(len(row), config.context_length)
        by_width.setdefault(width, []).append(number)
    batches = []
    for width, numbers in by_width.items():
        most = _power_of_two(max(PREFILL_TOKENS // width, 1) + 1) // 2
        for first in range(0, len(numbers), most):
            batches.append((width, numbers[first : first + most]))
    return batches


def _power_of_two(n: int) -> int:
    """The first power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _chunks(num_rows: int, width: int) -> tuple[list[int], int]:
    """Returns the starts and the length of the chunks whose logits are held at once."""
    chunk = min(width, max(LOGIT_TOKENS // num_rows, 1))
    # The last chunk may overlap the one before it.
    return [min(first, width - chunk) for first in range(0, width, chunk)], chunk


def _joined(parts: np.ndarray, num_rows: int, width: int) -> np.ndarray:
    """Puts chunks [n, B, C] together, [B, T]."""
    joined = np.empty((num_rows, width), parts.dtype)
    starts, chunk = _chunks(num_rows, width)
    for start, part in zip(starts, parts, strict=True):
        joined[:, start : start + chunk] = part
    return joined


@lru_cache(maxsize=32)
def _program(config: ModelConfig, block: type[Block]) -> TimedProgram:
    """Returns (params, tokens, num_ids) -> the two fields of `Scored`, [n, B, C]."""

    def run(params, tokens, num_ids):
        tokens = reshard(tokens, "B_")
        out = forward(config, params, tokens, head=False, block=block)
        hidden = reshard(out.hidden_states, "B__")
        # Those of the last column are not used. JAX 0.12 cannot roll or concatenate a
        # single row on a mesh.
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        starts, chunk = _chunks(*tokens.shape)

        def one(start):
            def part(x):
                return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)

            # On some meshes there are a few more than the vocabulary has.
            logits = unembed(config, params, part(hidden))
            ids = jnp.arange(logits.shape[-1])
            logits = jnp.where(ids < num_ids, logits, NEVER)
            chosen = ids == part(targets)[..., None]
            largest = logits.max(axis=-1, keepdims=True)
            is_largest = (chosen & (logits == largest)).any(axis=-1)
            return -cross_entropy(logits, part(targets)), is_largest

        return jax.lax.map(one, jnp.array(starts))

    return TimedProgram(run)
