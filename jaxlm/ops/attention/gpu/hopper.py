"""`gpu.py` with the forward kernel whose warpgroups are specialised."""

from dataclasses import replace

from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.flash import Kernels, flash_attention
from jaxlm.ops.attention.gpu import gpu_flash, hopper_forward, mosaic
from jaxlm.ops.attention.gpu import pallas_gpu as gpu
from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.settings import measured, settings_key
from jaxlm.ops.attention.spec import AttentionSpec


def settings_for(q: Array) -> gpu.Settings:
    """What was measured for such queries, else blocks that fit an H100."""
    default = gpu.default_settings(q)
    best = hopper_forward.best_settings(q.shape[-1])
    default = replace(default, block_keys=best.block_keys, buffers=best.buffers)
    return measured(settings_key("pallas_hopper", q), default)


def declines(asked: Request) -> str | None:
    """Why these kernels cannot do what is asked; None: they can."""
    return gpu.declines(asked) or mosaic.declines(asked.head_dim, asked.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: gpu.Settings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention, and the log-sum-exp of its scores; bf16 and f16."""
    kernels = Kernels(_forward, gpu_flash.backward, settings or settings_for(q))
    return flash_attention(kernels, q, k, v, spec)


def _forward(q, k, v, spec: AttentionSpec, settings: gpu.Settings):
    return gpu.forward(_many, q, k, v, spec, settings)


def _many(q, k, v, spec: AttentionSpec, settings: gpu.Settings):
    blocks = hopper_forward.Settings(
        block_keys=settings.block_keys,
        buffers=settings.buffers,
        interpret=settings.interpret,
    )
    return hopper_forward.forward(q, k, v, spec, blocks)
