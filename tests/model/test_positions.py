"""Rotary scalings equal transformers' (goldens made by make_rope_goldens.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from model_case import small

from jaxlm.config import ModelConfig
from jaxlm.fields import from_dict
from jaxlm.model.positions import rotations

GOLDENS = json.loads(Path(__file__).with_name("rope_goldens.json").read_text())


@pytest.mark.parametrize("name", GOLDENS)
def test_rotations_equal_transformers(name):
    golden = GOLDENS[name]
    config = from_dict(ModelConfig, golden["config"])
    length = golden["length"]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    angle = np.arange(length)[:, None] * np.array(golden["frequency"])
    for rotation in rotations(config, positions):
        cos, sin = (np.asarray(x[0]) for x in rotation)
        # Angles up to 200 in f32 are exact to 2e-5.
        np.testing.assert_allclose(
            cos, np.cos(angle) * golden["attention_factor"], atol=1e-4
        )
        np.testing.assert_allclose(
            sin, np.sin(angle) * golden["attention_factor"], atol=1e-4
        )


def test_each_row_has_the_frequencies_of_its_own_length():
    """One long row does not stretch the others in its batch."""
    config = from_dict(ModelConfig, GOLDENS["longrope, long"]["config"])
    short, long = (jnp.arange(n, dtype=jnp.int32) for n in (60, 100))
    both = jnp.stack([jnp.pad(short, (0, 40)), long])
    (cos, _), _ = rotations(config, both)
    (alone, _), _ = rotations(config, short[None])
    (other, _), _ = rotations(config, long[None])
    np.testing.assert_array_equal(cos[0, :60], alone[0])
    np.testing.assert_array_equal(cos[1], other[0])
    assert np.abs(cos[0, :60] - cos[1, :60]).max() > 0.1


def test_local_layers_have_their_own_base_unscaled():
    from jaxlm.config import RopeScaling

    scaling = RopeScaling(kind="linear", factor=8.0)
    config = small(rope_theta=1e6, rope_local_theta=1e4, rope_scaling=scaling)
    positions = jnp.array([[1, 5]], jnp.int32)
    (cos, _), (local, _) = rotations(config, positions)
    exponent = -np.arange(4) / 4
    right = np.cos(np.outer([1, 5], 1e6**exponent / 8))
    np.testing.assert_allclose(cos[0], right, atol=1e-6)
    right = np.cos(np.outer([1, 5], 1e4**exponent))
    np.testing.assert_allclose(local[0], right, atol=1e-6)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
def test_other_positions_do_not_rotate(position):
    config = small(position=position)
    assert rotations(config, jnp.zeros((1, 2), jnp.int32)) == (None, None)
