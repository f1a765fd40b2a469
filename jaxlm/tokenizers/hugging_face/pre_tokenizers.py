"""Pre-tokenizers of byte-level BPE models, by their names in GGUF files.

The patterns are those of the models' own tokenizer.json files, whose parts a
`PreTokenizer` has. Names with the same steps stand together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.fields import nearest
from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.hugging_face.tokenizer_json import bpe_model, new_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def _words(digits: str) -> str:
    """GPT-4's pattern; `digits` matches the digits that stay together."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
    )


def _cased_words(contractions: str, digits: str) -> str:
    """GPT-4o's pattern: also splits words between lower and upper case."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{_UPPER}*{_LOWER}+{contractions}|{first}{_UPPER}+{_LOWER}*"
        rf"{contractions}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


def split_step(pattern: str) -> dict[str, Any]:
    """Makes a step in which each match of the pattern is a word."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_DIGITS = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class PreTokenizer:
    """What happens to a text before its bytes are merged."""

    steps: tuple[dict[str, Any], ...]
    """Steps of the `pre_tokenizer` of a tokenizer.json."""
    nfc: bool = False
    """Whether the text is normalized to Unicode's composed form (NFC) first."""
    ignore_merges: bool = False
    """Whether words that are tokens stay whole, whatever the merges."""
    adds_bos: bool = False
    """Whether the model expects bos before a text, unless its file says otherwise."""

    @property
    def normalizer(self) -> dict[str, Any] | None:
        """The `normalizer` of a tokenizer.json."""
        return {"type": "NFC"} if self.nfc else None

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json."""
        if len(self.steps) == 1:
            return self.steps[0]
        return {"type": "Sequence", "pretokenizers": list(self.steps)}


def _by_pattern(*patterns: str, **options: bool) -> PreTokenizer:
    return PreTokenizer((*map(split_step, patterns), _byte_level(False)), **options)


BYTES = PreTokenizer((_byte_level(False),))
"""Splits nothing."""
_GPT2 = PreTokenizer((_byte_level(True),))
_SMOLLM = PreTokenizer((_DIGITS, _byte_level(True)))
_LLAMA3 = _by_pattern(_words(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)
GPT4 = _by_pattern(_words(r"\p{N}{1,3}"))
_QWEN2 = _by_pattern(_words(r"\p{N}"), nfc=True)
_GPT4O = _by_pattern(_cased_words(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"))

# Names of the same pre-tokenizer stand together; `name_of` returns the first.
BY_NAME: dict[str, PreTokenizer] = {
    # What llama.cpp does for files with this name; no model has it.
    "default": _by_pattern(
        r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"
    ),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "olmo": PreTokenizer(_GPT2.steps, nfc=True),
    "command-r": PreTokenizer(_SMOLLM.steps, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": GPT4,
    "smaug-bpe": GPT4,
    "chatglm-bpe": GPT4,
    "glm4": GPT4,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _by_pattern(
        _cased_words("", r"\p{N}"), ignore_merges=True, adds_bos=True
    ),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "deepseek-v3": _by_pattern(
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
    ),
}


def byte_level_json(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    pre: PreTokenizer,
    added: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Builds the tokenizer.json of a byte-level BPE.

    Args:
      vocab: token, in GPT-2's alphabet of bytes -> id.
      merges: pairs of tokens, separated by a space, in order of priority. Pairs that do
        not make a token are left out, as they could not be used.
      added: entries of `added_tokens`.
    """
    used = [m for m in merges if m.replace(" ", "", 1) in vocab]
    return new_json(
        bpe_model(vocab, used, ignore_merges=pre.ignore_merges),
        _byte_level(True),
        added_tokens=list(added),
        normalizer=pre.normalizer,
        pre_tokenizer=pre.pre_tokenizer,
    )


def by_name(name: str) -> PreTokenizer:
    """Returns the pre-tokenizer of a value of `tokenizer.ggml.pre`.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in BY_NAME:
        raise ValueError(
            f"tokenizer.ggml.pre is {shown_value(name)}"
            f"{nearest(name[:100], list(BY_NAME))}: jaxlm knows {', '.join(BY_NAME)}"
        )
    return BY_NAME[name]


def name_of(data: Mapping[str, Any]) -> str | None:
    """Returns the name of a tokenizer.json's pre-tokenizer, or None."""
    found = _essence(
        data.get("pre_tokenizer"),
        data.get("normalizer"),
        bool(data["model"].get("ignore_merges")),
    )
    for name, known in BY_NAME.items():
        essence = _essence(known.pre_tokenizer, known.normalizer, known.ignore_merges)
        if essence == found:
            return name
    return None


def _essence(pre_tokenizer: Any, normalizer: Any, ignore_merges: bool) -> Any:
    """Returns the steps that affect ids, in a canonical form."""
    steps = _flat(pre_tokenizer)
    for step in steps:
        step.pop("trim_offsets", None)
        if step.get("type") == "ByteLevel":
            step.setdefault("use_regex", True)
    return steps, _flat(normalizer), ignore_merges


def _flat(step: Any) -> list[dict[str, Any]]:
    if not isinstance(step, Mapping):
        return []
    if step.get("type") == "Sequence":
        parts = step.get("pretokenizers") or step.get("normalizers") or []
        return [s for part in parts for s in _flat(part)]
    return [dict(step)]
