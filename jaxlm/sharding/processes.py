"""The processes of a run: how they start, agree, wait for each other, and end.

`ALONE` is the usual case, in which everything here returns at once. On several hosts
the processes talk through JAX's coordination service, of which they use the store of
texts alone. They never use the devices for it, so a background thread may do so too.

Each process shows that it lives. One that is gone, or has failed, ends the others with
one line, since they would wait for it in the next collective operation.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import jax
import jaxlib._jax as _jax
from jax._src import distributed
from jax.errors import JaxRuntimeError
from jax.sharding import PartitionSpec as P

from jaxlm.config import ProcessesConfig
from jaxlm.sharding import coordinator, relay
from jaxlm.sharding.cluster import Cluster, find_cluster
from jaxlm.terminal.exit_codes import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PROCESS_LOST,
    EXIT_USAGE,
)
from jaxlm.terminal.printable import error_line
from jaxlm.terminal.room import has_room

T = TypeVar("T")
# Seconds between two looks at what the others have written.
_TICK_SECONDS = 0.25
# A process that sees another one fail has this long to fail in its own words.
_GRACE_SECONDS = 3.0
# A process that takes this many times as long as any point of the run before hangs.
_SLOWER = 10
_ALIVE, _NOTICES = "jaxlm/alive/", "jaxlm/notices/"
_PLACES, _LEFT = "jaxlm/places/", "jaxlm/left/"


class ProcessFailed(ValueError):
    """Another process could not do its part; message and exit code are its own."""

    def __init__(self, index: int, code: int, line: str):
        super().__init__(f"process {index}: {line}")
        self.index, self.exit_code = index, code


class ProcessMissing(ValueError):
    """Another process did not come to a barrier in time."""


class PlaceLost(ValueError):
    """The run is about to end: the process whose index this one has is gone."""

    exit_code = EXIT_PROCESS_LOST


class Processes(contextlib.AbstractContextManager):
    """The processes of a run, as one of them sees them.

    Use it as a context manager around all that may use devices. All its methods must be
    called in the same order in each process, those with the same name at least.
    """

    def __init__(self, cluster: Cluster | None, config: ProcessesConfig):
        """Connects to the coordinator; call it before JAX uses a device.

        Args:
          cluster: None if this process is alone.
          config: the time limits.

        Raises:
          PlaceLost: if the coordinator is that of a run that is about to end.
          ValueError: if it cannot be started or reached, or refuses this process.
        """
        self.index, self.count = 0, 1
        self._limit_s = 60 * config.barrier_minutes
        self._heartbeat_s = config.heartbeat_seconds
        self._uses: Counter[str] = Counter()
        self._agreements: dict[str, Agreement] = {}
        self._leaving = threading.Event()
        # How many points of the program this process has reached; of the one that has
        # reached least, how many, since when, and the longest time for one so far.
        self._points = 0
        self._least, self._least_since_s, self._longest_s = 0, 0.0, 0.0
        self._looked_s = math.inf
        if cluster is not None:
            self.index, self.count = cluster.index, cluster.count
            self._connect(cluster)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes what is written once."""
        return self.index == 0

    def _connect(self, cluster: Cluster) -> None:
        if cluster.local_devices:
            visible = ",".join(map(str, cluster.local_devices))
            jax.config.update("jax_cuda_visible_devices", visible)
            jax.config.update("jax_rocm_visible_devices", visible)
        if self.is_first:
            self._service = _start_coordinator(
                cluster, self._limit_s, 2 * self._heartbeat_s
            )
        self._relay, path = _start(relay, cluster.coordinator)
        if not path:
            raise ValueError(
                f"no socket can be made in {tempfile.gettempdir()}: set TMPDIR to a "
                "folder with a short path that can be written"
            )
        self._client = self._client_at(f"unix:{path}")
        self._reach(cluster)
        assert self._relay.stdin is not None
        self._relay.stdin.write(b"connected\n")
        self._relay.stdin.flush()
        try:
            self._take_place(cluster.coordinator)
        except ValueError:
            # C++ would end this process when the relay does.
            with contextlib.suppress(JaxRuntimeError):
                self._client.shutdown()
            raise
        # What `jax.distributed.initialize` sets, which would start the coordinator in
        # this process.
        state = distributed.global_state
        state.client, state.coordinator_address = self._client, cluster.coordinator
        state.process_id, state.num_processes = cluster.index, cluster.count

    def _client_at(self, address: str) -> Any:
        return _jax.get_distributed_runtime_client(
            address,
            self.index,
            # JAX would end the process in C++.
            init_timeout=coordinator.NEVER_SECONDS,
            heartbeat_timeout=coordinator.NEVER_SECONDS,
            # Without one, C++ ends a process that is refused. JAX cannot convert the
            # error that it would get: `connect` raises a RuntimeError in its place.
            missed_heartbeat_callback=lambda *_: None,
            # One that fails leaves at once.
            shutdown_on_destruction=False,
            use_compression=True,
        )

    def _reach(self, cluster: Cluster) -> None:
        """Waits until all have started."""
        failed: list[str] = []
        refused = threading.Event()

        def connect() -> None:
            try:
                self._client.connect()
            except JaxRuntimeError as error:
                failed.append(error_line(error, 120))
            except RuntimeError:
                refused.set()

        connecting = threading.Thread(target=connect, daemon=True)
        connecting.start()
        connecting.join(self._limit_s)
        if refused.is_set():
            raise ValueError(
                f"process {cluster.index} of {cluster.count} is refused by process 0 "
                f"at {cluster.coordinator}: another process has processes.index "
                f"{cluster.index} too, or process 0 another processes.count"
            )
        if failed or connecting.is_alive():
            raise ValueError(
                f"process {cluster.index} of {cluster.count} cannot reach process 0 at "
                f"{cluster.coordinator}, or not all have started within "
                f"{self._limit_s / 60:g} minutes{f' ({failed[0]})' if failed else ''}"
            )

    def _take_place(self, address: str) -> None:
        """Enters this process: the coordinator lets in who comes late or twice."""
        place = f"{_PLACES}{self.index}"
        try:
            self._client.key_value_set(place, socket.gethostname())
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        else:
            return
        until_s, beat = time.monotonic() + self._heartbeat_s, self._beat_of(self.index)
        while self._beat_of(self.index) == beat:
            if time.monotonic() > until_s:
                raise PlaceLost(
                    f"process {self.index} of the run at {address} is "
                    "gone, and the others are about to end; the same command "
                    "continues from the last checkpoint then"
                )
            self._leaving.wait(_TICK_SECONDS)
        raise ValueError(
            f"the run at {address} has a process {self.index}, on "
            f"{self._client.key_value_try_get(place)}: give another processes.index, "
            "or another processes.coordinator for a run of its own"
        )

    # Agreeing

    def gather(self, name: str, value: Any = None) -> list[Any]:
        """Waits for all processes and returns the value of each, of types of JSON.

        Raises:
          ProcessMissing: if one does not come within the time limit.
        """
        if self.count == 1:
            return [value]
        use, self._uses[name] = self._uses[name], self._uses[name] + 1
        key, until_s = f"jaxlm/{name}/{use}", time.monotonic() + self._limit_s
        self._client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        try:
            if self.is_first:
                self._give_to_all(key, until_s)
            values = self._wait_for(key, until_s)
        except JaxRuntimeError as error:
            missing = [i for i in range(self.count) if i not in self._read(f"{key}/")]
            if not missing:
                raise
            some = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
            raise ProcessMissing(
                f"{name}: process{'es' * (len(missing) > 1)} {some} of {self.count} "
                f"did not come within {self._limit_s / 60:g} minutes"
            ) from error
        if self.is_first and use:
            # All have come here, so they have read what was before.
            self._client.key_value_delete(f"jaxlm/{name}/{use - 1}")
        return json.loads(values)

    def _give_to_all(self, key: str, until_s: float) -> None:
        """Writes the values of all under `key`.

        JAX's own barriers fail where another process with an index of this run joins.
        """
        values = self._read(f"{key}/")
        while missing := [i for i in range(self.count) if i not in values]:
            self._wait_for(f"{key}/{missing[0]}", until_s)
            values = self._read(f"{key}/")
        texts = ",".join(values[i] for i in range(self.count))
        self._client.key_value_set(key, f"[{texts}]")

    def _wait_for(self, key: str, until_s: float) -> str:
        left_ms = max(1, int(1000 * (until_s - time.monotonic())))
        return self._client.blocking_key_value_get(key, left_ms)

    def _read(self, folder: str) -> dict[int, str]:
        items = self._client.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): value for key, value in items}

    def together(self, name: str, work: Callable[[], T]) -> T:
        """Calls `work` in each process and waits until all have done it.

        Raises:
          ProcessFailed: if it has failed in another process only. What it raises here
            is raised as it is.
          ProcessMissing: as `gather`.
        """
        if self.count == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            self.gather(name, _ending(error))
            raise
        for index, ending in enumerate(self.gather(name)):
            if ending is not None:
                raise ProcessFailed(index, *ending)
        return result

    def of_first(self, name: str, work: Callable[[], T]) -> T:
        """Calls `work` in process 0 and returns its result, of types of JSON, in all.

        Raises:
          ProcessFailed: in the other processes, if it fails; in process 0 its error.
          ProcessMissing: as `gather`.
        """
        if self.count == 1:
            return work()
        result = self.together(name, work if self.is_first else lambda: None)
        return self.gather(f"{name}, result", result)[0]

    def agreement(self, name: str) -> "Agreement":
        """Makes a decision that is still open; `name` is used once in a run."""
        made = Agreement(self, name)
        if self.count > 1:
            self._agreements[f"{_NOTICES}{name}"] = made
        return made

    # Living and ending

    def __enter__(self) -> "Processes":
        if self.count == 1:
            return self
        self._heard_s = time.monotonic()
        for work in (self._listen, self._watch):
            threading.Thread(target=work, daemon=True).start()
        self._streams = contextlib.ExitStack()
        if not self.is_first:
            silent = self._streams.enter_context(open(os.devnull, "w"))
            self._streams.enter_context(contextlib.redirect_stdout(silent))
            self._streams.enter_context(contextlib.redirect_stderr(silent))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.count == 1:
            return
        self._streams.close()
        if error is None:
            with contextlib.suppress(JaxRuntimeError):
                self.gather("the end of the run")
            self._leaving.set()
            self._leave()
            return
        if isinstance(error, JaxRuntimeError):
            # Most likely a process is gone; then this one is ended meanwhile.
            time.sleep(2 * self._heartbeat_s)
        self._leaving.set()
        self._tell_end(self.index, *_ending(error))

    def _leave(self) -> None:
        """Disconnects; process 0 last, as the coordinator ends with it."""
        until_s = time.monotonic() + 2 * self._heartbeat_s
        with contextlib.suppress(JaxRuntimeError):
            for index in range(1, self.count if self.is_first else 1):
                self._wait_for(f"{_LEFT}{index}", until_s)
        with contextlib.suppress(JaxRuntimeError):
            self._client.shutdown()
            self._client.key_value_set(f"{_LEFT}{self.index}", "")
        if self.is_first:
            self._service.communicate(b"done\n")

    def _tell_end(self, index: int, code: int, line: str) -> None:
        notice = json.dumps([index, code, line])
        with contextlib.suppress(JaxRuntimeError):  # Another one was faster.
            self._client.key_value_set(f"{_NOTICES}end", notice)

    def _listen(self) -> None:
        """Shows that this process lives, and sees what the others do."""
        count, alive = 0, {}
        while not self._leaving.wait(min(_TICK_SECONDS, self._heartbeat_s / 8)):
            count += 1
            with contextlib.suppress(JaxRuntimeError):  # `_watch` ends the process.
                self._show(count)
                self._look(alive)
                self._heard_s = time.monotonic()

    def _show(self, count: int) -> None:
        """Writes that this process lives, and how far its program has come."""
        beat = f"{count} {self._points}"
        self._client.key_value_set(f"{_ALIVE}{self.index}", beat, allow_overwrite=True)

    def _look(self, alive: dict[int, tuple[str, float]]) -> None:
        notices = dict(self._client.key_value_dir_get(_NOTICES))
        if end := notices.get(f"{_NOTICES}end"):
            index, code, line = json.loads(end)
            if index != self.index:
                grace_s = 0.0 if code == EXIT_PROCESS_LOST else _GRACE_SECONDS
                line = f"process {index} of {self.count} has ended: {line}"
                self._end(code, line, grace_s=grace_s)
            # This process was stopped, and goes on.
            line = f"process {index} of {self.count} was given up by the others: {line}"
            self._end(code, line, grace_s=0.0)
        for name in list(self._agreements):
            if name in notices:
                self._agreements.pop(name).close(json.loads(notices[name]))
        # Process 0 watches all, and all others watch it.
        now, folder = time.monotonic(), _ALIVE
        if now - self._looked_s > self._heartbeat_s / 2:
            # Nothing was seen as this process itself was stopped.
            alive.clear()
        self._looked_s = now
        beats = self._read(folder) if self.is_first else self._beat_of(0)
        for index in range(self.count if self.is_first else 1):
            beat = beats.get(index, "")  # It may be gone before its first one.
            if alive.get(index, (None, 0.0))[0] != beat:
                alive[index] = beat, now
            elif (silent_s := now - alive[index][1]) > self._heartbeat_s:
                self._lost(index, f"nothing was heard of it for {silent_s:.1f} s")
        if len(beats) == self.count:
            self._check_points({i: int(b.split()[1]) for i, b in beats.items()}, now)

    def _check_points(self, points: dict[int, int], now: float) -> None:
        """Ends the run if the process that is behind does not go on, though it lives.

        Only from its first point on, after which most has been compiled.
        """
        index = min(points, key=points.__getitem__)
        waited_s = now - self._least_since_s
        if points[index] != self._least:
            if self._least:
                self._longest_s = max(self._longest_s, waited_s)
            self._least, self._least_since_s = points[index], now
        elif self._least and waited_s > max(self._limit_s, _SLOWER * self._longest_s):
            self._lost(index, f"it lives, but hangs for {waited_s:.0f} s")

    def _beat_of(self, index: int) -> dict[int, str]:
        with contextlib.suppress(JaxRuntimeError):  # It has none yet.
            return {index: self._client.key_value_try_get(f"{_ALIVE}{index}")}
        return {}

    def _lost(self, index: int, line: str) -> None:
        self._tell_end(index, EXIT_PROCESS_LOST, line)
        line = f"process {index} of {self.count} is gone: {line}"
        self._end(EXIT_PROCESS_LOST, line, grace_s=0.0)

    def _watch(self) -> None:
        """Ends this process if even the coordinator does not answer."""
        looked_s = time.monotonic()
        while not self._leaving.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - looked_s > self._heartbeat_s / 2:
                # Nothing was heard as this process itself was stopped.
                self._heard_s = now
            looked_s, silent_s = now, now - self._heard_s
            if silent_s > 1.5 * self._heartbeat_s:
                line = f"its coordinator has not answered for {silent_s:.1f} s"
                self._end(EXIT_PROCESS_LOST, f"process 0 is gone: {line}", grace_s=0.0)

    def _end(self, code: int, line: str, grace_s: float = _GRACE_SECONDS) -> None:
        if self._leaving.wait(grace_s):
            return
        what = f"error: {line}; the same command continues from the last checkpoint\n"
        with contextlib.suppress(OSError):
            if has_room(2, _GRACE_SECONDS):
                os.write(2, what.encode(errors="replace"))
        os._exit(code)


