"""SentencePiece models: comparison with the library, and damaged models."""

import pytest
import sentencepiece
from sentencepiece_case import trained

from jaxlm.tokenizers.sentencepiece import processor
from jaxlm.tokenizers.sentencepiece.model_proto import (
    SPACE_SIGN,
    UNIGRAM,
    ModelProto,
    build_model,
    literal_model,
)
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer


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
        library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
        part = shakespeare[200_000:250_000] + "é漢🙂</s>"
        assert tokenizer.encode(part).tolist() == library.encode(part)


@pytest.mark.parametrize("data", [b"", b"x" * 200, b"\x0a\xff\xff\xff\xff\x0f"])
def test_not_a_model(data, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.model: not a SentencePiece model"):
        SentencePieceTokenizer.from_file(path)


def test_truncated_models(models):
    model = models["bpe"].model
    for size in range(1, len(model), 397):
        # Cut between pieces, it is a smaller model; only ValueError may be raised.
        try:
            SentencePieceTokenizer(model[:size])
        except ValueError as error:
            assert "not a SentencePiece model" in str(error)


def test_the_other_parts_of_a_model_survive(models):
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


@pytest.mark.parametrize("kind", [b"\x00", b"\x07", b"\x64", b"\xff\x01", b"\x83\x00"])
def test_types_of_pieces_are_known_ones(kind):
    """An unknown type would be taken for ordinary text, and `<turn>` matched in it."""
    pieces = [SPACE_SIGN, "<turn>", *"abc", "<unk>"]
    types = [1, 3, 1, 1, 1, 2]
    model = build_model(pieces, [0.0] * 6, types, add_dummy_prefix=False,
                        remove_extra_whitespaces=False)  # fmt: skip
    assert SentencePieceTokenizer(model).special_ids["<turn>"] == 1
    length = len(b"\n\x06<turn>\x15\0\0\0\0\x18\x03")
    old = bytes([length]) + b"\n\x06<turn>\x15\0\0\0\0\x18\x03"
    new = bytes([length - 1 + len(kind)]) + old[1:-1] + kind
    assert model.count(old) == 1
    changed = model.replace(old, new)
    if kind == b"\x83\x00":  # 3 in two bytes: the same type.
        tokenizer = SentencePieceTokenizer(changed)
        assert tokenizer.special_ids["<turn>"] == 1
        assert 1 not in tokenizer.encode("<turn>")
    else:
        with pytest.raises(ValueError, match=r"piece 1, <turn>, has an unknown type"):
            SentencePieceTokenizer(changed)


def test_nested_pieces_that_all_match_at_each_character_are_refused():
    pieces = ["<unk>", *("a" * n for n in range(1, 400))]
    model = build_model(pieces, [-1.0] * 400, [2] + [1] * 399, add_dummy_prefix=False,
                        remove_extra_whitespaces=False)  # fmt: skip
    assert list(SentencePieceTokenizer(model).encode("a" * 399)) == [399]
    unigram = ModelProto.FromString(model)
    unigram.trainer_spec.model_type = UNIGRAM
    with pytest.raises(
        ValueError, match=r"a\.\.\. has 257 characters: at most 256 are"
    ):
        SentencePieceTokenizer(unigram.SerializeToString())
