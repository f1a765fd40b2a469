"""How well a model predicts whole documents: loss, perplexity, bits per byte.

A document that is longer than the context is read in windows that overlap. Each token
is predicted once, in the first window that reaches it, so that all but those of the
first window have at least `context - stride` tokens before them. These are the windows
of transformers' guide to perplexity.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxlm.config import ModelConfig
from jaxlm.infer.prefill import PREFILL_TOKENS
from jaxlm.infer.scoring import score
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params


@dataclass
class TextLoss:
    """Sums over the tokens that were predicted, and what follows from them."""

    documents: int = 0
    """Number of documents."""
    tokens: int = 0
    """Number of tokens that were predicted."""
    bytes: int = 0
    """UTF-8 bytes of these tokens' text."""
    nats: float = 0.0
    """Negative log-likelihood of these tokens."""

    @property
    def loss(self) -> float:
        """Mean over tokens, nats; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer, so that models can be compared."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def text_loss(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
) -> Iterator[TextLoss]:
    """Predicts documents, and yields the sums so far after each batch of windows.

    A document is encoded as a prompt is: with the tokenizer's bos token before it where
    the model expects one. Without one nothing comes before the first token, so it is
    not predicted, and its bytes are not counted.

    Args:
      params: stacked over layers, as `load` returns them.
      documents: texts; empty ones are left out.
      context: tokens of a window, at most the model's context; None takes that.
      stride: new tokens of each window after the first; None takes half the context.

    Yields:
      The same object each time, with sums that grow; the last ones are the result.

    Raises:
      ValueError: for a context or stride out of range, and as `Tokenizer.encode` and
        `score` do.
    """
    context, stride = check_windows(config, context, stride)
    sums = TextLoss()
    windows: list[Int[np.ndarray, " _"]] = []
    new: list[int] = []

    def flush() -> TextLoss:
        scores = score(config, params, windows, num_tokens=tokenizer.vocab_size)
        for logprobs, count in zip(scores, new, strict=True):
            sums.nats -= float(logprobs[-count:].sum(dtype=np.float64))
            sums.tokens += count
        windows.clear()
        new.clear()
        return sums

    for text in documents:
        ids = tokenizer.encode_prompt(text)
        if not text or not len(ids):
            continue
        sums.documents += 1
        sums.bytes += len(text.encode()) - _first_bytes(tokenizer, int(ids[0]))
        for window, count in _windows(ids, context, stride):
            windows.append(window)
            new.append(count)
            # Windows of a similar length are computed together.
            if sum(map(len, windows)) >= PREFILL_TOKENS:
                yield flush()
    yield flush() if windows else sums


def check_windows(
    config: ModelConfig, context: int | None, stride: int | None
) -> tuple[int, int]:
    """Returns the context and the stride, or raises ValueError for wrong ones."""
    largest = config.context_length
    context = largest if context is None else context
    if not 2 <= context <= largest:
        raise ValueError(
            f"--context is {context}: it must be from 2 to the model's context of "
            f"{largest}"
        )
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(
            f"--stride is {stride}: it must be at least 1 and less than the context of "
            f"{context}"
        )
    return context, stride


def _windows(
    ids: Int[np.ndarray, " n"], context: int, stride: int
) -> Iterator[tuple[Int[np.ndarray, " _"], int]]:
    """Yields windows, each with the number of tokens at its end to predict."""
    done = 1
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        if end > done:
            yield ids[start:end], end - done
        done = end
        if end == len(ids):
            return


def _first_bytes(tokenizer: Tokenizer, token_id: int) -> int:
    """Bytes of a text that belong to its first token; 0 for a bos token."""
    data = tokenizer.token_bytes[token_id]
    # SentencePiece adds this space to the text.
    adds_space = tokenizer.leading_spaces != "keep" and token_id in tokenizer.space_ids
    return len(data) - (adds_space and data.startswith(b" "))
