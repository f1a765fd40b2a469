"""Command lines: flags, config files, the verbs of `jaxlm`, and exit codes."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm import cli
from jaxlm.cli import main, read_config, use_compile_cache
from jaxlm.config import Config
from jaxlm.train.metrics import FIELDS, MetricsWriter

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
    config, _ = read_config(
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
    assert isinstance(config, Config)
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
        (["--model.num-kv-heads", "3"], r"num_heads is 4, which model.num_kv_heads 3"),
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
    for flag in cli._flags(read_config([], default_file)[0], ()):
        assert re.search(rf"{flag}(?![\w-])", out), flag
    for text in ("A tiny run.", "Parts into which a batch is cut", "Transformer block"):
        assert text in out
    assert f"defaults from {default_file}".replace(" ", "") in out.replace(" ", "")


def test_the_compile_cache_is_the_users_own(monkeypatch, tmp_path):
    names = ["jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"]
    names.append("jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "jaxlm" / "xla"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    try:
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def run_folder(folder, losses):
    with MetricsWriter(folder) as writer:
        for step, loss in enumerate(losses, start=1):
            row = dict.fromkeys(FIELDS["train"], 1.0)
            writer.write("train", step, **{**row, "loss": loss})
    return folder


def test_report_of_one_run(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [3.0, 2.0, 1.0])
    main(["report", str(run)])
    out = capsys.readouterr().out.splitlines()
    assert out == [str(run / "report.html"), str(run / "loss.png")]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run / "report.html").read_text()


def test_report_of_several_runs(tmp_path, capsys, monkeypatch):
    runs = [str(run_folder(tmp_path / n, [3.0, 2.0])) for n in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    main(["report", *runs])
    assert {"comparison.html", "comparison.png"} <= set(os.listdir(tmp_path))
    main(["report", *runs, "--out", "both.html"])
    assert {"both.html", "both.png"} <= set(os.listdir(tmp_path))
    for name in ("one", "two"):
        assert name in (tmp_path / "both.html").read_text()
        assert os.listdir(tmp_path / name) == ["metrics.jsonl"]  # nothing left there


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["reprot"], r"error: no verb 'reprot' \(did you mean 'report'\?\); verbs: "),
        (["report"], r"error: name at least one run folder"),
        (
            ["report", "/no/such/run"],
            r"error: /no/such/run/metrics\.jsonl: no such fil",
        ),
        (["report", "x", "--uot", "y"], r"unknown option '--uot' .*mean '--out'"),
    ],
)
def test_a_wrong_verb_ends_with_code_2(capsys, arguments, message):
    code, _, err = exit_of(capsys, main, arguments)
    assert code == 2 and re.search(message, err), err


def test_a_damaged_metrics_file_is_named(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [3.0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write("nonsense\n" + json.dumps({"kind": "event", "step": 1}) + "\n")
    code, _, err = exit_of(capsys, main, ["report", str(run)])
    assert code == 2 and "metrics.jsonl, line 2: not JSON" in err


def test_help_lists_the_verbs(capsys):
    code, out, _ = exit_of(capsys, main, ["--help"])
    assert code == 0
    for name, verb in cli.VERBS.items():
        assert name in out and verb.__doc__.splitlines()[0] in out
    assert exit_of(capsys, main, [])[0] == 2
    code, out, _ = exit_of(capsys, main, ["report", "--help"])
    assert code == 0 and "--out" in out


def test_the_installed_command():
    jaxlm = Path(sys.executable).with_name("jaxlm")
    done = subprocess.run([jaxlm, "reprot"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean 'report'" in done.stderr
    assert done.stderr.count("\n") == 1  # one line, no traceback


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
