"""The coordinator of several processes, as a program of its own.

JAX runs it inside process 0, and ends every other process with an abort in C++ at the
moment in which that one is gone. Apart from it, the coordinator lives a while longer:
long enough for the others to find out, and to end with a line that says so.

It is run as a file, `python coordinator.py HOST:PORT COUNT LINGER_SECONDS`: importing
the package would take longer than all else. It prints a line when it is ready, and ends
when its standard input does, at once after a line, else after LINGER_SECONDS.
"""

import signal
import sys
import time

# A process is declared dead or late by the others (`processes.py`), never by JAX.
NEVER_SECONDS = 10**6


def main() -> None:
    """Serves until standard input ends."""
    # Whoever stops the run stops its processes, which may still save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import jaxlib._jax as _jax

    address, count, linger = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    service = _jax.get_distributed_runtime_service(
        address,
        count,
        heartbeat_timeout=NEVER_SECONDS,
        cluster_register_timeout=NEVER_SECONDS,
        # Else JAX ends all when a process joins with an index that another one has.
        recoverable=True,
    )
    print("ready", flush=True)
    if not sys.stdin.readline():
        time.sleep(linger)
    service.shutdown()


if __name__ == "__main__":
    main()
