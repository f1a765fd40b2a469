"""Who wrote the answer, and what happens without: attribution beside patching."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm import tree
from jaxlm.config import ModelConfig
from jaxlm.interp.causes.logit_attribution import (
    attribution_taps,
    head_attribution,
    logit_attribution,
    logit_direction,
)
from jaxlm.interp.causes.patching import Metric, attribution_patching, sweep
from jaxlm.interp.prediction import most_likely
from jaxlm.model.transformer import Output
from jaxlm.ops.probing.edit import Edit
from jaxlm.report.inside.view import CauseView, ComparisonView
from jaxlm.types import Params, Trace

# Bounds of the edited calls: operations of all of them, and how many.
_OPERATIONS = 6e11
_MIN_CALLS, _MAX_CALLS = 32, 480
# Next tokens of the other text.
_ANSWERS = 12
# An index that no layer, position or head has: such an edit changes nothing.
_NOWHERE = -1


def causes(
    config: ModelConfig,
    params: Params,
    row: Int[Array, "1 T"],
    trace: Trace,
    answers: Int[np.ndarray, " k"],
    position: int,
    other: tuple[Int[Array, "1 T"], Output] | None = None,
) -> tuple[CauseView, ComparisonView | None]:
    """Returns what wrote the difference of two tokens' logits, and what changes it.

    Args:
      trace: with the sites of `logit_attribution`, and `head_out` at the position.
      answers: the likeliest tokens there.
      other: another text whose streams are put into this one, and the model's output.
    """
    answer, source, theirs = int(answers[0]), None, None
    against = int(answers[min(1, len(answers) - 1)])
    if other is not None:
        source, theirs = other[1].trace["resid_pre"], other[1].logits[:, position]
        best = int(jnp.argmax(theirs))
        against = against if best == answer else best

    def metric(logits: Float[Array, "B V"]) -> Float[Array, ""]:
        return logits[0, answer] - logits[0, against]

    direction = logit_direction(config, params, answer, against)
    total, parts, refusal = _parts(config, params, trace, direction, position)
    heads, head_refusal = _heads(config, params, trace, direction, position)

    patches = np.zeros((0, 2), np.int32)
    estimate = np.zeros((config.num_layers, row.shape[1]), np.float32)
    if other is not None:
        run = jax.jit(partial(attribution_patching, config, metric, position=position))
        estimate = np.asarray(run(params, row, source))
        # Before the first difference of the texts the streams are the same.
        reach = np.flatnonzero(np.asarray(row != other[0])[0])
        first = reach[0] if len(reach) else row.shape[1]
        size = np.where(np.arange(row.shape[1]) < first, -1.0, np.abs(estimate))
        patches = _largest(size[:, : position + 1], _num_calls(params, row) // 2)
    size = np.zeros((config.num_layers, config.num_heads))
    size = size if heads is None else np.abs(heads)
    removed = _largest(size, _num_calls(params, row) // (1 if other is None else 2))
    run = jax.jit(partial(_changes, config, metric, position))
    values = np.asarray(run(params, row, source, _cells(patches, removed)))
    change, ablation = np.split(values[1:] - values[0], [len(patches)])

    cause = CauseView(
        position=position,
        tokens=(answer, against),
        difference=float(values[0]),
        total=total,
        parts=parts,
        heads=heads,
        refusal=refusal or head_refusal,
        ablated=removed,
        ablation=-ablation,
        ablation_agreement=(
            None if heads is None else _correlation(heads[*removed.T], -ablation)
        ),
    )
    if theirs is None:
        return cause, None
    ids, probabilities = most_likely(theirs[0], min(_ANSWERS, theirs.shape[-1]))
    return cause, ComparisonView(
        difference=float(metric(theirs)),
        ids=np.asarray(ids),
        probabilities=np.asarray(probabilities),
        estimate=estimate,
        patched=patches,
        change=change,
        agreement=_correlation(estimate[*patches.T], change),
    )


def _num_calls(params: Params, row: Int[Array, "1 T"]) -> int:
    calls = _OPERATIONS / (2 * tree.count(params) * row.shape[1])
    return int(np.clip(calls, _MIN_CALLS, _MAX_CALLS))


def _largest(size: Float[np.ndarray, "rows columns"], count: int) -> np.ndarray:
    """Returns the indices of the largest entries, but negative ones, in order."""
    count = min(count, int((size >= 0).sum()))
    chosen = np.sort(np.argsort(-size, axis=None, kind="stable")[:count])
    return np.stack(np.unravel_index(chosen, size.shape), axis=1).astype(np.int32)


def _cells(patches: Int[np.ndarray, "n 2"], removed: Int[np.ndarray, "m 2"]):
    """Returns rows of (layer, position, layer, head); the first one changes nothing."""
    cells = np.full((1 + len(patches) + len(removed), 4), _NOWHERE, np.int32)
    cells[1 : 1 + len(patches), :2] = patches
    cells[1 + len(patches) :, 2:] = removed
    return jnp.asarray(cells)


def _changes(
    config: ModelConfig,
    metric: Metric,
    position: int,
    params: Params,
    row: Int[Array, "1 T"],
    source: Float[Array, "L 1 T D"] | None,
    cells: Int[Array, "n 4"],
) -> Float[Array, " n"]:
    """Returns the metric with each cell's stream from the source and head removed.

    Both edits are in one program, as compiling takes longer than running.
    """

    def edits_of(cell: Int[Array, " 4"]) -> Sequence[Edit]:
        removed = Edit("z", "scale", 0.0, layer=cell[2], head=cell[3])
        if source is None:
            return (removed,)
        copied = Edit("resid_pre", "set", source, layer=cell[0], position=cell[1])
        return (copied, removed)

    return sweep(config, metric, params, row, edits_of, cells, position=position)


def _parts(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    direction: Float[Array, " D"],
    position: int,
) -> tuple[dict[str, float], np.ndarray | None, str | None]:
    """Returns embedding, bias and their sum with the parts; the parts; or why not."""
    if config.norm_placement == "post" or not config.final_norm:
        return {}, None, "logits of this model are no sum over layers"
    needed = {tap.site: trace[tap.site] for tap in attribution_taps(config)}
    run = jax.jit(partial(logit_attribution, config))
    found = jax.device_get(run(params, needed, direction))
    total = {
        "embedding": float(found.embedding[0, position]),
        "bias": float(found.bias),
        "sum": float(found.total[0, position]),
    }
    parts = np.stack([found.attention, found.feed_forward], axis=-1)[:, 0, position]
    return total, parts, None


def _heads(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    direction: Float[Array, " D"],
    position: int,
) -> tuple[Float[np.ndarray, "L N"] | None, str | None]:
    if config.norm_placement != "pre" or not config.final_norm:
        return None, "heads of this model do not add to the logits: a norm comes after"
    own = {
        "head_out": trace["head_out"],
        "final_norm_div": trace["final_norm_div"][:, position, None],
    }
    run = jax.jit(partial(head_attribution, config))
    return np.asarray(run(params, own, direction)[:, 0, 0]), None


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns Pearson's correlation; None where one does not vary."""
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return None
    return float(np.corrcoef(x, y)[0, 1])
