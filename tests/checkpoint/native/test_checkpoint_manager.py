"""Saving, restoring, deleting and loading of checkpoints."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_case import (
    CONFIG,
    abstract,
    adamw_masked,
    restore,
    run_child,
    run_with_steps,
    save,
    state_of_step,
    two_optimizers,
    updated_state,
)

from jaxlm.checkpoint.load import load, load_tokenizer
from jaxlm.checkpoint.native import run_folder, step_folder
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.integrity import state_hash
from jaxlm.checkpoint.native.run_folder import find_runs, list_steps
from jaxlm.checkpoint.native.save_error import StateNotFinite
from jaxlm.checkpoint.native.step_folder import NoUsableCheckpoint
from jaxlm.config import TrainConfig
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer


def lines():
    collected = []
    return collected, collected.append


@pytest.mark.parametrize("optimizer", [adamw_masked, two_optimizers])
def test_round_trip_is_exact_and_keeps_the_structure(tmp_path, optimizer):
    state = updated_state(optimizer())
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 7, state)
        restored = restore(checkpoints, abstract(state))
    back = (restored.params, restored.opt_state)
    assert restored.step == 7
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert state_hash(back) == state_hash(state)
    leaves = zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True)
    for a, b in leaves:
        assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def test_optimizer_state_without_arrays(tmp_path):
    params, _ = state_of_step(1)
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1, (params, ((), None)))
        restored = restore(checkpoints, (abstract(params), ((), None)))
    assert restored.opt_state == ((), None)


def test_numpy_arrays_come_back_as_they_were(tmp_path):
    """Also those that JAX would narrow: none of the run's steps could be read."""
    extra = {
        "best": np.float64(1 / 3),
        "tokens": np.int64(2**40),
        "big": np.arange(4, dtype=">f4"),
        "small": jnp.ones(3, jnp.bfloat16),
    }
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1, ({}, extra))
    with CheckpointManager(tmp_path) as checkpoints:
        found = restore(checkpoints, ({}, extra)).opt_state
    for name, value in extra.items():
        assert found[name].dtype == value.dtype.newbyteorder("=")
        assert np.array_equal(found[name], value)


@pytest.mark.parametrize(
    "leaf, kind",
    [
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "masked array"),
        (np.zeros(2, [("x", "f4")]), r"array of \[\('x', '<f4'\)\]"),
        (np.array(["a"]), "array of <U1"),
    ],
)
def test_what_cannot_be_read_back_is_not_saved(tmp_path, leaf, kind):
    with (
        CheckpointManager(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=f"^opt_state/x is an? {kind}: a checkpoint"),
    ):
        save(checkpoints, 1, ({}, {"x": leaf}))


def test_a_closed_one_saves_and_restores_nothing(tmp_path):
    """Another process may train in the folder since then."""
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1)
    with pytest.raises(ValueError, match=r"^the CheckpointManager of .* is closed$"):
        save(checkpoints, 2)
    with pytest.raises(ValueError, match=r"^the CheckpointManager of .* is closed$"):
        restore(checkpoints)


def test_numpy_arrays_are_copied_before_save_returns(tmp_path):
    params = {"w": np.zeros((500, 500), np.float32)}
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1, (params, ()), wait=False)
        params["w"][:] = 1
        restored = restore(checkpoints, (abstract(params), ()))
    assert not np.any(restored.params["w"])


def test_buffers_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda a: a * 2 + 1, x), donate_argnums=0)
    params = {"w": jnp.zeros((1000, 1000)), "b": jnp.zeros((3,))}
    hashes = {}
    with CheckpointManager(tmp_path, keep=9) as checkpoints:
        for number in range(1, 6):
            params = step(params)
            hashes[number] = state_hash(params)
            save(checkpoints, number, (params, ()), wait=False)
            for _ in range(3):
                params = step(params)
            jax.block_until_ready(params)
        for number, expected in hashes.items():
            restored = restore(checkpoints, (abstract(params), ()), step=number)
            assert state_hash(restored.params) == expected
    assert len(set(hashes.values())) == 5


def test_meta_records_where_the_state_comes_from(tmp_path):
    state = state_of_step(3)
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 3, state)
    meta = json.loads((tmp_path / "checkpoints/3/meta.json").read_text())
    assert meta["step"] == 3
    assert meta["state_hash"] == state_hash({"params": state[0], "opt_state": state[1]})
    assert meta["config"]["train"]["seed"] == CONFIG.train.seed
    assert meta["environment"]["versions"]["jax"] == jax.__version__
    assert meta["environment"]["device_count"] == len(jax.devices())
    assert meta["data_fingerprint"] == "data-1"
    assert meta["tokenizer_fingerprint"] == "tokenizer-1"
    assert (tmp_path / "checkpoints/3/tokenizer/tokenizer.json").is_file()


