"""What causes a prediction: the model is changed at many places, one after the other.

A metric is a function of the logits `[B, V]` at one position. A sweep computes it for
each of many edits in one compiled program: `jax.jit` it, with the metric and the config
bound by `functools.partial`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params

Metric = Callable[[Float[Array, "B V"]], Float[Array, ""]]


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
    return metric(unembed(config, params, out.hidden_states[:, position]))


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


def _grid(rows: int, columns: int) -> tuple[Array, Array]:
    """Returns the indices of all cells of a table, row by row."""
    grid = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    return grid[0].reshape(-1), grid[1].reshape(-1)


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
    """
    L, T = config.num_layers, tokens.shape[1]

    def edits_of(cell: Any) -> tuple[Edit, ...]:
        layer, at = cell
        return (Edit(site, "set", source, layer=layer, position=at),)

    values = sweep(
        *(config, metric, params, tokens, edits_of, _grid(L, T)),
        position=position,
        batch_size=batch_size,
    )
    return values.reshape(L, T)


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
    L, N = config.num_layers, config.num_heads

    def edits_of(cell: Any) -> tuple[Edit, ...]:
        layer, head = cell
        return (Edit("z", "scale", scale, layer=layer, head=head),)

    values = sweep(
        *(config, metric, params, tokens, edits_of, _grid(L, N)),
        position=position,
        batch_size=batch_size,
    )
    return values.reshape(L, N)


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
