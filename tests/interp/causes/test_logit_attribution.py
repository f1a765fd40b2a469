"""The parts of a logit sum to the logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, make, small
from ops_case import normal

from jaxlm import tree
from jaxlm.interp.causes.logit_attribution import (
    attribution_taps,
    head_attribution,
    key_attribution,
    logit_attribution,
    logit_direction,
    unit_attribution,
)
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap

MODELS = {
    "plain": small(),
    "untied, both norms": small(
        tied_embeddings=False,
        norm="rms_unit_offset",
        norm_placement="both",
        embedding_scale=2.0,
    ),
    "layer norm, parallel, biases": small(
        norm="layer",
        norm_bias=True,
        position="learned",
        parallel_block=True,
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
    ),
    "experts": small(num_experts=4, experts_per_token=2),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "experts" else [])
        for name in MODELS
    ],
)
def test_the_parts_sum_to_the_logit(name):
    config, params = make(MODELS[name])
    # `init` makes biases 0 and gains 1.
    params = tree.map_with_name(
        lambda name, x: (
            x + 0.3 * normal(7, *x.shape) if name.endswith(("bias", "scale")) else x
        ),
        params,
    )
    heads = config.norm_placement == "pre"
    units = heads and not config.num_experts
    of_heads = tuple(Tap(site) for site in ("head_out", "attn_probs", "v"))
    taps = (*attribution_taps(config), *(of_heads if heads else ()))
    taps += (Tap("mlp_act"),) if units else ()

    @jax.jit
    def run(params):
        out = forward(config, params, ids(2, 7), taps=taps)
        direction = logit_direction(config, params, 5, against=9)
        parts = logit_attribution(config, params, out.trace, direction)
        by_head = by_key = by_unit = None
        if heads:
            by_head = head_attribution(config, params, out.trace, direction)
            by_key = key_attribution(config, params, out.trace, direction)
        if units:
            by_unit = unit_attribution(config, params, out.trace, direction)
        return out.logits, parts, by_head, by_key, by_unit

    logits, parts, by_head, by_key, by_unit = run(params)
    wanted = logits[..., 5] - logits[..., 9]
    scale = max(np.abs(x).max() for x in parts)
    assert np.abs(parts.total - wanted).max() <= 5e-6 * scale
    if by_head is None:
        return
    assert not np.triu(by_key, 1).any()  # of keys that come later
    of_keys = np.moveaxis(by_key.sum(-1), 2, 3)
    assert np.abs(of_keys - by_head).max() <= 5e-6 * scale
    if units:
        rest = np.asarray(parts.feed_forward - by_unit.sum(-1))
        is_bias = np.abs(rest).max() > 1e-3
        assert is_bias == config.feed_forward_bias
        if not is_bias:
            assert np.abs(rest).max() <= 5e-6 * scale
    # What is left is the bias of the output projection: the same for all tokens, but
    # for the divisor.
    rest = np.asarray(parts.attention - by_head.sum(-1))
    if config.attention_output_bias:
        assert np.abs(rest).max() > 1e-3
    else:
        assert np.abs(rest).max() <= 5e-6 * scale


def test_a_model_that_is_no_sum_is_refused():
    with pytest.raises(ValueError, match="norms after the sum"):
        attribution_taps(small(norm_placement="post"))
    config, params = make(MODELS["untied, both norms"])
    with pytest.raises(ValueError, match="a norm after attention"):
        head_attribution(config, params, {}, logit_direction(config, params, 1))
    with pytest.raises(ValueError, match="a norm after the feed-forward"):
        unit_attribution(config, params, {}, logit_direction(config, params, 1))
    with pytest.raises(ValueError, match="units of experts have no site"):
        unit_attribution(MODELS["experts"], params, {}, jnp.ones(24))
