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
    spec, shape = placed.spec, placed.mesh.shape
    cut = {d: axes_of(spec[d]) for d in (*inputs, *outputs) if spec[d]}
    axes = tuple(axis for names in cut.values() for axis in names)
    sizes = {d: math.prod(shape[axis] for axis in cut[d]) for d in cut}
    devices = math.prod(sizes.values())

    def exchange(x):
        # Once for all dimensions: of one exchange after another, the second would send
        # most parts again.
        return jax.lax.all_to_all(x, axes, 0, 0) if devices > 1 else x

    def local(x):
        layers = len(x)
        x = jnp.pad(x, [(0, -layers % devices)] + [(0, 0)] * (x.ndim - 1))
        x = exchange(x.reshape(devices, -1, *x.shape[1:]))
        x = _joined(x, sizes)
        x = _orthogonalize_whole(x, inputs, eps)
        x = exchange(_split(x, sizes))
        return jax.lax.collapse(x, 0, 2)[:layers]

    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _joined(parts: Array, sizes: dict[int, int]) -> Array:
    """Joins parts, stacked in row-major order, of an array with dimensions so cut."""
    x = parts.reshape(*sizes.values(), *parts.shape[1:])
    for left, dimension in zip(reversed(range(len(sizes))), sizes, strict=True):
        x = jnp.moveaxis(x, 0, left + dimension)
        x = jax.lax.collapse(x, left + dimension, left + dimension + 2)
    return x


def _split(x: Array, sizes: dict[int, int]) -> Array:
    """The inverse of `_joined`."""
    for done, (dimension, size) in enumerate(reversed(sizes.items())):
        at = done + dimension
        x = x.reshape(*x.shape[:at], size, -1, *x.shape[at + 1 :])
        x = jnp.moveaxis(x, at, 0)
    return x.reshape(-1, *x.shape[len(sizes) :])


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
