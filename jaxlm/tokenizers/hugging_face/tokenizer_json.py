"""The contents of a Hugging Face tokenizer.json: tokens, decoding, text kept as text.

Functions over the parsed JSON. The file has a `model` (BPE, Unigram, WordLevel), the
`added_tokens` that are split off before anything else, and the steps of a
pipeline: `normalizer`, `pre_tokenizer`, `post_processor`, `decoder`.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.sentencepiece.model_proto import SPACE_SIGN

# The largest published files have 35 MB and 262,145 tokens.
MAX_JSON_BYTES = 128 << 20
MAX_TOKENS = 1 << 22

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@dataclass(frozen=True)
class AddedToken:
    """An entry of `added_tokens`."""

    id: int
    content: str
    special: bool = False
    """Omitted from decoded text."""
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def is_white(self) -> bool:
        """Whether it is white space: ordinary text, not a marker."""
        return not self.content.replace(SPACE_SIGN, " ").strip()


@contextmanager
def damage_in(what: str) -> Iterator[None]:
    """Turns exceptions from an unexpected structure into a ValueError."""
    try:
        yield
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{what} is damaged: {message}") from None


def parse(contents: str | bytes) -> dict[str, Any]:
    """Parses a tokenizer.json; raises ValueError for anything else."""
    if len(contents) > MAX_JSON_BYTES:
        raise ValueError(
            f"{len(contents)} bytes is too large for a tokenizer.json (at most "
            f"{MAX_JSON_BYTES})"
        )
    try:
        data = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a tokenizer.json: {error}") from None
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError("not a Hugging Face tokenizer.json: it has no model.vocab")
    return data


def added_tokens(data: Mapping[str, Any]) -> list[AddedToken]:
    """Returns the added tokens; raises ValueError for a malformed entry."""
    names = AddedToken.__dataclass_fields__
    found = []
    for entry in data.get("added_tokens") or []:
        try:
            token = AddedToken(**{n: entry[n] for n in names if n in entry})
        except TypeError:
            raise ValueError(f"added_tokens: {entry!r} is not an added token") from None
        _check_id(token.content, token.id)
        found.append(token)
    return found


def vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """Returns text -> id of the model's own tokens."""
    vocab = data["model"]["vocab"]
    try:
        if isinstance(vocab, list):
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        for text, token_id in vocab.items():
            _check_id(text, token_id)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.vocab: {error}") from None
    return vocab


def _check_id(text: Any, token_id: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not the text of a token")
    if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
        raise ValueError(f"token {text!r} has the id {token_id!r}")


def first_added(data: Mapping[str, Any]) -> str | None:
    """Returns the token that the post-processor adds before a text, or None."""
    for step in steps_of(data.get("post_processor"), "processors"):
        kind = step.get("type")
        if kind == "TemplateProcessing" and step.get("single"):
            token = step["single"][0].get("SpecialToken")
            if token is not None:
                return token["id"]
        if kind in ("RobertaProcessing", "BertProcessing"):
            return step["cls"][0]
    return None


def new_json(
    model: Mapping[str, Any], decoder: Mapping[str, Any], **parts: Any
) -> dict[str, Any]:
    """Makes a tokenizer.json; parts that are not given are empty."""
    empty = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
    }
    return empty | parts | {"decoder": decoder, "model": model}


def bpe_model(
    vocab: Mapping[str, int], merges: Sequence[Any], **options: Any
) -> dict[str, Any]:
    """Makes the `model` of a BPE; `options` replace its defaults."""
    defaults = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return defaults | options | {"vocab": vocab, "merges": merges}


