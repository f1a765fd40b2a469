"""Changing the model while it runs: what each edit does, and in every way to run it."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from marks_case import slow_but
from model_case import ids, make, small
from test_probe import T, everything, model, sites

import jaxlm
from jaxlm.model.initialization import init_cache
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit, check_hits
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.tree import unstack

B = 2
LAYER, POSITION = 1, 6
# `test_probe.py` reads the sites of the others.
EVERYWHERE = slow_but(["plain"], ["plain", "groups", "parallel", "experts"])
EVERYWHERE += [
    pytest.param(name, marks=pytest.mark.nightly)
    for name in ("learned", "output", "post", "post after")
]
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def editable(config):
    return [site for site in sites(config) if SITES[site].edit_instead is None]


@lru_cache
def adding(name):
    """All sites with an `add`, at one layer and position, in one program.

    Returns a function of the amount for each site: (logits, trace, hits).
    """
    config, params = model(name)
    chosen = [site for site in editable(config) if site != "tokens"]

    @jax.jit
    def run(params, amounts):
        edits = tuple(
            Edit(
                site,
                "add",
                amounts[site],
                layer=None if SITES[site].outside_layers else LAYER,
                position=POSITION,
            )
            for site in chosen
        )
        taps = tuple(Tap(site) for site in chosen)
        out = forward(config, params, ids(B, T), taps=taps, edits=edits)
        return out.logits, out.trace, out.hits

    def call(**amounts):
        zeros = dict.fromkeys(chosen, jnp.float32(0))
        given = {site: jnp.float32(x) for site, x in amounts.items()}
        return run(params, zeros | given)

    return chosen, call


def unseen(config, site):
    """Whether nothing follows from one number that is added to all of a site."""
    if site in ("attn_scores", "router_logits"):  # a softmax takes it away
        return True
    if config.norm == "layer" and SITES[site].shape == "B T D":  # and so the mean
        return True
    # A factor is taken away by the norm that follows.
    after_attention = config.norm_placement in ("both", "output")
    last = config.norm_placement == "post" and config.num_layers - 1 == LAYER
    return {"attn_lse": after_attention, "mlp_norm_div": last}.get(site, False)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_site_changes_what_follows(name):
    """And nothing before it; and the trace has the edited value."""
    chosen, call = adding(name)
    clean, traced, hits = call()
    assert [int(n) for n in hits] == [B] * len(chosen)
    np.testing.assert_allclose(clean, everything(name)[3], **TOLERANCE)
    for site in chosen:
        logits, trace, _ = call(**{site: 0.5})
        change = np.abs(logits - clean).max(axis=(0, 2))
        assert not change[:POSITION].any(), site
        if not unseen(model(name)[0], site):
            assert change[POSITION] > 1e-3, site
        axis = SITES[site].axis("T")
        old, new = np.asarray(traced[site]), np.asarray(trace[site])
        if not SITES[site].outside_layers:
            np.testing.assert_allclose(new[0], old[0], atol=1e-5)
            old, new = old[LAYER], new[LAYER]
        wanted = np.take(old, POSITION, axis)
        np.testing.assert_allclose(
            np.take(new, POSITION, axis), wanted + 0.5, **TOLERANCE
        )


def edited(name, *edits, taps=(), way=None, params=None, tokens=None):
    config, own = model(name)
    config = dataclasses.replace(config, **(way or {}))
    tokens = ids(B, T) if tokens is None else tokens
    return jax.jit(lambda p, e: forward(config, p, tokens, taps=taps, edits=e))(
        own if params is None else params, edits
    )


@pytest.mark.slow
def test_the_tokens_and_the_residual_stream_of_another_text():
    """All of the stream set to that of another text gives the logits of that text."""
    config, params = model("plain")
    other = ids(B, T, seed=5)
    right = jax.jit(lambda p: forward(config, p, other, taps=(Tap("resid_pre"),)))(
        params
    )
    stream = Edit("resid_pre", "set", right.trace["resid_pre"], layer=2)
    np.testing.assert_allclose(
        edited("plain", stream).logits, right.logits, **TOLERANCE
    )
    tokens = Edit("tokens", "set", other)
    np.testing.assert_array_equal(edited("plain", tokens).logits, right.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "parallel"])
def test_a_head_without_output_is_a_head_without_weights(name):
    _, params = model(name)
    attn = params["layers"]["attn"]
    o = attn["o"].at[LAYER, jnp.array([1, 4])].set(0.0)
    without = {**params, "layers": {**params["layers"], "attn": {**attn, "o": o}}}
    right = edited(name, params=without).logits
    ours = edited(name, Edit("z", "scale", 0.0, layer=LAYER, head=[1, 4])).logits
    np.testing.assert_allclose(ours, right, **TOLERANCE)


@pytest.mark.slow
def test_edits_of_attention():
    """Probabilities times values, by hand; what is tapped is what was computed."""
    config, _, clean, _ = everything("groups")
    taps = (Tap("z"), Tap("v"), Tap("attn_probs"), Tap("attn_scores"), Tap("attn_lse"))
    repeat = config.num_heads // config.num_kv_heads

    def product(trace):
        v = np.repeat(trace["v"], repeat, axis=3)
        return np.einsum("LBNTS,LBSNH->LBTNH", trace["attn_probs"], v)

    even = jnp.tril(jnp.ones((T, T))) / jnp.arange(1, T + 1)[:, None]
    out = edited("groups", Edit("attn_probs", "set", even, layer=1, head=2), taps=taps)
    np.testing.assert_allclose(
        out.trace["attn_probs"][1, :, 2], even[None].repeat(B, 0)
    )
    np.testing.assert_allclose(product(out.trace), out.trace["z"], **TOLERANCE)
    others = np.arange(config.num_heads) != 2
    np.testing.assert_allclose(
        out.trace["attn_probs"][1][:, others],
        clean["attn_probs"][1][:, others],
        atol=1e-5,
    )
    # One key hidden from one query of all heads.
    hidden = jnp.zeros((T, T)).at[7, 6].set(-1e30)
    scores = Edit("attn_scores", "add", hidden, layer=0, position=7)
    out = edited("groups", scores, taps=taps)
    probs = clean["attn_probs"][0, :, :, 7]
    sink = 1 - probs.sum(-1)
    without = probs.at[..., 6].set(0.0)
    right = without / (without.sum(-1) + sink)[..., None]
    np.testing.assert_allclose(out.trace["attn_probs"][0, :, :, 7], right, atol=1e-5)
    np.testing.assert_allclose(product(out.trace), out.trace["z"], **TOLERANCE)
    half = edited("groups", Edit("attn_lse", "add", np.log(2), layer=0), taps=taps)
    np.testing.assert_allclose(half.trace["z"][0], clean["z"][0] / 2, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "parallel"])
def test_norms_divide_by_the_edited_divisor(name):
    taps = (Tap("attn_in"), Tap("attn_norm_div"), Tap("mlp_norm_div"), Tap("mlp_in"))
    _, _, clean, logits = everything(name)
    edits = (
        Edit("attn_norm_div", "scale", 2.0, layer=LAYER),
        Edit("final_norm_div", "scale", 0.25),
    )
    out = edited(name, *edits, taps=(*taps, Tap("final_norm_div"), Tap("final_norm")))
    bias = model(name)[1]["layers"]["attn_norm"].get("bias", jnp.zeros((3, 1)))[LAYER]
    right = (clean["attn_in"][LAYER] - bias) / 2 + bias
    np.testing.assert_allclose(out.trace["attn_in"][LAYER], right, **TOLERANCE)
    right = clean["attn_norm_div"][LAYER] * 2
    np.testing.assert_allclose(out.trace["attn_norm_div"][LAYER], right, rtol=1e-5)
    last = edited(name, edits[1]).logits
    np.testing.assert_allclose(last, logits * 4, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "op, value, wanted",
    [
        ("set", 2.0, lambda x, _: np.full_like(x, 2.0)),
        ("add", "v", lambda x, v: x + v),
        ("scale", np.array([[[0.0]], [[2.0]]]), lambda x, _: x * [[[0.0]], [[2.0]]]),
        ("project_out", "v", lambda x, v: x - (x @ v)[..., None] * v / (v @ v)),
        ("freeze", None, lambda x, _: x),
        ("call", jnp.tanh, lambda x, _: np.tanh(x)),
        ("call", "add v", lambda x, v: x + v),
    ],
)
def test_operations(op, value, wanted):
    v = np.random.default_rng(3).normal(size=24).astype(np.float32)
    if isinstance(value, str):
        value = v if value == "v" else jax.tree_util.Partial(jnp.add, jnp.asarray(v))
    x = np.asarray(everything("plain")[2]["mlp_out"][LAYER])
    out = edited(
        "plain", Edit("mlp_out", op, value, layer=LAYER), taps=(Tap("mlp_out"),)
    )
    np.testing.assert_allclose(out.trace["mlp_out"][LAYER], wanted(x, v), **TOLERANCE)


def test_edits_of_one_site_follow_each_other():
    edits = (Edit("mlp_out", "add", 1.0), Edit("mlp_out", "scale", 2.0, layer=0))
    x = everything("plain")[2]["mlp_out"][0]
    out = edited("plain", *edits, taps=(Tap("mlp_out", layers=(0,)),))
    np.testing.assert_allclose(out.trace["mlp_out"][0], (x + 1) * 2, **TOLERANCE)


SEVERAL = (
    Edit("resid_pre", "add", 0.5, layer=3, position=[2, 8]),
    Edit("z", "scale", 0.0, layer=[0, 4], head=1),
    Edit("k_rot", "scale", 2.0, layer=2, position=3),
    Edit("attn_scores", "scale", 0.5, layer=1),
    Edit("mlp_norm_div", "scale", 1.5, layer=4, position=9),
)


@lru_cache
def several():
    return edited("groups", *SEVERAL)


# A loop over unstacked layers, and two ways of the config.
WAYS = [{"remat": "full"}, "loop", {"unroll_layers": 0}]


@pytest.mark.parametrize("way", slow_but(WAYS[:1], WAYS))
def test_however_layers_are_run(way):
    params = None
    if way == "loop":
        config, params = model("groups")
        params = {**params, "layers": unstack(params["layers"], config.num_layers)}
        way = {}
    out = edited("groups", *SEVERAL, way=way, params=params)
    np.testing.assert_allclose(out.logits, several().logits, **TOLERANCE)
    assert [int(n) for n in out.hits] == [int(n) for n in several().hits]


@pytest.mark.slow
def test_positions_mean_the_same_with_a_cache():
    config, params = model("groups")

    @jax.jit
    def twice(params, edits):
        cache = init_cache(config, B, 16, jnp.float32)
        tokens = ids(B, T)
        first = forward(config, params, tokens[:, :6], cache=cache, edits=edits)
        rest = tokens[:, 6:]
        second = forward(config, params, rest, cache=first.cache, edits=edits)
        return jnp.concatenate([first.logits, second.logits], axis=1)

    np.testing.assert_allclose(twice(params, SEVERAL), several().logits, **TOLERANCE)


def test_a_sweep_is_one_program_and_equals_single_calls(compilations):
    config, params = model("plain")
    v = jnp.ones((24,))

    def logits(params, v, layer, position):
        edit = Edit("resid_pre", "add", v, layer=layer, position=position)
        out = forward(config, params, ids(B, T), edits=(edit,))
        return out.logits, out.hits

    grid = jnp.array([[0, 0], [1, 3], [2, 10], [0, 11]])
    over_cells = jax.vmap(logits, in_axes=(None, None, 0, 0))
    swept, hits = jax.jit(over_cells)(params, v, *grid.T)
    one = jax.jit(logits)
    compilations.clear()
    for i, cell in enumerate(grid):
        single, _ = one(params, v, *cell)
        np.testing.assert_allclose(swept[i], single, **TOLERANCE)
    assert compilations.count("logits") <= 1
    np.testing.assert_array_equal(hits[0], [B, B, B, 0])
    with pytest.raises(ValueError, match="'resid_pre' has changed nothing"):
        check_hits((Edit("resid_pre", "add", v),), hits)


@pytest.mark.slow
def test_gradients_of_a_value_are_those_of_finite_differences():
    config, params = model("groups")
    v = jax.random.normal(jax.random.key(2), (8,)) * 0.1

    @jax.jit
    @jax.value_and_grad
    def score(v):
        edit = Edit("z", "add", v, layer=1, position=4, head=3)
        out = forward(config, params, ids(B, T), edits=(edit,))
        return jnp.mean(jnp.square(out.logits))

    direction = np.random.default_rng(0).normal(size=8).astype(np.float32)
    step = 1e-2
    up, down = score(v + step * direction)[0], score(v - step * direction)[0]
    wanted = (up - down) / (2 * step)
    assert float(score(v)[1] @ direction) == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.slow
def test_what_is_frozen_has_no_gradient():
    """With probabilities and divisors frozen, attention is linear in its values."""
    config, params = model("plain")
    taps = (Tap("resid_mid", layers=(0,)),)
    rng = np.random.default_rng(2)
    v, c = rng.normal(size=(2, T, 24)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(v, edits):
        edits = (Edit("embed", "add", v), *edits)
        out = forward(config, params, ids(B, T), taps=taps, edits=edits)
        return jnp.sum(out.trace["resid_mid"][0] * c)

    # By hand: how the linear map with the clean probabilities and divisors changes.
    trace, layers = everything("plain")[2], params["layers"]
    h = v / trace["attn_norm_div"][0] * layers["attn_norm"]["scale"][0]
    values = np.einsum("BTD,DKH->BTKH", h, layers["attn"]["v"][0])
    z = np.einsum("BNTS,BSNH->BTNH", trace["attn_probs"][0], values.repeat(2, axis=2))
    change = v + np.einsum("BTNH,NHD->BTD", z, layers["attn"]["o"][0])
    wanted = float(np.sum(change * c))
    frozen = (Edit("attn_probs", "freeze"), Edit("attn_norm_div", "freeze"))
    ours = [
        float(jnp.sum(gradient(jnp.zeros_like(v), edits) * v))
        for edits in (frozen, frozen[:1], frozen[1:])
    ]
    assert ours[0] == pytest.approx(wanted, rel=1e-4)
    assert all(abs(x - wanted) > 0.01 * abs(wanted) for x in ours[1:])


def test_edits_in_bfloat16_keep_the_dtype():
    config, params = make(small(num_layers=2))
    config = dataclasses.replace(config, dtype="bfloat16")
    edits = (
        Edit("resid_pre", "project_out", jnp.ones(24), layer=1),
        Edit("q", "add", np.float32(0.5)),
        Edit("attn_probs", "scale", 0.5),
        Edit("final_norm_div", "scale", 2.0),
    )
    out = jax.jit(lambda p: forward(config, p, ids(B, T), edits=edits))(params)
    assert out.hidden_states.dtype == jnp.bfloat16
    assert np.isfinite(out.logits).all()


V = np.ones(24, np.float32)
WRONG = {
    "Edit('z', 'add', 1.0)": "give a tuple of edits",
    "(Tap('z'),)": "which is no Edit",
    "(Edit('zz', 'add', 1.0),)": "no site 'zz' in this model (did you mean 'z'?)",
    "(Edit('router_logits', 'add', 1.0),)": "no site 'router_logits' in this model",
    "(Edit('head_out', 'scale', 0.0),)": "it is computed aside, so nothing would follow from an edit; edit 'z'",
    "(Edit('z', 'ad', 1.0),)": "no operation 'ad' (did you mean 'add'?)",
    "(Edit('z', 'add'),)": "'add' needs a value",
    "(Edit('z', 'add', 1.0, reads='q'),)": "only 'call' reads another site",
    "(Edit('z', 'call', abs, reads='logits'),)": "'logits' is not read in the same",
    "(Edit('z', 'call', abs, reads='mlp_in'),)": "'mlp_in' is not computed before it",
    "(Edit('z', 'freeze', 1.0),)": "'freeze' takes no value",
    "(Edit('z', 'add', jnp.tanh),)": "the value of 'add' is an array or a number",
    "(Edit('z', 'call', 1.0),)": "the value of 'call' is a function",
    "(Edit('tokens', 'add', 1),)": "ids can be set, and have no 'add'",
    "(Edit('tokens', 'set', -1),)": "the value has the id -1: ids are 0 to ",
    "(Edit('tokens', 'set', [10**6], position=0),)": "the value has the id 1000000: ids are ",
    "(Edit('tokens', 'set', 1.5),)": "the value is of float64: ids are integers",
    "(Edit('logits', 'add', 1.0, layer=1),)": "it lies outside the layers: no layer=",
    "(Edit('resid_pre', 'add', 1.0, head=1),)": "[B T D] has no heads: no head=",
    "(Edit('z', 'add', 1.0, layer=3),)": "layer 3 is not among 0 to 2",
    "(Edit('z', 'add', 1.0, layer=0.5),)": "layer is 0.5: give integers",
    "(Edit('z', 'add', 1.0, position=-1),)": "position -1 is not among 0 to 63",
    "(Edit('z', 'add', 1.0, head=6),)": "head 6 is not among 0 to 5",
    "(Edit('v', 'add', 1.0, head=3),)": "head 3 is not among 0 to 2",
    "(Edit('z', 'add', 1.0, head=[[0]]),)": "head has 2 axes: give a vector",
    "(Edit('z', 'add', V),)": "value has shape (24,), which does not broadcast to (2, 11, 6, 8), the site's [B T N H]",
    "(Edit('resid_pre', 'add', np.ones((2, 1, 1, 24))),)": "and 3 layers need an entry each",
    "(Edit('resid_pre', 'call', lambda x: x[0, :3]),)": "edit of 'resid_pre': result has shape (3, 24), which does not broadcast",
    "(Edit('z', 'add', 1.0, position=11),)": "edit of 'z' has changed nothing: position 11 did not occur in this call",
}


@pytest.mark.parametrize("edits", WRONG)
def test_wrong_edits_are_answered_in_one_line(edits, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config, params = model("plain")
    with pytest.raises(ValueError) as error:
        forward(config, params, ids(B, T), edits=eval(edits))
    assert WRONG[edits] in str(error.value)
    assert "\n" not in str(error.value)


def test_edits_of_logits_need_the_head():
    config, params = model("plain")
    edit = Edit("logits", "add", 1.0)
    with pytest.raises(ValueError, match="'logits' cannot be edited with head=False"):
        forward(config, params, ids(B, T), edits=(edit,), head=False)


def test_a_block_of_ones_own_must_call_an_edited_site_once():
    config, params = model("plain")

    class Twice(jaxlm.Block):
        def __call__(self, x, context, cache, probe):
            return probe("resid_post", probe("resid_post", x)), cache

    for site, message in (
        ("z", "does not record 'z', which is edited"),
        ("resid_post", "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            edits = (Edit(site, "scale", 2.0),)
            forward(config, params, ids(B, T), edits=edits, block=Twice)