def test_a_state_that_is_not_finite_cannot_be_saved(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 3)
        for part in (0, 1):  # parameters, optimizer
            state = list(state_of_step(4))
            state[part] = jax.tree.map(
                lambda x: (
                    np.full(x.shape, np.nan, x.dtype)
                    if jnp.issubdtype(x.dtype, jnp.floating)
                    else x
                ),
                state[part],
            )
            with pytest.raises(StateNotFinite, match=r"step 4 is not finite"):
                save(checkpoints, 4, state)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_keeps_the_newest_steps_and_multiples(tmp_path):
    with CheckpointManager(tmp_path, keep=2, keep_every=100) as checkpoints:
        for step in (50, 100, 150, 200, 250):
            save(checkpoints, step)
            assert step in checkpoints.steps()
        assert checkpoints.steps() == [100, 200, 250]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["100", "200", "250"]
    # The same command without the flag, or an own loop without it.
    with CheckpointManager(tmp_path, keep=1) as checkpoints:
        restore(checkpoints)
        config = dataclasses.replace(CONFIG, train=TrainConfig(keep_every=300))
        save(checkpoints, 300, config=config)
        save(checkpoints, 350)
        save(checkpoints, 400)
        checkpoints.wait()
        assert checkpoints.steps() == [100, 200, 300, 400]
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointManager(tmp_path, keep=0)


@pytest.mark.parametrize("function", ["read_meta", "list_steps"])
def test_what_cannot_be_read_for_a_moment_is_not_deleted_and_ends_no_run(
    tmp_path, monkeypatch, function
):
    """Too many open files, or an error of the disk, when old steps are looked through.

    One of them may be a multiple of the `keep_every` with which it was saved.
    """
    config = dataclasses.replace(CONFIG, train=TrainConfig(keep_every=2))
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 2, config=config)
    said = []
    with CheckpointManager(tmp_path, keep=1, report=said.append) as checkpoints:
        restore(checkpoints)

        def fail(folder):
            raise OSError(errno.EMFILE, "Too many open files", str(folder))

        listed = checkpoints._delete_old

        def delete_old():
            module = step_folder if function == "read_meta" else run_folder
            with monkeypatch.context() as patch:
                patch.setattr(module, function, fail)
                listed()

        monkeypatch.setattr(checkpoints, "_delete_old", delete_old)
        save(checkpoints, 3)
        save(checkpoints, 4)
        monkeypatch.setattr(checkpoints, "_delete_old", listed)
        assert checkpoints.steps() == [2, 3, 4]
        save(checkpoints, 5)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5]
    assert len(said) == 2 and "cannot be deleted (Too many open files" in said[0]


def test_steps_are_ordered_by_number_not_by_name_or_time(tmp_path):
    run_with_steps(tmp_path, 9, 10)
    os.utime(tmp_path / "checkpoints/9")
    with CheckpointManager(tmp_path) as checkpoints:
        assert restore(checkpoints).step == 10


def test_no_steps_gives_none_and_a_missing_step_lists_the_existing(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        assert restore(checkpoints) is None
        save(checkpoints, 100)
        save(checkpoints, 200)
        with pytest.raises(ValueError, match=r"no checkpoint of step 999.*100, 200"):
            restore(checkpoints, step=999)
        assert restore(checkpoints, step=100).step == 100


def test_the_same_step_is_written_once(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 5)
        save(checkpoints, 5, state_of_step(6))
        assert float(restore(checkpoints).params["embed"]["table"][0, 0]) == 5


def test_continuing_from_an_older_step_moves_the_newer_ones_aside(tmp_path):
    run_with_steps(tmp_path, 100, 200, 300)
    reported, report = lines()
    with CheckpointManager(tmp_path, keep=5, report=report) as checkpoints:
        restore(checkpoints, step=100)
        assert checkpoints.steps() == [100, 200, 300]
        save(checkpoints, 250)
        assert checkpoints.steps() == [100, 250]
    assert any("steps 200, 300" in line and "old-1" in line for line in reported)
    assert load(tmp_path / "old-1")[0] == CONFIG.model


def test_wrong_shape_and_dtype_are_named_by_path(tmp_path):
    run_with_steps(tmp_path, 1)
    params, opt_state = abstract(state_of_step(0))
    params["layers"]["mlp"]["up"] = jax.ShapeDtypeStruct((2, 16, 48), jnp.float32)
    params["embed"]["table"] = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16)
    params["lm_head"] = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    with CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(ValueError) as error:
            restore(checkpoints, (params, opt_state))
        message = str(error.value)
        assert "params/embed/table is float32 [64, 16] in the checkpoint" in message
        assert "bfloat16 [64, 16] here" in message
        assert "params/layers/mlp/up is float32 [2, 16, 32]" in message
        assert "params/lm_head is absent in the checkpoint" in message
        with pytest.raises(ValueError, match=r"opt_state/1/0/mu.* and absent here"):
            restore(checkpoints, (abstract(state_of_step(0)[0]), ()))


