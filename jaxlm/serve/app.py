"""The HTTP application: OpenAI's endpoints for completions and chats."""

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jax
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.files.strict_json import parse_object
from jaxlm.infer.conversation.chat_ids import chat_ids
from jaxlm.infer.engine import Request
from jaxlm.infer.grammar.json_schema import any_object, json_schema
from jaxlm.infer.grammar.token_grammar import token_grammar
from jaxlm.infer.rules.automata import Automaton
from jaxlm.serve import bodies
from jaxlm.serve.answers import Answer, chat_logprobs, completion_logprobs
from jaxlm.serve.bodies import Settings, Wrong
from jaxlm.serve.worker import Busy, Worker
from jaxlm.tokenizers.base import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
# Of the automata of all slots, which int16 counts; half of them may lie in gaps.
_ALL_STATES = 16_000


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    body_bytes: int = 1 << 20
    """Bytes of a body."""
    seconds: float = 600.0
    """Time for an answer, waiting included."""


class Failure(Exception):
    """An answer with an HTTP status and a message."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status)

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": None}
        return {"error": error}


class Server:
    """A model behind HTTP."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tokenizer: Tokenizer,
        worker: Worker,
        *,
        max_length: int,
        num_slots: int,
        api_key: str | None = None,
        limits: Limits | None = None,
    ):
        """Prepares the application, `app`.

        Args:
          name: of the model, for clients.
          max_length: tokens of a prompt and its answer together, as the engine's.
          num_slots: as the engine's.
          api_key: what clients must send; None: nothing.
        """
        self._name, self._config, self._tokenizer = name, config, tokenizer
        self._worker, self._max_length = worker, max_length
        self._api_key, self._limits = api_key, limits or Limits()
        self._max_states = _ALL_STATES // num_slots
        self._created = int(time.time())
        self._registry = CollectorRegistry()
        self._requests = Counter(
            *("jaxlm_requests", "Requests by status.", ["status"]),
            registry=self._registry,
        )
        self._tokens = Counter(
            *("jaxlm_tokens", "Tokens by kind.", ["kind"]), registry=self._registry
        )
        self._first_token = Histogram(
            *("jaxlm_first_token_seconds", "Time to the first tokens of an answer."),
            registry=self._registry,
        )
        Gauge(
            *("jaxlm_requests_open", "Answers that run or wait."),
            registry=self._registry,
        ).set_function(lambda: worker.num_requests)
        self._grammar = lru_cache(maxsize=32)(self._make_grammar)
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _page(self, _: HttpRequest) -> Response:
        nonce = secrets.token_urlsafe(16)
        page = files("jaxlm.serve").joinpath("page.html").read_text("utf-8")
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src "
        policy += f"'nonce-{nonce}'; connect-src 'self'; frame-ancestors 'none'"
        headers = {
            "Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        page = page.replace("{{nonce}}", nonce)
        return Response(page, media_type="text/html", headers=headers)

    async def _health(self, _: HttpRequest) -> Response:
        if self._worker.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, http: HttpRequest) -> Response:
        try:
            self._check_key(http)
        except Failure as failure:
            return failure.response()
        text = generate_latest(self._registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, http: HttpRequest) -> Response:
        try:
            self._check_key(http)
        except Failure as failure:
            return failure.response()
        model = {"id": self._name, "object": "model", "created": self._created}
        return JSONResponse(
            {"object": "list", "data": [{**model, "owned_by": "jaxlm"}]}
        )

    async def _completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, is_chat=False)

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, is_chat=True)

    async def _answer(self, http: HttpRequest, is_chat: bool) -> Response:
        try:
            response = await self._respond(http, is_chat)
        except Wrong as error:
            response = Failure(400, str(error), error.field).response()
        except Failure as failure:
            response = failure.response()
        self._requests.labels(response.status_code).inc()
        return response

    async def _respond(self, http: HttpRequest, is_chat: bool) -> Response:
        self._check_key(http)
        body = await self._read(http)
        known = bodies.CHAT if is_chat else bodies.COMPLETION
        chosen = bodies.settings(body, known, self._tokenizer.stop_ids)
        if body.get("model", self._name) != self._name:
            raise Failure(404, f"this server has the model {self._name}", "model")
        # A template is rendered in a process of its own, and a grammar takes time too.
        rows = await asyncio.to_thread(self._prompts, body, is_chat)
        requests = await asyncio.to_thread(self._engine_requests, rows, chosen, is_chat)
        job = _Job(self, requests, rows, chosen, is_chat)
        if chosen.stream:
            # What is wrong has an HTTP status: the stream begins with the first tokens.
            stream = job.stream()
            first = await anext(stream)
            return _EventStream(_chain(first, stream), media_type="text/event-stream")
        work = asyncio.ensure_future(job.whole())
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Failure(499, "the client is gone")
            return JSONResponse(work.result())
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _check_key(self, http: HttpRequest) -> None:
        if self._api_key is None:
            return
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise Failure(401, "the API key is missing or wrong: Authorization: Bearer")

    async def _read(self, http: HttpRequest) -> dict[str, Any]:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also keeps other sites' forms away, which cannot send this type.
            raise Failure(415, "the Content-Type must be application/json")
        data, most = b"", self._limits.body_bytes
        async for part in http.stream():
            data += part
            if len(data) > most:
                raise Failure(413, f"the body has more than {most:,} bytes")
        try:
            return parse_object(data, "the body", allow_nan=False)
        except ValueError as error:
            raise Failure(400, str(error)) from None

    def _prompts(self, body: dict[str, Any], is_chat: bool) -> list[np.ndarray]:
        try:
            if is_chat:
                return [chat_ids(self._tokenizer, bodies.messages(body))]
            return [
                self._tokenizer.encode_prompt(prompt)
                if isinstance(prompt, str)
                else np.array(prompt, np.int64)
                for prompt in bodies.prompts(body)
            ]
        except Wrong:
            raise
        except (ValueError, OverflowError) as error:
            raise Failure(
                400, str(error), "messages" if is_chat else "prompt"
            ) from None

    def _engine_requests(
        self, rows: list[np.ndarray], chosen: Settings, is_chat: bool
    ) -> list[Request]:
        """Returns a request for each choice of each prompt."""
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        key, requests = jax.random.key(seed), []
        for row in rows:
            room = self._max_length - len(row)
            if room < 1:
                raise Failure(
                    400,
                    f"the prompt has {len(row)} tokens: it and its answer may have "
                    f"{self._max_length} together",
                )
            limit = room if is_chat else min(DEFAULT_COMPLETION_TOKENS, room)
            limit = chosen.max_tokens or limit
            sample = replace(chosen.sample, max_new_tokens=limit)
            grammar = self._grammar_of(chosen.schema, sample)
            states = 1 + sum(len(s.encode()) for s in sample.stop_strings)
            states += 0 if grammar is None else len(grammar.needs)
            if states > self._max_states:
                raise Failure(
                    400,
                    f"stop and response_format need {states:,} states, and an answer "
                    f"may have {self._max_states:,}: make them shorter",
                )
            for _ in range(chosen.num_choices):
                own = jax.random.fold_in(key, len(requests))
                requests.append(Request(row, sample, own, grammar))
        return requests

    def _grammar_of(self, schema: Any, sample: SampleConfig) -> Automaton | None:
        if schema is None:
            return None
        # What a grammar depends on; the others share it.
        plain = SampleConfig(
            stop_ids=sample.stop_ids, forbidden_ids=sample.forbidden_ids
        )
        try:
            return self._grammar(json.dumps(schema), plain)
        except ValueError as error:
            raise Failure(400, str(error), "response_format") from None

    def _make_grammar(self, schema: str, sample: SampleConfig) -> Automaton:
        value = json.loads(schema)
        part = any_object() if value is True else json_schema(value)
        vocab_size = self._config.vocab_size
        return token_grammar(part, self._tokenizer.token_bytes, vocab_size, sample)


