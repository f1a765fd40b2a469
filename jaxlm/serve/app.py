"""The HTTP application: OpenAI's endpoints for completions, chats and responses."""

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.files.strict_json import parse_object
from jaxlm.infer.grammar.json_schema import any_object, json_schema
from jaxlm.infer.grammar.token_grammar import token_grammar
from jaxlm.infer.rules.automata import Automaton
from jaxlm.infer.rules.automaton_cache import AutomatonCache
from jaxlm.infer.slots.slot_request import Request
from jaxlm.serve import bodies
from jaxlm.serve.answers import Addition, Answer
from jaxlm.serve.bodies import Settings, Wrong
from jaxlm.serve.formats import Chats, Completions, Format, Prompts, Responses
from jaxlm.serve.tool_calls import OPENING
from jaxlm.serve.worker import Busy, Worker
from jaxlm.tokenizers.base import Tokenizer

FORMATS = {
    "/v1/completions": Completions,
    "/v1/chat/completions": Chats,
    "/v1/responses": Responses,
}
_LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")
# Of the automata of all slots, which int16 counts; half of them may lie in gaps.
_ALL_STATES = 16_000


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    body_bytes: int = 1 << 20
    """Bytes of a body."""
    body_seconds: float = 30.0
    """Time for a body."""
    seconds: float = 600.0
    """Time for an answer, waiting included."""


