"""Compares mixtures with the definition, one token at a time in float64."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks_case import slow_but
from ops_case import normal
from test_activations import CLOSED, factor

from jaxlm.ops.experts import grouped_matmul, moe
from jaxlm.sharding.mesh import AXES

D, F, E = 6, 10, 5


@dataclass(frozen=True)
class Case:
    """Shapes and options of a case; `crowd` routes all tokens to the first experts."""

    batch: int = 2
    tokens: int = 7
    k: int = 2
    normalize: bool = True
    gated: bool = True
    bias: bool = True
    activation: str = "silu"
    crowd: bool = False


CASES = {
    "biases": Case(activation="swiglu_clamped"),
    "no gate": Case(gated=False, activation="gelu"),
    "shares of three": Case(normalize=False, k=3, bias=False),
    "one token": Case(batch=1, tokens=1),
    "crowd, one expert": Case(tokens=33, crowd=True, k=1),
}


def weights_of(case):
    shapes = {"up": (E, D, F), "down": (E, F, D)}
    if case.gated:
        shapes["gate"] = (E, D, F)
    if case.bias:
        shapes |= {f"{name}_bias": (E, shape[2]) for name, shape in shapes.items()}
    # Large, so that the clamps of gpt-oss are reached.
    return {
        name: 2 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())
    }


def inputs_of(case):
    x = normal(50, case.batch, case.tokens, D)
    logits = normal(51, case.batch, case.tokens, E)
    if case.crowd:
        logits += np.float32([9, 6, 3, 0, 0])
    return x, logits, weights_of(case)


def route_by_definition(logits, k, normalize):
    """Takes the softmax, its k greatest, and divides by their sum, for one token."""
    p = np.exp(np.float64(logits))
    p /= p.sum()
    best = np.argsort(-p, kind="stable")[:k]
    return p[best] / (p[best].sum() if normalize else 1.0), best


def by_definition(case, x, logits, w):
    act = np.vectorize(CLOSED[case.activation])
    out = np.zeros(x.shape)
    w = {name: np.float64(value) for name, value in w.items()}
    for place in np.ndindex(x.shape[:2]):
        shares, chosen = route_by_definition(logits[place], case.k, case.normalize)
        for share, e in zip(shares, chosen, strict=True):

            def project(name, h, e=e):
                return h @ w[name][e] + (w[f"{name}_bias"][e] if case.bias else 0)

            hidden = project("up", np.float64(x[place]))
            if case.gated:
                gate = project("gate", np.float64(x[place]))
                hidden = act(gate) * factor(case.activation)(hidden)
            else:
                hidden = act(hidden)
            out[place] += share * project("down", hidden)
    return out


def run(case, function, x, logits, w):
    x, logits, w = jax.tree.map(jnp.asarray, (x, logits, w))
    weights, experts = moe.route(logits, case.k, case.normalize)
    return function(x, weights, experts, w, case.activation)


@lru_cache
def results(name, function, implementation="auto"):
    """Returns value and gradients (all inputs) of a randomly weighted sum."""
    case = CASES[name]
    x, logits, w = inputs_of(case)
    g = normal(52, *x.shape)
    compute = getattr(moe, function)
    original = grouped_matmul.grouped_matmul

    def total(x, logits, w):
        y = run(case, compute, x, logits, w)
        return jnp.sum(y * g), y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            moe, "grouped_matmul", partial(original, implementation=implementation)
        )
        gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
        grads, y = gradient(*jax.tree.map(jnp.asarray, (x, logits, w)))
    return y, grads


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_definition(name):
    case = CASES[name]
    y, _ = results(name, "reference_mixture")
    right = by_definition(case, *inputs_of(case))
    np.testing.assert_allclose(y, right, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize(
    "name, implementation", [*((n, "blocks") for n in CASES), ("biases", "ragged_dot")]
)
def test_sorting_gives_the_references_values_and_gradients(name, implementation):
    y, grads = results(name, "mixture", implementation)
    right, right_grads = results(name, "reference_mixture")
    np.testing.assert_allclose(y, right, atol=1e-5 * np.abs(right).max())
    assert jax.tree.structure(grads) == jax.tree.structure(right_grads)
    for ours, wanted in zip(*map(jax.tree.leaves, (grads, right_grads)), strict=True):
        # f32 sums in another order.
        np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("normalize", [True, False])
def test_route_is_the_definition(normalize):
    logits = 3 * normal(1, 4, 9, 16)
    weights, experts = moe.route(jnp.asarray(logits), 3, normalize)
    for place in np.ndindex(4, 9):
        shares, chosen = route_by_definition(logits[place], 3, normalize)
        assert experts[place].tolist() == chosen.tolist()
        np.testing.assert_allclose(weights[place], shares, rtol=1e-5)
    assert experts.dtype == jnp.int32 and weights.dtype == jnp.float32


def test_equal_logits_and_huge_ones():
    weights, experts = moe.route(jnp.full((1, 4), 1e30), 2, True)
    assert experts.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]


SIZES = {
    "uneven": (1, 300, 0, 17),
    "one row": (0, 0, 0, 1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", grouped_matmul.IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", slow_but(["uneven"], SIZES))
def test_grouped_matmuls(sizes, implementation, dtype):
    """Results have x's dtype, sums f32, and gradients the parameter's dtype."""
    counts = SIZES[sizes]
    M, groups = sum(counts), np.repeat(range(4), counts)
    x = jnp.asarray(normal(1, M, 12)).astype(dtype)
    g = jnp.asarray(normal(2, M, 20)).astype(dtype)
    w = jnp.asarray(normal(3, 4, 12, 20))
    function = partial(grouped_matmul.grouped_matmul, implementation=implementation)
    y, pull = jax.vjp(lambda x, w: function(x, w, jnp.asarray(counts)), x, w)
    dx, dw = pull(g)
    assert y.dtype == dx.dtype == dtype and dw.dtype == jnp.float32
    x64, g64, w64 = (np.float64(a) for a in (x, g, w.astype(dtype)))
    near = dict(rtol=2**-8, atol=1e-3) if dtype == jnp.bfloat16 else dict(atol=2e-5)
    right = np.stack([x64[i] @ w64[e] for i, e in enumerate(groups)])
    np.testing.assert_allclose(np.float64(y), right, **near)
    right = np.stack([w64[e] @ g64[i] for i, e in enumerate(groups)])
    np.testing.assert_allclose(np.float64(dx), right, **near)
    right = np.stack([x64[groups == e].T @ g64[groups == e] for e in range(4)])
    np.testing.assert_allclose(dw, right, rtol=1e-5, atol=1e-4)


def test_experts_that_no_token_takes_are_not_computed():
    """Decoding reads only the matrices it needs: NaN in others has no effect."""
    case = CASES["one token"]
    x, logits, w = inputs_of(case)
    _, experts = moe.route(jnp.asarray(logits), case.k, True)
    for value in w.values():
        value[np.setdiff1d(range(E), experts)] = np.nan
    # Biases are added by an einsum with zeros and ones.
    w = {name: value for name, value in w.items() if "bias" not in name}
    case = dataclasses.replace(case, bias=False)
    assert np.isfinite(run(case, moe.mixture, x, logits, w)).all()
    assert np.isnan(run(case, moe.reference_mixture, x, logits, w)).any()


@pytest.mark.slow
def test_vmap():
    case = CASES["biases"]
    x, logits, w = inputs_of(case)
    call = partial(run, case, moe.mixture)
    y = jax.jit(jax.vmap(lambda x, z: call(x[None], z[None], w)[0]))(x, logits)
    np.testing.assert_allclose(y, call(x, logits, w), atol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_close():
    x, logits, w = inputs_of(CASES["biases"])
    right = run(CASES["biases"], moe.mixture, x, logits, w)
    y = run(CASES["biases"], moe.mixture, jnp.asarray(x, jnp.bfloat16), logits, w)
    assert y.dtype == jnp.bfloat16
    assert 0 < np.abs(y - right).max() < 0.03 * np.abs(right).max()


def test_on_a_mesh_of_one_device_the_result_is_the_same():
    """Other meshes are in tests/multi_device."""
    case = CASES["biases"]
    arguments = inputs_of(case)
    mesh = jax.make_mesh((1,) * len(AXES), AXES)
    with jax.set_mesh(mesh):
        y = jax.jit(partial(run, case, moe.mixture))(*arguments)
    np.testing.assert_allclose(y, results("biases", "mixture")[0], atol=1e-4)


def balance(logits, k, token_weights):
    """Equations 4 to 6 of the Switch paper, token by token."""
    total, choices, probability = 0.0, np.zeros(E), np.zeros(E)
    token_weights = np.float64(token_weights)
    for layer in np.float64(logits):
        for place in np.ndindex(layer.shape[:2]):
            p = np.exp(layer[place])
            _, chosen = route_by_definition(layer[place], k, True)
            choices[chosen] += token_weights[place]
            probability += token_weights[place] * p / p.sum()
            total += token_weights[place]
    return E * (choices * probability).sum() / total**2


def test_load_balance_loss():
    logits = jnp.asarray(normal(1, 3, 2, 7, E))
    token_weights = jnp.abs(normal(2, 2, 7)).at[0, :3].set(0.0)
    _, experts = moe.route(logits, 2, True)
    ours = moe.load_balance_loss(logits, experts, token_weights)
    assert ours == pytest.approx(balance(logits, 2, token_weights), rel=1e-5)
    # One layer is not a special case.
    ours = moe.load_balance_loss(logits[0], experts[0], token_weights)
    assert ours == pytest.approx(balance(logits[:1], 2, token_weights), rel=1e-5)
    assert moe.load_balance_loss(logits, experts, 0 * token_weights) == 0


@pytest.mark.slow
def test_an_even_load_has_the_least_loss():
    """It is k if all are chosen equally often, and up to E if one always is."""
    even = 1e-3 * np.eye(E, dtype=np.float32)[None]
    ones = jnp.ones((1, E))

    def loss(logits, k):
        return moe.load_balance_loss(logits, moe.route(logits, k, True)[1], ones)

    assert loss(jnp.asarray(even), 1) == pytest.approx(1, abs=1e-3)
    one = np.zeros((1, E, E), np.float32)
    one[..., 2] = 20.0
    assert loss(jnp.asarray(one), 1) == pytest.approx(E, rel=1e-3)
    # Against the gradient, the logit of the crowded expert falls.
    grad = jax.grad(loss)(jnp.asarray(one / 10), 1)
    assert (grad[..., 2] > 0).all() and (grad[..., :2] < 0).all()


def test_a_tpu_gets_its_own_instruction():
    """There are three: the result and both gradients. Only lowered, without a TPU."""
    x, w, sizes = normal(1, 16, 8), normal(2, 4, 8, 12), np.array([1, 7, 0, 8])

    def total(x, w):
        y = grouped_matmul.grouped_matmul(
            x, w, jnp.asarray(sizes), implementation="ragged_dot"
        )
        return jnp.sum(jnp.square(y))

    traced = jax.jit(jax.grad(total, (0, 1))).trace(x, w)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count('"chlo.ragged_dot"(') == 3


def test_parts_of_the_experts_add_up_to_all():
    """As when experts lie on several devices: values, and gradients of the tokens."""
    case = CASES["biases"]
    x, logits, w = jax.tree.map(jnp.asarray, inputs_of(case))
    w = {name: matrix for name, matrix in w.items() if name != "down_bias"}
    weights, experts = moe.route(logits, case.k, case.normalize)

    def part(x, first, end):
        cut = {name: matrix[first:end] for name, matrix in w.items()}
        return moe._sorted_mixture(
            case.activation, x, weights, experts - first, cut, only_own=True
        )

    def parts(x):
        return part(x, 0, 2) + part(x, 2, E)

    def whole(x):
        return moe._sorted_mixture(case.activation, x, weights, experts, w)

    g = jnp.asarray(normal(52, *x.shape))

    def both(function):
        y, backward = jax.vjp(function, x)
        return y, *backward(g)

    y, dx = jax.jit(lambda: both(parts))()
    wanted, wanted_dx = jax.jit(lambda: both(whole))()
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    np.testing.assert_allclose(
        dx, wanted_dx, atol=1e-5 * float(jnp.abs(wanted_dx).max())
    )