def test_keys_and_python_numbers_are_refused_by_path(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="opt_state/key is a random key"):
            save(checkpoints, 1, ({"w": jnp.ones(2)}, {"key": jax.random.key(0)}))
        with pytest.raises(ValueError, match="params/w is a int"):
            save(checkpoints, 1, ({"w": 1}, ()))


def test_load_reads_a_run_a_step_and_a_copied_step(tmp_path):
    run = run_with_steps(tmp_path / "run", 1, 2)
    copied = tmp_path / "elsewhere"
    (run / "checkpoints/1").rename(copied)
    found = (
        (run, 2),
        (run / "checkpoints", 2),
        (run / "checkpoints/2", 2),
        (copied, 1),
    )
    for path, step in found:
        config, params = load(path)
        assert config == CONFIG.model
        assert jax.tree.structure(params) == jax.tree.structure(state_of_step(0)[0])
        assert all(bool(jnp.all(x == step)) for x in jax.tree.leaves(params))
    _, params = load(run, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_load_reads_neither_the_optimizer_nor_the_lock(tmp_path):
    run = run_with_steps(tmp_path, 1, 2)
    for file in (run / "checkpoints/2/opt_state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * file.stat().st_size)
    with CheckpointManager(tmp_path):
        reported, report = lines()
        load(run, report=report)
        assert reported == []


def test_load_tokenizer(tmp_path):
    tokenizer = CharTokenizer("hello")
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1, tokenizer=tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.decode(loaded.encode("hello")) == "hello"


def test_load_falls_back_and_reports_it(tmp_path):
    run = run_with_steps(tmp_path, 1, 2)
    (run / "checkpoints/2/meta.json").write_text("{}")
    reported, report = lines()
    _, params = load(run, report=report)
    assert float(params["embed"]["table"][0, 0]) == 1
    assert len(reported) == 1 and reported[0].startswith(
        "step 2 unreadable (meta.json has"
    )
    assert reported[0].endswith("using step 1")
    with pytest.raises(NoUsableCheckpoint, match="step 2 unreadable"):
        load(run / "checkpoints/2")


def test_load_of_a_path_that_is_not_a_run_helps(tmp_path):
    run_with_steps(tmp_path / "shakespeare", 1)
    with pytest.raises(ValueError, match=r"does not exist.*nearby: .*shakespeare"):
        load(tmp_path / "shakespear")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"not a checkpoint.*it contains a\.txt"):
        load(tmp_path / "notes")
    with pytest.raises(ValueError, match=r"no checkpoint of step 5: .*steps 1"):
        load(tmp_path / "shakespeare/checkpoints/5")


def test_find_runs_newest_first(tmp_path):
    runs = [run_with_steps(tmp_path / name, 1) for name in ("b", "deep/a", "c")]
    for age, run in enumerate(runs):
        manifest = run / "checkpoints/1/manifest.json"
        os.utime(manifest, (1000 - age, 1000 - age))
    # As a start that is refused changes it.
    os.utime(runs[2] / "checkpoints", (2000, 2000))
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert find_runs(tmp_path) == runs
    # A run on another disk, and a link to one that is here; links in a circle.
    disk = tmp_path.with_name(f"{tmp_path.name}-disk")
    runs[0].rename(disk)
    runs[0].symlink_to(disk)
    (tmp_path / "a").symlink_to("c")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    assert find_runs(tmp_path) == runs


MESH = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from checkpoint_case import restore, save, state_of_step, abstract, updated_state
from checkpoint_case import adamw_masked
from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native import arrays, step_folder
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.integrity import state_hash

state = updated_state(adamw_masked())
expected, expected_params = state_hash(state), state_hash(state[0])

def shardings(mesh, axis):
    def one(x):
        fits = x.ndim and x.shape[0] % mesh.shape[axis] == 0
        return NamedSharding(mesh, P(axis) if fits else P())
    return jax.tree.map(one, state)

def check(restored, wanted):
    back = (restored.params, restored.opt_state)
    assert state_hash(back) == expected
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(wanted), strict=True):
        assert a.sharding == b, (a.sharding, b)

