"""The table of weights: what is made from it, and that nothing stands outside of it."""

import dataclasses
import importlib.util
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from model_case import small

from jaxlm import tree
from jaxlm.config import ModelConfig
from jaxlm.model.initialization import init
from jaxlm.model.params import (
    WEIGHTS,
    Role,
    cast_matrices,
    param,
    quantize_matrices,
    weight_of,
    weights,
    with_outputs_first,
)
from jaxlm.model.transformer import forward

BIASES = {
    "attention_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "norm": "layer",
    "norm_bias": True,
}
VARIANTS = {
    "biases": small(position="learned", tied_embeddings=False, **BIASES),
    "head norms": small(qk_norm="head", norm_placement="both", **BIASES),
    "full norms": small(qk_norm="full", attention_sinks=True, **BIASES),
    "experts": small(num_experts=4, experts_per_token=2, router_bias=True, **BIASES),
}


def shapes(config: ModelConfig):
    return tree.flatten(jax.eval_shape(lambda: init(config, jax.random.key(0))))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_has_the_weights_of_the_table_and_no_others(name):
    config = VARIANTS[name]
    found = {path: leaf.shape for path, leaf in shapes(config).items()}
    assert found == {path: w.shape(config) for path, w in weights(config).items()}


def test_every_entry_is_in_some_model():
    used = {w for config in VARIANTS.values() for w in weights(config).values()}
    assert used == set(WEIGHTS)


def test_no_two_entries_of_a_model_have_one_path():
    for config in VARIANTS.values():
        present = [w.path for w in WEIGHTS if w.present.holds(config)]
        assert len(present) == len(set(present))


def test_a_weight_without_an_entry_cannot_exist():
    class Extra(nn.Module):
        config: ModelConfig

        @nn.compact
        def __call__(self):
            return param(self, "layers/attn/extra")

    with pytest.raises(KeyError, match="layers/attn/extra"):
        Extra(small()).init(jax.random.key(0))


def test_axes_of_matrices():
    """Written out: which axes a matrix maps from and to, after layer and expert."""
    wanted = {
        "layers/attn/q": ((1,), (2, 3)),
        "layers/attn/k": ((1,), (2, 3)),
        "layers/attn/v": ((1,), (2, 3)),
        "layers/attn/o": ((1, 2), (3,)),
        "layers/mlp/gate": ((1,), (2,)),
        "layers/mlp/up": ((1,), (2,)),
        "layers/mlp/down": ((1,), (2,)),
        "layers/moe/router": ((1,), (2,)),
        "layers/moe/gate": ((2,), (3,)),
        "layers/moe/up": ((2,), (3,)),
        "layers/moe/down": ((2,), (3,)),
        "lm_head/kernel": ((0,), (1,)),
    }
    assert {w.path: w.matrix_axes for w in WEIGHTS if w.role.multiplies} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "fan_in"])
def test_spread_of_random_values(kind):
    """Standard deviations by the formulas of each kind, written out."""
    config = dataclasses.replace(
        small(tied_embeddings=False, init=kind, init_std=0.05),
        model_dim=128,
        hidden_dim=256,
        head_dim=32,
        vocab_size=512,
    )
    params = tree.flatten(jax.jit(lambda k: init(config, k))(jax.random.key(0)))
    fixed = kind == "normal"
    residual = (2 * config.num_layers) ** -0.5
    wanted = {
        "embed/table": 0.05,
        "layers/attn/q": 0.05 if fixed else 128**-0.5,
        "layers/attn/k": 0.05 if fixed else 128**-0.5,
        "layers/attn/v": 0.05 if fixed else 128**-0.5,
        "layers/attn/o": (0.05 if fixed else (6 * 32) ** -0.5) * residual,
        "layers/mlp/gate": 0.05 if fixed else 128**-0.5,
        "layers/mlp/up": 0.05 if fixed else 128**-0.5,
        "layers/mlp/down": (0.05 if fixed else 256**-0.5) * residual,
        "lm_head/kernel": 0.05 if fixed else 0.0,
    }
    for path, std in wanted.items():
        # More than 20,000 values: the spread is within 2 % of the truth.
        assert np.std(params[path]) == pytest.approx(std, rel=0.02), path
    assert (params["layers/attn_norm/scale"] == 1).all()


