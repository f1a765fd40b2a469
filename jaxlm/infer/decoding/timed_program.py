"""A compiled function that tells how long it took to compile."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import jax


class TimedProgram:
    """A jitted function that measures its compile time; keywords are static."""

    def __init__(
        self,
        function: Callable[..., Any],
        donate: tuple[int, ...] = (),
        static: tuple[str, ...] = (),
    ):
        self._jitted = jax.jit(function, donate_argnums=donate, static_argnames=static)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_s = 0.0

    def __call__(self, *arguments: Any, **static: int) -> Any:
        key = self._key(arguments, static)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*arguments, **static).compile()
            self.compile_s += time.perf_counter() - start
        return self._compiled[key](*arguments)

    def compile_beside(self, *arguments: Any, **static: int) -> Future[None] | None:
        """Compiles for arguments like these in a thread; None if that is done.

        `compile_s` does not have its time: others go on meanwhile.
        """
        key, done = self._key(arguments, static), Future[None]()
        if key in self._compiled:
            return None
        # Between calls the program may delete what it was given.
        lowered = self._jitted.lower(*arguments, **static)

        def compile_it():
            try:
                self._compiled[key] = lowered.compile()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        Thread(target=compile_it, daemon=True).start()
        return done

    @staticmethod
    def _key(arguments: Any, static: dict[str, int]) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        types = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        return jax.sharding.get_mesh(), structure, types, *static.items()
