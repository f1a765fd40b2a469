"""cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.spec import AttentionSpec


def declines(request: Request) -> str | None:
    """Why cuDNN cannot do this, or None."""
    nvidia = request.platform == "gpu" and request.device_kind.startswith("NVIDIA")
    capability = _capability()
    if not nvidia or (capability and capability < (8, 0)):
        return "needs an NVIDIA GPU, Ampere or later"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"no {request.dtype}"
    spec, mask = request.spec, request.spec.mask
    for asked, name in (
        # JAX rounds it to the dtype of q, and gives it no gradient.
        (request.lse, "log-sum-exp with a gradient"),
        (spec.soft_cap is not None, "soft cap"),
        (spec.sinks is not None, "sinks"),
        # JAX would take them as a [T, S] mask.
        (mask.query_segments is not None, "segments"),
        (mask.query_positions is not None, "positions of queries"),
    ):
        if asked:
            return f"no {name}"
    return _declines_sizes(request, capability)


def _declines_sizes(request: Request, capability: tuple[int, int] | None) -> str | None:
    if request.head_dim % 8:
        return f"head_dim {request.head_dim} is not a multiple of 8"
    if request.head_dim > 256:
        return f"head_dim {request.head_dim} is over 256"
    # JAX asks the GPU of this process, and refuses without one. Newer GPUs than Hopper
    # have no backward pass for it.
    if request.head_dim > 128 and (capability is None or capability[0] != 9):
        return f"head_dim {request.head_dim} is over 128, and no Hopper GPU is here"
    # With a gradient; one query alone has a refusal of its own in cuDNN.
    if request.num_queries % 2 or request.num_keys % 2:
        return "lengths must be even"
    if request.spec.mask.window is not None:
        if not request.spec.mask.causal:
            return "no window that is not causal"
        if request.num_queries > request.num_keys:
            return "no window with more queries than keys"
    return None


def _capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPU that JAX runs on; None: it has none."""
    name = getattr(jax.local_devices()[0], "compute_capability", "")
    major, _, minor = name.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> tuple[Float[Array, "B T N H"], None]:
    """Attention in q's dtype, which k and v have too; never the log-sum-exp.

    `implementation` is JAX's; "xla" computes the same on any device.
    """
    # JAX counts the positions beside the token: on the left, on the right.
    window = None if spec.mask.window is None else (spec.mask.window - 1, 0)
    z = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=spec.scale,
        is_causal=spec.mask.causal,
        local_window_size=window,
        implementation=implementation,
    )
    return z, None
