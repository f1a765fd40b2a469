"""The command line of a run: a config file, changed by flags, as a `Config`.

Nothing here imports JAX, so a wrong file or flag is reported at once.
"""

import contextlib
import dataclasses
import os
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import jaxlm.config
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.config import NEEDS_INIT_FROM, Config
from jaxlm.fields import nearest
from jaxlm.flags.flag_table import Positional
from jaxlm.flags.help_text import help_text
from jaxlm.flags.parse import read_flags, with_values
from jaxlm.flags.unused import unused
from jaxlm.terminal.printable import shown_value

if TYPE_CHECKING:
    from jaxlm.checkpoint.opened import Checkpoint

# `jaxlm/configs` is a symlink to `configs/`.
DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare.py"
FLAGS_THAT_MATTER = (
    *("data.path", "data.tokenizer", "model.num_layers", "model.model_dim"),
    *("optimizer.learning_rate", "train.steps", "train.batch_size", "train.run_dir"),
    *("init_from", "fresh"),
)


class ConfigFileError(ValueError):
    """A mistake in a config file; it names fields as the file does."""


@dataclass(frozen=True, kw_only=True)
class RunArguments(Config):
    """The settings of a training run: those of a config file, changed by flags.

    Example: {prog} --data.path notes.txt --train.run-dir runs/notes
    """

    config: Positional[str | None] = None
    """A Python file whose get_config() gives the defaults of all flags, or the name of
    one in configs/. It may stand anywhere among the flags."""


def read_config(
    arguments: Sequence[str],
    default_file: Path = DEFAULT_CONFIG,
    *,
    prog: str = "jaxlm train",
) -> "tuple[Config, Checkpoint | None]":
    """Parses `[CONFIG] [--section.field value ...]`; `--help` prints and exits.

    Args:
      arguments: the command line.
      default_file: the config file when the command line names none; its folder holds
        those with a name.
      prog: the name of the program, for `--help`.

    Returns:
      The config, and the opened checkpoint of `--init-from` (None without one).

    Raises:
      ValueError: if the file or a flag is wrong.
    """
    values = read_flags(RunArguments, arguments)
    _check_no_config(values.get("data.path", ()))
    file = _find(values.pop("config", None), default_file)
    config, about = _run(file)
    if "help" in values:
        about = f"Defaults below: {file}\n\n{about}"
        first = FLAGS_THAT_MATTER
        print(help_text(RunArguments, prog, config, about=about, first=first), end="")
        raise SystemExit(0)
    initial = None
    path = values.get("init_from", config.init_from)
    if path == NEEDS_INIT_FROM:
        raise ValueError(
            f"{file.stem} needs --init-from CHECKPOINT, whose model it trains: a run, "
            "a Hugging Face folder, a .gguf file, or hf:owner/name"
        )
    if path is not None:
        # Imported here because it imports JAX.
        from jaxlm.checkpoint.load import open_checkpoint

        _check_no_tokenizer(values)
        try:
            initial = open_checkpoint(path)
            config = _with_model_of(initial, config, "data.sequence_length" in values)
        except ValueError as error:
            run = values.get("train.run_dir", config.train.run_dir)
            # A run holds the model and the tokenizer with which it goes on.
            begun = (Path(run) / "checkpoints").is_dir()
            hint = f"; the run in {run} goes on with --init-from {quote(run)}" * begun
            raise ValueError(f"--init-from: {error}{hint}") from error
    config = with_values(Config, config, values)
    for line in unused(config, values):
        print(line, file=sys.stderr)
    return config, initial


