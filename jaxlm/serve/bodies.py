"""What clients send, checked: each field has an effect or is an error."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.config import SampleConfig
from jaxlm.fields import nearest
from jaxlm.terminal.printable import shown_value

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
_MAX_STOPS = 16
# Field of all endpoints -> what it must be. `user` names a person: it changes nothing.
_COMMON = {
    "model": str,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "stream": bool,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "logit_bias": dict,
    "stop": (str, list),
    "user": str,
}
_CHOICES = {
    **_COMMON,
    "max_tokens": int,
    "n": int,
    "stream_options": dict,
    "response_format": dict,
}
COMPLETION = {**_CHOICES, "prompt": (str, list), "logprobs": int}
CHAT = {
    **_CHOICES,
    "messages": list,
    "max_completion_tokens": int,
    "logprobs": bool,
    "top_logprobs": int,
    "tools": list,
    "tool_choice": (str, dict),
}
RESPONSE = {
    **_COMMON,
    "input": (str, list),
    "instructions": str,
    "max_output_tokens": int,
    "text": dict,
    "store": bool,
    "previous_response_id": str,
}
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_RULES = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty"),
)
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
_NAMES |= {list: "a list", dict: "an object"}


class Wrong(ValueError):
    """A body that cannot be answered."""

    def __init__(self, field: str | None, message: str):
        super().__init__(message if field is None else f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Settings:
    """How a body wants its answer, apart from the prompt."""

    sample: SampleConfig
    max_tokens: int | None
    """New tokens; None: as many as there is room for."""
    num_choices: int
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: int | None
    """Likeliest tokens to tell at each; None: no log-probabilities."""
    schema: Any
    """JSON schema of the answer; True: any object; None: any text."""


def settings(
    body: Mapping[str, Any], known: Mapping[str, Any], stop_ids: tuple[int, ...]
) -> Settings:
    """Checks the fields of a body.

    Raises:
      Wrong: for a field that is unknown, or has a value that cannot be.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in known:
            near = nearest(name, list(known))
            raise Wrong(name, f"this server has no such field{near}")
        kinds = known[name] if isinstance(known[name], tuple) else (known[name],)
        if not any(_is(value, kind) for kind in kinds):
            kind = " or ".join(_NAMES[kind] for kind in kinds)
            raise Wrong(name, f"{shown_value(value)} is not {kind}")
    num_choices, seed = body.get("n", 1), body.get("seed")
    if not 1 <= num_choices <= MAX_CHOICES:
        raise Wrong("n", f"it must be from 1 to {MAX_CHOICES}")
    if seed is not None and not 0 <= seed < 2**32:
        raise Wrong("seed", "it must be in [0, 2**32)")
    options = body.get("stream_options", {})
    if (
        set(options) - {"include_usage"}
        or type(options.get("include_usage", True)) is not bool
    ):
        raise Wrong("stream_options", "it has one field, include_usage: true or false")
    limits = [name for name in _LIMITS if name in body]
    if len(limits) > 1:
        raise Wrong(limits[0], f"give it or {limits[1]}, not both")
    limit = body[limits[0]] if limits else None
    if body.get("store") or "previous_response_id" in body:
        name = "store" if body.get("store") else "previous_response_id"
        raise Wrong(name, "this server keeps no responses: send the whole input")
    rules = {name: body[name] for name in _RULES if name in body}
    rules |= {n: float(v) for n, v in rules.items() if n != "top_k"}
    try:
        sample = SampleConfig(
            max_new_tokens=1 if limit is None else limit,
            stop_ids=stop_ids,
            stop_strings=_stops(body.get("stop", ())),
            **_biases(body.get("logit_bias", {})),
            **rules,
        )
    except ValueError as error:
        message = str(error).replace("sample.max_new_tokens", "".join(limits))
        raise Wrong(None, message.replace("sample.", "")) from None
    return Settings(
        sample=sample,
        max_tokens=limit,
        num_choices=num_choices,
        seed=seed,
        stream=body.get("stream", False),
        include_usage=options.get("include_usage", False),
        logprobs=_logprobs(body),
        schema=_schema(body),
    )


def prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """Returns the prompts of a completion: texts, or token ids.

    Raises:
      Wrong: for anything else.
    """
    given = body.get("prompt")
    if isinstance(given, str):
        return [given]
    if not given:
        raise Wrong("prompt", "give a text, or a list of texts")
    if all(_is(x, int) for x in given):
        return [given]
    found: list[str | list[int]] = []
    for i, prompt in enumerate(given):
        is_ids = (
            isinstance(prompt, list) and prompt and all(_is(x, int) for x in prompt)
        )
        if not isinstance(prompt, str) and not is_ids:
            raise Wrong(f"prompt[{i}]", "it is neither a text nor a list of token ids")
        found.append(prompt)
    if len(found) > MAX_CHOICES:
        raise Wrong("prompt", f"at most {MAX_CHOICES} in a request")
    return found


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        # JSON has integers that no float can hold.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def _stops(given: str | Sequence[Any]) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > _MAX_STOPS or not all(
        _is(s, str) and 0 < len(s) <= 200 for s in stops
    ):
        raise Wrong("stop", f"at most {_MAX_STOPS} texts of 1 to 200 characters")
    try:
        "".join(stops).encode()
    except UnicodeEncodeError:
        raise Wrong("stop", "it holds half of a surrogate pair") from None
    return stops


def _biases(given: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise Wrong("logit_bias", f"{shown_value(name)} is no token id")
        if not _is(value, float) or not -100 <= value <= 100:
            raise Wrong("logit_bias", "a bias must be a number from -100 to 100")
    return {
        "bias_ids": tuple(map(int, given)),
        "biases": tuple(map(float, given.values())),
    }


def _logprobs(body: Mapping[str, Any]) -> int | None:
    given, top = body.get("logprobs"), body.get("top_logprobs")
    if top is not None and given is not True:
        raise Wrong("top_logprobs", "it needs logprobs: true")
    if given is None or given is False:
        return None
    count = (top or 0) if given is True else given
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        name = "top_logprobs" if given is True else "logprobs"
        raise Wrong(name, f"it must be from 0 to {MAX_TOP_LOGPROBS}")
    return count


def _schema(body: Mapping[str, Any]) -> Any:
    if "text" not in body:
        given = body.get("response_format", {"type": "text"})
        return _schema_of("response_format", given, given.get("json_schema"))
    others = sorted(set(body["text"]) - {"format"})
    if others:
        raise Wrong(f"text.{others[0]}", "this server has no such field")
    given = body["text"].get("format", {"type": "text"})
    if not isinstance(given, dict):
        raise Wrong("text.format", "it is no object")
    # Its fields are beside the type.
    inner = {name: value for name, value in given.items() if name != "type"}
    return _schema_of("text.format", given, inner)


def _schema_of(at: str, given: Mapping[str, Any], inner: Any) -> Any:
    kind = given.get("type")
    if kind in ("text", "json_object") and set(given) == {"type"}:
        return None if kind == "text" else True
    if kind == "json_schema" and isinstance(inner, dict) and "schema" in inner:
        extra = sorted(set(inner) - {"name", "schema", "strict", "description"})
        if extra:
            raise Wrong(f"{at}: {extra[0]}", "no such field")
        return inner["schema"]
    form = '"json_schema": {"name": ..., "schema": ...}'
    if at == "text.format":
        form = '"name": ..., "schema": ...'
    raise Wrong(
        at,
        '{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", '
        f"{form}}}",
    )
