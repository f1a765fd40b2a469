"""The command line of a run: config files, names of them, and mistakes in them."""

import dataclasses
import re
import subprocess
import sys

import pytest
from toy_case import make_params, toy

from jaxlm.checkpoint.save import save
from jaxlm.config import Config
from jaxlm.flags.config_file import (
    FLAGS_THAT_MATTER,
    RunArguments,
    read_config,
)
from jaxlm.flags.flag_table import flags_of
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

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


def test_a_flag_without_an_effect_is_told(default_file, capsys):
    size = ["--data.tokenizer-vocab-size", "500"]
    read_config([*size, "--data.tokenizer", "bpe"], default_file)
    assert not capsys.readouterr().err
    read_config([*size, "--optimizer.momentum", "0.9"], default_file)
    assert capsys.readouterr().err.splitlines() == [
        "--data.tokenizer-vocab-size has no effect: --data.tokenizer is chars, not bpe "
        "or sentencepiece",
        "--optimizer.momentum has no effect: --optimizer.name is adamw, not muon",
    ]


def test_a_section_that_is_none_is_made_by_its_flags(default_file):
    scaling = ["--model.rope-scaling.kind", "yarn", "--model.rope-scaling.factor", "4"]
    config, _ = read_config(scaling, default_file)
    assert config.model.rope_scaling.kind == "yarn"
    assert config.model.rope_scaling.factor == 4.0
    with pytest.raises(ValueError, match=r"^model\.rope_scaling\.kind is missing"):
        read_config(scaling[2:], default_file)


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_config_file_may_stand_anywhere(default_file, tmp_path, place):
    other = tmp_path / "other.py"
    other.write_text(CONFIG_FILE.replace("steps=10", "steps=7"))
    arguments = ["--train.batch-size", "8", "--train.seed", "1"]
    arguments.insert(place, str(other))
    config, _ = read_config(arguments, default_file)
    assert (config.train.steps, config.train.batch_size) == (7, 8)


def test_a_config_of_the_folder_has_a_name(default_file):
    other = default_file.with_name("as_long_as_it_takes.py")
    other.write_text(CONFIG_FILE.replace("steps=10", "steps=7"))
    for name in ("as_long_as_it_takes", "as-long-as-it-takes"):
        assert read_config([name], default_file)[0].train.steps == 7


def test_a_wrong_name_of_a_config(default_file, tmp_path):
    other = default_file.with_name("large.py")
    other.write_text(CONFIG_FILE)
    (tmp_path / "text.txt").write_text("abc")
    wrong = str(default_file).replace("tiny", "tinny")
    for name, message in {
        "tinny": r"no config file 'tinny' \(did you mean 'tiny'\?\): .* large, tiny$",
        wrong: rf"\(did you mean '{default_file}'\?\)",
        "y" * 300: r"no config file 'y{46,49}\.{3}y{46,49}': give the path of one",
        "xyz": r"no config file 'xyz': give the path of one, or a name of large, tiny$",
        str(tmp_path): r"is a folder, not a config file: .*--data\.path.*--init-from",
        str(tmp_path / "text.txt"): r"is no config file.*give --data\.path .*text\.txt",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_config([name], default_file)
    with pytest.raises(ValueError, match="unexpected argument 'large'"):
        read_config(["tiny", "large"], default_file)


MISTAKES = {
    CONFIG_FILE.replace("num_layers", "num_layer"): (
        r":7: ModelConfig has no field 'num_layer' \(did you mean 'num_layers'\?\)"
    ),
    CONFIG_FILE.replace("num_layers=2, ", ""): (
        r":7: TypeError: .*missing 1 required keyword-only argument: 'num_layers'"
    ),
    "from jaxlm.config import Confg": r":1: ImportError: cannot import name 'Confg'",
}


READ_EACH = """
import sys
from jaxlm.flags.config_file import ConfigFileError, read_config
for file in sys.argv[1:]:
    try: read_config([file, "--train.steps", "5"])
    except ConfigFileError as error: print(error)
"""


def test_a_config_file_that_needs_a_checkpoint(default_file, tmp_path, capsys):
    """`tests/commands/test_wrong_inputs.py` leaves out `--init-from`."""
    model = toy(vocab_size=257, context_length=64, unroll_layers=0)
    save(tmp_path / "run", model, make_params(model), ByteTokenizer())
    file = default_file.with_name("tuned.py")
    start = "    return Config(\n"
    file.write_text(CONFIG_FILE.replace(start, f"{start}init_from='CHECKPOINT',\n"))
    with pytest.raises(ValueError, match="tuned needs --init-from CHECKPOINT, whose"):
        read_config(["tuned"], default_file)
    line = ["tuned", "--init-from", str(tmp_path / "run")]
    config, initial = read_config(line, default_file)
    assert config.model == dataclasses.replace(model, dtype="auto", unroll_layers=1)
    assert initial is not None
    with pytest.raises(SystemExit):
        read_config(["tuned", "--help"], default_file)
    assert "(default: CHECKPOINT)" in capsys.readouterr().out


def test_a_mistake_in_a_config_file_is_told_with_its_line(tmp_path, repository):
    """In a process without the type checks of the tests, whose messages are others.

    More mistakes are in `tests/commands/test_wrong_inputs.py`.
    """
    files = [tmp_path / f"wrong{i}.py" for i in range(len(MISTAKES))]
    for file, text in zip(files, MISTAKES, strict=True):
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", READ_EACH, *files],
        env={"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = done.stdout.splitlines()
    for file, message, line in zip(files, MISTAKES.values(), told, strict=True):
        assert re.match(re.escape(str(file)) + message, line), line


def test_help_begins_with_ten_flags_and_an_example(default_file, capsys):
    with pytest.raises(SystemExit) as end:
        read_config(["--help", "tiny"], default_file, prog="program")
    assert not end.value.code
    out = " ".join(capsys.readouterr().out.split())
    for flag in flags_of(RunArguments):
        assert f" {flag.name} " in out.replace(",", " "), flag
    for text in ("A tiny run.", "Microbatches in a step", "Transformer block"):
        assert text in out
    assert f"Defaults below: {default_file}" in out
    assert out.index("Example: program ") < out.index("the flags that matter most:")
    ten = out[out.index("matter most:") : out.index(" model: ")]
    assert len(FLAGS_THAT_MATTER) == 10
    assert len(set(re.findall(r"(?<= )--(?!no-)[a-z.-]+", ten))) == 10
    assert "Number of optimizer steps. (default: 10)" in ten
