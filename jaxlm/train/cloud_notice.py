"""Notices by which a cloud tells a machine that it will be taken away.

Machines of Google Compute Engine and Amazon EC2 ask their metadata server, which only
they reach. On any other machine nothing is asked.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path

# What a machine's firmware says about its maker.
_FIRMWARE = Path("/sys/class/dmi/id")
_GOOGLE_HOST, _AMAZON_HOST = "metadata.google.internal", "169.254.169.254"
# The shortest notice, that of a preempted machine of Google, comes 30 s before.
_TICK_SECONDS, _TIMEOUT_SECONDS = 5.0, 2.0


class CloudNotice(contextlib.AbstractContextManager):
    """Watches for a notice, in a thread; use it as a context manager.

    One that was there before does not count: a run that is started again on a machine
    with an hour left goes on until a signal ends it. A server that does not answer is
    asked again.
    """

    def __init__(self):
        self.text: str | None = None
        """The notice, since there is one."""
        self._over = threading.Event()

    def __enter__(self) -> "CloudNotice":
        ask = _find_source()
        if ask is not None:
            threading.Thread(target=self._watch, args=(ask,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def _watch(self, ask: Callable[[], str | None]) -> None:
        answers: list[str | None] = []  # the last two
        while not self._over.is_set():
            with contextlib.suppress(OSError, HTTPException):
                answers = [*answers[-1:], ask()]
            if answers and answers[-1] not in (None, answers[0]):
                # Said before what the run then says about its end.
                line = f"{answers[-1]}: stopping after this step and saving"
                with contextlib.suppress(OSError):  # The terminal may be gone.
                    print(line, file=sys.stderr, flush=True)
                self.text = answers[-1]
                return
            self._over.wait(_TICK_SECONDS)


def _find_source() -> Callable[[], str | None] | None:
    """Returns what asks this machine's cloud for a notice; None: it is in none."""
    if host := os.environ.get("GCE_METADATA_HOST"):  # as Google's own tools read it
        return lambda: _google_notice(host)
    if "Google" in _firmware("product_name"):
        return lambda: _google_notice(_GOOGLE_HOST)
    if "Amazon EC2" in _firmware("sys_vendor"):
        return _amazon_notice
    return None


def _firmware(name: str) -> str:
    with contextlib.suppress(OSError):  # There is no such file.
        return (_FIRMWARE / name).read_text()
    return ""


def _google_notice(host: str) -> str | None:
    """https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice."""
    for key, value in (
        ("preempted", "TRUE"),
        # A machine that is only moved goes on.
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
    ):
        path = f"/computeMetadata/v1/instance/{key}"
        if _request(host, "GET", path, {"Metadata-Flavor": "Google"}) == value:
            return f"Google's notice {key} {value}"
    return None


def _amazon_notice() -> str | None:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html."""
    prefix = "X-aws-ec2-metadata-token"
    lifetime = {f"{prefix}-ttl-seconds": "60"}
    token = _request(_AMAZON_HOST, "PUT", "/latest/api/token", lifetime)
    path, headers = "/latest/meta-data/spot/instance-action", {prefix: token or ""}
    action = _request(_AMAZON_HOST, "GET", path, headers)
    return action and f"Amazon's notice {action}"


def _request(host: str, method: str, path: str, headers: dict[str, str]) -> str | None:
    """Returns the answer; None if there is nothing under this path."""
    connection = HTTPConnection(host, timeout=_TIMEOUT_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        text = answer.read(1000).decode(errors="replace")
    return text.strip() if answer.status == 200 else None
