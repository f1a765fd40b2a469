"""An answer as it comes: text without stop strings or half characters, and tokens."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxlm.infer.rules.stop_strings import StopText
from jaxlm.infer.slots.slot_request import NewTokens
from jaxlm.serve.tool_calls import CallText
from jaxlm.tokenizers.base import TextStream, Tokenizer


class Addition(NamedTuple):
    """What is new in an answer."""

    text: str
    calls: list[dict[str, Any]]
    """As `Answer.calls`."""
    tokens: list[dict[str, Any]]
    """As `Answer.tokens`."""


@dataclass
class Answer:
    """One choice of a response."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]
    tools: Collection[str] = ()
    """Names of those whose calls are taken out of the text."""
    num_tokens: int = 0
    """Tokens so far, those of a stop string included."""
    text: str = ""
    finish_reason: str | None = None
    """stop, length, tool_calls, or None while it goes on."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls of tools, as a chat completion has them."""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """For each token its text, bytes and log-probability, and the likeliest ones."""

    def __post_init__(self):
        self._stream, self._stop = TextStream(self.tokenizer), StopText(self.stops)
        self._calls = CallText(self.tools) if self.tools else None

    def add(self, part: NewTokens, num_top: int) -> Addition:
        """Takes new tokens, with the `num_top` likeliest at each."""
        new, text = [], ""
        for i, token in enumerate(part.tokens.tolist()):
            text += self._stop.feed(self._stream.feed(token))
            new.append(self._token(token, float(part.logprobs[i])))
            new[-1]["top_logprobs"] = [
                self._token(int(t), float(p))
                for t, p in zip(part.top_tokens[i], part.top_logprobs[i], strict=True)
            ][:num_top]
        if part.ended is not None:
            if not self._stop.is_stopped:
                text += self._stop.feed(self._stream.finish()) + self._stop.finish()
            self.finish_reason = part.ended
        calls: list[dict[str, Any]] = []
        if self._calls is not None:
            text = self._calls.feed(text)
            if part.ended is not None:
                text += self._calls.finish()
            calls = self._calls.calls[len(self.calls) :]
            self.calls = self.calls + calls
            if self.calls and part.ended == "stop":
                self.finish_reason = "tool_calls"
        self.num_tokens += len(new)
        self.text += text
        self.tokens += new
        return Addition(text, calls, new)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes[token]
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}
