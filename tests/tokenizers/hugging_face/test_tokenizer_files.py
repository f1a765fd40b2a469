"""Tokenizers of Hugging Face folders, complete and damaged."""

import pytest
import tokenizers
from hugging_face_case import (
    BARRIER,
    GOLDENS,
    contents,
    model,
    put,
    write_folder,
)

from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder
from jaxlm.tokenizers.kinds import read_saved_tokenizer
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.tokenizers.special_tokens import TokenizerSettings

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


def test_other_files_of_a_folder(tmp_path):
    write_folder(tmp_path, "byte_level")
    put(tmp_path, "generation_config.json", {"eos_token_id": [0, 2, 1]})
    put(tmp_path, "chat_template.jinja", "{{ messages }}")
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.eos_id == 2 and tokenizer.stop_ids == (2, 0, 1)
    assert tokenizer.chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").unlink()
    # Without tokenizer_config.json, the older file and the model's config count.
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
    with pytest.raises(ValueError, match="'<new>' with the id 5, which is that of '#'"):
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
    put(tmp_path, "vocab.json", {**table["vocab"], "\ud800": 9999})
    with pytest.raises(ValueError, match=r"has half of a surrogate pair: not UTF-8$"):
        tokenizer_from_folder(tmp_path)
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    with pytest.raises(ValueError, match=r"BartTokenizer .* add its tokenizer.json"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a tokenizer.json"),
        ("[" * 200_000, "not a tokenizer.json"),
        ("[]", "no model.vocab"),
        ('{"model": {}}', "no model.vocab"),
        (contents("llama", decoder=None), "the decoder is missing"),
        (contents("llama", decoder={"type": "WordPiece"}), "the decoder has the step"),
        (contents("llama", decoder=["x"]), "is not a step of a tokenizer"),
        (contents("llama", normalizer={"type": "Nfx"}), "not a Hugging Face"),
        (contents("llama", added_tokens=[{"id": 1}]), "is not an added token"),
        (
            contents("llama", added_tokens=[{"id": 1, "content": "\ud800"}]),
            r"'\\ud800' is not the text of a token",
        ),
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
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        tokenizer_from_folder(tmp_path)
    put(tmp_path, "tokenizer_config.json", "[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        tokenizer_from_folder(tmp_path)
    with pytest.raises(ValueError, match="names none"):
        TokenizerSettings(adds_bos=True)
    with pytest.raises(
        ValueError, match=r"the eos token is 999, outside .* 469 tokens"
    ):
        HuggingFaceTokenizer(contents("llama"), TokenizerSettings(eos_id=999))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_links_do_not_lead_out_of_the_folder(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder, "llama")
    (tmp_path / "secret").write_text('{"chat_template": "secret"}')
    (folder / "inside").write_text('{"chat_template": "inside"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("inside")
    assert "inside" in tokenizer_from_folder(folder).chat_template
    (folder / name).unlink()
    (folder / name).symlink_to("../secret")
    with pytest.raises(ValueError, match=rf"{name}: a symbolic link that leads out"):
        tokenizer_from_folder(folder)
