"""Reading the model: sites, selections, errors, identities, and what it costs."""

import dataclasses
import re
from functools import lru_cache, partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks_case import slow_but
from model_case import ids, make, small

from jaxlm.model import layer_stack, recording
from jaxlm.model.initialization import init, init_cache
from jaxlm.model.layer_stack import ModelPart
from jaxlm.model.positions import make_context
from jaxlm.model.recording import start_recording, trace_bytes
from jaxlm.model.trace import absent_sites
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.experts.moe import route
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Largest, Tap
from jaxlm.tree import unstack

B, T = 2, 11
CONFIGS = {
    "plain": small(num_layers=3),
    "learned": small(num_layers=2, position="learned", embedding_scale=3.0),
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
    "post after": small(num_layers=2, norm_placement="post"),
    "experts": small(num_layers=2, num_experts=5, experts_per_token=2),
}


def sites(config):
    return [site for site in SITES if site not in absent_sites(config)]


def inner(site):
    return not SITES[site].outside_layers


@lru_cache
def model(name, **changes):
    return make(dataclasses.replace(CONFIGS[name], **changes))


def run(config, params, taps, **given):
    return jax.jit(lambda p, x: forward(config, p, x, taps=taps, **given))(
        params, ids(B, T)
    )


@lru_cache
def everything(name):
    """(config, params, trace of all sites and all layers, logits)."""
    config, params = model(name)
    out = run(config, params, tuple(Tap(site) for site in sites(config)))
    return config, params, out.trace, out.logits


@pytest.mark.parametrize("name", slow_but(["plain"], CONFIGS))
def test_every_site_has_the_documented_shape(name):
    c, _, trace, logits = everything(name)
    assert set(trace) == set(sites(c))
    letters = dict(B=B, T=T, S=T, D=c.model_dim, N=c.num_heads, K=c.num_kv_heads)
    letters |= dict(H=c.head_dim, F=c.hidden_dim, V=c.vocab_size) | {"1": 1}
    letters |= dict(E=c.num_experts, k=c.experts_per_token)
    for site, value in trace.items():
        shape = tuple(letters[letter] for letter in SITES[site].shape.split())
        assert value.shape == ((c.num_layers, *shape) if inner(site) else shape), site
    np.testing.assert_array_equal(trace["logits"], logits)
    np.testing.assert_array_equal(trace["tokens"], ids(B, T))


@pytest.mark.parametrize("name", slow_but(["groups"], CONFIGS))
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
        if not c.parallel_block:
            np.testing.assert_allclose(middle, trace["resid_mid"], **near)
        np.testing.assert_allclose(
            middle + trace["mlp_out_post"], trace["resid_post"], **near
        )
    np.testing.assert_array_equal(trace["resid_pre"][1:], trace["resid_post"][:-1])
    embedded = trace["embed"] + trace.get("pos_embed", 0.0)
    np.testing.assert_array_equal(trace["resid_pre"][0], embedded)
    probs = np.exp(trace["attn_scores"] - trace["attn_lse"][..., None])
    np.testing.assert_allclose(probs, trace["attn_probs"], atol=1e-6)
    rows = trace["attn_probs"].sum(-1)
    if c.attention_sinks:
        assert (rows < 1).all()
    else:
        np.testing.assert_allclose(rows, 1, atol=1e-5)
    if c.norm_placement in ("pre", "both") and c.final_norm:
        gains = params["layers"]
        mid = "resid_pre" if c.parallel_block else "resid_mid"
        check_norm(
            c, trace, "resid_pre", "attn_norm_div", "attn_in", gains["attn_norm"]
        )
        check_norm(c, trace, mid, "mlp_norm_div", "mlp_in", gains["mlp_norm"])
        last = {**trace, "last": trace["resid_post"][-1]}
        gain = params["final_norm"]
        check_norm(c, last, "last", "final_norm_div", "final_norm", gain)
    if c.num_experts:
        weights, experts = route(trace["router_logits"], c.experts_per_token, True)
        np.testing.assert_array_equal(trace["expert_ids"], experts)
        np.testing.assert_allclose(trace["expert_weights"], weights, atol=1e-6)
        router = params["layers"]["moe"]["router"]
        logits = np.einsum("LBTD,LDE->LBTE", trace["mlp_in"], router)
        np.testing.assert_allclose(logits, trace["router_logits"], **near)
    if not c.gated or c.num_experts:
        return
    act = jax.nn.silu(trace["mlp_pre"]) * trace["mlp_up"]
    np.testing.assert_allclose(act, trace["mlp_act"], **near)


