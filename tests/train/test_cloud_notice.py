"""A cloud's notices, from a server like that of a cloud, in this process."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxlm.terminal.exit_codes import EXIT_PREEMPTED
from jaxlm.train import cloud_notice
from jaxlm.train.stopping import StopRequest

GOOGLE = "/computeMetadata/v1/instance/"
AMAZON = "/latest/meta-data/spot/instance-action"
TOKEN = "X-aws-ec2-metadata-token"
ACTION = '{"action": "terminate", "time": "2026-11-27T08:22:00Z"}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        asks = {self.headers.get("Metadata-Flavor"), self.headers.get(TOKEN)}
        self.answer(self.server.values.get(self.path), asks & {"Google", "a token"})

    def do_PUT(self):
        is_right = (
            self.path == "/latest/api/token" and self.headers[f"{TOKEN}-ttl-seconds"]
        )
        self.answer("a token", is_right)

    def answer(self, text, allowed):
        self.send_response(403 if not allowed else 404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Firmware that names no cloud, and a server that knows `values`."""
    monkeypatch.setattr(cloud_notice, "_FIRMWARE", tmp_path)
    monkeypatch.setattr(cloud_notice, "_TICK_SECONDS", 0.01)
    # An answer that is given up would be no answer, and its requests are counted.
    monkeypatch.setattr(cloud_notice, "_TIMEOUT_SECONDS", 600.0)
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        server.values, server.asked = {}, 0
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setattr(
            cloud_notice, "_AMAZON_HOST", f"localhost:{server.server_port}"
        )
        yield server
        server.shutdown()


def wait_until(is_so):
    end = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def wait_for_an_answer(server):
    """So many requests that all of one answer have begun after this call."""
    seen = server.asked
    wait_until(lambda: server.asked > seen + 4)


@pytest.fixture
def google(cloud, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{cloud.server_port}")
    cloud.values |= {
        f"{GOOGLE}preempted": "FALSE",
        f"{GOOGLE}maintenance-event": "NONE",
    }
    return cloud


def check_stops(server, path, value, capsys):
    with StopRequest() as stop:
        wait_for_an_answer(server)
        assert not stop.is_requested()
        server.values[f"{GOOGLE}maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        wait_for_an_answer(server)
        assert not stop.is_requested()
        server.values[path] = value
        wait_until(stop.is_requested)
    assert (stop.exit_code, stop.by_signal) == (EXIT_PREEMPTED, True)
    (line,) = capsys.readouterr().err.splitlines()
    assert value in line and "stopping after this step and saving" in line


@pytest.mark.parametrize(
    "key, value",
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_google_preempts_or_maintains(google, capsys, key, value):
    check_stops(google, GOOGLE + key, value, capsys)


def test_amazon_takes_a_spot_instance(cloud, tmp_path, capsys):
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    check_stops(cloud, AMAZON, ACTION, capsys)


def test_a_notice_that_was_there_before_stops_nothing(google):
    """A run that is started again on the same machine would end again and again."""
    google.values[f"{GOOGLE}maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    with StopRequest() as stop:
        wait_for_an_answer(google)
        assert not stop.is_requested()
        google.values[f"{GOOGLE}preempted"] = "TRUE"
        wait_until(stop.is_requested)


def test_a_server_that_is_not_there_is_asked_again(google, monkeypatch):
    request, failures = (
        cloud_notice._request,
        iter([OSError, cloud_notice.HTTPException]),
    )

    def failing(*arguments):
        for failure in failures:
            raise failure
        return request(*arguments)

    monkeypatch.setattr(cloud_notice, "_request", failing)
    with StopRequest() as stop:
        wait_for_an_answer(google)
        google.values[f"{GOOGLE}preempted"] = "TRUE"
        wait_until(stop.is_requested)


def test_any_other_machine_asks_nothing(cloud, tmp_path, monkeypatch):
    (tmp_path / "product_name").write_text("20XW0026GE\n")
    watched = []
    monkeypatch.setattr(
        cloud_notice.CloudNotice, "_watch", lambda *a: watched.append(a)
    )
    with cloud_notice.CloudNotice():
        assert not watched
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    with cloud_notice.CloudNotice():
        wait_until(lambda: watched)
