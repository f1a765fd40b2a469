"""The server, in a thread, with OpenAI's own client and with hostile bodies."""

import asyncio
import contextlib
import gc
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import openai
import pytest
import uvicorn
from browser_case import CHROMIUM, Browser
from examples_case import FIXED
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_case import make_params, toy

from jaxlm.checkpoint.save import save
from jaxlm.commands import serve
from jaxlm.config import MeshConfig
from jaxlm.flags.arguments import ServeArguments
from jaxlm.infer.generate import generate
from jaxlm.infer.slots.engine import Engine
from jaxlm.infer.slots.slot_request import NewTokens
from jaxlm.model.params import quantize_matrices
from jaxlm.serve import bodies, messages
from jaxlm.serve.app import Limits, Server
from jaxlm.serve.tool_calls import CallText
from jaxlm.serve.worker import Worker
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TOKENIZER = ByteTokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
CONFIG = toy(vocab_size=257, num_layers=1, context_length=256)
PARAMS = make_params(CONFIG, std=0.5)
KEY = "secret"


@pytest.fixture(scope="module")
def served():
    """A server with four slots; at most 31 requests, bodies of 20,000 bytes."""

    def engine():
        return Engine(
            *(CONFIG, PARAMS),
            num_slots=4,
            num_tokens=257,
            token_bytes=TOKENIZER.token_bytes,
            top_logprobs=20,
        )

    # As the command does it.
    with jax.set_mesh(make_mesh_of_size(MeshConfig(data=1))):
        # Twice as many as clients, for those that it does not know have hung up.
        worker = Worker(engine, 31)
    limits = Limits(body_bytes=20_000, seconds=600.0)
    app = Server(
        "tiny",
        CONFIG,
        TOKENIZER,
        worker,
        max_length=256,
        num_slots=4,
        api_key=KEY,
        limits=limits,
    ).app
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
        httpx.Client(base_url=url, headers=headers, timeout=600) as http,
    ):
        yield SimpleNamespace(client=client, http=http, url=url, worker=worker)
    server.should_exit = True
    thread.join()
    worker.stop()


def complete(served, **fields):
    return served.client.completions.create(
        model="tiny", **{"prompt": "abc", "temperature": 0, **fields}
    )


def test_a_completion_is_what_generate_gives(served):
    answer = complete(served, max_tokens=12, logprobs=2)
    sample = bodies.settings(
        {"temperature": 0, "max_tokens": 12}, bodies.COMPLETION, TOKENIZER.stop_ids
    ).sample
    result = generate(CONFIG, PARAMS, [[97, 98, 99]], sample, num_tokens=257)
    (choice,) = answer.choices
    assert choice.text == TOKENIZER.decode(result.rows[0])
    assert choice.logprobs.token_logprobs == pytest.approx(
        result.logprobs[0].tolist(), abs=1e-5
    )
    assert len(choice.logprobs.top_logprobs[0]) in (1, 2)
    assert answer.usage.completion_tokens == 12 and choice.finish_reason == "length"
    assert [model.id for model in served.client.models.list()] == ["tiny"]


def test_a_stream_has_the_parts_of_the_whole(served):
    fields = {"max_tokens": 40, "temperature": 1, "seed": 3, "n": 2, "stop": ["e"]}
    whole = complete(served, **fields)
    texts, reasons = ["", ""], [None, None]
    for event in complete(
        served, **fields, stream=True, stream_options={"include_usage": True}
    ):
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = event.usage
    assert texts == [c.text for c in whole.choices] and texts[0] != texts[1]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage and not any("e" in text for text in texts)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "n": {"type": "integer"},
    },
    "required": ["name", "n"],
}


