"""Clients that connect and ask for nothing, or slowly, keep nobody else out."""

import asyncio
import resource
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from toy_case import toy

from jaxlm.serve.app import Limits, Server
from jaxlm.serve.connections import _Connection, bound, connection_options
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
BODY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
BODY += b"Content-Type: application/json\r\n\r\n{"


@pytest.fixture
def connect(request, monkeypatch):
    """Starts a server without a model, and returns a function that connects to it."""
    worker: Any = SimpleNamespace(failure=None, num_requests=0)
    app = Server(
        *("tiny", toy(), ByteTokenizer(), worker),
        max_length=64,
        num_slots=1,
        limits=Limits(body_seconds=request.param),
    ).app
    options = connection_options(most=4, idle_seconds=600.0)
    config = uvicorn.Config(app, port=0, log_level="error", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    with ExitStack() as stack:

        def start(data=b""):
            connection = stack.enter_context(socket.create_connection(address))
            connection.settimeout(300)
            connection.sendall(data)
            return connection

        yield start
    server.should_exit = True
    thread.join()


def received(connection):
    """What comes until the server closes the connection."""
    data = b""
    try:
        while part := connection.recv(4096):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("connect", [600.0], indirect=True)
def test_silent_clients_keep_nobody_out_and_are_closed(connect, monkeypatch):
    slow = [connect(BODY) for _ in range(6)]
    silent = [connect(HEAD) for _ in range(2)]
    asking = connect(HEAD + b"\r\n")
    assert asking.recv(4096).startswith(b"HTTP/1.1 200 OK")
    assert [received(connection) for connection in slow[:2]] == [b""] * 2
    # All has been sent: the server's clock may run, a thousand times as fast.
    now, begin = asyncio.BaseEventLoop.time, time.monotonic()
    monkeypatch.setattr(
        *(asyncio.BaseEventLoop, "time"),
        lambda loop: begin + 1000 * (now(loop) - begin),
    )
    assert [received(connection) for connection in silent] == [b""] * 2
    received(asking)  # It is idle again.


@pytest.mark.parametrize("connect", [600.0], indirect=True)
def test_clients_that_do_not_read_keep_nobody_out(connect, monkeypatch):
    paused, pause = threading.Semaphore(0), _Connection.pause_writing
    monkeypatch.setattr(
        _Connection, "pause_writing", lambda c: (pause(c), paused.release())
    )

    def ask():
        # More pages than the buffers hold; the rest is never sent.
        connection = connect()
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                connection.sendall((b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") * 100)
        paused.acquire()

    for _ in range(5):  # four have a place
        ask()
    asking = connect(HEAD + b"\r\n")
    assert asking.recv(4096).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("connect", [600.0], indirect=True)
def test_a_body_in_small_chunks_is_read_in_turns_with_others(connect, monkeypatch):
    sizes, receive = [], _Connection.data_received
    monkeypatch.setattr(
        *(_Connection, "data_received"),
        lambda c, data: (sizes.append(len(data)), receive(c, data)),
    )
    head = BODY.replace(b"Content-Length: 99", b"Transfer-Encoding: chunked")
    connection = connect(head[:-1] + b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert sum(sizes) > 50_000 and max(sizes) <= 8192


@pytest.mark.parametrize("connect", [0.2], indirect=True)
def test_a_body_that_does_not_come_is_not_waited_for(connect):
    connection, answer = connect(BODY), b""
    while b"took more than 0.2 s" not in answer:
        answer += (part := connection.recv(4096))
        assert part, answer
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_port_that_is_taken_is_told():
    with bound("localhost", 0) as sockets:
        sockets[0].listen()
        host, port, *_ = sockets[0].getsockname()
        with pytest.raises(ValueError, match=rf"--port {port} of .* in use"):
            bound(host, port).__enter__()
    with pytest.raises(ValueError, match="cannot be used"):
        bound("none.invalid", 80).__enter__()


def test_the_number_of_connections_follows_from_that_of_files(monkeypatch):
    def most(limit):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        options = connection_options()
        assert 0 < options["backlog"] <= 2048
        return options["http"].keywords["most"]

    assert most(120) < 120 * 3 / 4 < most(1024) < 1024 * 3 / 4
    assert most(resource.RLIM_INFINITY) == 100_000 and most(1) == 1
