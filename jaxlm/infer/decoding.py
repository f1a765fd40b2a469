"""The compiled programs of a generation: prefill, and decoding in a `lax.scan`."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Thread
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxlm.config import CacheKind, ModelConfig
from jaxlm.infer.row_settings import RowSettings
from jaxlm.infer.rules.automata import ENDED, StateTable
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.sampling import sample_tokens
from jaxlm.infer.speculative.proposals import (
    DraftModel,
    PromptLookup,
    positions_within,
)
from jaxlm.infer.speculative.speculative_step import keep_drawn, read_guesses
from jaxlm.model.block import Block, layer_kinds
from jaxlm.model.divisible import divisible_config, divisible_params
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import Cache, LayerCache, stack_layers, unstack_layers
from jaxlm.model.params import cast_matrices
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.layout import layout
from jaxlm.ops.linear import compute_dtype
from jaxlm.ops.probing.edit import Edit, total_hits
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import activation_spec, reshard
from jaxlm.tree import unstack
from jaxlm.types import Params, Trace


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


class Program:
    """A jitted function that measures its compile time."""

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...] = ()):
        self._jitted = jax.jit(function, donate_argnums=donate)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        key = self._key(arguments)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*arguments).compile()
            self.compile_s += time.perf_counter() - start
        return self._compiled[key](*arguments)

    def compile_beside(self, *arguments: Any) -> Future[None] | None:
        """Compiles for arguments like these in a thread; None if that is done.

        The time is not counted: nothing waits for it.
        """
        key, done = self._key(arguments), Future[None]()
        if key in self._compiled:
            return None
        # Between calls the program may delete what it was given.
        lowered = self._jitted.lower(*arguments)

        def compile_it():
            try:
                self._compiled[key] = lowered.compile()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        Thread(target=compile_it, daemon=True).start()
        return done

    @staticmethod
    def _key(arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        types = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        return jax.sharding.get_mesh(), structure, types


class Programs(NamedTuple):
    """The programs of a model, each compiled for every shape it is called with."""

    begin: Program
    """(params, tokens, lengths, probes) -> layers of a new cache, logits, hits, trace

    Probes are the edits and the taps."""
    extend: Program
    """(params, tokens, kept, lengths, layers, logits, probes) -> the same"""
    grow: Program
    """(layers) -> layers of a longer cache"""
    repeat: Program
    """(layers, logits, numbers) -> the same of these rows, in this order"""
    place: Program
    """(arrays that begin with B) -> the same, each row on its device"""
    insert: Program
    """(state, state of a row, slot) -> state with this row in the slot"""
    split: Program
    """(params) -> params as `decode` reads them"""
    advance: Program
    """(params, cache, tokens, probes) -> cache with these, logits, hits, trace"""
    decode: Program
    """(params, state, table, num_ids, probes, proposer) -> state, `Drawn` of a few
    tokens, trace

    That is the `StateTable` of all rows, the number of ids, a `Proposer` or None, and
    the trace of each token."""

    @property
    def compile_s(self) -> float:
        """Seconds spent on compiling so far."""
        return sum(program.compile_s for program in self)


@lru_cache(maxsize=32)
def programs(
    config: ModelConfig,
    max_length: int,
    kind: CacheKind,
    steps: int,
    num_top: int,
    block: type[Block],
    spare: int = 0,
) -> Programs:
    """Returns the programs of a model.

    Args:
      max_length: tokens for which each row of the cache has room.
      spare: room beyond it, for tokens that are taken back.
      kind: of the cache.
      steps: tokens that a call of `decode` draws for each row. Between calls a stream
        prints its text, rows come and go, and generation can stop.
      num_top: how many of the most likely tokens each step reports.
    """
    dtype = compute_dtype(config.dtype)

    def empty_layers(num_rows):
        size = {"kind": kind, "spare": spare}
        return init_cache(config, num_rows, max_length, **size).layers

    def begin(params, tokens, lengths, probes):
        """Reads the first tokens of each row, up to `lengths` in all."""
        start, ends = (reshard(x, "B") for x in (jnp.zeros_like(lengths), lengths))
        cache = Cache(empty_layers(len(lengths)), start, is_empty=True, ends=ends)
        none = jnp.zeros((len(lengths), config.vocab_size), jnp.float32)
        return _prefill(config, block, params, tokens, lengths, cache, none, probes)

    def extend(params, tokens, kept, lengths, layers, logits, probes):
        """Adds each row's tokens after the first `kept`, up to `lengths` in all."""
        kept, ends = (reshard(x, "B") for x in (kept, lengths))
        stacked = stack_layers(layers, len(layer_kinds(config)))
        cache = Cache(stacked, kept, ends=ends)
        return _prefill(config, block, params, tokens, lengths, cache, logits, probes)

    def grow(layers):
        rows = len(layers[0].keys)
        larger = jax.eval_shape(
            lambda: unstack_layers(empty_layers(rows), config.num_layers)
        )

        def longer(x, new):
            missing = max(new.shape[1] - x.shape[1], 0)
            return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))

        # The tokens stay where they are, also where a ring is new.
        leaves = map(longer, *map(jax.tree.leaves, (layers, larger)))
        return jax.tree.unflatten(jax.tree.structure(larger), leaves)

    def repeat(layers, logits, numbers):
        def chosen(x):
            return x.at[numbers].get(out_sharding=layout(x))

        return jax.tree.map(chosen, (layers, logits))

    def place(tree):
        letters = ("B", "B_")
        return jax.tree.map(lambda x: reshard(x, letters[x.ndim - 1]), tree)

    def insert(state, new, slot):
        hits = jax.tree.map(jnp.add, state.hits, new.hits)
        put = partial(_put_row, slot)
        state, new = (replace(s, hits=()) for s in (state, new))
        return replace(jax.tree.map(put, state, new), hits=hits)

    def split(params):
        # Each einsum would round them, in every step anew.
        on_mesh = divisible_config(config, block)
        params = cast_matrices(divisible_params(on_mesh, params, block), dtype)
        return {**params, "layers": unstack(params["layers"], config.num_layers)}

    def read(params, cache, tokens, probes, positions=None):
        on_mesh = divisible_config(config, block)
        edits, taps = probes
        out = forward(
            *(on_mesh, params, tokens),
            positions=positions,
            cache=cache,
            taps=taps,
            edits=edits,
            block=block,
        )
        assert out.cache is not None and out.logits is not None
        return out

    def advance(params, cache, tokens, probes):
        out = read(params, cache, tokens[:, None], probes)
        assert out.cache is not None
        logits = reshard(out.logits[:, 0], "B_")[:, : config.vocab_size]
        return out.cache, logits, out.hits, out.trace

    def decode(params, state: DecodeState, table, num_ids, probes, proposer):
        keys, settings = state.keys, state.settings

        def draw(logits, rows):
            by_row = (logits, rows, keys, settings)
            return _on_each_device(partial(_draw, num_top), by_row, (table, num_ids))

        def step(carry, _):
            cache, logits, rows, hits = carry
            was_done = rows.is_done
            rows, drawn = draw(logits, rows)
            new, logits, fired, trace = advance(params, cache, drawn.tokens, probes)
            hits = total_hits(probes[0], hits, fired)
            # What follows the end of a text is not kept.
            lengths = jnp.where(was_done, cache.lengths, new.lengths)
            carry = replace(new, lengths=lengths), logits, rows, hits
            return carry, (drawn, trace)

        def read_several(cache, tokens):
            positions = positions_within(config, cache, tokens)
            out = read(params, cache, tokens, probes, positions)
            logits = reshard(out.logits, "B__")[..., : config.vocab_size]
            return out.cache, logits, out.hits

        def speculative_step(carry, _):
            (cache, logits, rows, hits), draft = carry
            start = rows.history.lengths
            rows, first = draw(logits, rows)
            if isinstance(proposer, DraftModel):
                draft, proposals = proposer.propose(
                    *(draft, cache.lengths, rows, draw, config.vocab_size)
                )
            else:
                propose = partial(_propose, proposer)
                proposals = _on_each_device(propose, rows, ())
            new, logits, fired = read_guesses(
                read_several, cache, first.tokens, proposals
            )
            hits = total_hits(probes[0], hits, fired)
            rows, logits, drawn = keep_drawn(draw, first, rows, proposals, logits)
            # Nothing sees what was read of the tokens that were not kept.
            lengths = cache.lengths + rows.history.lengths - start
            kept = replace(new, lengths=lengths), logits, rows, hits
            return (kept, draft), (drawn, {})

        carry: Any = (state.cache, state.logits, state.rows, state.hits)
        if proposer is None:
            carry, (drawn, trace) = jax.lax.scan(step, carry, length=steps)
            draft = state.draft
        else:
            (carry, draft), (drawn, trace) = jax.lax.scan(
                speculative_step, (carry, state.draft), length=steps
            )
        cache, logits, rows, hits = carry
        drawn = jax.tree.map(lambda x: x.swapaxes(0, 1), drawn)
        state = DecodeState(cache, logits, rows, keys, settings, hits, draft)
        return state, drawn, trace

    return Programs(
        Program(begin),
        Program(extend, donate=(4, 5)),
        Program(grow),
        Program(repeat),
        Program(place),
        Program(insert, donate=(0,)),
        Program(split),
        Program(advance, donate=(1,)),
        Program(decode, donate=(1,)),
    )