def check_norm(config, trace, x, div, normed, gain):
    """`normed = x / div * gain`, plus a bias, for a norm of each layer or the last."""
    x, div = np.float64(trace[x]), np.float64(trace[div])
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    right = np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(div, right, rtol=1e-4)
    scale, bias = (np.asarray(gain.get(part, 0.0)) for part in ("scale", "bias"))
    if scale.ndim == 2:
        scale, bias = scale[:, None, None], bias[:, None, None] if bias.ndim else bias
    factor = scale + (config.norm == "rms_unit_offset")
    right = x / div * factor + bias
    np.testing.assert_allclose(trace[normed], right, atol=1e-4 * np.abs(right).max())


@pytest.mark.parametrize("div", ["attn_norm_div", "mlp_norm_div", "final_norm_div"])
def test_divisors_of_norms_after_the_sum(div):
    """With norms after the sum a divisor is that of the sum, which has no site."""
    config, _, trace, _ = everything("post after")
    attn = trace["resid_pre"] + trace["attn_out_post"]
    mlp = trace["resid_mid"] + trace["mlp_out_post"]
    x = {"attn_norm_div": attn, "mlp_norm_div": mlp}
    x["final_norm_div"] = trace["resid_post"][-1]
    x = np.float64(x[div])
    right = np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(trace[div], right, rtol=1e-4)


def test_the_output_is_the_last_sites():
    config, params, trace, logits = everything("plain")

    @jax.jit
    def parts(params):
        out = forward(config, params, ids(B, T), head=False)
        assert out.logits is None
        return out.hidden_states, unembed(config, params, out.hidden_states)

    x, ours = parts(params)
    np.testing.assert_allclose(x, trace["final_norm"], atol=1e-4)
    np.testing.assert_allclose(ours, logits, atol=1e-4)


def test_logits_without_the_head_are_an_error():
    config, params = model("plain")
    with pytest.raises(ValueError, match="'logits' cannot be tapped with head=False"):
        forward(config, params, ids(B, T), taps=(Tap("logits"),), head=False)


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


@pytest.mark.parametrize("way", slow_but(["scan", "remat", "layer by layer"], WAYS))
def test_layers_are_selected_in_the_given_order(way):
    """However the layers are run, with one that fills no whole group."""
    _, params, full, _ = everything("groups")
    config = dataclasses.replace(model("groups")[0], **WAYS[way])
    if way == "layer by layer":
        params = {**params, "layers": unstack(params["layers"], config.num_layers)}
    trace = run(config, params, SELECTION).trace
    assert set(trace) == {"resid_post", "attn_probs", "z", "logits"}
    for site, chosen in (("resid_post", (4, 0, 3)), ("attn_probs", (2,))):
        right = full[site][jnp.array(chosen)]
        np.testing.assert_allclose(trace[site], right, atol=1e-4)
    np.testing.assert_allclose(trace["z"], full["z"], atol=1e-4)


