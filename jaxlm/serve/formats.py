"""What each path reads, and how it writes answers: whole, or as events of a stream."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Integer

from jaxlm.infer.conversation.chat_ids import chat_ids
from jaxlm.serve import bodies, messages
from jaxlm.serve.answers import Addition, Answer
from jaxlm.serve.bodies import Settings
from jaxlm.tokenizers.base import Tokenizer

Prompts = list[Integer[np.ndarray, " _"]]


class Format(ABC):
    """The answers of one request."""

    fields: ClassVar[Mapping[str, Any]]
    """Those of a body, as `bodies.settings` takes them."""
    prompt_field: ClassVar[str]
    default_tokens: ClassVar[int | None] = None
    """New tokens without a limit; None: as many as there is room for."""

    def __init__(
        self, model: str, body: Mapping[str, Any], chosen: Settings, prompt_tokens: int
    ):
        self.model, self.body, self.chosen = model, body, chosen
        self.prompt_tokens, self.created = prompt_tokens, int(time.time())
        self.tools: tuple[str, ...] = ()
        """Names of functions that may be called."""

    @staticmethod
    @abstractmethod
    def prompts(tokenizer: Tokenizer, body: Mapping[str, Any]) -> Prompts:
        """Returns the prompts as token ids.

        Raises:
          ValueError: if it holds none.
        """

    @abstractmethod
    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the response."""

    def begin(self) -> Iterator[str]:
        """Yields the events before the first text."""
        return iter(())

    @abstractmethod
    def add(self, number: int, answer: Answer, new: Addition) -> Iterator[str]:
        """Yields the events of what is `new` in an answer."""

    @abstractmethod
    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        """Yields the events after the last text."""

    @abstractmethod
    def failed(self, error: Mapping[str, Any]) -> str:
        """Returns the event of an error, which has a `message` and a `param`."""


class Completions(Format):
    """`/v1/completions`."""

    fields = bodies.COMPLETION
    prompt_field = "prompt"
    default_tokens = 16
    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"
    id_prefix: ClassVar[str] = "cmpl-"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._begun: set[int] = set()
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "object": self.chunk_kind if self.chosen.stream else self.kind,
            "created": self.created,
            "model": self.model,
        }

    @staticmethod
    def prompts(tokenizer: Tokenizer, body: Mapping[str, Any]) -> Prompts:
        return [
            tokenizer.encode_prompt(prompt)
            if isinstance(prompt, str)
            else np.array(prompt, np.int64)
            for prompt in bodies.prompts(body)
        ]

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [
            self._choice(i, answer, Addition(answer.text, answer.calls, answer.tokens))
            for i, answer in enumerate(answers)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(answers)}

    def add(self, number: int, answer: Answer, new: Addition) -> Iterator[str]:
        yield _data({**self._head, "choices": [self._choice(number, answer, new)]})
        self._begun.add(number)

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        if self.chosen.include_usage:
            usage = self._usage(answers)
            yield _data({**self._head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def failed(self, error: Mapping[str, Any]) -> str:
        return _data({"error": error})

    def _choice(self, number: int, answer: Answer, new: Addition) -> dict[str, Any]:
        has_logprobs = self.chosen.logprobs is not None
        return {
            "index": number,
            "finish_reason": answer.finish_reason,
            **self._text(number, answer, new),
            "logprobs": self._logprobs(answer, new) if has_logprobs else None,
        }

    def _text(self, number: int, answer: Answer, new: Addition) -> dict[str, Any]:
        return {"text": new.text}

    def _logprobs(self, answer: Answer, new: Addition) -> dict[str, Any]:
        offset, offsets = len(answer.text) - len(new.text), []
        for token in new.tokens:
            offsets.append(offset)
            offset += len(token["token"])
        return {
            "tokens": [t["token"] for t in new.tokens],
            "token_logprobs": [t["logprob"] for t in new.tokens],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in t["top_logprobs"]}
                for t in new.tokens
            ],
            "text_offset": offsets,
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        new = sum(answer.num_tokens for answer in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


class Chats(Completions):
    """`/v1/chat/completions`."""

    fields = bodies.CHAT
    prompt_field = "messages"
    default_tokens = None
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        tools = messages.tools(self.body)
        self.tools = tuple(tool["function"]["name"] for tool in tools)

    @staticmethod
    def prompts(tokenizer: Tokenizer, body: Mapping[str, Any]) -> Prompts:
        tools = messages.tools(body)
        return [chat_ids(tokenizer, messages.messages(body), tools=tools)]

    def _text(self, number: int, answer: Answer, new: Addition) -> dict[str, Any]:
        # A message of calls only has no content.
        text = new.text if new.text or not answer.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if not self.chosen.stream:
            if new.calls:
                message["tool_calls"] = new.calls
            return {"message": message}
        if number in self._begun:
            del message["role"]
        if new.calls:
            first = len(answer.calls) - len(new.calls)
            message["tool_calls"] = [
                {"index": i, **call} for i, call in enumerate(new.calls, first)
            ]
        return {"delta": message}

    def _logprobs(self, answer: Answer, new: Addition) -> dict[str, Any]:
        return {"content": new.tokens, "refusal": None}


class Responses(Format):
    """`/v1/responses`, of which nothing is kept."""

    fields = bodies.RESPONSE
    prompt_field = "input"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._id, self._item_id = (
            f"{kind}_{secrets.token_hex(24)}" for kind in ("resp", "msg")
        )
        self._num_events = 0

    @staticmethod
    def prompts(tokenizer: Tokenizer, body: Mapping[str, Any]) -> Prompts:
        return [chat_ids(tokenizer, messages.input_messages(body))]

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (answer,) = answers
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        new = answer.num_tokens
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + new,
        }
        item = self._item(status, [_part(answer.text)])
        return self._response(status, [item], usage)

    def begin(self) -> Iterator[str]:
        for name in ("created", "in_progress"):
            response = self._response("in_progress", [], None)
            yield self._event(f"response.{name}", response=response)
        item = self._item("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._of_part("content_part.added", part=_part(""))

    def add(self, number: int, answer: Answer, new: Addition) -> Iterator[str]:
        if new.text:
            yield self._of_part("output_text.delta", delta=new.text, logprobs=[])

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        text, response = answers[0].text, self.whole(answers)
        yield self._of_part("output_text.done", text=text, logprobs=[])
        yield self._of_part("content_part.done", part=_part(text))
        (item,) = response["output"]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: Mapping[str, Any]) -> str:
        named = {"message": error["message"], "param": error["param"], "code": None}
        return self._event("error", **named)

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        sample, body = self.chosen.sample, self.body
        is_cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": self.chosen.max_tokens,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": sample.temperature,
            "text": {"format": {"type": "text"}} | (body.get("text") or {}),
            "tool_choice": "auto",
            "tools": [],
            "top_p": sample.top_p,
            "usage": usage,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        item = {"type": "message", "id": self._item_id, "status": status}
        return {**item, "role": "assistant", "content": content}

    def _of_part(self, name: str, **fields: Any) -> str:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(f"response.{name}", **place, **fields)

    def _event(self, name: str, **fields: Any) -> str:
        number, self._num_events = self._num_events, self._num_events + 1
        event = {"type": name, "sequence_number": number, **fields}
        return f"event: {name}\n{_data(event)}"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