@pytest.mark.slow
def test_a_chat_answers_with_a_schema(served, compilations):
    message = {"role": "user", "content": [{"type": "text", "text": "Who?"}]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    call = {"model": "tiny", "messages": [message], "seed": 1, "response_format": form}
    answer = served.client.chat.completions.create(
        **call, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    tokens = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == choice.message.content
    assert all(len(t.top_logprobs) == 3 for t in tokens)
    parts = [
        e.choices[0].delta
        for e in served.client.chat.completions.create(**call, stream=True)
    ]
    assert "".join(p.content for p in parts) == choice.message.content
    assert [p.role for p in parts] == ["assistant"] + [None] * (len(parts) - 1)
    # Another length, another temperature and another grammar of that size.
    before = list(compilations)
    other = json.loads(json.dumps(form).replace('"name"', '"game"'))
    other["json_schema"] = {"name": "a", "schema": other["json_schema"]["schema"]}
    message = {"role": "user", "content": "Who is it?"}
    served.client.chat.completions.create(
        **{**call, "messages": [message], "response_format": other}, temperature=0.5
    )
    assert before and compilations == before
    form = {"type": "json_object"}
    answer = served.client.chat.completions.create(
        **{**call, "response_format": form}, max_tokens=30
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_requests_at_once_are_what_they_are_alone(served):
    """More than there are slots, with other settings each, and some that hang up."""
    calls = [
        {"prompt": "x" * (i % 7 + 1), "max_tokens": 5 + i, "seed": i, "temperature": i % 3 / 2, "top_p": 0.9, "frequency_penalty": i % 2}
        for i in range(12)
    ]  # fmt: skip
    alone = [complete(served, **call).choices[0].text for call in calls]

    def hang_up(seed):
        stream = complete(
            served, prompt="long", max_tokens=250, seed=seed, stream=True, temperature=1
        )
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(hang_up, seed) for seed in range(4)]
        together = [
            *pool.map(lambda call: complete(served, **call).choices[0].text, calls)
        ]
        for one in gone:
            one.result()
    assert together == alone
    until = time.monotonic() + 200
    while served.worker.num_requests and time.monotonic() < until:
        time.sleep(0.05)
    assert served.worker.num_requests == 0
    text = served.http.get("/metrics").text
    assert (
        "jaxlm_requests_open 0.0" in text
        and 'jaxlm_requests_total{status="200"}' in text
    )


@pytest.mark.slow
def test_speculation_does_not_change_the_texts(tmp_path, monkeypatch, compilations):
    """Of more clients than slots, with weights in 8 bits; the command is called, but
    for its socket."""
    save(tmp_path / "tiny", CONFIG, PARAMS, TOKENIZER)
    calls = [
        {"prompt": "ab" * (i + 1), "max_tokens": 9 + 7 * i, "seed": i, "temperature": i % 2}
        for i in range(6)
    ]  # fmt: skip
    # A text that repeats itself, so that guesses are right.
    calls[4]["logit_bias"] = {"97": 100}
    found = []

    async def answers(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://[::1]"
        ) as http:
            posts = [http.post("/v1/completions", json=call) for call in calls]
            for response in await asyncio.gather(*posts):
                found.append(response.json()["choices"][0]["text"])
            return (await http.get("/metrics")).text

    def run(server, sockets):
        # Clients close idle connections first: no request meets one that is closing.
        theirs = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
        assert server.config.timeout_keep_alive > 2 * theirs
        found.append(asyncio.run(answers(server.config.app)))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(serve, "bound", lambda *_: contextlib.nullcontext([]))
    folder = str(tmp_path / "tiny")
    serve.main(ServeArguments(src=folder, slots=2, speculate="lookup", weights="int8"))
    *texts, metrics = found
    # Before the first request.
    assert compilations.count("jit(decode)") == 1
    fields = (bodies.COMPLETION, TOKENIZER.stop_ids)
    plain = generate(
        *(CONFIG, quantize_matrices(jax.tree.map(jnp.asarray, PARAMS), "int8")),
        [TOKENIZER.encode(call["prompt"]) for call in calls],
        [bodies.settings(call, *fields).sample for call in calls],
        jnp.stack([jax.random.fold_in(jax.random.key(i), 0) for i in range(6)]),
        num_tokens=257,
    )
    assert texts == [TOKENIZER.decode(row) for row in plain.rows]
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    right = float(counts['jaxlm_guesses_total{kind="right"}'])
    assert 0 < right <= float(counts['jaxlm_guesses_total{kind="all"}'])


def test_responses_are_chats_in_another_form(served):
    rules = {"model": "tiny", "extra_body": {"seed": 2}}
    create = served.client.responses.create
    form = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    call = {**rules, "instructions": "Say.", "text": {"format": form}}
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}]
    found = create(**call, input=asked)
    chat = served.client.chat.completions.create(
        **rules,
        messages=[
            {"role": "system", "content": "Say."},
            {"role": "user", "content": "Who?"},
        ],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": SCHEMA},
        },
    )
    assert found.output_text == chat.choices[0].message.content
    assert found.status == "completed" and found.store is False
    used = (found.usage.input_tokens, found.usage.output_tokens)
    assert used == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    # What it has answered is taken back as input.
    more = [*asked, *found.output, asked[0]]
    assert len(create(**rules, input=more, max_output_tokens=3).output_text) > 0

    events = list(create(**call, input="Who?", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [e for e, kind in zip(events, kinds, strict=True) if "delta" in kind]
    head = ["created", "in_progress", "output_item.added", "content_part.added"]
    tail = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == [*head, *["output_text.delta"] * len(deltas), *tail]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len(deltas) > 1 and "".join(e.delta for e in deltas) == found.output_text
    whole = events[-1].response
    assert whole.usage == found.usage and whole.output_text == found.output_text

    with served.client.responses.stream(
        **rules, input="Who?", max_output_tokens=5
    ) as stream:
        last = list(stream)[-1]
    assert last.type == "response.incomplete" and last.response.usage.output_tokens == 5
    assert last.response.incomplete_details.reason == "max_output_tokens"
    for fields, message in (
        ({"previous_response_id": "resp_1"}, "this server keeps no responses"),
        ({"store": True}, "this server keeps no responses"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "is no message"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"text": {"format": {"type": "xml"}}}, "text.format: "),
        ({"tools": []}, "tools: this server has no such field"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            create(**{**rules, "input": "a", **fields})


class Scripted:
    """In the place of a worker: writes a text, three tokens at a time."""

    num_requests, max_requests, failure = 0, 16, None

    def __init__(self, text):
        self._tokens, self.prompts = list(text.encode()), []

    async def run(self, request):
        self.prompts.append(TOKENIZER.decode(request.tokens))
        for i in range(0, len(self._tokens), 3):
            tokens = np.array(self._tokens[i : i + 3], np.int32)
            n, is_last = len(tokens), i + 3 >= len(self._tokens)
            top = np.zeros((n, 1))
            ended = "stop" if is_last else None
            yield NewTokens(0, tokens, np.zeros(n), top.astype(int), top, ended, {})


FUNCTION = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
ONE_CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"at": "Rome"}}\n</tool_call>'
)


