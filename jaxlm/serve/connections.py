"""Connections of clients: how many there may be, and how long one may ask for nothing.

uvicorn bounds neither: clients that connect and send nothing would take all the files
that a process may have open, and nobody else could connect.
"""

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# An idle connection is kept longer than clients keep it (OpenAI's: 5 s). A server that
# closes first may do so while a request is on its way, which is then reset.
KEEP_ALIVE_SECONDS = 75
_MOST = 100_000
_READ_BYTES = 8192
_NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class _Connection(H11Protocol):
    """A connection that is closed if it is idle too long, or if others need its place.

    It is idle until all of the head of a request is there, after the answer, and while
    its client does not read what is written. Others may also have its place until all
    of the body is there.
    """

    def __init__(self, *arguments: Any, most: int, idle_seconds: float, **more: Any):
        super().__init__(*arguments, **more)
        self._most, self._idle_seconds = most, idle_seconds
        self._timer: asyncio.TimerHandle | None = None

    def _is_idle(self) -> bool:
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered or self.flow.write_paused

    def _is_waiting(self) -> bool:
        return self._is_idle() or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A body in chunks of a byte takes 20 us for each: others come between.
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._wait()
        others = [c for c in self.connections if not c.transport.is_closing()]
        if len(others) > self._most:
            mine = (c for c in others if isinstance(c, _Connection))
            waiting = [c for c in mine if c._is_waiting()]
            min(waiting, key=_Connection._end).transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._is_idle():
            self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may find the next request
        if self._is_idle():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _end(self) -> float:
        return self._timer.when() if self._timer else 0.0

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self._idle_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Binds a socket to each address that a host has, and closes them at the end.

    None listens yet: until the model is loaded, connections are refused.

    Raises:
      ValueError: if it has none, or something else listens there.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = {(family, address) for family, *_, address in found}
            sockets = []
            for family, address in sorted(addresses):
                try:
                    one = stack.enter_context(socket.socket(family))
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    one.bind(address)
                    sockets.append(one)
                except OSError as error:
                    # Many containers name ::1 localhost, and have no IPv6.
                    if len(addresses) == 1 or error.errno not in _NO_ADDRESS:
                        raise
        except OSError as error:
            reason = str(error.strerror).partition(" (")[0]
            raise ValueError(
                f"--port {port} of {host} cannot be used ({reason}): give another one"
            ) from None
        yield sockets


def connection_options(
    most: int | None = None, idle_seconds: float = KEEP_ALIVE_SECONDS
) -> dict[str, Any]:
    """Returns the arguments of `uvicorn.Config` that bound connections.

    Args:
      most: the number of connections; for a new one, the one that has asked for
        nothing for the longest time is closed. None: as many as there are files that
        this process may still open, but for a quarter, for all else that it opens.
      idle_seconds: how long one may ask for nothing.
    """
    if most is None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = limit - len(os.listdir("/dev/fd"))
        most = _MOST if limit == resource.RLIM_INFINITY else min(free * 3 // 4, _MOST)
    return {
        "http": partial(_Connection, most=max(most, 1), idle_seconds=idle_seconds),
        # Its transports say how much they read at once.
        "loop": "asyncio",
        "ws": "none",
        "timeout_keep_alive": idle_seconds,
        # As many may be accepted before one is closed for them.
        "backlog": min(max(most // 8, 1), 2048),
    }
