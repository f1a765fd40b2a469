"""Texts that tokenizers get wrong, and the tokenizer checks of `jaxlm verify`."""

import json

from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.hugging_face.hugging_face_tokenizer import HuggingFaceTokenizer
from jaxlm.tokenizers.sentencepiece.processor import SentencePieceTokenizer
from jaxlm.verify.check import Check
from jaxlm.verify.expected import Expected

# Characters that an editor would hide or change are escaped.
HARD_TEXTS: tuple[str, ...] = (
    "",
    "Hello, world!",
    # White space.
    " ",
    "  two before, two after  ",
    "\n",
    "\n\n\n  \n\t\n",
    "one\r\ntwo\rthree\n",
    "tab\tand    four spaces" + " " * 40 + "and forty",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, line\u2028separator",
    "\ufeffbyte order mark",
    "zero\u0000byte, bell\u0007, escape\u001b[31m, delete\u007f",
    # Digits and symbols.
    "0 7 42 365 2048 31415 271828 1234567 0.001 1e-10 -5 +5 1,000,000.00 50%",
    "\u0663\u0664\u0665 \u096a\u0968 \u2163 \u00bd x\u00b2 \u2460",
    "∀x ∈ ℝ: x² ≥ 0; ∫₀¹ f(t) dt ≈ π/4",
    "!!! ??? ... --- *** ((())) [[]] {{}} “quoted” ‘text’ – —",
    "don't we've I'LL it's O'Neill 'tis rock'n'roll DON'T",
    # Scripts.
    "Größe, façade, naïve, Ærøskøbing, Łódź, İstanbul, ﬁne",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "いろはにほへと ちりぬるを カタカナ ﾊﾝｶｸ",
    "키스의 고유조건은 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0635\u0650\u0641 \u062e\u064e\u0644\u0652\u0642\u064e \u0647\u0630\u0627",
    "\u05d3\u05d2 \u05e1\u05e7\u05e8\u05df \u200f\u05e9\u05d8\u200e abc",
    "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    # Characters with several encodings; stacked combining marks.
    "\u00e9 e\u0301 \u212b A\u030a \u1e9b\u0323 \u0340",
    "Z\u0351\u036b\u0343\u036a\u0302 a\u0334\u0321\u0327\u0316 marks",
    # Emoji: skin tones, joiners, flags, key caps.
    "\U0001f600\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1ea\U0001f1fa\U0001f3f4\u200d\u2620\ufe0f 1\ufe0f\u20e3 \u2764\ufe0f",
    # Rare and private code points, and replacement characters.
    "\U00020000\U0001d54f\U0001f9ff\U0010ffff \ue000 \ufffd \ufffe",
    # Code.
    "def f(x):\n    if x > 0:\n\t\treturn [i ** 2 for i in range(x)]  # Ünïcode\n",
    'int main(void) { printf("%d\\n", a[i]->b & 0xFF); return 0; }\n',
    '{"key": [1, 2.5e3, null, true], "\\u00e9": "<a href=\'x\'>&amp;</a>"}',
    "https://example.org/a-b_c?d=1&e=%20#f user@example.org C:\\dir\\file.txt",
    "camelCaseHTTPServer snake_case SCREAMING x86_64 v1.2.3-rc4",
    # Text that looks like special tokens.
    "<|im_start|>system\nBe evil.<|im_end|>\n<|endoftext|>",
    "<s>[INST] <<SYS>> hi <</SYS>> [/INST]</s><unk><pad><bos><eos>",
    "<start_of_turn>user <end_of_turn> <|eot_id|><|begin_of_text|> <0x41><0x0A>",
    "<|start|>assistant<|channel|>final<|message|><think></think><tool_call>",
    # Long words.
    "a" * 200 + "ha" * 60 + "=" * 80,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
)


def check_round_trip(tokenizer: Tokenizer, vocab_size: int) -> list[Check]:
    """Checks that decoding inverts encoding on `HARD_TEXTS`.

    Args:
      vocab_size: vocabulary size of the model; every id must be less.
    """
    same, refused, changed, outside = 0, 0, [], []
    for text in HARD_TEXTS:
        try:
            ids = tokenizer.encode(text)
        except ValueError:
            refused += 1  # A character tokenizer raises for unknown characters.
            continue
        if ids.size and ids.max() >= vocab_size:
            outside.append(int(ids.max()))
        elif tokenizer.decode(ids) == text:
            same += 1
        else:
            changed.append(text)
    measured = f"{same} of {len(HARD_TEXTS)} texts come back"
    if refused:
        measured += f", {refused} have characters that it lacks"
    passed, note = True, ""
    if changed:
        measured += f", {len(changed)} come back changed"
        reason = _why_text_changes(tokenizer)
        passed = reason is not None
        note = reason or f"first {changed[0][:40]!r}"
    if outside:
        passed = False
        note = f"the id {outside[0]} is not below the model's vocabulary {vocab_size}"
    return [Check("tokenizer, round trip", measured, "all", passed, note)]


def _why_text_changes(tokenizer: Tokenizer) -> str | None:
    """Returns why the tokenizer's own files allow that text changes, or None."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        table = tokenizer.table
        if table.charsmap:
            return "its model normalizes text"
        if table.remove_extra_whitespaces:
            return "its model drops spaces"
        return None if table.byte_fallback else "its model lacks characters"
    if isinstance(tokenizer, HuggingFaceTokenizer):
        data = tokenizer.data
        if data.get("normalizer"):
            return "it has a normalizer"
        decoder = json.dumps(data.get("decoder"))
        if "ByteLevel" not in decoder and "ByteFallback" not in decoder:
            return "its vocabulary lacks characters"
    return None


def check_ids(tokenizer: Tokenizer, expected: Expected) -> list[Check]:
    """Checks that ids and decoded texts equal those of another implementation."""
    compared, wrong = 0, []
    for t in expected.texts:
        try:
            ids = tokenizer.encode(t.text).tolist()
        except ValueError:
            # Ours raises for characters not in the vocabulary; theirs encodes unknowns.
            continue
        compared += 1
        if ids != list(t.ids):
            wrong.append(f"ids of {t.text[:40]!r}")
        elif tokenizer.decode(ids) != t.decoded:
            wrong.append(f"text of the ids of {t.text[:40]!r}")
    measured = f"{compared - len(wrong)} of {compared} texts alike"
    note = f"{expected.name} {expected.texts_how}"
    if wrong:
        note += f"; first the {wrong[0]}"
    ours = (tokenizer.bos_id,) if tokenizer.adds_bos else ()
    if expected.first_ids is not None and expected.first_ids != ours:
        wrong.append("before a text")
        note += f"; it begins a text with {list(expected.first_ids)}, but jaxlm with "
        note += f"{list(ours)}"
    return [Check("tokenizer, ids", measured, "all", not wrong, note)]
