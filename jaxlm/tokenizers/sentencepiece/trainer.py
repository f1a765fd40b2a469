"""Trains SentencePiece models that decode every text exactly."""

import functools
import io
import re
from collections.abc import Iterable
from typing import Literal

import sentencepiece

from jaxlm.terminal.progress import Waiting
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.training import PASSAGE_CHARACTERS, interruptible, passages

# The library skips sentences with U+2585, which is reserved; NUL ends a sentence in
# some versions; U+2581 would become a space. All three are encoded as bytes.
_NOT_LEARNED = re.compile("[\0\u2581\u2585]")


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    algorithm: Literal["bpe", "unigram"] = "bpe",
) -> SentencePieceTokenizer:
    """Trains a model; the same texts give the same model.

    Text is not normalized, no space is added, and characters without a piece become
    bytes: `decode(encode(x)) == x` for every text. Id 0 is the unknown token (never
    used), 1 ends a document.

    Args:
      texts: documents, of which at most 100 million characters are used, as evenly
        spaced passages.
      vocab_size: number of pieces, including the 256 bytes.

    Raises:
      ValueError: when there is no text, or too little for so many pieces.
    """
    title = f"training a SentencePiece tokenizer of {vocab_size} pieces ({algorithm})"
    with Waiting(title):
        sentences = passages(part for x in texts for part in _NOT_LEARNED.split(x))
        if not sentences:
            raise ValueError("no text to train a SentencePiece tokenizer on")
        return SentencePieceTokenizer(_train(sentences, vocab_size, algorithm))


def _train(sentences: list[str], vocab_size: int, algorithm: str) -> bytes:
    model = io.BytesIO()
    train = functools.partial(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=algorithm,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        max_sentence_length=8 * PASSAGE_CHARACTERS,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        # Fixed, because sums over threads depend on the number of threads.
        num_threads=4,
        minloglevel=2,
    )
    try:
        interruptible(train)
    except Exception as error:
        raise _explained(error, vocab_size) from error
    return model.getvalue()


def _explained(error: Exception, vocab_size: int) -> Exception:
    name = f"data.tokenizer_vocab_size is {vocab_size}"
    if found := re.search(r"too high .*<= (\d+)", str(error)):
        return ValueError(
            f"{name}, but this text yields at most {found[1]} pieces: set it to "
            f"{found[1]} or less, or add text"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
        return ValueError(
            f"{name}, but the 256 bytes and the characters of this text need "
            f"{found[1]}: set it to {found[1]} or more"
        )
    return ValueError(f"{name}: SentencePiece could not train: {error}")