def shapes(wanted):
    make = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(make, state, wanted)

mesh8 = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
mesh4 = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
lines = []
with CheckpointManager(sys.argv[1], report=lines.append) as checkpoints:
    from8, from4 = shardings(mesh8, "fsdp"), shardings(mesh4, "fsdp")
    save(checkpoints, 1, state)                         # one device -> 8
    check(restore(checkpoints, shapes(from8)), from8)
    with jax.set_mesh(mesh8):
        sharded = jax.device_put(state, from8)
        save(checkpoints, 2, sharded, wait=False)       # 8 -> 2 x 4
        jax.tree.map(lambda x: x.delete(), sharded)
    with jax.set_mesh(mesh4):
        check(restore(checkpoints, shapes(from4)), from4)
    back = restore(checkpoints, abstract(state))        # 8 -> one device
    assert state_hash((back.params, back.opt_state)) == expected
assert lines and all("mesh: " in line for line in lines), lines
_, params = load(sys.argv[1], shardings=from4[0])
assert params["embed"]["table"].sharding == from4[0]["embed"]["table"]
assert state_hash(params) == expected_params

# As where other processes hold parts: no hash of the whole, but one of each shard.
arrays.on_host = lambda state: None
lines.clear()
read_item = step_folder.read_item

def damaged(folder, meta, item, wanted):
    read = read_item(folder, meta, item, wanted)
    if item == "params" and folder.name == "3":
        table = np.array(read["embed"]["table"])
        table[41, 3] = np.nextafter(table[41, 3], np.float32(9))  # in the sixth of 8
        read["embed"]["table"] = jax.device_put(table, read["embed"]["table"].sharding)
    return read

with CheckpointManager(sys.argv[1], report=lines.append) as checkpoints:
    restore(checkpoints, abstract(state))
    with jax.set_mesh(mesh8):
        save(checkpoints, 3, jax.device_put((back.params, back.opt_state), from8))
    for mesh, wanted in ((mesh8, from8), (mesh4, from4)):
        with jax.set_mesh(mesh):
            assert restore(checkpoints, shapes(wanted)).step == 3, lines
            step_folder.read_item = damaged
            assert restore(checkpoints, shapes(wanted)).step == 2
            step_folder.read_item = read_item
found = [line for line in lines if "unreadable" in line]
said = "step 3 unreadable (a shard of params/embed/table differs from its hash), "
assert found == [said + "using step 2"] * 2, lines
print("good")
"""


@pytest.mark.slow
def test_restore_on_another_mesh_and_with_a_clean_stderr(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    code, out, err = run_child(MESH, tmp_path, XLA_FLAGS=flags)
    assert (code, out) == (0, "good\n"), err
    assert err == ""


def test_a_named_step_that_is_missing_or_damaged_moves_nothing(tmp_path):
    run_with_steps(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "1" / "meta.json").write_text("{}")
    with CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(NoUsableCheckpoint, match="step 1 unreadable"):
            restore(checkpoints, step=1)
        with pytest.raises(ValueError) as error:
            restore(checkpoints, step=7)
        assert str(error.value) == (
            f"{tmp_path} has no checkpoint of step 7: it has steps 1, 2"
        )
        assert checkpoints.steps() == [1, 2]


def test_steps_of_a_run_that_was_not_restored_are_moved_and_not_deleted(tmp_path):
    """By a loop of one's own: as older steps they would be deleted."""
    run_with_steps(tmp_path, 3, 4, 9)
    said, report = lines()
    with CheckpointManager(tmp_path, keep=1, report=report) as checkpoints:
        save(checkpoints, 6)
        save(checkpoints, 7)
        assert checkpoints.steps() == [7]
    assert said == [f"moved steps 3, 4, 9 to {tmp_path / 'old-1'}: none was restored"]
    assert list_steps(tmp_path / "old-1") == [3, 4, 9]
