"""What is compiled to decode: the steps of a batch, in one loop."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxlm.infer.decoding.decode_state import DecodeState, Drawn, Rows
from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.infer.decoding.prompt_programs import Probes
from jaxlm.infer.row_settings import RowSettings
from jaxlm.infer.rules.automata import ENDED, StateTable
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.sampling import sample_tokens
from jaxlm.infer.speculative.proposals import (
    DraftModel,
    PromptLookup,
    Proposer,
    positions_within,
)
from jaxlm.infer.speculative.speculative_step import keep_drawn, read_guesses
from jaxlm.model.divisible import divisible_config, divisible_params
from jaxlm.model.kv_cache import Cache
from jaxlm.model.params import cast_matrices, with_outputs_first
from jaxlm.model.transformer import Output, forward
from jaxlm.ops.layout import layout
from jaxlm.ops.linear import compute_dtype
from jaxlm.ops.probing.edit import total_hits
from jaxlm.sharding.rules import activation_spec, reshard
from jaxlm.tree import unstack
from jaxlm.types import Params, Trace

# A cache, logits of the next tokens, the rows, and the hits of the edits.
_Carry = tuple[Cache, Float[Array, "B V"], Rows, tuple[Any, ...]]


def split(spec: DecodingSpec, params: Params) -> Params:
    """Returns stacked parameters as `decode` reads them: a tuple of layers.

    Matrices are in the compute dtype, in the form that the mesh needs, and with outputs
    first if `spec` says so.
    """
    config, block = spec.config, spec.block
    on_mesh = divisible_config(config, block)
    params = divisible_params(on_mesh, params, block)
    # Each einsum would cast them, in every step anew.
    params = cast_matrices(params, compute_dtype(config.dtype))
    params = {**params, "layers": unstack(params["layers"], config.num_layers)}
    return with_outputs_first(params) if spec.outputs_first else params


def advance(
    spec: DecodingSpec,
    params: Params,
    cache: Cache,
    tokens: Int[Array, " B"],
    probes: Probes,
) -> tuple[Cache, Float[Array, "B V"], tuple[Any, ...], Trace]:
    """Reads one token of each row: the cache with it, logits, hits and trace."""
    out = _read(spec, params, cache, tokens[:, None], probes)
    assert out.cache is not None
    logits = reshard(out.logits[:, 0], "B_")[:, : spec.config.vocab_size]
    return out.cache, logits, out.hits, out.trace


def decode(
    spec: DecodingSpec,
    params: Params,
    state: DecodeState,
    table: StateTable,
    num_ids: Int[Array, ""],
    limit: Int[Array, ""],
    probes: Probes,
    proposer: Proposer | None,
    steps: int,
) -> tuple[DecodeState, Drawn, Trace]:
    """Continues each row by some tokens, or by so many passes with guesses.

    When all texts have ended, so does the loop.

    Args:
      params: as `split` returns them.
      table: the automata of all rows.
      num_ids: only ids below this are drawn.
      limit: how many tokens or passes, up to `steps`.

    Returns:
      The new state; `Drawn` [B, steps, ...], or [B, steps, K + 1, ...] with a proposer
      of K tokens; and the trace [steps, ...], which is empty with a proposer. Both are
      zeros after the last step.
    """

    def draw(logits, rows):
        by_row = (logits, rows, state.keys, state.settings)
        draw_rows = partial(_draw, spec.num_top)
        return _on_own_rows(draw_rows, by_row, (table, num_ids))

    step = _Step(spec, params, probes, draw)
    carry: Any = (state.cache, state.logits, state.rows, state.hits)
    if proposer is None:
        carry, (drawn, trace) = _until_done(
            *(step.draw_one, carry, steps, limit), lambda carry: carry[2]
        )
        draft = state.draft
    else:
        (carry, draft), (drawn, trace) = _until_done(
            partial(step.draw_and_guess, proposer),
            *((carry, state.draft), steps, limit),
            lambda carry: carry[0][2],
        )
    cache, logits, rows, hits = carry
    drawn = jax.tree.map(lambda x: x.swapaxes(0, 1), drawn)
    state = DecodeState(cache, logits, rows, state.keys, state.settings, hits, draft)
    return state, drawn, trace


def _until_done(
    step: Callable[[Any], tuple[Any, Any]],
    carry: Any,
    steps: int,
    limit: Int[Array, ""],
    rows_of: Callable[[Any], Rows],
) -> tuple[Any, Any]:
    """Repeats `carry, out = step(carry)` until all rows are done, or `limit` times.

    A `lax.scan` would run all `steps`: fifteen of sixteen in vain for one token.

    Returns:
      The last carry, and the outputs, stacked to `steps`, with zeros for those that did
      not run.
    """

    def stack(out: jax.ShapeDtypeStruct) -> Array:
        placed = layout(out)
        return jnp.zeros(
            (steps, *out.shape),
            out.dtype,
            out_sharding=None if placed is None else P(None, *placed.spec),
        )

    def goes_on(loop):
        number, carry, _ = loop
        return (number < limit) & ~rows_of(carry).is_done.all()

    def body(loop):
        number, carry, stacks = loop
        carry, out = step(carry)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return number + 1, carry, jax.tree.map(put, stacks, out)

    stacks = jax.tree.map(stack, jax.eval_shape(step, carry)[1])
    _, carry, stacks = jax.lax.while_loop(goes_on, body, (0, carry, stacks))
    return carry, stacks


@dataclass(frozen=True)
class _Step:
    """One step of `decode`, in two kinds."""

    spec: DecodingSpec
    params: Params
    probes: Probes
    draw: Callable[[Float[Array, "B V"], Rows], tuple[Rows, Drawn]]

    def draw_one(self, carry: _Carry) -> tuple[_Carry, tuple[Drawn, Trace]]:
        """Draws a token for each row, and reads it."""
        cache, logits, rows, hits = carry
        was_done = rows.is_done
        rows, drawn = self.draw(logits, rows)
        new, logits, fired, trace = advance(
            self.spec, self.params, cache, drawn.tokens, self.probes
        )
        hits = total_hits(self.probes[0], hits, fired)
        # What follows the end of a text is not kept.
        lengths = jnp.where(was_done, cache.lengths, new.lengths)
        return (replace(new, lengths=lengths), logits, rows, hits), (drawn, trace)

    def draw_and_guess(
        self, proposer: Proposer, carry: tuple[_Carry, Any]
    ) -> tuple[tuple[_Carry, Any], tuple[Drawn, Trace]]:
        """Draws a token, reads it with guesses after it, and keeps those drawn."""
        (cache, logits, rows, hits), draft = carry
        start, vocab_size = rows.history.lengths, self.spec.config.vocab_size
        rows, first = self.draw(logits, rows)
        if isinstance(proposer, DraftModel):
            draft, proposals = proposer.propose(
                *(draft, cache.lengths, rows, self.draw, vocab_size)
            )
        else:
            proposals = _on_own_rows(partial(_propose, proposer), rows, ())

        def read(cache, tokens):
            positions = positions_within(self.spec.config, cache, tokens)
            out = _read(self.spec, self.params, cache, tokens, self.probes, positions)
            return out.cache, reshard(out.logits, "B__")[..., :vocab_size], out.hits

        new, logits, fired = read_guesses(read, cache, first.tokens, proposals)
        hits = total_hits(self.probes[0], hits, fired)
        rows, logits, drawn = keep_drawn(self.draw, first, rows, proposals, logits)
        # Nothing sees what was read of the tokens that were not kept.
        lengths = cache.lengths + rows.history.lengths - start
        kept = replace(new, lengths=lengths), logits, rows, hits
        return (kept, draft), (drawn, {})


def _read(
    spec: DecodingSpec,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    probes: Probes,
    positions: Int[Array, "B T"] | None = None,
) -> Output:
    edits, taps = probes
    out = forward(
        *(divisible_config(spec.config, spec.block), params, tokens),
        positions=positions,
        cache=cache,
        taps=taps,
        edits=edits,
        block=spec.block,
    )
    assert out.cache is not None and out.logits is not None
    return out


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


def _on_own_rows(function: Callable[..., Any], by_row: Any, shared: Any) -> Any:
    """Calls `function(by_row, shared)` on each device of a mesh, on its rows."""
    rows = activation_spec("B")
    if rows is None:
        return function(by_row, shared)
    by_row = jax.tree.map(lambda x: jax.sharding.reshard(x, rows), by_row)
    return jax.shard_map(
        function, in_specs=(rows, P()), out_specs=rows, check_vma=False
    )(by_row, shared)