CHOSEN = (
    Tap("attn_probs", layers=(4, 1), positions=(-1, 3), heads=(5, 2)),
    Tap("attn_scores", positions=(2,)),
    Tap("head_out", layers=(0,), heads=(3,), positions=(1, 4)),
    Tap("attn_norm_div", positions=(7,)),
    Tap("v", heads=(1,), reduce="max"),
    Tap("resid_post", positions=(-1,), reduce="norm"),
    Tap("mlp_act", reduce="mean"),
    Tap("mlp_pre", (3, 1), reduce="dot", direction=np.linspace(-1, 1, 40)),
    Tap("mlp_up", (2,), positions=(4, 0), reduce="top_k", count=3),
    Tap("q_rot", heads=(4, 0), reduce="top_k", count=1),
    Tap("logits", positions=(-1,), reduce="top_k", count=5),
)


def by_hand(tap, value):
    """What a tap selects, out of the whole value with all layers."""
    letters = SITES[tap.site].shape.split()
    value = np.asarray(value)
    if inner(tap.site):
        letters = ["L", *letters]
    chosen = {"L": tap.layers, "T": tap.positions, "N": tap.heads, "K": tap.heads}
    for axis, letter in enumerate(letters):
        if chosen.get(letter) is not None:
            value = np.take(value, chosen[letter], axis)
    if tap.reduce is None:
        return value
    if tap.reduce == "dot":
        return value @ tap.direction
    if tap.reduce == "top_k":
        best = np.argsort(-value, axis=-1)[..., : tap.count]
        return Largest(np.take_along_axis(value, best, axis=-1), best)
    reducers = {"mean": np.mean, "max": np.max, "norm": np.linalg.norm}
    return reducers[tap.reduce](value, axis=-1)


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tokens_and_heads_are_selected_and_values_reduced(cached):
    config, params, full, _ = everything("groups")

    @jax.jit
    def run(params):
        cache = init_cache(config, B, T, jnp.float32) if cached else None
        return forward(config, params, ids(B, T), cache=cache, taps=CHOSEN).trace

    trace = run(params)
    for tap in CHOSEN:
        wanted = by_hand(tap, full[tap.site])
        for ours, right in zip(
            *map(jax.tree.leaves, (trace[tap.site], wanted)), strict=True
        ):
            assert ours.shape == right.shape, tap
            np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-4)


def test_what_is_selected_is_all_that_is_kept():
    config, _ = model("groups")

    tokens = ids(B, T)
    context = make_context(config, tokens)

    def slots(*taps):
        _, recorder = start_recording(
            config, tokens, context, None, taps, (), ModelPart()
        )
        return {site: x.shape for site, x in recorder.slots.items()}

    chosen = slots(Tap("z", positions=(0,), heads=(1, 2), reduce="norm"), Tap("q"))
    assert chosen == {"z": (5, B, 1, 2), "q": (5, B, T, 6, 8)}
    # Another tap needs the rest of z.
    both = slots(Tap("z", heads=(1,)), Tap("head_out", layers=(0,)))
    assert both == {"z": (5, B, T, 6, 8)}


def test_a_trace_that_does_not_fit_is_refused_and_a_cheaper_tap_named(monkeypatch):
    config, params = model("groups")
    taps = (Tap("attn_probs"), Tap("resid_post", reduce="norm"))
    needed = trace_bytes(config, ids(B, T), taps)
    # Queries, keys and log-sum-exps are recorded, and the probabilities made of them.
    per_token = 6 * 8 + 3 * 8 + 6 + 6 * T
    assert needed["attn_probs"] == 5 * B * T * per_token * 4
    assert needed["resid_post"] == 5 * B * T * 4
    monkeypatch.setattr(recording, "available_memory", lambda: 40_000)
    with pytest.raises(
        ValueError, match=r"'attn_probs'; with layers=\(4,\) that keeps"
    ):
        forward(config, params, ids(B, T), taps=taps)
    monkeypatch.setattr(recording, "available_memory", lambda: 64_000)
    run(config, params, taps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "post", "experts"])
