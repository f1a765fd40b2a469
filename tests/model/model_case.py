"""Small models, shared by the tests of this folder."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from ops_case import quick_jit

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
    """(config in f32, loud parameters)."""
    config = dataclasses.replace(config, dtype="float32")
    return config, loud(quick_jit(partial(init, config))(jax.random.key(seed)))


def ids(batch: int, length: int, vocab: int = 32, seed: int = 1):
    """[batch, length] random token ids."""
    shape = (batch, length)
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab, dtype=jnp.int32)
