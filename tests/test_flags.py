"""Config files and flags, and what is said of wrong ones."""

import re
import sys

import pytest

from jaxlm.config import Config
from jaxlm.flags import flag_names, read_config

CONFIG_FILE = """
'''A tiny run.'''
from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

def get_config():
    return Config(
        model=ModelConfig(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
                          head_dim=8, hidden_dim=64, context_length=64),
        data=DataConfig(sequence_length=32),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=10, batch_size=4),
    )
"""


@pytest.fixture
def default_file(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    file = folder / "tiny.py"
    file.write_text(CONFIG_FILE)
    return file


def words(text):
    """Output without the frames of boxes and without line breaks."""
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())


def exit_of(capsys, function, *arguments):
    """Exit code and what was written."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    out, err = capsys.readouterr()
    return caught.value.code, words(out), words(err)


def test_flags_change_the_config_file(default_file):
    assert read_config([], default_file)[0].train.steps == 10
    config, source = read_config(
        [
            *("--model.num-layers", "12", "--train.run-dir", "runs/x"),
            *("--data.path", "a.txt", "b.txt", "--data.weights", "1", "2.5"),
            *("--optimizer.clip-norm", "None", "--train.max-minutes", "3"),
            *("--model.no-tied-embeddings", "--mesh.fsdp", "2", "--fresh"),
            *("--model.layer-pattern", "local", "global"),
            *("--model.window", "8", "--sample.stop-ids", "1", "2"),
        ],
        default_file,
    )
    assert isinstance(config, Config) and source is None
    assert config.model.num_layers == 12 and config.train.run_dir == "runs/x"
    assert config.data.path == ("a.txt", "b.txt")
    assert config.data.weights == (1.0, 2.5)
    assert config.optimizer.clip_norm is None and config.train.max_minutes == 3.0
    assert not config.model.tied_embeddings and config.mesh.fsdp == 2
    assert config.fresh
    assert config.model.layer_pattern == ("local", "global")
    assert config.sample.stop_ids == (1, 2)
    # What no flag names stays as the file has it.
    assert config.model.model_dim == 32 and config.optimizer.warmup_steps == 2


def test_a_config_file_may_come_first(default_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(CONFIG_FILE.replace("steps=10", "steps=7"))
    flags = ["--train.batch-size", "8"]
    config, _ = read_config([str(other), *flags], default_file)
    assert (config.train.steps, config.train.batch_size) == (7, 8)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--train.step", "5"],
            r"unknown option '--train.step' .*mean '--train.steps'",
        ),
        (["--train.step=5"], r"option '--train.step=5' \(did you mean '--train.steps'"),
        (["--modl.num-layers", "5"], r"did you mean '--model.num-layers'\?\)"),
        (["--model.rope-scaling", "x"], r"mean '--model.(?!rope-scaling)"),
        (["--qwertyuiop"], r"unknown option '--qwertyuiop'; --help lists them all"),
        (["--train.steps", "x"], r"--train.steps: .*'x'"),
        (["--train.steps", "2.5"], r"--train.steps: .*'2.5'"),
        (["--train.steps"], r"--train.steps"),
        (["--train.steps", "-5"], r"train.steps is -5: it must be > 0"),
        (["--model.qk-norm", "heads"], r"'heads'.*--model.qk-norm.*'none', 'head'"),
        (["--model.num-kv-heads", "3"], r"num_heads is 4: it must be a multiple of"),
        (["--data.sequence-length", "65"], r"sequence_length is 65, more than model.c"),
        (["--fresh", "extra"], r"unknown option 'extra'"),
    ],
)
def test_a_wrong_flag_ends_with_code_2(default_file, capsys, flags, message):
    code, out, err = exit_of(capsys, read_config, flags, default_file)
    assert code == 2
    assert re.search(message, out + err), out + err


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", r"wrong\.py: no function get_config\(\)"),
        ("def get_config(): return 3", r"get_config\(\) returns int, not a Config"),
        (
            CONFIG_FILE.replace("num_kv_heads=2", "num_kv_heads=3"),
            r"wrong\.py: model\.num_heads is 4",
        ),
    ],
)
def test_a_wrong_config_file_ends_with_code_2(
    default_file, capsys, tmp_path, text, message
):
    file = tmp_path / "wrong.py"
    file.write_text(text)
    code, out, err = exit_of(capsys, read_config, [str(file)], default_file)
    assert code == 2 and not out
    assert err.startswith("error: ") and re.search(message, err), err


def test_a_missing_config_file_names_the_nearest(default_file, capsys):
    missing = str(default_file).replace("tiny", "tinny")
    code, _, err = exit_of(capsys, read_config, [missing], default_file)
    assert code == 2
    assert f"no config file {missing!r} (did you mean {str(default_file)!r}?)" in err
    folder = str(default_file.parent)
    code, _, err = exit_of(capsys, read_config, [folder], default_file)
    assert code == 2 and f"no config file {folder!r}" in err


def test_help_tells_every_flag_and_its_meaning(default_file, capsys):
    code, out, _ = exit_of(capsys, read_config, ["--help"], default_file)
    assert code == 0
    for flag in flag_names(read_config([], default_file)[0]):
        assert re.search(rf"{flag}(?![\w-])", out), flag
    for text in ("A tiny run.", "Microbatches in a step", "Transformer block"):
        assert text in out
    assert f"defaults from {default_file}".replace(" ", "") in out.replace(" ", "")


def test_an_error_is_one_line_where_stdout_shows_colours(
    default_file, capsys, monkeypatch
):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    flags = ["--train.steps", "x"]
    code, _, err = exit_of(capsys, read_config, flags, default_file)
    assert code == 2 and err.startswith("error: Error parsing --train.steps: invalid")
    assert err.endswith("; --help tells more")
    assert not re.search(r"\x1b|[|│]|----|────", err)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train.steps", "many"], "Error parsing --train.steps: invalid literal"),
        (["--train.steps"], "Missing value for argument '--train.steps'"),
        (["--optimizer.name", "sgd"], "invalid choice 'sgd' for argument '--optimiz"),
    ],
)
def test_wrong_types_are_told_in_one_line(default_file, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        read_config(flags, default_file)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
