"""The server, in a thread, with OpenAI's own client and with hostile bodies."""

import gc
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import jax
import jsonschema
import openai
import pytest
import uvicorn
from browser_case import CHROMIUM, Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_case import make_params, toy

from jaxlm.config import MeshConfig
from jaxlm.infer.engine import Engine
from jaxlm.infer.generate import generate
from jaxlm.serve import bodies
from jaxlm.serve.app import Limits, Server
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
    """A server with four slots; at most 24 requests, bodies of 20,000 bytes."""

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
        worker = Worker(engine, 24)
    limits = Limits(body_bytes=20_000, seconds=60.0)
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
        httpx.Client(base_url=url, headers=headers, timeout=60) as http,
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


def test_a_chat_answers_with_a_schema(served):
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
    until = time.monotonic() + 20
    while served.worker.num_requests and time.monotonic() < until:
        time.sleep(0.05)
    assert served.worker.num_requests == 0
    text = served.http.get("/metrics").text
    assert (
        "jaxlm_requests_open 0.0" in text
        and 'jaxlm_requests_total{status="200"}' in text
    )


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
    ({"n": 16, "prompt": ["a", "b"]}, 503, "too many requests"),
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
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(served.url + path).status_code == 401
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}
    page = httpx.get(served.url)
    policy = page.headers["Content-Security-Policy"]
    nonce = re.search("nonce-([^']+)", policy)[1]
    assert policy.startswith("default-src 'none'") and page.text.count(nonce) == 2
    assert "http" not in page.text


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)
)
OBJECTS = st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
VALUES = SCALARS | OBJECTS | st.lists(SCALARS | OBJECTS, max_size=3)
FIELDS = sorted({*bodies.CHAT, *bodies.COMPLETION, "other"})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_hostile_bodies_are_answered_or_refused(body):
    for known, rest in (
        (bodies.CHAT, bodies.messages),
        (bodies.COMPLETION, bodies.prompts),
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
        # Nothing but this server is asked, and the console holds the refusal only.
        urls = [one for one in browser.problems if isinstance(one, str)]
        assert all(url.startswith(served.url) for url in urls) and len(urls) >= 2
        entries = [one for one in browser.problems if not isinstance(one, str)]
        assert all("400" in one.get("text", "") or "favicon" in one.get("url", "") for one in entries)  # fmt: skip
