"""Reading the model: sites, selections, errors, identities, and what it costs."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, make, quick_jit, small

from jaxlm.model.kv_cache import init_cache, unstack
from jaxlm.model.transformer import absent_sites, features, forward, unembed
from jaxlm.ops.probe import SITES, Probe, Tap

B, T = 2, 11
CONFIGS = {
    "plain": small(num_layers=3),
    # 5 layers in groups of 2: one is left over. Norms on both sides, caps, a window.
    "groups": small(
        num_layers=5,
        layer_pattern=("local", "global"),
        window=4,
        norm="rms_unit_offset",
        norm_placement="both",
        qk_norm="head",
        attention_soft_cap=5.0,
        attention_sinks=True,
        final_soft_cap=10.0,
    ),
    "parallel": small(
        num_layers=2,
        parallel_block=True,
        gated=False,
        activation="gelu",
        norm="layer",
        norm_bias=True,
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
    ),
    "output": small(num_layers=2, norm_placement="output", qk_norm="full"),
    "post": small(num_layers=2, norm_placement="post", norm="layer", final_norm=False),
    "experts": small(num_layers=2, num_experts=5, experts_per_token=2),
}


def sites(config):
    return [site for site in SITES if site not in absent_sites(config)]


def inner(site):
    return not SITES[site][1].startswith("*")


@lru_cache
def model(name, **changes):
    return make(dataclasses.replace(CONFIGS[name], **changes))


def run(config, params, taps, **given):
    return quick_jit(lambda p, x: forward(config, p, x, taps=taps, **given))(
        params, ids(B, T)
    )


@lru_cache
def everything(name):
    """(config, params, trace of all sites and all layers, logits)."""
    config, params = model(name)
    out = run(config, params, tuple(Tap(site) for site in sites(config)))
    return config, params, out.trace, out.logits


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "plain" else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_every_site_has_the_documented_shape(name):
    c, _, trace, logits = everything(name)
    assert set(trace) == set(sites(c))
    letters = dict(B=B, T=T, S=T, D=c.model_dim, N=c.num_heads, K=c.num_kv_heads)
    letters |= dict(H=c.head_dim, F=c.hidden_dim, V=c.vocab_size) | {"1": 1}
    letters["E"] = c.num_experts
    for site, value in trace.items():
        shape = tuple(letters[letter] for letter in SITES[site][0].split())
        assert value.shape == ((c.num_layers, *shape) if inner(site) else shape), site
    np.testing.assert_array_equal(trace["logits"], logits)
    np.testing.assert_array_equal(trace["tokens"], ids(B, T))


@pytest.mark.parametrize("name", CONFIGS)
def test_identities(name):
    """What each site is said to be, checked from the others."""
    c, params, trace, _ = everything(name)
    G = c.num_heads // c.num_kv_heads
    near = dict(atol=2e-5 * float(jnp.abs(trace["resid_post"]).max()))
    v = np.repeat(trace["v"], G, axis=3)
    z = np.einsum("LBNTS,LBSNH->LBTNH", trace["attn_probs"], v)
    np.testing.assert_allclose(z, trace["z"], **near)
    heads = np.sum(trace["head_out"], axis=3)
    if c.attention_output_bias:
        heads = heads + params["layers"]["attn"]["o_bias"][:, None, None]
    np.testing.assert_allclose(heads, trace["attn_out"], **near)
    if c.norm_placement != "post":
        middle = trace["resid_pre"] + trace["attn_out_post"]
        np.testing.assert_allclose(middle, trace["resid_mid"], **near)
        np.testing.assert_allclose(
            middle + trace["mlp_out_post"], trace["resid_post"], **near
        )
    np.testing.assert_array_equal(trace["resid_pre"][1:], trace["resid_post"][:-1])
    np.testing.assert_array_equal(trace["resid_pre"][0], trace["embed"])
    probs = np.exp(trace["attn_scores"] - trace["attn_lse"][..., None])
    np.testing.assert_allclose(probs, trace["attn_probs"], atol=1e-6)
    rows = trace["attn_probs"].sum(-1)
    if c.attention_sinks:
        assert (rows < 1).all()
    else:
        np.testing.assert_allclose(rows, 1, atol=1e-5)
    if c.norm_placement in ("pre", "both"):
        x = np.float64(trace["resid_pre"])
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        right = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + c.norm_epsilon)
        np.testing.assert_allclose(trace["attn_norm_scale"], right, rtol=1e-4)
    if c.num_experts:
        router = params["layers"]["moe"]["router"]
        logits = np.einsum("LBTD,LDE->LBTE", trace["mlp_in"], router)
        np.testing.assert_allclose(logits, trace["router_logits"], **near)
    if not c.gated or c.num_experts:
        return
    act = jax.nn.silu(trace["mlp_pre"]) * trace["mlp_gate"]
    np.testing.assert_allclose(act, trace["mlp_act"], **near)


def test_the_output_is_the_last_sites():
    config, params, trace, logits = everything("plain")

    @quick_jit
    def parts(params):
        x, _, _ = features(config, params, ids(B, T))
        return x, unembed(config, params, x)

    x, ours = parts(params)
    np.testing.assert_allclose(x, trace["final_norm"], atol=1e-4)
    np.testing.assert_allclose(ours, logits, atol=1e-4)


SELECTION = (
    Tap("resid_post", layers=(4, 0, 3)),
    Tap("attn_probs", layers=(2,)),
    Tap("z"),
    Tap("logits"),
)
WAYS = {
    "scan": {},
    "unrolled": {"unroll_layers": 0},
    "remat": {"remat": "dots"},
    "layer by layer": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_are_selected_in_the_given_order(way):
    """However the layers are run, with one that fills no whole group."""
    _, params, full, _ = everything("groups")
    config = dataclasses.replace(model("groups")[0], **WAYS[way])
    if way == "layer by layer":
        params = {**params, "layers": unstack(params["layers"], config.num_layers)}
    trace = run(config, params, SELECTION).trace
    assert set(trace) == {"resid_post", "attn_probs", "z", "logits"}
    for site, layers in (("resid_post", (4, 0, 3)), ("attn_probs", (2,))):
        right = full[site][jnp.array(layers)]
        np.testing.assert_allclose(trace[site], right, atol=1e-4)
    np.testing.assert_allclose(trace["z"], full["z"], atol=1e-4)


def test_taps_with_a_cache_read_the_new_tokens():
    config, params, full, _ = everything("groups")
    taps = (Tap("resid_post", layers=(1,)), Tap("attn_probs"))

    @quick_jit
    def twice(params):
        cache = init_cache(config, B, 16, jnp.float32)
        first = forward(config, params, ids(B, T)[:, :6], cache=cache)
        return forward(config, params, ids(B, T)[:, 6:], cache=first.cache, taps=taps)

    out = twice(params)
    right = full["resid_post"][1:2, :, 6:]
    np.testing.assert_allclose(out.trace["resid_post"], right, atol=1e-4)
    probs = out.trace["attn_probs"]
    np.testing.assert_allclose(
        probs[..., :T], full["attn_probs"][..., 6:, :], atol=1e-4
    )
    assert not probs[..., T:].any()


@pytest.mark.parametrize(
    "taps, message",
    [
        ([Tap("resid_pots")], "no site 'resid_pots' .*did you mean 'resid_post'"),
        ([Tap("mlp_gate")], "no site 'mlp_gate' in this model"),
        ([Tap("router_logits")], "no site 'router_logits' in this model"),
        ([Tap("z"), Tap("z", layers=(1,))], "'z' is tapped twice"),
        ([Tap("z", layers=(2,))], "layer 2 is not among 0 to 1"),
        ([Tap("z", layers=(-1,))], "layer -1 is not among"),
        ([Tap("z", layers=())], "empty or doubled"),
        ([Tap("z", layers=(1, 1))], "empty or doubled"),
        ([Tap("embed", layers=(0,))], "outside the layers"),
    ],
)
def test_a_wrong_selection_is_an_error(taps, message):
    config, params = model("parallel")
    with pytest.raises(ValueError, match=message):
        forward(config, params, ids(B, T), taps=taps)


def test_edits_are_refused():
    config, params = model("plain")
    with pytest.raises(ValueError, match="edits"):
        forward(config, params, ids(B, T), edits=("zero",))


def cost(config, params, taps=()):
    def logits(params, x):
        out = forward(config, params, x, taps=taps)
        return out.logits, out.trace

    compiled = jax.jit(logits).lower(params, ids(B, T)).compile()
    analysis = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    return analysis["flops"], memory.temp_size_in_bytes


@pytest.mark.parametrize(
    "name", ["plain", pytest.param("groups", marks=pytest.mark.slow)]
)
def test_nothing_tapped_costs_nothing(name, monkeypatch):
    """The same program as of a model whose probe does nothing at all."""
    config, params = model(name)
    ours = cost(config, params)
    if name == "plain":
        assert cost(config, params, (Tap("attn_probs"),)) != ours
    monkeypatch.setattr(Probe, "__call__", lambda self, site, x: x)
    monkeypatch.setattr(Probe, "wants", lambda self, *sites: False)
    assert cost(config, params) == ours


def test_gradients_flow_through_a_trace():
    """A function of tapped values is differentiable, e.g. an activation's norm."""
    config, params = model("plain")

    def norm(params):
        out = forward(config, params, ids(B, T), taps=(Tap("z", layers=(1,)),))
        return jnp.sum(jnp.square(out.trace["z"]))

    grads = quick_jit(jax.grad(norm))(params)["layers"]["attn"]["v"]
    # Layer 2 comes after what was read.
    assert jnp.abs(grads[0]).max() > 0 and jnp.abs(grads[1]).max() > 0
    assert not grads[2].any()
    assert np.isfinite(grads).all()
