"""Block sizes are measured, recorded and used."""

import contextlib
import importlib
import json
import threading

import jax
import jax.numpy as jnp
import pytest

from jaxlm.cli import main
from jaxlm.files.durable import replacing
from jaxlm.ops.attention import dense
from jaxlm.ops.attention.tuning.tuning import TUNABLE, tune
from jaxlm.ops.attention.tuning.tuning_cache import (
    measured,
    record,
    settings_file,
    settings_key,
)

SMALL = {"batch": 1, "length": 256, "heads": 2, "kv_heads": 1, "head_dim": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_fastest_is_kept_and_used(monkeypatch):
    q = jnp.zeros((1, 256, 2, 8))
    assert dense.settings_for(q) == dense.DenseSettings()
    seconds = {64: 3.0, 128: 2.0, 256: 1.0, 512: 4.0, 1024: 5.0}
    monkeypatch.setattr(
        "jaxlm.ops.attention.tuning.tuning._seconds", lambda *a: seconds[a[-1].block]
    )
    lines = list(tune("dense", **SMALL, dtype=jnp.float32))
    assert len(lines) == len(seconds) + 1
    assert "dense backward [3/5] block 256: 1000.000 ms" in lines[2]
    assert "block 256 is the fastest" in lines[-1]
    assert dense.settings_for(q) == dense.DenseSettings(256)
    # A measurement holds only for its head_dim and dtype.
    assert dense.settings_for(q.astype(jnp.bfloat16)) == dense.DenseSettings()
    assert dense.settings_for(jnp.zeros((1, 256, 2, 16))) == dense.DenseSettings()


def test_what_does_not_compile_is_passed_over(monkeypatch):
    """The compilers of TPUs and GPUs raise these two where memory does not suffice."""
    errors = {128: ValueError("smem"), 512: jax.errors.JaxRuntimeError("vmem\nmore")}

    def seconds(*arguments):
        block = arguments[-1].block
        if block in errors:
            raise errors[block]
        return 1 / block

    monkeypatch.setattr("jaxlm.ops.attention.tuning.tuning._seconds", seconds)
    lines = list(tune("dense", **SMALL, dtype=jnp.float32))
    assert lines[1].endswith("block 128: does not compile: smem")
    assert lines[3].endswith("block 512: does not compile: vmem")
    assert "block 1024 is the fastest" in lines[-1]
    errors |= dict.fromkeys((64, 256, 1024), ValueError("smem"))
    with pytest.raises(
        ValueError, match="'dense': no candidate compiles on this device"
    ):
        list(tune("dense", **SMALL, dtype=jnp.float32))


@pytest.mark.slow
def test_the_command_measures(capsys):
    flags = ["--length", "64", "--heads", "2", "--kv-heads", "1", "--head-dim", "8"]
    main(["tune", "attention", "--implementation", "dense", "--batch", "1", *flags])
    out = capsys.readouterr().out
    assert out.count(" ms\n") == 5
    kept = json.loads(settings_file().read_text())
    assert [list(fields) for fields in kept.values()] == [["block"]]
    assert str(settings_file()) in out


def test_wrong_input_is_one_line():
    with pytest.raises(ValueError, match=r"no block sizes to tune in 'dens' .*'dense'"):
        list(tune("dens", **SMALL, dtype=jnp.float32))
    with pytest.raises(ValueError, match="'pallas_tpu': needs a TPU"):
        list(tune("pallas_tpu", **SMALL, dtype=jnp.float32))
    with pytest.raises(ValueError, match="kv_heads 3 does not divide heads 4"):
        list(tune(None, **SMALL | {"heads": 4, "kv_heads": 3}, dtype=jnp.float32))
    with pytest.raises(ValueError, match="length is 0"):
        list(tune(None, **SMALL | {"length": 0}, dtype=jnp.float32))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"KEY": {"size": 1}}', '{"KEY": {"block": 0}}', '{"KEY": 3}']
)
def test_a_damaged_file_is_named(text):
    q = jnp.zeros((1, 256, 2, 8))
    key = settings_key("dense", q)
    record(key, dense.DenseSettings(64), ("block",))
    settings_file().write_text(text.replace("KEY", key))
    with pytest.raises(ValueError, match=r"attention\.json: .*jaxlm tune attention"):
        dense.settings_for(q)


def test_two_that_record_at_once_keep_what_the_other_has_measured(monkeypatch):
    other = threading.Thread(
        target=record, args=("b", dense.DenseSettings(128), ("block",))
    )

    @contextlib.contextmanager
    def slow(path):
        if threading.current_thread() is not other:
            other.start()
            other.join(0.2)  # It would have ended by then.
        with replacing(path) as file:
            yield file

    module = "jaxlm.ops.attention.tuning.tuning_cache.replacing"
    monkeypatch.setattr(module, slow)
    record("a", dense.DenseSettings(64), ("block",))
    other.join()
    assert set(json.loads(settings_file().read_text())) == {"a", "b"}


def test_groups_name_fields_that_exist():
    q = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
    for name, (module, groups) in TUNABLE.items():
        settings = importlib.import_module(module).settings_for(q)
        for group in groups:
            assert all(hasattr(settings, field) for field in group.fields), name
    assert measured("nothing", dense.DenseSettings()) == dense.DenseSettings()
