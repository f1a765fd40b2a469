"""What a call records: the sites inside the layers that its taps need.

`trace.py` makes the trace of it after the pass.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, Int

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block
from jaxlm.model.checks import check_cut_rows
from jaxlm.model.divisible import check_sites, divisible_config
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layer_stack import ModelPart
from jaxlm.model.params import sizes
from jaxlm.model.positions import Context
from jaxlm.model.trace import absent_sites, derived_sites, sources
from jaxlm.ops.linear import compute_dtype
from jaxlm.ops.probing.edit import Edit, check_edits
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.recorder import Recorder
from jaxlm.ops.probing.sites import ATTENTION_SITES, SITES
from jaxlm.ops.probing.tap import Tap, check_taps
from jaxlm.sharding.device_memory import available_memory, gib
from jaxlm.sharding.rules import activation_spec


def start_recording(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    context: Context,
    cache: Cache | None,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    part: ModelPart,
    block: type[Block] = Block,
) -> tuple[Probe, Recorder]:
    """Returns the probe of a call, and a recorder of what it taps inside the layers.

    Of the sites that a tap needs, the probe taps those that the pass computes; the
    others are left to `complete`.

    Raises:
      ValueError: for taps and edits that this call cannot have, or taps whose trace
        does not fit into the memory of a device.
    """
    assert not (context.zigzag and edits)
    given, config = config, divisible_config(config, block)
    letters, layers = _letters(config, tokens, cache), part.layers(config)
    absent = absent_sites(config)
    check_taps(taps, letters, absent)
    check_edits(edits, letters, absent)
    _check_call(config, cache, taps, edits, part)
    check_cut_rows(taps, edits, cache)
    check_sites(given, taps, edits, block)
    _check_memory(config, tokens, cache, taps, edits, layers)
    recorded = recorded_taps(config, taps, edits, layers)
    outside = [tap for tap in taps if SITES[tap.site].outside_layers]
    probe = Probe((*outside, *recorded), edits, context.positions)
    dtype = compute_dtype(config.dtype)
    recorder = Recorder.empty(
        recorded, layers, letters, dtype, activation_spec, len(edits)
    )
    return probe, recorder


def _check_call(
    config: ModelConfig,
    cache: Cache | None,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    part: ModelPart,
) -> None:
    """Raises ValueError for a site that this call does not compute."""
    layers, unavailable = part.layers(config), part.unavailable()
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
    derived, mesh = derived_sites(edits), jax.sharding.get_abstract_mesh()

    def kept(tap: Tap) -> int:
        shape = list(tap.shape(letters))
        if not SITES[tap.site].outside_layers:
            shape = [("L", len(tap.layers or every)), *shape]
        names, numbers = zip(*shape, strict=True)
        spec = activation_spec("".join(names))
        if spec is not None:
            # Without types, as JAX refuses this inside a `shard_map`.
            whole = AbstractMesh(mesh.axis_sizes, mesh.axis_names)
            numbers = NamedSharding(whole, spec).shard_shape(tuple(numbers))
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
    """Raises ValueError for a trace that no device can hold; names a smaller tap."""
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
    derived = derived_sites(edits)
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