def _put_row(slot: Int[Array, ""], x: Array, new: Array) -> Array:
    """Replaces a row of x, [B, ...], by the first of `new`."""

    def put(x, row, slot):
        return jax.lax.dynamic_update_slice_in_dim(x, row, slot, axis=0)

    sharding = layout(x)
    if sharding is None:
        return put(x, new[:1], slot)
    rows, *others = sharding.spec
    axes = (rows,) if isinstance(rows, str) else rows or ()
    new = jax.sharding.reshard(new, P(None, *others))[:1]

    def put_on_one_device(x, row, slot):
        slot -= jax.lax.axis_index(axes) * len(x) if axes else 0
        at = jnp.clip(slot, 0, len(x) - 1)
        old = jax.lax.dynamic_slice_in_dim(x, at, 1, axis=0)
        return put(x, jnp.where(at == slot, row, old), at)

    return jax.shard_map(
        put_on_one_device,
        in_specs=(sharding.spec, P(None, *others), P()),
        out_specs=sharding.spec,
        check_vma=False,
    )(x, new, slot)


def _prefill(
    config: ModelConfig,
    block: type[Block],
    params: Params,
    tokens: Array,
    lengths: Array,
    cache: Cache,
    logits: Float[Array, "B V"],
    probes: tuple[Sequence[Edit], Sequence[Tap]],
) -> tuple[tuple[LayerCache, ...], Float[Array, "B V"], tuple[Any, ...], Trace]:
    """Returns layers with more tokens, logits of rows that end here, hits and trace."""
    edits, taps = probes
    tokens, lengths = reshard(tokens, "B_"), reshard(lengths, "B")
    # Padding does not make a row longer: some rotations depend on its length.
    index = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    positions = jnp.minimum(index, lengths[:, None] - 1)
    # Only the last token of each prompt needs logits, unless they are tapped or edited.
    head = any(one.site == "logits" for one in (*edits, *taps))
    out = forward(
        *(config, params, tokens),
        positions=positions,
        cache=cache,
        taps=taps,
        edits=edits,
        head=head,
        block=block,
    )
    assert out.cache is not None
    is_last = index == lengths[:, None] - 1

    def last(x: Array) -> Array:
        chosen = jnp.where(is_last[..., None], x, 0)
        return jnp.sum(chosen, axis=1, keepdims=True)

    if out.logits is None:
        new = unembed(config, params, last(out.hidden_states))
    else:
        new = last(out.logits)
    new = reshard(new[:, 0], "B_")[:, : config.vocab_size]
    ends = is_last.any(axis=1)[:, None]
    logits = jnp.where(ends, new, reshard(logits, "B_"))
    layers = unstack_layers(out.cache.layers, config.num_layers)
    return layers, logits, out.hits, out.trace


