import io
import json

import numpy as np
import pytest
import sentencepiece

from jaxlm.config import DataConfig
from jaxlm.tokenizers.base import TextStream
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.kinds import build_tokenizer, read_saved_tokenizer
from jaxlm.tokenizers.sentencepiece import processor
from jaxlm.tokenizers.sentencepiece.model_proto import literal_model
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.sentencepiece.trainer import train_sentencepiece

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


def trained(**options):
    model = io.BytesIO()
    options = {"vocab_size": 285, "hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world hello there the then"] * 50),
        model_writer=model,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_user_defined_symbols_are_not_matched_in_text():
    model = trained(
        user_defined_symbols=["<turn>", "▁▁"],
        control_symbols=["<ctl>"],
        byte_fallback=True,
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    turn = library.piece_to_id("<turn>")
    assert turn in library.encode("a<turn>b")  # What the library does.
    tokenizer = SentencePieceTokenizer(model)
    assert turn not in tokenizer.encode("a<turn>b<ctl>")
    assert tokenizer.decode(tokenizer.encode("a<turn>b<ctl>")) == "a<turn>b<ctl>"
    assert tokenizer.decode([turn]) == "<turn>"


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_equals_the_library(prefix, remove, fallback):
    model = trained(
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=remove,
        byte_fallback=fallback,
        vocab_size=285 if fallback else 30,
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model)
    texts = ["hello there", "  the  world ", "é 漢\nhello", "ﬁ Ａ", "", " ", "<s></s>"]
    for text in texts:
        ids = library.encode(text)
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(ids) == library.decode(ids)
        assert [p.id for p in tokenizer.pieces(text)] == ids
    space = library.piece_to_id("▁")
    word = next(
        i for i in range(len(library)) if library.id_to_piece(i).startswith("▁t")
    )
    for ids in ([space, word], [space, space, word], [word, word], [1, space, word]):
        assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.vocab_size == library.get_piece_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)


def test_equals_the_library_when_trained_here(models, shakespeare):
    for tokenizer in models.values():
        library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model)
        part = shakespeare[200_000:250_000] + "é漢🙂</s>"
        assert tokenizer.encode(part).tolist() == library.encode(part)


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
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        read_saved_tokenizer(tmp_path)
    models["bpe"].save(tmp_path)
    model = tmp_path / "sentencepiece.model"
    model.write_bytes(models["unigram"]._model)
    with pytest.raises(ValueError, match="fingerprint"):
        read_saved_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(ValueError, match=r"no such SentencePiece \.model"):
        read_saved_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"x" * 200, b"\x0a\xff\xff\xff\xff\x0f"])
def test_not_a_model(data, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.model: not a SentencePiece model"):
        SentencePieceTokenizer.from_file(path)


def test_truncated_models(models):
    model = models["bpe"]._model
    for size in range(1, len(model), 397):
        # A cut between pieces is a smaller model; nothing but ValueError may escape.
        try:
            SentencePieceTokenizer(model[:size])
        except ValueError as error:
            assert "not a SentencePiece model" in str(error)


def test_what_a_model_holds_beside_its_pieces_survives(models):
    unknown = b"\xc2\x3e\x03abc"  # Field 1000, which no version has yet.
    model = trained(user_defined_symbols=["<turn>"]) + unknown
    assert literal_model(model).endswith(unknown)
    assert SentencePieceTokenizer(model).model == model


def test_a_piece_that_is_not_utf8():
    model = trained(user_defined_symbols=["<turn>"])
    assert model.count(b"<turn>") >= 1
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(model.replace(b"<turn>", b"<tur\xff>", 1))


def test_model_of_absurd_size(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "MAX_MODEL_BYTES", 10)
    path = tmp_path / "a.model"
    path.write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="11 bytes is too large"):
        SentencePieceTokenizer.from_file(path)


def test_training_is_deterministic(models, shakespeare):
    for algorithm, tokenizer in models.items():
        again = train_sentencepiece([shakespeare[:100_000]], 500, algorithm)
        assert again.fingerprint == tokenizer.fingerprint
    assert any(b"\n" in b for b in models["bpe"].token_bytes if len(b) > 1)


def test_vocabulary_too_large_or_small():
    texts = ["hello world, the quick brown fox"] * 3
    with pytest.raises(ValueError, match="yields at most") as error:
        train_sentencepiece(texts, 9000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train_sentencepiece(texts, largest).vocab_size == largest
    with pytest.raises(ValueError, match=r"is 100, but the 256 bytes .* or more"):
        train_sentencepiece(texts, 100)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece([], 300)


def test_build_tokenizer(tmp_path, models):
    texts = ["abca", "bcd"]
    chars = build_tokenizer(DataConfig(), lambda: texts)
    assert chars.characters == "abcd"
    assert build_tokenizer(DataConfig(tokenizer="bytes"), []).vocab_size == 257
    with pytest.raises(ValueError, match="at least one character"):
        build_tokenizer(DataConfig(), [])
    path = tmp_path / "m.model"
    path.write_bytes(models["bpe"]._model)
    config = DataConfig(tokenizer="sentencepiece", tokenizer_model=str(path))
    loaded = build_tokenizer(config, iter(()))
    assert loaded.fingerprint == models["bpe"].fingerprint
