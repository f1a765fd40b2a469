"""Trains byte-level BPE tokenizers, as GPT-2's and its successors are, on a text."""

import json
from collections.abc import Iterable

import tokenizers

from jaxlm.terminal.progress import Waiting
from jaxlm.tokenizers.hugging_face.decoder import byte_of_character
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.pre_tokenizers import GPT4, byte_level_json
from jaxlm.tokenizers.hugging_face.tokenizer_json import added_token
from jaxlm.tokenizers.special_tokens import TokenizerSettings
from jaxlm.tokenizers.training import interruptible, passages

END = "<|endoftext|>"
# A pair that occurs once would become a token that the model cannot learn.
_MIN_FREQUENCY = 2


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a tokenizer; the same texts give the same one.

    Text is split into words by GPT-4's pattern, and the bytes of a word are merged.
    Each byte is a token, so `decode(encode(x)) == x` for every text. Id 0 ends a
    document; it is the only special token.

    Args:
      texts: documents, of which at most 100 million characters are used, as evenly
        spaced passages.
      vocab_size: number of tokens, including the 256 bytes and the end.

    Raises:
      ValueError: when there is no text, or too little for so many tokens.
    """
    wanted = f"data.tokenizer_vocab_size is {vocab_size}"
    alphabet = sorted(byte_of_character())
    if vocab_size <= len(alphabet):
        raise ValueError(
            f"{wanted}, but the 256 bytes and {END} need 257: set it to 257 or more"
        )
    # The vocabulary is replaced in training, but may not be empty before.
    untrained = byte_level_json({alphabet[0]: 0}, [], GPT4, [])
    library = tokenizers.Tokenizer.from_str(json.dumps(untrained))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    with Waiting(f"training a byte-level BPE tokenizer of {vocab_size} tokens"):
        parts = passages(texts)
        if not parts:
            raise ValueError("no text to train a tokenizer on")
        interruptible(lambda: library.train_from_iterator(parts, trainer))
    model = json.loads(library.to_str())["model"]
    vocab, merges = model["vocab"], [" ".join(pair) for pair in model["merges"]]
    if len(vocab) < vocab_size:
        raise ValueError(
            f"{wanted}, but this text yields at most {len(vocab)} tokens: set it to "
            f"{len(vocab)} or less, or add text"
        )
    end = added_token(vocab[END], END, special=True)
    data = byte_level_json(vocab, merges, GPT4, [end])
    return HuggingFaceTokenizer(
        json.dumps(data, ensure_ascii=False), TokenizerSettings(eos_id=vocab[END])
    )
