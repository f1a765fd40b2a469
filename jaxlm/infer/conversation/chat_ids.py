"""Messages of a conversation as token ids, formatted by the model's chat template.

Only the template produces special tokens. During rendering, a Unicode noncharacter
follows every character of a message with which a special token could start. So wherever
the template moves a message's text, it stays text. A template that removes this
character, or makes the first character of a token itself, is found out: the same
conversation, of harmless words, must give the same special tokens.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import jinja2
import markupsafe
import numpy as np
from jaxtyping import Int32

from jaxlm.files.limited_process import run_limited
from jaxlm.infer.conversation import chat_template
from jaxlm.infer.conversation.chat_template import (
    MAX_CPU_SECONDS,
    MAX_OUTPUT_BYTES,
    MAX_TEMPLATE_BYTES,
)
from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.base import Tokenizer

# Unicode's noncharacters, which no text contains.
_NONCHARACTERS = [*map(chr, range(0xFDD0, 0xFDF0)), "\ufffe", "\uffff"]
# Marks of an assistant's reasoning: templates cut what is between out of the history.
_THOUGHTS = ("<think>", "</think>")
_WORD = re.compile(r"\w+")
_WORD_WITH_HYPHENS = re.compile(r"\w[\w-]*")


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> Int32[np.ndarray, "n"]:
    """Formats a conversation with the tokenizer's chat template, as token ids.

    Nothing in the messages becomes a special token. If they contain the text of none,
    the ids equal those of `apply_chat_template` in transformers. The template decides
    whether a bos token comes first.

    Args:
      tokenizer: with a chat template.
      messages: each with a `role` (system, user, assistant, ...) and a `content`.
      add_generation_prompt: append the start of the assistant's next answer.

    Raises:
      ValueError: if there is no template; if it rejects the messages, fails, exceeds a
        limit (size, output, time, memory), or turns text of a message into special
        tokens; or if a message is malformed.
    """
    template = template_of(tokenizer)
    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"message {i} has no role or no content")
        # Templates may write out both, and neither is guarded.
        for what, word in (("role", message["role"]), *(("key", k) for k in message)):
            if not _WORD_WITH_HYPHENS.fullmatch(word):
                raise ValueError(
                    f"message {i} has the {what} {shown_value(word)}: not a word"
                )
    barrier = _unused_character(template, messages)
    both = [messages, _harmless(tokenizer, template, messages)]
    text, harmless = _rendered(tokenizer, both, barrier, add_generation_prompt)
    if _structure(tokenizer, text) != _structure(tokenizer, harmless):
        raise ValueError(
            "the chat template would turn text of a message into special tokens, or "
            "hide some: the message is not sent; write it in other words"
        )
    ids = tokenizer.encode_trusted(text, barrier)
    if not len(ids):
        raise ValueError("the chat template gives no text for these messages")
    return ids


def template_of(tokenizer: Tokenizer) -> str:
    """Returns the chat template; raises ValueError if there is none."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "this model has no chat template, which formats a conversation: take a "
            "model that was trained to chat, or continue a text with `jaxlm sample`"
        )
    return tokenizer.chat_template


def turns_are_text(tokenizer: Tokenizer) -> bool:
    """Whether no special token ends a user's message, as in Llama 2's template.

    Whoever writes a message can then imitate its end.

    Raises:
      ValueError: as `chat_ids`.
    """
    word = "zquestionz"
    messages = [{"role": "user", "content": word}]
    barrier = _unused_character(template_of(tokenizer), messages)
    (text,) = _rendered(tokenizer, [messages], barrier, True)
    after = tokenizer.split_special(text.partition(word)[2])
    # Text up to the first special token, which ends the message if there is one.
    texts = list(itertools.takewhile(lambda part: isinstance(part, str), after))
    return len(texts) == len(after) or bool("".join(map(str, texts)).strip())


def _structure(tokenizer: Tokenizer, text: str) -> list[int | None]:
    """Returns the special tokens of a text; None for text beside them."""
    parts = tokenizer.split_special(text)
    return [None if isinstance(part, str) else part for part in parts]


