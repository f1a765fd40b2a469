"""Hugging Face tokenizers against transformers (goldens) and the library itself."""

import json

import numpy as np
import pytest
import tokenizers
from hugging_face_case import (
    GOLDENS,
    golden_tokenizer,
    hostile_texts,
    mutated,
    write_folder,
)

from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.fast_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_export import write_hugging_face
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder
from jaxlm.tokenizers.kinds import read_saved_tokenizer
from jaxlm.tokenizers.sentencepiece.model_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    build_model,
)
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.special_tokens import TokenizerSettings

BARRIER = "\ufdd1"


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory):
    return {n: golden_tokenizer(n, tmp_path_factory.mktemp(n)) for n in GOLDENS}


def library(name):
    return tokenizers.Tokenizer.from_str(json.dumps(GOLDENS[name]["tokenizer"]))


def contents(name, **changes):
    return json.dumps({**GOLDENS[name]["tokenizer"], **changes})


def model(name, **changes):
    return {**GOLDENS[name]["tokenizer"]["model"], **changes}


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
        if name == "unigram":  # NFKC changes the text: places are the library's.
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
    # Behind NFC: the library says that é comes from the e, and each byte has a place.
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
    """Or the test above would prove nothing."""
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
    """It cuts no special token out of a text, but the model finds it there."""
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
    # Without anything that cuts at spaces, a word can be made to look like one.
    data["pre_tokenizer"] = None
    tokenizer = HuggingFaceTokenizer(json.dumps(data), TokenizerSettings(eos_id=1))
    with pytest.raises(ValueError, match="became the special token '</s>'"):
        tokenizer.encode(" </s>")
    del data["model"]["vocab"]["<unk>"]
    with pytest.raises(ValueError, match="no ids for this text"):
        HuggingFaceTokenizer(json.dumps(data)).encode("b")


def test_nothing_is_cut_padded_or_drawn(all_of_them):
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


BOS_FIRST = GOLDENS["llama"]["tokenizer"]["post_processor"]
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["</s>", 2],
    "cls": ["<s>", 1],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize(
    "post_processor, config, expected",
    [
        (BOS_FIRST, {}, (1, True)),
        ({"type": "Sequence", "processors": [BOS_FIRST]}, {}, (1, True)),
        (ROBERTA, {}, (1, True)),
        (None, {}, (1, False)),
        (None, {"add_bos_token": True}, (1, True)),
        (BOS_FIRST, {"add_bos_token": False}, (1, False)),
        (None, {"add_bos_token": True, "bos_token": None}, (None, False)),
        (BOS_FIRST, {"bos_token": None}, (1, True)),
        (BOS_FIRST, {"bos_token": "<unk>"}, (0, False)),
    ],
)
def test_whether_bos_is_expected(post_processor, config, expected, tmp_path):
    write_folder(tmp_path, "llama", **config)
    file = tmp_path / "tokenizer.json"
    file.write_text(contents("llama", post_processor=post_processor))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == expected
    assert tokenizer.encode("a").tolist() == tokenizer.encode_trusted("a", "|").tolist()


def put(folder, name, values):
    (folder / name).write_text(
        values if isinstance(values, str) else json.dumps(values)
    )


