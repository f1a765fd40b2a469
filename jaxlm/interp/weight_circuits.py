"""What heads do by their weights alone: QK and OV circuits, and how heads compose.

A head reads the residual stream by two matrices: `W_QK` decides where it looks, `W_OV`
what it moves. Gains of norms, biases and rotations are not part of them. Source: Elhage
et al. 2021, "A mathematical framework for transformer circuits".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.config import ModelConfig
from jaxlm.types import Params


def _heads(config: ModelConfig, params: Params) -> tuple[Array, Array, Array, Array]:
    """Returns q, k, v of each query head [L, D, N, H] and o [L, N, H, D], f32."""
    attn, group = params["layers"]["attn"], config.num_heads // config.num_kv_heads
    q, k, v, o = (attn[name].astype(jnp.float32) for name in "qkvo")
    return q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2), o


def qk_circuit(
    config: ModelConfig, params: Params, layer: int, head: int
) -> Float[Array, "D D"]:
    """Returns `W_Q W_K^T`: `x_query . W x_key` is a score before scale and rotation."""
    q, k, _, _ = _heads(config, params)
    return q[layer, :, head] @ k[layer, :, head].T


def ov_circuit(
    config: ModelConfig, params: Params, layer: int, head: int
) -> Float[Array, "D D"]:
    """Returns `W_V W_O`: a head that looks at x adds `x W` to the stream."""
    _, _, v, o = _heads(config, params)
    return v[layer, :, head] @ o[layer, head]


def circuit_norms(
    config: ModelConfig, params: Params
) -> tuple[Float[Array, "L N"], Float[Array, "L N"]]:
    """Returns the Frobenius norms of all QK and all OV circuits.

    `|A B|^2 = tr(A^T A B B^T)`: no [D, D] is formed.
    """
    q, k, v, o = _heads(config, params)

    def norm(x: Array, y: Array) -> Array:
        return jnp.sqrt(jnp.maximum(jnp.einsum("LNHJ,LNHJ->LN", x, y), 0.0))

    def gram(x: Array) -> Array:
        return jnp.einsum("LDNH,LDNJ->LNHJ", x, x)

    out = jnp.einsum("LNHD,LNJD->LNHJ", o, o)
    return norm(gram(q), gram(k)), norm(gram(v), out)


def copying(config: ModelConfig, params: Params) -> Float[Array, "L N"]:
    """Returns `sum(x) / sum(|x|)` of the real parts x of the OV circuit's eigenvalues.

    1 for a head that writes what it reads, -1 for one that writes its opposite, in the
    residual stream's own basis. Eigenvalues of `W_V W_O` are those of `W_O W_V`.
    Computed on the CPU, where there are eigenvalues of matrices that are not symmetric.
    """
    _, _, v, o = _heads(config, params)
    eigenvalues = jnp.linalg.eigvals(jnp.einsum("LNHD,LDNJ->LNHJ", o, v)).real
    total = jnp.sum(jnp.abs(eigenvalues), axis=-1)
    return jnp.sum(eigenvalues, axis=-1) / jnp.maximum(total, 1e-30)


def composition(
    config: ModelConfig, params: Params, reader: str, layer: int, head: int
) -> Float[Array, "L N"]:
    """Returns `|W_OV W| / (|W_OV| |W|)` of a head and every head that could feed it.

    W is what the head reads by: its QK circuit from the side of its queries (`q`) or
    of its keys (`k`), or its OV circuit (`v`). About `1 / sqrt(D)` by chance; 0 for
    heads in the same layer or later.

    Args:
      reader: `q`, `k` or `v`.
      layer, head: of the head that reads.
    """
    if reader not in ("q", "k", "v"):
        raise ValueError(f"reader is {reader!r}: give 'q', 'k' or 'v'")
    _, _, v, o = _heads(config, params)
    if reader == "v":
        reads = ov_circuit(config, params, layer, head)
    else:
        reads = qk_circuit(config, params, layer, head)
        reads = reads if reader == "q" else reads.T
    read = jnp.einsum("LNHD,DE->LNHE", o, reads)
    gram = jnp.einsum("LDNH,LDNJ->LNHJ", v, v)
    product = jnp.einsum("LNHE,LNHJ,LNJE->LN", read, gram, read)
    _, norms = circuit_norms(config, params)
    score = jnp.sqrt(jnp.maximum(product, 0.0)) / (norms * jnp.linalg.norm(reads))
    earlier = jnp.arange(config.num_layers)[:, None] < layer
    return jnp.where(earlier, score, 0.0)
