"""Finds what is known: the induction circuit of a small trained model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import ModelConfig
from jaxlm.interp.causes.patching import head_ablation, metric_of
from jaxlm.interp.head_scores import induction, previous_token
from jaxlm.model.initialization import init
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap

LENGTH, VOCAB, STEPS = 24, 24, 400
# The first layer sees two tokens; the second has no positions, so it has to go by
# content.
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    hidden_dim=32,
    context_length=LENGTH,
    dtype="float32",
    layer_pattern=("local", "global"),
    window=2,
    rope_pattern=(True, False),
)


def repeated(key, rows):
    """Random tokens, repeated after 4 to 12 of them."""
    first, second = jax.random.split(key)
    tokens = jax.random.randint(first, (rows, LENGTH), 0, VOCAB)
    period = jax.random.randint(second, (rows, 1), 4, 13)
    return jnp.take_along_axis(tokens, jnp.arange(LENGTH)[None] % period, axis=1)


def trained():
    optimizer = optax.adam(4e-3, b2=0.99)

    def loss(params, tokens):
        logits = forward(CONFIG, params, tokens[:, :-1]).logits[:, LENGTH // 2 :]
        targets = tokens[:, LENGTH // 2 + 1 :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, repeated(key, 32))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    params = init(CONFIG, jax.random.key(0))
    params["embed"]["table"] *= 8
    keys = jax.random.split(jax.random.key(1), STEPS)
    carry = params, optimizer.init(params)
    return jax.jit(partial(jax.lax.scan, step))(carry, keys)[0][0]


@pytest.mark.slow
def test_heads_are_found_by_their_scores_and_by_what_their_ablation_does():
    params = trained()
    tokens = repeated(jax.random.key(2), 32)
    text, last = tokens[:, :-1], tokens[:, -1]
    taps = (Tap("attn_probs"),)
    probs = jax.jit(lambda p: forward(CONFIG, p, text, taps=taps).trace)(params)
    scores = np.asarray(induction(probs["attn_probs"], text).mean(axis=1))
    previous = np.asarray(previous_token(probs["attn_probs"]).mean(axis=1))
    assert scores[1].max() > 0.8 and scores[0].max() < 0.2
    assert previous[0].max() > 0.9 and previous[1].max() < 0.3

    def metric(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.mean(jnp.take_along_axis(logprobs, last[:, None], axis=1))

    bound = dict(config=CONFIG, metric=metric, params=params, tokens=text)
    clean = float(metric_of(**bound))
    ablated = np.asarray(head_ablation(**bound))
    # All heads of the second layer share the work, and need what one of the first
    # tells them about the token before.
    assert clean > -1 and ablated[0].argmin() == previous[0].argmax()
    assert ablated[0].min() < clean - 1
    assert np.delete(ablated[0], ablated[0].argmin()).mean() > clean - 0.5
