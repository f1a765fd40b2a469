"""Which implementation of attention runs, and what it says."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal

from jaxlm.config import AttentionName
from jaxlm.ops.attention import dispatch
from jaxlm.ops.attention.dispatch import (
    AUTO,
    IMPLEMENTATIONS,
    PROVEN,
    Implementation,
    attention,
    choose,
)
from jaxlm.ops.attention.request import Request, request, target
from jaxlm.ops.attention.spec import AttentionSpec, quantize, reference_attention

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SPEC = AttentionSpec(scale=0.3)


def inputs(T=16, S=16, dtype=jnp.float32):
    shapes = ((2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 8))
    return [jnp.asarray(normal(i, *s), dtype) for i, s in enumerate(shapes)]


def asked(platform="cpu", kind="cpu", **changes) -> Request:
    q, k, _ = inputs()
    plain = request(q, k, SPEC)
    sizes = {"num_queries": 1024, "num_keys": 1024, "head_dim": 128, "num_heads": 8}
    sizes |= {"dtype": jnp.dtype(jnp.bfloat16)} if platform != "cpu" else {}
    return dataclasses.replace(
        plain, platform=platform, device_kind=kind, **sizes | changes
    )


def test_cpu_takes_the_measured_form_and_never_a_kernel():
    for length, name in ((128, "dense"), (1024, "dense"), (2048, "xla")):
        size = {"num_queries": length, "num_keys": length}
        assert choose("auto", asked(**size)).name == name
    # What dense cannot do.
    for length, name in ((128, "reference"), (256, "xla"), (2048, "xla")):
        size = {"num_queries": length, "num_keys": length}
        assert choose("auto", asked(**size, soft_cap=50.0)).name == name
    # One query has one row of scores.
    assert choose("auto", asked(num_queries=1, num_keys=10**8)).name == "reference"
    choice = choose("auto", asked())
    reasons = dict(choice.declined)
    for kernel in ("pallas_tpu", "splash"):
        assert reasons[kernel] == "needs a TPU"
    for kernel in ("pallas_gpu", "mosaic_gpu", "cudnn"):
        assert reasons[kernel] == "needs a GPU"


@pytest.mark.parametrize(
    "platform, kind, stock",
    [
        ("tpu", "TPU v5 lite", "splash"),
        ("gpu", "NVIDIA H100 80GB HBM3", "cudnn"),
    ],
)
def test_an_unproven_kernel_is_named_but_not_chosen(monkeypatch, platform, kind, stock):
    ours = f"pallas_{platform}"
    monkeypatch.setitem(PROVEN, ours, frozenset())
    call = asked(platform, kind)
    choice = choose("auto", call)
    assert choice.name == stock
    assert f"{ours}: not proven on a {kind} yet" in str(choice)
    assert choose(ours, call).name == ours
    monkeypatch.setitem(PROVEN, ours, frozenset({kind}))
    assert choose("auto", call).name == ours
    # What the stock kernel cannot do falls to XLA, and is said.
    monkeypatch.setitem(PROVEN, ours, frozenset())
    choice = choose("auto", asked(platform, kind, query_index=True))
    assert choice.name == "xla"
    assert f"{stock}: " in str(choice)


def test_kernels_decline_a_mesh_that_xla_cuts(monkeypatch):
    monkeypatch.setitem(PROVEN, "pallas_tpu", frozenset({"TPU v5 lite"}))
    device = jax.sharding.AbstractDevice(
        device_kind="TPU v5 lite", num_cores=1, platform="tpu"
    )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("x",), auto, abstract_device=device)
    q, k, _ = inputs(2048, 2048)
    with jax.sharding.use_abstract_mesh(mesh):
        choice = choose("auto", request(q, k, SPEC))
    assert choice.name == "xla"
    assert "pallas_tpu, splash: XLA cannot cut a kernel over Auto" in str(choice)


def test_what_is_proven_has_a_record():
    for name, kinds in PROVEN.items():
        for kind in kinds:
            file = RESULTS / f"check_{kind.replace(' ', '_')}.json"
            record = json.loads(file.read_text())
            assert record["device"] == kind and record["tests_passed"], name


def test_named_it_runs_or_raises():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"no attention implementation 'xl'.*xla"):
        attention(q, k, v, SPEC, implementation="xl")
    with pytest.raises(ValueError, match=r"'dense': has no soft cap; .*reference, xla"):
        capped = AttentionSpec(scale=1.0, soft_cap=5.0)
        attention(q, k, v, capped, implementation="dense")
    with pytest.raises(ValueError, match="'pallas_tpu': needs a TPU"):
        attention(q, k, v, SPEC, implementation="pallas_tpu")


def test_dispatch_runs_what_is_named(monkeypatch):
    calls = []
    names = list(IMPLEMENTATIONS)
    for name in names:
        fake = Implementation(
            lambda q, k, v, spec, n=name: (calls.append(n) or q, None)
        )
        monkeypatch.setitem(IMPLEMENTATIONS, name, fake)
    q, k, v = inputs()
    for name in names:
        attention(q, k, v, SPEC, implementation=name)
    assert calls == names


def test_auto_says_once_what_it_took(capsys):
    dispatch._say.cache_clear()
    q, k, v = inputs()
    for _ in range(2):
        attention(q, k, v, SPEC)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("attention on cpu: auto took dense; ")
    assert "pallas_tpu, splash: needs a TPU" in said[0]
    attention(q, k, v, SPEC, implementation="xla")
    assert capsys.readouterr().err == ""


def test_log_sum_exp_and_int8_through_the_dispatcher():
    q, k, v = inputs()
    expected = reference_attention(q, k, v, SPEC)
    for name in ("reference", "dense", "xla"):
        z, lse = attention(q, k, v, SPEC, implementation=name, return_lse=True)
        np.testing.assert_allclose(z, expected[0], atol=3e-6)
        np.testing.assert_allclose(lse, expected[1], atol=3e-6)
    (k8, key_scale), (v8, value_scale) = quantize(k), quantize(v)
    spec = dataclasses.replace(SPEC, key_scale=key_scale, value_scale=value_scale)
    expected, _ = reference_attention(q, k8, v8, spec)
    for name in ("dense", "xla"):
        z = attention(q, k8, v8, spec, implementation=name)
        np.testing.assert_allclose(z, expected, atol=3e-6)


def test_the_config_knows_the_names():
    names = get_args(AttentionName)
    assert names == ("auto", *IMPLEMENTATIONS)
    assert {name for order in AUTO.values() for name in order} <= set(names)


def test_the_target_is_the_mesh_in_use():
    assert target()[0] == jax.default_backend()
    kind = jax.devices()[0].device_kind
    device = jax.sharding.AbstractDevice(
        device_kind="TPU v6 lite", num_cores=1, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target() == ("tpu", "TPU v6 lite")
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        assert target()[1] == kind