def _draw(
    num_top: int,
    by_row: tuple[Float[Array, "B V"], Rows, Key[Array, " B"], RowSettings],
    shared: tuple[StateTable, Int[Array, ""]],
) -> tuple[Rows, Drawn]:
    """Draws the next token of each row, and finds out whether its text ends."""
    (logits, rows, keys, settings), (table, num_ids) = by_row, shared
    history = rows.history
    logits = jnp.where(jnp.arange(logits.shape[1]) < num_ids, logits, NEVER)
    keys = jax.vmap(jax.random.fold_in)(keys, history.num_new)
    tokens = sample_tokens(
        *(logits, keys, settings, history, table, rows.grammar_states)
    )

    # Before any rule: what the model thinks of the token.
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, num_top)

    is_stop = jnp.take_along_axis(settings.is_stop, tokens[:, None], axis=1)[:, 0]
    inside = ~(rows.is_done | is_stop)
    states = jnp.stack([rows.stop_states, rows.grammar_states])
    states = table.next_states[states, tokens].astype(jnp.int32)
    longer = history.append(tokens)
    lengths = jnp.where(rows.is_done, history.lengths, longer.lengths)
    history = replace(longer, lengths=lengths)
    is_full = history.num_new >= settings.max_new_tokens
    is_done = ~inside | (states == ENDED).any(axis=0) | is_full
    return (
        Rows(history, states[0], states[1], is_done),
        Drawn(tokens, inside, chosen, top_tokens, top_logprobs),
    )


def _propose(proposer: PromptLookup, rows: Rows, _: Any) -> Int[Array, "B K"]:
    """Returns the guesses of each row whose text goes on."""
    return jnp.where(rows.is_done[:, None], -1, proposer.propose(rows.history))


def _on_each_device(function: Callable[..., Any], by_row: Any, shared: Any) -> Any:
    """Calls `function(by_row, shared)` on each device of a mesh, on its rows."""
    rows = activation_spec("B")
    if rows is None:
        return function(by_row, shared)
    by_row = jax.tree.map(lambda x: jax.sharding.reshard(x, rows), by_row)
    return jax.shard_map(
        function, in_specs=(rows, P()), out_specs=rows, check_vma=False
    )(by_row, shared)
