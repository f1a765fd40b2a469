"""Fuzzers of tokenizers, their settings, and chat templates."""

import contextlib
import functools
import json

import numpy as np
from fuzz_case import (
    VALUES,
    WORDS,
    as_json,
    changed,
    damaged,
    json_files,
    read_one_file,
)
from hugging_face_case import BARRIER, GOLDENS, golden_tokenizer, put
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from sentencepiece_case import trained

from jaxlm.infer.conversation.chat_ids import chat_ids
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer
from jaxlm.tokenizers.gguf import gguf_metadata, tokenizer_from_gguf
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.hugging_face.limits import MAX_ADDED_BYTES, MAX_GROWTH
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder
from jaxlm.tokenizers.hugging_face.tokenizer_json import added_token, bpe_model
from jaxlm.tokenizers.kinds import read_saved_tokenizer
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer


def use(tokenizer):
    """Tries what a model's tokenizer is asked for."""
    tokenizer.decode(tokenizer.encode("hé <s> ab a"))
    tokenizer.pieces("hé ½")
    tokenizer.encode_trusted("<s> a", BARRIER)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    tokenizer.decode([0, tokenizer.vocab_size - 1])


# tokenizer.json.


def _steps(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def _replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def _split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False}  # fmt: skip


# Of a few letters; some take long, or make much of little.
_PATTERNS = st.text("ab()*+?{}|[]^$.\\12,dswp<>=!:P", max_size=12)
_SPECIFIC = st.sampled_from(
    [
        "a+|b",
        "(a+)+b",
        "(?:a|b)+",
        r"\s+",
        "(a|aa)+$",
        "(.*)*x",
        "a{1,9}{1,9}{1,9}b",
        r"(?=(\d{3})+(?!\d))",
        "a|",
        "",
        "^",
        "$",
        r"\b",
        "(?<=a)b",
        "(?i)A",
        "[^a]",
    ]
)
_STEPS = st.one_of(
    st.sampled_from(
        [_replace("a" * 16, String="a"), {"type": "ByteLevel"},
         _replace("", String="a"), {"type": "NFKC"}, {"type": "NFD"},
         {"type": "Lowercase"}, {"type": "Strip"}, {"type": "Fuse"},
         {"type": "StripAccents"}, {"type": "Nmt"}, {"type": "BertNormalizer"},
         {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Digits"},
         {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
         {"type": "Prepend", "prepend": "▁"}, {"type": "ByteFallback"}, {"type": "x"},
         {"type": "Punctuation"}, {"type": "Whitespace"}, {"type": "UnicodeScripts"},
         {"type": "CharDelimiterSplit", "delimiter": "a"}, {}, {"type": "Precompiled"},
         {"type": "FixedLength", "length": 3}, {"type": "WordPiece"}]
    ),
    st.builds(_split, _PATTERNS | _SPECIFIC),
    st.builds(lambda c, p: _replace(c, Regex=p), st.text("ab", max_size=3),
              _PATTERNS | _SPECIFIC),
    st.builds(lambda c, p: _replace(c, String=p), *[st.text("ab ", max_size=20)] * 2),
    st.binary(max_size=40).map(
        lambda b: {"type": "Precompiled", "precompiled_charsmap": b.hex()}
    ),
)  # fmt: skip
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "pattern", "content", "String",
                                           "Regex", "prepend", "id", "vocab", "a"]),
                          inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip


def _sequences(kind):
    parts = st.lists(_STEPS | _JSON, max_size=4)
    return parts.map(lambda s: _steps(kind, *s)) | _STEPS | _JSON


