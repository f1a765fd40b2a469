"""Finds wrong arguments of calls from Python, before anything is computed.

Types and shapes are known while JAX traces. Values are checked outside jit only, where
there are any: a compiled program has no check in it.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm import tree
from jaxlm.config import Config, ModelConfig
from jaxlm.model.block import Block
from jaxlm.model.kv_cache import Cache
from jaxlm.model.params import WEIGHTS, weights
from jaxlm.ops.ids import check_ids, concrete_values
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import ATTENTION_SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import context_parts
from jaxlm.types import Params


def check_config(config: Any) -> None:
    """Raises ValueError for a config that is not a `ModelConfig`."""
    if isinstance(config, Config):
        raise ValueError("config is the Config of a run: give its model, config.model")
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"config is a {type(config).__name__}, not a ModelConfig: the order is "
            "(config, params, ...), and jaxlm.preset has configs by name"
        )


def check_block(block: Any) -> None:
    """Raises ValueError for a block that is not a class derived from `Block`."""
    if not (inspect.isclass(block) and issubclass(block, Block)):
        kind = block if inspect.isclass(block) else type(block)
        what = "the class" if kind is block else "an object of class"
        raise ValueError(
            f"block is {what} {kind.__name__}: give a class that inherits from "
            "jaxlm.Block"
        )


def check_model(config: Any, params: Any, block: Any) -> None:
    """Raises ValueError unless these are a config and parameters for this block."""
    check_config(config)
    check_block(block)
    check_params(config, params, own_layers=block is not Block)


def check_params(config: ModelConfig, params: Any, *, own_layers: bool) -> None:
    """Checks that parameters fit the config.

    Args:
      params: as `forward` takes them.
      own_layers: a block that is not `Block` reads the layers, and knows their shapes.

    Raises:
      ValueError: names the first path that is missing, left over, of another shape, or
        not of floating-point numbers.
    """
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params is a {type(params).__name__}, not a nested dict of arrays: the "
            "order is (config, params, ...)"
        )
    found = {path: np.shape(leaf) for path, leaf in tree.flatten(params).items()}
    wanted = {path: w.shape(config) for path, w in weights(config).items()}
    if isinstance(params.get("layers"), tuple):
        wanted = {
            f"layers/{number}/{path.removeprefix('layers/')}": shape[1:]
            for path, shape in wanted.items()
            if path.startswith("layers/")
            for number in range(config.num_layers)
        } | {p: shape for p, shape in wanted.items() if not p.startswith("layers/")}
    known = {weight.path for weight in WEIGHTS}
    for path in [*wanted, *found]:
        inside = path.startswith("layers/")
        if inside and own_layers:
            continue
        if path not in found:
            raise ValueError(f"params have no {path}, which the config asks for")
        if path not in wanted and (inside or path in known):
            raise ValueError(
                f"params have {path}, which the config does not ask for: they are of "
                "another model, or of another block (block=)"
            )
        if path in wanted and found[path] != wanted[path]:
            raise ValueError(
                f"params are of another model: {path} has shape {found[path]}, and "
                f"the config asks for {wanted[path]}"
            )
    for path, leaf in tree.flatten(params).items():
        dtype = getattr(leaf, "dtype", jnp.float32)  # a quantized weight has none
        if path in wanted and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params have {path} of {dtype}: weights are floating-point numbers"
            )


def check_layers(
    config: ModelConfig, params: Params, start: Any, stop: Any, stream: Any
) -> None:
    """Checks which layers to run, and the residual stream that they begin with.

    Raises:
      ValueError: for layers that are not there, a first layer without its stream, or a
        traced one of layers that are not stacked.
    """
    end = config.num_layers if stop is None else stop
    if not isinstance(end, int) or not 0 < end <= config.num_layers:
        raise ValueError(f"stop is {stop!r}: give 1 to {config.num_layers}")
    if isinstance(start, int):
        if not 0 <= start < end:
            raise ValueError(f"start is {start}: give 0 to {end - 1}")
        if start and stream is None:
            raise ValueError(
                f"start is {start}: give stream=, the residual stream that enters it"
            )
    elif stream is None or isinstance(params["layers"], tuple):
        raise ValueError(
            "a traced start needs stream=, and params whose layers are stacked"
        )


def as_tokens(
    config: ModelConfig, tokens: Any, cache: Cache | None
) -> Int[Array, "B T"]:
    """Returns the tokens as an array.

    Raises:
      ValueError: for tokens that are not rows of ids in the vocabulary, and for rows
        that are longer than the context or the room in the cache.
    """
    if isinstance(tokens, str):
        raise ValueError("tokens is text: give ids, [B, T], from tokenizer.encode")
    if isinstance(tokens, list | tuple):
        lengths = {len(row) for row in tokens if hasattr(row, "__len__")}
        if len(lengths) > 1:
            raise ValueError(
                f"tokens has rows of {min(lengths)} to {max(lengths)} ids: pad them to "
                "one length at their end, where causal attention does not see it"
            )
    dtype = getattr(tokens, "dtype", None) or np.asarray(tokens).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens has dtype {dtype}: ids are integers")
    # Before JAX, in which 2**32 + 5 becomes 5.
    if (ids := concrete_values(tokens)) is not None:
        check_ids("tokens", ids, config.vocab_size)
    array = jnp.asarray(tokens)
    if array.ndim != 2:
        raise ValueError(
            f"tokens has shape {array.shape}, but forward takes rows, [B, T]"
            + (": a single row is tokens[None]" if array.ndim == 1 else "")
        )
    length = array.shape[1]
    if not length:
        raise ValueError("tokens has rows without a token: give at least one")
    if length > config.context_length:
        raise ValueError(
            f"tokens has rows of {length}, more than model.context_length "
            f"{config.context_length}: cut them"
        )
    if cache is None and length % context_parts():
        raise ValueError(
            f"tokens has rows of {length}, which mesh.context {context_parts()} does "
            "not divide: pad them"
        )
    if cache is not None:
        _check_room(cache, length)
    return array


def check_of_tokens(name: str, values: Any, shape: tuple[int, ...]) -> None:
    """Checks positions or segments; None is always fine.

    Raises:
      ValueError: unless there is an integer for each token.
    """
    if values is None:
        return
    found, dtype = np.shape(values), jnp.result_type(values)
    if found != shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{name} has shape {found} and dtype {dtype}: give an integer for each "
            f"token, {shape}"
        )


def check_cut_rows(
    taps: Sequence[Tap], edits: Sequence[Edit], cache: Cache | None
) -> None:
    """Checks that sites can be reached where mesh.context cuts rows.

    Raises:
      ValueError: for scores of whole rows, which no device has, and taps with a cache.
    """
    if context_parts() == 1:
        return
    scores = ATTENTION_SITES - {"attn_lse"}
    refused = [tap for tap in taps if tap.site in scores or cache is not None]
    refused += [edit for edit in edits if edit.site in ATTENTION_SITES]
    for one in refused:
        raise ValueError(
            f"site {one.site!r} needs whole rows on a device, which mesh.context "
            f"{context_parts()} cuts: take a mesh without it"
        )


def _check_room(cache: Cache, num_tokens: int) -> None:
    room, lengths = cache.max_length, concrete_values(cache.lengths)
    if lengths is not None and lengths.max() + num_tokens > room:
        raise ValueError(
            f"the cache holds {lengths.max()} of {room} tokens, and {num_tokens} more "
            "do not fit: make a longer one with init_cache"
        )


def check_key(key: Any, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError for what is not one typed PRNG key, or keys of other shapes."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        what = repr(key) if dtype is None else f"an array of {dtype}"
        raise ValueError(f"key is {what}: make one with jax.random.key(seed)")
    if key.shape not in (shapes or ((),)):
        more = "".join(f" or {n} of them" for shape in shapes for n in shape)
        raise ValueError(f"key has shape {key.shape}: give one key{more}")