def test_tools_are_told_to_the_template_and_calls_are_found(served):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = """{% for t in tools or [] %}{{ t | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.at }}
{{ call.function.name }}</tool_call>{% endfor %}{% endfor %}"""
    worker = Scripted(f"Let me see < \n{ONE_CALL}\n{ONE_CALL}")
    sizes = {"max_length": 2000, "num_slots": 1}
    app = Server("tiny", CONFIG, tokenizer, worker, **sizes).app
    messages = [{"role": "user", "content": "Rain?"}]

    async def converse():
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with openai.AsyncOpenAI(
            base_url="http://localhost:1/v1", api_key="-", http_client=http
        ) as client:
            rebound = await http.get("http://evil.example:1/v1/models")
            assert rebound.status_code == 403
            call = {"model": "tiny", "messages": messages, "tools": [TOOL]}
            create = client.chat.completions.create
            (choice,) = (await create(**call)).choices
            # As a program of a user does it.
            messages.append(choice.message)
            for one in choice.message.tool_calls:
                messages.append(
                    {"role": "tool", "tool_call_id": one.id, "content": "no"}
                )
            second = await create(**call, tool_choice="none")
            deltas = [e.choices[0] async for e in await create(**call, stream=True)]
            with pytest.raises(openai.BadRequestError, match="no tool can be forced"):
                await create(**call, tool_choice="required")
            return choice, second.choices[0], deltas

    choice, second, deltas = asyncio.run(converse())
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see <"
    assert [c.function.name for c in choice.message.tool_calls] == ["get_weather"] * 2
    assert json.loads(choice.message.tool_calls[1].function.arguments) == {"at": "Rome"}
    first_prompt, second_prompt, third_prompt = worker.prompts
    assert json.dumps(TOOL) in first_prompt and json.dumps(TOOL) not in second_prompt
    called = "<tool_call>Rome\nget_weather</tool_call>" * 2
    assert second_prompt.endswith(f"Let me see <\n{called}tool: no\ntool: no\n")
    assert third_prompt.startswith(json.dumps(TOOL))
    # Without tools, or in another form, it is text.
    assert second.message.tool_calls is None and ONE_CALL in second.message.content
    calls = [call for d in deltas for call in d.delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert "".join(d.delta.content or "" for d in deltas) == "Let me see <"
    assert deltas[-1].finish_reason == "tool_calls"
    with pytest.raises(openai.BadRequestError, match="does not write out tools"):
        served.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], tools=[TOOL]
        )


