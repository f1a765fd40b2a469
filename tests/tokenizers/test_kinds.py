"""Every kind of tokenizer: round trips, streams, saving and building."""

import json
import sys

import numpy as np
import pytest
from sentencepiece_case import trained

from jaxlm.config import DataConfig
from jaxlm.tokenizers.base import TextStream
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe
from jaxlm.tokenizers.hugging_face.tokenizer_export import write_hugging_face
from jaxlm.tokenizers.kinds import build_tokenizer, read_saved_tokenizer
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  two  spaces \n\n and lines \n",
    "\t\ttabs\tand\r\nCRLF\r",
    "a\0b",
    "héllo 漢字 🙂 👩‍👩‍👧 e\u0301",
    "\ufeffmark, \ufffd replacement, \u2028 separator, \u00a0\u3000 spaces",
    "▁ meta ▁▁ sign▁",
    "▅ reserved",
    "x" * 3000,
    "".join(map(chr, range(1, 0x250))),
]


HOSTILE = [
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "<0xFF>",
    "▁</s>▁",
    "<|endoftext|>",
]


def every_tokenizer(models):
    chars = CharTokenizer("".join(HARD_TEXTS + HOSTILE))
    return [ByteTokenizer(), chars, *models.values()]


def test_round_trip_of_hard_texts(models, shakespeare):
    for tokenizer in every_tokenizer(models):
        for text in [*HARD_TEXTS, *HOSTILE]:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and ids.ndim == 1
            assert tokenizer.decode(ids) == text
    for tokenizer in models.values():
        ids = tokenizer.encode(shakespeare)
        assert tokenizer.decode(ids) == shakespeare
        assert len(ids) < 0.6 * len(shakespeare)


def test_pieces_tile_the_bytes(models):
    for tokenizer in every_tokenizer(models):
        for text in HARD_TEXTS:
            data, pieces = text.encode(), tokenizer.pieces(text)
            assert [p.id for p in pieces] == tokenizer.encode(text).tolist()
            ends = [0, *(p.end for p in pieces)]
            assert [p.start for p in pieces] == ends[:-1] and ends[-1] == len(data)
            for p in pieces:
                assert data[p.start : p.end] == tokenizer.token_bytes[p.id]


def test_text_never_becomes_a_special_id(models):
    for tokenizer in every_tokenizer(models):
        special = {i for i, b in enumerate(tokenizer.token_bytes) if not b}
        special |= {tokenizer.eos_id, tokenizer.bos_id} - {None}
        for text in HOSTILE:
            assert not special & set(tokenizer.encode(text).tolist())
    assert [t.eos_id for t in every_tokenizer(models)] == [256, None, 1, 1]


def test_stream_equals_decode(models):
    text = "héllo 漢字 🙂 ▁x\n"
    random = np.random.default_rng(0)
    for tokenizer in [*every_tokenizer(models), SentencePieceTokenizer(trained())]:
        known = text if not isinstance(tokenizer, CharTokenizer) else "héllo 漢 🙂"
        noise = random.integers(0, tokenizer.vocab_size, 300)
        for ids in (tokenizer.encode(known), noise, np.r_[noise, [0]][:1]):
            stream = TextStream(tokenizer)
            parts = [stream.feed(int(i)) for i in ids] + [stream.finish()]
            assert "".join(parts) == tokenizer.decode(ids)


def test_stream_holds_back_half_a_character(models):
    for tokenizer in (ByteTokenizer(), models["bpe"]):
        stream = TextStream(tokenizer)
        parts = [stream.feed(int(i)) for i in tokenizer.encode("🙂")]
        assert parts == ["", "", "", "🙂"]
        assert stream.feed(int(tokenizer.encode("🙂")[0])) == ""
        assert stream.finish() == "\ufffd"


def test_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at offset 2 .*bytes"):
        CharTokenizer("abc").encode("abé")
    with pytest.raises(ValueError, match="offset 0"):
        CharTokenizer("abc").encode("🙂")


@pytest.mark.parametrize("bad", [-1, 257, 10**9])
def test_ids_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match=f"token id {bad} at index 1 .* 257 tokens"):
        ByteTokenizer().decode([1, bad])
    with pytest.raises(ValueError, match=f"token id {bad}"):
        TextStream(ByteTokenizer()).feed(bad)


def test_lone_surrogates(models):
    for tokenizer in (ByteTokenizer(), models["bpe"]):
        with pytest.raises(ValueError, match=r"character 1 .*surrogate"):
            tokenizer.encode("a\ud800")


