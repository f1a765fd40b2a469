"""One layer: `Block`, which is attention and a feed-forward with their norms.

Modules hold no state: parameters go in as a nested dict, values come out. `params.py`
describes each weight, `jaxlm/ops` has the formulas, and `jaxlm/types.py` explains the
letters of shapes.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, Num

from jaxlm.config import ModelConfig
from jaxlm.model.kv_cache import LayerCache, extend
from jaxlm.model.params import param, weights
from jaxlm.model.positions import Context, make_context
from jaxlm.ops.activations import activate
from jaxlm.ops.attention.dispatch import attention
from jaxlm.ops.attention.reference import probed_attention
from jaxlm.ops.attention.spec import AttentionSpec, Mask
from jaxlm.ops.experts.moe import mixture, route
from jaxlm.ops.layout import layout, reshape
from jaxlm.ops.linear import compute_dtype, einsum
from jaxlm.ops.norm import divisor, normalize, normalize_by
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.sites import ATTENTION_SITES
from jaxlm.ops.rope import rotate
from jaxlm.sharding.rules import (
    activation_spec,
    batch_parts,
    expert_axes,
    gather_stream,
    reshard_input,
    reshard_output,
    summed_once,
)
from jaxlm.types import Params


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers."""

    local: bool
    rotary: bool


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Returns the kinds of the layers in one period of the layer patterns."""
    layers, rope = config.layer_pattern, config.rope_pattern
    period = math.lcm(len(layers), len(rope))
    return tuple(
        LayerKind(
            local=layers[i % len(layers)] == "local",
            rotary=config.position == "rope" and rope[i % len(rope)],
        )
        for i in range(min(period, config.num_layers))
    )


class Block(nn.Module):
    """Attention and feed-forward on the residual stream.

    To replace the layers of a model, inherit from it and pass the class as `block` to
    `init`, `forward` and `generate`. `__call__` may compute anything, and declare
    parameters with `self.param`. It is traced once for each kind of layer, so what
    differs between layers is a parameter, or depends on `kind`.
    """

    config: ModelConfig
    kind: LayerKind

    @classmethod
    def init_layer(cls, config: ModelConfig, key: Key[Array, ""]) -> Params:
        """Draws the parameters of one layer, without computing the layer."""
        tokens = jax.ShapeDtypeStruct((batch_parts(), 1), jnp.int32)
        context = make_context(config, tokens)
        x = jax.ShapeDtypeStruct(
            (*tokens.shape, config.model_dim), compute_dtype(config.dtype)
        )
        layer = cls(config, layer_kinds(config)[0], parent=None)
        return layer.lazy_init(key, x, context, None, Probe())["params"]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: LayerCache | None,
        probe: Probe,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the new residual stream, and the cache with the new tokens.

        Args:
          x: in the compute dtype.
          context: what all layers share.
          cache: of this layer; None without one.
          probe: called as `x = probe(site, x)` at each site that can be tapped or
            edited.
        """
        config = self.config
        pre_norm = config.norm_placement in ("pre", "both")
        output_norm = config.norm_placement in ("output", "both")
        post_norm = config.norm_placement == "post"

        def norm(name: str, x: Array) -> Array:
            return Norm(config, f"layers/{name}", name=name)(x, probe)

        x = probe("resid_pre", x)
        h = probe("attn_in", norm("attn_norm", x) if pre_norm else x)
        h, cache = Attention(config, self.kind, name="attn")(h, context, cache, probe)
        h = probe("attn_out_post", norm("attn_output_norm", h) if output_norm else h)
        mid = norm("attn_norm", x + h) if post_norm else x + h
        # In a parallel block the feed-forward reads what attention read.
        if not config.parallel_block:
            x = mid = probe("resid_mid", mid)

        h = probe("mlp_in", norm("mlp_norm", x) if pre_norm else x)
        if config.num_experts:
            h = MixtureOfExperts(config, name="moe")(h, probe)
        else:
            h = FeedForward(config, name="mlp")(h, probe)
        h = probe("mlp_out_post", norm("mlp_output_norm", h) if output_norm else h)
        x = norm("mlp_norm", mid + h) if post_norm else mid + h
        return probe("resid_post", x), cache


