"""Tiny models equal Hugging Face transformers, and bugs of real ports are detected.

The goldens were computed by transformers (`make_goldens.py`). Weights are large (std
0.2), and 64 tokens are longer than every window and every length before RoPE scaling:
with the usual small weights or a short text, a wrong RoPE would pass.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks_case import slow_but
from parity_case import (
    CASES,
    GOLDENS,
    HIDDEN_ROWS,
    LOGIT_ROWS,
    nested,
    parameter_shapes,
    tokens,
    weights,
)

from jaxlm import tree
from jaxlm.model import block as block_module
from jaxlm.model.initialization import init
from jaxlm.model.transformer import forward
from jaxlm.ops import activations
from jaxlm.ops.probing.tap import Tap
from jaxlm.tree import unstack

# For another order of summation in f32. Observed: at most 1e-5, and 3e-5 in phi4-mini,
# which is wider.
GATE = 1e-4


@lru_cache
def goldens():
    return dict(np.load(GOLDENS))


def run(config, params, ids, jit=True):
    """Returns logits [T, V] and the residual stream after each layer [L, T, D]."""
    config = dataclasses.replace(config, dtype="float32")
    call = partial(forward, config, taps=(Tap("resid_post"),))
    if jit:
        call = jax.jit(call)
    else:
        # Op by op and layer by layer, nothing new has to be compiled.
        params = {**params, "layers": unstack(params["layers"], config.num_layers)}
    with jax.default_matmul_precision("highest"):
        out = call(params, jnp.asarray(ids))
    return np.asarray(out.logits[0]), np.asarray(out.trace["resid_post"][:, 0])


def errors(name, config=None, params=None, jit=False):
    """Returns max |difference| / max(1, std) of logits and of hidden states."""
    case = CASES[name]
    config = case if config is None else config
    if params is None:
        # Weights that the config does not ask for would be refused.
        asked = parameter_shapes(config)
        params = nested({p: w for p, w in weights(case).items() if p in asked})
    params = jax.tree.map(jnp.asarray, params)
    logits, hidden = run(config, params, tokens(case), jit)
    expected = goldens()
    pairs = (
        (logits[LOGIT_ROWS], expected[f"{name}/logits"]),
        (hidden[:, HIDDEN_ROWS], expected[f"{name}/hidden"]),
    )
    return [np.abs(ours - hf).max() / max(1.0, hf.std()) for ours, hf in pairs]


# The most different models, which always run.
QUICK = (
    "llama3.1-8b",
    "gemma3-27b",
    "phi4-mini",
    "gpt2-124m",
    "gpt-oss-20b",
    "gpt_neox",
)


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_logits_and_hidden_states_equal_transformers(name):
    logits, hidden = errors(name, jit=True)
    assert logits <= GATE
    assert hidden <= GATE


@pytest.mark.parametrize("name", CASES)
def test_init_makes_the_parameters_of_the_contract(name):
    shapes = jax.eval_shape(partial(init, CASES[name]), jax.random.key(0))
    found = {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}
    assert found == parameter_shapes(CASES[name])


@pytest.mark.slow
def test_op_by_op_the_result_is_the_same():
    """The baseline for the bugs below."""
    assert max(errors("llama3.1-8b")) <= GATE
    assert max(errors("gemma2-27b")) <= GATE


def interleaved(x, cos, sin):
    """Rotates adjacent pairs, the layout of Llama's original weights."""
    P = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x[..., : 2 * P : 2], x[..., 1 : 2 * P : 2]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = rotated.reshape(*x.shape[:-1], 2 * P)
    return jnp.concatenate([rotated, x[..., 2 * P :]], axis=-1)


