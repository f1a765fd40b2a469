"""Our attention on Hopper GPUs: which kernels a call takes, and their block sizes."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.flash import Kernels, flash_attention
from jaxlm.ops.attention.gpu import gpu_decode, gpu_flash
from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.settings import measured, settings_key
from jaxlm.ops.attention.spec import AttentionSpec, dequantize


@dataclass(frozen=True)
class Settings(gpu_flash.Settings):
    """Block sizes of all kernels."""

    decode_block_keys: int = 64
    """A multiple of 64, at most 256."""
    decode_splits: int = 0
    """Parts into which the keys of a row are cut; 0: enough to fill the card."""


def default_settings(q: Array) -> Settings:
    """Blocks that fit the shared memory of an H100."""
    forward, backward = gpu_flash.buffers(q.shape[-1], q.dtype)
    return Settings(buffers=forward, backward_buffers=backward)


def settings_for(q: Array) -> Settings:
    """What was measured for such queries, else the default."""
    return measured(settings_key("pallas_gpu", q), default_settings(q))


def declines(request: Request) -> str | None:
    """Why these kernels cannot do what is asked; None: they can."""
    # Its matrix instructions are in no card before or after.
    if not request.device_kind.startswith(("NVIDIA H", "NVIDIA GH")):
        return f"made for Hopper, not for a {request.device_kind}"
    return gpu_flash.declines(request.head_dim, request.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: Settings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention, and the log-sum-exp of its scores.

    f32, bf16 and f16, any lengths, int8 keys. Up to 8 queries whose places are given
    take the decode kernel where it can.
    """
    kernels = Kernels(_forward, gpu_flash.backward, settings or settings_for(q))
    return flash_attention(kernels, q, k, v, spec)


def _forward(q, k, v, spec: AttentionSpec, settings: Settings):
    return forward(gpu_flash.forward, q, k, v, spec, settings)


def forward(
    many: Callable, q: Array, k: Array, v: Array, spec: AttentionSpec, settings
) -> tuple[Array, Array]:
    """z and lse, by the decode kernel or by `many`, one for many queries."""
    _, T, N, H = q.shape
    decoding = spec.mask.query_positions is not None
    if not decoding or gpu_decode.declines(T, H, q.dtype) is not None:
        return many(q, *dequantize(k, v, spec, q.dtype), settings)
    splits = settings.decode_splits or gpu_decode.best_splits(k.shape, T * N)
    decode = gpu_decode.Settings(
        block_keys=settings.decode_block_keys,
        splits=splits,
        interpret=settings.interpret,
    )
    return gpu_decode.forward(q, k, v, spec, decode)
