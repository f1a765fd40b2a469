"""An answer as it comes: text without stop strings or half characters, and tokens."""

from dataclasses import dataclass, field
from typing import Any

from jaxlm.infer.engine import NewTokens
from jaxlm.infer.rules.stop_strings import StopText
from jaxlm.tokenizers.base import TextStream, Tokenizer


@dataclass
class Answer:
    """One choice of a response."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]
    num_tokens: int = 0
    """Tokens so far, those of a stop string included."""
    text: str = ""
    finish_reason: str | None = None
    """stop, length, or None while it goes on."""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """For each token its text, bytes and log-probability, and the likeliest ones."""

    def __post_init__(self):
        self._stream, self._stop = TextStream(self.tokenizer), StopText(self.stops)

    def add(self, part: NewTokens, num_top: int) -> tuple[str, list[dict[str, Any]]]:
        """Takes new tokens; returns the text and the tokens that they add."""
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
        self.num_tokens += len(new)
        self.text += text
        self.tokens += new
        return text, new

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes[token]
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}


def chat_logprobs(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Formats tokens as a chat completion has them."""
    return {"content": tokens, "refusal": None}


def completion_logprobs(tokens: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """Formats tokens as a completion has them; the first is at `offset` in the text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [t["token"] for t in tokens],
        "token_logprobs": [t["logprob"] for t in tokens],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in t["top_logprobs"]} for t in tokens
        ],
        "text_offset": offsets,
    }
