"""Linear probes: whether a property can be read off a site, along one direction.

That a probe finds something does not show that the model uses it: project its direction
out (`Edit(site, "project_out", probe.direction)`) and see what changes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LinearProbe(NamedTuple):
    """`direction . x + bias` is the log-odds of the property."""

    direction: Float[Array, " D"]
    """Of raw values of the site: `Tap(site, reduce="dot", direction=...)` reads it, in
    `generate` too."""
    bias: Float[Array, ""]
    accuracy: Float[Array, ""]
    """On the rows that it was fitted to."""
    held_out_accuracy: Float[Array, ""]
    """On rows that it has not seen."""


def fit_probe(
    values: Float[Array, "B D"],
    labels: Bool[Array, " B"] | Int[Array, " B"],
    *,
    held_out: float = 0.25,
    ridge: float = 1e-2,
    seed: int = 0,
) -> LinearProbe:
    """Fits a logistic regression, on a random part of the rows.

    Minimizes the mean negative log-likelihood plus `ridge / 2 |w|^2` of standardized
    values by Newton's method. Source: Alain and Bengio 2016, arXiv:1610.01644.

    Args:
      values: one row each text.
      labels: True for rows with the property.
      held_out: share of the rows that only test.

    Raises:
      ValueError: if no row is left to fit to, or to test with.
    """
    total = len(values)
    num_held_out = round(held_out * total)
    if not 0 < num_held_out < total:
        raise ValueError(
            f"held_out {held_out} of {total} rows leaves none to fit to or to test with"
        )
    order = jax.random.permutation(jax.random.key(seed), total)
    test, fit = order[:num_held_out], order[num_held_out:]
    x, y = values.astype(jnp.float32), labels.astype(jnp.float32)
    mean, scale = jnp.mean(x[fit], axis=0), jnp.std(x[fit], axis=0)
    # A value that is the same in all rows tells nothing.
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    design = jnp.pad((x - mean) * inverse, ((0, 0), (0, 1)), constant_values=1.0)
    penalty = ridge * jnp.ones(design.shape[1]).at[-1].set(1e-6)

    def step(_: Any, w: Array) -> Array:
        p = jax.nn.sigmoid(design[fit] @ w)
        gradient = design[fit].T @ (p - y[fit]) / len(fit) + penalty * w
        weighted = design[fit] * (p * (1 - p))[:, None]
        hessian = design[fit].T @ weighted / len(fit) + jnp.diag(penalty)
        return w - jnp.linalg.solve(hessian, gradient)

    w = jax.lax.fori_loop(0, 20, step, jnp.zeros(design.shape[1]))
    right = ((design @ w > 0) == (y > 0.5)).astype(jnp.float32)
    direction = w[:-1] * inverse
    bias = w[-1] - direction @ mean
    return LinearProbe(direction, bias, jnp.mean(right[fit]), jnp.mean(right[test]))
