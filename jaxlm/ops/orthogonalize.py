"""Orthogonal factors of stacked matrices, which devices share the work of."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.collectives import axes_of
from jaxlm.ops.layout import layout

# Of Muon: https://kellerjordan.github.io/posts/muon.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5


def orthogonalize(
    x: Float[Array, "L ..."],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    eps: float,
) -> Float[Array, "L ..."]:
    """Brings the singular values of each matrix near 1, by Newton-Schulz steps.

    Matrices that are cut over devices are not gathered: each device gets whole matrices
    of some layers, and sends back what it made of them. So a device sends two parts of
    1 / devices of x; or of the least multiple of their number that holds L, since there
    are then some that have no layer.

    Args:
      x: matrices, stacked along the dimensions that come first.
      inputs: dimensions of a matrix's rows.
      outputs: dimensions of its columns, after those.
      eps: is added to the Frobenius norm that a matrix is divided by.
    """
    placed = layout(x)
    if placed is None:
        return _orthogonalize_whole(x, inputs, eps)
    cut = {d: axes_of(placed.spec[d]) for d in (*inputs, *outputs) if placed.spec[d]}
    parts = math.prod(placed.mesh.shape[a] for axes in cut.values() for a in axes)

    def local(x):
        layers = len(x)
        x = jnp.pad(x, [(0, -layers % parts)] + [(0, 0)] * (x.ndim - 1))
        for dimension, axes in cut.items():
            x = jax.lax.all_to_all(x, axes, 0, dimension, tiled=True)
        x = _orthogonalize_whole(x, inputs, eps)
        for dimension, axes in reversed(cut.items()):
            x = jax.lax.all_to_all(x, axes, dimension, 0, tiled=True)
        return x[:layers]

    spec = placed.spec
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _orthogonalize_whole(x: Array, inputs: tuple[int, ...], eps: float) -> Array:
    first, after = inputs[0], inputs[-1] + 1
    rows, columns = math.prod(x.shape[first:after]), math.prod(x.shape[after:])
    matrices = x.reshape(-1, rows, columns)
    return jax.vmap(lambda m: _newton_schulz(m, eps))(matrices).reshape(x.shape)


def _newton_schulz(x: Float[Array, "A B"], eps: float) -> Float[Array, "A B"]:
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide /= jnp.linalg.norm(wide) + eps
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide
