"""Our attention on Hopper GPUs: which kernel a call takes, and its block sizes."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.gpu import gpu_decode, gpu_flash, specialized_forward
from jaxlm.ops.attention.gpu.gpu_settings import ForwardKernel, GpuSettings
from jaxlm.ops.attention.request import Request, target
from jaxlm.ops.attention.spec import AttentionSpec, dequantize
from jaxlm.ops.attention.tuning_cache import measured, settings_key

# Kinds of device on which a run of the specialized forward kernel is recorded in
# benchmarks/results: right, and faster than the plain one. It is the default there.
PROVEN_SPECIALIZED: frozenset[str] = frozenset()


def default_settings(q: Array, forward: ForwardKernel | None = None) -> GpuSettings:
    """Blocks that fit the shared memory and the registers of an H100.

    Args:
      forward: the forward kernel; None: the specialized one where it is proven.
    """
    if forward is None:
        proven = target()[1] in PROVEN_SPECIALIZED
        forward = "specialized" if proven else "plain"
    settings = GpuSettings(forward=forward)
    if forward == "specialized" and q.shape[-1] <= 128:
        settings = replace(settings, block_keys=128)
    return settings


def settings_for(q: Array) -> GpuSettings:
    """What was measured for such queries, else the default."""
    return measured(settings_key("pallas_gpu", q), default_settings(q))


def declines(request: Request) -> str | None:
    """Why these kernels cannot do what is asked; None: they can."""
    # Its matrix instructions are in no card before or after.
    if not request.device_kind.startswith(("NVIDIA H", "NVIDIA GH")):
        return f"made for Hopper, not for a {request.device_kind}"
    # Tensor cores have no float32.
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{request.dtype.name} is neither bfloat16 nor float16"
    if request.head_dim > 256:
        return f"head_dim {request.head_dim} is above 256"
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: GpuSettings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention, and the log-sum-exp of its scores.

    bf16 and f16, any lengths, int8 keys. Up to 8 queries whose positions are given take
    the decode kernel.
    """
    kernels = FlashKernels(_forward, gpu_flash.backward, settings or settings_for(q))
    H = q.shape[-1]
    # Matrix instructions take 16 numbers of a row at a time.
    q, k, v = (_pad_head_dim(x, -H % 16) for x in (q, k, v))
    z, lse = flash_attention(kernels, q, k, v, spec)
    return z[..., :H], lse


def _pad_head_dim(x: Array, missing: int) -> Array:
    return jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) if missing else x


def _forward(q, k, v, spec: AttentionSpec, settings: GpuSettings):
    """z and lse; see `flash.FlashKernels`."""
    given = spec.mask.query_positions is not None
    if given and q.shape[1] <= gpu_decode.MAX_QUERIES:
        return gpu_decode.forward(q, k, v, spec, settings)
    k, v, spec = dequantize(k, v, spec, q.dtype)
    specialized = settings.forward == "specialized"
    kernel = specialized_forward if specialized else gpu_flash
    return kernel.forward(q, k, v, spec, settings)
