"""Passes the connections of a process on to the coordinator, and hides that it is gone.

JAX aborts a process in C++ at the moment in which its connection with the coordinator
breaks, as when the machine of process 0 disappears. So each process is connected with
this program, on its own machine, which keeps the connection open: nothing is heard any
more, and the process ends itself with a line that says so.

It is run as a file, `python relay.py HOST:PORT`, with the coordinator's address. It
prints the path of the socket at which it listens, for which gRPC asks no proxy, and
ends when its standard input does. A connection that breaks before the first line of
that input is closed, so that JAX tries again.
"""

import contextlib
import signal
import socket
import sys
import tempfile
import threading

_BYTES = 1 << 16


def main() -> None:
    """Serves until standard input ends."""
    # Whoever stops the run stops its processes, which may still save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    host, _, port = sys.argv[1].rpartition(":")
    is_connected = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="jaxlm-") as folder,
        socket.socket(socket.AF_UNIX) as server,
    ):
        server.bind(f"{folder}/relay")
        server.listen()
        print(f"{folder}/relay", flush=True)
        arguments = server, (host.strip("[]"), int(port)), is_connected
        threading.Thread(target=_serve, args=arguments, daemon=True).start()
        if sys.stdin.readline():
            is_connected.set()
        sys.stdin.read()


def _serve(
    server: socket.socket, coordinator: tuple[str, int], is_connected: threading.Event
) -> None:
    while True:
        near, _ = server.accept()
        arguments = near, coordinator, is_connected
        threading.Thread(target=_pass_on, args=arguments, daemon=True).start()


def _pass_on(
    near: socket.socket, coordinator: tuple[str, int], is_connected: threading.Event
) -> None:
    """Passes on what the process says, until it closes its connection."""
    with near:
        try:
            far = socket.create_connection(coordinator)
        except OSError:
            return
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        arguments = far, near, is_connected
        threading.Thread(target=_pass_back, args=arguments, daemon=True).start()
        with far, contextlib.suppress(OSError):
            while data := near.recv(_BYTES):
                with contextlib.suppress(OSError):  # It is gone: nobody hears.
                    far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)


def _pass_back(
    far: socket.socket, near: socket.socket, is_connected: threading.Event
) -> None:
    with contextlib.suppress(OSError):
        while data := far.recv(_BYTES):
            near.sendall(data)
    if not is_connected.is_set():
        with contextlib.suppress(OSError):
            near.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
