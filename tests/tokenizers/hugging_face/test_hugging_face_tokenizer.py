"""Hugging Face tokenizers against transformers (goldens) and the library itself."""

import json

import numpy as np
import pytest
import tokenizers
from hugging_face_case import (
    BARRIER,
    GOLDENS,
    contents,
    hostile_texts,
    library,
    model,
    put,
    write_folder,
)

from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.kinds import read_saved_tokenizer
from jaxlm.tokenizers.special_tokens import TokenizerSettings


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_transformers(name, all_of_them):
    tokenizer, record = all_of_them[name], GOLDENS[name]
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.adds_bos == record["adds_bos"]
    for text, ids, decoded in record["texts"]:
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.encode(text).dtype == np.int32
        assert tokenizer.decode(ids) == decoded
        stream = TextStream(tokenizer)
        parts = [stream.feed(i) for i in ids] + [stream.finish()]
        assert "".join(parts) == decoded


@pytest.mark.parametrize("name", GOLDENS)
def test_pieces_tile_the_bytes(name, all_of_them):
    tokenizer = all_of_them[name]
    for text, ids, _ in GOLDENS[name]["texts"]:
        pieces, data = tokenizer.pieces(text), text.encode()
        assert [p.id for p in pieces] == ids
        assert all(0 <= p.start <= p.end <= len(data) for p in pieces)
        if name == "unigram":  # NFKC changes the text: offsets are the library's.
            continue
        ends = [0, *(p.end for p in pieces)]
        assert [p.start for p in pieces] == ends[:-1] and ends[-1] == len(data)
        for i, p in enumerate(pieces):
            written = tokenizer.token_bytes[p.id]
            assert data[p.start : p.end] in (
                {written, written[1:]} if not i else {written}
            )


