"""The choice of an attention implementation, and what it logs."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal, plain_request

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
from jaxlm.ops.attention.reference import reference_attention
from jaxlm.ops.attention.request import (
    AttentionRequest,
    request,
    request_of_sizes,
    target,
)
from jaxlm.ops.attention.spec import AttentionSpec, Mask, quantize

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SPEC = AttentionSpec(scale=0.3)


def inputs(T=16, S=16, dtype=jnp.float32):
    shapes = ((2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 8))
    return [jnp.asarray(normal(i, *s), dtype) for i, s in enumerate(shapes)]


def make_request(platform="cpu", kind="cpu", **changes) -> AttentionRequest:
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    changes = {"head_dim": 128, "num_heads": 8, "dtype": dtype, **changes}
    return plain_request(platform=platform, device_kind=kind, **changes)


def test_cpu_takes_the_measured_form_and_never_a_kernel():
    for length, name in ((128, "dense"), (1024, "dense"), (2048, "xla")):
        size = {"num_queries": length, "num_keys": length}
        assert choose("auto", make_request(**size)).name == name
    # What dense declines.
    for length, name in ((128, "reference"), (256, "xla"), (2048, "xla")):
        size = {"num_queries": length, "num_keys": length}
        assert choose("auto", make_request(**size, soft_cap=50.0)).name == name
    # The work for a cache follows the tokens in it.
    for queries, name in ((1, "cached"), (16, "cached"), (17, "dense")):
        size = {"num_queries": queries, "num_keys": 1000, "query_positions": True}
        assert choose("auto", make_request(**size)).name == name
    # One query has one row of scores.
    assert (
        choose("auto", make_request(num_queries=1, num_keys=10**8)).name == "reference"
    )
    choice = choose("auto", make_request())
    reasons = dict(choice.declined)
    for kernel in ("pallas_tpu", "splash"):
        assert reasons[kernel] == "needs a TPU"
    for kernel in ("pallas_gpu", "cudnn"):
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
    call = make_request(platform, kind)
    choice = choose("auto", call)
    assert choice.name == stock
    assert f"{ours}: not proven on {kind} yet" in str(choice)
    assert choose(ours, call).name == ours
    monkeypatch.setitem(PROVEN, ours, frozenset({kind}))
    assert choose("auto", call).name == ours
    # What the stock kernel declines goes to XLA, with the reason.
    monkeypatch.setitem(PROVEN, ours, frozenset())
    choice = choose("auto", make_request(platform, kind, query_positions=True))
    assert choice.name == "xla"
    assert f"{stock}: " in str(choice)


def test_kernels_decline_a_mesh_that_xla_shards(monkeypatch):
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
    assert "pallas_tpu, splash: XLA cannot shard a kernel over Auto" in str(choice)


def test_what_is_proven_has_a_record():
    for name, kinds in PROVEN.items():
        for kind in kinds:
            file = RESULTS / f"check_{kind.replace(' ', '_')}.json"
            record = json.loads(file.read_text())
            assert record["device"] == kind
            # Each kind of its kernels.
            tested = {x for x in record["results"] if x.partition(",")[0] == name}
            # Wide heads, which failed there, have had plain backward kernels since.
            wide = record["results"].get("pallas_gpu, specialized backward", {})
            failed = {label for label, found in wide.items() if not found["passed"]}
            assert failed == {"head_dim 256: causal"}
            tested.remove("pallas_gpu, specialized backward")
            assert tested and tested <= set(record["licensed"])


def test_named_it_runs_or_raises():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"no attention implementation 'xl'.*xla"):
        attention(q, k, v, SPEC, implementation="xl")
    capped = AttentionSpec(1.0, soft_cap=5.0)
    with pytest.raises(ValueError, match=r"'dense': has no soft cap; .*reference, xla"):
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


def test_the_choice_is_logged_once(caplog, capfd):
    """At INFO, which is not shown by default."""
    caplog.set_level(logging.INFO, dispatch.__name__)
    dispatch._log_once.cache_clear()
    q, k, v = inputs()
    for _ in range(2):
        attention(q, k, v, SPEC)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.message.startswith("attention on cpu: auto took dense; ")
    assert "pallas_tpu, splash: needs a TPU" in record.message
    attention(q, k, v, SPEC, implementation="xla")
    assert len(caplog.records) == 1
    assert capfd.readouterr() == ("", "")


def test_a_warning_where_an_accelerator_has_no_kernel_for_long_rows(
    monkeypatch, caplog
):
    h200 = ("gpu", "NVIDIA H200")
    # Training batches have segments.
    choice = choose("auto", make_request(*h200, segments=True))
    assert choice.name == "xla"
    assert choice.warning.startswith("long sequences run in xla, which is slower than")
    assert "cudnn: no segments" in choice.warning
    assert "pallas_gpu: not proven on NVIDIA H200" in choice.warning
    assert "--model.attention" in choice.warning and "splash" not in choice.warning
    # No warning if a kernel runs, for one query, for short sequences, on a CPU, or if the
    # implementation was requested by name.
    assert choose("auto", make_request(*h200)).warning is None
    one = make_request(*h200, num_queries=1, query_positions=True)
    assert choose("auto", one).warning is None
    short = make_request(*h200, num_queries=256, num_keys=256, segments=True)
    assert choose("auto", short).warning is None
    assert choose("auto", make_request(segments=True)).warning is None
    assert choose("xla", make_request(*h200, segments=True)).warning is None
    # Calls log the warning once.
    monkeypatch.setattr(
        dispatch, "request", lambda *a, **k: make_request(*h200, segments=True)
    )
    dispatch._log_once.cache_clear()
    q, k, v = inputs()
    for _ in range(2):
        attention(q, k, v, SPEC)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and choice.warning in record.message


def test_a_request_from_sizes_is_that_of_the_call():
    shapes = ((2, 8, 4, 16), (2, 24, 2, 16))
    q, k = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    sizes = {"batch": 2, "num_queries": 8, "num_keys": 24, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 16, "dtype": jnp.bfloat16}
    ids = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 24), jnp.int32)
    mask = Mask(window=5, query_segments=ids[0], key_segments=ids[1])
    spec = AttentionSpec(16**-0.5, mask, sinks=jnp.zeros(4))
    made = request_of_sizes(**sizes, window=5, segments=True, sinks=True, lse=True)
    assert made == request(q, k, spec, lse=True)
    spec = AttentionSpec(16**-0.5, Mask(query_positions=ids[0]), soft_cap=3.0)
    made = request_of_sizes(**sizes, query_positions=True, soft_cap=3.0)
    assert made == request(q, k, spec)


@pytest.mark.slow
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
        z, _ = attention(q, k8, v8, spec, implementation=name)
        np.testing.assert_allclose(z, expected, atol=3e-6)
    mask = Mask(query_positions=jnp.arange(16)[None])
    spec = dataclasses.replace(spec, mask=mask)
    z, _ = attention(q, k8, v8, spec, implementation="cached")
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


def test_no_training_above_256_tokens_falls_to_the_reference():
    """On proven devices and on others, whatever the mask, even where kernels decline."""
    devices = [("tpu", "TPU v5 lite"), ("tpu", "TPU v5"), ("tpu", "TPU v6 lite")]
    devices += [("gpu", "NVIDIA H100 80GB HBM3"), ("gpu", "NVIDIA H200")]
    devices += [("gpu", "NVIDIA A100-SXM4-80GB"), ("cpu", "cpu")]
    options = [{}, {"window": 100}, {"sinks": True}, {"soft_cap": 50.0}, {"lse": True}]
    options += [{"segments": True, **option} for option in options]
    options += [{"dtype": jnp.float32}, {"head_dim": 640}, {"segments": True}]
    for (platform, kind), option in itertools.product(devices, options):
        for length in (257, 300, 1000, 4096, 32768):
            size = {"num_queries": length, "num_keys": length, **option}
            choice = choose("auto", make_request(platform, kind, **size))
            assert choice.name != "reference", (kind, option, length)


def test_the_page_has_the_table_that_was_read_from_compiled_programs():
    results = json.loads((RESULTS / "attention_choice.json").read_text())["devices"]
    page = (RESULTS.parents[1] / "docs" / "attention.md").read_text()
    assert "| | " + " | ".join(results) + " |" in page
    for name in results["H100"]["runs"]:
        took = [kind["runs"][name] for kind in results.values()]
        assert f"{name} | " + " | ".join(f"`{x}`" for x in took) + " |" in page
        assert "reference" not in took or name == "decode"
