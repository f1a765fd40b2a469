"""Files written for transformers give the same ids there."""

import pytest
import tokenizers
from hugging_face_case import (
    GOLDENS,
)

from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_export import write_hugging_face
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder
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
