"""The one pure call: transformations, packing, ways to run the layers, init."""

import dataclasses
import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, make, small

import jaxlm
from jaxlm import tree
from jaxlm.config import MeshConfig
from jaxlm.model.initialization import init, init_cache
from jaxlm.model.layer_stack import REMAT_POLICIES
from jaxlm.model.params import parameter_shardings
from jaxlm.model.transformer import forward
from jaxlm.ops import linear
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.rules import batch_sharding
from jaxlm.tree import unstack

B, T = 2, 12
# One layer more than whole groups; everything that a mask can do.
CONFIG = small(num_layers=3, layer_pattern=("local", "global"), window=5)


@pytest.fixture(scope="module")
def model():
    return make(CONFIG)


def logits_of(config, **given):
    return jax.jit(lambda p, x: forward(config, p, x, **given).logits)


def loss_and_grads(config):
    @jax.jit
    def run(params, tokens):
        def loss(params):
            logits = forward(config, params, tokens).logits
            return jnp.mean(jnp.square(logits))

        return jax.value_and_grad(loss)(params)

    return run


@pytest.fixture(scope="module")
def right(model):
    """(loss, gradients) of the plain way to run the layers."""
    config, params = model
    return loss_and_grads(config)(params, ids(B, T))


WAYS = {
    "remat": {"remat": "full"},
    "remat of all but products": {"remat": "dots"},
    "remat of all but attention": {"remat": "attention", "attention": "xla"},
    "remat from the host's memory": {"remat": "offload", "attention": "xla"},
    "two groups a step": {"unroll_layers": 2},
    "unrolled": {"unroll_layers": 0},
    "reference attention": {"attention": "reference"},
    "long-row attention": {"attention": "xla"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_value_and_gradient_do_not_depend_on_how(way, model, right):
    config, params = model
    config = dataclasses.replace(config, **WAYS[way])
    loss, grads = loss_and_grads(config)(params, ids(B, T))
    assert loss == pytest.approx(float(right[0]), rel=1e-5)
    scale = float(tree.global_norm(right[1]))
    for ours, plain in zip(*map(jax.tree.leaves, (grads, right[1])), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5 * scale)


@pytest.mark.slow
def test_remat_computes_the_block_again(model):
    """Remat that were lost would pass the test above."""
    config, params = model

    def products(**changes):
        changed = dataclasses.replace(config, **changes)
        run = loss_and_grads(changed).__wrapped__
        return str(jax.make_jaxpr(run)(params, ids(B, T))).count("dot_general")

    assert products(remat="full") > products(remat="dots") >= products()


@pytest.mark.slow
def test_remat_of_all_but_attention_runs_its_kernel_once(model):
    config, params = model

    def kernels(remat):
        changed = dataclasses.replace(config, remat=remat, attention="xla")
        run = loss_and_grads(changed).__wrapped__
        # Of the kernels, only that of the forward pass takes maxima of scores.
        return str(jax.make_jaxpr(run)(params, ids(B, T))).count("reduce_max")

    counts = {remat: kernels(remat) for remat in REMAT_POLICIES}
    once = counts["none"]
    assert counts.pop("full") > once
    assert set(counts.values()) == {once}, counts


def test_unstacked_layers_are_the_same(model):
    config, params = model
    tuple_of = {**params, "layers": unstack(params["layers"], config.num_layers)}
    run = logits_of(config)
    np.testing.assert_allclose(
        run(tuple_of, ids(B, T)), run(params, ids(B, T)), atol=1e-5
    )


@pytest.mark.slow
def test_with_and_without_a_mesh(model):
    """Every axis of the mesh has one device here; many: tests/multi_device."""
    config, params = model
    plain = logits_of(config)(params, ids(B, T))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(params, mesh))
        tokens = jax.device_put(ids(B, T), batch_sharding(mesh))
        meshed = logits_of(config)(placed, tokens)
        loss, grads = loss_and_grads(config)(placed, tokens)
    np.testing.assert_allclose(meshed, plain, atol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert np.isfinite(loss)


class FirstProductError(Exception):
    """Ends a call at its first product."""


def test_eight_functions_lead_to_the_first_product(model, monkeypatch):
    def product(*_args, **_kwargs):
        raise FirstProductError

    monkeypatch.setattr(linear, "_product", product)
    with pytest.raises(FirstProductError) as raised:
        jax.eval_shape(partial(forward, model[0]), model[1], ids(1, 4))
    package = Path(jaxlm.__file__).parent
    stack = [Path(entry.path) for entry in raised.traceback]
    ours = [path for path in stack if path.is_relative_to(package)]
    assert 0 < len(ours) <= 8, ours


@pytest.mark.slow
def test_vmap_over_models(model):
    """A batch of models is one vmap."""
    config, params = model
    both = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
    out = jax.jit(jax.vmap(lambda p: forward(config, p, ids(B, T))))(both)
    run = logits_of(config)
    np.testing.assert_allclose(out.logits[0], run(params, ids(B, T)), atol=1e-4)
    second = jax.tree.map(lambda x: 1.1 * x, params)
    np.testing.assert_allclose(out.logits[1], run(second, ids(B, T)), atol=1e-4)


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
def test_a_packed_row_equals_its_documents_alone(position):
    config, params = make(dataclasses.replace(CONFIG, position=position))
    first, second = ids(1, 7, seed=2), ids(1, 5, seed=3)
    packed = jnp.concatenate([first, second], axis=1)
    segments = jnp.array([[1] * 7 + [2] * 5], jnp.int32)
    positions = jnp.array([[*range(7), *range(5)]], jnp.int32)
    run = jax.jit(
        lambda x, p, s: forward(config, params, x, positions=p, segment_ids=s).logits
    )
    together = run(packed, positions, segments)
    pad = jnp.zeros((1, 5), jnp.int32)
    for document, where in ((first, slice(0, 7)), (second, slice(7, 12))):
        n = document.shape[1]
        padded = jnp.concatenate([document, pad, pad], axis=1)[:, :12]
        ones = jnp.ones((1, 12), jnp.int32)
        alone = run(padded, jnp.arange(12, dtype=jnp.int32)[None], ones)
        np.testing.assert_allclose(together[:, where], alone[:, :n], atol=1e-4)
    # Without the segments the second document sees the first.
    leaky = run(packed, positions, jnp.ones((1, 12), jnp.int32))
    assert np.abs(leaky[:, 7:] - together[:, 7:]).max() > 1e-2
    np.testing.assert_allclose(leaky[:, :7], together[:, :7], atol=1e-4)


def test_a_token_does_not_see_the_future(model):
    config, params = model
    run = logits_of(config)
    changed = ids(B, T).at[:, 8].set((ids(B, T)[:, 8] + 1) % 32)
    before, after = run(params, ids(B, T)), run(params, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-2


@pytest.mark.slow
def test_bfloat16_is_close(model):
    """Logits stay f32; 8 bits through three layers keep two digits."""
    config, params = model
    right = logits_of(config)(params, ids(B, T))
    ours = logits_of(dataclasses.replace(config, dtype="bfloat16"))(params, ids(B, T))
    assert ours.dtype == jnp.float32
    assert np.abs(ours - right).max() < 0.1 * right.std()
    assert np.abs(ours - right).max() > 0


def test_soft_caps_bound_what_they_cap(model):
    config, params = model
    capped = dataclasses.replace(config, final_soft_cap=0.5)
    assert np.abs(logits_of(config)(params, ids(B, T))).max() > 0.5
    assert np.abs(logits_of(capped)(params, ids(B, T))).max() <= 0.5


def test_segments_and_a_cache_exclude_each_other(model):

    config, params = model
    cache = init_cache(config, B, 16, jnp.float32)
    with pytest.raises(ValueError, match="segment_ids"):
        forward(config, params, ids(B, T), segment_ids=ids(B, T), cache=cache)


@cache
def drawing(config):
    return jax.jit(partial(init, config))


def make_params(config, seed=0):
    return drawing(config)(jax.random.key(seed))


WIDE = small(model_dim=64, hidden_dim=96, vocab_size=128, tied_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "fan_in"])
def test_init_statistics(kind):
    """Standard deviations within 5 percent of what the config says."""
    config = dataclasses.replace(WIDE, init=kind, init_std=0.03)
    params = tree.flatten(make_params(config))
    narrow = 1 / math.sqrt(2 * config.num_layers)

    def std(fan_in, residual=1.0):
        return (0.03 if kind == "normal" else fan_in**-0.5) * residual

    expected = {
        "embed/table": 0.03,
        "layers/attn/q": std(64),
        "layers/attn/o": std(6 * 8, narrow),
        "layers/mlp/gate": std(64),
        "layers/mlp/up": std(64),
        "layers/mlp/down": std(96, narrow),
        "lm_head/kernel": std(64) if kind == "normal" else 0.0,
    }
    for name, value in expected.items():
        assert params[name].std() == pytest.approx(value, rel=0.05), name
        # Five standard errors of the smallest of these.
        assert abs(params[name].mean()) <= 5 * value / math.sqrt(params[name].size)
        assert params[name].dtype == jnp.float32
    for name, value in params.items():
        if name.endswith("norm/scale"):
            assert (value == 1).all()


@pytest.mark.slow
def test_init_statistics_of_experts():
    """Each expert as a feed-forward of its own would be."""
    config = dataclasses.replace(
        WIDE, init="fan_in", num_experts=4, experts_per_token=2, router_bias=True
    )
    params = tree.flatten(make_params(config))
    narrow = 1 / math.sqrt(2 * config.num_layers)
    for name, value in {
        "router": 64**-0.5,
        "gate": 64**-0.5,
        "up": 64**-0.5,
        "down": 96**-0.5 * narrow,
        "router_bias": 0.0,
    }.items():
        found = params[f"layers/moe/{name}"]
        tolerance = 4 / math.sqrt(found.size)
        assert found.std() == pytest.approx(value, rel=tolerance), name
    up = params["layers/moe/up"]
    assert np.abs(up[:, 0] - up[:, 1]).max() > 0.01


def test_layers_and_seeds_differ():
    a, b = make_params(CONFIG), make_params(CONFIG, 1)
    q = a["layers"]["attn"]["q"]
    assert np.abs(q[0] - q[1]).max() > 0.01
    assert np.abs(q - b["layers"]["attn"]["q"]).max() > 0.01
    again = make_params(CONFIG)
    for x, y in zip(*map(jax.tree.leaves, (a, again)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_unit_offset_norms_start_at_one():
    config = dataclasses.replace(CONFIG, norm="rms_unit_offset")
    params = tree.flatten(make_params(config))
    scales = [v for name, v in params.items() if name.endswith("norm/scale")]
    assert scales and all((scale == 0).all() for scale in scales)


def test_init_needs_a_vocabulary():
    config = dataclasses.replace(CONFIG, vocab_size=0)
    with pytest.raises(ValueError, match=r"model\.vocab_size is 0"):
        init(config, jax.random.key(0))
