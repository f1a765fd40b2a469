"""What a hostile tokenizer.json asks for is refused before it is done."""

import base64
import json
import re
import time
import tracemalloc
from unittest import mock

import pytest
from hugging_face_case import GOLDENS

from jaxlm.tokenizers.hugging_face import limits
from jaxlm.tokenizers.hugging_face import pre_tokenizers as published
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.limits import is_harmless
from jaxlm.tokenizers.hugging_face.tokenizer_json import added_token, bpe_model
from jaxlm.tokenizers.special_tokens import Special, SpecialTokens

ALPHABET = {"a": 0, "b": 1, "x": 2}


def contents(**parts):
    """A small tokenizer.json with these parts."""
    decoder = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    data = {"added_tokens": [], "model": bpe_model(ALPHABET, []), "decoder": decoder}
    return json.dumps({"version": "1.0", **data, **parts})


def steps(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False}  # fmt: skip


def charsmap(replacement):
    raw = (4).to_bytes(4, "little") + bytes(4) + replacement + b"\0"
    return base64.b64encode(raw).decode()


SIXTEEN = replace("a" * 16, String="a")
BYTES = {"type": "ByteLevel"}
ADDED = added_token(3, "<a>", special=True)
HOSTILE = {
    "a to the 16 million": (
        {"normalizer": steps("normalizers", *[SIXTEEN] * 6)},
        "the normalizer can make a text 256 times as long: at most 16 times is run",
    ),
    "by a pattern": (
        {"normalizer": steps("normalizers", *[replace("aaaa", Regex="a")] * 6)},
        "64 times as long",
    ),
    "by a pattern that matches nothing": (
        {"normalizer": steps("normalizers", *[replace("a", Regex="b*")] * 6)},
        "32 times as long",
    ),
    "by bytes": (
        {"normalizer": steps("normalizers", *[BYTES] * 5)},
        "32 times as long",
    ),
    "nested": (
        {"normalizer": steps("normalizers", steps("normalizers", *[SIXTEEN] * 2))},
        "256 times as long",
    ),
    "a long prefix": (
        {"normalizer": {"type": "Prepend", "prepend": "a" * 50_000_000}},
        "has 50000000 characters: at most 256 are read",
    ),
    "a long replacement": (
        {"normalizer": replace("b" * 1000, String="a")},
        "has 1000 characters: at most 256 are read",
    ),
    "a long charsmap": (
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": charsmap(b"a" * 1000),
            }
        },
        "over 256 bytes",
    ),
    "a charsmap that claims a large trie": (
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(b"\xff" * 6).decode(),
            }
        },
        "has 6 bytes, but a trie of 4294967295",
    ),
    "no base64": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "é"}},
        "is not base64",
    ),
    "many steps": (
        {"normalizer": steps("normalizers", *[{"type": "NFC"}] * 1000)},
        "the normalizer has 1000 steps: at most 64 are run",
    ),
    "a decoder that matches everywhere": (
        {"decoder": replace("zz", String="")},
        "an empty pattern, which matches everywhere",
    ),
    "a decoder that doubles": (
        {"decoder": steps("decoders", *[replace("aa", String="a")] * 30)},
        "32 times as long",
    ),
    "200,000 added tokens": (
        {
            "added_tokens": [
                dict(ADDED, id=3 + i, content=f"<{i}>") for i in range(200_000)
            ]
        },
        "has 200000 tokens: at most 100000 are read",
    ),
    "white space of 200,000 characters": (
        {
            "added_tokens": [
                dict(ADDED, id=3 + i, content=f"{i:0200b}".translate({48: 32, 49: 9}))
                for i in range(1000)
            ]
        },
        "the added tokens of white space have 200000 characters: at most 20000",
    ),
    "a long added token": (
        {"added_tokens": [added_token(3, "<" * 1000, special=True)]},
        "has 1000 characters: at most 256 are read",
    ),
    "merges that are shorter than their prefix": (
        {
            "model": bpe_model({"a": 0, "b": 1, "ab": 2}, ["a b"])
            | {"continuing_subword_prefix": "##"}
        },
        "model.merges: b does not begin with the continuing_subword_prefix",
    ),
    "a long token": (
        {"model": bpe_model({"a": 0, "b" * 100_000: 1}, [])},
        "has 100000 characters: at most 16384 are read",
    ),
    "nested pieces, all of which match at each character": (
        {
            "model": {
                "type": "Unigram",
                "unk_id": 0,
                "vocab": [["<unk>", 0.0], *(["a" * n, -1.0] for n in range(1, 400))],
            }
        },
        "has 399 characters: at most 256 are read",
    ),
    "a long suffix": (
        {"model": bpe_model(ALPHABET, [], end_of_word_suffix="a" * 1000)},
        "model.end_of_word_suffix aaa",
    ),
    "a long pattern": (
        {"pre_tokenizer": split("a" * 10_000)},
        "the pattern aaa",
    ),
    "a large count": (
        {"pre_tokenizer": split("((a{9999}){9999}){9999}")},
        "repeats 9999 times: at most 1000 are run",
    ),
    "a catastrophic pattern": (
        {"pre_tokenizer": split("(a+)+b")},
        "a trial of the pattern (a+)+b ",
    ),
    "a catastrophic pattern of spaces": (
        {"normalizer": replace("a", Regex=r"(\s+)+b")},
        r"a trial of the pattern (\s+)+b ",
    ),
    "two repetitions, which take the cube of a text's length": (
        {"pre_tokenizer": split(r"(?<=e)[\s\S]*[\s\S]*(?!)")},
        "a trial of the pattern",
    ),
    "nested counts": (
        {"pre_tokenizer": split("(?:(?:a{1,900}){1,900}){1,900}b")},
        "a trial of the pattern (?:(?:a{1,900",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name, capfd):
    parts, reason = HOSTILE[name]
    text = contents(**parts)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        HuggingFaceTokenizer(text).encode("a" * 100)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(error.value)
    assert reason in message and "\n" not in message and len(message) < 400
    # The library, where it fails, prints lines of its own to the terminal.
    assert capfd.readouterr() == ("", "")
    # CPU time of this process; that of a trial has a limit of its own.
    assert seconds < 10 and peak < 50_000_000 + 8 * len(text)


