"""What a tokenizer.json may ask for.

The steps of a tokenizer.json are a small program: one that is 10 kB long can make a
gigabyte of a letter, or take hours for a line, in a library that does not stop for
Ctrl-C. So how much its steps can lengthen a text is computed before they are used. A
file with a pattern that is not of a harmless shape is first tried in another process.
"""

import base64
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.files.limited_process import run_limited
from jaxlm.terminal.printable import shown, shown_value
from jaxlm.tokenizers.hugging_face import trial
from jaxlm.tokenizers.hugging_face.pre_tokenizers import BY_NAME
from jaxlm.tokenizers.hugging_face.tokenizer_json import AddedToken

# Added tokens of published files have at most 30 characters, except for white space.
MAX_ADDED_CHARACTERS = 256
# Of all added tokens of white space together, which the library builds an automaton of
# (two seconds for 200,000 characters); published files have up to a thousand.
MAX_WHITE_CHARACTERS = 20_000
MAX_TOKEN_CHARACTERS = 16_384
# Of a Unigram model, which tries every piece at each character; published ones have 16.
MAX_PIECE_CHARACTERS = 256
MAX_STEPS = 64
# How many times as many bytes a text may have after the steps that the file defines.
# Published ones need 3, for a space that becomes U+2581.
MAX_GROWTH = 16
# Bytes that may be added to a text, or replace a character.
MAX_ADDED_BYTES = 256
# Of a charsmap: published ones lengthen a text about so much at worst. Two are refused.
_CHARSMAP_GROWTH = 5.0
MAX_PATTERN_CHARACTERS = 4096
_MAX_COUNT = 1000
# Ways to match a pattern at one place: enough for one repetition in an alternative, as
# two that follow each other take the cube of the length of a text.
_MAX_WAYS = 20_000

_TRIAL_SECONDS = 2
_TRIAL_BYTES = 512 << 20
_TRIAL_SIGNS = ("a", " ", "0", "\n", "!", "é")
_TRIAL_TEXTS = [c * 3000 for c in _TRIAL_SIGNS]
_TRIAL_TEXTS += ["a" * 50 + "!", " " * 50 + "!", "0" * 50 + "a", "!" * 50 + "a"]
_TRIAL_TEXTS += ["ab" * 1500, "a " * 1500, "a1" * 1500, "a\n" * 1500, "aA!" * 1000]
_TRIAL_TEXTS += ["The quick brown fox jumps over 13 lazy dogs; don't they?\n" * 150]


def check_tokens(
    vocab: Mapping[str, int], added: Sequence[AddedToken], model: Mapping[str, Any]
) -> None:
    """Raises ValueError for tokens that are too long for the `model` of the file."""
    contents = [token.content for token in added]
    # Only a Unigram model has a list, of pieces and scores.
    unigram = isinstance(model.get("vocab"), list)
    most_of_vocab = MAX_PIECE_CHARACTERS if unigram else MAX_TOKEN_CHARACTERS
    for texts, most in ((contents, MAX_ADDED_CHARACTERS), (vocab, most_of_vocab)):
        _check_length("the token", max(texts, key=len, default=""), most)
    white = sum(len(token.content) for token in added if token.is_white)
    if white > MAX_WHITE_CHARACTERS:
        raise ValueError(
            f"the added tokens of white space have {white} characters: at most "
            f"{MAX_WHITE_CHARACTERS} are read"
        )


def check_steps(
    pipeline: Mapping[str, Sequence[Mapping[str, Any]]], model: Mapping[str, Any]
) -> None:
    """Checks the steps of a tokenizer.json, before any of them is used.

    Args:
      pipeline: what `tokenizer_json.pipeline` returns.
      model: the `model` of the file.

    Raises:
      ValueError: for steps that can make a text more than `MAX_GROWTH` times as long,
        too many of them, or patterns that are too large.
    """
    for part, steps in pipeline.items():
        if len(steps) > MAX_STEPS:
            raise ValueError(
                f"the {part} has {len(steps)} steps: at most {MAX_STEPS} are run"
            )
        growth = 1.0
        for step in steps:
            growth *= _growth(step, part)
            if growth > MAX_GROWTH:
                raise ValueError(
                    f"the {part} can make a text {growth:,.0f} times as long: at most "
                    f"{MAX_GROWTH} times is run"
                )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        _check_length(f"model.{name}", model.get(name) or "", MAX_ADDED_BYTES)
    _check_merges(model)
    count = model.get("max_input_chars_per_word")
    if count is not None and not (type(count) is int and 0 <= count <= _MAX_COUNT):
        raise ValueError(
            f"model.max_input_chars_per_word is {shown_value(count)}: at most "
            f"{_MAX_COUNT} is run"
        )


def _check_merges(model: Mapping[str, Any]) -> None:
    """Checks what the library only assumes: it would end with lines of its own.

    It cuts as many bytes off the second part of a merge as the prefix has characters.
    """
    cut = len(model.get("continuing_subword_prefix") or "")
    if not cut:
        return
    for merge in model.get("merges") or []:
        right = (merge.split(" ") if isinstance(merge, str) else merge)[-1]
        data = right.encode("utf-8", "surrogatepass")
        if len(data) < cut or (data[cut:] and data[cut] & 0xC0 == 0x80):
            raise ValueError(
                f"model.merges: {shown(right)} does not begin with the "
                "continuing_subword_prefix"
            )


def _growth(step: Mapping[str, Any], part: str) -> float:
    """Returns how many times as many bytes a step can make of a text."""
    kind = step.get("type")
    if kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap"))
        return _CHARSMAP_GROWTH
    if kind == "ByteLevel" and part == "normalizer":
        return 2.0
    if kind == "Prepend":
        _check_length("what Prepend adds", step["prepend"], MAX_ADDED_BYTES)
    if kind == "Split":
        _pattern_of(step)
    if kind != "Replace":
        return 1.0
    pattern, content = _pattern_of(step), step["content"]
    _check_length("what Replace puts in", content, MAX_ADDED_BYTES)
    added = len(content.encode("utf-8", "surrogatepass"))
    if "String" in step["pattern"]:
        if not pattern:
            raise ValueError("Replace has an empty pattern, which matches everywhere")
        return max(1.0, added / len(pattern.encode("utf-8", "surrogatepass")))
    # It may match single bytes, or nothing beside each of them.
    return max(1.0, float(added)) if _takes_something(pattern) else 1.0 + added


def _takes_something(pattern: str) -> bool:
    """Whether a pattern is one character, or class of them, with + or a count."""
    one = r"(?:\[[^\[\]]+\]|\\[sSdDwWnrt]|\\p\{\w+\}|[^\\\[\](){}|*+?.^$])"
    return re.fullmatch(rf"{one}(?:\+|\{{[1-9]\d*,?\d*\}})?", pattern) is not None


def _check_length(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise ValueError(
            f"{what} {shown(text)} has {len(text)} characters: at most {most} are read"
        )


def _pattern_of(step: Mapping[str, Any]) -> str:
    (pattern,) = step["pattern"].values()
    _check_length("the pattern", pattern, MAX_PATTERN_CHARACTERS)
    if "Regex" in step["pattern"]:
        for count in re.findall(r"\d{4,}", pattern):
            if int(count) > _MAX_COUNT:
                raise ValueError(
                    f"the pattern {shown(pattern)} repeats {shown(count)} times: at "
                    f"most {_MAX_COUNT} are run"
                )
    return pattern


def _check_charsmap(charsmap: Any) -> None:
    """Checks that no character is replaced by a long text, and that sizes are true.

    The library allocates what the file claims: if that fails, the process dies.

    A charsmap is the size of a trie, the trie, and replacements that end with NUL.
    """
    try:
        raw = base64.b64decode(charsmap or "", validate=True)
    except (TypeError, ValueError):
        raise ValueError("the precompiled_charsmap is not base64") from None
    size = int.from_bytes(raw[:4], "little")
    if size % 4 or 4 + size > len(raw):
        raise ValueError(
            f"the precompiled_charsmap has {len(raw)} bytes, but a trie of {size}"
        )
    replacements = raw[4 + size :]
    if max(map(len, replacements.split(b"\0"))) > MAX_ADDED_BYTES:
        raise ValueError(
            f"the precompiled_charsmap replaces a character by over {MAX_ADDED_BYTES} "
            "bytes"
        )


def try_patterns(
    pipeline: Mapping[str, Sequence[Mapping[str, Any]]], library_json: str
) -> None:
    """Loads and tries a tokenizer in another process, if a pattern may be harmful.

    Args:
      pipeline: the steps of the file, which were checked.
      library_json: what the library is to load.

    Raises:
      ValueError: if that fails, or exceeds a limit.
    """
    patterns = [
        step["pattern"]["Regex"]
        for steps in pipeline.values()
        for step in steps
        if "Regex" in (step.get("pattern") or {})
    ]
    odd = [p for p in patterns if not is_harmless(p)]
    if not odd:
        return
    import tokenizers

    # A pattern that needs a letter is not even tried on a text without it.
    letters = [_letters(pattern) for pattern in odd]
    texts = [*_TRIAL_TEXTS, *(x * 30 for x in letters)]
    texts += [c * 50 + "?" + x for c in _TRIAL_SIGNS for x in letters]
    texts += [((x + " a0!\n") * 1500)[:9000] for x in letters]
    size = len(library_json)
    seconds = _TRIAL_SECONDS + size // 10_000_000
    job = {"tokenizer": library_json, "texts": texts, "seconds": seconds}
    job["bytes"] = _TRIAL_BYTES + 20 * size
    what = f"a trial of the pattern {shown(odd[0])}"
    run_limited(
        trial.__file__, [tokenizers], job, what, cpu_seconds=seconds, most=1 << 16
    )


def _letters(pattern: str) -> str:
    return "".join(re.findall(r"\w", re.sub(r"\\.", "", pattern)))[:100]


_ATOM = re.compile(
    r"\\[pP]\{\^?\w+\}|\\x\{[0-9A-Fa-f]+\}|\\[xu][0-9A-Fa-f]+|\\[^\dkgKRX]|[^\\]",
    re.DOTALL,
)
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d*)(,?)(\d*)\})[?+]?")
_OPENING = re.compile(r"\((?:\?(?:[imsx-]*:|[=!]|<[=!])|(?!\?))")