def test_a_pass_in_two_parts_is_the_pass(name):
    """Stopped before a layer in the middle of a group, and begun again there."""
    config, params, full, logits = everything(name)
    at = config.num_layers // 2 + 1 if name == "groups" else 1
    taps = (Tap("resid_post"), Tap("z", (at,)), Tap("final_norm"))

    @jax.jit
    def twice(params, traced):
        first = forward(config, params, ids(B, T), stop=at, taps=taps[:1])
        assert first.logits is None
        rest = dict(stream=first.hidden_states)
        second = forward(config, params, ids(B, T), start=at, taps=taps, **rest)
        third = forward(config, params, ids(B, T), start=traced, **rest)
        return first.trace, second.trace, second.logits, third.logits

    before, after, second, third = twice(params, at)
    np.testing.assert_allclose(before["resid_post"], full["resid_post"][:at], atol=1e-4)
    np.testing.assert_allclose(after["resid_post"], full["resid_post"][at:], atol=1e-4)
    np.testing.assert_allclose(after["z"][0], full["z"][at], atol=1e-4)
    np.testing.assert_allclose(second, logits, atol=1e-4)
    np.testing.assert_allclose(third, logits, atol=1e-4)


STREAM = jnp.zeros((B, T, 24))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(start=1), "start is 1: give stream="),
        (dict(start=2, stream=STREAM), "start is 2: give 0 to 1"),
        (dict(stop=3), "stop is 3: give 1 to 2"),
        (dict(start=jnp.int32(1)), "a traced start needs stream="),
        (dict(stop=1, taps=(Tap("logits"),)), "'logits' cannot be tapped with stop="),
        (
            dict(stream=STREAM, taps=(Tap("embed"),)),
            "'embed' cannot be tapped with a given stream",
        ),
        (
            dict(start=1, stream=STREAM, taps=(Tap("z", (0,)),)),
            "layer 0 does not run: start is 1, stop 2",
        ),
        (
            dict(start=jnp.int32(1), stream=STREAM, taps=(Tap("z"),)),
            "'z' cannot be tapped with a traced start",
        ),
    ],
)
def test_layers_that_cannot_run(given, message):
    config, params = model("parallel")
    with pytest.raises(ValueError, match=message):
        forward(config, params, ids(B, T), **given)


def test_probabilities_need_the_keys_of_a_whole_cache():
    config, params = model("groups")
    taps = (Tap("attn_probs"),)
    cache = init_cache(config, B, 16, jnp.float32)
    for changes in ({"is_kept": False}, {"layers": quantized(cache.layers)}):
        other = dataclasses.replace(cache, **changes)
        with pytest.raises(ValueError, match="'attn_probs' is computed from the keys"):
            forward(config, params, ids(B, T), cache=other, taps=taps)


def quantized(layers):
    scales = jnp.zeros(layers.keys.shape[:-1])
    return dataclasses.replace(layers, key_scale=scales, value_scale=scales)


