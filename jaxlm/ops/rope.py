"""Rotary position embeddings (RoPE) with their scalings, and sinusoidal positions.

`rotate` is applied to queries and keys in `model/block.py`, with the cosines and sines
of `rotation`; `model/positions.py` chooses the frequencies by the config.

Dimension i is paired with i + R/2 (the "half" layout of the Hugging Face weights).
The scalings follow transformers' `modeling_rope_utils.py`; tests compare them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(rotary_dim: int, theta: float) -> Float[np.ndarray, " {rotary_dim}//2"]:
    """Radians per position for each pair: `theta ** (-2i / rotary_dim)` (f64).

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    return theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def llama3_frequencies(
    base: Float[np.ndarray, " P"],
    *,
    factor: float,
    low: float,
    high: float,
    original: int,
) -> Float[np.ndarray, " P"]:
    """Llama 3.1: stretches long wavelengths by `factor`, and keeps short ones.

    Between wavelengths `original / low` and `original / high` the two are blended.
    """
    wavelength = 2 * math.pi / base
    blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return base / factor * (1 - blend) + base * blend


def yarn_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Float[np.ndarray, " {rotary_dim}//2"]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): blends by a ramp over dimensions."""

    def dimension(rotations: float) -> float:
        """Dimension that makes this many rotations in the original context."""
        wavelength = original / (rotations * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    base = frequencies(rotary_dim, theta)
    return base / factor * ramp + base * (1 - ramp)


def yarn_attention_factor(factor: float) -> float:
    """YaRN: the factor of cos and sin."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention_factor(factor: float, original: int) -> float:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753; Phi-3): factor of cos and sin."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def longrope_frequencies(
    base: Float[np.ndarray, " P"],
    short_factors: tuple[float, ...],
    long_factors: tuple[float, ...],
    *,
    original: int,
    length: Int[Array, " B"],
) -> Float[Array, "B P"]:
    """LongRoPE: divides each frequency by its factor.

    Rows longer than `original` tokens take `long_factors`, others `short_factors`.

    Args:
      length: greatest position of each row, plus 1.
    """
    short = jnp.asarray(base / np.asarray(short_factors), jnp.float32)
    long = jnp.asarray(base / np.asarray(long_factors), jnp.float32)
    return jnp.where(length[:, None] > original, long, short)


def dynamic_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    factor: float,
    original: int,
    length: Int[Array, " B"],
) -> Float[Array, "B {rotary_dim}//2"]:
    """Dynamic NTK: theta grows with the row's length beyond `original` tokens.

    Args:
      length: greatest position of each row, plus 1.
    """
    stretched = jnp.maximum(length, original).astype(jnp.float32)
    growth = factor * stretched / original - (factor - 1)
    exponent = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    new_theta = theta * growth ** (rotary_dim / (rotary_dim - 2))
    return new_theta[:, None] ** -exponent


def rotation(
    positions: Int[Array, "B T"],
    frequency: Float[Array, " P"] | Float[np.ndarray, " P"] | Float[Array, "B P"],
    attention_factor: float = 1.0,
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Computes cos and sin (f32) of the angles, times `attention_factor`."""
    frequency = jnp.asarray(frequency, jnp.float32)
    rows = frequency[None] if frequency.ndim == 1 else frequency
    angle = positions[:, :, None].astype(jnp.float32) * rows[:, None, :]
    return jnp.cos(angle) * attention_factor, jnp.sin(angle) * attention_factor


@jax.custom_vjp
def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T P"],
    sin: Float[Array, "B T P"],
) -> Float[Array, "B T N H"]:
    """Rotates the first 2P dimensions of each head, and keeps the rest.

    Computed in f32. The gradient is the inverse rotation; cos and sin are constants.
    """
    P = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    cos2, sin2 = (jnp.concatenate(c, axis=-1) for c in ((cos, cos), (-sin, sin)))
    x32 = x[..., : 2 * P].astype(jnp.float32)
    swapped = jnp.concatenate([x32[..., P:], x32[..., :P]], axis=-1)
    rotated = (x32 * cos2 + swapped * sin2).astype(x.dtype)
    rest = x[..., 2 * P :]
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _rotate_forward(x, cos, sin):
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(residuals, g):
    cos, sin = residuals
    return rotate(g, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


def sinusoids(positions: Int[Array, "B T"], model_dim: int) -> Float[Array, "B T D"]:
    """Sinusoidal position embeddings (f32): sines first, then cosines.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in the layout of the
    authors' tensor2tensor, with wavelengths from 2 pi to 10,000 * 2 pi.
    """
    half = model_dim // 2
    step = math.log(10_000.0) / max(half - 1, 1)
    frequency = jnp.exp(-step * jnp.arange(half, dtype=jnp.float32))
    angle = positions[:, :, None].astype(jnp.float32) * frequency
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, model_dim % 2)))
