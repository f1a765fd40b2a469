"""Trains SentencePiece models that decode every text exactly."""

import io
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from jaxlm.progress import Waiting
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer

# SentencePiece learns from "sentences". Sentences of several lines let it learn pieces
# with newlines: the bundled text has 8% fewer tokens than with one line each.
SENTENCE_CHARACTERS = 2000
# More text hardly changes the pieces, and training needs many times its size in memory.
MAX_TRAINING_CHARACTERS = 100_000_000
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
      texts: documents. Beyond 100 million characters, only every second (fourth, ...)
        sentence is used.
      vocab_size: number of pieces, including the 256 bytes.

    Raises:
      ValueError: when there is no text, or too little for so many pieces.
    """
    title = f"training a SentencePiece tokenizer of {vocab_size} pieces ({algorithm})"
    with Waiting(title):
        sentences = _thin_out(_sentences(texts), MAX_TRAINING_CHARACTERS)
        if not sentences:
            raise ValueError("no text to train a SentencePiece tokenizer on")
        return SentencePieceTokenizer(_train(sentences, vocab_size, algorithm))


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in _NOT_LEARNED.split(text):
            start = 0
            while start < len(part):
                end = start + SENTENCE_CHARACTERS
                if end < len(part):
                    # Cut after a line, else before a word, else anywhere.
                    line = part.rfind("\n", start, end) + 1
                    end = line or part.rfind(" ", start + 1, end)
                    end = end if end > start else start + SENTENCE_CHARACTERS
                yield part[start:end]
                start = end


def _thin_out(sentences: Iterable[str], limit: int) -> list[str]:
    """Keeps all sentences, or evenly spaced ones of at most `limit` characters."""
    kept, size, stride = [], 0, 1
    for number, sentence in enumerate(sentences):
        if number % stride:
            continue
        kept.append(sentence)
        size += len(sentence)
        if size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


def _train(sentences: list[str], vocab_size: int, algorithm: str) -> bytes:
    """Trains in a thread, so that Ctrl-C works."""
    model = io.BytesIO()
    errors: list[Exception] = []

    def work() -> None:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=algorithm,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                max_sentence_length=8 * SENTENCE_CHARACTERS,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                # Fixed, because sums over threads depend on the number of threads.
                num_threads=4,
                minloglevel=2,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise _explained(errors[0], vocab_size) from errors[0]
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
