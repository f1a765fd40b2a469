"""Conversations: a chat template lays out the messages, the model answers.

Special tokens are the template's alone. A character that Unicode keeps free for such
use stands behind the first character of each special token's text while the template
works on the messages: wherever the template moves their text, it stays text.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Protocol, runtime_checkable

import jax
import jinja2
import markupsafe
import numpy as np
from jaxtyping import Array, Int32, Key

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer import chat_template
from jaxlm.infer.chat_template import (
    MAX_CPU_SECONDS,
    MAX_OUTPUT_BYTES,
    MAX_TEMPLATE_BYTES,
)
from jaxlm.infer.generate import generate
from jaxlm.types import Params

# A template that waits is stopped too, and a busy machine is given time to start one.
MAX_SECONDS = 20
# Unicode's noncharacters: no text has a use for them.
_NONCHARACTERS = [*map(chr, range(0xFDD0, 0xFDF0)), "\ufffe", "\uffff"]
# What a template takes out of an assistant's own words again: its thoughts.
_THOUGHTS = ("<think>", "</think>")
_ROLE = re.compile(r"\w[\w-]*")


@runtime_checkable
class Tokenizer(Protocol):
    """What a conversation needs of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: str | None
    special_ids: Mapping[str, int]

    @property
    def token_bytes(self) -> Sequence[bytes]: ...

    def encode_trusted(self, text: str, barrier: str) -> Int32[np.ndarray, "n"]: ...


@runtime_checkable
class Stream(Protocol):
    """Turns ids into text as they come."""

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> Int32[np.ndarray, "n"]:
    """Ids of a conversation, laid out by the tokenizer's chat template.

    Nothing in the messages becomes a special token. Without texts of special tokens in
    them, the ids are those of `apply_chat_template` of the library `transformers`:
    whether bos stands in front is the template's affair.

    Args:
      tokenizer: with a chat template.
      messages: each with a `role` (system, user, assistant, ...) and a `content`.
      add_generation_prompt: whether the beginning of an answer is put at the end.

    Raises:
      ValueError: when there is no template, when it refuses the messages, fails, or
        breaks a limit (size, output, time, memory), and for messages that are none.
    """
    check_template(tokenizer)
    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"message {i} has no role or no content")
        if not _ROLE.fullmatch(message["role"]):
            raise ValueError(f"message {i} has the role {message['role']!r}: no word")
    barrier = _unused_character(tokenizer.chat_template, messages)
    names = {i: text for text, i in tokenizer.special_ids.items()}
    ends = {
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": names.get(tokenizer.eos_id),
        "pad_token": names.get(tokenizer.pad_id),
    }
    variables = {
        "messages": [_guarded(tokenizer, m, barrier) for m in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **{name: text for name, text in ends.items() if text is not None},
    }
    ids = tokenizer.encode_trusted(render(tokenizer.chat_template, variables), barrier)
    if not len(ids):
        raise ValueError("the chat template gives no text for these messages")
    return ids


def check_template(tokenizer: Tokenizer) -> None:
    """Raises ValueError when there is no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "this model has no chat template, which says how a conversation is laid "
            "out: take a model that was trained to chat, or continue a text with "
            "--prompt"
        )


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
    """The message with a barrier behind whatever a special token could begin with."""
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
    """Whether a text is a special token that decoding leaves out."""
    token_id = tokenizer.special_ids.get(text)
    return token_id is not None and not tokenizer.token_bytes[token_id]


def render(template: str, variables: Mapping[str, object]) -> str:
    """The text of a template, rendered by a child process within limits.

    Raises:
      ValueError: when the template fails or breaks a limit.
    """
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(
            f"the chat template has {size:,} bytes: at most {MAX_TEMPLATE_BYTES:,} are "
            "run"
        )
    # Isolated mode knows no PYTHONPATH and no packages of the user.
    folders = {m.__path__[0].rpartition("/")[0] for m in (jinja2, markupsafe)}
    command = [sys.executable, "-I", chat_template.__file__, *sorted(folders)]
    job = json.dumps({"template": template, "variables": variables}).encode()
    try:
        child = subprocess.run(
            command, input=job, capture_output=True, timeout=MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the chat template did not end within {MAX_SECONDS} s"
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
        told = child.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"the process that renders the chat template ended with status "
            f"{child.returncode}: {told[-1] if told else 'without a word'}"
        ) from None
    if "error" in answer:
        raise ValueError(f"the chat template {answer['error']}")
    return answer["text"]


def converse(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    sample: SampleConfig,
    key: Key[Array, ""],
    *,
    new_stream: Callable[[], Stream],
    system: str | None = None,
) -> None:
    """Holds a conversation: lines from stdin, answers to stdout as they come.

    The end of the input or `/exit` ends it, and so does a context that is full. Ctrl-C
    stops an answer; what there is of it stays in the conversation.

    Args:
      config: the model.
      params: as for `generate`.
      tokenizer: with a chat template.
      sample: how to draw; without stop ids the tokenizer's are taken.
      key: a typed PRNG key; each answer draws with its own.
      new_stream: gives a `TextStream` for an answer.
      system: what the system message says; None sends none.

    Raises:
      ValueError: as `chat_ids` and `generate` do.
    """
    check_template(tokenizer)
    if not sample.stop_ids:
        sample = replace(sample, stop_ids=tokenizer.stop_ids)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in count():
        line = _next_line()
        if line is None:
            return
        messages.append({"role": "user", "content": line})
        ids = chat_ids(tokenizer, messages)
        room = config.context_length - len(ids)
        if room < 1:
            _say(
                f"the conversation has {len(ids)} tokens, and the model's context is "
                f"{config.context_length}: it ends here"
            )
            return
        limit = min(room, sample.max_new_tokens)
        answer = _Answer(new_stream())
        try:
            result = generate(
                config,
                params,
                [ids],
                replace(sample, max_new_tokens=limit),
                jax.random.fold_in(key, turn),
                num_tokens=tokenizer.vocab_size,
                on_tokens=answer.feed,
            )
            is_cut_off = result.lengths[0] == limit
        except KeyboardInterrupt:
            is_cut_off = False
        messages.append({"role": "assistant", "content": answer.finish()})
        if is_cut_off and limit == room:
            _say(
                f"the model's context of {config.context_length} tokens is full: the "
                "conversation ends here"
            )
            return
        if is_cut_off:
            _say(f"stopped after {limit} tokens: --max-new-tokens allows more")


class _Answer:
    """Prints an answer as it comes, and keeps it."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._text = ""

    def feed(self, new, inside) -> None:
        self._add("".join(self._stream.feed(int(t)) for t in new[0][inside[0]]))

    def finish(self) -> str:
        self._add(self._stream.finish())
        print(flush=True)
        return self._text

    def _add(self, text: str) -> None:
        self._text += text
        print(text, end="", flush=True)


def _next_line() -> str | None:
    """What the user types next; None at the end."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return None
        if line.strip() == "/exit":
            return None
        if line.strip():
            return line


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