@given(st.text(alphabet="<tol_ca>x \n", max_size=60), st.integers(1, 9))
@settings(**FIXED, max_examples=60)
def test_calls_are_the_same_however_the_text_comes(text, width):
    text = f"{text}{ONE_CALL}{text[:9]}"
    whole, parts = CallText(["get_weather"]), CallText(["get_weather"])
    shown = whole.feed(text) + whole.finish()
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    assert "".join(map(parts.feed, pieces)) + parts.finish() == shown
    assert len(parts.calls) == len(whole.calls)
    if "<tool_call>" not in text.replace(ONE_CALL, ""):
        assert len(whole.calls) == 1 and ONE_CALL not in shown


WRONG = [
    ({"stop": ["\ud800"]}, 400, "stop: it holds half of a surrogate pair"),
    ({"stop": ["é" * 200] * 11}, 400, "need 4,401 states, and an answer may have 4,000"),
    ({"promt": "a"}, 400, "promt: this server has no such field (did you mean 'prompt'?)"),
    ({"temperature": "1"}, 400, "temperature: '1' is not a number"),
    ({"temperature": -1}, 400, "temperature is -1.0"),
    ({"temperature": 10**400}, 400, "temperature: 1"),
    ({"n": 17}, 400, "n: it must be from 1 to 16"),
    ({"max_tokens": 0}, 400, "max_tokens is 0"),
    ({"max_tokens": 300}, 400, "the prompt has 1 tokens, with 300 new ones 301"),
    ({"prompt": "x" * 300}, 400, "the prompt has 300 tokens: it and its answer may have 256"),
    ({"prompt": [[257]]}, 400, "257"),
    ({"prompt": []}, 400, "prompt: give a text"),
    ({"logit_bias": {"5000": 1}}, 400, "bias_ids: 5000 is not in the vocabulary"),
    ({"logprobs": 21}, 400, "logprobs: it must be from 0 to 20"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, 400, '$: the keyword "not" cannot be held'),
    ({"model": "other"}, 404, "model"),
    ({"n": 16, "prompt": ["a", "b"]}, 400, "it asks for 32 answers: at most"),
]  # fmt: skip


@pytest.mark.parametrize("change, status, message", WRONG)
def test_wrong_requests(served, change, status, message):
    data = json.dumps({"prompt": "a", **change})
    kind = {"Content-Type": "application/json"}
    response = served.http.post("/v1/completions", content=data, headers=kind)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_other_refusals(served):
    post, chat = served.http.post, "/v1/chat/completions"
    for role in ("User", "ipython", None, 3):
        body = {"messages": [{"role": role, "content": "a"}]}
        response = post(chat, json=body)
        assert response.status_code == 400
        assert "is none of system, developer, user, assistant, tool" in response.text
    assert (
        post(
            chat, json={"messages": [{"role": "user", "content": "a", "nam": "b"}]}
        ).status_code
        == 400
    )
    assert post(chat, json={"messages": [], "tools": []}).status_code == 400
    assert (
        post(chat, content=b"{}", headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    kind = {"Content-Type": "application/json"}
    assert post(chat, content=b"[" * 10_000, headers=kind).status_code == 400
    assert post(chat, content=b" " * 20_001, headers=kind).status_code == 413
    get = partial(httpx.get, timeout=600)
    for path in ("/v1/models", "/metrics"):
        assert get(served.url + path).status_code == 401
    assert get(served.url + "/health").json() == {"status": "ok"}
    page = get(served.url)
    policy = page.headers["Content-Security-Policy"]
    nonce = re.search("nonce-([^']+)", policy)[1]
    assert policy.startswith("default-src 'none'") and page.text.count(nonce) == 2
    assert "http" not in page.text


def test_a_client_that_leaves_with_half_a_body_is_no_error(served):
    """It is counted as a request without an answer, and no traceback is logged."""

    def gone():
        text = served.http.get("/metrics").text
        return re.findall(r'jaxlm_requests_total{status="499"} .*', text)

    before = gone()
    url = httpx.URL(served.url)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    )
    head += "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode())
    end = time.monotonic() + 100
    while gone() == before:
        assert time.monotonic() < end
        time.sleep(0.02)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)
)
OBJECTS = st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
VALUES = SCALARS | OBJECTS | st.lists(SCALARS | OBJECTS, max_size=3)
FIELDS = sorted({*bodies.CHAT, *bodies.COMPLETION, *bodies.RESPONSE, "other"})


