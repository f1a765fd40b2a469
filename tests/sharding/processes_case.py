"""A process of several, in a program of its own, that waits for a file `end`."""

import sys
import time
from pathlib import Path

from jaxlm.config import ProcessesConfig
from jaxlm.sharding.processes import connect


def run(port, count, index, minutes=30.0):
    """Prints the process id of its coordinator, if it has one, when all have started."""
    config = ProcessesConfig(
        coordinator=f"localhost:{port}",
        count=count,
        index=index,
        heartbeat_seconds=1.0,
        barrier_minutes=minutes,
    )
    try:
        processes = connect(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with processes:
        pid = processes._service.pid if processes.is_first else "none"
        print("coordinator", pid, flush=True, file=sys.__stdout__)
        while not Path("end").exists():
            time.sleep(0.05)
