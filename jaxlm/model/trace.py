"""From taps to a trace: sites recorded in the pass, and sites derived after it.

A derived site (scores, probabilities, single heads, divisors of norms, chosen experts)
is computed from recorded ones, for the tapped layers only. The table of sites is in
`ops/probing/sites.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from jaxlm.config import ModelConfig
from jaxlm.model.block import Context, LayerKind, attention_spec, layer_kinds
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layers import Caches, Part
from jaxlm.model.params import sizes
from jaxlm.ops.attention.reference import attention_scores, join_heads
from jaxlm.ops.linear import compute_dtype, einsum
from jaxlm.ops.moe import route
from jaxlm.ops.norm import divisor
from jaxlm.ops.probing.edit import Edit, check_edits
from jaxlm.ops.probing.recorder import Recorder
from jaxlm.ops.probing.sites import ATTENTION_SITES, SITES, computed_aside
from jaxlm.ops.probing.tap import Tap, check_taps, choose
from jaxlm.sharding.device_memory import available_memory, gib
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
    config: ModelConfig,
    taps: Sequence[Tap],
    edits: Sequence[Edit] = (),
    layers: Sequence[int] | None = None,
) -> tuple[Tap, ...]:
    """Returns the sites inside the layers to record for these taps, each once.

    What a tap selects is recorded alone, unless another tap needs the rest.

    Args:
      layers: those that run; None for all.
    """
    every = range(config.num_layers) if layers is None else layers
    derived = _derived(edits)
    chosen: dict[str, dict[int, None]] = {}
    whole: dict[str, Tap] = {}
    for tap in taps:
        wanted = tap.layers or every
        if SITES[tap.site].outside_layers:
            wanted = (config.num_layers - 1,)
        for source in sources(config, tap.site, derived):
            if not SITES[source].outside_layers:
                alone = source == tap.site and source not in whole
                chosen.setdefault(source, {}).update(dict.fromkeys(wanted))
                whole[source] = tap if alone else Tap(source)

    def of(site: str) -> Tap:
        numbers = tuple(chosen[site])
        is_all = set(numbers) == set(every)
        return replace(whole[site], layers=None if is_all else numbers)

    return tuple(map(of, chosen))


def _derived(edits: Sequence[Edit]) -> frozenset[str]:
    """Returns the sites that are computed after the pass."""
    return computed_aside(frozenset(edit.site for edit in edits))


def start_recording(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: Cache | None,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    part: Part,
) -> tuple[tuple[Tap, ...], Recorder]:
    """Returns what to record inside the layers for these taps, and empty slots for it.

    Raises:
      ValueError: for taps and edits that this call cannot have, or taps whose trace
        does not fit into the memory of a device.
    """
    letters = _letters(config, tokens, cache)
    absent, layers = absent_sites(config), part.layers(config)
    check_taps(taps, letters, absent)
    check_edits(edits, letters, absent)
    unavailable = part.unavailable()
    for chosen, how in ((taps, "tapped"), (edits, "edited")):
        for one in chosen:
            if one.site in unavailable:
                raise ValueError(
                    f"site {one.site!r} cannot be {how} {unavailable[one.site]}"
                )
    holds_keys = cache is None or cache.is_empty or (cache.is_plain and cache.is_kept)
    for tap in taps:
        if tap.site in ("attn_scores", "attn_probs") and not holds_keys:
            raise ValueError(
                f"site {tap.site!r} is computed from the keys in the cache: take one "
                "that holds all tokens as they are (cache='full'), and is kept"
            )
        outside = set(tap.layers or ()) - set(layers)
        if outside:
            raise ValueError(
                f"tap of {tap.site!r}: layer {min(outside)} does not run: start is "
                f"{layers.start}, stop {layers.stop}"
            )
    recorded = recorded_taps(config, taps, edits, layers)
    if recorded and not isinstance(part.start, int):
        raise ValueError(
            f"site {recorded[0].site!r} cannot be tapped with a traced start: which "
            "layers run is not known while compiling"
        )
    by_key = sorted({edit.site for edit in edits} & ATTENTION_SITES)
    if by_key and cache is not None and not cache.is_plain:
        raise ValueError(
            f"site {by_key[0]!r} has a value for each token of the cache: to edit it, "
            "take one that holds all tokens as they are (cache='full')"
        )
    _check_memory(config, tokens, cache, taps, edits, layers)
    recorder = Recorder.empty(
        *(recorded, layers, letters, compute_dtype(config.dtype)),
        activation_spec,
        len(edits),
    )
    return recorded, recorder


def letter_sizes(
    config: ModelConfig, batch: int, length: int, keys: int
) -> dict[str, int]:
    """Returns the size of each letter in the shapes of sites, for one call."""
    given = {"B": batch, "T": length, "S": keys}
    return {**sizes(config), **given, "1": 1, "k": config.experts_per_token}


def _letters(
    config: ModelConfig,
    tokens: Array | np.ndarray | jax.ShapeDtypeStruct,
    cache: Cache | None,
) -> dict[str, int]:
    B, T = tokens.shape
    S = T if cache is None or cache.is_empty else cache.max_length
    return letter_sizes(config, B, T, S)


def trace_bytes(
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B T"] | jax.ShapeDtypeStruct,
    taps: Sequence[Tap],
    *,
    cache: Cache | None = None,
    edits: Sequence[Edit] = (),
    layers: Sequence[int] | None = None,
) -> dict[str, int]:
    """Returns the bytes that each tap keeps on a device of the current mesh.

    What is recorded in the layers, and what is computed from it after the pass. Only
    the shape of the tokens matters, so nothing is computed.

    Args:
      layers: those that run; None for all.
    """
    letters, dtype = _letters(config, tokens, cache), compute_dtype(config.dtype)
    every = range(config.num_layers) if layers is None else layers
    derived, mesh = _derived(edits), jax.sharding.get_abstract_mesh()

    def kept(tap: Tap) -> int:
        shape = list(tap.shape(letters))
        if not SITES[tap.site].outside_layers:
            shape = [("L", len(tap.layers or every)), *shape]
        names, numbers = zip(*shape, strict=True)
        spec = activation_spec("".join(names))
        if spec is not None:
            numbers = NamedSharding(mesh, spec).shard_shape(tuple(numbers))
        width = jnp.dtype(tap.dtype(dtype)).itemsize
        return math.prod(numbers) * (width + 4 * (tap.count is not None))

    total = {}
    for tap in taps:
        needed = recorded_taps(config, (tap,), edits, every)
        aside = (tap,) if tap.site in derived or not needed else ()
        total[tap.site] = sum(map(kept, (*needed, *aside)))
    return total


def _check_memory(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: Cache | None,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    layers: Sequence[int],
) -> None:
    """Raises a ValueError for a trace that is larger than a device, and says less."""
    if not taps:
        return
    measure = partial(
        trace_bytes, config, tokens, cache=cache, edits=edits, layers=layers
    )
    needed, available = measure(taps), available_memory()
    if sum(needed.values()) <= available:
        return
    largest = max(taps, key=lambda tap: needed[tap.site])
    cheaper, last = largest, layers[-1:] or layers
    if not SITES[largest.site].outside_layers:
        cheaper = replace(cheaper, layers=tuple(last))
    if measure([cheaper])[largest.site] > available // 2:
        cheaper = replace(cheaper, positions=(-1,))
    least = measure([cheaper])[largest.site]
    chosen = ", ".join(
        f"{name}={getattr(cheaper, name)}"
        for name in ("layers", "positions")
        if getattr(cheaper, name) != getattr(largest, name)
    )
    raise ValueError(
        f"the trace needs {gib(sum(needed.values()))} on a device, which has "
        f"{gib(available)}: most of it is {largest.site!r}; with {chosen} that keeps "
        f"{gib(least)}"
    )


def complete(
    config: ModelConfig,
    params: Params,
    taps: Sequence[Tap],
    recorder: Recorder,
    outside: Mapping[str, Any],
    context: Context,
    caches: Caches,
    edits: Sequence[Edit],
    layers: Sequence[int],
) -> Trace:
    """Returns the trace of all taps.

    Args:
      recorder: has the recorded sites inside the layers.
      outside: what was kept of sites outside the layers.
      caches: of all layers, after the pass; None without a cache.
      layers: those that have run.
    """
    available, derived = dict(recorder.layers), _derived(edits)
    recorded = recorded_taps(config, taps, edits, layers)
    selects = {tap.site: tap.selects for tap in recorded}

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
            value = _derive(config, params, tap, last, at, context, caches)
            trace[site] = tap.reduced(value[0])
        elif site in derived:
            value = _derive(config, params, tap, wanted, at, context, caches)
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
    caches: Caches,
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
