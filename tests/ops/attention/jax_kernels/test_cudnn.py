"""cuDNN's attention: the arguments it gets, checked with JAX's XLA implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import ops_case
import pytest
from ops_case import make_spec, normal, plain_request, slope

from jaxlm.ops.attention.jax_kernels import cudnn
from jaxlm.ops.attention.spec import AttentionSpec, Mask

B, H = 2, 8
SCALE = 0.3
# name -> (queries, keys, query heads, key heads, options)
CASES = {
    "causal": (24, 24, 6, 3, {}),
    "all keys, one key head": (24, 40, 3, 1, {"causal": False}),
    "window": (40, 40, 2, 2, {"window": 9}),
    "window of the token alone": (24, 24, 2, 1, {"window": 1}),
    "more keys": (24, 40, 2, 1, {}),
    "more keys, window": (24, 40, 2, 1, {"window": 9}),
    "more queries": (40, 24, 2, 1, {}),
}


def request_of(**changes):
    """A request that cuDNN can run, apart from these changes."""
    can = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    return plain_request(**{**can, "num_queries": 1000, "num_keys": 1000, **changes})


def inputs(T, S, N, K, dtype=jnp.float32):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", CASES)
def test_arguments_mean_what_the_spec_says(name):
    """With the same arguments, JAX's XLA implementation equals the float64 oracle."""
    T, S, N, K, options = CASES[name]
    arguments = inputs(T, S, N, K)
    spec = make_spec(SCALE, **options)
    weight = normal(4, B, T, N, H)

    def total(q, k, v):
        z, lse = cudnn.attention(q, k, v, spec, implementation="xla")
        assert lse is None
        return jnp.sum(z * weight), z

    grads, z = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arguments)

    def oracle(*arguments, **changed):
        return ops_case.attention(*arguments, scale=SCALE, **{**options, **changed})

    np.testing.assert_allclose(z, oracle(*arguments), atol=3e-6)
    if "window" in options:
        other = oracle(*arguments, window=options["window"] + 1)
        assert np.abs(z - other).max() > 0.05
    for i, grad in enumerate(grads):
        direction = normal(9, *grad.shape)

        def along(x, i=i):
            return np.sum(oracle(*arguments[:i], x, *arguments[i + 1 :]) * weight)

        ours = np.sum(np.float64(grad) * direction)
        right = slope(along, arguments[i], direction)
        assert ours == pytest.approx(right, rel=1e-4, abs=1e-3)


def test_cudnn_is_requested(monkeypatch):
    """By name, so that JAX raises rather than choose another implementation."""
    calls = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **k: (calls.append(k), a[0])[1]
    )
    q, k, v = inputs(8, 8, 2, 1, jnp.bfloat16)
    cudnn.attention(q, k, v, AttentionSpec(SCALE, Mask(window=5)))
    cudnn.attention(q, k, v, AttentionSpec(SCALE, Mask(causal=False)))
    for call, causal, window in zip(calls, (True, False), ((4, 0), None), strict=True):
        assert call == {
            "scale": SCALE,
            "is_causal": causal,
            "local_window_size": window,
            "implementation": "cudnn",
        }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": jnp.float16},
        {"causal": False, "num_queries": 998},
        {"window": 1},
        {"window": 100, "num_keys": 2000},
        {"head_dim": 128},
    ],
)
def test_accepts(changes):
    assert cudnn.declines(request_of(**changes)) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"platform": "cpu", "device_kind": "cpu"}, "needs an NVIDIA GPU"),
        ({"device_kind": "AMD Instinct MI300X"}, "needs an NVIDIA GPU"),
        ({"dtype": jnp.float32}, "no float32"),
        ({"lse": True}, "no log-sum-exp with a gradient"),
        ({"soft_cap": 30.0}, "no soft cap"),
        ({"sinks": True}, "no sinks"),
        ({"segments": True}, "no segments"),
        ({"query_positions": True}, "no query positions"),
        ({"head_dim": 84}, "head_dim 84 is not a multiple of 8"),
        ({"head_dim": 264}, "head_dim 264 is over 256"),
        ({"head_dim": 256}, "head_dim 256 is over 128"),
        ({"num_queries": 1}, "lengths must be even"),
        ({"num_keys": 1001}, "lengths must be even"),
        ({"window": 100, "causal": False}, "no window without the causal mask"),
        ({"window": 100, "num_queries": 1002}, "no window with more queries"),
    ],
)
def test_declines(changes, reason):
    assert cudnn.declines(request_of(**changes)).startswith(reason)


@pytest.mark.parametrize(
    "capability, head_dim, reason",
    [
        ("9.0", 256, None),
        ("8.0", 128, None),
        ("8.0", 136, "head_dim 136 is over 128"),
        # Blackwell has no backward pass for it.
        ("10.0", 256, "head_dim 256 is over 128"),
        ("7.5", 64, "needs an NVIDIA GPU, Ampere or later"),
    ],
)
def test_the_gpu_of_this_process_decides(monkeypatch, capability, head_dim, reason):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    given = cudnn.declines(request_of(head_dim=head_dim))
    assert (given is None) == (reason is None)
    assert (given or "").startswith(reason or "")


@pytest.mark.slow
def test_jax_gives_the_log_sum_exp_no_gradient():
    """This is why it is declined; it is not f32 either."""
    q, k, v = inputs(8, 8, 2, 1, jnp.bfloat16)

    def lse(q):
        return jax.nn.dot_product_attention(q, k, v, return_residual=True)[1]

    assert lse(q).dtype == jnp.bfloat16
    assert not jax.grad(lambda q: jnp.sum(lse(q).astype(jnp.float32)))(q).any()
