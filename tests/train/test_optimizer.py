"""Compares optimizers and schedules with formulas in float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks_case import slow_but
from toy_case import make_batch, make_params, toy

from jaxlm import tree
from jaxlm.config import OptimizerConfig, TrainConfig
from jaxlm.model.params import Role, weight_of
from jaxlm.train.optimizer import decay_mask, make_optimizer, make_schedule
from jaxlm.train.step import loss_and_grads

# Both kinds of norms, and biases, so that all kinds of leaves are present.
MODEL = toy(qk_norm="head", attention_bias=True, norm="layer", norm_bias=True)
PARAMS = make_params(MODEL)
NAMES = list(tree.flatten(PARAMS))
DECAYED = {
    *(f"layers/attn/{n}" for n in "qkvo"),
    *(f"layers/mlp/{n}" for n in ("gate", "up", "down")),
    "lm_head/kernel",
}
RATE, DECAY, STEPS = 0.02, 0.3, 3
ALL = ["adamw", "lion", "muon", "adafactor"]


def config(name, **changes):
    options = {"learning_rate": RATE, "weight_decay": DECAY, "clip_norm": None}
    options |= {"schedule": "constant", "warmup_steps": 0}
    return OptimizerConfig(name=name, **{**options, **changes})


def gradients(seed, scale=0.01):
    return jax.tree.map(lambda x: x * np.float32(scale), make_params(MODEL, seed))


def run(optimizer, params, grads):
    """Returns the parameters after each gradient, as float64 by name."""
    state, after = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        after.append({n: np.float64(x) for n, x in tree.flatten(params).items()})
    return after


def decayed_by(optimizer):
    # optax's AdamW inside muon has no mask, so its parameters are not decayed.
    return DECAYED - ({"lm_head/kernel"} if optimizer == "muon" else set())


def steps_in_numpy(rule, params, grads, decayed):
    """Does the same with `rule(name, gradient, memory, step) -> update` per leaf."""
    now = {n: np.float64(x) for n, x in tree.flatten(params).items()}
    memory, after = {n: {} for n in now}, []
    for step, g in enumerate(grads, start=1):
        flat = tree.flatten(g)
        for name in now:
            update = rule(name, np.float64(flat[name]), memory[name], step)
            decay = DECAY * now[name] if name in decayed else 0.0
            now[name] = now[name] - RATE * (update + decay)
        after.append(dict(now))
    return after


def adam(g, m, step, b1=0.9, b2=0.95, epsilon=1e-8, nesterov=False):
    m["mu"] = b1 * m.get("mu", 0) + (1 - b1) * g
    m["nu"] = b2 * m.get("nu", 0) + (1 - b2) * g**2
    mean = m["mu"] / (1 - b1**step)
    if nesterov:
        mean = b1 * m["mu"] / (1 - b1 ** (step + 1)) + (1 - b1) * g / (1 - b1**step)
    return mean / (np.sqrt(m["nu"] / (1 - b2**step)) + epsilon)


def lion(g, m, b1=0.9, b2=0.95):
    update = np.sign(b1 * m.get("mu", 0) + (1 - b1) * g)
    m["mu"] = b2 * m.get("mu", 0) + (1 - b2) * g
    return update


def adafactor(g, m, step):
    # No axis here has 128 entries, so nothing is factored.
    decay = 1 - step**-0.8
    m["v"] = decay * m.get("v", 0) + (1 - decay) * (g**2 + 1e-30)
    update = g / np.sqrt(m["v"])
    return update / max(1.0, np.sqrt(np.mean(update**2)))


def orthogonalized(x, coefficients=(3.4445, -4.7750, 2.0315)):
    """Five Newton-Schulz iterations on one matrix."""
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T).T
    x = x / (np.linalg.norm(x) + 1e-8)
    a, b, c = coefficients
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon(name, g, m, step, beta=0.95):
    m["mu"] = beta * m.get("mu", 0) + (1 - beta) * g
    mean = beta * m["mu"] / (1 - beta ** (step + 1))
    mean = mean + (1 - beta) * g / (1 - beta**step)
    layers, *_ = g.shape
    # q, k, v map from the width to heads; o maps from heads to the width.
    inputs = g.shape[1] * (g.shape[2] if name.endswith("/o") else 1)
    flat = mean.reshape(layers, inputs, -1)
    scale = math.sqrt(max(1.0, flat.shape[2] / inputs))
    return scale * np.stack([orthogonalized(x) for x in flat]).reshape(g.shape)


def is_matrix(name):
    return name in DECAYED - {"lm_head/kernel"}


def rule_of(optimizer):
    def rule(name, g, memory, step):
        if optimizer == "muon" and is_matrix(name):
            return muon(name, g, memory, step)
        if optimizer == "lion":
            return lion(g, memory)
        if optimizer == "adafactor":
            return adafactor(g, memory, step)
        return adam(g, memory, step, nesterov=optimizer == "muon")

    return rule


# That of optax shows what muon does to one matrix.
@pytest.mark.parametrize("optimizer", slow_but(["adamw", "lion", "adafactor"], ALL))
def test_three_steps_are_those_of_the_formula(optimizer):
    grads = [gradients(seed) for seed in (1, 2, 3)]
    after = run(make_optimizer(config(optimizer), STEPS), PARAMS, grads)
    expected = steps_in_numpy(rule_of(optimizer), PARAMS, grads, decayed_by(optimizer))
    for step in range(STEPS):
        for name in NAMES:
            moved = np.abs(
                expected[step][name] - np.float64(tree.flatten(PARAMS)[name])
            )
            # f32 against f64; a step is about the rate, 0.02. Seen: 2e-6 of it, and
            # 1e-4 in the five matmuls of Newton-Schulz.
            tolerance = RATE * (1e-3 if optimizer == "muon" else 1e-4)
            assert moved.max() > RATE / 10, name
            np.testing.assert_allclose(
                after[step][name], expected[step][name], atol=tolerance, err_msg=name
            )


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(2, 128, 160)).astype(np.float32)
    params = {"layers": {"mlp": {"up": np.zeros_like(g)}}}
    rule = make_optimizer(config("adafactor", weight_decay=0.0), STEPS)
    after = run(rule, params, [{"layers": {"mlp": {"up": g}}}])
    square = np.float64(g) ** 2
    rows, columns = square.mean(2, keepdims=True), square.mean(1, keepdims=True)
    update = g / np.sqrt(rows * columns / rows.mean(1, keepdims=True))
    update /= max(1.0, np.sqrt(np.mean(update**2)))
    np.testing.assert_allclose(
        after[0]["layers/mlp/up"], -RATE * update, atol=RATE * 1e-4
    )
    sizes = [x.size for x in jax.tree.leaves(rule.init(params)) if x.ndim]
    assert max(sizes) <= 2 * 160


def test_decay_is_on_these_leaves_and_no_others():
    assert {n for n, on in tree.flatten(decay_mask(PARAMS)).items() if on} == DECAYED
    tied = make_params(toy(tied_embeddings=True, position="learned"))
    on = {n for n, on in tree.flatten(decay_mask(tied)).items() if on}
    assert on == DECAYED - {"lm_head/kernel"}


@pytest.mark.parametrize("optimizer", ALL)
def test_without_a_gradient_only_decay_moves_a_weight(optimizer):
    """Decays towards zero by rate times decay, only where the mask is True."""
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    (after,) = run(make_optimizer(config(optimizer), STEPS), PARAMS, [zeros])
    decayed = decayed_by(optimizer)
    for name, before in tree.flatten(PARAMS).items():
        factor = 1 - RATE * DECAY if name in decayed else 1.0
        np.testing.assert_allclose(
            after[name], before * np.float64(factor), rtol=1e-6, err_msg=name
        )


def test_muon_makes_the_update_of_each_layer_nearly_orthogonal():
    grads = gradients(1)
    rule = make_optimizer(config("muon", weight_decay=0.0), STEPS)
    (after,) = run(rule, PARAMS, [grads])
    for name, before in tree.flatten(PARAMS).items():
        if not is_matrix(name):
            continue
        update = (np.float64(before) - after[name]) / RATE
        inputs = before.shape[1] * (before.shape[2] if name.endswith("/o") else 1)
        for matrix in update.reshape(before.shape[0], inputs, -1):
            scale = math.sqrt(max(1.0, matrix.shape[1] / matrix.shape[0]))
            values = np.linalg.svd(matrix / scale, compute_uv=False)
            # The iteration ends between 0.7 and 1.2 by design; a small singular
            # value of a square matrix may be left behind.
            assert values.max() < 1.3 and np.median(values) > 0.6, name


def test_muon_on_one_device_is_that_of_optax():
    """Bit for bit, with a state of the same tree: checkpoints of either resume."""

    def axes(path, leaf):
        weight = weight_of(path, leaf)
        if weight.role is Role.MATRIX:
            return optax.contrib.MuonDimensionNumbers(*weight.matrix_axes)
        return None

    ours = make_optimizer(config("muon"), STEPS)
    theirs = optax.contrib.muon(
        optax.constant_schedule(RATE),
        weight_decay=DECAY,
        adam_b2=config("muon").b2,
        adam_learning_rate=optax.constant_schedule(RATE),
        muon_weight_dimension_numbers=lambda p: tree.map_with_name(axes, p),
    )

    def updated(rule):
        state, g = rule.init(PARAMS), gradients(1)
        return tree.flatten(jax.jit(rule.update)(g, state, PARAMS))

    one, other = updated(ours), updated(theirs)
    assert list(one) == list(other)
    assert all((np.asarray(one[n]) == np.asarray(other[n])).all() for n in one)


def test_muon_treats_stacked_layers_one_by_one():
    grads = gradients(1)
    rule = make_optimizer(config("muon"), STEPS)
    (together,) = run(rule, PARAMS, [grads])
    for layer in range(MODEL.num_layers):

        def one(x, layer=layer):
            return x[layer : layer + 1]

        params = {**PARAMS, "layers": jax.tree.map(one, PARAMS["layers"])}
        part = {**grads, "layers": jax.tree.map(one, grads["layers"])}
        (alone,) = run(rule, params, [part])
        for name in filter(is_matrix, NAMES):
            np.testing.assert_allclose(
                alone[name][0], together[name][layer], atol=1e-6, err_msg=name
            )


EXPERTS = toy(
    num_experts=3, experts_per_token=2, feed_forward_bias=True, router_bias=True
)


def test_experts_and_their_router_decay_and_their_biases_do_not():
    on = {n for n, on in tree.flatten(decay_mask(make_params(EXPERTS))).items() if on}
    dense = {n for n in DECAYED if "/mlp/" not in n}
    assert on - dense == {f"layers/moe/{n}" for n in ("router", "gate", "up", "down")}


def test_muon_treats_experts_one_by_one():
    """Each expert is updated like the feed-forward of a separate layer."""
    params, grads = (
        {n: make_params(EXPERTS, seed)["layers"]["moe"][n] for n in ("up", "down")}
        for seed in (1, 2)
    )
    rule = make_optimizer(config("muon"), STEPS)

    def after(kind, shape):
        start, slope = (
            {"layers": {kind: {n: shape(x) for n, x in tree.items()}}}
            for tree in (params, grads)
        )
        (moved,) = run(rule, start, [slope])
        return list(moved.values())

    experts = after("moe", lambda x: x)
    layers = after("mlp", lambda x: x.reshape(-1, *x.shape[2:]))
    for ours, right in zip(experts, layers, strict=True):
        np.testing.assert_allclose(ours.reshape(right.shape), right, atol=1e-6)


def test_muon_has_a_rate_of_its_own_for_adam():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    rule = make_optimizer(config("muon", adam_learning_rate=0.001), STEPS)
    grads = jax.tree.map(np.ones_like, PARAMS)
    (after,) = run(rule, zeros, [grads])
    # Adam's first step is the rate itself, with Nesterov's momentum 1.47 times it.
    expected = -0.001 * (0.9 * 0.1 / (1 - 0.9**2) + 1)
    np.testing.assert_allclose(after["embed/table"], expected, rtol=1e-3)
    # A matrix of ones has one direction: each of 256 entries is about 1/16.
    assert np.abs(after["layers/attn/q"]).max() > 0.2 * RATE / 16


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_clipping(norm):
    grads = gradients(1, scale=1.0)
    total = math.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    assert 0.5 < total < 1e6
    # Lion's moments show the clipped gradient: (1 - b2) of it.
    rule = make_optimizer(config("lion", clip_norm=norm), STEPS)
    _, state = jax.jit(rule.update)(grads, rule.init(PARAMS), PARAMS)
    (mu,) = (x for n, x in tree.flatten(state).items() if n.endswith("mu/embed/table"))
    expected = 0.05 * grads["embed"]["table"] * min(1.0, norm / total)
    np.testing.assert_allclose(mu, expected, rtol=1e-4, atol=1e-9)


PEAK, TOTAL, WARM = 0.5, 100, 10


def closed_form(schedule, step, warm=WARM, final=0.1, fraction=0.2):
    """Computes the rate of a step, from 0, by the papers' formulas."""
    if step < warm:
        return PEAK * (step + 1) / warm
    done = (step - warm) / (TOTAL - warm)
    if schedule == "cosine":
        return PEAK * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == "linear":
        return PEAK * (1 - (1 - final) * done)
    if schedule == "wsd":
        span = round(fraction * TOTAL)
        return PEAK * (1 - (1 - final) * max(0, step - (TOTAL - span)) / span)
    return PEAK