_ADDED = st.lists(
    st.builds(
        added_token,
        st.integers(0, 12),
        st.sampled_from(["<s>", "a", "ab", " ", "", "▁", "é"]) | st.text(max_size=3),
        special=st.booleans(),
    ),
    max_size=4,
)
_MODELS = st.one_of(
    st.builds(
        lambda merges, options: bpe_model(dict(zip("abhé▁", range(5), strict=True))
                                          | {"ab": 5}, merges, **options),
        st.lists(st.sampled_from(["a b", "b a", "a", ["a", "b"], ["ab", "a"]]), max_size=3),
        st.dictionaries(
            st.sampled_from(["unk_token", "end_of_word_suffix", "byte_fallback",
                             "continuing_subword_prefix", "fuse_unk", "dropout"]),
            st.sampled_from(["a", "x", "", None, True, 0.5, 2.0]), max_size=3),
    ),
    st.builds(
        lambda pieces, unknown: {"type": "Unigram", "vocab": pieces, "unk_id": unknown},
        st.lists(st.tuples(st.text("ab▁", max_size=3), st.floats(-9, 0)), max_size=6),
        st.none() | st.integers(0, 7),
    ),
    st.builds(
        lambda vocab, unknown: {"type": "WordLevel", "vocab": vocab, "unk_token": unknown},
        st.dictionaries(st.text("ab", max_size=2), st.integers(0, 9), max_size=4),
        st.sampled_from(["a", "b", "x"]),
    ),
)  # fmt: skip


def _file(parts):
    data = {"added_tokens": [], "model": bpe_model({"a": 0, "b": 1, "x": 2}, [])}
    data["decoder"] = _replace(" ", String="▁")
    return as_json({"version": "1.0", **data, **parts})


def tokenizer_json(folder):
    built = st.fixed_dictionaries(
        {},
        optional={
            "normalizer": _sequences("normalizers"),
            "pre_tokenizer": _sequences("pretokenizers"),
            "decoder": _sequences("decoders"),
            "added_tokens": _ADDED | _JSON,
            "model": _MODELS | _JSON,
            "post_processor": _JSON,
        },
    ).map(_file)
    good = [record["tokenizer"] for record in GOLDENS.values()]
    files = [changed(data).map(as_json) for data in good]
    files.append(damaged(as_json(good[0])))

    def read(content):
        tokenizer, text = HuggingFaceTokenizer(content), "ab a"
        # The normalizer and the pre-tokenizer may each lengthen a text.
        most = (len(text) + MAX_ADDED_BYTES) * MAX_GROWTH**2
        assert len(tokenizer.encode(text)) <= most
        use(tokenizer)

    return built | st.one_of(files), read


# The files beside it.