class Failure(Exception):
    """An answer with an HTTP status and a message."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.error()}, self.status)

    def error(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": str(self), "type": kind, "param": self.field, "code": None}


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
        self._guesses = Counter(
            *("jaxlm_guesses", "Tokens that speculation guessed.", ["kind"]),
            registry=self._registry,
        )
        self._first_token = Histogram(
            *("jaxlm_first_token_seconds", "Time to the first tokens of an answer."),
            registry=self._registry,
        )
        Gauge(
            *("jaxlm_requests_open", "Answers that run or wait."),
            registry=self._registry,
        ).set_function(lambda: worker.num_requests)
        self._grammars = AutomatonCache(1 << 30)
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                *(
                    Route(path, partial(self._answer, kind), methods=["POST"])
                    for path, kind in FORMATS.items()
                ),
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

    async def _answer(self, kind: type[Format], http: HttpRequest) -> Response:
        try:
            response = await self._respond(kind, http)
        except Wrong as error:
            response = Failure(400, str(error), error.field).response()
        except Failure as failure:
            response = failure.response()
        except ClientDisconnect:  # before all of the body was there
            response = Failure(499, "the client is gone").response()
        self._requests.labels(response.status_code).inc()
        return response

    async def _respond(self, kind: type[Format], http: HttpRequest) -> Response:
        self._check_key(http)
        body = await self._read(http)
        chosen = bodies.settings(body, kind.fields, self._tokenizer.stop_ids)
        if body.get("model", self._name) != self._name:
            raise Failure(404, f"this server has the model {self._name}", "model")
        # Templates, grammars and long texts take time.
        rows = await asyncio.to_thread(self._prompts, kind, body)
        requests = await asyncio.to_thread(
            self._engine_requests, rows, chosen, kind.default_tokens
        )
        if len(requests) > (most := self._worker.max_requests):
            raise Failure(
                400, f"it asks for {len(requests)} answers: at most {most} at once here"
            )
        form = kind(self._name, body, chosen, sum(map(len, rows)))
        job = _Job(self, requests, form)
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
            # A page of another site has its own name here, even if it has had that
            # name resolved to this machine.
            host = http.headers.get("host", "localhost").lower()
            if not _LOCAL.fullmatch(host):
                raise Failure(403, "without an API key only localhost is answered")
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
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in http.stream():
                    data += part
                    if len(data) > most:
                        raise Failure(413, f"the body has more than {most:,} bytes")
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise Failure(408, f"the body took more than {seconds:g} s") from None
        try:
            return parse_object(data, "the body", allow_nan=False)
        except ValueError as error:
            raise Failure(400, str(error)) from None

    def _prompts(self, kind: type[Format], body: dict[str, Any]) -> Prompts:
        try:
            return kind.prompts(self._tokenizer, body)
        except Wrong:
            raise
        except RecursionError:
            raise Failure(400, "it is nested too deeply", kind.prompt_field) from None
        except (ValueError, OverflowError) as error:
            raise Failure(400, str(error), kind.prompt_field) from None

    def _engine_requests(
        self, rows: Prompts, chosen: Settings, default_tokens: int | None
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
            limit = chosen.max_tokens or min(default_tokens or room, room)
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
        vocabulary = self._tokenizer.token_bytes, self._config.vocab_size

        def make() -> Automaton:
            part = any_object() if schema is True else json_schema(schema)
            return token_grammar(part, *vocabulary, plain)

        try:
            return self._grammars.get((json.dumps(schema), plain), make)
        except ValueError as error:
            raise Failure(400, str(error), "response_format") from None


class _Job:
    """The requests of one body, and their answers."""

    def __init__(self, server: Server, requests: list[Request], form: Format):
        self._server, self._requests, self._form = server, requests, form
        stops = form.chosen.sample.stop_strings
        # What a model that was trained on another form writes stays text.
        has_form = OPENING in (server._tokenizer.chat_template or "")
        tools = form.tools if has_form else ()
        self._answers = [Answer(server._tokenizer, stops, tools) for _ in requests]

    async def _parts(self) -> AsyncGenerator[tuple[int, Addition], None]:
        """Yields the number of an answer, and what is new in it."""
        parts: asyncio.Queue[Any] = asyncio.Queue()
        num_top = self._form.chosen.logprobs or 0

        async def one(number: int, request: Request) -> None:
            try:
                running = self._server._worker.run(request)
                async with contextlib.aclosing(running):
                    async for part in running:
                        parts.put_nowait((number, part))
            except Exception as error:
                parts.put_nowait((number, error))

        tasks = [
            asyncio.ensure_future(one(number, request))
            for number, request in enumerate(self._requests)
        ]
        limit, clock = self._server._limits.seconds, asyncio.get_running_loop().time
        began = clock()
        try:
            left, is_first = len(tasks), True
            while left:
                # A stream is begun in one task and goes on in another, so that no
                # timeout may last from one part to the next.
                async with asyncio.timeout_at(began + limit):
                    number, part = await parts.get()
                if isinstance(part, Exception):
                    raise _failure_of(part)
                if is_first:
                    self._server._first_token.observe(clock() - began)
                    is_first = False
                guesses = self._server._guesses
                guesses.labels("all").inc(part.num_proposed)
                guesses.labels("right").inc(part.num_accepted)
                left -= part.ended is not None
                yield number, self._answers[number].add(part, num_top)
        except TimeoutError:
            raise Failure(504, f"the answer took more than {limit:g} s") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            new = sum(answer.num_tokens for answer in self._answers)
            self._server._tokens.labels("prompt").inc(self._form.prompt_tokens)
            self._server._tokens.labels("new").inc(new)

    async def whole(self) -> dict[str, Any]:
        """Returns the response of a request that does not stream."""
        async with contextlib.aclosing(self._parts()) as parts:
            async for _ in parts:
                pass
        return self._form.whole(self._answers)

    async def stream(self) -> AsyncIterator[str]:
        """Yields the events of a stream.

        An error before the first of them is raised; later it is an event.
        """
        has_begun = False
        try:
            async with contextlib.aclosing(self._parts()) as parts:
                async for number, new in parts:
                    first = "" if has_begun else "".join(self._form.begin())
                    has_begun = True
                    events = self._form.add(number, self._answers[number], new)
                    yield first + "".join(events)
        except Failure as failure:
            if not has_begun:
                raise
            yield self._form.failed(failure.error())
            return
        yield "".join(self._form.end(self._answers))


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
