"""Our attention on Hopper GPUs: the entry point, and default block sizes."""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.gpu import (
    gpu_decode,
    gpu_flash,
    specialized_backward,
    specialized_forward,
)
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings, KernelKind
from jaxlm.ops.attention.request import AttentionRequest
from jaxlm.ops.attention.spec import AttentionSpec, dequantize
from jaxlm.ops.attention.tuning.tuning_cache import measured, settings_key


def default_settings(
    q: Array | jax.ShapeDtypeStruct,
    segments: bool = False,
    kernels: KernelKind | None = None,
) -> GpuSettings:
    """Returns the settings measured on an H100.

    In benchmarks/results: attention_*.json and backward_*.json.

    Args:
      segments: whether the mask has segments. Packed documents are short, and smaller
        blocks skip more.
      kernels: the forward and the backward kernels; None: the faster ones. Above
        head_dim 128 the backward kernels are always plain.
    """
    H = q.shape[-1]
    fast_forward = "specialized" if 64 < H <= 128 and not segments else "plain"
    forward, backward = kernels or fast_forward, kernels or "specialized"
    if H > specialized_backward.MAX_HEAD_DIM:
        backward = "plain"
    large = H <= 128 if forward == "specialized" else H <= 64 and not segments
    return GpuSettings(
        forward=forward,
        block_keys=128 if large else 64,
        backward=backward,
        backward_buffers=3 if backward == "specialized" else 2,
    )


def settings_for(
    q: Array | jax.ShapeDtypeStruct, segments: bool = False
) -> GpuSettings:
    """Returns the settings measured for such queries, else the default."""
    return measured(settings_key("pallas_gpu", q), default_settings(q, segments))


def declines(request: AttentionRequest) -> str | None:
    """Returns why these kernels cannot run the request; None: they can."""
    # No GPU before or after Hopper has its matrix instructions.
    if not request.device_kind.startswith(("NVIDIA H", "NVIDIA GH")):
        return f"needs a Hopper GPU, not {request.device_kind}"
    # Tensor cores do not multiply float32.
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{request.dtype.name} is neither bfloat16 nor float16"
    if request.head_dim > 256:
        return f"head_dim {request.head_dim} is above 256"
    runtime = _cuda_runtime()
    if request.spec.mask.causal and runtime and 12080 <= runtime < 12091:
        # As JAX's own kernel declines.
        return f"the ptxas of CUDA {runtime} miscompiles causal kernels: take 12.9.1"
    return None


def _cuda_runtime() -> int | None:
    """Returns the CUDA runtime of this process, as 12090 for 12.9.0, or None."""
    found = re.search(r"cuda (\d+)", jax.local_devices()[0].client.platform_version)
    return int(found[1]) if found else None


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: GpuSettings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention in q's dtype, and the log-sum-exp of the scores, sinks included, f32.

    Takes bf16 and f16, any lengths, and int8 keys. Up to 8 queries with given positions
    take the decode kernel.
    """
    return flash_attention(kernels(q, spec, settings), q, k, v, spec)


def kernels(
    q: Array, spec: AttentionSpec, settings: GpuSettings | None = None
) -> FlashKernels:
    """Returns the kernels for such queries."""
    settings = settings or settings_for(q, spec.mask.query_segments is not None)
    return FlashKernels(_forward, _backward, settings)


def _pad_head_dim(*arrays: Array) -> list[Array]:
    """Matrix instructions contract 16 elements at a time."""
    missing = -arrays[0].shape[-1] % 16
    if not missing:
        return list(arrays)
    return [jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) for x in arrays]


def _forward(q, k, v, spec: AttentionSpec, settings: GpuSettings):
    """See `flash.FlashKernels`."""
    H = q.shape[-1]
    padded_q, padded_k, padded_v = _pad_head_dim(q, k, v)
    z, lse = _padded_forward(padded_q, padded_k, padded_v, spec, settings)
    return z[..., :H], lse


def _backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: GpuSettings):
    """See `flash.FlashKernels`."""
    H = q.shape[-1]
    q, k, v, dz = _pad_head_dim(q, k, v, dz)
    specialized = settings.backward == "specialized"
    kernel = specialized_backward if specialized else gpu_flash
    grads = kernel.backward(q, k, v, spec, lse, delta, dz, settings)
    return tuple(x[..., :H] for x in grads)


def _padded_forward(q, k, v, spec: AttentionSpec, settings: GpuSettings):
    given = spec.mask.query_positions is not None
    if given and q.shape[1] <= gpu_decode.MAX_QUERIES:
        return gpu_decode.forward(q, k, v, spec, settings)
    k, v, spec = dequantize(k, v, spec, q.dtype)
    specialized = settings.forward == "specialized"
    kernel = specialized_forward if specialized else gpu_flash
    return kernel.forward(q, k, v, spec, settings)
