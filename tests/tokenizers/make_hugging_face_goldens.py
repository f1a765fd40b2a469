"""Writes hugging_face_goldens.json: small tokenizers and their ids in transformers.

    python tests/tokenizers/make_hugging_face_goldens.py

Needs transformers (the stored file is from 5.23.0 with tokenizers 0.23.3), not jaxlm.
The four tokenizers are trained on a part of the bundled text, each like one family:

- byte_level: byte-level BPE, ChatML, thoughts that the template removes (Qwen3)
- llama: BPE with byte fallback, a space before each part of the text (Llama 2)
- phi: the same, with Metaspace before the first word only; special tokens absorb the
  white space after them (Phi-3)
- unigram: Unigram after NFKC, Metaspace, added tokens around turns (Gemma)
"""

import json
import tempfile
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

HERE = Path(__file__).parent
TEXT = HERE.parents[1] / "jaxlm" / "data" / "bundled" / "shakespeare.txt"
TEXTS = [
    "",
    " ",
    "\n",
    "Hello world",
    "a  2",
    "  two  spaces \n\n and lines \n",
    "\t\ttabs\tand\r\nCRLF\r",
    "a\0b",
    "héllo 漢字 🙂 👩‍👩‍👧 e\u0301 São Paulo — “quotes”",
    "\ufeffmark, \u2028 separator, \u00a0\u3000 spaces",
    "1234567890 3.14159e-10 ½ ² ٣",
    "it's It'S we'LL",
    "def f(x):\n    return x**2 if x>10 else -x  # ok",
    "x" * 200,
    "    four        eight",
    "First Citizen:\nBefore we proceed any further, hear me speak.",
]
MESSAGES = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is 2 < 3?\n"},
    ],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo 🙂"},
        {"role": "user", "content": "a <b> [INST] c\n\n漢字"},
        {"role": "assistant", "content": "Done. "},
        {"role": "user", "content": "\tThanks & bye"},
    ],
]
CHATML_THOUGHTS = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > 90 %}{%- set content = thoughts %}{%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
LLAMA2 = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{% elif message['role'] == 'system' %}
{{ '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}
{% else %}
{{ raise_exception('unknown role ' + message['role']) }}
{% endif %}
{% endfor %}"""
PHI3 = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] \
+ '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
GEMMA = """\
{{ bos_token }}{%- set ns = namespace(first='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.first = message.content + '\\n\\n' -%}
{%- continue -%}{%- endif -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' \
+ ns.first + (message.content | trim) + '<end_of_turn>\\n' }}
{%- set ns.first = '' -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""


def special(text, **options):
    return AddedToken(text, special=True, normalized=False, **options)


def added(text, **options):
    return AddedToken(text, special=False, normalized=False, **options)


def byte_level(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([added("<think>"), added("</think>"), added("    ")])
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML_THOUGHTS,
    }
    return tokenizer, config


def with_bytes(text, num_merges):
    """A BPE over words that begin with a space, its pieces after the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=num_merges + 60, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    names += model["vocab"]
    return models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(m) for m in model["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )


LLAMA_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def llama(text):
    tokenizer = Tokenizer(with_bytes(text, 150))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = LLAMA_DECODER
    tokenizer.add_special_tokens([special("<unk>"), special("<s>"), special("</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": {"content": "<s>", "__type": "AddedToken"}}
    config = {**names, "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer, {**config, "chat_template": LLAMA2}


def phi(text):
    tokenizer = Tokenizer(with_bytes(text, 150))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first", split=False
    )
    tokenizer.decoder = LLAMA_DECODER
    tokenizer.add_special_tokens([special("<unk>"), special("<s>"), special("</s>")])
    turns = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens([special(t, rstrip=True) for t in turns])
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    return tokenizer, {**config, "chat_template": PHI3}


def unigram(text):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    tokenizer.add_tokens([added("<start_of_turn>"), special("<end_of_turn>")])
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return tokenizer, {**config, "unk_token": "<unk>", "chat_template": GEMMA}


def record(make):
    text = TEXT.read_text(encoding="utf-8")[:60_000]
    tokenizer, config = make(text)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        reference = AutoTokenizer.from_pretrained(folder)
        contents = json.loads((Path(folder) / "tokenizer.json").read_text())
    rows = []
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        decoded = reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        rows.append([text, ids, decoded])
    chats = [
        [
            messages,
            prompt,
            reference.apply_chat_template(
                messages, add_generation_prompt=prompt, return_dict=False
            ),
        ]
        for messages in MESSAGES
        for prompt in (True, False)
    ]
    with_bos = reference.encode("a") != reference.encode("a", add_special_tokens=False)
    return {
        "tokenizer": contents,
        "config": config,
        "adds_bos": with_bos,
        "texts": rows,
        "chats": chats,
    }


if __name__ == "__main__":
    goldens = {f.__name__: record(f) for f in (byte_level, llama, phi, unigram)}
    path = HERE / "hugging_face_goldens.json"
    path.write_text(json.dumps(goldens, ensure_ascii=False, separators=(",", ":")))
    print(path.stat().st_size, "bytes")
