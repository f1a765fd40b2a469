"""Tokenizers by kind: builds the one of a config, reads what `save` wrote."""

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from jaxlm.config import DataConfig
from jaxlm.fields import from_dict, nearest
from jaxlm.files.hub import HUB, download
from jaxlm.files.strict_json import parse_object
from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.base import FORMAT_VERSION, TOKENIZER_FILE, Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_files import (
    tokenizer_from_file,
    tokenizer_from_folder,
)
from jaxlm.tokenizers.sentencepiece.processor import (
    MODEL_FILE,
    SentencePieceTokenizer,
)
from jaxlm.tokenizers.sentencepiece.trainer import train_sentencepiece
from jaxlm.tokenizers.special_tokens import TokenizerSettings

# Files of a tokenizer on the Hub.
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "merges.txt")
# Tokens that end a document in published tokenizers.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_log = logging.getLogger(__name__)


def read_saved_tokenizer(folder: Path | str) -> Tokenizer:
    """Reads the tokenizer that `save` wrote into a folder.

    Raises:
      ValueError: when a file is missing, damaged or of an unknown kind.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: no tokenizer was saved in this folder")
    description = parse_object(path.read_bytes(), str(path))
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
    if not isinstance(kind, str) or kind not in readers:
        raise ValueError(
            f"{path}: unknown kind of tokenizer {shown_value(kind)}"
            f"{nearest(str(kind)[:100], list(readers))}: known are {', '.join(readers)}"
        )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {shown_value(version)}, but this jaxlm reads "
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


def needs_text(config: DataConfig) -> bool:
    """Whether the tokenizer of a config depends on the text."""
    if config.tokenizer == "bytes" or config.tokenizer.startswith(HUB):
        return False
    return config.tokenizer_model is None


def build_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """Builds the tokenizer of a config.

    Args:
      config: `tokenizer`, `tokenizer_model`, `tokenizer_vocab_size` and
        `tokenizer_algorithm` choose it.
      texts: the documents; only read if `needs_text`.

    Raises:
      ValueError: for a model that cannot be loaded or trained, and for no text.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer.startswith(HUB):
        return tokenizer_of_hugging_face(config.tokenizer.removeprefix(HUB))
    if config.tokenizer_model is not None:
        try:
            return SentencePieceTokenizer.from_file(Path(config.tokenizer_model))
        except ValueError as error:
            raise ValueError(f"data.tokenizer_model: {error}") from error
    if config.tokenizer == "chars":
        return CharTokenizer(set(itertools.chain.from_iterable(texts)))
    if config.tokenizer == "bpe":
        return train_bpe(texts, config.tokenizer_vocab_size)
    return train_sentencepiece(
        texts, config.tokenizer_vocab_size, config.tokenizer_algorithm
    )


def tokenizer_of_hugging_face(name: str) -> Tokenizer:
    """Reads the tokenizer that `data.tokenizer hf:NAME` means.

    Args:
      name: a folder with a tokenizer.json (or tokenizer.model, or vocab.json and
        merges.txt), a tokenizer.json by itself, or owner/name on the Hub.

    Raises:
      ValueError: if there is none, or it is of no known kind.
    """
    path = Path(os.path.expanduser(name))
    if not path.exists():
        missing = f"data.tokenizer: there is no file or folder {name!r}"
        if not _ON_THE_HUB.fullmatch(name):
            raise ValueError(missing)
        try:
            path = download(name, TOKENIZER_FILES)
        except ValueError as error:
            raise ValueError(f"{missing}; on the Hub: {error}") from None
    read = tokenizer_from_folder if path.is_dir() else tokenizer_from_file
    return _with_end(read(path), name)


def _with_end(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Looks for a token that ends a document, where the files name none."""
    if tokenizer.eos_id is not None:
        return tokenizer
    ends = [text for text in _ENDS if text in tokenizer.special_ids]
    if not ends or not isinstance(tokenizer, HuggingFaceTokenizer):
        _log.warning("%s names no token that ends a document: none is added", name)
        return tokenizer
    _log.warning("%s names no token that ends a document: taking %s", name, ends[0])
    eos_id = tokenizer.special_ids[ends[0]]
    settings = dataclasses.replace(tokenizer.settings, eos_id=eos_id)
    return HuggingFaceTokenizer(tokenizer.tokenizer_json, settings)
