"""Messages of a conversation as token ids, formatted by the model's chat template.

Only the template produces special tokens. During rendering, a Unicode noncharacter
follows every character of a message with which a special token could start. So wherever
the template moves a message's text, it stays text. A template that removes this
character, or makes the first character of a token itself, is found out: the same
conversation, of harmless words, must give the same special tokens.
"""

import atexit
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from jaxtyping import Int32

from jaxlm.files.limited_process import LimitedProgram
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
# What conversations with tools are made of; templates look for it.
_FORM = {
    *("type", "function", "id", "name", "description", "parameters", "arguments"),
    *("object", "properties", "required", "array", "items", "enum", "null"),
    *("string", "number", "integer", "boolean"),
}
_TOOLS = "tools and calls"
# Two texts of a conversation at most.
_PROGRAM = LimitedProgram(
    chat_template.__file__,
    [jinja2, markupsafe],
    "the chat template",
    cpu_seconds=MAX_CPU_SECONDS,
    most=2 * 8 * MAX_OUTPUT_BYTES,
)
atexit.register(_PROGRAM.close)
_WORD = re.compile(r"\w+")
_WORD_WITH_HYPHENS = re.compile(r"\w[\w-]*")


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> Int32[np.ndarray, "n"]:
    """Formats a conversation with the tokenizer's chat template, as token ids.

    Nothing in the messages and tools becomes a special token. If they contain the text
    of none, the ids equal those of `apply_chat_template` in transformers. The template
    decides whether a bos token comes first.

    Args:
      tokenizer: with a chat template.
      messages: each with a `role` (system, user, assistant, ...) and a `content`; those
        of the assistant may have `tool_calls`, in the form of OpenAI's API, but for
        their `arguments`, which are an object.
      tools: what the model may call, in that form too.
      add_generation_prompt: append the start of the assistant's next answer.

    Raises:
      ValueError: if there is no template; if it rejects the messages, fails, exceeds a
        limit (size, output, time, memory), does not write out the tools and calls, or
        turns text of a message into special tokens; or if a message is malformed.
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
    texts = {"messages": list(messages), "tools": list(tools) or None}
    barrier = _unused_character(template, texts)
    calm, names = _harmless(tokenizer, template, texts)
    both = [_guarded(tokenizer, t, barrier) for t in (texts, calm)]
    text, harmless = _rendered(tokenizer, both, add_generation_prompt)
    if not all(name in harmless for name in names):
        raise ValueError(
            "the chat template of this model does not write out tools or their calls: "
            "leave them out"
        )
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
    (text,) = _rendered(tokenizer, [{"messages": messages, "tools": None}], True)
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
    conversations: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
) -> list[str]:
    texts = {i: text for text, i in tokenizer.special_ids.items()}
    named = tokenizer.named_ids.items()
    variables = [
        {
            **conversation,
            "add_generation_prompt": add_generation_prompt,
            "documents": None,
            **{f"{name}_token": texts[i] for name, i in named if i in texts},
        }
        for conversation in conversations
    ]
    return render(template_of(tokenizer), variables)


def _harmless(
    tokenizer: Tokenizer, template: str, conversation: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Replaces the letters of a conversation, so that no special token can be in it.

    Words of the template stay, as it may depend on them, if no special token has them;
    thoughts stay as in `_guarded`. Also returns the new names of tools that are offered
    or called: no other text has them.
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
    names = {
        name: f"{letter}_{i}_{letter}"
        for i, name in enumerate(_tool_names(conversation))
    }

    def calm(whose: str) -> Callable[[str], str]:
        kept = thoughts if whose == "assistant" else ()

        def calm_part(match: re.Match[str]) -> str:
            if match[0] in kept or match[0].casefold() in known:
                return match[0]
            if _WORD.search(match[0]):
                return _WORD.sub(lambda word: letter * len(word[0]), match[0])
            return letter

        def calm_text(text: str) -> str:
            if whose == _TOOLS and (text in names or text in _FORM):
                return names.get(text, text)
            return pattern.sub(calm_part, text)

        return calm_text

    return _with_texts(conversation, calm, calm), list(names.values())


def _tool_names(conversation: Mapping[str, Any]) -> list[str]:
    calls = [c for m in conversation["messages"] for c in m.get("tool_calls", ())]
    tools = [*(conversation["tools"] or ()), *calls]
    return list(dict.fromkeys(tool["function"]["name"] for tool in tools))


def _with_texts(
    conversation: Mapping[str, Any],
    change: Callable[[str], Callable[[str], str]],
    change_key: Callable[[str], Callable[[str], str]],
) -> dict[str, Any]:
    """Changes all texts of a conversation but roles.

    Both functions are called with whose text it is: a role, or `_TOOLS`.
    """

    def changed(whose: str, value: Any) -> Any:
        if isinstance(value, str):
            return change(whose)(value)
        if isinstance(value, list):
            return [changed(whose, one) for one in value]
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for key, one in value.items():
            new = change_key(whose)(key)
            while new in found:
                new += new[-1:] or "x"
            found[new] = changed(whose, one)
        return found

    def changed_message(message: Mapping[str, Any]) -> dict[str, Any]:
        def whose(name: str) -> str:
            return _TOOLS if name == "tool_calls" else message["role"]

        return {
            k: t if k == "role" else changed(whose(k), t) for k, t in message.items()
        }

    messages = [changed_message(message) for message in conversation["messages"]]
    return {"messages": messages, "tools": changed(_TOOLS, conversation["tools"])}


def _unused_character(template: str, conversation: Mapping[str, Any]) -> str:
    texts = json.dumps(conversation, ensure_ascii=False)
    for character in _NONCHARACTERS:
        if character not in template and character not in texts:
            return character
    raise ValueError(
        f"the messages use all of Unicode's {len(_NONCHARACTERS)} first noncharacters: "
        "one has to be free"
    )


def _guarded(
    tokenizer: Tokenizer, conversation: Mapping[str, Any], barrier: str
) -> dict[str, Any]:
    """Puts the barrier after each character with which a special token could start.

    Keys that are words stay: templates know some of them.
    """
    firsts = {text.lstrip()[0] for text in tokenizer.special_ids if text.strip()}
    if not firsts:
        return dict(conversation)
    first = f"([{re.escape(''.join(sorted(firsts)))}])"
    thoughts = [t for t in _THOUGHTS if not _is_control(tokenizer, t)]
    # Of the assistant's words, thoughts are left to the template.
    but_thoughts = "|".join([*(f"(?:{re.escape(t)})" for t in thoughts), first])

    def guard(whose: str) -> Callable[[str], str]:
        pattern = but_thoughts if whose == "assistant" else first
        return lambda text: re.sub(
            pattern, lambda m: m[0] + (barrier if m[1] else ""), text
        )

    def guard_key(role: str) -> Callable[[str], str]:
        return lambda key: (
            key if _WORD_WITH_HYPHENS.fullmatch(key) else guard(role)(key)
        )

    return _with_texts(conversation, guard, guard_key)


def _is_control(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is a special token that decoding omits."""
    token_id = tokenizer.special_ids.get(text)
    return token_id is not None and not tokenizer.token_bytes[token_id]


def render(template: str, variables: Sequence[Mapping[str, object]]) -> list[str]:
    """Renders a template with each of several variables, in another process.

    Raises:
      ValueError: when the template fails or exceeds a limit of `chat_template`.
    """
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(
            f"the chat template has {size:,} bytes: at most {MAX_TEMPLATE_BYTES:,} are "
            "run"
        )
    return _PROGRAM.run({"template": template, "variables": variables})["texts"]
