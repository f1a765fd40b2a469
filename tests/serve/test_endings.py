"""What ends an answer or the server: time, a failed engine, a signal; and who may ask."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.checkpoint.save import save
from jaxlm.commands import serve
from jaxlm.flags.arguments import ServeArguments
from jaxlm.infer.slots.slot_request import NewTokens
from jaxlm.serve.app import Limits, Server
from jaxlm.serve.connections import bound
from jaxlm.serve.worker import Worker
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

CONFIG = toy(vocab_size=257, num_layers=1, context_length=256)


def ask(worker, *bodies):
    """Sends bodies one after another; returns their responses, and that of /health."""
    app = Server(
        *("tiny", CONFIG, ByteTokenizer(), worker),
        max_length=64,
        num_slots=1,
        limits=Limits(seconds=600.0),
    ).app

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://[::1]"
        ) as http:
            answers = [await http.post("/v1/completions", json=b) for b in bodies]
            return *answers, await http.get("/health")

    return asyncio.run(send())


def one_token():
    """What a step gives for a request that goes on."""
    top = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)
    token = np.array([97], np.int32), np.zeros(1, np.float32)
    return NewTokens(0, *token, *top, ended=None, trace={})


def test_an_answer_that_takes_too_long_is_ended(monkeypatch):
    closed = []

    async def run(request):
        try:
            if len(request.tokens) == 2:
                yield one_token()
            # However long all else takes: now the time is over.
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(loop, "time", lambda now=loop.time: now() + 1000)
            await asyncio.Event().wait()
        finally:
            closed.append(len(request.tokens))

    worker: Any = SimpleNamespace(failure=None, num_requests=0, max_requests=1, run=run)
    body = {"max_tokens": 9, "temperature": 0}
    whole, late, begun, health = ask(
        worker,
        *({"prompt": "a", **body}, {"prompt": "a", "stream": True, **body}),
        {"prompt": "ab", "stream": True, **body},
    )
    message = "the answer took more than 600 s"
    for response in (whole, late):
        assert response.status_code == 504
        assert response.json()["error"]["message"] == message
    # A stream that has begun ends with an event that says so.
    events = [x for x in begun.text.splitlines() if x.startswith("data: {")]
    assert begun.status_code == 200 and json.loads(events[0][6:])["choices"]
    assert json.loads(events[-1][6:])["error"]["message"] == message
    assert closed == [1, 1, 2] and health.status_code == 200


def test_a_failed_engine_is_told_to_all_who_ask(caplog):
    workers = []

    def engine():
        while not (workers and workers[0].num_requests):
            time.sleep(0.001)
        raise RuntimeError("no device")

    workers.append(worker := Worker(engine, 4))
    body = {"prompt": "a", "max_tokens": 2}
    first, second, health = ask(worker, body, body)
    worker.stop()
    for response in (first, second):
        assert response.status_code == 500
        assert "the engine has stopped: no device" in response.text
    assert caplog.messages == ["the engine has stopped: no device"]
    assert health.status_code == 503 and health.json() == {"status": "failed"}


def test_an_engine_that_fails_later_ends_the_answers_that_run():
    steps = []

    def step():
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError("the device is gone")
        return [one_token()]

    def submit(_request):
        engine.is_idle = False
        return 0

    engine: Any = SimpleNamespace(
        is_idle=True, compile_next=lambda: False, submit=submit, step=step
    )
    worker = Worker(lambda: engine, 4)
    body = {"prompt": "a", "max_tokens": 9}
    begun, later, health = ask(worker, {**body, "stream": True}, body)
    worker.stop()
    events = [x for x in begun.text.splitlines() if x.startswith("data: {")]
    assert begun.status_code == 200 and json.loads(events[0][6:])["choices"]
    message = "the engine has stopped: the device is gone"
    assert json.loads(events[-1][6:])["error"]["message"] == message
    assert later.status_code == 500 and message in later.text
    assert health.status_code == 503 and len(steps) == 2


@pytest.mark.parametrize("key", ["", "two words", "key\n", "schlüssel"])
def test_a_key_that_nobody_can_send_is_refused(key, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLM_API_KEY", key)
    for given in (None, key):
        with pytest.raises(ValueError, match="JAXLM_API_KEY, is empty or"):
            serve.main(ServeArguments(src=str(tmp_path), api_key=given))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_other_machines_need_a_key(monkeypatch, tmp_path, host):
    monkeypatch.delenv("JAXLM_API_KEY", raising=False)
    with pytest.raises(ValueError) as error:
        serve.main(ServeArguments(src=str(tmp_path), host=host))
    assert f"--host {host} lets other machines in: give --api-key" in str(error.value)


@pytest.mark.parametrize("way", ["flag", "variable", "loopback"])
def test_with_a_key_or_on_loopback_the_model_is_opened(monkeypatch, tmp_path, way):
    monkeypatch.delenv("JAXLM_API_KEY", raising=False)
    if way == "variable":
        monkeypatch.setenv("JAXLM_API_KEY", "secret")
    host = {} if way == "loopback" else {"host": "0.0.0.0"}
    key = {"api_key": "secret"} if way == "flag" else {}
    # What comes after the check of who may ask.
    with pytest.raises(ValueError, match="none is not a checkpoint"):
        serve.main(ServeArguments(src=str(tmp_path / "none"), **host, **key))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_answers_that_run_end(tmp_path, number):
    save(tmp_path / "tiny", CONFIG, make_params(CONFIG, std=0.5), ByteTokenizer())
    with bound("127.0.0.1", 0) as (free,):
        port = free.getsockname()[1]
    command = ["-m", "jaxlm.cli", "serve", str(tmp_path / "tiny"), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE)
    body = {"prompt": "ab", "max_tokens": 200, "temperature": 0, "stream": True}
    try:
        assert process.stderr is not None
        while f"http://127.0.0.1:{port}".encode() not in process.stderr.readline():
            assert process.poll() is None
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(transport=transport, timeout=600) as client:
            url = f"http://127.0.0.1:{port}/v1/completions"
            with client.stream("POST", url, json=body) as response:
                lines = response.iter_lines()
                text = [next(lines)]
                process.send_signal(number)
                text += [line for line in lines if line]
        assert process.wait(600) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    assert text[-1] == "data: [DONE]"
    *_, last = (
        json.loads(line[6:]) for line in text[:-1] if line.startswith("data: {")
    )
    assert last["choices"][0]["finish_reason"] == "length"
