"""Reads the tokenizer of a Hugging Face model folder.

A folder has the tokenizer itself (tokenizer.json, or SentencePiece's tokenizer.model,
or GPT-2's vocab.json and merges.txt), and files that say how the model uses it:
tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
chat_template.jinja. They are read as data: nothing in them can make code run.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.files.folder_links import path_inside
from jaxlm.files.strict_json import parse_object
from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.pre_tokenizers import by_name, byte_level_json
from jaxlm.tokenizers.hugging_face.tokenizer_json import (
    MAX_JSON_BYTES,
    added_token,
    added_tokens,
    damage_in,
    first_added,
    parse,
    vocabulary,
)
from jaxlm.tokenizers.sentencepiece.model_proto import (
    CONTROL,
    USER_DEFINED,
    added_piece,
)
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.special_tokens import TokenizerSettings

# Class of a tokenizer in vocab.json and merges.txt -> its pre-tokenizer.
_BYTE_LEVEL_CLASSES = {"GPT2": "gpt-2", "Qwen2": "qwen2"}


def tokenizer_from_folder(folder: Path | str) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face model folder.

    Raises:
      ValueError: when there is none, a file is damaged, or its kind is not supported.
    """
    files = _Files(Path(os.path.expanduser(folder)))
    with damage_in(f"{files.folder}: the tokenizer or its settings"):
        return _read(files)


def tokenizer_from_file(path: Path) -> Tokenizer:
    """Reads a tokenizer.json, with the settings beside it if it has that name.

    Raises:
      ValueError: when it is something else, or damaged.
    """
    if path.name == "tokenizer.json":
        return tokenizer_from_folder(path.parent)
    contents = _Files(path.parent).read(path.name)
    try:
        return HuggingFaceTokenizer(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Files:
    """The files of a folder, each up to a maximum size; no link leads out of it."""

    folder: Path
    _parsed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        path = path_inside(self.folder, name)
        if not path.is_file():  # A pipe would be waited for.
            raise ValueError(f"{path}: no such file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(
                f"{path}: more than {MAX_JSON_BYTES} bytes: is it another file?"
            )
        return path.read_bytes()

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.folder / name} is damaged: {error}") from None

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; {} if the file is missing."""
        if name not in self._parsed:
            self._parsed[name] = self._parse(name) if self.has(name) else {}
        return self._parsed[name]

    def _parse(self, name: str) -> dict[str, Any]:
        return parse_object(self.read(name), str(self.folder / name))


def _read(files: _Files) -> Tokenizer:
    if files.has("tokenizer.json"):
        path = files.folder / "tokenizer.json"
        return _tokenizer_json(files, files.read("tokenizer.json"), path)
    if files.has("tokenizer.model"):
        return _sentence_piece(files)
    if files.has("vocab.json") and files.has("merges.txt"):
        return _tokenizer_json(files, _gpt2_json(files), files.folder / "vocab.json")
    raise ValueError(
        f"{files.folder}: no tokenizer in this folder: neither tokenizer.json, nor "
        "tokenizer.model, nor vocab.json with merges.txt"
    )


def _tokenizer_json(files: _Files, contents: bytes, path: Path) -> HuggingFaceTokenizer:
    try:
        data = parse(contents)
        more = _more_added_tokens(files, data)
        if more:
            data["added_tokens"] = [*(data.get("added_tokens") or []), *more]
            contents = _as_file(data)
        ids = vocabulary(data) | {t.content: t.id for t in added_tokens(data)}
        settings = _settings(files, ids, first_added=first_added(data))
        return HuggingFaceTokenizer(contents, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _more_added_tokens(files: _Files, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the added tokens that only tokenizer_config.json has."""
    known = {t.content for t in added_tokens(data)}
    owner = {i: text for text, i in vocabulary(data).items()}
    owner |= {t.id: t.content for t in added_tokens(data)}
    more = []
    for i, entry in sorted(_added_tokens_decoder(files).items()):
        text = entry["content"]
        if text in known:
            continue
        if owner.get(i, text) != text:
            raise ValueError(
                f"tokenizer_config.json adds the token {shown_value(text)} with the id "
                f"{i}, which is that of {shown_value(owner[i])}"
            )
        more.append({**entry, "id": i})
    return more


def _added_tokens_decoder(files: _Files) -> dict[int, dict[str, Any]]:
    """Id -> entry of the added tokens in tokenizer_config.json."""
    entries = files.json("tokenizer_config.json").get("added_tokens_decoder") or {}
    try:
        return {int(i): {**e, "content": e["content"]} for i, e in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{files.folder / 'tokenizer_config.json'}: added_tokens_decoder is damaged"
        ) from None