def tiled_heads(config):
    """Returns weights in which query head n uses key head n % K, not n // G."""
    K, N = config.num_kv_heads, config.num_heads
    order = [g * K + k for k in range(K) for g in range(N // K)]
    flat = weights(config)
    flat["layers/attn/q"] = flat["layers/attn/q"][:, :, order]
    flat["layers/attn/o"] = flat["layers/attn/o"][:, order]
    return nested(flat)


# Each of these changes is a bug of a real port.
WRONG_FIELDS = {
    "theta": ("qwen3-0.6b", {"rope_theta": 1e4}),
    "llama3 scaling missing": ("llama3.1-8b", {"rope_scaling": None}),
    "window one too long": ("mistral-7b-v0.1", {"window": 10}),
    "window one too short": ("gemma2-27b", {"window": 8}),
    "attention soft cap missing": ("gemma2-27b", {"attention_soft_cap": None}),
    "epsilon": ("llama3.1-8b", {"norm_epsilon": 1e-6}),
    "gelu exact for tanh": ("gemma2-27b", {"activation": "gelu"}),
    "gelu tanh for exact": ("gpt_neox", {"activation": "gelu_tanh"}),
    "final soft cap missing": ("gemma2-27b", {"final_soft_cap": None}),
    "attention scale": ("gemma3-27b", {"attention_scale": None}),
    "local theta": ("gemma3-27b", {"rope_local_theta": None}),
    "linear scaling missing": ("gemma3-27b", {"rope_scaling": None}),
    "partial rotary of the whole head": ("gpt_neox", {"rope_fraction": 1.0}),
    "NoPE layer rotated": ("smollm3-3b", {"rope_pattern": (True,)}),
    "sequential block": ("gpt_neox", {"parallel_block": False}),
    "norm without the 1": ("gemma-2b", {"norm": "rms"}),
    "embedding scale": ("gemma-2b", {"embedding_scale": 1.0}),
    "pattern reversed": ("gemma2-27b", {"layer_pattern": ("global", "local")}),
    "shares of all experts": ("mixtral-8x7b", {"router_normalize": False}),
    "shares of the chosen experts": ("qwen3-moe-shares", {"router_normalize": True}),
    "one expert fewer": ("qwen3-30b-a3b", {"experts_per_token": 1}),
    "router bias missing": ("gpt-oss-20b", {"router_bias": False}),
    "expert biases missing": ("gpt-oss-20b", {"feed_forward_bias": False}),
    "swiglu for gpt-oss's": ("gpt-oss-20b", {"activation": "silu"}),
    "sinks missing": ("gpt-oss-20b", {"attention_sinks": False}),
    "output bias missing": ("gpt-oss-20b", {"attention_output_bias": False}),
}


QUICK_BUGS = ("theta", "window one too long")


@pytest.mark.parametrize("bug", slow_but(QUICK_BUGS, WRONG_FIELDS))
def test_a_wrong_choice_fails_the_gate(bug):
    name, change = WRONG_FIELDS[bug]
    assert max(errors(name, dataclasses.replace(CASES[name], **change))) > GATE


def test_interleaved_rope_fails_the_gate(monkeypatch):
    monkeypatch.setattr(block_module, "rotate", interleaved)
    assert max(errors("llama3.1-8b")) > GATE


def test_tiled_key_heads_fail_the_gate():
    name = "llama3.1-8b"
    assert max(errors(name, params=tiled_heads(CASES[name]))) > GATE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b"])
@pytest.mark.parametrize("first, second", [("gate", "up"), (0, 1)])
def test_exchanged_experts_fail_the_gate(name, first, second):
    """Exchanges gate and up, or two columns of the router."""
    params = nested(weights(CASES[name]))
    moe = params["layers"]["moe"]
    if first == "gate":
        moe["gate"], moe["up"] = moe["up"], moe["gate"]
    else:
        order = [second, first, *range(2, CASES[name].num_experts)]
        moe["router"] = moe["router"][..., order]
    assert max(errors(name, params=params)) > GATE


@pytest.mark.parametrize("bias", ["gate_bias", "up_bias", "down_bias", "router_bias"])
def test_each_missing_bias_of_the_experts_fails_the_gate(bias):
    params = nested(weights(CASES["gpt-oss-20b"]))
    params["layers"]["moe"][bias] *= 0
    assert max(errors("gpt-oss-20b", params=params)) > GATE


CLAMPED = "swiglu_clamped"
WRONG_GATES = {
    "gate not clamped": ("ACTIVATIONS", lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "slope 1": ("ACTIVATIONS", lambda x: jax.nn.silu(jnp.minimum(x, 7))),
    "up not clamped": ("FACTORS", lambda x: x + 1),
    "up clamped above only": ("FACTORS", lambda x: jnp.minimum(x, 7) + 1),
    "no one added": ("FACTORS", lambda x: jnp.clip(x, -7, 7)),
}


@pytest.mark.parametrize("bug", WRONG_GATES)
def test_a_wrong_clamp_fails_the_gate(monkeypatch, bug):
    table, function = WRONG_GATES[bug]
    monkeypatch.setitem(getattr(activations, table), CLAMPED, function)
    assert max(errors("gpt-oss-20b")) > GATE


@pytest.mark.parametrize(
    "name, change",
    [
        ("gpt-oss-20b", {"truncate": True}),
        ("gpt-oss-20b", {"attention_factor": 1.0}),
        ("phi3-mini-128k", {"short_factors": (1.0,) * 8, "long_factors": (1.0,) * 8}),
        ("phi3-mini-128k", {"attention_factor": 1.0}),
        ("qwen3-yarn", {"attention_factor": 1.0}),
        ("qwen3-yarn", {"truncate": False}),
        ("llama-dynamic", {"factor": 1.0}),
    ],
)
def test_a_wrong_scaling_fails_the_gate(name, change):
    scaling = dataclasses.replace(CASES[name].rope_scaling, **change)
    config = dataclasses.replace(CASES[name], rope_scaling=scaling)
    assert max(errors(name, config)) > GATE


def test_small_weights_would_not_show_a_wrong_theta():
    """At std 0.02 this bug would pass a gate of KL 1e-4, so the weights are large."""
    case = CASES["llama2-7b"]
    small = {
        name: value * (1.0 if name.endswith("scale") else 0.1)
        for name, value in weights(case).items()
    }
    params = jax.tree.map(jnp.asarray, nested(small))
    ids = tokens(case)
    right, _ = run(case, params, ids, jit=False)
    wrong, _ = run(dataclasses.replace(case, rope_theta=1e6), params, ids, jit=False)
    p = jax.nn.log_softmax(right)
    kl = jnp.sum(jnp.exp(p) * (p - jax.nn.log_softmax(wrong)), axis=-1)
    assert 0 < kl.max() < 1e-4