def _find(name: str | None, default_file: Path) -> Path:
    """Returns the config file of a path or of a name in the folder of the default."""
    if name is None:
        return default_file
    folder = default_file.parent
    file = Path(name)
    for path in (file, folder / f"{name}.py", folder / f"{name.replace('-', '_')}.py"):
        # Path.is_file fails for names that are too long.
        if os.path.isfile(path) and path.suffix == ".py":
            return path
    if os.path.isfile(file):
        raise ValueError(
            f"{name} is no config file, which is in Python: to train on a text, give "
            f"--data.path {name}"
        )
    if os.path.isdir(file):
        raise ValueError(
            f"{name} is a folder, not a config file: a text is given by --data.path, a "
            "checkpoint by --init-from"
        )
    known = sorted(folder.glob("*.py"))
    names = [path.stem for path in known]
    near = nearest(name, names) or nearest(name, [str(path) for path in known])
    raise ValueError(
        f"no config file {shown_value(name)}{near}: give the path of one, or a name of "
        f"{', '.join(names)}"
    )


def _check_no_config(texts: Sequence[str]) -> None:
    """Raises ValueError for a config file that a flag of texts has taken for a text."""
    for text in texts:
        if not (text.endswith(".py") and os.path.isfile(text)):
            continue
        begin = b""
        with contextlib.suppress(OSError), open(text, "rb") as file:
            begin = file.read(1 << 20)
        if b"def get_config(" in begin:
            raise ValueError(
                f"{text} is a config file, and --data.path takes it for a text: give "
                "it before the flags (or its folder, to train on it)"
            )


def _check_no_tokenizer(values: Mapping[str, object]) -> None:
    """Raises ValueError for flags of a tokenizer beside those of `--init-from`."""
    for name in values:
        if name.startswith("data.tokenizer"):
            raise ValueError(
                f"--{name.replace('_', '-')}: --init-from takes the tokenizer of the "
                "checkpoint, whose tokens its weights know: leave the flag out"
            )


def _run(file: Path) -> tuple[Config, str]:
    """Returns the result of a file's `get_config()`, and the file's docstring.

    Raises:
      ConfigFileError: names the file, the line and what is wrong there.
    """
    try:
        module = runpy.run_path(str(file))
        if "get_config" not in module:
            raise ConfigFileError(f"{file}: no function get_config(); define it")
        config = module["get_config"]()
    except ConfigFileError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit() would be taken for success
        raise ConfigFileError(
            f"{_location(file, error)}: {_explained(error)}"
        ) from error
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise ConfigFileError(f"{file}: get_config() returns {kind}, not a Config")
    return config, module.get("__doc__") or ""


def _location(file: Path, error: BaseException) -> str:
    """Returns the file and the line of a mistake."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _explained(error: BaseException) -> str:
    """Returns the message of an error as one line, with a suggestion if possible."""
    if type(error) is ValueError:
        return str(error)
    text = "".join(
        traceback.TracebackException.from_exception(error).format_exception_only()
    )
    if isinstance(error, SyntaxError):  # Its lines and marks come before the message.
        text = f"SyntaxError: {error.msg}"
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", text)
    if unknown:
        kind = getattr(jaxlm.config, unknown[1], None)
        if dataclasses.is_dataclass(kind):
            names = [f.name for f in dataclasses.fields(kind)]
            near = nearest(unknown[2], names) or f"; its fields: {', '.join(names)}"
            return f"{unknown[1]} has no field {unknown[2]!r}{near}"
    return " ".join(text.split())


def _with_model_of(
    checkpoint: "Checkpoint", config: Config, rows_are_given: bool
) -> Config:
    """Returns the config with a checkpoint's model.

    It keeps this config's execution settings (dtype, remat, attention, ...), and
    shortens the rows to the model's context.
    """
    settings = {name: getattr(config.model, name) for name in NOT_KEPT}
    model = dataclasses.replace(checkpoint.config, **settings)
    data, length = config.data, model.context_length
    if data.sequence_length > length:
        data = dataclasses.replace(data, sequence_length=length)
        if not rows_are_given:
            print(
                f"rows of {length} tokens, the context of {checkpoint.path}",
                file=sys.stderr,
            )
    return dataclasses.replace(config, model=model, data=data)