def test_save_and_load(models, tmp_path):
    fingerprints = set()
    for number, tokenizer in enumerate(every_tokenizer(models)):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer.save(folder)
        again = read_saved_tokenizer(folder)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        text = "ab\n▁é"
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        fingerprints.add(tokenizer.fingerprint)
    assert len(fingerprints) == 4
    assert CharTokenizer("ab").fingerprint != CharTokenizer("abc").fingerprint


def change(folder, **values):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_damaged_folders(models, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        read_saved_tokenizer(tmp_path)
    CharTokenizer("abc").save(tmp_path)
    change(tmp_path, characters="abd")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged.*fingerprint"):
        read_saved_tokenizer(tmp_path)
    change(tmp_path, characters=None)
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*at least one"):
        read_saved_tokenizer(tmp_path)
    change(tmp_path, kind="char")
    with pytest.raises(
        ValueError, match=r"unknown kind .*'char' \(did you mean 'chars'"
    ):
        read_saved_tokenizer(tmp_path)
    change(tmp_path, kind="chars", version=2)
    with pytest.raises(ValueError, match="version 2"):
        read_saved_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        read_saved_tokenizer(tmp_path)
    models["bpe"].save(tmp_path)
    model = tmp_path / "sentencepiece.model"
    model.write_bytes(models["unigram"].model)
    with pytest.raises(ValueError, match="fingerprint"):
        read_saved_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(ValueError, match=r"no such SentencePiece \.model"):
        read_saved_tokenizer(tmp_path)


def test_build_tokenizer(tmp_path, models):
    texts = ["abca", "bcd"]
    chars = build_tokenizer(DataConfig(), texts)
    assert chars.characters == "abcd"
    assert build_tokenizer(DataConfig(tokenizer="bytes"), []).vocab_size == 257
    with pytest.raises(ValueError, match="at least one character"):
        build_tokenizer(DataConfig(), [])
    path = tmp_path / "m.model"
    path.write_bytes(models["bpe"].model)
    config = DataConfig(tokenizer="sentencepiece", tokenizer_model=str(path))
    loaded = build_tokenizer(config, iter(()))
    assert loaded.fingerprint == models["bpe"].fingerprint
    config = DataConfig(tokenizer="bpe", tokenizer_vocab_size=258)
    assert build_tokenizer(config, ["ab ab"]).token_bytes[257] == b"ab"


@pytest.fixture
def published(tmp_path):
    """A folder of Hugging Face."""
    folder = tmp_path / "m"
    folder.mkdir()
    write_hugging_face(train_bpe(["ab ab ab"], 258), folder)
    return folder


def read(name):
    return build_tokenizer(DataConfig(tokenizer=f"hf:{name}"), iter(()))


def test_a_tokenizer_of_hugging_face(published, tmp_path, caplog):
    file = published / "tokenizer.json"
    expected = read(published)
    assert expected.eos_id == 0 and expected.encode("ab").tolist() == [257]
    assert read(file).fingerprint == expected.fingerprint
    assert not caplog.records
    # Without the files beside it: a well-known name ends a document.
    (tmp_path / "my.json").write_bytes(file.read_bytes())
    assert read(tmp_path / "my.json").fingerprint == expected.fingerprint
    assert "names no token that ends a document: taking <|endoftext|>" in caplog.text
    caplog.clear()
    text = file.read_text().replace("<|endoftext|>", "<|mark|>")
    (tmp_path / "my.json").write_text(text)
    assert read(tmp_path / "my.json").eos_id is None
    assert "my.json names no token that ends a document: none is added" in caplog.text
    # A run stores it as it stores all others.
    (tmp_path / "saved").mkdir()
    expected.save(tmp_path / "saved")
    again = read_saved_tokenizer(tmp_path / "saved")
    assert again.fingerprint == expected.fingerprint


def test_a_tokenizer_of_hugging_face_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    CharTokenizer("abc").save(tmp_path)
    for name, message in {
        "nothing": "there is no file or folder 'nothing'$",
        "./own/er": "there is no file or folder './own/er'$",
        "owner/name": r"file or folder 'owner/name'; on the Hub: .*jaxlm\[hub\]",
        tmp_path / "empty": "no tokenizer in this folder: neither tokenizer.json",
        tmp_path / "m.gguf": "m.gguf: not a tokenizer.json",
        tmp_path: "not a Hugging Face tokenizer.json: it has no model.vocab",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            read(name)
        assert "\n" not in str(raised.value)
