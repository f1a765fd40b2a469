"""The choice between implementations of attention."""

import jax
from jaxtyping import Array, Float

from jaxlm.ops.attention import AttentionSpec, reference_attention
from jaxlm.ops.blocked import blocked_attention
from jaxlm.ops.dense import dense_attention

IMPLEMENTATIONS = {
    "reference": reference_attention,
    "dense": dense_attention,
    "blocked": blocked_attention,
}

# `auto` takes the memory-lean version from so many scores for each head on.
BLOCKED_FROM = 1024 * 1024


def choose(
    implementation: str,
    num_queries: int,
    num_keys: int,
    soft_cap: float | None = None,
) -> str:
    """The implementation that `auto` stands for at these lengths.

    `blocked` for long rows; for short ones `dense` on the CPU, where it was measured to
    be the fastest, unless there is a soft cap, which it does not have; the reference
    for all else.

    Raises:
      ValueError: for an unknown name.
    """
    if implementation == "auto":
        if num_queries > 1 and num_queries * num_keys >= BLOCKED_FROM:
            return "blocked"
        short = num_queries > 1 and soft_cap is None
        return "dense" if short and jax.default_backend() == "cpu" else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no attention implementation {implementation!r}: choose auto or one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention in q's dtype; N is a multiple of K.

    Raises:
      ValueError: for an unknown implementation.
    """
    name = choose(implementation, q.shape[1], k.shape[1], spec.soft_cap)
    return IMPLEMENTATIONS[name](q, k, v, spec)
