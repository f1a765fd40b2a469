"""How a logit came about: a graph of tokens, heads and units, for one prompt.

With attention probabilities, divisors of norms and gates of the feed-forward held at
their values, a model is linear in its embeddings: each logit is a sum over paths, and
each number here is exact for that linear model. A feed-forward without a gate, or with
a clamp, is replaced by its derivative. Heads and units are nodes themselves, so no
transcoder is needed. Only the strongest nodes are kept; how much of each flow comes
from other nodes, or from biases, is reported with it. Sources: Ameisen et al. 2025,
"Circuit tracing" (frozen attention); Elhage et al. 2021.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.interp.causes.logit_attribution import logit_weights, through_norm
from jaxlm.model.transformer import forward
from jaxlm.ops.activations import ACTIVATIONS, FACTORS
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params, Trace

KINDS = ("token", "head", "unit")


class AttributionGraph(NamedTuple):
    """The strongest nodes, in the order in which they are computed."""

    kinds: Int[Array, " n"]
    """Of each node, as an index of `KINDS`."""
    layers: Int[Array, " n"]
    """-1 for a token's embedding."""
    indices: Int[Array, " n"]
    """Of the head or the unit; 0 for a token."""
    positions: Int[Array, " n"]
    parts: Float[Array, " n"]
    """What of the logit flows through each node."""
    edges: Float[Array, "n n"]
    """[from, to]: what of the second node's part comes straight from the first."""
    logit_edges: Float[Array, " n"]
    """What each node adds to the logit itself."""
    logit: Float[Array, ""]
    unexplained: Float[Array, " n"]
    """The share of each node's part that comes from none of the nodes; 0 of a token."""
    unexplained_logit: Float[Array, ""]
    """The same share of the logit."""


def attribution_graph(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "1 T"],
    direction: Float[Array, " D"],
    *,
    count: int = 64,
) -> AttributionGraph:
    """Returns the `count` nodes with the largest |parts| of the last token's logit.

    One forward and one backward pass. What the derivative of a feed-forward without a
    gate, or with a clamp, misses is part of what is unexplained.

    Args:
      direction: of `logit_direction`, also a difference of two tokens.

    Raises:
      ValueError: for a model whose parts do not add up, or which has experts.
    """
    if config.norm_placement != "pre" or not config.final_norm or config.num_experts:
        raise ValueError(
            "the graph needs norms before attention and feed-forward only, a final "
            "norm, and no experts: take logit_attribution"
        )
    weights = logit_weights(config, params, direction)
    trace, gradients, logit = _frozen_pass(config, params, tokens, direction)
    nodes = _strongest(config, trace, gradients, count)
    written = _written(config, params, trace, nodes)
    reads = _reads(config, params, trace, gradients, nodes)  # [to, T, D]
    # One edge: what the first writes at its position, as the second reads it there.
    flows = jnp.einsum("FD,TFD->FT", written, reads[:, nodes.positions])
    order = 2 * nodes.layers + (nodes.kinds == KINDS.index("unit"))
    if config.parallel_block:
        order = nodes.layers
    edges = jnp.where(order[:, None] < order, flows, 0.0)
    last = nodes.positions == tokens.shape[1] - 1
    div = trace["final_norm_div"][-1, 0]
    logit_edges = jnp.where(last, written @ weights / div, 0.0)
    share = 1 - jnp.sum(edges, axis=0) / nodes.parts
    unexplained = jnp.where(nodes.kinds == KINDS.index("token"), 0.0, share)
    rest = 1 - jnp.sum(logit_edges) / logit
    return AttributionGraph(*nodes, edges, logit_edges, logit, unexplained, rest)


class _Nodes(NamedTuple):
    kinds: Any
    layers: Any
    indices: Any
    positions: Any
    parts: Any


def _frozen_pass(
    config: ModelConfig, params: Params, tokens: Array, direction: Array
) -> tuple[Trace, dict[str, Array], Array]:
    """Returns values, derivatives of the logit by three sites, and the logit, f32."""
    frozen = ["attn_probs", "attn_norm_div", "mlp_norm_div", "final_norm_div"]
    frozen += ["mlp_pre"] if config.gated else []
    held = tuple(Edit(site, "freeze") for site in frozen)
    moved = ("embed", "z", "mlp_act")
    read = {*frozen, *moved, "mlp_pre"}
    if config.activation in FACTORS:
        read.add("mlp_up")
    if config.position in ("learned", "sinusoidal"):
        read.add("pos_embed")
    taps = tuple(Tap(site) for site in sorted(read))

    def run(changes: dict[str, Array]) -> tuple[Array, Trace]:
        edits = [Edit(site, "add", change) for site, change in changes.items()]
        out = forward(
            *(config, params, tokens), taps=taps, edits=(*edits, *held), head=False
        )
        return out.hidden_states[0, -1].astype(jnp.float32) @ direction, out.trace

    # Arrays of NumPy cannot be indexed while only shapes are computed.
    params, tokens = jax.tree.map(jnp.asarray, (params, tokens))
    shapes = jax.eval_shape(lambda: run({})[1])
    zeros = {site: jnp.zeros(shapes[site].shape, shapes[site].dtype) for site in moved}
    (logit, trace), gradients = jax.value_and_grad(run, has_aux=True)(zeros)
    float32 = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    # One text: no axis of the batch.
    trace = {
        site: x[0] if SITES[site].outside_layers else x[:, 0]
        for site, x in trace.items()
    }
    gradients = {"embed": gradients["embed"][0]} | {
        site: gradients[site][:, 0] for site in ("z", "mlp_act")
    }
    return float32(trace), float32(gradients), logit