@pytest.mark.parametrize("warm", [0, 1, 2, WARM])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_are_their_closed_forms_at_every_step(schedule, warm):
    options = {"schedule": schedule, "warmup_steps": warm, "learning_rate": PEAK}
    rate = jax.vmap(make_schedule(OptimizerConfig(**options), TOTAL, PEAK))
    rates = np.asarray(rate(jnp.arange(TOTAL)))
    expected = [closed_form(schedule, step, warm) for step in range(TOTAL)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    # The edges: the first step learns, and the warm-up ends at the peak.
    assert rates[0] == pytest.approx(PEAK / max(warm, 1))
    assert rates[max(warm - 1, 0)] == pytest.approx(PEAK)
    if schedule == "wsd":
        assert rates[80] == pytest.approx(PEAK) and rates[81] < PEAK
    if schedule != "constant":
        # One step before the end of the decay.
        assert 0.1 * PEAK < rates[-1] < 0.15 * PEAK


@pytest.mark.parametrize("fraction, warm", [(0.0, 0), (1.0, 10), (0.95, 50)])
def test_wsd_decays_over_what_is_left(fraction, warm):
    options = {"schedule": "wsd", "decay_fraction": fraction, "warmup_steps": warm}
    rate = make_schedule(OptimizerConfig(**options), TOTAL, PEAK)
    rates = np.array([float(rate(step)) for step in range(TOTAL)])
    assert rates.max() == pytest.approx(PEAK) and (rates > 0).all()
    falls = np.flatnonzero(np.diff(rates) < 0)
    expected = min(max(round(fraction * TOTAL), 1), TOTAL - warm)
    assert len(falls) == expected - 1


def test_a_run_of_one_step_and_a_warm_up_of_all_steps():
    for steps, warm in ((1, 0), (1, 1), (5, 5)):
        for schedule in ("cosine", "linear", "wsd", "constant"):
            options = {"schedule": schedule, "warmup_steps": warm}
            rate = make_schedule(OptimizerConfig(**options), steps, PEAK)
            rates = [float(rate(step)) for step in range(steps)]
            assert all(0 < r <= PEAK * 1.0001 for r in rates)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ALL)
def test_every_optimizer_lowers_the_loss(optimizer, losses_of):
    losses = losses_of(optimizer)
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def losses_of():
    batch = make_batch(MODEL, 4, 16)
    gradient = jax.jit(lambda p: loss_and_grads(MODEL, TrainConfig(), p, batch)[:2])

    def losses(name):
        rule = make_optimizer(config(name, weight_decay=0.0, clip_norm=1.0), 30)
        params = make_params(MODEL)
        state, values, update = rule.init(params), [], jax.jit(rule.update)
        for _ in range(30):
            loss, grads = gradient(params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            values.append(float(loss))
        return values

    return losses
