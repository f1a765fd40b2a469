"""From taps to a trace: what is read on the way, what is computed after the pass."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.config import ModelConfig
from jaxlm.model.block import Context, LayerKind, attention_spec, layer_kinds
from jaxlm.model.layers import Caches
from jaxlm.ops.attention.reference import attention_scores
from jaxlm.ops.layout import reshape
from jaxlm.ops.linear import einsum
from jaxlm.ops.moe import route
from jaxlm.ops.norm import divisor
from jaxlm.ops.probe import SITES, Tap
from jaxlm.sharding.rules import activation
from jaxlm.types import Params, Trace


def absent_sites(config: ModelConfig) -> frozenset[str]:
    """Sites that this model does not have."""
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


def sources(config: ModelConfig, site: str) -> tuple[str, ...]:
    """The sites on the way that a site is computed from; itself when it is one."""
    if not SITES[site].derived:
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
    """The sites whose sum a norm of the block takes in."""
    mid = "resid_pre" if config.parallel_block else "resid_mid"
    if config.norm_placement != "post":
        return ("resid_pre",) if site == "attn_norm_div" else (mid,)
    if site == "attn_norm_div":
        return ("resid_pre", "attn_out_post")
    return (mid, "mlp_out_post")


def taps_on_the_way(config: ModelConfig, taps: Sequence[Tap]) -> tuple[Tap, ...]:
    """The taps inside the layers that a trace is made from, one for each site."""
    chosen: dict[str, dict[int, None]] = {}
    for tap in taps:
        layers = tap.layers or range(config.num_layers)
        if SITES[tap.site].outside:
            layers = (config.num_layers - 1,)
        for source in sources(config, tap.site):
            if not SITES[source].outside:
                chosen.setdefault(source, {}).update(dict.fromkeys(layers))
    every = set(range(config.num_layers))
    return tuple(
        Tap(site, None if set(layers) == every else tuple(layers))
        for site, layers in chosen.items()
    )


def complete(
    config: ModelConfig,
    params: Params,
    taps: Sequence[Tap],
    found: Mapping[str, Array],
    context: Context,
    caches: Caches,
) -> Trace:
    """The trace of all taps.

    Args:
      found: what was read on the way; `context.taps` says of which layers.
      caches: of all layers, after the pass; None without a cache.
    """
    read = {tap.site: tap.layers for tap in context.taps}
    everything = tuple(range(config.num_layers))

    def at(site: str, layers: Sequence[int]) -> Array:
        """A site of the layers that are asked for, in that order."""
        have = read[site] or everything
        if tuple(layers) == have:
            return found[site]
        return found[site][jnp.array([have.index(layer) for layer in layers])]

    trace = {}
    for tap in taps:
        layers, site = tap.layers or everything, SITES[tap.site]
        if site.derived:
            trace[tap.site] = _derive(
                config, params, tap.site, layers, at, context, caches
            )
        else:
            trace[tap.site] = found[tap.site] if site.outside else at(tap.site, layers)
    return trace


def _derive(
    config: ModelConfig,
    params: Params,
    site: str,
    layers: Sequence[int],
    at: Callable[[str, Sequence[int]], Array],
    context: Context,
    caches: Caches,
) -> Array:
    if site == "final_norm_div":
        last = at("resid_post", (config.num_layers - 1,))[0]
        return divisor(last, config.norm_epsilon, config.norm)
    values = [at(source, layers) for source in sources(config, site)]
    if site in ("attn_norm_div", "mlp_norm_div"):
        return divisor(sum(values[1:], values[0]), config.norm_epsilon, config.norm)
    if site in ("expert_ids", "expert_weights"):
        weights, ids = route(
            values[0], config.experts_per_token, config.router_normalize
        )
        return ids if site == "expert_ids" else weights
    if site == "head_out":
        return _head_out(values[0], _of_layers(params["layers"], layers, "attn", "o"))
    if caches is not None:
        values[1] = _of_layers(caches, layers, "keys").astype(values[1].dtype)
    return _inside_softmax(config, layers, values, context)


def _of_layers(stack, layers: Sequence[int], *path: str) -> Array:
    """One array of the layers that are asked for, from stacked or separate layers."""

    def leaf(tree):
        for name in path:
            tree = tree[name] if isinstance(tree, Mapping) else getattr(tree, name)
        return tree

    if isinstance(stack, tuple):
        return jnp.stack([leaf(stack[layer]) for layer in layers])
    return leaf(stack)[jnp.array(layers)]


def _head_out(z: Array, w: Array) -> Array:
    """[L B T N H] and [L N H D] to [L B T N D], in z's dtype."""
    # XLA:CPU has no bf16 product of this form: f32, of the rounded numbers.
    z32, w32 = (x.astype(z.dtype).astype(jnp.float32) for x in (z, w))
    out = activation("BTND")
    one = partial(einsum, "BTNH,NHD->BTND", out_sharding=out)
    return jax.lax.map(lambda zw: one(*zw), (z32, w32)).astype(z.dtype)


def _inside_softmax(
    config: ModelConfig,
    layers: Sequence[int],
    values: Sequence[Array],
    context: Context,
) -> Array:
    """Scores by the definition, or probabilities by the log-sum-exp of what ran."""
    kinds = layer_kinds(config)

    def of_kind(kind: LayerKind, q: Array, k: Array, lse: Array | None = None) -> Array:
        spec = attention_spec(config, kind, context, None)
        scores = attention_scores(q, k, spec)
        B, K, G, T, S = scores.shape
        scores = reshape(scores, (B, K * G, T, S), (0, 1, 3, 4))
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