def test_a_seed_gives_the_same_values_in_every_version():
    """The last two of each weight, as the code before the table made them."""
    config = small(attention_bias=True, tied_embeddings=False)
    params = tree.flatten(init(config, jax.random.key(0)))
    wanted = {
        "embed/table": [0.0164399, 0.00658871],
        "layers/attn/q": [-0.00456022, 0.0205446],
        "layers/attn/v": [0.0122617, 0.0206643],
        "layers/attn/o": [0.00624162, -0.0164516],
        "layers/mlp/gate": [0.0334979, -0.0138719],
        "layers/mlp/down": [-0.00216296, 0.010502],
        "lm_head/kernel": [-0.00988263, -0.00869676],
    }
    for path, values in wanted.items():
        found = np.ravel(params[path])[-2:]
        np.testing.assert_allclose(found, values, rtol=1e-5, err_msg=path)


def test_random_values_depend_on_seed_layer_and_path_only():
    config = small(num_layers=3)
    make = jax.jit(lambda c, k: init(c, k), static_argnums=0)
    first = make(config, jax.random.key(0))["layers"]["attn"]
    assert not np.array_equal(
        first["q"], make(config, jax.random.key(1))["layers"]["attn"]["q"]
    )
    assert not np.array_equal(first["q"][0], first["q"][1])
    assert not np.array_equal(first["k"], first["v"])
    learned = make(dataclasses.replace(config, position="learned"), jax.random.key(0))
    np.testing.assert_array_equal(first["q"], learned["layers"]["attn"]["q"])


def test_only_what_is_rounded_in_use_is_cast():
    config = VARIANTS["experts"]
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    cast = jax.eval_shape(lambda p: cast_matrices(p, "bfloat16"), params)
    for path, leaf in tree.flatten(cast).items():
        role = weight_of(path, leaf).role
        rounded = role in (Role.MATRIX, Role.EMBEDDING, Role.HEAD)
        assert leaf.dtype == ("bfloat16" if rounded else "float32"), path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_the_model_reads_matrices_with_outputs_first(kind):
    config = dataclasses.replace(VARIANTS["biases"], model_dim=24, hidden_dim=40)
    params = quantize_matrices(init(config, jax.random.key(0)), kind)
    params = {**params, "layers": tree.unstack(params["layers"], config.num_layers)}
    turned = with_outputs_first(params)
    inner = config.num_heads, config.head_dim
    q, k, o = (turned["layers"][1]["attn"][name] for name in "qko")
    num_queries, num_keys = math.prod(inner), config.num_kv_heads * config.head_dim
    assert q.shape == (24, *inner)
    assert o.values.shape == (24, *inner) and o.shape == (*inner, 24)
    if kind == "float":  # keys and values lie behind the queries
        assert q.values.shape == (num_queries + 2 * num_keys, 24)
        assert k.values is None and k.source == "q" and k.first == num_queries
    else:
        assert q.values.shape == (num_queries, 24)
    head = turned["lm_head"]["kernel"]
    assert head.values.shape == (config.vocab_size, 24)
    tokens = np.arange(12).reshape(2, 6) % config.vocab_size
    run = jax.jit(lambda params: forward(config, params, tokens).logits)
    logits, expected = run(turned), run(params)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    other = dataclasses.replace(config, hidden_dim=48)
    with pytest.raises(ValueError) as error:
        forward(other, turned, tokens)
    assert "layers/0/mlp/up has shape (24, 40)" in str(error.value)


def test_the_page_in_docs_is_up_to_date(repository):
    path = repository / "docs" / "make_params.py"
    spec = importlib.util.spec_from_file_location("make_params", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    page = maker.PAGE.read_text()
    assert page == maker.with_table(page), "stale: run python docs/make_params.py"
