"""Training SentencePiece models."""

import pytest

from jaxlm.tokenizers.sentencepiece.trainer import train_sentencepiece


def test_training_is_deterministic(models, shakespeare):
    for algorithm, tokenizer in models.items():
        again = train_sentencepiece([shakespeare[:100_000]], 500, algorithm)
        assert again.fingerprint == tokenizer.fingerprint
    assert any(b"\n" in b for b in models["bpe"].token_bytes if len(b) > 1)


def test_vocabulary_too_large_or_small():
    texts = ["hello world, the quick brown fox"] * 3
    with pytest.raises(ValueError, match="yields at most") as error:
        train_sentencepiece(texts, 9000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train_sentencepiece(texts, largest).vocab_size == largest
    with pytest.raises(ValueError, match=r"is 100, but the 256 bytes .* or more"):
        train_sentencepiece(texts, 100)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece([], 300)
