"""Conversations: messages in turn, and the model's answers."""

import sys
from dataclasses import replace
from itertools import count

import jax
from jaxtyping import Array, Key

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.generate import generate
from jaxlm.infer.messages import chat_ids, template_of
from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.types import Params


def converse(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    sample: SampleConfig,
    key: Key[Array, ""],
    *,
    system: str | None = None,
) -> None:
    """Holds a conversation: reads lines from stdin, streams answers to stdout.

    It ends at the end of the input, at `/exit`, or when the context is full. Ctrl-C
    stops an answer; the part already printed stays in the conversation.

    Args:
      tokenizer: with a chat template.
      sample: how to sample; its stop ids end an answer.
      key: a typed PRNG key, folded with the number of the turn.
      system: content of the system message; None sends none.

    Raises:
      ValueError: as `chat_ids` and `generate` do.
    """
    template_of(tokenizer)  # raises before the first line is typed
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
        answer = _Answer(TextStream(tokenizer))
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
    """Prints an answer as it arrives, and keeps its text."""

    def __init__(self, stream: TextStream):
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
    """The user's next line that is not blank; None at the end of the conversation."""
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
