"""One layer: `Block`, made of `Attention` and a feed-forward, with `Norm`.

Modules hold no state: parameters go in as a nested dict, values come out. Formulas are
in `jaxlm/ops`. Letters of shapes are explained in `jaxlm/types.py`.
"""

import math
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.kv_cache import LayerCache, append
from jaxlm.model.positions import Rotation
from jaxlm.ops.attention.dispatch import attention
from jaxlm.ops.attention.reference import attention_scores
from jaxlm.ops.attention.spec import AttentionSpec, Mask
from jaxlm.ops.feed_forward import activate
from jaxlm.ops.layout import reshape
from jaxlm.ops.linear import product
from jaxlm.ops.moe import mixture, route
from jaxlm.ops.norm import inverse_rms, inverse_std, normalize
from jaxlm.ops.probe import Probe
from jaxlm.ops.rope import rotate
from jaxlm.sharding.rules import activation as shard
from jaxlm.sharding.rules import lay_out


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer of one call shares."""

    rotation: Rotation | None
    """cos and sin for global layers."""
    local_rotation: Rotation | None
    """cos and sin for local layers."""
    segment_ids: Int[Array, "B T"] | None
    query_index: Int[Array, "B T"] | None
    """Places of the tokens in the cache; None without a cache."""
    lengths: Int[Array, " B"] | None
    """Tokens already in the cache."""


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    local: bool
    rotary: bool


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """The kinds of the layers in one period of the patterns."""
    layers, rope = config.layer_pattern, config.rope_pattern
    period = math.lcm(len(layers), len(rope))
    return tuple(
        LayerKind(
            local=layers[i % len(layers)] == "local",
            rotary=config.position == "rope" and rope[i % len(rope)],
        )
        for i in range(min(period, config.num_layers))
    )


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis."""

    config: ModelConfig
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, probe: Probe | None = None, site: str = "") -> Array:
        config = self.config
        offset = config.norm == "rms_unit_offset"
        ones = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", ones, self.shape).reshape(-1)
        bias = None
        if config.norm_bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape).reshape(-1)
        if probe is not None and probe.wants(site):
            inverse_of = inverse_std if config.norm == "layer" else inverse_rms
            probe(site, inverse_of(x, config.norm_epsilon))
        return normalize(x, scale, bias, config.norm_epsilon, config.norm)


def weight_init(config: ModelConfig, fan_in: int, residual: bool = False):
    """Initializer of a projection; `residual`: one that adds to the residual stream."""
    std = config.init_std if config.init == "normal" else fan_in**-0.5
    if residual:
        std /= math.sqrt(2 * config.num_layers)
    return nn.initializers.normal(std)


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
        config = self.config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        q = probe("q", self._normed("q", self._project("q", x, N)))
        k = probe("k", self._normed("k", self._project("k", x, K)))
        v = probe("v", self._project("v", x, K))
        rotation = context.local_rotation if self.kind.local else context.rotation
        if self.kind.rotary:
            assert rotation is not None
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k = probe("q_rot", q), probe("k_rot", k)

        # With a cache, keys beyond the query are hidden by the causal mask.
        segment_ids = context.segment_ids if cache is None else None
        spec = AttentionSpec(
            config.attention_scale or H**-0.5,
            Mask(
                window=config.window if self.kind.local else None,
                query_positions=context.query_index,
                query_segments=segment_ids,
                key_segments=segment_ids,
            ),
            soft_cap=config.attention_soft_cap,
            sinks=self._sinks(),
        )
        implementation = config.attention
        if cache is not None:
            assert context.lengths is not None
            cache = append(cache, context.lengths, k, v)
            k, v = cache.keys.astype(k.dtype), cache.values.astype(v.dtype)
            implementation = config.decode_attention
        run = partial(attention, q, k, v, spec, implementation=implementation)
        if probe.wants("attn_scores", "attn_lse", "attn_probs"):
            z, lse = run(return_lse=True)
            self._record(q, k, lse, spec, probe)
        else:
            z = run()
        z = probe("z", z)
        return self._output(z, probe), cache

    def _project(self, name: str, x: Array, heads: int) -> Array:
        config = self.config
        shape = (config.model_dim, heads, config.head_dim)
        w = self.param(name, weight_init(config, config.model_dim), shape)
        out = shard("batch", None, "heads", None)
        y = product("BTD,DNH->BTNH", x, w, out_sharding=out)
        if config.attention_bias:
            bias = self.param(f"{name}_bias", nn.initializers.zeros, shape[1:])
            y += bias.astype(y.dtype)
        return y

    def _normed(self, name: str, x: Float[Array, "B T N H"]) -> Array:
        config = self.config
        if config.qk_norm == "none":
            return x
        if config.qk_norm == "head":
            return Norm(config, x.shape[-1:], name=f"{name}_norm")(x)
        B, T, N, H = x.shape
        flat = reshape(x, (B, T, N * H), (0, 1, 2))
        flat = Norm(config, (N, H), name=f"{name}_norm")(flat)
        return reshape(flat, (B, T, N, H), (0, 1, 2, None))

    def _sinks(self) -> Array | None:
        if not self.config.attention_sinks:
            return None
        return self.param("sinks", nn.initializers.zeros, (self.config.num_heads,))

    def _record(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        lse: Float[Array, "B N T"],
        spec: AttentionSpec,
        probe: Probe,
    ):
        """The sites inside the softmax: scores by the definition, and probabilities
        rebuilt with the log-sum-exp of the implementation that ran."""
        probe("attn_lse", lse)
        if not probe.wants("attn_scores", "attn_probs"):
            return
        scores = attention_scores(q, k, spec)
        B, K, G, T, S = scores.shape
        scores = reshape(scores, (B, K * G, T, S), (0, 1, 3, 4))
        probe("attn_scores", scores)
        probe("attn_probs", jnp.exp(scores - lse[..., None]))

    def _output(self, z: Float[Array, "B T N H"], probe: Probe) -> Array:
        config = self.config
        shape = (config.num_heads, config.head_dim, config.model_dim)
        init = weight_init(config, shape[0] * shape[1], residual=True)
        w = self.param("o", init, shape)
        if probe.wants("head_out"):
            out = shard("batch", None, "heads", None)
            # XLA:CPU has no bf16 product of this form: f32, of the rounded numbers.
            z32, w32 = (x.astype(z.dtype).astype(jnp.float32) for x in (z, w))
            heads = product("BTNH,NHD->BTND", z32, w32, out_sharding=out)
            probe("head_out", heads.astype(z.dtype))
        y = product("BTNH,NHD->BTD", z, w, out_sharding=shard("batch", None, None))
        if config.attention_output_bias:
            bias = self.param("o_bias", nn.initializers.zeros, shape[-1:])
            y += bias.astype(y.dtype)
        return probe("attn_out", y)