class Agreement:
    """A decision that any process may ask for, and that all take at the same point.

    Each process calls `reached` at the same points of its program, such as once a step.
    They need not wait for each other there: the point is the first that none of them
    had passed when the decision became known.
    """

    def __init__(self, processes: Processes, name: str):
        self._processes, self._name = processes, name
        self._lock = threading.Lock()
        self._points = 0
        self._is_asked, self._is_open = False, True
        self._last, self._value = 0, None
        self._is_known = threading.Event()

    def reached(self, wanted: T | None) -> T | None:
        """Returns what was agreed on, from the same point on in all; else None.

        Args:
          wanted: what this process asks for, of types of JSON; None: nothing. The first
            that was asked for anywhere counts.
        """
        if self._processes.count == 1:
            return wanted
        self._processes._points += 1
        with self._lock:
            is_open = self._is_open
            self._points += is_open
        if is_open:
            if wanted is not None and not self._is_asked:
                self._is_asked = True
                with contextlib.suppress(JaxRuntimeError):  # Another one was faster.
                    self._processes._client.key_value_set(
                        f"{_NOTICES}{self._name}", json.dumps(wanted)
                    )
            return None
        self._is_known.wait()
        self._points += 1
        return self._value if self._points > self._last else None

    def close(self, value: Any) -> None:
        """Finds the point, in a thread: the main threads may wait for one another."""
        with self._lock:
            self._is_open = False

        def find() -> None:
            self._last = max(self._processes.gather(self._name, self._points))
            self._value = value
            self._is_known.set()
            if self._processes.is_first:
                self._processes._client.key_value_delete(f"{_NOTICES}{self._name}")

        threading.Thread(target=find, daemon=True).start()