def _embedding(trace: Trace) -> Float[Array, "T D"]:
    return trace["embed"] + trace.get("pos_embed", 0.0)


def _strongest(
    config: ModelConfig, trace: Trace, gradients: dict[str, Array], count: int
) -> _Nodes:
    """Returns the nodes with the largest |parts|, in the order of the network."""
    parts = (
        jnp.sum(_embedding(trace) * gradients["embed"], axis=-1),  # [T]
        jnp.sum(trace["z"] * gradients["z"], axis=-1),  # [L, T, N]
        trace["mlp_act"] * gradients["mlp_act"],  # [L, T, F]
    )
    T, N, F = len(parts[0]), config.num_heads, parts[2].shape[-1]
    flat = jnp.concatenate([part.reshape(-1) for part in parts])
    _, best = jax.lax.top_k(jnp.abs(flat), min(count, len(flat)))
    first_unit = T + parts[1].size
    kinds = (best >= T).astype(jnp.int32) + (best >= first_unit)
    width = jnp.where(kinds == 2, F, N)
    number = best - jnp.where(kinds == 2, first_unit, T)
    layers, number = jnp.divmod(number, T * width)
    positions, indices = jnp.divmod(number, width)
    is_token = kinds == 0
    nodes = _Nodes(
        kinds,
        jnp.where(is_token, -1, layers),
        jnp.where(is_token, 0, indices),
        jnp.where(is_token, best, positions),
        flat[best],
    )
    order = jnp.argsort((3 * nodes.layers + nodes.kinds) * T + nodes.positions)
    return jax.tree.map(lambda x: x[order], nodes)


def _written(
    config: ModelConfig, params: Params, trace: Trace, nodes: _Nodes
) -> Float[Array, "n D"]:
    """Returns what each node writes into the residual stream at its position."""
    layers = params["layers"]
    kinds, at, index, position = nodes[:4]
    head, unit = (jnp.where(kinds == kind, index, 0) for kind in (1, 2))
    out = layers["attn"]["o"][at, head].astype(jnp.float32)
    by_head = jnp.einsum("nH,nHD->nD", trace["z"][at, position, head], out)
    down = layers["mlp"]["down"][at, unit].astype(jnp.float32)
    by_unit = trace["mlp_act"][at, position, unit][:, None] * down
    by_kind = jnp.stack([_embedding(trace)[position], by_head, by_unit])
    return by_kind[kinds, jnp.arange(len(kinds))]


def _reads(
    config: ModelConfig,
    params: Params,
    trace: Trace,
    gradients: dict[str, Array],
    nodes: _Nodes,
) -> Float[Array, "n T D"]:
    """Returns the derivative of each node's part by the stream that it reads.

    A head reads each position by its probability there, a unit its own position.
    """
    layers = params["layers"]
    kinds, at, index, position = nodes[:4]
    head, unit = (jnp.where(kinds == kind, index, 0) for kind in (1, 2))
    T = len(trace["embed"])

    values = layers["attn"]["v"].astype(jnp.float32)
    values = values[at, :, head // (config.num_heads // config.num_kv_heads)]
    wanted = jnp.einsum("nDH,nH->nD", values, gradients["z"][at, position, head])
    vectors = through_norm(config, layers["attn_norm"]["scale"][at], wanted)
    probs = trace["attn_probs"][at, head, position]
    by_head = probs / trace["attn_norm_div"][at, :, 0]

    # With the gate held, a unit is its other projection times a constant, unless the
    # activation changes that projection too.
    function = ACTIVATIONS[config.activation]
    slope = function if config.gated else jax.vmap(jax.grad(function))
    scale = slope(trace["mlp_pre"][at, position, unit])
    if config.activation in FACTORS:
        slope = jax.vmap(jax.grad(FACTORS[config.activation]))
        scale = scale * slope(trace["mlp_up"][at, position, unit])
    scale = scale * gradients["mlp_act"][at, position, unit]
    up = layers["mlp"]["up"][at, :, unit].astype(jnp.float32)
    unit_vectors = through_norm(config, layers["mlp_norm"]["scale"][at], up)
    here = jax.nn.one_hot(position, T) / trace["mlp_norm_div"][at, :, 0]
    by_unit = here * scale[:, None]

    reads = by_head[:, :, None] * vectors[:, None]
    unit_reads = by_unit[:, :, None] * unit_vectors[:, None]
    kinds = kinds[:, None, None]
    return jnp.where(kinds == 1, reads, jnp.where(kinds == 2, unit_reads, 0.0))
