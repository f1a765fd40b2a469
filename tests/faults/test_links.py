"""Links that lead out of a folder of somebody else: nothing outside is read or written."""

import os
import shutil

import jax
import pytest

from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import load, load_tokenizer
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.config import ModelConfig
from jaxlm.data.text_record import read_record
from jaxlm.files.durable import replacing
from jaxlm.model.initialization import init
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder
from jaxlm.tokenizers.sentencepiece.trainer import train_sentencepiece
from jaxlm.train.metrics import MetricsWriter, kinds_at

MODEL = ModelConfig(
    **{"vocab_size": 300, "num_layers": 1, "model_dim": 8, "num_heads": 2},
    **{"num_kv_heads": 2, "head_dim": 4, "hidden_dim": 8, "context_length": 16},
    dtype="float32",
)


@pytest.fixture(scope="module")
def params():
    return init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory, params):
    """A folder of Hugging Face with every file that is read."""
    folder = tmp_path_factory.mktemp("made") / "model"
    write_hf(folder, MODEL, params, ByteTokenizer())
    return folder


FILES = [
    *("config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "generation_config.json"),
]


def read(folder):
    load(folder)
    load_tokenizer(folder)


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_model_is_a_link_that_leads_out(model, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    read(folder)
    inside, outside = folder / f"inside-{name}", tmp_path / name
    shutil.copy(folder / name, inside)
    (folder / name).replace(outside)
    for target in (outside, f"../{name}", f"../model/../{name}"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match="a symbolic link that leads out of") as e:
            read(folder)
        assert str(folder / name) in str(e.value) and "\n" not in str(e.value)
    (folder / name).unlink()
    (folder / name).symlink_to(inside.name)
    read(folder)


def test_a_sentencepiece_model_is_no_link_that_leads_out(tmp_path):
    tokenizer = train_sentencepiece(["some text\n" * 20], 270)
    (tmp_path / "outside").write_bytes(tokenizer.model)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").symlink_to("../outside")
    with pytest.raises(ValueError, match=r"tokenizer\.model: a symbolic link that lea"):
        tokenizer_from_folder(folder)


def test_a_snapshot_of_the_hub_is_all_links(model, tmp_path):
    """`snapshots/REVISION/name -> ../../blobs/HASH`."""
    snapshot, blobs = (
        tmp_path / "models--a--b/snapshots/1f",
        tmp_path / "models--a--b/blobs",
    )
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    read(snapshot)


@pytest.mark.parametrize("name", FILES)
def test_an_export_replaces_links_and_leaves_their_targets(params, tmp_path, name):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    (folder / name).symlink_to("../outside")
    try:
        write_hf(folder, MODEL, params, ByteTokenizer())
    except ValueError as error:
        assert "already exists" in str(error) and name == "model.safetensors"
    assert outside.read_text() == "mine"


def test_a_run_writes_to_no_target_of_a_link(tmp_path):
    """The lock and the log of a run folder that somebody else has made."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_text("mine")
    (run / "metrics.jsonl").symlink_to(outside)
    for step in (None, 1):
        with MetricsWriter(run, resume_step=step) as writer:
            writer.write("event", 1, event="start")
        assert outside.read_text() == "mine"
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(ValueError, match=r"has a metrics\.jsonl that is not a run's"):
        CheckpointManager(run)
    (run / "metrics.jsonl").unlink()
    (run / ".lock").symlink_to(outside)
    with pytest.raises((ValueError, OSError), match="symbolic link"):
        CheckpointManager(run)
    assert outside.read_text() == "mine"
    assert os.readlink(run / ".lock") == str(outside)


def test_pipes_in_a_run_folder_are_not_waited_for(tmp_path, caplog):
    for name in ("metrics.jsonl", "texts.json", ".lock"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}, "train": {}}')
    assert kinds_at(tmp_path, 3) == set()
    with MetricsWriter(tmp_path, resume_step=3):
        pass
    assert read_record(tmp_path) is None
    assert "a pipe, which would be waited for" in caplog.messages[0]
    assert "texts.json cannot be read (it is not a regular file)" in caplog.messages[1]
    with pytest.raises(ValueError, match=r"\.lock cannot be opened \(it is not a reg"):
        CheckpointManager(tmp_path)
    # As root a report to /dev/null would have taken its place.
    is_refused = pytest.raises(OSError, match="cannot write: it is not a file")
    with is_refused, replacing(tmp_path / "texts.json"):
        pass
    assert (tmp_path / "texts.json").is_fifo()