class Attention(nn.Module):
    """Grouped-query attention, with or without a cache."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: LayerCache | None,
        probe: Probe,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config, kind = self.config, self.kind
        h = reshard_input(x)
        q = probe("q", project(self, "BTD,DNH->BTNH", h, "layers/attn/q"))
        k = probe("k", project(self, "BTD,DKH->BTKH", h, "layers/attn/k"))
        v = probe("v", project(self, "BTD,DKH->BTKH", h, "layers/attn/v"))
        if config.qk_norm != "none":
            q = probe("q_normed", self._qk_norm("q_norm", q))
            k = probe("k_normed", self._qk_norm("k_norm", k))
        if kind.rotary:
            rotation = context.local_rotation if kind.local else context.rotation
            assert rotation is not None
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k = probe("q_rot", q), probe("k_rot", k)

        sinks = param(self, "layers/attn/sinks") if config.attention_sinks else None
        spec = attention_spec(config, kind, context, sinks)
        if cache is not None:
            assert context.lengths is not None
            cache, k, v, spec = extend(cache, context.lengths, k, v, spec, context.ends)
        z = probe("z", self._attend(q, k, v, spec, context, probe))
        y = project(self, "BTNH,NHD->BTD", z, "layers/attn/o", out_like=x)
        return probe("attn_out", y), cache

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Num[Array, "B S K H"],
        v: Num[Array, "B S K H"],
        spec: AttentionSpec,
        context: Context,
        probe: Probe,
    ) -> Float[Array, "B T N H"]:
        """Runs the kernel that the config names, or the reference for edited scores."""
        if probe.is_edited(*ATTENTION_SITES):
            return probed_attention(q, k, v, spec, probe)
        config, cached = self.config, context.lengths is not None
        z, lse = attention(
            *(q, k, v, spec),
            implementation=config.decode_attention if cached else config.attention,
            across=config.context_attention,
            zigzag=context.zigzag,
            return_lse="attn_lse" in probe,
        )
        if lse is not None:
            probe("attn_lse", lse)
        return z

    def _qk_norm(self, name: str, x: Float[Array, "B T N H"]) -> Array:
        """Normalizes each head alone, or all heads together."""
        norm = Norm(self.config, f"layers/attn/{name}", name=name)
        if self.config.qk_norm == "head":
            return norm(x)
        B, T, N, H = x.shape
        flat = norm(reshape(x, (B, T, N * H), (0, 1, 2)))
        return reshape(flat, (B, T, N, H), (0, 1, 2, None))


class FeedForward(nn.Module):
    """Two projections, or three when gated, around a non-linearity."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], probe: Probe) -> Float[Array, "B T D"]:
        h = reshard_input(x)
        up = project(self, "BTD,DF->BTF", h, "layers/mlp/up")
        if self.config.gated:
            pre = project(self, "BTD,DF->BTF", h, "layers/mlp/gate")
            pre, up = probe("mlp_pre", pre), probe("mlp_up", up)
        else:
            pre, up = probe("mlp_pre", up), None
        act = probe("mlp_act", activate(pre, up, self.config.activation))
        y = project(self, "BTF,FD->BTD", act, "layers/mlp/down", out_like=x)
        return probe("mlp_out", y)


class MixtureOfExperts(nn.Module):
    """A router, and the feed-forwards it sends each token to."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], probe: Probe) -> Float[Array, "B T D"]:
        config, x32 = self.config, x.astype(jnp.float32)
        # Always in f32: rounding would change which of two close experts runs.
        logits = project(
            self, "BTD,DE->BTE", x32, "layers/moe/router", precision="highest"
        )
        logits = probe("router_logits", gather_stream(logits))
        routing = route(logits, config.experts_per_token, config.router_normalize)
        matrices = {
            weight.name: param(self, path)
            for path, weight in weights(config).items()
            if "E" in weight.stacked
        }
        y = mixture(x, *routing, matrices, config.activation, expert_axes())
        return probe("mlp_out", y)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis.

    Given a probe, it divides by what an edit makes of its divisor. A divisor that is
    only tapped is computed in `trace.py`, from the input of the norm.
    """

    config: ModelConfig
    prefix: str
    """Path of its weights, such as `layers/attn_norm`, before `/scale` and `/bias`."""

    @nn.compact
    def __call__(self, x: Array, probe: Probe | None = None) -> Array:
        config = self.config
        scale = param(self, f"{self.prefix}/scale").reshape(-1)
        bias = None
        if config.norm_bias:
            bias = param(self, f"{self.prefix}/bias").reshape(-1)
        site = f"{self.prefix.rpartition('/')[2]}_div"
        if probe is not None and probe.is_edited(site):
            div = probe(site, divisor(x, config.norm_epsilon, config.norm))
            return normalize_by(x, div, scale, bias, config.norm)
        return normalize(x, scale, bias, config.norm_epsilon, config.norm)


def project(
    module: nn.Module,
    equation: str,
    x: Float[Array, "..."],
    path: str,
    precision: jax.lax.PrecisionLike = None,
    out_like: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Multiplies x by the weight `path`, and adds its bias where the model has one.

    Args:
      x: its axes begin with B and T, as those of the result do.
      out_like: an activation that the result is sharded as; for products that sum over
        what `tensor` cuts.
    """
    out, tokens = activation_spec(equation.partition("->")[2]), layout(x)
    if out is not None and tokens is not None:
        out = P(*tokens.spec.partitions[:2], *out[2:])
    if out is not None and out_like is not None:
        out = out.update(unreduced=summed_once())
    y = einsum(equation, x, param(module, path), out, precision=precision)
    if out_like is not None:
        y = reshard_output(y, out_like)
    if f"{path}_bias" in weights(module.config):
        y += param(module, f"{path}_bias").astype(y.dtype)
    return y


def attention_spec(
    config: ModelConfig, kind: LayerKind, context: Context, sinks: Array | None
) -> AttentionSpec:
    """Returns what attention computes in a layer of this kind."""
    return AttentionSpec(
        config.attention_scale or config.head_dim**-0.5,
        # Causal, which also hides the part of the cache that is still empty.
        Mask(
            window=config.window if kind.local else None,
            query_positions=context.query_positions,
            query_segments=context.segment_ids,
            key_segments=context.segment_ids,
        ),
        soft_cap=config.attention_soft_cap,
        sinks=sinks,
    )
