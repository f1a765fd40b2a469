"""Messages of a conversation as token ids, formatted by the model's chat template.

Only the template produces special tokens. During rendering, a Unicode noncharacter
follows every character of a message with which a special token could start. So wherever
the template moves a message's text, it stays text.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe
import numpy as np
from jaxtyping import Int32

from jaxlm.infer import chat_template
from jaxlm.infer.chat_template import (
    MAX_CPU_SECONDS,
    MAX_OUTPUT_BYTES,
    MAX_TEMPLATE_BYTES,
)
from jaxlm.tokenizers.base import Tokenizer

# Wall-clock limit. It also stops a template that sleeps, and leaves a busy machine time
# to start the process.
MAX_SECONDS = 20
# Unicode's noncharacters, which no text contains.
_NONCHARACTERS = [*map(chr, range(0xFDD0, 0xFDF0)), "\ufffe", "\uffff"]
# Marks of an assistant's reasoning: templates cut what is between out of the history.
_THOUGHTS = ("<think>", "</think>")
_ROLE = re.compile(r"\w[\w-]*")


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
      ValueError: if there is no template; if it rejects the messages, fails, or exceeds
        a limit (size, output, time, memory); or if a message is malformed.
    """
    template = template_of(tokenizer)
    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"message {i} has no role or no content")
        if not _ROLE.fullmatch(message["role"]):
            raise ValueError(
                f"message {i} has the role {message['role']!r}: not a word"
            )
    barrier = _unused_character(template, messages)
    texts = {i: text for text, i in tokenizer.special_ids.items()}
    named = tokenizer.named_ids.items()
    variables = {
        "messages": [_guarded(tokenizer, m, barrier) for m in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **{f"{name}_token": texts[i] for name, i in named if i in texts},
    }
    ids = tokenizer.encode_trusted(render(template, variables), barrier)
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


def render(template: str, variables: Mapping[str, object]) -> str:
    """Renders a template in a child process, within limits.

    Raises:
      ValueError: when the template fails or exceeds a limit.
    """
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(
            f"the chat template has {size:,} bytes: at most {MAX_TEMPLATE_BYTES:,} are "
            "run"
        )
    # Isolated mode (-I) ignores PYTHONPATH and the user's packages, so the child gets
    # the folders of Jinja as arguments.
    folders = {m.__path__[0].rpartition("/")[0] for m in (jinja2, markupsafe)}
    command = [sys.executable, "-I", chat_template.__file__, *sorted(folders)]
    job = json.dumps({"template": template, "variables": variables}).encode()
    try:
        child = subprocess.run(
            command, input=job, capture_output=True, timeout=MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the chat template did not finish within {MAX_SECONDS} s"
        ) from None
    return _result(child)


def _result(child: subprocess.CompletedProcess) -> str:
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError(
            f"the chat template ran for more than {MAX_CPU_SECONDS} s and was stopped"
        )
    try:
        answer = json.loads(child.stdout[: 8 * MAX_OUTPUT_BYTES])
    except ValueError:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"the process that renders the chat template ended with status "
            f"{child.returncode}: {lines[-1] if lines else 'no message'}"
        ) from None
    if "error" in answer:
        raise ValueError(f"the chat template {answer['error']}")
    return answer["text"]
