"""Damage on disk is detected, and the previous step is used."""

import errno
import json
import random
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_case import restore, run_with_steps, save, state_of_step

from jaxlm import tree
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.native import arrays, integrity, step_folder
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.integrity import UnreadableStep, state_hash
from jaxlm.checkpoint.native.step_folder import NoUsableCheckpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_with_steps(tmp_path_factory.mktemp("run"), 200, 300)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def expect_fallback(run, reason=""):
    reported = []
    with CheckpointManager(run, report=reported.append) as checkpoints:
        restored = restore(checkpoints)
    assert restored.step == 200
    assert float(restored.params["embed"]["table"][0, 0]) == 200
    assert len(reported) == 1 and reported[0].startswith("step 300 unreadable (")
    assert reported[0].endswith("), using step 200") and reason in reported[0]


@pytest.mark.slow
def test_thirty_of_thirty_flipped_bits_are_found(run):
    generator = random.Random(0)
    files = files_of(run / "checkpoints/300")
    assert len(files) > 10
    for trial in range(30):
        # All files in turn: by size, the data would get nearly all the flips.
        path = files[trial % len(files)]
        before = path.read_bytes()
        damaged = bytearray(before)
        damaged[generator.randrange(len(before))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        expect_fallback(run)
        path.write_bytes(before)
    integrity.verify(run / "checkpoints/300")


def test_every_bit_of_the_manifest_counts(run):
    folder = run / "checkpoints/300"
    path = folder / "manifest.json"
    before = path.read_bytes()
    try:
        for bit in range(0, 8 * len(before), 61):
            damaged = bytearray(before)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(UnreadableStep):
                integrity.verify(folder)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncation_of_every_file_is_found(run, share):
    folder = run / "checkpoints/300"
    for path in files_of(folder):
        before = path.read_bytes()
        path.write_bytes(before[: int(len(before) * share)])
        with pytest.raises(UnreadableStep):
            integrity.verify(folder)
        path.write_bytes(before)
    integrity.verify(folder)


def test_every_deleted_file_is_found(run):
    folder = run / "checkpoints/300"
    for path in files_of(folder):
        before = path.read_bytes()
        path.unlink()
        with pytest.raises(UnreadableStep, match="missing"):
            integrity.verify(folder)
        path.write_bytes(before)
    integrity.verify(folder)


@pytest.mark.parametrize("name", ["meta.json", "manifest.json", "params/_METADATA"])
def test_a_missing_or_cut_file_makes_the_run_fall_back(run, name):
    path = run / "checkpoints/300" / name
    before = path.read_bytes()
    path.unlink()
    expect_fallback(run, f"{name} missing")
    path.write_bytes(before[:-3])
    expect_fallback(run)
    path.write_bytes(before)


def test_an_additional_file_is_found_but_not_a_hidden_one_or_one_beside(run):
    folder = run / "checkpoints/300"
    (folder / "params/.DS_Store").write_bytes(b"x")
    (folder / "export").mkdir()
    for note in ("notes.txt", "export/model.safetensors"):
        (folder / note).write_text("somebody's")
    integrity.verify(folder)
    extra = folder / "params/extra"
    extra.write_bytes(b"x")
    expect_fallback(run, "params/extra not in manifest.json")
    extra.unlink()
    shutil.rmtree(folder / "export")
    (folder / "notes.txt").unlink()


CLUTTER = ("@eaDir/d@SynoEAStream", "Thumbs.db", "desktop.ini", "Icon\r", ".git/index")
COPIES = ("_METADATA (1)", "_METADATA-LAPTOP", "_METADATA.sync-conflict-1", ".nfs0001")


def test_what_systems_leave_in_each_folder_is_no_damage(run, tmp_path):
    """A NAS, a sync client or a file manager, while a step is saved or later."""
    folder = shutil.copytree(run / "checkpoints/300", tmp_path / "300")
    files = [
        folder / part / name
        for part in ("params", "params/d", "tokenizer")
        for name in (*CLUTTER, *COPIES)
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    (folder / "params/.#meta").symlink_to("somebody@host.1")
    integrity.verify(folder)
    integrity.write_manifest(folder)
    for file in files:
        file.unlink()
    integrity.verify(folder)


def test_a_file_that_cannot_be_read_once_does_not_lose_a_step(run, monkeypatch):
    """As with ESTALE of a network file system, which passes."""
    real, failures = integrity._file_hash, [OSError(errno.ESTALE, "Stale file handle")]

    def file_hash(path):
        if failures:
            raise failures.pop()
        return real(path)

    monkeypatch.setattr(integrity, "_file_hash", file_hash)
    said = []
    with CheckpointManager(run, report=said.append) as checkpoints:
        assert restore(checkpoints).step == 300
    assert not failures and not said


def test_symbolic_links_are_refused(run, tmp_path):
    folder = run / "checkpoints/300"
    folder.rename(tmp_path / "300")
    folder.symlink_to(tmp_path / "300")
    expect_fallback(run, "symbolic link")
    folder.unlink()
    (tmp_path / "300").rename(folder)
    path = folder / "meta.json"
    path.rename(tmp_path / "meta.json")
    path.symlink_to(tmp_path / "meta.json")
    expect_fallback(run, "meta.json is a symbolic link")
    path.unlink()
    (tmp_path / "meta.json").rename(path)


def test_no_readable_step_is_an_error_of_its_own(tmp_path):
    run = run_with_steps(tmp_path, 1, 2)
    for step in (1, 2):
        (run / f"checkpoints/{step}/meta.json").unlink()
    with CheckpointManager(run) as checkpoints:
        with pytest.raises(NoUsableCheckpoint, match=r"step 2 .*, step 1 .*--fresh"):
            restore(checkpoints)
        with pytest.raises(NoUsableCheckpoint, match=r"step 1 .*meta.json missing"):
            restore(checkpoints, step=1)


def test_a_run_that_deletes_a_step_while_it_is_opened(tmp_path, monkeypatch):
    run, verify = run_with_steps(tmp_path, 1, 2), integrity.verify
    steps, later = run / "checkpoints", tmp_path / "later"
    (steps / "2").rename(later)

    def train(folder, *rest):
        if later.exists():
            later.rename(steps / "2")
            shutil.rmtree(steps / "1")
        verify(folder, *rest)

    monkeypatch.setattr(integrity, "verify", train)
    lines = []
    assert open_checkpoint(run, report=lines.append).path == run
    assert not later.exists() and lines == []


def test_a_broken_step_is_moved_aside_when_the_run_reaches_it_again(tmp_path):
    run = run_with_steps(tmp_path, 200, 300)
    (run / "checkpoints/300/meta.json").unlink()
    with CheckpointManager(run, report=lambda line: None) as checkpoints:
        assert restore(checkpoints).step == 200
        save(checkpoints, 300)
        assert restore(checkpoints).step == 300
    assert (run / "old-1/checkpoints/300").is_dir()


def test_wrong_values_under_a_right_manifest_are_found(tmp_path, monkeypatch):
    """The state hash detects damage between the memory and Orbax."""
    run = run_with_steps(tmp_path, 200)
    with CheckpointManager(run, keep=2) as checkpoints:
        restore(checkpoints)
        monkeypatch.setattr(integrity, "state_hash", lambda state: "0" * 64)
        save(checkpoints, 300)
    expect_fallback(run, "state hash")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": 3}, "its meta.json is of step 3"),
        ({"step": 10**30}, "its meta.json is of step 1000"),
        ({"step": True}, "its meta.json is of step True"),
        ({"state_hash": None, "shard_hashes": 7}, "the shard_hashes of meta.json are"),
    ],
)
def test_a_meta_json_that_is_wrong_under_a_right_manifest(run, change, words):
    folder = run / "checkpoints/300"
    before = {p: p.read_bytes() for p in folder.glob("*.json")}
    meta, entries = (
        json.loads(before[folder / name]) for name in ("meta.json", "manifest.json")
    )
    try:
        (folder / "meta.json").write_text(json.dumps({**meta, **change}))
        entry = integrity.manifest_entries(folder)["meta.json"]
        integrity.write_manifest(folder, {**entries["files"], "meta.json": entry})
        expect_fallback(run, words)
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_arrays_of_another_shape_than_in_meta_json(run, capfd):
    folder = run / "checkpoints/300"
    meta = json.loads((folder / "meta.json").read_text())
    (name, (dtype, shape)), *_ = meta["arrays"]["params"].items()
    meta["arrays"]["params"][name] = dtype, [2 * size for size in shape]
    wanted = tree.nest(arrays.abstract(meta["arrays"]["params"], {}))
    with pytest.raises(UnreadableStep, match=f"Orbax cannot read params: {name} is "):
        step_folder.read_item(folder, meta, "params", wanted)
    assert capfd.readouterr().err == ""


