"""From taps to a trace: sites recorded in the pass, and sites derived after it.

A derived site (scores, probabilities, single heads, divisors of norms, chosen experts)
is computed from recorded ones, for the tapped layers only. The table of sites is in
`ops/probing/sites.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add, itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.config import ModelConfig
from jaxlm.model.block import LayerKind, attention_spec, layer_kinds
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layer_stack import ModelPart
from jaxlm.model.positions import Context
from jaxlm.ops.attention.reference import attention_scores, join_heads
from jaxlm.ops.experts.moe import route
from jaxlm.ops.linear import einsum
from jaxlm.ops.norm import divisor
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.recorder import Recorder
from jaxlm.ops.probing.sites import SITES, computed_aside
from jaxlm.ops.probing.tap import Tap, choose
from jaxlm.ops.quantization import dequantize_weight
from jaxlm.sharding.rules import activation_spec
from jaxlm.types import Params, Trace


def absent_sites(config: ModelConfig) -> frozenset[str]:
    """Returns the sites that this model does not have."""
    absent = set()
    if config.num_experts:
        absent |= {"mlp_pre", "mlp_up", "mlp_act"}
    else:
        absent |= {"router_logits", "expert_ids", "expert_weights"}
    if not config.gated:
        absent.add("mlp_up")
    if config.norm_placement == "output":
        absent |= {"attn_norm_div", "mlp_norm_div"}
    if not config.final_norm:
        absent.add("final_norm_div")
    if config.qk_norm == "none":
        absent |= {"q_normed", "k_normed"}
    if config.position not in ("learned", "sinusoidal"):
        absent.add("pos_embed")
    if config.parallel_block:
        absent.add("resid_mid")
    return frozenset(absent)


def sources(config: ModelConfig, site: str, derived: frozenset[str]) -> tuple[str, ...]:
    """Returns the recorded sites that `site` is computed from (itself if recorded).

    Args:
      derived: sites that are computed after the pass.
    """
    if site not in derived:
        return (site,)
    if site in ("attn_norm_div", "mlp_norm_div"):
        return _norm_inputs(config, site)
    return {
        "attn_scores": ("q_rot", "k_rot"),
        "attn_probs": ("q_rot", "k_rot", "attn_lse"),
        "head_out": ("z",),
        "expert_ids": ("router_logits",),
        "expert_weights": ("router_logits",),
        "final_norm_div": ("resid_post",),
    }[site]


def _norm_inputs(config: ModelConfig, site: str) -> tuple[str, ...]:
    """Returns the recorded sites whose sum is the input of a norm of the block."""
    mid = "resid_pre" if config.parallel_block else "resid_mid"
    if config.norm_placement != "post":
        return ("resid_pre",) if site == "attn_norm_div" else (mid,)
    if site == "attn_norm_div":
        return ("resid_pre", "attn_out_post")
    return (mid, "mlp_out_post")


def derived_sites(edits: Sequence[Edit]) -> frozenset[str]:
    """Returns the sites that are computed after the pass."""
    return computed_aside(frozenset(edit.site for edit in edits))


def complete(
    config: ModelConfig,
    params: Params,
    taps: Sequence[Tap],
    probe: Probe,
    recorder: Recorder,
    context: Context,
    cache: Cache | None,
    part: ModelPart,
) -> Trace:
    """Returns the trace of all taps, with the sites that are computed after the pass.

    Args:
      probe: of the call; has what was kept of sites outside the layers.
      recorder: has the recorded sites inside the layers.
      cache: after the pass.
      part: what was computed of the model.
    """
    available, derived = dict(recorder.layers), derived_sites(probe.edits)
    layers, outside = part.layers(config), probe.values
    selects = {tap.site: tap.selects for tap in probe.taps}

    def at(site: str, wanted: Sequence[int]) -> Any:
        """Returns a recorded site at these layers, in this order."""
        value, numbers = recorder.read(site), available[site]
        if tuple(wanted) == numbers:
            return value
        index = jnp.array([numbers.index(n) for n in wanted])
        return jax.tree.map(lambda x: x[index], value)

    trace = {}
    for tap in taps:
        site, wanted = tap.site, tap.layers or tuple(layers)
        if site in outside:
            trace[site] = outside[site]
        elif SITES[site].outside_layers:  # derived from the last layer
            last = (config.num_layers - 1,)
            value = _derive(config, params, tap, last, at, context, cache)
            trace[site] = tap.reduced(value[0])
        elif site in derived:
            value = _derive(config, params, tap, wanted, at, context, cache)
            trace[site] = tap.reduced(value)
        elif selects[site]:
            trace[site] = at(site, wanted)
        else:
            trace[site] = tap.reduced(tap.take(at(site, wanted), leading=1))
    return trace


def _derive(
    config: ModelConfig,
    params: Params,
    tap: Tap,
    layers: Sequence[int],
    at: Callable[[str, Sequence[int]], Array],
    context: Context,
    cache: Cache | None,
) -> Array:
    """Computes a derived site at these layers, for the tokens and heads of the tap."""
    site = tap.site
    values = [
        at(source, layers)
        if source == "k_rot"
        else tap.take(at(source, layers), source, leading=1)
        for source in sources(config, site, frozenset({site}))
    ]
    if site.endswith("_norm_div"):
        return divisor(reduce(add, values), config.norm_epsilon, config.norm)
    if site in ("expert_ids", "expert_weights"):
        weights, ids = route(
            values[0], config.experts_per_token, config.router_normalize
        )
        return ids if site == "expert_ids" else weights
    if site == "head_out":
        w = _of_layers(params["layers"], layers, "attn", "o")
        w = dequantize_weight(w, values[0].dtype)
        if tap.heads is not None:
            w = choose(w, 1, tap.heads)
        return _head_out(values[0], w)
    if cache is not None and context.query_positions is not None:
        values[1] = _of_layers(cache.layers, layers, "keys").astype(values[1].dtype)
    if tap.heads is not None:
        group = config.num_heads // config.num_kv_heads
        values[1] = choose(values[1], 3, [head // group for head in tap.heads])
    return _scores_or_probs(config, tap, layers, values, context)


def _of_layers(stack, layers: Sequence[int], *path: str) -> Any:
    """Returns one weight or array of these layers, from stacked or separate layers."""

    def leaf(tree):
        for name in path:
            tree = tree[name] if isinstance(tree, Mapping) else getattr(tree, name)
        return tree

    if isinstance(stack, tuple):
        chosen = [leaf(stack[layer]) for layer in layers]
        return jax.tree.map(lambda *x: jnp.stack(x), *chosen)
    return jax.tree.map(itemgetter(jnp.array(layers)), leaf(stack))


def _head_out(z: Array, w: Array) -> Array:
    """Projects each head by itself: [L B T N H], [L N H D] -> [L B T N D]."""
    # XLA:CPU has no bf16 kernel for this einsum, so it runs in f32 on rounded values.
    z32, w32 = (x.astype(z.dtype).astype(jnp.float32) for x in (z, w))
    out = activation_spec("BTND")
    one = partial(einsum, "BTNH,NHD->BTND", out_sharding=out)
    return jax.lax.map(lambda zw: one(*zw), (z32, w32)).astype(z.dtype)


def _scores_or_probs(
    config: ModelConfig,
    tap: Tap,
    layers: Sequence[int],
    values: Sequence[Array],
    context: Context,
) -> Array:
    """Returns scores, or probabilities when the log-sum-exp is among the values."""
    kinds = layer_kinds(config)

    def of_kind(kind: LayerKind, q: Array, k: Array, lse: Array | None = None) -> Array:
        spec = attention_spec(config, kind, context, None)
        if tap.positions is not None:
            rows = spec.mask.queries(context.positions.shape[1])
            rows = jax.tree.map(lambda x: x[:, np.array(tap.positions)], rows)
            mask = replace(
                spec.mask, query_positions=rows.positions, query_segments=rows.segments
            )
            spec = replace(spec, mask=mask)
        scores = join_heads(attention_scores(q, k, spec))
        return scores if lse is None else jnp.exp(scores - lse[..., None])

    members: dict[LayerKind, list[int]] = {}
    for i, layer in enumerate(layers):
        members.setdefault(kinds[layer % len(kinds)], []).append(i)
    parts = [
        jax.lax.map(
            lambda arrays, kind=kind: of_kind(kind, *arrays),
            [value[jnp.array(chosen)] for value in values],
        )
        for kind, chosen in members.items()
    ]
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate(list(members.values())))
    return jnp.concatenate(parts)[order]
