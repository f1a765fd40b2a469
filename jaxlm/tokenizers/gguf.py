"""Tokenizers of GGUF files: reads them from metadata, and writes them back.

The keys begin with `tokenizer.ggml.`: `model` names the algorithm, `tokens`, `scores`,
`token_type` and `merges` are its tables, the others are settings. Three algorithms are
supported: "gpt2", a byte-level BPE, "llama", the BPE of SentencePiece, and "rwkv", the
longest token at each position, for vocabularies of characters.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face import pre_tokenizers
from jaxlm.tokenizers.hugging_face.decoder import byte_of_character
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_json import (
    added_token,
    bos_template,
)
from jaxlm.tokenizers.sentencepiece.model_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_model,
)
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.special_tokens import TokenizerSettings

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# In files older than the key for it, one of these tokens ends a turn.
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: keys and values of the file: strings, numbers, lists of strings and
        NumPy arrays.

    Raises:
      ValueError: for an unsupported kind, and for tables that do not fit together.
    """
    kind = _get(metadata, "model", str)
    readers = {"gpt2": _byte_level, "llama": _sentence_piece, "rwkv": _characters}
    if kind not in readers:
        raise ValueError(
            f"{_PREFIX}model is {shown_value(kind)}: jaxlm reads {', '.join(readers)}"
        )
    tokens = _get(metadata, "tokens", list)
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{_PREFIX}tokens: there is a duplicate token")
    types = _table(metadata, "token_type", len(tokens), np.integer)
    if not set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
        raise ValueError(f"{_PREFIX}token_type: types must be 1 to 6")
    return readers[kind](metadata, tokens, types)


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> HuggingFaceTokenizer:
    if f"{_PREFIX}pre" not in metadata:
        raise ValueError(
            f"{_PREFIX}pre, the way to split text before merging, is missing: convert "
            "the model again (files from before May 2024 lack it)"
        )
    pre = pre_tokenizers.by_name(_get(metadata, "pre", str))
    special = [
        added_token(i, token, special=kind != USER_DEFINED)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    data = pre_tokenizers.byte_level_json(
        {token: i for i, token in enumerate(tokens)},
        _get(metadata, "merges", list),
        pre,
        special,
    )
    settings = _settings(metadata, tokens, types, adds_bos=pre.adds_bos)
    if settings.adds_bos:
        assert settings.bos_id is not None  # Checked by the settings.
        data["post_processor"] = bos_template(tokens[settings.bos_id], settings.bos_id)
    return HuggingFaceTokenizer(json.dumps(data, ensure_ascii=False), settings)


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> SentencePieceTokenizer:
    if f"{_PREFIX}scores" not in metadata:
        raise ValueError(f"{_PREFIX}scores is missing: they decide what is merged")
    scores = _table(metadata, "scores", len(tokens), np.floating)
    types = list(types)
    if UNKNOWN not in types:
        types[_id(metadata, "unknown", len(tokens)) or 0] = UNKNOWN
    for i, token in enumerate(tokens):
        if not token:
            tokens = [*tokens[:i], f"[EMPTY_{i}]", *tokens[i + 1 :]]
            types[i] = UNUSED
    model = build_model(
        tokens,
        scores,
        types,
        add_dummy_prefix=bool(metadata.get(f"{_PREFIX}add_space_prefix", True)),
        remove_extra_whitespaces=bool(
            metadata.get(f"{_PREFIX}remove_extra_whitespaces", False)
        ),
    )
    settings = _settings(metadata, tokens, types, adds_bos=True, bos=1, eos=2)
    return SentencePieceTokenizer(model, settings)


def _characters(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> CharTokenizer:
    used = [t for t, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    characters = "".join(map(_unescaped, used))
    tokenizer = CharTokenizer(characters)
    if [*map(_escaped, tokenizer.characters)] != [*tokens[: len(used)]]:
        raise ValueError(
            f"{_PREFIX}model is 'rwkv': of these jaxlm reads only its own, whose "
            "tokens are characters, sorted"
        )
    return tokenizer


def _escaped(character: str) -> str:
    """Writes the UTF-8 bytes of a character as a literal of Python, as RWKV does."""
    return repr(character.encode())[2:-1]


def _unescaped(token: str) -> str:
    """Inverse of `_escaped`; U+FFFD for what is not a character."""
    named = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}

    def byte(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes.fromhex(code[1:].decode()) if code[1:] else named.get(code, code)

    data = re.sub(rb"\\(x[0-9a-f]{2}|.)", byte, token.encode())
    return data.decode(errors="replace")


def _settings(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    *,
    adds_bos: bool,
    bos: int | None = None,
    eos: int | None = None,
) -> TokenizerSettings:
    """Reads the settings; the arguments are the format's defaults for an algorithm."""
    size = len(tokens)
    template = metadata.get(_TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{_TEMPLATE} is not a string")
    turn = _id(metadata, "eot", size)
    if turn is None:
        ends = (t for t in _ENDS_OF_TURN if t in (template or ""))
        found = (tokens.index(t) for t in ends if t in tokens)
        turn = next((i for i in found if types[i] in (CONTROL, USER_DEFINED)), None)
    stops = [_id(metadata, "eos", size, eos), turn, _id(metadata, "eom", size)]
    return TokenizerSettings(
        bos_id=_id(metadata, "bos", size, bos),
        eos_id=stops[0],
        pad_id=_id(metadata, "padding", size),
        adds_bos=bool(metadata.get(f"{_PREFIX}add_bos_token", adds_bos)),
        stop_ids=tuple(dict.fromkeys(i for i in stops if i is not None)),
        chat_template=template,
    )


def _get(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, kind):
        what = {str: "a string", list: "a list of strings"}[kind]
        raise ValueError(f"{_PREFIX}{name} is {type(value).__name__}, not {what}")
    if isinstance(value, list) and not all(isinstance(text, str) for text in value):
        raise ValueError(f"{_PREFIX}{name} must hold only strings")
    return value


def _table(
    metadata: Mapping[str, Any], name: str, size: int, kind: type
) -> list[int] | list[float]:
    """Returns a number for each token; all tokens are normal if types are missing."""
    values = np.asarray(metadata.get(_PREFIX + name, np.full(size, NORMAL)))
    if values.shape != (size,) or not np.issubdtype(values.dtype, kind):
        raise ValueError(
            f"{_PREFIX}{name} is {values.dtype}{list(values.shape)}: it must have one "
            f"number for each of the {size} tokens"
        )
    return values.tolist()


def _id(
    metadata: Mapping[str, Any], name: str, size: int, default: int | None = None
) -> int | None:
    """Returns the id of a special token; None if there is none, also written as -1."""
    key = f"{_PREFIX}{name}_token_id"
    value = metadata.get(key, default)
    if value is None or value in (-1, 0xFFFFFFFF):
        return None
    if not isinstance(value, int | np.integer) or not 0 <= value < size:
        raise ValueError(f"{key} is {shown_value(value)}: there are {size} tokens")
    return int(value)


def gguf_metadata(
    tokenizer: Tokenizer, vocab_size: int | None = None
) -> dict[str, Any]:
    """Returns metadata with which llama.cpp gives the same ids; see `write_gguf`.

    One difference remains: its SentencePiece takes a typed U+2581 for a space.

    Args:
      vocab_size: that of the model: unused tokens fill the tables up to it; None adds
        none.

    Raises:
      ValueError: for a tokenizer that llama.cpp cannot run, with the reason.
    """
    if isinstance(tokenizer, ByteTokenizer):
        tables = _bytes_tables(tokenizer)
    elif isinstance(tokenizer, CharTokenizer):
        tables = _character_tables(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        tables = _byte_level_tables(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tables = _sentence_piece_tables(tokenizer)
    else:
        raise ValueError(_refusal(tokenizer, "jaxlm does not write this kind"))
    if tokenizer.eos_id is None and tables["model"] != "rwkv":
        # llama.cpp would use token 2 or 11.
        raise ValueError(_refusal(tokenizer, "it has no token that ends a text"))
    _fill_up(tables, tokenizer.vocab_size if vocab_size is None else vocab_size)
    others = [i for i in tokenizer.stop_ids if i != tokenizer.eos_id]
    ids = {
        "bos": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "eot": others[0] if others else None,
    }
    out = {f"{_PREFIX}{name}": value for name, value in tables.items()}
    out |= {f"{_PREFIX}{n}_token_id": i for n, i in ids.items() if i is not None}
    out[f"{_PREFIX}add_bos_token"] = tokenizer.adds_bos
    if tokenizer.chat_template is not None:
        out[_TEMPLATE] = tokenizer.chat_template
    return out


def _fill_up(tables: dict[str, Any], vocab_size: int) -> None:
    """Adds unused tokens up to `vocab_size`, with scores below all others."""
    size = len(tables["tokens"])
    if vocab_size < size:
        raise ValueError(
            f"the tokenizer has {size} tokens, more than the {vocab_size} of the model"
        )
    more = vocab_size - size
    # RWKV's algorithm finds unused tokens in text too, but no text has the byte 255.
    name = "\\xff{}" if tables["model"] == "rwkv" else "[PAD{}]"
    padding = [name.format(i) for i in range(size, vocab_size)]
    tables["tokens"] = [*tables["tokens"], *padding]
    for name, value in (("token_type", UNUSED), ("scores", -1e9)):
        if name in tables:
            tables[name] = np.pad(tables[name], (0, more), constant_values=value)


def _refusal(tokenizer: Tokenizer, why: str) -> str:
    return (
        f"llama.cpp cannot run the tokenizer of kind {tokenizer.kind!r}: {why}; export "
        "the model as a Hugging Face folder, or train with data.tokenizer 'chars', "
        "'bytes' or 'bpe'"
    )


def _bytes_tables(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Writes bytes as a BPE that never merges.

    llama.cpp needs at least one merge. This pre-tokenizer separates digits, so the
    merge below is never used.
    """
    characters = {byte: c for c, byte in byte_of_character().items()}
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*(characters[b] for b in range(256)), "<|endoftext|>"],
        "token_type": np.array([NORMAL] * 256 + [CONTROL], np.int32),
        "merges": ["0 0"],
        "add_space_prefix": False,
    }


def _character_tables(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Writes characters as a vocabulary of RWKV.

    It finds the longest token at each position, and no character begins another. Unlike
    the other algorithms it can do without a token that ends a text.
    """
    return {
        "model": "rwkv",
        "tokens": [*map(_escaped, tokenizer.characters)],
        "token_type": np.full(tokenizer.vocab_size, NORMAL, np.int32),
    }


def _byte_level_tables(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    data, model = tokenizer.data, tokenizer.data["model"]
    merges = model.get("merges")
    byte_level = (data.get("decoder") or {}).get("type") == "ByteLevel"
    if not byte_level or merges is None or model.get("byte_fallback"):
        raise ValueError(_refusal(tokenizer, "it is not a byte-level BPE"))
    pre = pre_tokenizers.name_of(data)
    if pre is None:
        raise ValueError(_refusal(tokenizer, "llama.cpp cannot split text its way"))
    tokens = tokenizer.tokens
    special = set(tokenizer.special_ids.values())
    types = np.full(tokenizer.vocab_size, NORMAL, np.int32)
    for i in range(tokenizer.vocab_size):
        if i not in tokens:
            types[i] = UNUSED
        elif i in special:
            types[i] = USER_DEFINED if tokenizer.token_bytes[i] else CONTROL
    for entry in data.get("added_tokens") or []:
        if entry["id"] not in special:  # White space is text, but is split off first.
            types[entry["id"]] = USER_DEFINED
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [tokens.get(i, f"[PAD{i}]") for i in range(tokenizer.vocab_size)],
        "token_type": types,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "add_space_prefix": False,
    }


def _sentence_piece_tables(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    table = tokenizer.table
    if table.algorithm != BPE:
        why = "it has unigram pieces and bytes for unknown characters"
        raise ValueError(_refusal(tokenizer, why))
    if table.charsmap or table.remove_extra_whitespaces or BYTE not in table.types:
        why = "it normalizes text, or has no bytes for unknown characters"
        raise ValueError(_refusal(tokenizer, why))
    return {
        "model": "llama",
        "pre": "default",
        "tokens": table.pieces,
        "scores": np.array(table.scores, np.float32),
        "token_type": np.array(table.types, np.int32),
        "unknown_token_id": table.types.index(UNKNOWN),
        "add_space_prefix": table.add_dummy_prefix,
    }