def test_state_hash_sees_one_ulp_and_nothing_but_the_state():
    params, opt_state = state_of_step(1)
    before = state_hash({"opt_state": opt_state, "params": params})
    table = np.array(params["embed"]["table"])
    params["embed"]["table"] = table
    assert state_hash({"params": params, "opt_state": opt_state}) == before
    table[3, 3] = np.nextafter(table[3, 3], np.float32(2))
    assert state_hash({"params": params, "opt_state": opt_state}) != before


def test_state_hash_sees_dtype_shape_name_and_sign_of_zero():
    zero = np.zeros((2, 2), np.float32)
    different = [
        {"a": zero},
        {"b": zero},
        {"a": -zero},
        {"a": zero.reshape(4)},
        {"a": zero.astype(np.int32)},
        {"a": np.zeros((2, 4), ml_dtypes.bfloat16)},
        {"a": np.zeros((2, 4), np.float16)},
        {"a": np.float32(0)},
        {"a": np.zeros((1,), np.float32)},
    ]
    assert len({state_hash(tree) for tree in different}) == len(different)
    assert state_hash({"a": zero.T}) == state_hash({"a": jnp.asarray(zero)})


@pytest.mark.parametrize("name", ["params/large", "meta.json"])
def test_a_terabyte_of_nothing_is_not_hashed(run, name):
    folder = run / "checkpoints/300"
    large, manifest = folder / name, folder / "manifest.json"
    content = large.read_bytes() if large.exists() else None
    before = manifest.read_bytes()
    files = json.loads(before)["files"]
    try:
        with large.open("wb") as file:
            file.truncate(1 << 40)  # needs no space
        entry = {"bytes": 1 << 40, "sha256": "0" * 64}
        integrity.write_manifest(folder, {**files, name: entry})
        part, reported = name.partition("/")[0], []
        expect_fallback(run, f"{part} has 1,099,511,6")
        assert open_checkpoint(run, report=reported.append).step_folder.name == "200"
        assert f"{part} has 1,099,511,6" in reported[0]
    finally:
        manifest.write_bytes(before)
        large.unlink()
        if content is not None:
            large.write_bytes(content)


def test_a_manifest_that_claims_a_terabyte_is_not_read(run):
    path = run / "checkpoints/300/manifest.json"
    before = path.read_bytes()
    try:
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # needs no space
        expect_fallback(run, "manifest.json has more than 67108864 bytes")
    finally:
        path.write_bytes(before)
