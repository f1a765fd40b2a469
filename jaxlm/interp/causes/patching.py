"""What causes a prediction: the model is changed at many sites, one at a time.

A metric is a function of the logits `[B, V]` at one position. A sweep computes it for
each of many edits in one compiled program: `jax.jit` it, with the metric and the config
bound by `functools.partial`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.kv_cache import Cache, LayerCache
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.layout import reshape
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
    start: int | Int[Array, ""] = 0,
    stream: Float[Array, "B T D"] | None = None,
) -> Float[Array, ""]:
    """Returns the metric of the edited model; the head is applied at one position.

    Args:
      start, stream: as `forward`: the layers before `start` are not run.
    """
    out = forward(
        *(config, params, tokens), edits=edits, head=False, start=start, stream=stream
    )
    return metric(_logits(config, params, out.hidden_states[:, position]))


def _in_batches(function: Callable[[Any], Any], cells: Any, batch_size: int) -> Any:
    """Returns `function` of batches of the cells, one after the other, joined again.

    All batches have one size, at most `batch_size`: a smaller last one would compile
    another program. The last cell fills them.
    """
    count = len(jax.tree.leaves(cells)[0])
    batches = -(-count // batch_size)
    size = -(-count // batches)
    filled = np.minimum(np.arange(batches * size), count - 1).reshape(batches, size)
    found = jax.lax.map(function, jax.tree.map(lambda x: x[filled], cells))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def sweep(
    config: ModelConfig,
    metric: Metric,
    params: Params,
    tokens: Int[Array, "B T"],
    edits_of: Callable[[Any], Sequence[Edit]],
    cells: Any,
    *,
    layers: Int[Array, " C"] | None = None,
    stream: Float[Array, "L B T D"] | None = None,
    position: int = -1,
    batch_size: int = 32,
) -> Float[Array, " C"]:
    """Returns the metric with each cell's edits.

    Args:
      edits_of: makes the edits of one cell.
      cells: arrays with one more axis in front, C; `edits_of` gets an entry of each.
      layers: the first layer that each cell changes. Cells are then computed by layer,
        and the layers before it only once, in `stream`.
      stream: for `layers`: the trace of `resid_pre` of the unedited text.
      position: of the logits; -1 is the last.
      batch_size: how many cells are computed at once: a bound on memory.
    """
    assert (layers is None) == (stream is None)

    def batch(chosen: Any) -> Array:
        cells, layers = chosen
        start = 0 if layers is None else jnp.min(layers)
        begin = None if stream is None else stream[start]

        def one(cell: Any) -> Array:
            edits = edits_of(cell)
            return metric_of(
                *(config, metric, params, tokens, edits, position, start, begin)
            )

        return jax.vmap(one)(cells)

    if layers is None:
        return _in_batches(batch, (cells, None), batch_size)
    order = jnp.argsort(layers)
    chosen = jax.tree.map(lambda x: x[order], (cells, layers))
    return _in_batches(batch, chosen, batch_size)[jnp.argsort(order)]


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

        def one(pair: tuple[Array, Array]) -> Array:
            out = forward(
                *(config, params, tokens[:, first:]),
                cache=cache,
                edits=edits_of(*pair),
                head=False,
                start=start,
                stream=stream,
            )
            return out.hidden_states[:, position - first]

        pairs = jnp.repeat(layers, len(cells)), jnp.tile(cells, group)
        return _in_batches(jax.vmap(one), pairs, batch_size)

    found = jax.lax.map(of_group, starts)
    shape = (len(starts) * group, len(cells), *found.shape[2:])
    kept = (None, None, *range(2, found.ndim))
    return reshape(found, shape, kept)[: config.num_layers]


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
    values = _in_batches(jax.vmap(one), flat, batch_size)
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

    def moved(change: Array) -> tuple[Array, Array]:
        out = forward(
            *(config, params, tokens),
            taps=(Tap(site),),
            edits=(Edit(site, "add", change),),
            head=False,
        )
        logits = _logits(config, params, out.hidden_states[:, position])
        return metric(logits), out.trace[site]

    gradient, own = jax.grad(moved, has_aux=True)(jnp.zeros_like(source))
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

    own = forward(config, params, tokens, taps=(Tap("resid_pre"),), head=False)
    exact = sweep(
        *(config, metric, params, tokens, edits_of, cells),
        layers=cells[:, 0],
        stream=own.trace["resid_pre"],
        position=position,
    )
    logits = _logits(config, params, own.hidden_states[:, position])
    return cells, exact - metric(logits)