@pytest.mark.slow
def test_taps_with_a_cache_read_the_new_tokens():
    config, params, full, _ = everything("groups")
    taps = (Tap("resid_post", layers=(1,)), Tap("attn_probs"))

    @jax.jit
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
        ([Tap("mlp_up")], "no site 'mlp_up' in this model"),
        ([Tap("resid_mid")], "no site 'resid_mid' in this model"),
        ([Tap("pos_embed")], "no site 'pos_embed' in this model"),
        ([Tap("router_logits")], "no site 'router_logits' in this model"),
        ([Tap("z"), Tap("z", layers=(1,))], "'z' is tapped twice"),
        ([Tap("z", layers=(2,))], "layer 2 is not among 0 to 1"),
        ([Tap("z", layers=(-1,))], "layer -1 is not among"),
        ([Tap("z", layers=())], "empty or have duplicates"),
        ([Tap("z", layers=(1, 1))], "empty or have duplicates"),
        ([Tap("embed", layers=(0,))], "outside the layers"),
        ([Tap("z", heads=(6,))], "head 6 is not among 0 to 5"),
        ([Tap("k", heads=(3,))], "head 3 is not among 0 to 2"),
        ([Tap("attn_in", heads=(0,))], r"\[B T D\] has no heads"),
        ([Tap("z", positions=(11,))], "position 11 is not among -11 to 10"),
        ([Tap("z", reduce="nrm")], "no reducer 'nrm' .did you mean 'norm'"),
        ([Tap("tokens", reduce="max")], "ids are not reduced"),
        ([Tap("z", reduce="dot")], "direction is missing"),
        ([Tap("z", count=2)], "count belongs to reduce='top_k'"),
        ([Tap("z", reduce="top_k", count=9)], "count 9 is not among 1 to 8"),
        (
            [Tap("z", reduce="dot", direction=np.ones(24))],
            r"shape \(24,\), and the last axis of \[B T N H\] needs \(8,\)",
        ),
    ],
)
def test_a_wrong_selection_is_an_error(taps, message):
    config, params = model("parallel")
    with pytest.raises(ValueError, match=message):
        forward(config, params, ids(B, T), taps=taps)


SLOWER = ("groups", "experts")


class NoProbe(Probe):
    """Stands in for `Probe`, and does nothing."""

    called: ClassVar[set] = set()
    values: ClassVar[dict] = {}
    taps = edits = hits = ()

    def __init__(self, *_):
        pass

    def __call__(self, site, x):
        return x

    def __contains__(self, site):
        return False

    def is_edited(self, *sites):
        return False


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWER)]
)
def test_nothing_tapped_and_nothing_edited_is_the_same_program(name, monkeypatch):
    """The text of the optimized program is that of a model without the mechanism."""
    config, params = model(name)

    def text(taps=()):
        def logits(params, x):
            out = forward(config, params, x, taps=taps)
            return out.logits, out.trace, out.hits

        compiled = jax.jit(logits).lower(params, ids(B, T)).compile()
        # Instructions without their source lines, which name what stands in.
        lines = re.sub(r", metadata=\{[^}]*\}", "", compiled.as_text()).splitlines()
        return [line for line in lines if re.match(r"\s*(ROOT )?%|ENTRY", line)]

    ours = text()
    assert len(ours) > 100
    if name == "plain":
        assert text((Tap("z", layers=(1,)),)) != ours
    for module in (layer_stack, recording):
        monkeypatch.setattr(module, "Probe", NoProbe)
    assert text() == ours


@pytest.mark.slow
def test_a_tap_of_one_layer_computes_little():
    """And all layers of the residual stream nothing, as the compiler counts."""
    changes = dict(unroll_layers=0, num_layers=6, model_dim=96, hidden_dim=384)
    config = small(**changes, context_length=16)
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))

    def cost(*taps):
        def run(params):
            out = forward(config, params, ids(1, 16), taps=taps)
            return out.logits, out.trace

        return jax.jit(run).lower(shapes).cost_analysis()

    plain = cost()
    for site in ("attn_probs", "head_out", "mlp_norm_div", "mlp_act"):
        assert cost(Tap(site, (2,)))["flops"] <= 1.02 * plain["flops"], site
    whole = cost(Tap("resid_post"))
    assert whole["flops"] <= 1.001 * plain["flops"]


def test_gradients_flow_through_a_trace():
    """A function of tapped values is differentiable, e.g. an activation's norm."""
    config, params = model("plain")

    def norm(params):
        out = forward(config, params, ids(B, T), taps=(Tap("z", layers=(1,)),))
        return jnp.sum(jnp.square(out.trace["z"]))

    grads = jax.jit(jax.grad(norm))(params)["layers"]["attn"]["v"]
    # Layer 2 comes after what was read.
    assert jnp.abs(grads[0]).max() > 0 and jnp.abs(grads[1]).max() > 0
    assert not grads[2].any()
    assert np.isfinite(grads).all()
