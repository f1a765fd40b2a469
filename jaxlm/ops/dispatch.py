"""The choice between implementations of attention."""

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


def choose(implementation: str, num_queries: int, num_keys: int) -> str:
    """The implementation that `auto` stands for at these lengths.

    A single query has one row of scores, so the reference is lean enough for it.

    Raises:
      ValueError: for an unknown name.
    """
    if implementation == "auto":
        large = num_queries > 1 and num_queries * num_keys >= BLOCKED_FROM
        return "blocked" if large else "reference"
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
    name = choose(implementation, q.shape[1], k.shape[1])
    return IMPLEMENTATIONS[name](q, k, v, spec)