def is_harmless(pattern: str) -> bool:
    """Whether a pattern takes little time for any text, or as much as it always did.

    That is: it is one of a published model; or what repeats has nothing inside that
    varies, no part is matched again by reference, and few ways to match are left.
    """
    if pattern in _published():
        return True
    try:
        end, ways = _alternatives(pattern, 0)
    except (_Odd, RecursionError):
        return False
    return end == len(pattern) and ways <= _MAX_WAYS


@functools.cache
def _published() -> frozenset[str]:
    """The patterns of known models; some take the cube of a text's length at worst."""
    steps = (step for known in BY_NAME.values() for step in known.steps)
    return frozenset(s["pattern"]["Regex"] for s in steps if s["type"] == "Split")


class _Odd(Exception):
    """A pattern has something that may take long."""


def _alternatives(pattern: str, at: int) -> tuple[int, int]:
    """Reads a pattern up to its end or a closing parenthesis.

    Returns:
      The end, and the number of ways to match at one place, if what repeats without a
      bound repeats up to `_MAX_COUNT` times.
    """
    total, ways = 0, 1
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            total, ways, at = total + ways, 1, at + 1
            continue
        at, inner = _atom(pattern, at)
        if found := _QUANTIFIER.match(pattern, at):
            sign, low, comma, high = found.groups()
            bounded = sign == "?" or high or (low and not comma)
            most = int(high or low or 1) if bounded else _MAX_COUNT
            if most > 1 and inner > 1:
                raise _Odd
            if sign == "?":
                inner += 1
            elif sign or comma:
                inner = max(most - int(low or 0) + 1, 1)
            at = found.end()
        ways *= inner
    return at, total + ways


def _atom(pattern: str, at: int) -> tuple[int, int]:
    """Reads what a quantifier may follow; as `_alternatives`."""
    if pattern[at] == "(":
        opening = _OPENING.match(pattern, at)
        if opening is None:
            raise _Odd
        at, ways = _alternatives(pattern, opening.end())
        if pattern[at : at + 1] != ")":
            raise _Odd
        return at + 1, ways
    if pattern[at] == "[":
        return _end_of_class(pattern, at), 1
    atom = _ATOM.match(pattern, at)
    if atom is None:
        raise _Odd
    return atom.end(), 1


def _end_of_class(pattern: str, at: int) -> int:
    depth = 0
    while at < len(pattern):
        depth += {"[": 1, "]": -1}.get(pattern[at], 0)
        at += 2 if pattern[at] == "\\" else 1
        if not depth:
            return at
    raise _Odd
