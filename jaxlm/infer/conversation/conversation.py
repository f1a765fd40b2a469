"""Conversations: messages in turn, and a model that answers them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxlm.config import CacheKind, ModelConfig, SampleConfig
from jaxlm.infer.conversation.chat_ids import chat_ids
from jaxlm.infer.generate import generate
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.rules.stop_strings import StopText
from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.types import Params

Message = Mapping[str, str]


class ContextFull(ValueError):
    """The messages leave no room for an answer in the model's context."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took."""

    text: str
    ended: Literal["by the model", "interrupted", "at the limit", "at the context"]
    """At the limit: of `max_new_tokens`."""
    prompt_tokens: int
    """Tokens of the conversation before the answer."""
    prefill_tokens: int
    """Those that were read for this answer; the cache held the others."""
    tokens: int
    """Tokens of the answer."""
    prefill_s: float
    """Seconds for reading, without compiling."""
    decode_s: float
    """Seconds for the answer, without compiling."""


class Conversation:
    """Messages, and the model that answers them.

    The cache of an answer is kept, so the next one only reads the tokens that are new.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        sample: SampleConfig,
        key: Key[Array, ""],
        *,
        system: str | None = None,
        cache: CacheKind = "full",
    ):
        """Begins a conversation without messages.

        Args:
          params: stacked over layers, as `init` and `load` return them.
          tokenizer: with a chat template.
          sample: how to sample; its stop ids end an answer.
          key: a typed PRNG key, folded with the number of the answer.
          system: as `set_system`.
          cache: its kind, as for `generate`.

        Raises:
          ValueError: as `set_system`.
        """
        self.config = config
        self.messages: list[Message] = []
        """Each with a `role` and a `content`, in turn."""
        self.last_answer: Answer | None = None
        self._cache: CacheKind = cache
        self._params, self._tokenizer, self._sample = params, tokenizer, sample
        self._keys = (jax.random.fold_in(key, turn) for turn in count())
        self._state: GenerationState | None = None
        if system is not None:
            self.set_system(system)

    @property
    def system(self) -> str | None:
        """Content of the system message; None if there is none."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Sets or removes the system message; the other messages stay.

        Raises:
          ValueError: if the template rejects it; the messages are as before.
        """
        rest = self.messages[self.system is not None :]
        system = [] if text is None else [{"role": "system", "content": text}]
        # Many templates reject a conversation without a user.
        self._ids([*system, *rest, {"role": "user", "content": "?"}])
        self.messages = [*system, *rest]

    def reset(self) -> None:
        """Forgets all messages but the system message."""
        self.messages = self.messages[: self.system is not None]
        self.last_answer = None

    def load(self, messages: Sequence[Message]) -> None:
        """Replaces the messages.

        Raises:
          ValueError: if the template rejects them; the messages are as before.
        """
        self._ids(messages)
        self.messages = list(messages)
        self.last_answer = None

    def ask(self, text: str, on_text: Callable[[str], Any]) -> Answer:
        """Sends a message of the user and adds it and the answer to the conversation.

        If the answer is blank, neither is added.

        Args:
          text: the message.
          on_text: called with each part of the answer; returning True ends it before
            this part. A KeyboardInterrupt ends it too, but the cache is lost then.

        Raises:
          ContextFull: if there is no room for an answer.
          ValueError: as `chat_ids` and `generate` do. The part of an answer before an
            error, as of a device without memory, is added too.
        """
        return self._answer(
            [*self.messages, {"role": "user", "content": text}], on_text
        )

    def retry(self, on_text: Callable[[str], Any]) -> Answer:
        """Answers the user's last message again; arguments and errors as `ask`.

        The new answer replaces the old one unless it is blank.

        Raises:
          ValueError: if there is no message of the user.
        """
        roles = [message["role"] for message in self.messages]
        if "user" not in roles:
            raise ValueError("there is no message to answer again")
        last = len(roles) - roles[::-1].index("user")
        return self._answer(self.messages[:last], on_text)

    def _answer(
        self, messages: Sequence[Message], on_text: Callable[[str], Any]
    ) -> Answer:
        ids = self._ids(messages)
        room = self.config.context_length - len(ids)
        if room < 1:
            raise ContextFull(
                f"the conversation would have {len(ids)} tokens, and the model's "
                f"context is {self.config.context_length}"
            )
        limit = min(room, self._sample.max_new_tokens)
        strings = self._sample.stop_strings
        reply = _Reply(TextStream(self._tokenizer), StopText(strings), on_text)
        prefill_tokens, prefill_s, decode_s = len(ids), 0.0, 0.0
        # Generation takes over the memory of the state.
        state, self._state = self._state, None
        failure: Exception | None = None
        try:
            result = generate(
                self.config,
                self._params,
                [ids],
                replace(self._sample, max_new_tokens=limit),
                next(self._keys),
                num_tokens=self._tokenizer.vocab_size,
                token_bytes=self._tokenizer.token_bytes,
                on_tokens=reply.feed,
                resume=state,
                return_state=True,
                cache=self._cache,
            )
            self._state = result.state
            prefill_tokens = int(result.prefill_tokens[0])
            prefill_s, decode_s = result.prefill_s, result.decode_s
        except KeyboardInterrupt:
            reply.is_stopped = True
        except Exception as error:  # What was shown stays in the conversation.
            reply.is_stopped, failure = True, error
        if reply.is_stopped:
            ended = "interrupted"
        elif reply.num_tokens < limit:
            ended = "by the model"
        else:
            ended = "at the context" if limit == room else "at the limit"
        answer = Answer(
            text=reply.finish(),
            ended=ended,
            prompt_tokens=len(ids),
            prefill_tokens=prefill_tokens,
            tokens=reply.num_tokens,
            prefill_s=prefill_s,
            decode_s=decode_s,
        )
        if answer.text.strip():
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self.last_answer = answer
        if failure is not None:
            raise failure
        return answer

    def num_tokens(self) -> int:
        """Number of tokens of the conversation so far."""
        return len(self._ids(self.messages, False)) if self.messages else 0

    def _ids(self, messages: Sequence[Message], add_generation_prompt: bool = True):
        return chat_ids(
            self._tokenizer, messages, add_generation_prompt=add_generation_prompt
        )


class _Reply:
    """Turns the tokens of an answer into text as they come, until it is stopped."""

    def __init__(
        self, stream: TextStream, stop: StopText, on_text: Callable[[str], Any]
    ):
        self._stream, self._stop, self._on_text = stream, stop, on_text
        self._text = ""
        self.num_tokens, self.is_stopped = 0, False

    def feed(
        self, new: Int[np.ndarray, "1 n"], inside: Bool[np.ndarray, "1 n"]
    ) -> bool:
        text = "".join(self._stream.feed(int(t)) for t in new[0][inside[0]])
        self._add(self._stop.feed(text))
        self.num_tokens += 0 if self.is_stopped else int(inside.sum())
        return self.is_stopped

    def finish(self) -> str:
        if not self.is_stopped:
            self._add(self._stop.feed(self._stream.finish()) + self._stop.finish())
        return self._text

    def _add(self, text: str) -> None:
        self.is_stopped = self._on_text(text) is True
        self._text += "" if self.is_stopped else text
