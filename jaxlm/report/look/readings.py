"""The compiled programs of a `View`: analyses of one forward pass.

They are few, since a page is made once for each model and length of text, and
compiling takes longer than running.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.interp.attention_maps import sink_mass, value_weighted
from jaxlm.interp.cache_contents import cache_contents, num_readers, read_mass
from jaxlm.interp.causes.logit_attribution import head_rows, unit_attribution
from jaxlm.interp.comparison import cosine
from jaxlm.interp.feed_forward_memory import promoted_tokens, strongest_units
from jaxlm.interp.head_scores import duplicate_token, induction, previous_token
from jaxlm.interp.jacobian_lens import transported
from jaxlm.interp.lens import logit_lens, stream_norms
from jaxlm.interp.prediction import entropy, most_likely, rank, surprise
from jaxlm.model.trace import absent_sites
from jaxlm.model.transformer import Output, forward
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params, Trace

RUN_ONCE = {"xla_backend_optimization_level": 0}
"""For programs that run once or twice: compiled in half the time, and slower."""
ANSWERS = 64
"""Next tokens at each position."""
LENS = 5
"""Next tokens of each stream."""
UNITS = 12
"""Feed-forward units at each position."""
PROMOTED = 8
"""Tokens of each unit."""


class Reading(NamedTuple):
    """What one forward pass has read of a text."""

    row: Int[np.ndarray, "1 T"]
    logits: Float[np.ndarray, "T V"]
    """On the host."""
    trace: Trace
    """Of the taps of a view."""
    found: dict[str, np.ndarray]
    """Of `summary`, on the host."""


def reading(
    config: ModelConfig, position: int, params: Params, ids: Int[np.ndarray, " T"]
) -> Reading:
    """Reads a text; some sites at one position only."""
    row = ids[None]
    out = read(config, position, params, row)
    found = summary(config, params, out.trace, out.logits, row)
    return Reading(row, np.asarray(out.logits)[0], out.trace, jax.device_get(found))


@partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def read(
    config: ModelConfig, position: int, params: Params, tokens: Int[Array, "1 T"]
) -> Output:
    """Runs the model with the taps of a view; some read one position only."""
    absent = absent_sites(config)
    query = "q" if config.qk_norm == "none" else "q_normed"
    taps = [
        *(Tap(site) for site in ("embed", "pos_embed", "resid_pre", "resid_mid")),
        *(Tap(site) for site in ("resid_post", "k_rot", "v", "attn_lse", "attn_probs")),
        *(Tap(site) for site in ("attn_out_post", "mlp_out_post", "mlp_act")),
        *(Tap(site) for site in ("expert_ids", "expert_weights")),
        *(Tap(site) for site in ("attn_norm_div", "mlp_norm_div", "final_norm_div")),
        *(Tap(site, reduce="norm") for site in ("attn_in", "mlp_in")),
        *(Tap(site, positions=(position,)) for site in (query, "q_rot", "head_out")),
    ]
    kept = tuple(tap for tap in taps if tap.site not in absent)
    return forward(config, params, tokens, taps=kept)


@partial(jax.jit, static_argnums=0, compiler_options=RUN_ONCE)
def summary(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    logits: Float[Array, "1 T V"],
    tokens: Int[Array, "1 T"],
) -> dict[str, Array]:
    """Returns what is short of the text, its answers, heads and additions."""
    probs, values = trace["attn_probs"], trace["v"]
    attention, feed_forward = trace["attn_out_post"], trace["mlp_out_post"]
    ids, probabilities = most_likely(logits[0], min(ANSWERS, logits.shape[-1]))
    contents = cache_contents(config, trace["k_rot"], values)
    ones = jnp.ones_like(probs[..., :1, :])
    lengths = value_weighted(ones, values, params["layers"]["attn"]["o"])
    kinds = (
        previous_token(probs),
        duplicate_token(probs, tokens),
        induction(probs, tokens),
        sink_mass(probs),
    )
    readers = num_readers(config, tokens.shape[1])
    middle = trace.get("resid_mid", trace["resid_pre"])
    return {
        "surprise": surprise(logits, tokens)[0],
        "rank": rank(logits[:, :-1], tokens[:, 1:])[0],
        "ids": ids,
        "probabilities": probabilities,
        "logits": jnp.take_along_axis(logits[0], ids, axis=-1),
        "entropy": entropy(logits[0]),
        "key_lengths": contents.key_lengths[:, 0],
        "cached_value_lengths": contents.value_lengths[:, 0],
        "read": jnp.mean(read_mass(probs)[:, 0], axis=1) / readers,
        "value_lengths": lengths[:, 0, :, 0],
        "kinds": jnp.stack([kind[:, 0] for kind in kinds], axis=-1),
        "attention": stream_norms(attention)[:, 0],
        "feed_forward": stream_norms(feed_forward)[:, 0],
        "attention_alignment": cosine(attention, trace["resid_pre"])[:, 0],
        "feed_forward_alignment": cosine(feed_forward, middle)[:, 0],
    }


@partial(jax.jit, static_argnums=0)
def lens(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    answers: Int[Array, " T"],
    jacobian: Float[Array, "L D D"] | None = None,
) -> tuple[Array, ...]:
    """Returns the fields of a `StreamView`; all logits of one layer at a time.

    Args:
      jacobian: of a Jacobian lens; None: by the logit lens.
    """

    def one(stream: Float[Array, "1 T D"]) -> tuple[Array, ...]:
        logits = logit_lens(config, params, stream[None])[0, 0]
        ids, probabilities = most_likely(logits, min(LENS, logits.shape[-1]))
        return ids, probabilities, entropy(logits), rank(logits, answers)

    start, after = trace["resid_pre"][:1], trace["resid_post"]
    lengths = stream_norms(jnp.concatenate([start, after])[:, 0])
    if jacobian is not None:
        after = transported(jacobian, after)
    return *jax.lax.map(one, jnp.concatenate([start, after])), lengths


@partial(jax.jit, static_argnums=0)
def unit_numbers(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    answers: Int[Array, " T"],
    positions: Int[Array, " p"],
) -> tuple[Array, ...]:
    """Returns the fields of a `UnitView` after its positions.

    Args:
      trace: of `mlp_act` and `final_norm_div`.

    Raises:
      ValueError: as `unit_attribution`.
    """
    rows = head_rows(config, params).astype(jnp.float32)
    # Logits are compared with each other: what all tokens get does nothing.
    mean = jnp.mean(rows, axis=0)
    count = min(UNITS, config.hidden_dim)

    def one(position: Int[Array, ""]) -> tuple[Array, ...]:
        at = {site: x[..., position[None], :] for site, x in trace.items()}
        direction = rows[answers[position]] - mean
        parts = unit_attribution(config, params, at, direction)[:, 0, 0]
        units = strongest_units(parts, count)
        activations = trace["mlp_act"][units.layers, 0, :, units.units]
        promotes, _ = promoted_tokens(
            *(config, params, units.layers, units.units),
            min(PROMOTED, len(rows)),
            jnp.sign(activations[:, position]),
        )
        return *units, jnp.sum(parts), activations, promotes

    return jax.lax.map(one, positions)
