"""A small model with large random weights, and rows of packed documents for it."""

import dataclasses

import jax
import numpy as np

from jaxlm import tree
from jaxlm.config import ModelConfig
from jaxlm.model.initialization import init
from jaxlm.types import Batch

TOY = ModelConfig(
    vocab_size=48,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=24,
    context_length=96,
    tied_embeddings=False,
    dtype="float32",
)


def toy(**changes):
    return dataclasses.replace(TOY, **changes)


def make_params(config, seed=0, std=0.2):
    """Draws weights from N(0, std), much larger than those of `init`.

    With small weights attention is flat, and a mistake in q or k moves nothing.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def leaf(name, shape):
        x = rng.normal(0, std, shape.shape)
        return (x + name.endswith("scale")).astype(np.float32)

    return tree.map_with_name(leaf, shapes)


def make_batch(config, rows, length, seed=0, weights="uneven"):
    """Makes rows of two documents each. `uneven`: the first rows have tiny weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (rows, length + 1)).astype(np.int32)
    border = length // 3
    positions = np.arange(length) - border * (np.arange(length) >= border)
    segments = 1 + (np.arange(length) >= border)
    loss_weights = np.ones((rows, length), np.float32)
    loss_weights[:, border - 1] = 0.0
    if weights == "uneven":
        loss_weights[: rows // 2, 1:] = 0.0
        loss_weights[-1] *= rng.random(length)

    def rows_of(x):
        return np.broadcast_to(x, (rows, length)).astype(np.int32)

    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=rows_of(positions),
        segment_ids=rows_of(segments),
        loss_weights=loss_weights.astype(np.float32),
    )