class _Job:
    """The requests of one body, and their answers."""

    def __init__(
        self,
        server: Server,
        requests: list[Request],
        rows: list[np.ndarray],
        chosen: Settings,
        is_chat: bool,
    ):
        self._server, self._requests, self._chosen = server, requests, chosen
        self._is_chat = is_chat
        self._prompt_tokens = sum(len(row) for row in rows)
        stops = chosen.sample.stop_strings
        self._answers = [Answer(server._tokenizer, stops) for _ in requests]
        name = "chat.completion" if is_chat else "text_completion"
        if chosen.stream and is_chat:
            name += ".chunk"
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "object": name,
            "created": int(time.time()),
            "model": server._name,
        }

    async def _parts(
        self,
    ) -> AsyncGenerator[tuple[int, str, list[dict[str, Any]]], None]:
        """Yields the number of an answer, and what is new in it."""
        parts: asyncio.Queue[Any] = asyncio.Queue()

        async def one(number: int, request: Request) -> None:
            try:
                running = self._server._worker.run(request)
                async with contextlib.aclosing(running):
                    async for part in running:
                        parts.put_nowait((number, part))
            except (Busy, ValueError, RuntimeError) as error:
                parts.put_nowait((number, error))

        tasks = [
            asyncio.ensure_future(one(number, request))
            for number, request in enumerate(self._requests)
        ]
        began, deadline = time.monotonic(), self._server._limits.seconds
        try:
            async with asyncio.timeout(deadline):
                left, is_first = len(tasks), True
                while left:
                    number, part = await parts.get()
                    if isinstance(part, Exception):
                        raise _failure_of(part)
                    if is_first:
                        self._server._first_token.observe(time.monotonic() - began)
                        is_first = False
                    left -= part.ended is not None
                    yield (
                        number,
                        *self._answers[number].add(part, self._chosen.logprobs or 0),
                    )
        except TimeoutError:
            raise Failure(504, f"the answer took more than {deadline:g} s") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            new = sum(answer.num_tokens for answer in self._answers)
            self._server._tokens.labels("prompt").inc(self._prompt_tokens)
            self._server._tokens.labels("new").inc(new)

    async def whole(self) -> dict[str, Any]:
        """Returns the response of a request that does not stream."""
        async with contextlib.aclosing(self._parts()) as parts:
            async for _ in parts:
                pass
        choices = [
            self._choice(number, answer.text, answer.tokens, 0, "message")
            for number, answer in enumerate(self._answers)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yields the events of a stream.

        An error before the first of them is raised; later it is an event.
        """
        begun = set()
        try:
            async with contextlib.aclosing(self._parts()) as parts:
                async for number, text, tokens in parts:
                    offset = len(self._answers[number].text) - len(text)
                    choice = self._choice(number, text, tokens, offset, "delta")
                    if self._is_chat and number in begun:
                        del choice["delta"]["role"]
                    begun.add(number)
                    yield _event({**self._head, "choices": [choice]})
        except Failure as failure:
            if not begun:
                raise
            yield _event(failure.body())
            return
        if self._chosen.include_usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _choice(
        self,
        number: int,
        text: str,
        tokens: list[dict[str, Any]],
        offset: int,
        name: str,
    ) -> dict[str, Any]:
        reason = self._answers[number].finish_reason
        choice: dict[str, Any] = {"index": number, "finish_reason": reason}
        wanted = self._chosen.logprobs is not None
        if self._is_chat:
            choice[name] = {"role": "assistant", "content": text}
            choice["logprobs"] = chat_logprobs(tokens) if wanted else None
        else:
            choice["text"] = text
            choice["logprobs"] = completion_logprobs(tokens, offset) if wanted else None
        return choice

    def _usage(self) -> dict[str, int]:
        new = sum(answer.num_tokens for answer in self._answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }


class _EventStream(StreamingResponse):
    """Closes its events when the client hangs up, so that their slots are free."""

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            events: Any = self.body_iterator
            await events.aclose()


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    async with contextlib.aclosing(rest):  # type: ignore[type-var]
        yield first
        async for event in rest:
            yield event


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _failure_of(error: Exception) -> Failure:
    if isinstance(error, Busy):
        return Failure(503, "there are too many requests: try again later")
    return Failure(400 if isinstance(error, ValueError) else 500, str(error))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