def _rendered(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    barrier: str,
    add_generation_prompt: bool,
) -> list[str]:
    texts = {i: text for text, i in tokenizer.special_ids.items()}
    named = tokenizer.named_ids.items()
    variables = [
        {
            "messages": [_guarded(tokenizer, m, barrier) for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **{f"{name}_token": texts[i] for name, i in named if i in texts},
        }
        for messages in conversations
    ]
    return render(template_of(tokenizer), variables)


def _harmless(
    tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """Replaces the letters of messages, so that no special token can be in them.

    Words of the template stay, as it may depend on them, if no special token has them;
    thoughts stay as in `_guarded`.
    """
    specials = [text.casefold() for text in tokenizer.special_ids]
    together = "\n".join(specials)
    known = {word.casefold() for word in _WORD.findall(template)}
    known = {word for word in known if word not in together}
    # Signs of special tokens that have no letters.
    signs = {c for text in specials if not _WORD.search(text) for c in text.strip()}
    letters = {"".join(sorted(set("".join(_WORD.findall(t))))) for t in specials}
    letter = next((c for c in "xzqjkvw" if c not in letters), "x")
    thoughts = [t for t in _THOUGHTS if not _is_control(tokenizer, t)]
    options = [*map(re.escape, thoughts), _WORD.pattern, *map(re.escape, sorted(signs))]
    pattern = re.compile("|".join(options))

    def calm(role: str) -> Callable[[re.Match[str]], str]:
        kept = thoughts if role == "assistant" else ()
        return lambda match: (
            match[0]
            if match[0] in kept or match[0].casefold() in known
            else _WORD.sub(lambda word: letter * len(word[0]), match[0])
            if _WORD.search(match[0])
            else letter
        )

    return [
        {
            key: text if key == "role" else pattern.sub(calm(m["role"]), text)
            for key, text in m.items()
        }
        for m in messages
    ]


def _unused_character(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    texts = [template, *(text for m in messages for text in m.values())]
    for character in _NONCHARACTERS:
        if not any(character in text for text in texts):
            return character
    raise ValueError(
        f"the messages use all of Unicode's {len(_NONCHARACTERS)} first noncharacters: "
        "one has to be free"
    )


def _guarded(
    tokenizer: Tokenizer, message: Mapping[str, str], barrier: str
) -> dict[str, str]:
    """Puts the barrier after each character with which a special token could start."""
    firsts = {text.lstrip()[0] for text in tokenizer.special_ids if text.strip()}
    if not firsts:
        return dict(message)
    pattern = f"[{re.escape(''.join(sorted(firsts)))}]"
    if message["role"] == "assistant":
        kept = [t for t in _THOUGHTS if not _is_control(tokenizer, t)]
        pattern = "|".join([*(f"(?:{re.escape(t)})" for t in kept), f"({pattern})"])
    else:
        pattern = f"({pattern})"
    guard = re.compile(pattern)
    return {
        key: text
        if key == "role"
        else guard.sub(lambda m: m[0] + (barrier if m[1] else ""), text)
        for key, text in message.items()
    }


def _is_control(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is a special token that decoding omits."""
    token_id = tokenizer.special_ids.get(text)
    return token_id is not None and not tokenizer.token_bytes[token_id]


def render(template: str, variables: Sequence[Mapping[str, object]]) -> list[str]:
    """Renders a template with each of several variables, in a child process.

    Raises:
      ValueError: when the template fails or exceeds a limit of `chat_template`.
    """
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(
            f"the chat template has {size:,} bytes: at most {MAX_TEMPLATE_BYTES:,} are "
            "run"
        )
    answer = run_limited(
        chat_template.__file__,
        [jinja2, markupsafe],
        {"template": template, "variables": variables},
        "the chat template",
        cpu_seconds=MAX_CPU_SECONDS,
        most=8 * len(variables) * MAX_OUTPUT_BYTES,
    )
    return answer["texts"]
