"""A run is opened once: config, parameters and tokenizer belong to one step."""

import shutil

import jax
import numpy as np
import pytest
from checkpoint_case import run_with_steps, save, state_of_step
from toy_case import make_params, toy

from jaxlm import tree
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.checkpoint_reader import NativeCheckpoint
from jaxlm.cli import main
from jaxlm.commands.training_run.initial_state import initial_state
from jaxlm.config import Config, DataConfig
from jaxlm.data.loader import open_dataset
from jaxlm.flags.config_file import read_config
from jaxlm.sharding.mesh import make_mesh
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer
from jaxlm.train.optimizer import make_optimizer


def first_value(params):
    return float(params["embed"]["table"][0, 0])


def test_a_newer_step_changes_nothing(tmp_path):
    run = run_with_steps(tmp_path, 1)
    with CheckpointManager(run, keep=2) as checkpoints:
        save(checkpoints, 2, tokenizer=CharTokenizer("ab"))
        opened = open_checkpoint(run)
        save(checkpoints, 3, tokenizer=CharTokenizer("xyz"))
        assert opened.tokenizer().decode([0, 1]) == "ab"
        assert first_value(opened.params()) == 2
        assert opened.files() == [run / "checkpoints/2/manifest.json"]
        assert first_value(open_checkpoint(run).params()) == 3


@pytest.mark.parametrize("read", ["params", "tokenizer"])
def test_a_deleted_step_is_named(tmp_path, read):
    run = run_with_steps(tmp_path, 1)
    opened = open_checkpoint(run)
    with CheckpointManager(run, keep=1) as checkpoints:
        save(checkpoints, 2)
    with pytest.raises(ValueError, match=r"checkpoints/1 has been deleted or replaced"):
        getattr(opened, read)()


def test_another_step_under_the_same_number_is_not_taken_for_it(tmp_path):
    run = run_with_steps(tmp_path / "run", 1)
    opened = open_checkpoint(run)
    with CheckpointManager(run, fresh=True, report=lambda line: None) as checkpoints:
        save(checkpoints, 1, state_of_step(7))
    with pytest.raises(ValueError, match="has been deleted or replaced since"):
        opened.params()


@pytest.mark.parametrize("part", ["params", "tokenizer"])
def test_a_step_with_a_damaged_part_is_not_chosen(tmp_path, part):
    run = run_with_steps(tmp_path, 1, 2)
    shutil.rmtree(run / "checkpoints/2" / part)
    reported = []
    opened = open_checkpoint(run, report=reported.append)
    assert first_value(opened.params()) == 1
    assert len(reported) == 1 and reported[0].endswith("using step 1")


@pytest.fixture
def live_run(tmp_path, monkeypatch):
    """A run that saves step 2, with other characters, as soon as step 1 was opened.

    Returns its folder and the list of opened steps.
    """
    run, opened = tmp_path / "source", []

    def save_step(step, characters):
        model = toy(num_layers=1, vocab_size=len(characters), context_length=32)
        config = Config(model=model, data=DataConfig(sequence_length=8))
        state = make_params(model, seed=step), {}
        tokenizer = CharTokenizer(characters)
        save(checkpoints, step, state, config=config, tokenizer=tokenizer)

    real = NativeCheckpoint.__init__

    def open_and_save(self, *arguments):
        real(self, *arguments)
        opened.append(self.step_folder.name)
        if len(opened) == 1:
            save_step(2, "ABCDEFGHIJK\n")

    with CheckpointManager(run, keep=2) as checkpoints:
        save_step(1, "abcdefgh\n")
        monkeypatch.setattr(NativeCheckpoint, "__init__", open_and_save)
        yield run, opened


@pytest.mark.slow
def test_sampling_opens_once(live_run, capsys):
    run, opened = live_run
    flags = [str(run), "--prompt", "abc", "--max-new-tokens", "6"]
    assert main(["sample", *flags]) == 0
    assert opened == ["1"]
    text = capsys.readouterr().out.strip("\n")
    assert text.startswith("abc") and set(text) <= set("abcdefgh\n")
    assert (run / "checkpoints/2").is_dir()


def test_starting_from_a_checkpoint_opens_once(live_run, tmp_path, repository):
    run, opened = live_run
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 50)
    config, initial = read_config(
        [
            *("--init-from", str(run), "--data.path", str(text)),
            *("--data.cache-dir", str(tmp_path / "cache")),
            *("--train.run-dir", str(tmp_path / "run"), "--model.dtype", "float32"),
        ],
        repository / "configs" / "shakespeare.py",
    )
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    dataset = open_dataset(config.data, initial.tokenizer(), seed=0)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), CheckpointManager(tmp_path / "run") as checkpoints:
        state, resumed = initial_state(config, optimizer, checkpoints, dataset, initial)
    assert not resumed and opened == ["1"]
    assert dataset.tokenizer.vocab_size == config.model.vocab_size == 9
    expected = tree.flatten(make_params(config.model, seed=1))
    for path, value in tree.flatten(state.params).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
