"""Rows of tokens tile the text, in bytes and in characters."""

import pytest
from hugging_face_case import golden_tokenizer

from jaxlm.interp.token_table import token_table
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer


def test_offsets_are_those_of_the_decoded_text():
    tokenizer = ByteTokenizer()
    text = "aé€ 😀!"
    ids = tokenizer.encode(text)
    rows = token_table(tokenizer, ids)
    assert [row.id for row in rows] == ids.tolist()
    assert b"".join(row.data for row in rows) == text.encode()
    spelled = "".join(str(i) * len(c.encode()) for i, c in enumerate(text))
    assert "".join(str(row.first_character) for row in rows) == spelled
    assert all(row.last_character == row.first_character + 1 for row in rows)
    # The first two bytes of three are no character: `decode` shows one U+FFFD.
    torn = token_table(tokenizer, ids[3:5])
    assert [(row.first_character, row.last_character) for row in torn] == [(0, 1)] * 2
    assert tokenizer.decode(ids[3:5]) == "\ufffd"


def test_a_space_that_decoding_drops_has_no_bytes(tmp_path):
    tokenizer = golden_tokenizer("llama", tmp_path)
    ids = [tokenizer.bos_id, *tokenizer.encode("to be").tolist()]
    rows = token_table(tokenizer, ids)
    text = tokenizer.decode(ids)
    assert b"".join(row.data for row in rows).decode() == text
    assert (rows[0].special, rows[1].special) == ("<s>", None)
    assert rows[-1].end == len(text.encode()) and rows[-1].last_character == len(text)
    for row in rows:
        part = text[row.first_character : row.last_character]
        assert part == row.data.decode()


def test_an_id_of_no_token():
    with pytest.raises(ValueError, match="token id 999"):
        token_table(ByteTokenizer(), [999])
