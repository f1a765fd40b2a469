"""cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention.request import AttentionRequest
from jaxlm.ops.attention.spec import AttentionSpec


def declines(request: AttentionRequest) -> str | None:
    """Returns why cuDNN cannot run the request; None: it can."""
    nvidia = request.platform == "gpu" and request.device_kind.startswith("NVIDIA")
    capability = _capability()
    if not nvidia or (capability and capability < (8, 0)):
        return "needs an NVIDIA GPU, Ampere or later"
    spec, mask, H = request.spec, request.spec.mask, request.head_dim
    T, S = request.num_queries, request.num_keys
    rules = (
        (request.dtype not in (jnp.bfloat16, jnp.float16), f"no {request.dtype}"),
        # JAX rounds it to q's dtype and gives it no gradient.
        (request.lse, "no log-sum-exp with a gradient"),
        (spec.soft_cap is not None, "no soft cap"),
        (spec.sinks is not None, "no sinks"),
        # JAX takes these only as a [T, S] mask.
        (mask.query_segments is not None, "no segments"),
        (mask.query_positions is not None, "no query positions"),
        (H % 8, f"head_dim {H} is not a multiple of 8"),
        (H > 256, f"head_dim {H} is over 256"),
        # JAX checks the GPU of this process, and raises without one. GPUs newer than
        # Hopper have no backward pass for these.
        (
            H > 128 and (capability is None or capability[0] != 9),
            f"head_dim {H} is over 128, which needs a Hopper GPU",
        ),
        # cuDNN needs even lengths for a gradient, and rejects a single query.
        (T % 2 or S % 2, "lengths must be even"),
        (mask.window and not mask.causal, "no window without the causal mask"),
        (mask.window and T > S, "no window with more queries than keys"),
    )
    return next((reason for applies, reason in rules if applies), None)


def _capability() -> tuple[int, int] | None:
    """Returns the compute capability of JAX's first device; None if it has none."""
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
    """Attention in the common dtype of q, k and v; the log-sum-exp is always None.

    Args:
      implementation: that of `jax.nn.dot_product_attention`; "xla" computes the same on
        any device.
    """
    # JAX counts the neighbors on the left and right, without the token itself.
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
