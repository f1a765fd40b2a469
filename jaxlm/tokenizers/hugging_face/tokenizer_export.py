"""Writes tokenizers as files that `transformers` loads."""

import base64
import json
from pathlib import Path
from typing import Any

from jaxlm.files.durable import replacing
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.decoder import byte_of_character
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.pre_tokenizers import (
    BYTES,
    byte_level_json,
    split_step,
)
from jaxlm.tokenizers.hugging_face.tokenizer_json import (
    added_token,
    bos_template,
    bpe_model,
    new_json,
)
from jaxlm.tokenizers.sentencepiece.model_proto import (
    BPE,
    BYTE,
    CONTROL,
    SPACE_SIGN,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelTable,
)
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer


def write_hugging_face(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    `transformers.AutoTokenizer` then gives the ids of `encode`, with these exceptions:
    it matches special tokens in text, with a SentencePiece model it takes a typed
    U+2581 for a space, and with a Unigram one `<0x41>` for a byte. The tokenizer.json
    of a Hugging Face tokenizer is written unchanged; a SentencePiece model is also
    written as tokenizer.model. Next to a config.json of `model_type` "qwen2",
    AutoTokenizer splits text in Qwen2's way whatever these files say;
    `PreTrainedTokenizerFast.from_pretrained` does not.

    Args:
      folder: must exist; files of these names are replaced.

    Raises:
      ValueError: for a SentencePiece model whose algorithm or unused pieces a
        tokenizer.json cannot express.
    """
    folder = Path(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        contents = tokenizer.tokenizer_json
        names = dict(tokenizer.tokens)
    else:
        if isinstance(tokenizer, ByteTokenizer):
            data = _of_bytes(tokenizer)
        elif isinstance(tokenizer, CharTokenizer):
            data = _of_characters(tokenizer)
        elif isinstance(tokenizer, SentencePieceTokenizer):
            data = _of_sentence_piece(tokenizer)
            _write(folder / "tokenizer.model", tokenizer.model)
        else:
            raise ValueError(f"{type(tokenizer).__name__} has no Hugging Face form")
        contents = json.dumps(data, ensure_ascii=False, indent=1).encode()
        names = {entry["id"]: entry["content"] for entry in data["added_tokens"]}
    _write(folder / "tokenizer.json", contents)
    ids = tokenizer.named_ids
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": names[i] for name, i in ids.items()},
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    stops = list(tokenizer.stop_ids)
    generation: dict[str, Any] = {f"{name}_token_id": i for name, i in ids.items()}
    if stops:
        generation["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write(path, (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())


def _write(path: Path, contents: bytes) -> None:
    with replacing(path) as file:  # not the target of a link
        file.write(contents)


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Makes a byte-level BPE that merges nothing."""
    end = "<|endoftext|>"
    vocab = byte_of_character() | {end: tokenizer.eos_id}
    added = [added_token(tokenizer.eos_id, end, special=True)]
    return byte_level_json(vocab, [], BYTES, added)


def _of_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Makes a model in which each character is a word."""
    model = {
        "type": "WordLevel",
        "vocab": {c: i for i, c in enumerate(tokenizer.characters)},
        # It is not in the vocabulary, so an unknown character is an error.
        "unk_token": "<unk>",
    }
    each = split_step(r"[\s\S]")
    return new_json(model, {"type": "Fuse"}, pre_tokenizer=each)


def _of_sentence_piece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    table = tokenizer.table
    if table.algorithm not in (BPE, UNIGRAM) or UNUSED in table.types:
        raise ValueError(
            "a tokenizer.json cannot express this SentencePiece model: it is neither "
            "BPE nor Unigram, or has unused pieces"
        )
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    return new_json(
        _bpe(table) if table.algorithm == BPE else _unigram(table),
        _decoder(table),
        added_tokens=[
            added_token(i, text, special=kind != USER_DEFINED)
            for i, text, kind in table.special_pieces()
        ],
        normalizer=_normalizer(table),
        post_processor=None if bos is None else bos_template(table.pieces[bos], bos),
    )


def _normalizer(table: ModelTable) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if table.charsmap:
        charsmap = base64.b64encode(table.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if table.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        steps.append(spaces)
    if table.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE_SIGN})
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SIGN}
    return {"type": "Sequence", "normalizers": [*steps, space]}


def _decoder(table: ModelTable) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_SIGN}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if table.add_dummy_prefix or table.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(table: ModelTable) -> dict[str, Any]:
    """Makes a BPE; SentencePiece merges the pair whose piece has the best score."""
    vocab = {piece: i for i, piece in enumerate(table.pieces)}
    everything = zip(table.pieces, table.types, strict=True)
    parts = {p for p, kind in everything if kind not in (CONTROL, UNKNOWN, BYTE)}
    by_score = sorted(parts, key=lambda p: (-table.scores[vocab[p]], vocab[p]))
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in by_score
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
    unknown = table.pieces[table.types.index(UNKNOWN)]
    return bpe_model(
        vocab,
        merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=table.byte_fallback,
    )


def _unigram(table: ModelTable) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": table.types.index(UNKNOWN),
        "byte_fallback": table.byte_fallback,
        "vocab": [list(p) for p in zip(table.pieces, table.scores, strict=True)],
    }
