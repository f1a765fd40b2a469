"""Small models, shared by the tests of this folder."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import tree
from jaxlm.config import ModelConfig
from jaxlm.model.initialization import init


def small(**changes) -> ModelConfig:
    """A plain two-layer f32 model with 6 query and 3 key heads."""
    sizes = dict(
        vocab_size=32,
        num_layers=2,
        model_dim=24,
        num_heads=6,
        num_kv_heads=3,
        head_dim=8,
        hidden_dim=40,
        context_length=64,
        dtype="float32",
    )
    return ModelConfig(**{**sizes, **changes})


def loud(params, scale: float = 8.0):
    """Parameters as `init` makes them, but matrices far from 0, so that bugs show."""
    return tree.map_with_name(
        lambda name, x: x if name.endswith(("scale", "bias")) else x * scale, params
    )


def make(config: ModelConfig, seed: int = 0):
    """(config in f32, loud parameters), drawn by NumPy: JAX would compile each shape."""
    config = dataclasses.replace(config, dtype="float32")
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith(("scale", "bias")):
            value = np.full(leaf.shape, name.endswith("scale"))
            return jnp.asarray(value, jnp.float32)
        return jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32)

    return config, loud(tree.map_with_name(draw, shapes))


def ids(batch: int, length: int, vocab: int = 32, seed: int = 1):
    """[batch, length] random token ids."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
