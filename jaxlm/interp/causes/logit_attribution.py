"""Which parts of a model wrote a logit: direct logit attribution.

The residual stream is a sum of what the embedding, each attention and each feed-forward
have added. With the divisor of the final norm held fixed, so is each logit. Source:
Elhage et al. 2021, "A mathematical framework for transformer circuits".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.trace import absent_sites
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params, Trace


class Attribution(NamedTuple):
    """What each part adds to a logit, f32; together they are the logit.

    The soft cap of some models comes after that sum.
    """

    embedding: Float[Array, "B T"]
    """Of the token, and of learned or sinusoidal positions."""
    attention: Float[Array, "L B T"]
    feed_forward: Float[Array, "L B T"]
    bias: Float[Array, ""]
    """Of the final norm."""

    @property
    def total(self) -> Float[Array, "B T"]:
        """The sum of all parts."""
        layers = jnp.sum(self.attention + self.feed_forward, axis=0)
        return self.embedding + layers + self.bias


def attribution_taps(config: ModelConfig) -> tuple[Tap, ...]:
    """Returns the taps that `logit_attribution` needs.

    Raises:
      ValueError: for a model whose stream is no sum: with norms after it, or with no
        final norm.
    """
    if config.norm_placement == "post" or not config.final_norm:
        raise ValueError(
            "logits of a model with norms after the sum are no sum over layers: patch "
            "its activations instead"
        )
    sites = ("embed", "pos_embed", "attn_out_post", "mlp_out_post", "final_norm_div")
    return tuple(Tap(site) for site in sites if site not in absent_sites(config))


def head_rows(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """Returns the row that the head multiplies for each token's logit."""
    if config.tied_embeddings:
        return params["embed"]["table"]
    return params["lm_head"]["kernel"].T


def logit_direction(
    config: ModelConfig,
    params: Params,
    token: int | Int[Array, ""],
    against: int | Int[Array, ""] | None = None,
) -> Float[Array, " D"]:
    """Returns what the head multiplies for a token's logit, f32.

    Args:
      against: a token whose logit is subtracted.
    """
    rows = head_rows(config, params)
    direction = rows[token].astype(jnp.float32)
    return direction if against is None else direction - rows[against]


def logit_attribution(
    config: ModelConfig, params: Params, trace: Trace, direction: Float[Array, " D"]
) -> Attribution:
    """Returns what each part adds to `direction . final_norm(x)`, at every position.

    Args:
      trace: of `attribution_taps`.
      direction: of `logit_direction`, or any other.
    """
    project = _projection(config, params, trace["final_norm_div"], direction)
    embedding = trace["embed"].astype(jnp.float32) + trace.get("pos_embed", 0.0)
    bias = params["final_norm"].get("bias", jnp.zeros_like(direction))
    return Attribution(
        project(embedding),
        project(trace["attn_out_post"]),
        project(trace["mlp_out_post"]),
        bias.astype(jnp.float32) @ direction,
    )


def head_attribution(
    config: ModelConfig, params: Params, trace: Trace, direction: Float[Array, " D"]
) -> Float[Array, "L B T N"]:
    """Returns what each head adds; their sum lacks the bias of attention's output.

    Args:
      trace: of `head_out` and `final_norm_div`.

    Raises:
      ValueError: for a model that normalizes the sum of the heads.
    """
    _check_addends(config, "heads", "attention")
    div = trace["final_norm_div"][..., None]
    return _projection(config, params, div, direction)(trace["head_out"])


def key_attribution(
    config: ModelConfig, params: Params, trace: Trace, direction: Float[Array, " D"]
) -> Float[Array, "L B N T S"]:
    """Returns what each head adds by what it reads of each key: `p (v W_O . w)`.

    Over the keys they sum to `head_attribution`. Source: as the lengths of
    `value_weighted`, but along one direction (Kobayashi et al. 2020, arXiv:2004.10102).

    Args:
      trace: of `attn_probs`, `v` and `final_norm_div`, for the same queries.

    Raises:
      ValueError: for a model that normalizes the sum of the heads.
    """
    _check_addends(config, "heads", "attention")
    o = params["layers"]["attn"]["o"].astype(jnp.float32)
    into = jnp.einsum("LNHD,D->LNH", o, logit_weights(config, params, direction))
    group = config.num_heads // config.num_kv_heads
    values = jnp.repeat(trace["v"].astype(jnp.float32), group, axis=3)
    written = jnp.einsum("LBSNH,LNH->LBNS", values, into)
    divisor = trace["final_norm_div"][:, None]  # [B, 1, T, 1]
    return trace["attn_probs"] * written[:, :, :, None] / divisor


def unit_attribution(
    config: ModelConfig, params: Params, trace: Trace, direction: Float[Array, " D"]
) -> Float[Array, "L B T F"]:
    """Returns what each unit of the feed-forward adds; their sum lacks its bias.

    `act_i (w_out_i . direction)`: no [T, F, D] is formed.

    Args:
      trace: of `mlp_act` and `final_norm_div`.

    Raises:
      ValueError: for a model that normalizes the sum of the units, or has experts.
    """
    _check_addends(config, "units", "the feed-forward")
    if config.num_experts:
        raise ValueError("units of experts have no site: take logit_attribution")
    down = params["layers"]["mlp"]["down"].astype(jnp.float32)
    written = jnp.einsum("LFD,D->LF", down, logit_weights(config, params, direction))
    act = trace["mlp_act"].astype(jnp.float32)
    return act * written[:, None, None] / trace["final_norm_div"]


def _check_addends(config: ModelConfig, what: str, after: str) -> None:
    if config.norm_placement != "pre":
        raise ValueError(
            f"{what} of a model with a norm after {after} do not add to the logits"
        )


def logit_weights(
    config: ModelConfig, params: Params, direction: Float[Array, "*_ D"]
) -> Float[Array, "*_ D"]:
    """Returns w with `direction . final_norm(x) = w . x / divisor + bias`, f32."""
    return through_norm(config, params["final_norm"]["scale"], direction)


def through_norm(
    config: ModelConfig, gain: Float[Array, "*_ D"], direction: Float[Array, "*_ D"]
) -> Float[Array, "*_ D"]:
    """Returns w with `direction . norm(x) = w . x / divisor`, but for the bias, f32."""
    gain = gain.astype(jnp.float32) + (config.norm == "rms_unit_offset")
    weights = gain * direction
    if config.norm == "layer":  # which subtracts the mean
        weights = weights - jnp.mean(weights, axis=-1, keepdims=True)
    return weights


def _projection(
    config: ModelConfig,
    params: Params,
    div: Float[Array, "*B 1"],
    direction: Float[Array, " D"],
):
    """Returns the linear map from an addend of the stream to its part of the logit."""
    weights = logit_weights(config, params, direction)

    def project(x: Array) -> Array:
        return jnp.einsum("...D,D->...", x.astype(jnp.float32) / div, weights)

    return project