PUBLISHED = [
    published.GPT2_PATTERN,
    *(
        step["pattern"]["Regex"]
        for name in published.BY_NAME
        for step in published.by_name(name).steps
        if step["type"] == "Split"
    ),
    " {2,}",
    r"\s+",
    r"(?=(\d{3})+(?!\d))",
    r" ?[^(\s|[.,!?…。,、।۔،])]+",
    r"[\p{Lu}&&[^\p{Han}]]+",
]


@pytest.mark.parametrize("pattern", dict.fromkeys(PUBLISHED))
def test_published_patterns_need_no_trial(pattern):
    assert is_harmless(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a|a)*b", "(a+)+b", "a*a*a*a*b", "(a?){30}a{30}", "(?:a{1,99}){1,99}b", "(x*)*",
     r"[\s\S]*[\s\S]*(?!)", "a?" * 15 + "a", "(?:a|a|a)" * 10, r"a{1,200}b{0,200}",
     r"(a)\1*", "(?>a+)+", "((a*))*", "(?<n>a)\\g<n>", "(", "[a", "a)", "(?#x)a"],
)  # fmt: skip
def test_other_shapes_need_one(pattern):
    assert not is_harmless(pattern)


def test_a_harmless_file_with_an_odd_pattern_is_read():
    text = contents(pre_tokenizer=split("(?:a|b)+"))
    assert HuggingFaceTokenizer(text).encode("abab").tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", GOLDENS)
def test_honest_files_start_no_process(name, monkeypatch):
    monkeypatch.setattr(limits, "run_limited", None)  # A call would raise.
    HuggingFaceTokenizer(json.dumps(GOLDENS[name]["tokenizer"])).encode("a b")


def test_many_special_tokens_make_no_large_pattern():
    """One pattern of all tokens took 4 s to compile."""
    tokens = {f"<|{i}|>": Special(i) for i in range(100_000)}
    with mock.patch("re.compile", wraps=re.compile) as compiled:
        special = SpecialTokens(tokens)
    assert compiled.called and all(len(c.args[0]) < 100 for c in compiled.mock_calls)
    found = [part for _, part in special.split("<|99999|>ab<|7|>" * 100)]
    assert found == [99_999, "ab", 7] * 100
