"""The contents of a Hugging Face tokenizer.json.

Functions over the parsed JSON. The file has a `model` (BPE, Unigram, WordLevel), the
`added_tokens` that are split off before anything else, and the steps of a
pipeline: `normalizer`, `pre_tokenizer`, `post_processor`, `decoder`.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.sentencepiece.model_proto import SPACE_SIGN

# The largest published files have 35 MB and 262,145 tokens.
MAX_JSON_BYTES = 128 << 20
MAX_TOKENS = 1 << 22
# JSON can hold half of a surrogate pair, UTF-8 cannot.
_HALF_PAIR = re.compile("[\ud800-\udfff]")
# Published files have at most about 66,000 (units of speech).
MAX_ADDED_TOKENS = 100_000

# The parts of the pipeline that make text longer or shorter, and the name of the steps
# of a Sequence there.
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}


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
    """Returns the added tokens; raises ValueError for a wrong entry, or too many."""
    names = AddedToken.__dataclass_fields__
    entries, found = data.get("added_tokens") or [], []
    if len(entries) > MAX_ADDED_TOKENS:
        raise ValueError(
            f"added_tokens has {len(entries)} tokens: at most {MAX_ADDED_TOKENS} are "
            "read"
        )
    for entry in entries:
        try:
            token = AddedToken(**{n: entry[n] for n in names if n in entry})
        except TypeError:
            raise ValueError(
                f"added_tokens: {shown_value(entry)} is not an added token"
            ) from None
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
    if not isinstance(text, str) or _HALF_PAIR.search(text):
        raise ValueError(f"{shown_value(text)} is not the text of a token")
    if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
        number = shown_value(token_id)
        raise ValueError(f"token {shown_value(text)} has the id {number}")


def first_added(data: Mapping[str, Any]) -> str | None:
    """Returns the token that the post-processor adds before a text, or None."""
    for step in _steps(data.get("post_processor"), "processors"):
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


def pipeline(data: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the steps of the normalizer, the pre-tokenizer and the decoder, by part.

    Raises:
      ValueError: for a step that is not an object.
    """
    return {part: list(_steps(data.get(part), inner)) for part, inner in _PARTS.items()}


def _steps(step: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a pipeline, with sequences flattened."""
    if step is None:
        return
    if not isinstance(step, dict):
        raise ValueError(f"{shown_value(step)} is not a step of a tokenizer")
    if step.get("type") == "Sequence":
        for part in step.get(inner) or []:
            yield from _steps(part, inner)
    else:
        yield step
