"""A byte-level BPE that is trained here: exact, repeatable, readable elsewhere."""

import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from jaxlm.tokenizers.gguf import gguf_metadata, tokenizer_from_gguf
from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe
from jaxlm.tokenizers.hugging_face.tokenizer_export import write_hugging_face
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder

TEXTS = [
    "",
    " \n\n  two  spaces\t\r\n",
    "héllo 漢字 🙂 👩‍👩‍👧 e\u0301 \u00a0\u2028\ufeff\ufffd\0",
    "I'LL pay 12345.67 to you're <|endoftext|> Ġ Ċ <|endoftext|>",
    "".join(map(chr, range(0x3000))),
]


@pytest.fixture(scope="module")
def trained(shakespeare):
    return train_bpe([shakespeare], 1000)


def test_every_text_comes_back(trained, shakespeare):
    assert trained.vocab_size == 1000
    for text in [*TEXTS, shakespeare]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.eos_id not in ids
    assert {bytes([b]) for b in range(256)} <= set(trained.token_bytes)
    assert trained.token_bytes[trained.eos_id] == b""
    assert trained.stop_ids == (trained.eos_id,) == (0,)
    assert len(ids) < 0.45 * len(shakespeare)
    # Words as GPT-4's: a line keeps its sign, and numbers are cut after three digits.
    assert b"!\n" in trained.token_bytes and b" the" in trained.token_bytes
    assert len(trained.encode("1234567")) >= 3


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer(trained, shakespeare):
    """Also in another process, where strings have other hashes."""
    code = """if True:
        from jaxlm.data.sources import BUNDLED_FOLDER
        from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe
        text = (BUNDLED_FOLDER / "shakespeare.txt").read_text(encoding="utf-8")
        print(train_bpe([text], 1000).fingerprint)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [trained.fingerprint]
    assert train_bpe([shakespeare[:-1000]], 1000).fingerprint != trained.fingerprint


def test_it_travels(trained, shakespeare, tmp_path):
    write_hugging_face(trained, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    folder = tokenizer_from_folder(tmp_path)
    gguf = tokenizer_from_gguf(gguf_metadata(trained))
    for other in (folder, gguf):
        assert other.eos_id == 0 and other.stop_ids == (0,)
        assert other.token_bytes == trained.token_bytes
    for text in [*TEXTS, shakespeare[:20_000]]:
        ids = trained.encode(text).tolist()
        for other in (folder, gguf):
            assert other.encode(text).tolist() == ids
        if "<|endoftext|>" not in text:
            assert library.encode(text).ids == ids


@pytest.mark.parametrize(
    "texts, size, message",
    [
        (["abc"], 256, "is 256, but the 256 bytes and <.endoftext.> need 257"),
        (["ab ab ab cd"], 300, r"is 300, but this text yields at most 25\d tokens"),
        ([""], 300, "no text to train"),
    ],
)
def test_errors(texts, size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(texts, size)


def test_pairs_that_occur_once_are_not_learned():
    assert train_bpe(["ab ab", "xy"], 258).token_bytes[257] == b"ab"
    with pytest.raises(ValueError, match="at most 258"):
        train_bpe(["ab ab", "xy"], 259)


def test_long_texts_are_thinned_out_evenly(monkeypatch):
    from jaxlm.tokenizers.training import passages

    text = "".join(f"{i:>9}\n" for i in range(20_000))
    whole = passages([text])
    assert "".join(whole) == text and max(map(len, whole)) <= 2000
    kept = passages([text], 50_000)
    assert sum(map(len, kept)) <= 50_000
    at = np.array([whole.index(passage) for passage in kept])
    assert at[0] == 0 and set(np.diff(at)) == {4}