@settings(**FIXED, max_examples=60)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_hostile_bodies_are_answered_or_refused(body):
    for known, rest in (
        (bodies.CHAT, lambda body: (messages.messages(body), messages.tools(body))),
        (bodies.COMPLETION, bodies.prompts),
        (bodies.RESPONSE, messages.input_messages),
    ):
        try:
            bodies.settings(body, known, (256,))
            rest(body)
        except bodies.Wrong as error:
            assert str(error)


@pytest.mark.slow
def test_many_mixed_requests_lose_nothing_and_no_memory(served):
    """600 requests of 16 clients, some of which hang up, each answer checked."""
    calls = [
        {"prompt": "y" * (i % 9 + 1), "max_tokens": 3 + 7 * (i % 4), "seed": i, "temperature": i % 2}
        for i in range(12)
    ]  # fmt: skip
    alone = [complete(served, **call).choices[0].text for call in calls]

    def one(i):
        call = calls[i % 12]
        if i % 5 == 4:
            stream = complete(served, **{**call, "max_tokens": 200}, stream=True)
            next(iter(stream))
            stream.close()
        elif i % 5 == 3:
            events = complete(served, **call, stream=True)
            assert "".join(e.choices[0].text for e in events) == alone[i % 12]
        elif i % 5 == 2:
            assert (
                served.http.post("/v1/completions", json={"prompt": i}).status_code
                == 400
            )
        else:
            assert complete(served, **call).choices[0].text == alone[i % 12]

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    sizes = []
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, 600, 200):
            assert len([*pool.map(one, range(first, first + 200))]) == 200
            gc.collect()
            sizes.append(resident())
    assert sizes[-1] - sizes[1] < 16, sizes


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_chat_page_shows_an_answer_and_an_error(served, tmp_path):
    with Browser(tmp_path) as browser:
        browser.call("Page.navigate", url=served.url)
        browser.wait_for_load()
        browser.evaluate(f"sessionStorage.setItem('key', '{KEY}')")
        texts = "[...document.querySelectorAll('.message')].map((e) => e.textContent)"

        def send(text):
            browser.evaluate(
                f"byId('text').value = {json.dumps(text)}; byId('send').click()"
            )
            ended = "new Promise((f) => {const t = setInterval(() => {"
            ended += "if (!running) {clearInterval(t); f(0)}}, 20)})"
            browser.evaluate(ended)
            return browser.evaluate(texts)

        shown = send("<b>Hi")
        assert shown[0] == "<b>Hi" and len(shown[1]) > 0
        assert browser.evaluate("document.querySelectorAll('.message b').length") == 0
        assert "the prompt has" in send("x" * 300)[-1]
        assert browser.evaluate("byId('text').value") == "x" * 300  # to send again
        assert (
            browser.evaluate(
                "dispatchEvent(new Event('beforeunload', {cancelable: true}))"
            )
            is False
        )  # The browser asks first.
        # Nothing but this server is asked, and the console holds the refusal only.
        urls = [one for one in browser.problems if isinstance(one, str)]
        assert all(url.startswith(served.url) for url in urls) and len(urls) >= 2
        entries = [one for one in browser.problems if not isinstance(one, str)]
        assert all("400" in one.get("text", "") or "favicon" in one.get("url", "") for one in entries)  # fmt: skip