def connect(config: ProcessesConfig) -> Processes:
    """Connects this process with the others of the run, if there are any.

    Raises:
      ValueError: as `find_cluster` and `Processes`.
    """
    return Processes(find_cluster(config), config)


ALONE = Processes(None, ProcessesConfig())
"""The one process of a run on one host."""


def whole(tree: Any) -> Any:
    """Returns arrays as NumPy, in each process with the parts that others hold.

    Call it in all processes, inside `jax.set_mesh`.
    """

    def replicated(x: jax.Array) -> jax.Array:
        is_here = x.is_fully_addressable or x.is_fully_replicated
        return x if is_here else jax.sharding.reshard(x, P())

    return jax.device_get(jax.tree.map(replicated, tree))


def _ending(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the message of a process that ends with `error`."""
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return getattr(error, "code", EXIT_INTERRUPTED), "it was stopped"
    is_expected = isinstance(error, ValueError | OSError)
    code = EXIT_USAGE if is_expected else EXIT_FAILED
    line = error_line(error, 400) or type(error).__name__
    return getattr(error, "exit_code", code), line


def _start(program: ModuleType, *arguments: str) -> tuple[subprocess.Popen, str]:
    """Starts a program of its own, and returns the line that it prints when ready."""
    assert program.__file__ is not None
    started = subprocess.Popen(
        [sys.executable, program.__file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert started.stdout is not None
    return started, started.stdout.readline().decode().strip()


def _start_coordinator(
    cluster: Cluster, limit_s: float, linger_s: float
) -> subprocess.Popen:
    port = int(cluster.coordinator.rpartition(":")[2])
    # The coordinator of a run that has just failed may still listen. A second server
    # on the port would be no error of its own.
    until = time.monotonic() + 3 * linger_s
    while _is_taken(port):
        if time.monotonic() > until:
            raise ValueError(
                f"port {port} is in use on the host of process 0: give another with "
                "processes.coordinator"
            )
        time.sleep(_TICK_SECONDS)
    arguments = [f"[::]:{port}", str(cluster.count), str(linger_s)]
    service, line = _start(coordinator, *arguments)
    if not line:
        raise ValueError(
            f"the coordinator cannot listen at port {port}: give another with "
            "processes.coordinator"
        )
    return service


def _is_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("::", port))
        except OSError:
            return True
    return False