class FeedForward(nn.Module):
    """Two or, when gated, three projections around a non-linearity."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], probe: Probe) -> Float[Array, "B T D"]:
        config = self.config
        D, F = config.model_dim, config.hidden_dim
        hidden = shard("batch", None, "hidden")
        up = self._project("up", "BTD,DF->BTF", x, (D, F), hidden)
        if config.gated:
            pre = self._project("gate", "BTD,DF->BTF", x, (D, F), hidden)
            pre, up = probe("mlp_pre", pre), probe("mlp_gate", up)
        else:
            pre, up = probe("mlp_pre", up), None
        act = probe("mlp_act", activate(pre, up, config.activation))
        out = shard("batch", None, None)
        y = self._project("down", "BTF,FD->BTD", act, (F, D), out)
        return probe("mlp_out", y)

    def _project(self, name: str, equation: str, x: Array, shape, out) -> Array:
        init = weight_init(self.config, shape[0], residual=name == "down")
        w = self.param(name, init, shape)
        y = product(equation, x, w, out_sharding=out)
        if self.config.feed_forward_bias:
            bias = self.param(f"{name}_bias", nn.initializers.zeros, shape[-1:])
            y += bias.astype(y.dtype)
        return y


class MixtureOfExperts(nn.Module):
    """A router that sends each token through some of many feed-forwards."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], probe: Probe) -> Float[Array, "B T D"]:
        config = self.config
        logits = probe("router_logits", self._router(x))
        chosen = route(logits, config.experts_per_token, config.router_normalize)
        y = mixture(x, *chosen, self._matrices(), config.activation)
        return probe("mlp_out", y)

    def _router(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """In f32 whatever the compute dtype: near ties decide which experts run."""
        config = self.config
        shape = (config.model_dim, config.num_experts)
        w = self.param("router", weight_init(config, shape[0]), shape)
        logits = product(
            "BTD,DE->BTE",
            x.astype(jnp.float32),
            w,
            out_sharding=shard("batch", None, None),
            precision="highest",
        )
        if config.router_bias:
            logits += self.param("router_bias", nn.initializers.zeros, shape[-1:])
        return logits

    def _matrices(self) -> dict[str, Array]:
        """The experts' parameters, laid out as `mixture` wants them: D is whole."""
        config = self.config
        E, D, F = config.num_experts, config.model_dim, config.hidden_dim
        inward = (E, D, F), (None, None, "hidden")
        kinds = {"gate": inward} if config.gated else {}
        kinds |= {"up": inward, "down": ((E, F, D), (None, "hidden", None))}
        found = {}
        for name, (shape, axes) in kinds.items():
            init = weight_init(config, shape[1], residual=name == "down")
            found[name] = lay_out(self.param(name, init, shape), *axes)
            if config.feed_forward_bias:
                zeros = nn.initializers.zeros
                bias = self.param(f"{name}_bias", zeros, (E, shape[2]))
                found[f"{name}_bias"] = lay_out(bias, None, axes[2])
        return found


class Block(nn.Module):
    """Attention and feed-forward on the residual stream."""

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
        config = self.config
        placement = config.norm_placement
        attend = Attention(config, self.kind, name="attn")
        if config.num_experts:
            feed_forward = MixtureOfExperts(config, name="moe")
        else:
            feed_forward = FeedForward(config, name="mlp")

        def norm(name: str, x: Array, site: str | None = None) -> Array:
            module = Norm(config, (config.model_dim,), name=f"{name}_norm")
            return module(x) if site is None else module(x, probe, site)

        x = probe("resid_pre", x)
        h = norm("attn", x, "attn_norm_scale") if placement in ("pre", "both") else x
        h, cache = attend(probe("attn_in", h), context, cache, probe)
        if placement in ("output", "both"):
            h = norm("attn_output", h)
        h = probe("attn_out_post", h)
        middle = x + h
        if placement == "post":
            middle = norm("attn", middle, "attn_norm_scale")
        middle = probe("resid_mid", middle)

        source = x if config.parallel_block else middle
        h = source
        if placement in ("pre", "both"):
            h = norm("mlp", source, "mlp_norm_scale")
        h = feed_forward(probe("mlp_in", h), probe)
        if placement in ("output", "both"):
            h = norm("mlp_output", h)
        h = probe("mlp_out_post", h)
        x = middle + h
        if placement == "post":
            x = norm("mlp", x, "mlp_norm_scale")
        return probe("resid_post", x), cache
