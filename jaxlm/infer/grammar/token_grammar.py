"""What may follow at each token, for a text that a grammar describes.

An automaton over bytes becomes one over the tokens of a vocabulary: a token may follow
if its bytes lead to a state from which tokens lead to an end.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from scipy.sparse import csr_array

from jaxlm.config import SampleConfig
from jaxlm.infer.grammar.byte_automaton import DEAD, ByteAutomaton, Part, determinize
from jaxlm.infer.rules.automata import ENDS, FORBIDDEN, Automaton

MAX_BYTES = 512 << 20
# States whose transitions are computed together.
_CHUNK = 64


def token_grammar(
    part: Part, token_bytes: Sequence[bytes], vocab_size: int, sample: SampleConfig
) -> Automaton:
    """Returns the grammar of texts that `part` describes.

    Where such a text may end, a stop token of `sample` may follow; where nothing else
    may, the text ends by itself. Forbidden ids never follow.

    Args:
      part: made by `regex` or `schema_part`.
      token_bytes: UTF-8 bytes of each id; those without any never follow.

    Raises:
      ValueError: if the tokens spell no such text, or the tables would be too large.
    """
    automaton = determinize(part)
    never = np.ones(vocab_size, bool)
    never[: len(token_bytes)] = [not data for data in token_bytes]
    never[list(sample.forbidden_ids + sample.stop_ids)] = True
    size = 2 * len(automaton.accepts) * vocab_size
    if size > MAX_BYTES:
        raise ValueError(
            f"its automaton has {len(automaton.accepts):,} states, which takes "
            f"{size >> 20:,} MiB for {vocab_size:,} tokens, more than "
            f"{MAX_BYTES >> 20} MiB: bound its repetitions lower"
        )
    table = _transitions(automaton, _trie(tuple(token_bytes)), never)
    needs = _tokens_to_end(table, automaton.accepts)
    if needs[0] < 0:
        raise ValueError("the tokens of this vocabulary spell no text that it allows")
    # Lookups of FORBIDDEN, -1, take the last.
    table[np.append(needs, -1)[table] < 0] = FORBIDDEN
    goes_on = (table >= 0).any(axis=1)
    is_last = np.append(automaton.accepts & ~goes_on, False)
    table[is_last[table]] = ENDS
    table[np.ix_(automaton.accepts, list(sample.stop_ids))] = ENDS
    if not goes_on[0] and not sample.stop_ids:
        raise ValueError("it allows the empty text only")
    return Automaton(table, needs.astype(np.int16))


class _Trie(NamedTuple):
    """The tokens of a vocabulary by their bytes, level by level."""

    levels: list[tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]]
    """Of each level the parents of its nodes in the level before, and their bytes."""
    ends: list[tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]]
    """Of each level ids of tokens, and the nodes where they end."""


@lru_cache(maxsize=4)
def _trie(token_bytes: tuple[bytes, ...]) -> _Trie:
    by_length: dict[int, list[int]] = {}
    for token, data in enumerate(token_bytes):
        by_length.setdefault(len(data), []).append(token)
    nodes, levels, ends = {b"": 0}, [], []
    for length in range(1, max(by_length, default=0) + 1):
        prefixes = {
            token_bytes[token][:length]
            for size in range(length, max(by_length) + 1)
            for token in by_length.get(size, ())
        }
        new = {prefix: i for i, prefix in enumerate(prefixes)}
        parents = [nodes[prefix[:-1]] for prefix in new]
        levels.append(
            (np.array(parents, np.int32), np.array([p[-1] for p in new], np.int32))
        )
        tokens = by_length.get(length, [])
        at = [new[token_bytes[token]] for token in tokens]
        ends.append((np.array(tokens, np.int32), np.array(at, np.int32)))
        nodes = new
    return _Trie(levels, ends)


def _transitions(
    automaton: ByteAutomaton, trie: _Trie, never: np.ndarray
) -> np.ndarray:
    """Returns the state after each state and token, [states, V] int16."""
    num_states = len(automaton.accepts)
    # A dead state leads to itself.
    by_byte = np.full((num_states + 1, 256), num_states, np.int32)
    by_byte[:-1] = np.where(
        automaton.next_states == DEAD, num_states, automaton.next_states
    )
    table = np.full((num_states, len(never)), FORBIDDEN, np.int16)
    for first in range(0, num_states, _CHUNK):
        rows = table[first : first + _CHUNK]
        states = np.arange(first, first + len(rows))[:, None]
        for (parents, data), (tokens, at) in zip(trie.levels, trie.ends, strict=True):
            states = by_byte[states[:, parents], data]
            rows[:, tokens] = np.where(states == num_states, FORBIDDEN, states)[:, at]
            if (states == num_states).all():
                break
    table[:, never] = FORBIDDEN
    return table


def _tokens_to_end(table: np.ndarray, accepts: np.ndarray) -> np.ndarray:
    """Returns how many tokens end a text from each state; -1: none do."""
    pairs = [(s, n) for s, row in enumerate(table) for n in np.unique(row) if n >= 0]
    starts, ends = np.array(pairs, np.int64).reshape(-1, 2).T
    size = len(accepts)
    leads = csr_array((np.ones(len(starts), np.int32), (starts, ends)), (size, size))
    needs = np.where(accepts, 0, -1)
    frontier, tokens = accepts, 0
    while frontier.any():
        tokens += 1
        frontier = (leads @ frontier.astype(np.int32) > 0) & (needs < 0)
        needs[frontier] = tokens
    return needs
