"""Who wrote the answer, and what happens without: attribution beside patching."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int

from jaxlm import tree
from jaxlm.config import ModelConfig
from jaxlm.interp.causes.logit_attribution import (
    attribution_taps,
    head_attribution,
    key_attribution,
    logit_attribution,
    logit_direction,
)
from jaxlm.interp.causes.patching import Metric, attribution_patching, sweep
from jaxlm.ops.probing.edit import Edit
from jaxlm.report.look.readings import RUN_ONCE, Reading
from jaxlm.report.look.view import CauseView, ComparisonView
from jaxlm.types import Params, Trace

# Bounds of the edited calls: operations of all of them, and how many.
_OPERATIONS = 5e11
_MIN_CALLS, _MAX_CALLS = 32, 480
# Next tokens of the other text.
_ANSWERS = 12
# An index that no layer, position or head has: such an edit changes nothing.
_NOWHERE = -1


def causes(
    config: ModelConfig,
    params: Params,
    text: Reading,
    position: int,
    other: Reading | None = None,
) -> tuple[CauseView, ComparisonView | None]:
    """Returns what wrote the difference of two tokens' logits, and what changes it.

    Args:
      text: whose likeliest token at the position is the answer.
      other: another text whose streams are put into this one.
    """
    answers = text.found["ids"][position]
    answer, against = int(answers[0]), int(answers[min(1, len(answers) - 1)])
    if other is not None:
        best = int(other.found["ids"][position, 0])
        against = against if best == answer else best
    tokens = np.array([answer, against], np.int32)
    difference = _difference(text, position, tokens)
    total, parts, heads, keys, refusal = _written(
        config, position, params, text.trace, tokens
    )

    calls, row = _num_calls(params, text.row), text.row
    patches, first = np.zeros((0, 2), np.int32), 0
    source = estimate = None
    if other is not None:
        source = other.trace["resid_pre"]
        estimate = np.asarray(_estimate(config, position, params, row, source, tokens))
        # Before the first difference of the texts the streams are the same.
        reach = np.flatnonzero(row[0] != other.row[0])
        first = int(reach[0]) if len(reach) else row.shape[1]
        size = np.where(np.arange(row.shape[1]) < first, -1.0, np.abs(estimate))
        calls //= 2
        patches = _largest(size[:, : position + 1], calls)
    size = np.zeros((config.num_layers, config.num_heads))
    removed = _largest(size if heads is None else np.abs(heads), calls)
    stream, cells = text.trace["resid_pre"], _cells(patches, removed)
    changed = _changed(config, position, params, row, stream, source, cells, tokens)
    change, lost = np.split(np.asarray(changed) - difference, [len(patches)])

    cause = CauseView(
        position=position,
        tokens=(answer, against),
        difference=difference,
        total=total,
        parts=parts,
        heads=heads,
        keys=keys,
        refusal=refusal,
        ablated=removed,
        ablation=-lost,
        ablation_agreement=(
            None if heads is None else _rank_correlation(heads[*removed.T], -lost)
        ),
    )
    if other is None or estimate is None:
        return cause, None
    return cause, ComparisonView(
        difference=_difference(other, position, tokens),
        ids=other.found["ids"][position, :_ANSWERS],
        probabilities=other.found["probabilities"][position, :_ANSWERS],
        estimate=estimate,
        patched=patches,
        change=change,
        agreement=_rank_correlation(estimate[*patches.T], change),
        first=first,
    )


def _difference(text: Reading, position: int, tokens: Int[np.ndarray, " 2"]) -> float:
    first, second = text.logits[position, tokens]
    return float(first - second)


def _metric(tokens: Int[Array, " 2"]) -> Metric:
    return lambda logits: logits[0, tokens[0]] - logits[0, tokens[1]]


def _num_calls(params: Params, row: Int[np.ndarray, "1 T"]) -> int:
    calls = _OPERATIONS / (2 * tree.count(params) * row.shape[1])
    return int(np.clip(calls, _MIN_CALLS, _MAX_CALLS))


def _largest(size: Float[np.ndarray, "rows columns"], count: int) -> np.ndarray:
    """Returns the indices of the largest entries, but negative ones, in order."""
    count = min(count, int((size >= 0).sum()))
    chosen = np.sort(np.argsort(-size, axis=None, kind="stable")[:count])
    return np.stack(np.unravel_index(chosen, size.shape), axis=1).astype(np.int32)


def _cells(patches: Int[np.ndarray, "n 2"], removed: Int[np.ndarray, "m 2"]):
    """Returns rows of (layer, position, layer, head), of which one pair is nowhere."""
    cells = np.full((len(patches) + len(removed), 4), _NOWHERE, np.int32)
    cells[: len(patches), :2] = patches
    cells[len(patches) :, 2:] = removed
    return cells


@partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def _estimate(
    config: ModelConfig,
    position: int,
    params: Params,
    row: Int[Array, "1 T"],
    source: Float[Array, "L 1 T D"],
    tokens: Int[Array, " 2"],
) -> Float[Array, "L T"]:
    metric = _metric(tokens)
    return attribution_patching(config, metric, params, row, source, position=position)


@partial(jax.jit, static_argnums=(0, 1))
def _changed(
    config: ModelConfig,
    position: int,
    params: Params,
    row: Int[Array, "1 T"],
    stream: Float[Array, "L 1 T D"],
    source: Float[Array, "L 1 T D"] | None,
    cells: Int[Array, "n 4"],
    tokens: Int[Array, " 2"],
) -> Float[Array, " n"]:
    """Returns the metric with each cell's stream from the source or head removed.

    Both edits are in one program, as compiling takes longer than running.
    """

    def edits_of(cell: Int[Array, " 4"]) -> Sequence[Edit]:
        removed = Edit("z", "scale", 0.0, layer=cell[2], head=cell[3])
        if source is None:
            return (removed,)
        copied = Edit("resid_pre", "set", source, layer=cell[0], position=cell[1])
        return (copied, removed)

    return sweep(
        *(config, _metric(tokens), params, row, edits_of, cells),
        layers=jnp.maximum(cells[:, 0], cells[:, 2]),
        stream=stream,
        position=position,
    )


def _written(
    config: ModelConfig,
    position: int,
    params: Params,
    trace: Trace,
    tokens: Int[np.ndarray, " 2"],
) -> tuple[
    dict[str, float],
    np.ndarray | None,
    Float[np.ndarray, "L N"] | None,
    Float16[np.ndarray, "L N S"] | None,
    str | None,
]:
    """Returns the figures of a `CauseView`: total, parts, heads, keys, refusal."""
    if config.norm_placement == "post" or not config.final_norm:
        return {}, None, None, None, "logits of this model are no sum over layers"
    sites = [tap.site for tap in attribution_taps(config)]
    refusal = None
    if config.norm_placement == "pre":
        sites += ["head_out", "attn_probs", "v"]
    else:
        refusal = (
            "heads of this model do not add to the logits: a norm comes after them"
        )
    read = {site: trace[site] for site in sites}
    found = jax.device_get(_attributed(config, position, params, read, tokens))
    total, attention, feed_forward, heads, keys = found
    total = {name: float(value) for name, value in total.items()}
    parts = np.stack([attention, feed_forward], axis=-1)
    return total, parts, heads, keys, refusal


@partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def _attributed(
    config: ModelConfig,
    position: int,
    params: Params,
    trace: Trace,
    tokens: Int[Array, " 2"],
) -> tuple[dict[str, Array], Array, Array, Array | None, Array | None]:
    """Returns the figures of `_written`; no heads without `head_out`."""
    direction = logit_direction(config, params, tokens[0], tokens[1])
    found, heads = logit_attribution(config, params, trace, direction), None
    keys = None
    total = {
        "embedding": found.embedding[0, position],
        "bias": found.bias,
        "sum": found.total[0, position],
    }
    if "head_out" in trace:
        divisor = trace["final_norm_div"][:, position, None]
        read = {"head_out": trace["head_out"], "final_norm_div": divisor}
        heads = head_attribution(config, params, read, direction)[:, 0, 0]
        probs = trace["attn_probs"][:, :, :, position, None]
        read |= {"attn_probs": probs, "v": trace["v"]}
        keys = key_attribution(config, params, read, direction)[:, 0, :, 0]
        keys = keys.astype(jnp.float16)
    at = (slice(None), 0, position)
    return total, found.attention[at], found.feed_forward[at], heads, keys


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns Spearman's correlation; None where one does not vary."""
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the place of each in their order; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
