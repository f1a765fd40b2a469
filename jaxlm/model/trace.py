"""From taps to a trace: sites recorded in the pass, and sites derived after it.

A derived site (scores, probabilities, single heads, divisors of norms, chosen experts)
is computed from recorded ones, for the tapped layers only. The table of sites is in
`ops/probing/sites.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm.config import ModelConfig
from jaxlm.model.block import Context, LayerKind, attention_spec, layer_kinds
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layers import Caches
from jaxlm.model.params import sizes
from jaxlm.ops.attention.reference import attention_scores, join_heads
from jaxlm.ops.linear import compute_dtype, einsum
from jaxlm.ops.moe import route
from jaxlm.ops.norm import divisor
from jaxlm.ops.probing.edit import Edit, check_edits
from jaxlm.ops.probing.sites import SITES, computed_aside
from jaxlm.ops.probing.tap import Recorder, Tap, check_taps, choose
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


def recorded_taps(
    config: ModelConfig, taps: Sequence[Tap], edits: Sequence[Edit] = ()
) -> tuple[Tap, ...]:
    """Returns the sites inside the layers to record for these taps, each once.

    What a tap selects is recorded alone, unless another tap needs the rest.
    """
    derived = _derived(edits)
    chosen: dict[str, dict[int, None]] = {}
    alone: dict[str, set[Tap]] = {}
    for tap in taps:
        layers = tap.layers or range(config.num_layers)
        if SITES[tap.site].outside_layers:
            layers = (config.num_layers - 1,)
        for source in sources(config, tap.site, derived):
            if not SITES[source].outside_layers:
                chosen.setdefault(source, {}).update(dict.fromkeys(layers))
                own = tap if source == tap.site else Tap(source)
                alone.setdefault(source, set()).add(replace(own, layers=None))
    every = set(range(config.num_layers))

    def of(site: str, layers: tuple[int, ...]) -> Tap:
        tap = next(iter(alone[site])) if len(alone[site]) == 1 else Tap(site)
        return replace(tap, layers=None if set(layers) == every else layers)

    return tuple(of(site, tuple(layers)) for site, layers in chosen.items())


def _derived(edits: Sequence[Edit]) -> frozenset[str]:
    """Returns the sites that are computed after the pass."""
    return computed_aside(frozenset(edit.site for edit in edits))


def empty_recorder(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: Cache | None,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    head: bool,
) -> Recorder:
    """Returns a recorder with empty slots for what these taps need from the layers.

    Raises:
      ValueError: for taps and edits that this call cannot have.
    """
    absent = absent_sites(config)
    B, T = tokens.shape
    S = T if cache is None or cache.is_empty else cache.max_length
    letters = {**sizes(config), "B": B, "T": T, "S": S, "1": 1}
    check_taps(taps, letters, absent)
    check_edits(edits, letters, absent)
    for chosen, how in ((taps, "tapped"), (edits, "edited")):
        if not head and any(one.site == "logits" for one in chosen):
            raise ValueError(f"site 'logits' cannot be {how} with head=False")
    return Recorder.empty(
        recorded_taps(config, taps, edits),
        config.num_layers,
        letters,
        compute_dtype(config.dtype),
        activation_spec,
        len(edits),
    )


def complete(
    config: ModelConfig,
    params: Params,
    taps: Sequence[Tap],
    recorder: Recorder,
    outside: Mapping[str, Array],
    context: Context,
    caches: Caches,
    edits: Sequence[Edit],
) -> Trace:
    """Returns the trace of all taps.

    Args:
      recorder: has the recorded sites inside the layers.
      outside: recorded sites outside the layers.
      caches: of all layers, after the pass; None without a cache.
    """
    every_layer = tuple(range(config.num_layers))
    tap_of = {tap.site: tap for tap in recorder.taps}
    recorded, derived = recorder.read(), _derived(edits)

    def at(site: str, layers: Sequence[int]) -> Array:
        """Returns a recorded site at these layers, in this order."""
        available = tap_of[site].layers or every_layer
        if tuple(layers) == available:
            return recorded[site]
        return recorded[site][jnp.array([available.index(n) for n in layers])]

    trace = {}
    for tap in taps:
        site, layers = tap.site, tap.layers or every_layer
        if site in outside:
            trace[site] = tap.reduced(tap.take(site, outside[site]))
        elif SITES[site].outside_layers:  # derived from the last layer
            last = every_layer[-1:]
            value = _derive(config, params, tap, last, at, context, caches)
            trace[site] = tap.reduced(value[0])
        elif site in derived:
            value = _derive(config, params, tap, layers, at, context, caches)
            trace[site] = tap.reduced(value)
        elif tap_of[site].selects:
            trace[site] = at(site, layers)
        else:
            trace[site] = tap.reduced(tap.take(site, at(site, layers), leading=1))
    return trace


def _derive(
    config: ModelConfig,
    params: Params,
    tap: Tap,
    layers: Sequence[int],
    at: Callable[[str, Sequence[int]], Array],
    context: Context,
    caches: Caches,
) -> Array:
    """Computes a derived site at these layers, for the tokens and heads of the tap."""
    site = tap.site
    values = [
        at(source, layers)
        if source == "k_rot"
        else tap.take(source, at(source, layers), leading=1)
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
        if tap.heads is not None:
            w = choose(w, 1, tap.heads)
        return _head_out(values[0], w)
    if caches is not None and context.query_positions is not None:
        values[1] = _of_layers(caches, layers, "keys").astype(values[1].dtype)
    if tap.heads is not None:
        group = config.num_heads // config.num_kv_heads
        values[1] = choose(values[1], 3, [head // group for head in tap.heads])
    return _scores_or_probs(config, tap, layers, values, context)


def _of_layers(stack, layers: Sequence[int], *path: str) -> Array:
    """Returns one array of these layers, from stacked or separate layers."""

    def leaf(tree):
        for name in path:
            tree = tree[name] if isinstance(tree, Mapping) else getattr(tree, name)
        return tree

    if isinstance(stack, tuple):
        return jnp.stack([leaf(stack[layer]) for layer in layers])
    return leaf(stack)[jnp.array(layers)]


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
