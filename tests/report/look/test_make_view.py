"""The numbers of a view are those of the analyses, each in its place."""

import collections
import dataclasses
import html
import io
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from look_case import CONFIG, OTHER, PARAMS, TEXT, TOKENIZER, view
from model_case import small
from rich.console import Console
from scipy.stats import spearmanr

from jaxlm.model.params import weights
from jaxlm.model.trace import absent_sites
from jaxlm.model.transformer import forward
from jaxlm.ops.probing import sites as table
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.report.look import cause_view, make_view, readings
from jaxlm.report.look.look_page import page_text
from jaxlm.report.look.model_map import stages
from jaxlm.report.look.terminal_view import print_view

TOKENS = jnp.asarray(TOKENIZER.encode(TEXT))[None]
T, AT = TOKENS.shape[1], 6
SITES = ("attn_scores", "attn_probs", "z", "resid_pre", "mlp_act", "v")


@pytest.fixture(scope="module")
def seen():
    return view()


@pytest.fixture(scope="module")
def out():
    taps = tuple(Tap(site) for site in SITES)
    return jax.jit(partial(forward, CONFIG, taps=taps))(PARAMS, TOKENS)


def difference(logits, seen):
    ours, theirs = seen.causes.tokens
    return float(logits[0, AT, ours] - logits[0, AT, theirs])


def test_text_and_answer(seen, out):
    p = np.asarray(jax.nn.softmax(out.logits[0], axis=-1))
    for t in range(1, T):
        own = int(TOKENS[0, t])
        assert seen.text.surprise[t] == pytest.approx(-np.log(p[t - 1, own]), abs=1e-4)
        assert seen.text.rank[t] == (p[t - 1] > p[t - 1, own]).sum()
    assert np.isnan(seen.text.surprise[0]) and seen.text.rank[0] == -1
    assert seen.text.rows[7]["data"] == "73" and seen.pieces[ord("s")] == "s"
    rows = np.arange(T)[:, None]
    np.testing.assert_allclose(
        seen.answer.probabilities, p[rows, seen.answer.ids], atol=1e-6
    )
    np.testing.assert_allclose(seen.answer.entropy, -(p * np.log(p)).sum(-1), atol=1e-4)
    assert seen.position == AT and seen.text.num_prompt == 7


def test_what_can_be_chosen_from(seen, out):
    assert seen.choice.positions.tolist() == [6, 7, 8]
    np.testing.assert_allclose(seen.choice.logits, out.logits[0, 6:9], atol=1e-5)
    assert seen.choice.settings["temperature"] == 1.0 and seen.choice.steps == []


def test_streams_end_in_the_answer(seen, out):
    streams = seen.streams
    np.testing.assert_array_equal(streams.ids[-1], seen.answer.ids[:, :5])
    np.testing.assert_allclose(streams.entropy[-1], seen.answer.entropy, atol=1e-4)
    assert (streams.answer_rank[-1] == 0).all() and streams.answer_rank[:-1].any()
    lengths = np.linalg.norm(out.trace["resid_pre"][:, 0], axis=-1)
    np.testing.assert_allclose(streams.lengths[:-1], lengths, rtol=1e-5)
    cosine = np.linalg.norm(seen.additions.attention_alignment)
    assert 0 < cosine < np.sqrt(seen.additions.attention_alignment.size)