def test_other_files_of_a_folder(tmp_path):
    write_folder(tmp_path, "byte_level")
    put(tmp_path, "generation_config.json", {"eos_token_id": [0, 2, 1]})
    put(tmp_path, "chat_template.jinja", "{{ messages }}")
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.eos_id == 2 and tokenizer.stop_ids == (2, 0, 1)
    assert tokenizer.chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").unlink()
    # Without tokenizer_config.json the older file, and the model's own.
    (tmp_path / "tokenizer_config.json").unlink()
    put(tmp_path, "special_tokens_map.json", {"eos_token": {"content": "<|im_start|>"}})
    put(tmp_path, "generation_config.json", {"eos_token_id": 0})
    put(tmp_path, "config.json", {"bos_token_id": 1, "eos_token_id": [2, 0]})
    tokenizer = tokenizer_from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1, None)
    assert tokenizer.stop_ids == (1, 0) and tokenizer.chat_template is None
    (tmp_path / "special_tokens_map.json").unlink()
    assert tokenizer_from_folder(tmp_path).stop_ids == (2, 0)
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    put(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert tokenizer_from_folder(tmp_path).chat_template == "D"
    put(tmp_path, "tokenizer_config.json", {"pad_token": "[PAD]", "eos_token": "</e>"})
    with pytest.raises(ValueError, match=r"the eos token '</e>' .* not in the vocab"):
        tokenizer_from_folder(tmp_path)


def test_tokens_that_only_the_config_adds(tmp_path):
    new = {"content": "<new>", "special": True, "lstrip": False, "rstrip": False}
    rest = {"normalized": False, "single_word": False}
    write_folder(tmp_path, "byte_level", added_tokens_decoder={"423": {**new, **rest}})
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.special_ids["<new>"] == 423 and tokenizer.vocab_size == 424
    assert tokenizer.encode_trusted("a<new>", BARRIER)[-1] == 423
    write_folder(tmp_path, "byte_level", added_tokens_decoder={"5": {**new, **rest}})
    with pytest.raises(ValueError, match="'<new>' with the id 5, which '#' has"):
        tokenizer_from_folder(tmp_path)
    write_folder(tmp_path, "byte_level", added_tokens_decoder={"5": "<new>"})
    with pytest.raises(ValueError, match="added_tokens_decoder is damaged"):
        tokenizer_from_folder(tmp_path)


def test_a_folder_with_a_sentencepiece_model(tmp_path, models):
    (tmp_path / "tokenizer.model").write_bytes(models["bpe"].model)
    plain = tokenizer_from_folder(tmp_path)
    assert isinstance(plain, SentencePieceTokenizer)
    assert plain.eos_id == 1 and plain.bos_id is None and not plain.adds_bos
    put(tmp_path, "added_tokens.json", {"<|im_start|>": 500, "<|im_end|>": 501})
    decoder = {"501": {"content": "<|im_end|>", "special": True}}
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": decoder,
        "chat_template": "x",
    }
    put(tmp_path, "tokenizer_config.json", config)
    put(tmp_path, "generation_config.json", {"eos_token_id": [501, 1]})
    tokenizer = tokenizer_from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (500, 501)
    assert tokenizer.adds_bos and tokenizer.stop_ids == (501, 1)
    assert tokenizer.chat_template == "x" and tokenizer.vocab_size == 502
    text = "<|im_start|>hear me<|im_end|>"
    inside = plain.encode("hear me").tolist()
    assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()
    trusted = tokenizer.encode_trusted(text.replace("hear", f"h{BARRIER}ear"), BARRIER)
    assert trusted.tolist() == [500, *inside, 501]
    assert tokenizer.decode(trusted) == "<|im_start|>hear me"  # A user-defined piece.
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    again = read_saved_tokenizer(saved)
    assert again.settings == tokenizer.settings
    assert again.fingerprint == tokenizer.fingerprint != plain.fingerprint
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match="has the id 501: 500 is next"):
        tokenizer_from_folder(tmp_path)


