"""With all nodes kept nothing is unexplained: flows are conserved at every node."""

import jax
import numpy as np
import pytest
from model_case import ids, make, small

from jaxlm.interp.causes.attribution_graph import attribution_graph
from jaxlm.interp.causes.logit_attribution import logit_direction
from jaxlm.model.transformer import forward

T = 3
# Parallel blocks with a bias-free LayerNorm, learned positions and no gate.
PARALLEL = small(
    norm="layer",
    position="learned",
    parallel_block=True,
    gated=False,
    activation="relu",
    hidden_dim=8,
)
CLAMPED = small(num_layers=1, activation="swiglu_clamped", hidden_dim=8)
MODELS = {
    "plain": small(norm="rms_unit_offset", hidden_dim=8),
    "parallel": PARALLEL,
    "clamped": CLAMPED,
}


def graph_of(name, count):
    """The graph, and the logit that it explains."""
    config, params = make(MODELS[name])
    if name == "clamped":
        params["layers"]["mlp"]["up"] *= 12

    @jax.jit
    def run(params):
        direction = logit_direction(config, params, 5, against=9)
        logits = forward(config, params, ids(1, T)).logits[0, -1]
        return (
            attribution_graph(config, params, ids(1, T), direction, count=count),
            logits[5] - logits[9],
        )

    return run(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "parallel"])
def test_flows_are_conserved(name):
    """A relu is linear where it is: without a bias it is explained too."""
    everything = T + 2 * T * 6 + 2 * T * 8
    graph, logit = graph_of(name, everything)
    scale = np.abs(graph.parts).max()
    np.testing.assert_allclose(graph.logit, logit, rtol=1e-4)
    np.testing.assert_allclose(graph.logit_edges.sum(), logit, atol=1e-4 * scale)
    tokens = graph.kinds == 0
    assert tokens.sum() == T
    np.testing.assert_allclose(graph.parts[tokens].sum(), logit, atol=1e-4 * scale)
    # Into each node flows its part, and out of it too.
    inflow, outflow = graph.edges.sum(0), graph.edges.sum(1) + graph.logit_edges
    inner = ~np.asarray(tokens)
    np.testing.assert_allclose(inflow[inner], graph.parts[inner], atol=1e-4 * scale)
    np.testing.assert_allclose(outflow, graph.parts, atol=1e-4 * scale)
    assert abs(graph.unexplained_logit) < 1e-3
    large = inner & (np.abs(graph.parts) > 0.01 * scale)
    assert np.abs(graph.unexplained[large]).max() < 0.01


@pytest.mark.slow
def test_a_clamped_unit_reads_nothing():
    """About half of the units are clamped; flows still leave each node whole."""
    graph, _ = graph_of("clamped", T + T * 6 + T * 8)
    outflow = graph.edges.sum(1) + graph.logit_edges
    scale = np.abs(graph.parts).max()
    np.testing.assert_allclose(outflow, graph.parts, atol=1e-4 * scale)
    units = np.asarray(graph.kinds) == 2
    clamped = (np.asarray(graph.edges)[:, units] == 0).all(axis=0)
    assert 0 < clamped.sum() < units.sum()


@pytest.mark.slow
def test_what_is_left_out_is_said():
    graph, logit = graph_of("plain", 20)
    assert (np.diff(3 * graph.layers + graph.kinds) >= 0).all()
    missing = float(1 - graph.logit_edges.sum() / logit)
    assert float(graph.unexplained_logit) == pytest.approx(missing, abs=1e-4)
    assert abs(graph.unexplained_logit) > 0.01


def test_some_models_are_refused():
    config, params = make(small(norm_placement="both"))
    with pytest.raises(ValueError, match="take logit_attribution"):
        attribution_graph(config, params, ids(1, T), params["embed"]["table"][0])
