"""Finds wrong arguments of calls from Python, before anything is computed.

Types and shapes are known while JAX traces. Values are checked outside jit only, where
there are any: a compiled program has no check in it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from jaxlm import tree
from jaxlm.config import Config, ModelConfig
from jaxlm.model.params import WEIGHTS, weights


def check_config(config: Any) -> None:
    """Raises ValueError for a config that is not a `ModelConfig`."""
    if isinstance(config, Config):
        raise ValueError("config is the Config of a run: give its model, config.model")
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"config is a {type(config).__name__}, not a ModelConfig: the order is "
            "(config, params, ...), and jaxlm.preset has configs by name"
        )


def check_params(config: ModelConfig, params: Any, *, own_layers: bool) -> None:
    """Checks that parameters fit the config.

    Args:
      params: as `forward` takes them.
      own_layers: a block that is not `Block` reads the layers, and knows their shapes.

    Raises:
      ValueError: names the first path that is missing, left over or of another shape.
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


def checked_tokens(config: ModelConfig, tokens: Any) -> Int[Array, "B T"]:
    """Returns the tokens as an array.

    Raises:
      ValueError: for tokens that are not rows of ids in the vocabulary, and for rows
        that are longer than the context.
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
    array = jnp.asarray(tokens)
    if array.ndim != 2:
        raise ValueError(
            f"tokens has shape {array.shape}, but forward takes rows, [B, T]"
            + (": a single row is tokens[None]" if array.ndim == 1 else "")
        )
    length = array.shape[1]
    if length > config.context_length:
        raise ValueError(
            f"tokens has rows of {length}, more than model.context_length "
            f"{config.context_length}: cut them"
        )
    if (ids := concrete_values(array)) is not None and ids.size:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"tokens has the id {low if low < 0 else high}: ids are 0 to "
                f"{config.vocab_size - 1}"
            )
    return array


def concrete_values(array: Array) -> np.ndarray | None:
    """Returns the values of an array; None while it is traced, or on other hosts."""
    if isinstance(array, Tracer) or not array.is_fully_addressable:
        return None
    return np.asarray(array)


def check_key(key: Any) -> None:
    """Raises ValueError for what is not one typed PRNG key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        what = repr(key) if dtype is None else f"an array of {dtype}"
        raise ValueError(f"key is {what}: make one with jax.random.key(seed)")
    if key.shape:
        raise ValueError(f"key has shape {key.shape}: give one key")


def check_block(block: Any, base: type) -> None:
    """Raises ValueError for a block that is not a class derived from `base`."""
    if not (inspect.isclass(block) and issubclass(block, base)):
        kind = block if inspect.isclass(block) else type(block)
        what = "the class" if kind is block else "an object of class"
        raise ValueError(
            f"block is {what} {kind.__name__}: give a class that inherits from "
            f"jaxlm.{base.__name__}"
        )