def test_a_folder_of_gpt2(tmp_path, all_of_them):
    table = model("byte_level")
    put(tmp_path, "vocab.json", table["vocab"])
    merges = "\n".join(" ".join(m) for m in table["merges"])
    put(tmp_path, "merges.txt", f"#version: 0.2\n{merges}\n")
    tokenizer = tokenizer_from_folder(tmp_path)
    gpt2 = tokenizers.ByteLevelBPETokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    for text, _, _ in GOLDENS["byte_level"]["texts"]:
        assert tokenizer.encode(text).tolist() == gpt2.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tokenizer.special_ids) == ["<|endoftext|>"]
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    qwen = tokenizer_from_folder(tmp_path)
    assert qwen.encode("e\u0301").tolist() == qwen.encode("é").tolist()
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    with pytest.raises(ValueError, match=r"BartTokenizer .* add its tokenizer.json"):
        tokenizer_from_folder(tmp_path)


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
        # What does not change ids does not make another tokenizer.
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a tokenizer.json"),
        ("[" * 200_000, "not a tokenizer.json"),
        ("[]", "no model.vocab"),
        ('{"model": {}}', "no model.vocab"),
        (contents("llama", decoder=None), "the decoder is missing"),
        (contents("llama", decoder={"type": "WordPiece"}), "the decoder has the step"),
        (contents("llama", decoder=["x"]), "is no step of a tokenizer"),
        (contents("llama", normalizer={"type": "Nfx"}), "not a Hugging Face"),
        (contents("llama", added_tokens=[{"id": 1}]), "is no added token"),
        (
            contents("llama", added_tokens=[{"id": 1 << 30, "content": "x"}]),
            "'x' has the id 1073741824",
        ),
        (contents("llama", model=model("llama", vocab={"a": -1})), "'a' has the id -1"),
        (contents("llama", model=model("llama", vocab={"a": "b"})), "has the id 'b'"),
        (contents("llama", model=model("llama", vocab=[["a"]])), "model.vocab"),
        (contents("llama", model=model("llama", merges=["a"])), "not a Hugging Face"),
    ],
)
def test_damaged_files(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer(text)
    put(tmp_path, "tokenizer.json", text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tokenizer_from_folder(tmp_path)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer in this folder"):
        tokenizer_from_folder(tmp_path)
    write_folder(tmp_path, "llama")
    put(tmp_path, "tokenizer_config.json", "{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
        tokenizer_from_folder(tmp_path)
    put(tmp_path, "tokenizer_config.json", "[]")
    with pytest.raises(ValueError, match="no JSON object"):
        tokenizer_from_folder(tmp_path)
    with pytest.raises(ValueError, match="names none"):
        TokenizerSettings(adds_bos=True)
    with pytest.raises(
        ValueError, match=r"the eos token is 999, outside .* 469 tokens"
    ):
        HuggingFaceTokenizer(contents("llama"), TokenizerSettings(eos_id=999))


def llama_like_model():
    pieces = ["<unk>", "<s>", "</s>", "<turn>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁▁"]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, *([BYTE] * 256), *([NORMAL] * 11)]
    scores = [-float(max(i - 259, 0)) for i in range(len(pieces))]
    return build_model(
        pieces, scores, types, add_dummy_prefix=True, remove_extra_whitespaces=False
    )


def every_kind(models, all_of_them):
    yield "chars", CharTokenizer("".join(r[0] for r in GOLDENS["llama"]["texts"]))
    yield "bytes", ByteTokenizer()
    yield from ((f"{algorithm}.model", model) for algorithm, model in models.items())
    settings = TokenizerSettings(
        bos_id=1, eos_id=2, adds_bos=True, chat_template="{{ 1 }}"
    )
    yield "llama.model", SentencePieceTokenizer(llama_like_model(), settings)
    yield from all_of_them.items()


def test_written_files_give_the_same_ids(models, all_of_them, shakespeare, tmp_path):
    for name, tokenizer in every_kind(models, all_of_them):
        folder = tmp_path / name
        folder.mkdir()
        write_hugging_face(tokenizer, folder)
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        texts = [row[0] for row in GOLDENS["llama"]["texts"]]
        texts += [shakespeare[:20_000], "hello hellohello   hello\n"]
        for text in texts if name != "chars" else texts[:-2]:
            ids = tokenizer.encode(text).tolist()
            assert reference.encode(text, add_special_tokens=False).ids == ids, name
            assert reference.decode(ids) == tokenizer.decode(ids)
        with_bos = reference.encode("hello").ids[:1] == [tokenizer.bos_id]
        assert with_bos == tokenizer.adds_bos
        again = tokenizer_from_folder(folder)
        assert isinstance(again, HuggingFaceTokenizer)
        same = ("bos_id", "eos_id", "pad_id", "adds_bos", "stop_ids", "chat_template")
        assert [getattr(again, a) for a in same] == [
            getattr(tokenizer, a) for a in same
        ]
        if name in GOLDENS:
            assert (folder / "tokenizer.json").read_bytes() == tokenizer.tokenizer_json
    with pytest.raises(Exception, match="WordLevel"):
        tokenizers.Tokenizer.from_file(str(tmp_path / "chars/tokenizer.json")).encode(
            "@"
        )


@pytest.mark.parity
def test_transformers_loads_written_files(models, all_of_them, tmp_path, recwarn):
    import transformers

    for name, tokenizer in every_kind(models, all_of_them):
        folder = tmp_path / name
        folder.mkdir()
        write_hugging_face(tokenizer, folder)
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        for text, _, _ in GOLDENS["llama"]["texts"]:
            ids = tokenizer.encode(text).tolist()
            assert reference.encode(text, add_special_tokens=False) == ids
            decoded = reference.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert decoded == tokenizer.decode(ids)
        assert reference.bos_token_id == tokenizer.bos_id
        assert reference.eos_token_id == tokenizer.eos_id
        assert reference.chat_template == tokenizer.chat_template
        assert (reference.encode("a")[:1] == [tokenizer.bos_id]) == tokenizer.adds_bos
    assert not [str(w.message) for w in recwarn if "transformers" in str(w.filename)]


def test_models_that_a_tokenizer_json_cannot_express(models, tmp_path):
    pieces = ["<unk>", "a", "b"]
    unused = build_model(
        *(pieces, [0.0] * 3, [UNKNOWN, NORMAL, 5]),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    with pytest.raises(ValueError, match="unused pieces"):
        write_hugging_face(SentencePieceTokenizer(unused), tmp_path)


@pytest.mark.slow
def test_nothing_but_a_value_error_escapes(tmp_path):
    random, outcomes = np.random.default_rng(0), set()
    for i in range(300):
        record = GOLDENS[list(GOLDENS)[i % 4]]
        files = {"tokenizer": record["tokenizer"], "tokenizer_config": record["config"]}
        name = list(files)[i % 2]
        files[name] = mutated(files[name], random)
        for name, values in files.items():
            put(tmp_path, f"{name}.json", values)
        try:
            tokenizer = tokenizer_from_folder(tmp_path)
            tokenizer.decode(tokenizer.encode("hé <s> 🙂"))
            tokenizer.pieces("hé ½")
            tokenizer.encode_trusted("<s> a", BARRIER)
            outcomes.add("read")
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
