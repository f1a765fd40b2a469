"""Our attention on TPUs: the entry point, decoding, and default block sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.request import AttentionRequest
from jaxlm.ops.attention.spec import AttentionSpec, dequantize
from jaxlm.ops.attention.tpu import tpu_backward, tpu_forward
from jaxlm.ops.attention.tpu.tpu_blocks import LANES, TpuSettings
from jaxlm.ops.attention.tuning.tuning_cache import measured, settings_key

# Up to this many queries with given positions are decoded (`_decode`).
DECODE_QUERIES = 8


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: TpuSettings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention in q's dtype, and the log-sum-exp of the scores, sinks included, f32.

    Takes f32 and bf16, any lengths, and int8 keys. Up to `DECODE_QUERIES` queries with
    given positions take a path that reads each key once for all query heads that share
    it.
    """
    return flash_attention(kernels(q, spec, settings), q, k, v, spec)


def kernels(
    q: Array, spec: AttentionSpec, settings: TpuSettings | None = None
) -> FlashKernels:
    """Returns the kernels for such queries."""
    return FlashKernels(_forward, tpu_backward.backward, settings or settings_for(q))


def settings_for(q: Array) -> TpuSettings:
    """Returns the settings measured for such queries, else blocks that fit in VMEM."""
    wide = q.shape[-1] > LANES or q.dtype == jnp.float32
    default = TpuSettings(256, 512, 256, 256) if wide else TpuSettings()
    return measured(settings_key("pallas_tpu", q), default)


def declines(request: AttentionRequest) -> str | None:
    """Returns why these kernels cannot run the request; None: they can."""
    if request.dtype not in (jnp.float32, jnp.bfloat16):
        return f"no {request.dtype.name}: TPU kernels cannot load it"
    if request.head_dim > 256:
        return f"head_dim {request.head_dim} is above 256"
    return None


def _forward(q, k, v, spec: AttentionSpec, settings: TpuSettings):
    """See `flash.FlashKernels`."""
    if spec.mask.query_positions is not None and q.shape[1] <= DECODE_QUERIES:
        return _decode(q, k, v, spec, settings)
    k, v, spec = dequantize(k, v, spec, q.dtype)
    return tpu_forward.forward(q, k, v, spec, settings)


def _decode(q, k, v, spec: AttentionSpec, settings: TpuSettings):
    """Attention of few queries: all queries of a key head are rows of one block."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    rows = q.reshape(B, T, K, G, H).swapaxes(2, 3).reshape(B, T * G, K, H)
    positions, segments = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.repeat(x, G, axis=1), (B, T * G)),
        spec.mask.queries(T),
    )
    mask = replace(spec.mask, query_positions=positions, query_segments=segments)
    row_spec = replace(spec, mask=mask, sinks=None)
    splits = settings.decode_splits
    settings = replace(settings, block_keys=settings.decode_block_keys)
    z, lse = tpu_forward.forward(rows, k, v, row_spec, settings, splits)
    z = z.reshape(B, splits, T, G, K, H)
    lse = lse.reshape(B, splits, K, T, G)
    return _merge(z, lse, spec.sinks, q)


def _merge(z_BPTGKH, lse_BPKTG, sinks, q):
    """Merges attention over P splits of the keys, and adds the sinks."""
    total = jax.nn.logsumexp(lse_BPKTG, axis=1)
    if sinks is not None:
        K, G = lse_BPKTG.shape[2], lse_BPKTG.shape[4]
        sinks = sinks.astype(jnp.float32).reshape(K, 1, G)
        total = jnp.logaddexp(total, sinks)
    share = jnp.exp(lse_BPKTG - total[:, None])
    # Elementwise, because an einsum would round to bf16.
    share = share.transpose(0, 1, 3, 4, 2)[..., None]
    z = jnp.sum(z_BPTGKH.astype(jnp.float32) * share, axis=1).swapaxes(2, 3)
    B, T, N, _ = q.shape
    return z.reshape(q.shape).astype(q.dtype), total.swapaxes(2, 3).reshape(B, N, T)