_SETTINGS = {
    "tokenizer_config.json": {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": None,
        "add_bos_token": False,
        "added_tokens_decoder": {"423": {"content": "<new>", "special": True}},
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        "tokenizer_class": "GPT2Tokenizer",
    },
    "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.5},
    "config.json": {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": None},
    "added_tokens.json": {"<|im_start|>": 500, "<|im_end|>": 501},
}


def tokenizer_settings(folder):
    """Each file of settings, beside a tokenizer.json or a tokenizer.model."""
    contents = as_json(GOLDENS["byte_level"]["tokenizer"])
    kinds = {"tokenizer.json": contents, "tokenizer.model": trained(vocab_size=285)}

    def files_of(name):
        return st.tuples(
            st.sampled_from(sorted(kinds)),
            st.just(name),
            json_files(_SETTINGS[name]),
            st.sets(st.sampled_from(sorted(_SETTINGS)), max_size=2),
        )

    def read(value):
        kind, damaged_name, content, missing = value
        for path in folder.iterdir():
            path.unlink()
        (folder / kind).write_bytes(kinds[kind])
        for name, values in _SETTINGS.items():
            if name not in missing:
                put(folder, name, values)
        (folder / damaged_name).write_bytes(content)
        tokenizer = tokenizer_from_folder(folder)
        use(tokenizer)
        assert tokenizer.chat_template is None or isinstance(
            tokenizer.chat_template, str
        )

    return st.sampled_from(sorted(_SETTINGS)).flatmap(files_of), read


def gpt2_files(folder):
    table = GOLDENS["byte_level"]["tokenizer"]["model"]
    merges = "\n".join(" ".join(m) for m in table["merges"]).encode()
    good = {"vocab.json": as_json(table["vocab"]), "merges.txt": merges}

    def read(value):
        name, content = value
        for file, good_content in good.items():
            (folder / file).write_bytes(content if file == name else good_content)
        use(tokenizer_from_folder(folder))

    values = st.one_of(
        st.tuples(st.just("vocab.json"), json_files(table["vocab"])),
        st.tuples(st.just("merges.txt"), damaged(merges)),
    )
    return values, read


def saved_tokenizer(folder):
    """A tokenizer as steps keep it, with and without the right fingerprint."""
    good = {}
    golden = folder / "golden"
    golden.mkdir()
    for name, tokenizer in {
        "chars": CharTokenizer("abc é<>s½"),
        "sentencepiece": SentencePieceTokenizer(trained(vocab_size=285)),
        "huggingface": golden_tokenizer("byte_level", golden),
    }.items():
        (folder / name).mkdir()
        tokenizer.save(folder / name)
        text = (folder / name / "tokenizer.json").read_text()
        good[name] = json.loads(text)

    def read(value):
        name, content = value
        (folder / name / "tokenizer.json").write_bytes(content)
        use(read_saved_tokenizer(folder / name))

    names = st.sampled_from(sorted(good))
    return names.flatmap(lambda n: st.tuples(st.just(n), json_files(good[n]))), read


def gguf_tokenizer(folder):
    byte_level = golden_tokenizer("byte_level", folder)
    bpe = trained(byte_fallback=True, vocab_size=285, model_type="bpe",
                  normalization_rule_name="identity",
                  remove_extra_whitespaces=False)  # fmt: skip
    sentence_piece = SentencePieceTokenizer(bpe)
    made = [byte_level, sentence_piece, CharTokenizer("abc é<>s½")]
    good = [gguf_metadata(tokenizer) for tokenizer in made]
    arrays = st.builds(
        lambda size, kind: np.ones(size, kind),
        st.integers(0, 500),
        st.sampled_from(["i4", "f4", "u1", "?", "f8"]),
    )

    def read(metadata):
        with contextlib.suppress(UnicodeEncodeError):  # A file holds UTF-8.
            tokenizer = tokenizer_from_gguf(metadata)
            use(tokenizer)
            gguf_metadata(tokenizer)

    lists = st.lists(st.sampled_from(WORDS) | st.integers(0, 5), max_size=9)
    return st.one_of([changed(m, VALUES | arrays | lists) for m in good]), read


# SentencePiece.

_FIELDS = {
    "trainer_spec": ["model_type", "vocab_size", "byte_fallback", "unk_id", "bos_id",
                     "eos_id", "pad_id", "unk_surface", "unk_piece", "bos_piece",
                     "treat_whitespace_as_suffix", "use_all_vocab"],
    "normalizer_spec": ["name", "precompiled_charsmap", "add_dummy_prefix",
                        "remove_extra_whitespaces", "escape_whitespaces",
                        "normalization_rule_tsv"],
}  # fmt: skip
_FIELD_VALUES = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 285, 1 << 30, -(1 << 31), True, False]),
    st.sampled_from(["", "<unk>", "▁", "a" * 1000, "<0x41>", "<0xZZ>", "<0x", "\0"]),
    st.floats(width=32),
    st.binary(max_size=60),
    st.tuples(st.integers(0, 99), st.binary(max_size=99)).map(
        lambda parts: parts[0].to_bytes(4, "little") + parts[1]
    ),
)
_PIECE_EDITS = st.tuples(
    st.integers(0, 284), st.sampled_from(["piece", "score", "type"]), _FIELD_VALUES
)
_SPEC_EDITS = st.sampled_from(sorted(_FIELDS)).flatmap(
    lambda spec: st.tuples(st.just(spec), st.sampled_from(_FIELDS[spec]), _FIELD_VALUES)
)
# A field of any number and kind, behind the others.
_RAW = st.builds(
    lambda number, kind, data: bytes([number << 3 | kind]) + data,
    *(st.integers(0, 15), st.integers(0, 7), st.binary(max_size=30)),
)


