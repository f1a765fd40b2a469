"""What causes a prediction: the model is changed at many places, one after the other.

A metric is a function of the logits `[B, V]` at one position. A sweep computes it for
each of many edits in one compiled program: `jax.jit` it, with the metric and the config
bound by `functools.partial`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.kv_cache import Cache, LayerCache
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import reshard
from jaxlm.types import Params, Trace

Metric = Callable[[Float[Array, "B V"]], Float[Array, ""]]

# What the passes of a sweep share, from one unedited pass.
_BASE_TAPS = (Tap("resid_pre"), Tap("k_rot"), Tap("v"))
# A sweep goes over parts of the text, each without the tokens before it, and over
# groups of layers, each from its first layer on. Finer ones do less but compile longer.
_PARTS = 2
_LAYERS_AT_ONCE = 4


def _logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "B D"]
) -> Float[Array, "B V"]:
    """Returns logits for a metric: whole on each device, so that it may index them."""
    logits = reshard(unembed(config, params, hidden), "__")
    return logits[:, : config.vocab_size]


def metric_of(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    edits: Sequence[Edit] = (),
    position: int = -1,
) -> Float[Array, ""]:
    """Returns the metric of the edited model; the head is applied at one position."""
    out = forward(config, params, tokens, edits=edits, head=False)
    return metric(_logits(config, params, out.hidden_states[:, position]))


def sweep(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    edits_of: Callable[[Any], Sequence[Edit]],
    cells: Any,
    *,
    position: int = -1,
    batch_size: int = 32,
) -> Float[Array, " C"]:
    """Returns the metric with each cell's edits.

    Args:
      edits_of: makes the edits of one cell.
      cells: arrays with one more axis in front, C; `edits_of` gets an entry of each.
      position: of the logits; -1 is the last.
      batch_size: how many cells are computed at once: a bound on memory.
    """

    def one(cell: Any) -> Array:
        return metric_of(config, metric, params, tokens, edits_of(cell), position)

    return jax.lax.map(one, cells, batch_size=batch_size)


def _layer_sweep(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    base: Trace,
    edits_of: Callable[[Array, Array], Sequence[Edit]],
    cells: Int[Array, " C"],
    *,
    first: int,
    position: int,
    batch_size: int,
) -> Float[Array, "L C B D"]:
    """Returns the last hidden states at one position, of each layer's edits.

    Exact, and less work than whole passes: an edit in layer l needs only the layers
    from l on, and one at position p only the tokens from p on, with the keys and values
    of the unedited tokens before.

    Args:
      base: of `_base_taps`, of the unedited text.
      edits_of: makes the edits of a layer and a cell.
      first: no cell changes a token before this one.
    """
    cache = None
    if first:
        keys_and_values = LayerCache(base["k_rot"], base["v"])
        lengths = reshard(jnp.full(len(tokens), first, jnp.int32), "B")
        cache = Cache(keys_and_values, lengths, is_kept=False)
    group = _LAYERS_AT_ONCE
    starts = jnp.arange(0, config.num_layers, group)

    def of_group(start: Array) -> Array:
        stream = base["resid_pre"][start][:, first:]
        layers = jnp.minimum(start + jnp.arange(group), config.num_layers - 1)

        def one(cell: Any) -> Array:
            out = forward(
                *(config, params, tokens[:, first:]),
                cache=cache,
                edits=edits_of(*cell),
                head=False,
                start=start,
                stream=stream,
            )
            return out.hidden_states[:, position - first]

        pairs = jnp.repeat(layers, len(cells)), jnp.tile(cells, group)
        return jax.lax.map(one, pairs, batch_size=batch_size)

    found = jax.lax.map(of_group, starts)
    shape = (-1, len(cells), *found.shape[2:])
    return found.reshape(shape)[: config.num_layers]


def _metrics(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    hidden: Float[Array, "L C B D"],
    batch_size: int,
) -> Float[Array, "L C"]:
    def one(x: Array) -> Array:
        return metric(_logits(config, params, x))

    flat = hidden.reshape(-1, *hidden.shape[2:])
    values = jax.lax.map(one, flat, batch_size=batch_size)
    return values.reshape(hidden.shape[:2])


def activation_patching(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T *_"],
    *,
    site: str = "resid_pre",
    position: int = -1,
    batch_size: int = 32,
) -> Float[Array, "L T"]:
    """Returns the metric with a site set to that of `source` at one layer and position.

    For each layer and position. Source: Meng et al. 2022, arXiv:2202.05262 (causal
    tracing); Wang et al. 2022, arXiv:2211.00593.

    Args:
      tokens: the text whose model is patched.
      source: the site's trace of another text of as many tokens.
      position: of the logits; -1 is the last.
      batch_size: how many cells are computed at once: a bound on memory.
    """
    T, axis = tokens.shape[1], SITES[site].axis("T")
    assert axis is not None
    position %= T
    base = forward(config, params, tokens, taps=_BASE_TAPS, head=False)
    parts = []
    firsts = sorted({T * i // _PARTS for i in range(_PARTS)})
    for first, end in zip(firsts, [*firsts[1:], T], strict=True):
        if first > position:  # later tokens do not change what comes before
            same = base.hidden_states[None, None, :, position]
            shape = (config.num_layers, end - first, *same.shape[2:])
            parts.append(jnp.broadcast_to(same, shape))
            continue
        value = jax.lax.slice_in_dim(source, first, None, axis=axis + 1)

        def edits_of(layer: Array, at: Array, value: Array = value) -> tuple[Edit, ...]:
            return (Edit(site, "set", value, layer=layer, position=at),)

        parts.append(
            _layer_sweep(
                *(config, params, tokens, base.trace, edits_of),
                jnp.arange(first, end),
                first=first,
                position=position,
                batch_size=batch_size,
            )
        )
    hidden = jnp.concatenate(parts, axis=1)
    return _metrics(config, metric, params, hidden, batch_size)


def head_patching(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T N H"],
    *,
    position: int = -1,
    batch_size: int = 32,
) -> Float[Array, "L N"]:
    """Returns the metric with one head's output set to that of `source`.

    At all tokens, for each layer and head.

    Args:
      source: the trace of `z` of another text of as many tokens.
    """
    changed = Edit("z", "set", source)
    return _by_head(config, metric, params, tokens, changed, position, batch_size)


def head_ablation(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    scale: float = 0.0,
    position: int = -1,
    batch_size: int = 32,
) -> Float[Array, "L N"]:
    """Returns the metric with one head's output scaled, for each layer and head."""
    changed = Edit("z", "scale", scale)
    return _by_head(config, metric, params, tokens, changed, position, batch_size)


