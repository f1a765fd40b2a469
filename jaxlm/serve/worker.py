"""The engine in a thread of its own, and requests that come from an event loop."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import jax

from jaxlm.infer.slots.engine import Engine
from jaxlm.infer.slots.slot_request import NewTokens, Request

logger = logging.getLogger(__name__)


class Busy(Exception):
    """There are as many requests as the server takes."""


class _StoppedError(RuntimeError):
    """The engine has failed."""

    def __init__(self, error: Exception):
        super().__init__(f"the engine has stopped: {error}")


class _Stopped:
    """In the place of an engine that has failed."""

    def __init__(self, error: Exception):
        self._error = error

    def submit(self, request: Request) -> int:
        raise _StoppedError(self._error)

    def cancel(self, number: int) -> None:
        """Has nothing to do."""


class Worker:
    """Batches requests of many clients through the slots of one engine."""

    def __init__(self, make_engine: Callable[[], Engine], max_requests: int):
        """Starts the thread, which makes the engine.

        Args:
          make_engine: called in the thread, in the current mesh.
          max_requests: requests that run or wait at once.
        """
        self.max_requests = max_requests
        """Requests that may run or wait at once."""
        self._inbox: queue.SimpleQueue[Callable[[Any], None] | None] = (
            queue.SimpleQueue()
        )
        # By the engine's numbers; only the thread touches it.
        self._listeners: dict[int, Callable[[NewTokens | Exception], None]] = {}
        self.num_requests = 0
        """Requests that run or wait."""
        self.failure: Exception | None = None
        """What ended the thread."""
        run = (make_engine, jax.sharding.get_mesh())
        self._thread = threading.Thread(target=self._run, args=run, daemon=True)
        self._thread.start()

    async def run(self, request: Request) -> AsyncGenerator[NewTokens, None]:
        """Yields the tokens of a request as they come; closing it frees the slot.

        Raises:
          Busy: if there are too many requests.
          ValueError: for a request that cannot be run.
          RuntimeError: if the engine has failed, or the device for this request.
        """
        if self.num_requests >= self.max_requests:
            raise Busy
        loop, parts = asyncio.get_running_loop(), asyncio.Queue()
        numbers: list[int] = []
        is_cancelled = threading.Event()

        def listen(part: NewTokens | Exception) -> None:
            # The loop may be closed: nobody listens then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(parts.put_nowait, part)

        def submit(engine: Any) -> None:
            if is_cancelled.is_set():
                return
            try:
                numbers.append(engine.submit(request))
                self._listeners[numbers[0]] = listen
            except (ValueError, _StoppedError) as error:
                listen(error)

        def cancel(engine: Any) -> None:
            for number in numbers:
                if self._listeners.pop(number, None) is not None:
                    engine.cancel(number)

        if self.failure is not None:
            raise _StoppedError(self.failure)
        self.num_requests += 1
        self._inbox.put(submit)
        try:
            while True:
                part = await parts.get()
                if isinstance(part, Exception):
                    raise part
                yield part
                if part.ended is not None:
                    return
        finally:
            self.num_requests -= 1
            is_cancelled.set()
            self._inbox.put(cancel)

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self, make_engine: Callable[[], Engine], mesh: Any) -> None:
        try:
            # A mesh is set for a thread, from this call on.
            with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
                engine = make_engine()
                while self._take(engine):
                    for part in engine.step():
                        listener = self._listeners.get(part.number)
                        if part.ended is not None:
                            self._listeners.pop(part.number, None)
                        if listener is not None:
                            listener(part if part.error is None else part.error)
        except Exception as error:
            # Told to all who wait, and to all who come; the server stays to say so.
            self.failure = error
            logger.warning("%s", _StoppedError(error))
            for listener in self._listeners.values():
                listener(_StoppedError(error))
            while (job := self._inbox.get()) is not None:
                job(_Stopped(error))

    def _take(self, engine: Engine) -> bool:
        """Does what has come in; waits if there is nothing else to do."""
        while self._inbox.empty() and engine.is_idle and engine.compile_next():
            pass
        while not self._inbox.empty() or engine.is_idle:
            job = self._inbox.get()
            if job is None:
                return False
            job(engine)
        return True