def test_heads_are_those_of_the_taps(seen, out):
    heads = seen.heads
    assert heads.heads.tolist() == [[i, n] for i in range(2) for n in range(6)]
    assert heads.windows == [None, 4] and heads.rotary_dim == 8
    probs, scores = (
        np.asarray(out.trace[f"attn_{x}"][:, 0]) for x in ("probs", "scores")
    )
    q, s = np.tril_indices(T)
    for i, (layer, head) in enumerate(heads.heads):
        kept = heads.probabilities[i].astype(np.float32)
        np.testing.assert_allclose(kept, probs[layer, head, q, s], atol=5e-4)
        seen_scores = scores[layer, head, q, s]
        alive = seen_scores > -1e29
        rebuilt = np.log(probs[layer, head, q, s][alive]) + heads.lse[i][q[alive]]
        np.testing.assert_allclose(rebuilt, seen_scores[alive], atol=1e-4)
        w = PARAMS["layers"]["attn"]["o"][layer, head]
        brought = np.linalg.norm(out.trace["v"][layer, 0, :, head // 2] @ w, axis=-1)
        np.testing.assert_allclose(heads.value_lengths[i], brought, rtol=1e-4)
    lengths = [
        np.linalg.norm(np.float32(x), axis=-1)
        for x in (heads.before_rotation, heads.after_rotation)
    ]
    np.testing.assert_allclose(*lengths, rtol=5e-3)
    assert np.abs(heads.before_rotation - heads.after_rotation).max() > 0.1
    assert seen.cache.visible[1].tolist() == [0] * (T - 3) + [1] * 3
    readers = np.array([np.arange(T, 0, -1), np.minimum(np.arange(T, 0, -1), 4)])
    read = probs.sum((1, 2)) / probs.shape[1] / readers
    np.testing.assert_allclose(seen.cache.read, read, rtol=1e-4)


def test_parts_add_up_and_ablation_is_a_run_without_the_head(seen, out):
    cause = seen.causes
    assert cause.difference == pytest.approx(difference(out.logits, seen), abs=1e-4)
    assert cause.total["sum"] == pytest.approx(cause.difference, abs=1e-3)
    parts = cause.total["embedding"] + cause.parts.sum() + cause.total["bias"]
    assert parts == pytest.approx(cause.difference, abs=1e-3)
    np.testing.assert_allclose(cause.heads.sum(1), cause.parts[:, 0], atol=1e-3)
    layer, head = cause.ablated[3]
    edits = (Edit("z", "scale", 0.0, layer=int(layer), head=int(head)),)
    without = jax.jit(partial(forward, CONFIG))(PARAMS, TOKENS, edits=edits)
    lost = cause.difference - difference(without.logits, seen)
    assert cause.ablation[3] == pytest.approx(lost, abs=1e-3)
    expected = spearmanr(cause.heads[*cause.ablated.T], cause.ablation)
    assert cause.ablation_agreement == pytest.approx(expected.statistic)
    keys = cause.keys.astype(np.float32)
    np.testing.assert_allclose(keys.sum(-1), cause.heads, atol=2e-3)
    # The window, and the tokens that come later.
    assert np.flatnonzero(keys[1, 5]).tolist() == [3, 4, 5, 6]


def test_a_patch_is_a_run_with_the_stream_of_the_other_text(seen):
    comparison, other = seen.comparison, jnp.asarray(TOKENIZER.encode(OTHER))[None]
    run = jax.jit(partial(forward, CONFIG, taps=(Tap("resid_pre"),)))
    there = run(PARAMS, other)
    assert comparison.difference == pytest.approx(
        difference(there.logits, seen), abs=1e-4
    )
    p = np.asarray(jax.nn.softmax(there.logits[0, AT]))
    np.testing.assert_allclose(
        comparison.probabilities, np.sort(p)[::-1][:12], atol=1e-6
    )
    np.testing.assert_allclose(p[comparison.ids], comparison.probabilities, atol=1e-6)
    cells = comparison.patched.tolist()
    assert cells == [[i, t] for i in range(2) for t in range(3, AT + 1)]
    layer, position = cells[4]
    source = there.trace["resid_pre"]
    edits = (Edit("resid_pre", "set", source, layer=layer, position=position),)
    patched = jax.jit(partial(forward, CONFIG))(PARAMS, TOKENS, edits=edits)
    change = difference(patched.logits, seen) - seen.causes.difference
    assert comparison.change[4] == pytest.approx(change, abs=1e-3)
    assert comparison.first == 3 and comparison.patched[:, 1].min() == 3
    expected = spearmanr(comparison.estimate[*comparison.patched.T], comparison.change)
    assert comparison.agreement == pytest.approx(expected.statistic)
    assert not comparison.estimate[:, :3].any() and comparison.estimate[:, 3].all()


def test_units_are_those_that_wrote_the_answer(seen, out):
    units = seen.units
    assert units.positions.tolist() == list(range(T))
    act, down = out.trace["mlp_act"][:, 0], PARAMS["layers"]["mlp"]["down"]
    table = np.asarray(PARAMS["embed"]["table"])
    direction = table[seen.answer.ids[AT, 0]] - table.mean(0)
    weights = np.asarray(PARAMS["final_norm"]["scale"]) * direction
    wrote = np.asarray(act[:, AT] * (down @ weights))
    best = np.argsort(-np.abs(wrote), axis=None)[:12]
    found = units.layers[AT] * CONFIG.hidden_dim + units.units[AT]
    np.testing.assert_array_equal(found, best)
    assert units.totals[AT] == pytest.approx(
        wrote.sum() * units.parts[AT, 0] / wrote.reshape(-1)[best[0]], rel=1e-3
    )
    ratio = units.parts[AT] / wrote.reshape(-1)[best]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)  # 1 / divisor


def test_the_jacobian_lens_reads_what_it_has_moved():
    shape = CONFIG.num_layers, 1, T, CONFIG.model_dim
    draw = np.random.default_rng(0).normal
    trace = {"resid_pre": draw(size=shape), "resid_post": draw(size=shape)}
    jacobian = draw(size=(shape[0], shape[3], shape[3]))
    trace, jacobian = jax.tree.map(np.float32, (trace, jacobian))
    zeros = np.zeros(T, np.int32)
    ids, _, _, ranks, lengths = readings.lens(CONFIG, PARAMS, trace, zeros, jacobian)
    moved = np.einsum("lde,lte->ltd", jacobian, trace["resid_post"][:, 0])
    moved = np.concatenate([trace["resid_pre"][:1, 0], moved])
    moved /= np.sqrt(np.square(moved).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
    moved = moved * PARAMS["final_norm"]["scale"]
    logits = moved @ PARAMS["embed"]["table"].T
    np.testing.assert_array_equal(ids[..., 0], logits.argmax(-1))
    np.testing.assert_array_equal(ranks, (logits > logits[..., :1]).sum(-1))
    length = np.linalg.norm(trace["resid_post"][:, 0], axis=-1)
    np.testing.assert_allclose(lengths[1:], length, rtol=1e-5)


def test_experts_are_those_of_the_tap():
    ids, weights = np.arange(12).reshape(2, 1, 3, 2), np.full((2, 1, 3, 2), 0.5)
    trace = {"expert_ids": jnp.asarray(ids), "expert_weights": jnp.asarray(weights)}
    found = make_view._experts(trace)
    np.testing.assert_array_equal(found.ids, ids[:, 0])
    np.testing.assert_array_equal(found.weights, weights[:, 0])
    assert make_view._experts({}) is None


def test_the_map_has_every_site_and_weight_of_a_model_once():
    for config in (
        CONFIG,
        small(num_experts=4, experts_per_token=2, attention_sinks=True),
    ):
        found = stages(config, 5)
        sites = [site["name"] for stage in found for site in stage["sites"]]
        assert sorted(sites) == sorted(set(table.SITES) - absent_sites(config))
        of_parts = [w["path"] for stage in found for w in stage["weights"]]
        tied = ["embed/table"] * config.tied_embeddings
        assert sorted(of_parts) == sorted([*weights(config), *tied])
    sizes = {stage["name"]: stage["size"] for stage in stages(CONFIG, 5)}
    assert sizes["Queries, keys, values"] == "(6 + 2 × 3) × 8"
    assert sizes["Feed-forward"] == f"5 × {CONFIG.hidden_dim} → 24"
    assert sizes["Attention"] == "6 × 5 × 5" and sizes["Token ids"] == "5"


def test_heads_that_bring_least_are_left_out(seen, monkeypatch):
    monkeypatch.setattr(make_view, "_HEAD_BYTES", 0)
    shape, T = (2, 1, 6), 3
    probs = np.tril(np.ones((*shape, T, T), np.float32))
    trace = {
        "attn_probs": probs,
        "attn_lse": np.zeros((*shape, T), np.float32),
        **dict.fromkeys(("q", "q_rot"), np.zeros((2, 1, 1, 6, 8), np.float32)),
    }
    # What a key brings only to itself does not count.
    lengths = np.ones((2, 6, T), np.float32)
    lengths[1, 2:, :2], lengths[:, :, 2] = 5.0, 9.0
    lengths[0, :2, 0] = 4.0
    found = {
        "value_lengths": lengths,
        "ids": np.zeros((T, 4), np.int32),
        "kinds": np.zeros((2, 6, 4), np.float32),
    }
    left_out = []
    trace = jax.tree.map(jnp.asarray, trace)
    heads = make_view._heads(CONFIG, trace, found, left_out)
    assert heads.heads.tolist() == [[0, 0], [0, 1], *([1, n] for n in range(2, 6))]
    assert "6 of 12 heads" in left_out[0]


def test_a_long_text_and_a_large_vocabulary_are_cut(monkeypatch, out):
    monkeypatch.setattr(make_view, "_LOGIT_BYTES", 0)
    choice = make_view._choice(out.logits, None, AT, np.asarray(TOKENS[0]))
    assert choice.positions.tolist() == [AT]
    assert make_view.shortened(np.arange(130)) == (128, ["the last 2 of 130 tokens"])
    assert make_view.shortened(np.arange(128)) == (128, [])


def test_a_model_whose_parts_do_not_add_to_the_logits_says_so(out, monkeypatch):
    config = dataclasses.replace(CONFIG, norm_placement="both")
    read = {"mlp_act": out.trace["mlp_act"], "final_norm_div": jnp.ones((1, T, 1))}
    units, why = make_view._units(config, PARAMS, read, TOKENS[0], AT)
    assert units is None and "norm after" in why
    layers = np.zeros(CONFIG.num_layers)
    monkeypatch.setattr(
        cause_view, "_attributed", lambda *_: ({}, layers, layers, None, None)
    )
    trace, tokens = collections.defaultdict(lambda: None), np.arange(2)
    _, parts, heads, _, why = cause_view._written(config, AT, PARAMS, trace, tokens)
    assert parts.shape == (2, 2) and heads is None and "do not add" in why
    config = dataclasses.replace(CONFIG, norm_placement="post")
    none = cause_view._written(config, AT, PARAMS, {}, tokens)
    assert none[:4] == ({}, None, None, None) and "no sum" in none[4]


def test_texts_that_cannot_be_looked_at():
    for text, against, words in (
        ("", None, "no token"),
        ("ab", [1], "2 and 1 tokens"),
        ("a" * 129, None, "has 129 tokens.*at most 128"),
    ):
        with pytest.raises(ValueError, match=words):
            view(text=text, against=against, num_prompt=None)


def test_the_terminal_shows_the_same_in_short(seen):
    out = io.StringIO()
    print_view(seen, Console(file=out, width=100))
    text = out.getvalue()
    for words in (
        "The answer",
        "logit lens",
        "what brings most",
        "memory",
        "Who wrote",
    ):
        assert words in text
    assert f"{seen.causes.difference:.2f} logits" in text
    assert f"{seen.answer.probabilities[AT, 0]:.2%}" in text


def test_a_notebook_gets_the_page_in_a_frame(seen):
    (inner,) = re.findall(r'srcdoc="([^"]*)"', seen._repr_html_())
    assert html.unescape(inner) == page_text(seen)