def _by_head(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    changed: Edit,
    position: int,
    batch_size: int,
) -> Float[Array, "L N"]:
    """Returns the metric with an edit of each layer and head."""
    base = forward(config, params, tokens, taps=_BASE_TAPS, head=False)

    def edits_of(layer: Array, head: Array) -> tuple[Edit, ...]:
        return (replace(changed, layer=layer, head=head),)

    hidden = _layer_sweep(
        *(config, params, tokens, base.trace, edits_of),
        jnp.arange(config.num_heads),
        first=0,
        position=position % tokens.shape[1],
        batch_size=batch_size,
    )
    return _metrics(config, metric, params, hidden, batch_size)


def attribution_patching(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T *_"],
    *,
    site: str = "resid_pre",
    position: int = -1,
) -> Float[Array, "L T"]:
    """Returns a first-order estimate of how `activation_patching` changes the metric.

    `sum (source - x) . d metric / d x` over rows and the site's last axes, for each
    layer and position, from one backward pass. Good for small changes only: check the
    largest by `activation_patching`. Source: Nanda 2023, "Attribution patching"; Syed
    et al. 2023, arXiv:2310.10348.
    """
    own = forward(config, params, tokens, taps=(Tap(site),), head=False).trace[site]

    def moved(change: Array) -> Array:
        edits = (Edit(site, "add", change),)
        return metric_of(config, metric, params, tokens, edits, position)

    gradient = jax.grad(moved)(jnp.zeros_like(own))
    axes = (1, *range(3, own.ndim))
    return jnp.sum((source - own) * gradient, axis=axes, dtype=jnp.float32)


def recheck(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    source: Float[Array, "L B T *_"],
    estimate: Float[Array, "L T"],
    count: int,
    *,
    site: str = "resid_pre",
    position: int = -1,
) -> tuple[Int[Array, "n 2"], Float[Array, " n"]]:
    """Returns the largest cells of `attribution_patching`, and their exact change.

    Arguments as there.

    Returns:
      Layer and position of the `count` cells with the largest |estimate|, and by how
      much patching them changes the metric.
    """
    _, best = jax.lax.top_k(jnp.abs(estimate).reshape(-1), count)
    cells = jnp.stack(jnp.divmod(best, tokens.shape[1]), axis=1)

    def edits_of(cell: Array) -> tuple[Edit, ...]:
        return (Edit(site, "set", source, layer=cell[0], position=cell[1]),)

    exact = sweep(config, metric, params, tokens, edits_of, cells, position=position)
    return cells, exact - metric_of(config, metric, params, tokens, (), position)