def _gpt2_json(files: _Files) -> bytes:
    config = files.json("tokenizer_config.json")
    name = str(config.get("tokenizer_class", "GPT2Tokenizer"))
    kind = name.removesuffix("Fast").removesuffix("Tokenizer")
    if kind not in _BYTE_LEVEL_CLASSES:
        raise ValueError(
            f"{files.folder}: vocab.json and merges.txt do not say how a {name} splits "
            f"text (known are {', '.join(_BYTE_LEVEL_CLASSES)}): add its tokenizer.json"
        )
    vocab = files.json("vocab.json")
    lines = files.text("merges.txt").removeprefix("\ufeff").split("\n")
    merges = [m for line in lines if (m := line.rstrip("\r"))]
    merges = merges[1:] if merges[:1] and merges[0].startswith("#version") else merges
    named = [_token(files, name) for name in ("bos", "eos", "pad", "unk")]
    added = dict.fromkeys(t for t in named if t is not None) or ["<|endoftext|>"]
    entries = [added_token(vocab[t], t, special=True) for t in added if t in vocab]
    data = byte_level_json(vocab, merges, by_name(_BYTE_LEVEL_CLASSES[kind]), entries)
    return _as_file(data)


def _as_file(data: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text has half of a surrogate pair: not UTF-8") from None


def _sentence_piece(files: _Files) -> SentencePieceTokenizer:
    path = path_inside(files.folder, "tokenizer.model")
    plain = SentencePieceTokenizer.from_file(path)
    try:
        model = _with_added_pieces(files, plain)
        if model != plain.model:
            plain = SentencePieceTokenizer(model)
        ids = {piece: i for i, piece in enumerate(plain.table.pieces)}
        own = {"bos": plain.bos_id, "eos": plain.eos_id, "pad": plain.pad_id}
        return SentencePieceTokenizer(model, _settings(files, ids, own=own))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _with_added_pieces(files: _Files, plain: SentencePieceTokenizer) -> bytes:
    """Returns the model, extended by the tokens that the settings add."""
    added = {i: (text, False) for text, i in files.json("added_tokens.json").items()}
    for i, entry in _added_tokens_decoder(files).items():
        added[i] = entry["content"], bool(entry.get("special"))
    model, size = plain.model, plain.vocab_size
    for i in sorted(i for i in added if i >= size):
        text, special = added[i]
        if i != size:
            raise ValueError(
                f"the added token {shown_value(text)} has the id {i}: {size} is next"
            )
        model += added_piece(text, 0.0, CONTROL if special else USER_DEFINED)
        size += 1
    return model


def _settings(
    files: _Files,
    ids: Mapping[str, int],
    *,
    first_added: str | None = None,
    own: Mapping[str, int | None] | None = None,
) -> TokenizerSettings:
    """Reads the settings for the tokens in `ids` (text -> id).

    Args:
      first_added: the token that the tokenizer.json adds before a text.
      own: ids of a SentencePiece model, for names that no file mentions.
    """
    config = files.json("tokenizer_config.json")
    names = ("bos", "eos", "pad")
    numbers = {name: _named_id(files, name, ids, own or {}) for name in names}
    if numbers["bos"] is None and first_added is not None:
        numbers["bos"] = ids.get(first_added)
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        # By default the tokenizer.json decides; classes that read a tokenizer.model
        # add bos.
        adds_bos = own is not None or (
            first_added is not None and ids.get(first_added) == numbers["bos"]
        )
    return TokenizerSettings(
        bos_id=numbers["bos"],
        eos_id=numbers["eos"],
        pad_id=numbers["pad"],
        adds_bos=bool(adds_bos) and numbers["bos"] is not None,
        stop_ids=_stops(files, numbers["eos"]),
        chat_template=_chat_template(files),
    )


def _named_id(
    files: _Files, name: str, ids: Mapping[str, int], own: Mapping[str, int | None]
) -> int | None:
    """Id of the bos, eos or pad token."""
    if any(f"{name}_token" in files.json(n) for n in _SETTINGS_FILES):
        text = _token(files, name)
        if text is not None and text not in ids and name != "pad":
            raise ValueError(
                f"the {name} token {shown_value(text)} of {files.folder} is not in the "
                "vocabulary"
            )
        return None if text is None else ids.get(text)
    if name in own:
        return own[name]
    value = files.json("config.json").get(f"{name}_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None


_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def _token(files: _Files, name: str) -> str | None:
    """Text of a special token, which a file gives as a string or an object."""
    for settings in map(files.json, _SETTINGS_FILES):
        value = settings.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


def _stops(files: _Files, eos_id: int | None) -> tuple[int, ...]:
    """Returns the eos token and those in generation_config.json, without duplicates."""
    more = files.json("generation_config.json").get("eos_token_id")
    more = more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys(i for i in (eos_id, *more) if isinstance(i, int)))


def _chat_template(files: _Files) -> str | None:
    if files.has("chat_template.jinja"):
        return files.text("chat_template.jinja")
    template = files.json("tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template if isinstance(template, str) else None
