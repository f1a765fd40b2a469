"""The state of a batch of texts while they grow, and what is drawn for them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxlm.infer.row_settings import RowSettings
from jaxlm.infer.rules.penalties import History
from jaxlm.model.kv_cache import Cache, LayerCache


class Rows(NamedTuple):
    """The texts of a batch while they grow; one row does not depend on another."""

    history: History
    """The tokens so far."""
    stop_states: Any
    """[B] int32: how much of a stop string each row ends with; see `Automata`."""
    grammar_states: Any
    """[B] int32: where each row is in its grammar, likewise."""
    is_done: Any
    """[B] bool: rows whose text has ended."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that a batch is between two calls of `decode`."""

    # `Any`: see `jaxlm/types.py` on leaves.
    cache: Cache
    logits: Any
    """[B, V] f32: logits of the next token."""
    rows: Rows
    keys: Any
    """[B] PRNG keys: a draw depends on its row's and on the number of the new token."""
    settings: RowSettings
    hits: tuple[Any, ...] = ()
    """How often each edit has fired."""
    draft: tuple[LayerCache, ...] = ()
    """The cache of a draft model."""


class Drawn(NamedTuple):
    """What one step draws for each row; a chunk has a second axis, of its steps.

    With speculation a step is several of them: see `speculative_step.py`.
    """

    tokens: Any
    """[B] int32."""
    inside: Any
    """[B] bool: whether the token belongs to the text."""
    logprobs: Any
    """[B] f32: of the token, among those that exist, before any rule."""
    top_tokens: Any
    """[B, n] int32: the n most likely ones, likewise."""
    top_logprobs: Any
    """[B, n] f32."""
    is_proposed: Any = None
    """[B] bool: whether there was a guess in its place; None without speculation."""
