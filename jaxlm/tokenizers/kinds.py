"""Tokenizers by kind: builds the one of a config, reads what `save` wrote."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxlm.config import DataConfig, from_dict, nearest
from jaxlm.tokenizers.base import FORMAT_VERSION, TOKENIZER_FILE, Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.sentencepiece.processor import (
    MODEL_FILE,
    SentencePieceTokenizer,
)
from jaxlm.tokenizers.sentencepiece.trainer import train_sentencepiece
from jaxlm.tokenizers.special_tokens import TokenizerSettings


def read_saved_tokenizer(folder: Path | str) -> Tokenizer:
    """Reads the tokenizer that `save` wrote into a folder.

    Raises:
      ValueError: when a file is missing, damaged or of an unknown kind.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: no tokenizer was saved in this folder")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    kind, version = description.get("kind"), description.get("version")
    folder = Path(folder)
    readers = {
        "bytes": lambda s: ByteTokenizer(),
        "chars": lambda s: CharTokenizer(description.get("characters") or ""),
        "sentencepiece": lambda s: SentencePieceTokenizer.from_file(
            folder / MODEL_FILE, s
        ),
        "huggingface": lambda s: HuggingFaceTokenizer.from_folder(folder, s),
    }
    if kind is None and "model" in description:
        raise ValueError(
            f"{path} is Hugging Face's own, not saved by jaxlm: read it with "
            "`jaxlm.tokenizers.hugging_face.tokenizer_files.tokenizer_from_folder`"
        )
    if kind not in readers:
        raise ValueError(
            f"{path}: unknown kind of tokenizer {kind!r}"
            f"{nearest(str(kind), list(readers))}: known are {', '.join(readers)}"
        )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version!r}, but this jaxlm reads "
            f"{FORMAT_VERSION}: update jaxlm"
        )
    try:
        habits = description.get("habits")
        settings = habits and from_dict(TokenizerSettings, habits, "habits")
        tokenizer = readers[kind](settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise ValueError(
            f"{path} is damaged: the contents do not match its fingerprint"
        )
    return tokenizer


def build_tokenizer(
    config: DataConfig, texts: Iterable[str] | Callable[[], Iterable[str]]
) -> Tokenizer:
    """Builds the tokenizer of a config.

    Args:
      config: `tokenizer`, `tokenizer_model`, `tokenizer_vocab_size` and
        `tokenizer_algorithm` choose it.
      texts: the documents, or a function that returns them; only read for a character
        vocabulary, or to train SentencePiece.

    Raises:
      ValueError: for a model that cannot be loaded or trained, and for no text.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer_model is not None:
        return SentencePieceTokenizer.from_file(Path(config.tokenizer_model))
    documents = texts() if callable(texts) else texts
    if config.tokenizer == "chars":
        found: set[str] = set()
        for text in documents:
            found.update(text)
        return CharTokenizer(found)
    return train_sentencepiece(
        documents, config.tokenizer_vocab_size, config.tokenizer_algorithm
    )