def bos_template(token: str, token_id: int) -> dict[str, Any]:
    """Makes a post-processor that adds a token before a text."""
    bos, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"id": "A", "type_id": 0}
    second = {"SpecialToken": {"id": token, "type_id": 1}}, {"id": "B", "type_id": 1}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": text}],
        "pair": [bos, {"Sequence": text}, second[0], {"Sequence": second[1]}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """Makes an entry of `added_tokens` that leaves the text around it alone."""
    return dataclasses.asdict(AddedToken(token_id, content, special))


def literal(
    data: Mapping[str, Any], hidden: Mapping[str, int], *, later: bool = False
) -> dict[str, Any]:
    """Changes a tokenizer.json: the same ids, but no `hidden` token is matched in text.

    The hidden tokens stay in the vocabulary, under names that no text can become: a BPE
    reaches a name only by merges, and those that lead to one are removed; other models
    split text at spaces, or replace them, before they look a word up.

    Padding, truncation, dropout and tokens added around a text are turned off.

    Args:
      hidden: text -> id of the tokens that must stay text.
      later: whether the text follows a special token; then nothing that is only for the
        first word of a text is added.
    """
    model = {**data["model"]}
    vocab = vocabulary(data)
    added = added_tokens(data)
    names = {text: _unused_name(text, vocab) for text in hidden}
    kept = [t for t in added if t.content not in hidden]
    if isinstance(model["vocab"], list):
        model["vocab"] = _literal_list(model["vocab"], hidden, names, kept)
    else:
        model["vocab"] = {names.get(text, text): i for text, i in vocab.items()}
        model["vocab"] |= {names[text]: i for text, i in hidden.items()}
        model["vocab"] |= {t.content: t.id for t in kept}
    if "merges" in model:
        model["merges"] = _literal_merges(model["merges"], hidden.keys() & vocab.keys())
    if "dropout" in model:
        model["dropout"] = None
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    out = {**data, "model": model, "padding": None, "truncation": None}
    out["post_processor"] = None
    entries = data.get("added_tokens") or []
    out["added_tokens"] = [e for e in entries if e["content"] not in hidden]
    if later:
        out["pre_tokenizer"] = _without_first_prefix(data.get("pre_tokenizer"))
    return out


def _unused_name(text: str, vocab: Mapping[str, int]) -> str:
    name = f" {text}"
    while name in vocab:
        name = f" {name}"
    return name


def _literal_list(
    vocab: list[Any],
    hidden: Mapping[str, int],
    names: Mapping[str, str],
    kept: list[AddedToken],
) -> list[Any]:
    """Renames in a Unigram vocabulary, whose ids are indices."""
    renamed = [[names.get(piece, piece), score] for piece, score in vocab]
    others = {i: names[text] for text, i in hidden.items()}
    others |= {t.id: t.content for t in kept}
    while len(renamed) in others:
        renamed.append([others[len(renamed)], 0.0])
    return renamed


def _literal_merges(merges: list[Any], hidden: set[str]) -> list[Any]:
    if not hidden:
        return merges
    kept = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not hidden & {*pair, "".join(pair)}:
            kept.append(merge)
    return kept


def _without_first_prefix(step: Any) -> Any:
    """Removes the space that a pre-tokenizer adds to the first word of a text only."""
    if isinstance(step, list):
        return [_without_first_prefix(s) for s in step]
    if not isinstance(step, dict):
        return step
    step = {k: _without_first_prefix(v) for k, v in step.items()}
    if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "never"
    return step


def steps_of(step: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a pipeline, with sequences flattened."""
    if step is None:
        return
    if not isinstance(step, dict):
        raise ValueError(f"{shown_value(step)} is not a step of a tokenizer")
    if step.get("type") == "Sequence":
        for part in step.get(inner) or []:
            yield from steps_of(part, inner)
    else:
        yield step


@dataclass
class Decoding:
    """How the text of a token becomes bytes, according to the file's `decoder`."""

    byte_level: bool = False
    """Each character of a token is a byte."""
    byte_fallback: bool = False
    """`<0x0A>` is a byte."""
    replacements: list[tuple[str, str]] = field(default_factory=list)
    leading_spaces: Literal["keep", "drop one", "drop token"] = "keep"

    def bytes_of(self, token: str) -> bytes:
        """Returns the bytes that a token of the model adds to a text."""
        if self.byte_level:
            alphabet = byte_of_character()
            if all(c in alphabet for c in token):
                return bytes(alphabet[c] for c in token)
            return token.encode("utf-8")
        if self.byte_fallback and (match := _BYTE_PIECE.match(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


def decoding_of(data: Mapping[str, Any]) -> Decoding:
    """Reads the decoder; raises ValueError for an unsupported one."""
    out, fused = Decoding(), False
    steps = list(steps_of(data.get("decoder"), "decoders"))
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and len(steps) == 1:
            out.byte_level = True
        elif kind == "ByteFallback" and not fused:
            out.byte_fallback = True
        elif kind == "Replace" and not fused and "String" in step.get("pattern", {}):
            out.replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and _strips_one(step):
            out.leading_spaces = "drop one" if step["start"] else "keep"
        elif kind == "Metaspace" and not fused:
            out.replacements.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                out.leading_spaces = "drop token"
        else:
            raise ValueError(_no_decoder(f"has the step {json.dumps(step)}"))
    if not steps:
        raise ValueError(_no_decoder("is missing"))
    return out


def _strips_one(step: Mapping[str, Any]) -> bool:
    return (step["content"], step["stop"]) == (" ", 0) and step["start"] in (0, 1)


def _no_decoder(what: str) -> str:
    return (
        f"the decoder {what}: jaxlm knows byte-level decoders and those of "
        "SentencePiece (Replace, ByteFallback, Fuse, Strip of one space, Metaspace)"
    )


@cache
def byte_of_character() -> dict[str, int]:
    """Returns GPT-2's alphabet: a visible character for each byte.

    Bytes that are printable in Latin-1 are written as themselves, the 68 others as the
    characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    characters = {chr(b): b for b in visible}
    return characters | {chr(0x100 + i): b for i, b in enumerate(others)}