def test_pieces_where_the_model_changes_text(all_of_them):
    tokenizer, text = all_of_them["unigram"], "two  ﬁsh é\u0301 x"
    pieces = tokenizer.pieces(text)
    assert [p.id for p in pieces] == tokenizer.encode(text).tolist()
    covered = [text.encode()[p.start : p.end].decode() for p in pieces]
    assert "".join(covered) == text
    # After NFC, the library maps é to the e, and each byte belongs to a piece.
    data = {**GOLDENS["byte_level"]["tokenizer"], "normalizer": {"type": "NFC"}}
    composing = HuggingFaceTokenizer(json.dumps(data))
    pieces = composing.pieces("ae\u0301🙂")
    assert [p.end - p.start for p in pieces] == [1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", GOLDENS)
def test_text_never_becomes_a_special_token(name, all_of_them):
    tokenizer = all_of_them[name]
    unknown = {tokenizer.special_ids.get("<unk>")}
    forbidden = set(tokenizer.special_ids.values()) - unknown
    texts = list(hostile_texts(tokenizer))
    assert len(texts) >= 60
    for text in texts:
        ids = tokenizer.encode(text)
        assert not forbidden & set(ids.tolist())
        assert not forbidden & {p.id for p in tokenizer.pieces(text)}
        guarded = BARRIER.join(text)  # A barrier between any two characters.
        assert tokenizer.encode_trusted(guarded, BARRIER).tolist() == ids.tolist()
        if name == "byte_level":
            assert tokenizer.decode(ids) == text


def test_the_library_does_match_them(all_of_them):
    """Otherwise the test above would prove nothing."""
    for name, tokenizer in all_of_them.items():
        plain = library(name)
        for text, i in tokenizer.special_ids.items():
            assert i in plain.encode(f"a {text} b", add_special_tokens=False).ids


def bpe_that_merges_into_a_special_token():
    vocab = {"<": 0, "s": 1, ">": 2, "s>": 3, "<s>": 4}
    merges = [["s", ">"], ["<", "s>"]]
    added = {"id": 4, "content": "<s>", "special": True, "lstrip": False}
    added |= {"rstrip": False, "single_word": False, "normalized": False}
    table = model("byte_level", vocab=vocab, merges=merges)
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole["use_regex"] = False  # A text is one word.
    pipeline = {"pre_tokenizer": whole, "added_tokens": [added]}
    return contents("byte_level", model=table, **pipeline)


@pytest.mark.parametrize(
    "text, special",
    [(bpe_that_merges_into_a_special_token(), "<s>"), (contents("unigram"), "<eos>")],
)
def test_encode_special_tokens_of_the_library_is_not_enough(text, special):
    """It splits no special token off, but the model still finds it in the text."""
    plain = tokenizers.Tokenizer.from_str(text)
    plain.encode_special_tokens = True
    i = plain.token_to_id(special)
    assert i in plain.encode(special, add_special_tokens=False).ids
    tokenizer = HuggingFaceTokenizer(text)
    assert tokenizer.special_ids[special] == i
    ids = tokenizer.encode(special).tolist()
    assert ids and i not in ids


@pytest.mark.parametrize("name", GOLDENS)
def test_trusted_text_is_encoded_as_the_library_does(name, all_of_them):
    tokenizer, plain = all_of_them[name], library(name)
    random = np.random.default_rng(0)
    parts = [
        *tokenizer.special_ids,
        " ",
        "\n",
        "\t\n ",
        "word",
        "é🙂",
        "    ",
        "a<b",
        "<",
    ]
    for _ in range(400):
        text = "".join(random.choice(parts, random.integers(0, 9)))
        expected = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_trusted(text, BARRIER).tolist() == expected


def test_whole_words_and_stripped_space():
    added = [
        {"id": 900, "content": "[L]", "special": True, "lstrip": True},
        {"id": 901, "content": "WORD", "special": False, "single_word": True},
        {"id": 902, "content": "[L][L]", "special": True},
    ]
    rest = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    entries = GOLDENS["byte_level"]["tokenizer"]["added_tokens"]
    vocab = GOLDENS["byte_level"]["tokenizer"]["model"]["vocab"]
    added = [{**rest, **t, "id": len(vocab) + 3 + i} for i, t in enumerate(added)]
    text = contents("byte_level", added_tokens=[*entries, *added])
    tokenizer, plain = HuggingFaceTokenizer(text), tokenizers.Tokenizer.from_str(text)
    for text in (
        "a [L] b",
        "[L][L][L] [L]",
        "WORD sWORD WORDs a WORD.",
        "  [L]\n[L]",
        "",
    ):
        expected = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_trusted(text, BARRIER).tolist() == expected
        assert not {a["id"] for a in added} & set(tokenizer.encode(text).tolist())


def test_words_of_a_word_level_model_stay_text():
    added = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    data = {
        "version": "1.0",
        "added_tokens": [{"id": 1, "content": "</s>", "special": True, **added}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {"<unk>": 0, "</s>": 1, "a": 2},
            "unk_token": "<unk>",
        },
    }
    tokenizer = HuggingFaceTokenizer(json.dumps(data), TokenizerSettings(eos_id=1))
    assert tokenizer.encode("a </s> a").tolist() == [2, 0, 2]
    assert tokenizer.encode_trusted("a </s> a", BARRIER).tolist() == [2, 1, 2]
    # If nothing splits at spaces, a word can imitate a hidden name.
    data["pre_tokenizer"] = None
    tokenizer = HuggingFaceTokenizer(json.dumps(data), TokenizerSettings(eos_id=1))
    with pytest.raises(ValueError, match="became the special token '</s>'"):
        tokenizer.encode(" </s>")
    del data["model"]["vocab"]["<unk>"]
    with pytest.raises(ValueError, match="no ids for this text"):
        HuggingFaceTokenizer(json.dumps(data)).encode("b")


def test_no_truncation_padding_or_dropout(all_of_them):
    changed = contents(
        "byte_level",
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
        model=model("byte_level", dropout=0.5),
        post_processor=GOLDENS["llama"]["tokenizer"]["post_processor"],
    )
    text = "the king and the queen are here" * 5
    expected = all_of_them["byte_level"].encode(text)
    assert HuggingFaceTokenizer(changed).encode(text).tolist() == expected.tolist()


def test_lone_surrogates(all_of_them):
    for tokenizer in all_of_them.values():
        for call in (tokenizer.encode, tokenizer.pieces):
            with pytest.raises(ValueError, match=r"character 1 .*surrogate"):
                call("a\ud800")


def test_ids_outside_the_vocabulary(all_of_them):
    with pytest.raises(ValueError, match=r"token id 423 at index 0 .* 423 tokens"):
        all_of_them["byte_level"].decode([423])


def test_settings(all_of_them):
    chatml = all_of_them["byte_level"]
    assert (chatml.bos_id, chatml.eos_id, chatml.pad_id) == (None, 2, 0)
    assert chatml.stop_ids == (2,) and not chatml.adds_bos
    assert chatml.chat_template == GOLDENS["byte_level"]["config"]["chat_template"]
    assert chatml.special_ids["</think>"] == 421
    assert "    " not in chatml.special_ids  # White space is a way to write text.
    assert 422 in chatml.encode("a    b") and chatml.decode([422]) == "    "
    assert chatml.decode([1, 420, 2]) == "<think>"
    assert all_of_them["llama"].leading_spaces == "drop one"
    assert all_of_them["unigram"].leading_spaces == "drop token"


def test_save_and_load(all_of_them, tmp_path):
    fingerprints = set()
    for name, tokenizer in all_of_them.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        again = read_saved_tokenizer(folder)
        assert isinstance(again, HuggingFaceTokenizer)
        assert again.settings == tokenizer.settings
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("a <s> b").tolist() == tokenizer.encode("a <s> b").tolist()
        fingerprints.add(tokenizer.fingerprint)
        ids = (
            TokenizerSettings(bos_id=0),
            TokenizerSettings(bos_id=1),
            TokenizerSettings(bos_id=1, adds_bos=True),
        )
        fingerprints |= {
            HuggingFaceTokenizer(contents(name), h).fingerprint for h in ids
        }
        # Settings that do not change ids do not change the fingerprint.
        template = HuggingFaceTokenizer(
            contents(name), TokenizerSettings(chat_template="x")
        )
        assert template.fingerprint == HuggingFaceTokenizer(contents(name)).fingerprint
    assert len(fingerprints) == 4 * len(all_of_them)
    (folder / "huggingface.json").unlink()
    with pytest.raises(ValueError, match=r"huggingface\.json is missing"):
        read_saved_tokenizer(folder)
    put(folder, "huggingface.json", contents("llama"))
    with pytest.raises(ValueError, match="fingerprint"):
        read_saved_tokenizer(folder)
    write_folder(folder, "llama")
    with pytest.raises(ValueError, match=r"Hugging Face's own.*tokenizer_from_folder"):
        read_saved_tokenizer(folder)