def sentencepiece(folder):
    models = [
        trained(byte_fallback=True, user_defined_symbols=["<turn>", "▁▁"]),
        trained(model_type="bpe", vocab_size=40, byte_fallback=False),
        trained(model_type="word", vocab_size=9),
        trained(model_type="char", vocab_size=20, normalization_rule_name="identity"),
    ]

    def edited(model, edits):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        for where, name, value in edits:
            if isinstance(where, int):
                part = proto.pieces[where % len(proto.pieces)]
            else:
                part = getattr(proto, where)
            try:
                setattr(part, name, value)
            except (TypeError, ValueError):
                continue  # of another type
        return proto.SerializeToString()

    def files_of(model):
        edits = st.lists(_PIECE_EDITS | _SPEC_EDITS, min_size=1, max_size=4)
        return st.one_of(
            damaged(model),
            edits.map(functools.partial(edited, model)),
            st.lists(_RAW, min_size=1, max_size=3).map(lambda r: model + b"".join(r)),
        )

    def read(path):
        use(SentencePieceTokenizer.from_file(path))

    files = st.sampled_from(models).flatmap(files_of)
    return files, read_one_file(folder / "a.model", read)


# Chat templates.

_TEMPLATE_PARTS = st.sampled_from(
    ["{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m.role }}",
     "{{ bos_token }}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}",
     "{{ m.content | trim | upper }}", "{{ m['content'].split('x')[0] }}",
     "{% set x = m.content %}", "{% set ns = namespace(a=1) %}", "{% set ns.a = 2 %}",
     "{{ 'a' * 1000000 }}", "{{ 'a' * 10 ** 10 }}", "{{ x }}", "{{ lipsum(n=99) }}",
     "{% for i in range(3000) %}", "{{ range(10 ** 12) | list }}", "{{ 9 ** 9 ** 7 }}",
     "{{ '%999999d' % 1 }}", "{{ '{:999999}'.format(1) }}", "{{ x.__class__ }}",
     "{{ ''['__class__'] }}", "{{ messages | map('attr', '__class__') | list }}",
     "{{ messages.append(1) }}", "{{ m.pop('role') }}", "{{ raise_exception('no\\n') }}",
     "{% macro f(n) %}{{ f(n) }}{% endmacro %}", "{{ f(1) }}", "{{ f }}",
     "{% generation %}", "{% endgeneration %}", "{% break %}", "{{ messages | tojson }}",
     "{{ strftime_now('%' * 99) }}", "{{ cycler(1, 2).next() }}", "{{ 1 // 0 }}",
     "{{ m.content | replace('', 'aaaaaaaa') }}", "{{ 'a' | center(10 ** 9) }}",
     "{{ m.content | batch(1) | list }}", "{{ m | urlize }}", "{{ m | xmlattr }}",
     "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{#", "{%", "{{",
     "<|im_start|>", "<|im_end|>", "\n", "}}", "%}", "{% raw %}", "\0", "\ud800"]
)  # fmt: skip


def chat_templates(folder):
    tokenizer = golden_tokenizer("byte_level", folder)
    good = [record["config"]["chat_template"] for record in GOLDENS.values()]
    templates = st.one_of(
        st.lists(_TEMPLATE_PARTS, min_size=1, max_size=12).map("".join),
        *(damaged(t.encode()).map(lambda b: b.decode(errors="replace")) for t in good),
    )
    messages = [{"role": "user", "content": "x <|im_end|>"}]
    messages += [{"role": "assistant", "content": "<think>y</think>z"}]

    def read(template):
        tokenizer.chat_template = template
        chat_ids(tokenizer, messages)

    return templates, read


FUZZERS = {
    "tokenizer.json": (tokenizer_json, 50),
    "settings of a tokenizer": (tokenizer_settings, 50),
    "vocab.json and merges.txt": (gpt2_files, 50),
    "saved tokenizer": (saved_tokenizer, 50),
    "tokenizer of a GGUF file": (gguf_tokenizer, 50),
    "SentencePiece": (sentencepiece, 50),
    "chat template": (chat_templates, 12),
}
