"""What `sample` prints instead of a stream: texts, JSON, or text in colors."""

import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from jaxlm.config import SampleConfig
from jaxlm.infer.beam_search import Beam
from jaxlm.infer.generate import Generation
from jaxlm.infer.rules.stop_strings import StopText, until_stop
from jaxlm.terminal.printable import printable
from jaxlm.tokenizers.base import TextStream, Tokenizer

# Least probability and color of the terminal's 256, from likely to unlikely.
_COLORS = ((0.6, 34), (0.3, 148), (0.1, 220), (0.01, 208), (0.0, 196))
_END = "\x1b[0m"


def for_stdout(text: str) -> str:
    """Returns a text as it is shown: on a terminal, without what moves its cursor."""
    return printable(text) if sys.stdout.isatty() else text


def plain_texts(
    result: Generation, tokenizer: Tokenizer, prompt: str, sample: SampleConfig
) -> Iterator[str]:
    """Formats each sample as a stream would end, several with headers."""
    for i, row in enumerate(result.rows):
        text = prompt + until_stop(tokenizer.decode(row), sample.stop_strings)
        yield for_stdout(_numbered(i, len(result.rows), text))


def beam_lines(
    beams: Sequence[Beam], tokenizer: Tokenizer, prompt: str, as_json: bool
) -> Iterator[str]:
    """Formats each text of a search, or a line of JSON with its tokens and score."""
    for i, beam in enumerate(beams):
        text = tokenizer.decode(beam.tokens)
        if not as_json:
            yield for_stdout(_numbered(i, len(beams), prompt + text))
            continue
        line = {"prompt": prompt, "text": text, "score": round(beam.score, 6)}
        line["tokens"] = beam.tokens.tolist()
        yield json.dumps(line, ensure_ascii=False)


def _numbered(i: int, count: int, text: str) -> str:
    return f"--- sample {i + 1}\n{text}" if count > 1 else text


def json_lines(
    result: Generation, tokenizer: Tokenizer, prompt: str, sample: SampleConfig
) -> Iterator[str]:
    """Formats each sample as a line of JSON.

    Its fields: `prompt`; `text`, the new one; `ended`, by "stop" or "length", or
    "interrupted"; `tokens`, those of a stop string included; `logprobs` of each, in
    nats, under the model's own distribution; `top_tokens` and `top_logprobs` if they
    were asked for.
    """
    for i, row in enumerate(result.rows):
        length = len(row)
        line = {
            "prompt": prompt,
            "text": until_stop(tokenizer.decode(row), sample.stop_strings),
            "ended": result.ended[i] or "interrupted",
            "tokens": row.tolist(),
            "logprobs": _numbers(result.logprobs[i, :length]),
        }
        if result.top_tokens.shape[-1]:
            line["top_tokens"] = result.top_tokens[i, :length].tolist()
            line["top_logprobs"] = _numbers(result.top_logprobs[i, :length])
        yield json.dumps(line, ensure_ascii=False)


def _numbers(values: np.ndarray) -> list:
    """Numbers with the digits of float32, not those of float64."""
    return np.round(values.astype(np.float64), 6).tolist()


def colored_texts(
    result: Generation, tokenizer: Tokenizer, prompt: str, sample: SampleConfig
) -> Iterator[str]:
    """Formats a legend, and each sample with its new tokens in colors."""
    above = [f"{least:.0%}" for least, _ in _COLORS[:-1]]
    names = [*(f"{p} or more" for p in above), f"below {above[-1]}"]
    colors = [color for _, color in _COLORS]
    yield "  ".join(_color(n, c) for n, c in zip(names, colors, strict=True))
    for i, row in enumerate(result.rows):
        stream, stop = TextStream(tokenizer), StopText(sample.stop_strings)
        parts = [printable(prompt)]
        for token, logprob in zip(row.tolist(), result.logprobs[i], strict=False):
            text = printable(stop.feed(stream.feed(token)))
            least = next(c for p, c in _COLORS if np.exp(logprob) >= p)
            parts.append(_color(text, least) if text else "")
        rest = stop.feed(stream.finish()) + stop.finish()
        yield _numbered(i, len(result.rows), "".join(parts) + printable(rest))


def _color(text: str, color: int) -> str:
    return f"\x1b[38;5;{color}m{text}{_END}"
