"""From logits to a token: the rules in the order in which they apply.

1. logit bias and forbidden ids;
2. repetition, presence and frequency penalty, DRY;
3. what may not follow: repeated n-grams, and stop tokens before the minimum length;
4. a grammar: what its text may not go on with;
5. temperature; greedy rows take the largest logit here;
6. top-n-sigma, top-k, top-p, min-p, typical-p, XTC, each on what the one before left.

Settings are arrays, and a rule that no row uses is skipped while the program runs, so
one compiled program serves them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.infer.row_settings import RowSettings
from jaxlm.infer.rules import filters, penalties
from jaxlm.infer.rules.automata import FREE, StateTable
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.rules.penalties import History

# Below this temperature logits / temperature could fall below `NEVER`, and the largest
# logit has all the probability anyway.
GREEDY_BELOW = 1e-20
# A scaled logit that is this much below the largest has no probability in f32.
NEGLIGIBLE = -1e20


def sample_tokens(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    settings: RowSettings,
    history: History,
    table: StateTable,
    grammar_states: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Samples a token (int32) for each row.

    Args:
      logits: f32; `NEVER` for ids that do not exist.
      keys: one for each row and index in it, so that a row does not depend on its
        neighbours.
      grammar_states: where each row is in its automaton.
    """
    logits = penalized(logits, settings, history)
    left = settings.max_new_tokens - history.num_new
    logits = _where_used(
        grammar_states != FREE,
        lambda x: keep_allowed(x, table, grammar_states, left),
        logits,
    )
    greedy = settings.temperature < GREEDY_BELOW
    largest = jnp.argmax(logits, axis=-1)

    def draw() -> Int[Array, " B"]:
        drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits, keys, settings))
        return jnp.where(greedy, largest, drawn)

    tokens = jax.lax.cond(greedy.all(), lambda: largest, draw)
    return tokens.astype(jnp.int32)


def keep_allowed(
    logits: Float[Array, "B V"],
    table: StateTable,
    states: Int[Array, " B"],
    left: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Keeps the tokens after which a text can still end in time, in its grammar.

    The grammar comes before the other rules: if those left none of its tokens, all of
    them are equally likely.

    Args:
      left: new tokens that each row has room for, this one included. It is at least
        what the state of the row needs.
    """
    next_states = table.next_states[states]
    needs = table.needs[jnp.maximum(next_states, 0)]
    allowed = (next_states >= 0) & (needs < left[:, None])
    kept = jnp.where(allowed, logits, NEVER)
    has_any = (kept > NEGLIGIBLE).any(axis=1, keepdims=True)
    return jnp.where(has_any, kept, jnp.where(allowed, 0.0, NEVER))


def penalized(
    logits: Float[Array, "B V"], settings: RowSettings, history: History
) -> Float[Array, "B V"]:
    """Applies the rules that come before the temperature."""
    s = settings
    rules: list[tuple[Bool[Array, " B"], Callable[[Array], Array]]] = [
        (
            s.repetition_penalty != 1,
            lambda x: penalties.repetition_penalty(x, history, s.repetition_penalty),
        ),
        (
            (s.presence_penalty != 0) | (s.frequency_penalty != 0),
            lambda x: penalties.presence_and_frequency_penalty(
                x, history, s.presence_penalty, s.frequency_penalty
            ),
        ),
        (
            s.dry_multiplier > 0,
            lambda x: penalties.dry_penalty(
                *(x, history, s.dry_multiplier, s.dry_base, s.dry_allowed_length),
                s.is_dry_breaker,
            ),
        ),
        (
            s.no_repeat_ngram > 0,
            lambda x: penalties.forbid_repeated_ngrams(x, history, s.no_repeat_ngram),
        ),
        (
            history.num_new < s.min_new_tokens,
            lambda x: jnp.where(s.is_stop, NEVER, x),
        ),
    ]

    def apply(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        for used, rule in rules:
            logits = _where_used(used, rule, logits)
        return logits

    # GPUs wait at each condition (24 us): a plain text meets one here instead of five.
    is_used = jnp.stack([used.any() for used, _ in rules]).any()
    return jax.lax.cond(is_used, apply, lambda x: x, logits + s.bias)


def filtered(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], settings: RowSettings
) -> Float[Array, "B V"]:
    """Applies the temperature and the filters, to rows that are not greedy."""
    for rule in filter_rules(keys, settings).values():
        logits = rule(logits)
    return logits


def filter_rules(
    keys: Key[Array, " B"], settings: RowSettings
) -> dict[str, Callable[[Float[Array, "B V"]], Float[Array, "B V"]]]:
    """Returns the temperature and the filters, in order, by their fields' names."""
    s = settings
    greedy = s.temperature < GREEDY_BELOW

    def scale(logits):
        temperature = jnp.where(greedy, 1.0, s.temperature)[:, None]
        scaled, largest = logits / temperature, logits.max(axis=-1, keepdims=True)
        # Forbidden ids stay at `NEVER`, by which filters know them.
        return jnp.where(logits - largest < NEGLIGIBLE * temperature, NEVER, scaled)

    def drop_top_choices(logits, probability):
        # The key itself draws the token.
        own = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        return filters.drop_top_choices(logits, own, probability, s.xtc_threshold)

    def rule(used, keep, setting):
        return lambda x: _where_used(used & ~greedy, lambda x: keep(x, setting), x)

    return {
        "temperature": scale,
        "top_n_sigma": rule(s.top_n_sigma > 0, filters.keep_top_n_sigma, s.top_n_sigma),
        "top_k": rule(s.top_k > 0, filters.keep_top_k, s.top_k),
        "top_p": rule(s.top_p < 1, filters.keep_top_p, s.top_p),
        "min_p": rule(s.min_p > 0, filters.keep_min_p, s.min_p),
        "typical_p": rule(s.typical_p < 1, filters.keep_typical, s.typical_p),
        "xtc_probability": rule(
            s.xtc_probability > 0, drop_top_choices, s.xtc_probability
        ),
    }


def _where_used(
    used: Bool[Array, " B"], rule: Callable[[Array], Array], logits: Array
) -> Float[Array, "B V"]:
    """Applies a rule to the rows that use it; without any it costs nothing."""
    return jax.lax.cond(
        used.any(),
        lambda x: jnp.where(used[:, None], rule(x), x),
        lambda x: x,
        logits,
    )
