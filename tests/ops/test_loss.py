"""Compares cross-entropy with float64 NumPy; chunks give the same in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal

from jaxlm.ops.loss import chunked_cross_entropy_sums, cross_entropy_sums

B, T, D, V = 2, 11, 6, 23
FEATURES, HEAD = jnp.asarray(normal(1, B, T, D)), jnp.asarray(normal(2, D, V))
TARGETS = np.random.default_rng(3).integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = np.random.default_rng(4).uniform(0, 2, (B, T)).astype(np.float32)
WEIGHTS[0, :3] = 0


def oracle(logits, z_loss):
    logits = np.float64(logits)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    entropy = (nll * WEIGHTS).sum()
    return entropy + z_loss * (lse**2 * WEIGHTS).sum(), entropy


def oracle_gradient(logits, z_loss):
    """Computes d / d logits by hand: softmax - one-hot, and 2 z lse softmax."""
    logits = np.float64(logits)
    lse = np.log(np.exp(logits).sum(-1, keepdims=True))
    probs = np.exp(logits - lse)
    grad = probs - np.eye(V)[TARGETS] + 2 * z_loss * lse * probs
    return grad * WEIGHTS[..., None]


def plain(features, head, z_loss):
    logits = features @ head
    return cross_entropy_sums(
        logits, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS), z_loss=z_loss
    )


def chunked(features, head, z_loss, chunk):
    return chunked_cross_entropy_sums(
        lambda head, x: x @ head,
        head,
        features,
        jnp.asarray(TARGETS),
        jnp.asarray(WEIGHTS),
        chunk,
        z_loss,
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradient(z_loss):
    logits = jnp.asarray(normal(5, B, T, V) * 3)
    targets, weights = jnp.asarray(TARGETS), jnp.asarray(WEIGHTS)

    def loss(logits):
        return cross_entropy_sums(logits, targets, weights, z_loss=z_loss)

    (total, entropy), grad = jax.value_and_grad(loss, has_aux=True)(logits)
    np.testing.assert_allclose((total, entropy), oracle(logits, z_loss), rtol=1e-6)
    np.testing.assert_allclose(grad, oracle_gradient(logits, z_loss), atol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.asarray(normal(5, B, T, V) * 3).astype(jnp.bfloat16)
    ours = cross_entropy_sums(logits, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
    assert ours[0].dtype == jnp.float32
    np.testing.assert_allclose(ours, oracle(logits, 0.0), rtol=1e-6)


def test_weight_zero_hides_a_token():
    logits = jnp.asarray(normal(5, B, T, V))
    spoiled = logits.at[0, :3].set(50 * logits[0, :3])
    targets, weights = jnp.asarray(TARGETS), jnp.asarray(WEIGHTS)
    for x in (logits, spoiled):
        total, _ = cross_entropy_sums(x, targets, weights, z_loss=0.1)
        np.testing.assert_allclose(total, oracle(logits, 0.1)[0], rtol=1e-6)


def test_large_logits_do_not_overflow():
    logits = jnp.asarray(normal(5, B, T, V) * 1e4)
    total, _ = cross_entropy_sums(logits, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
    assert np.isfinite(total)


@pytest.mark.parametrize("chunk", [1, 4, 11, 22, 30])
def test_chunks_equal_the_whole(chunk):
    """Of 22 tokens: chunks that divide them, do not, or are larger than all."""
    z_loss = 0.1
    right, right_grads = jax.value_and_grad(
        lambda f, h: (r := plain(f, h, z_loss))[0] + 0 * r[1], (0, 1)
    )(FEATURES, HEAD)
    ours = jax.jit(
        jax.value_and_grad(
            lambda f, h: chunked(f, h, z_loss, chunk), (0, 1), has_aux=True
        )
    )
    (total, entropy), grads = ours(FEATURES, HEAD)
    np.testing.assert_allclose(total, right, rtol=1e-6)
    np.testing.assert_allclose(entropy, plain(FEATURES, HEAD, 0.0)[0], rtol=1e-6)
    for a, b in zip(grads, right_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def largest(jaxpr):
    """Returns the largest array size in a program, including inner programs."""
    found = 0
    for eqn in jaxpr.eqns:
        found = max([found, *(v.aval.size for v in eqn.outvars)])
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found = max(found, largest(inner))
    return found


def test_chunks_never_hold_all_logits():
    def program(loss):
        grad = jax.grad(lambda f, h: loss(f, h)[0], (0, 1))
        return jax.make_jaxpr(grad)(FEATURES, HEAD).jaxpr

    whole = B * T * V
    assert largest(program(lambda f, h: plain(f, h, 0.1))) >= whole
    assert largest(program(lambda f, h: chunked(f, h, 0.1, 2))) < whole / 2
