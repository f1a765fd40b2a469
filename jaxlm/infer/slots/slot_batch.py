"""The state of all slots on the devices, and of rows that join them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.decoding.decode_state import DecodeState, Rows
from jaxlm.infer.prefill import CompiledModel, Prefilled
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules.automata import FREE
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.slots.slot_request import Request, Running
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import Cache, unstack_layers
from jaxlm.sharding.rules import activation_spec, batch_parts


class SlotBatch:
    """The rows of all slots, in one `DecodeState`."""

    def __init__(
        self,
        models: Sequence[CompiledModel],
        num_slots: int,
        token_bytes: Sequence[bytes],
    ):
        """Takes no memory yet.

        Args:
          models: the model and its draft model, if there is one.
        """
        self._models, self._num_slots = models, num_slots
        self._programs = models[0].programs
        self._token_bytes = token_bytes
        self.state: DecodeState | None = None
        """None: no request has come."""

    def make(self) -> DecodeState:
        """Returns the state, in which nothing runs if no request has come."""
        if self.state is None:
            max_length = self._programs.spec.max_length
            self.state = self.empty(self._num_slots, max_length)
        return self.state

    def put(self, new: DecodeState, row: int, slot: int) -> None:
        """Puts a row of another state into a slot."""
        at = (np.int32(row), np.int32(slot))
        state = self._programs.insert(self.make(), new, *at)
        self.state = jax.block_until_ready(state)

    def clear(self, slot: int) -> None:
        """Leaves nothing of the text in a slot, of its keys and values either."""
        empty = self.empty(batch_parts(), self._programs.spec.max_length)
        self.put(empty, 0, slot)

    def state_of(
        self, running: Sequence[Running], found: Sequence[Prefilled]
    ) -> DecodeState:
        """Returns the state of rows that have no new token yet.

        Args:
          found: their prompts, as each model has read them.
        """
        spec = self._programs.spec
        requests = [r.request for r in running]
        tokens = np.zeros((len(running), spec.max_length), np.int32)
        for new, request in zip(tokens, requests, strict=True):
            new[: len(request.tokens)] = request.tokens
        lengths = np.array([len(r.tokens) for r in requests], np.int32)
        stops = [r.automata.get(r.request.sample.stop_strings, FREE) for r in running]
        grammars = [r.automata.get(id(r.request.grammar), FREE) for r in running]
        rows = Rows(
            History(tokens, lengths, lengths.copy()),
            np.array(stops, np.int32),
            np.array(grammars, np.int32),
            np.array([r.number == -1 for r in running]),
        )
        keys = jnp.stack([request.key for request in requests])
        samples = [request.sample for request in requests]
        settings = row_settings(samples, spec.config.vocab_size, self._token_bytes)
        filled, rows, keys, settings = self._programs.place(
            (lengths, rows, keys, settings)
        )
        own, *drafts = found
        draft = drafts[0].layers if drafts else ()
        cache = Cache(own.layers, filled)
        return DecodeState(cache, own.logits, rows, keys, settings, own.hits, draft)

    def empty(self, num_rows: int, room: int) -> DecodeState:
        """Returns a state in which nothing runs.

        Args:
          room: tokens for which each row has room: all, or those of prompts.
        """
        nothing = Request(np.ones(1, np.int32), SampleConfig(), jax.random.key(0))
        found = [nothing_read(model, num_rows, room) for model in self._models]
        return self.state_of([Running(-1, nothing)] * num_rows, found)


def nothing_read(model: CompiledModel, num_rows: int, room: int) -> Prefilled:
    """Returns a cache without tokens, as if rows without any had been read.

    Args:
      room: tokens for which each row has room.
    """
    spec = model.programs.spec
    config: ModelConfig = spec.config
    spare = spec.spare if room == spec.max_length else 0
    cache = init_cache(config, num_rows, room, kind=spec.kind, spare=spare)
    layers = unstack_layers(cache.layers, config.num_layers)
    shape, sharding = (num_rows, config.vocab_size), activation_spec("B_")
    logits: Any = jnp.zeros(shape, jnp.float32, out_sharding=sharding)
    hits = (jnp.int32(0),) * len(model.probes[0])
    return Prefilled(layers, logits, np.zeros(num_rows, np.int32), hits, [])
