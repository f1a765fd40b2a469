"""Turns config files and command lines into configs; errors are reported in one line.

tyro parses the flags. Two things are read from the command line before that: names of
unknown flags, to suggest the nearest known one in one line, and `--init-from`, because
the checkpoint's model supplies the defaults that tyro parses against.

Nothing here imports JAX, so a wrong flag is reported at once.
"""

import contextlib
import dataclasses
import io
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro

from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.config import Config, nearest
from jaxlm.train.stopping import EXIT_USAGE

if TYPE_CHECKING:
    from jaxlm.checkpoint.opened import Checkpoint

T = TypeVar("T")
# `jaxlm/configs` is a symlink to `configs/`.
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "shakespeare.py"


def fail(error: Exception | str, code: int = EXIT_USAGE) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


def parse(
    kind: type[T],
    arguments: Sequence[str],
    *,
    default: T | None = None,
    flat: tuple[str, ...] = (),
    **options: Any,
) -> T:
    """Parses command-line flags into a dataclass.

    Exits with code 2 and a message that names the flag, for unknown names (with the
    nearest known one), wrong types and invalid values.

    Args:
      kind: the dataclass.
      arguments: the command line.
      default: an instance whose fields are the defaults; None takes those of `kind`.
      flat: fields that are dataclasses whose flags have no prefix.
      options: passed to `tyro.cli`.
    """
    known = set(flag_names(kind if default is None else default, flat))
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known:
            close = nearest(name, sorted(known))
            fail(f"unknown option {argument!r}{close}; --help lists them all")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            value, left = tyro.cli(
                kind,
                default=default,
                args=list(arguments),
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
                **options,
            )
    except SystemExit as end:
        if end.code:
            fail(f"{_first_part(message.getvalue())}; --help tells more")
        raise
    if left:
        fail(f"unknown option {left[0]!r}; --help lists them all")
    assert isinstance(value, kind)
    return value


def _first_part(box: str) -> str:
    """Returns the first part of a message that tyro prints in a box, on one line."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # colors, when stdout is a terminal
    # Without Unicode, tyro draws boxes and rules in ASCII.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    parts = re.split(r"^[─-]{4,}$", "\n".join(lines), flags=re.MULTILINE)
    texts = (" ".join(part.split()).rstrip(".") for part in parts if part.strip())
    return next(texts, "the arguments are wrong")


def flag_names(
    config: Any, flat: tuple[str, ...] = (), prefix: str = "--"
) -> Iterator[str]:
    """Yields the flags of a dataclass or of an instance.

    A section that may be None has flags only in an instance where it is set.

    Args:
      config: a dataclass or an instance of one.
      flat: as for `parse`.
      prefix: what the names start with.
    """
    yield "--help"
    hints = get_type_hints(config if isinstance(config, type) else type(config))
    for f in dataclasses.fields(config):
        name = prefix + f.name.replace("_", "-")
        value = _default(f) if isinstance(config, type) else getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flag_names(value, (), prefix if f.name in flat else f"{name}.")
        elif not any(map(dataclasses.is_dataclass, get_args(hints[f.name]))):
            yield name
            if hints[f.name] is bool:
                section, dot, last = name[2:].rpartition(".")
                yield f"--{section}{dot}no-{last}"


def _default(f: dataclasses.Field) -> Any:
    """Returns the default of a field; None for one without a default."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return None if f.default is dataclasses.MISSING else f.default


def read_config(
    arguments: Sequence[str],
    default_file: Path = DEFAULT_CONFIG,
    *,
    prog: str = "jaxlm train",
) -> "tuple[Config, Checkpoint | None]":
    """Parses `[CONFIG_FILE] [--section.field value ...]` into a `Config`.

    Exits with code 2 if the file or a flag is wrong.

    Args:
      arguments: the command line.
      default_file: the config file when the command line names none.
      prog: the name of the program, for `--help`.

    Returns:
      The config, and the opened checkpoint of `--init-from` (None without one).
    """
    file, flags = default_file, list(arguments)
    if flags and not flags[0].startswith("-"):
        file = Path(flags.pop(0))
    config, about = _run_config_file(file, default_file.parent)
    initial = None
    path = _value_of("--init-from", flags) or config.init_from
    if path is not None:
        # Imported here because it imports JAX.
        from jaxlm.checkpoint.load import open_checkpoint

        try:
            initial = open_checkpoint(path)
            rows = _value_of("--data.sequence-length", flags)
            config = _with_model_of(initial, config, rows is not None)
        except ValueError as error:
            fail(f"--init-from: {error}")
    usage = f"{prog} [CONFIG_FILE] [--section.field value ...]"
    about = f"{about}\nusage: {usage}; defaults from {file}"
    config = parse(Config, flags, default=config, prog=prog, description=about)
    return config, initial


def _run_config_file(file: Path, folder: Path) -> tuple[Config, str]:
    """Returns the result of a file's `get_config()`, and the file's docstring."""
    if not file.is_file():
        names = [str(p) for p in sorted(folder.glob("*.py"))]
        fail(f"no config file {str(file)!r}{nearest(str(file), names)}")
    try:
        module = runpy.run_path(str(file))
        if "get_config" not in module:
            fail(f"{file}: no function get_config()")
        config = module["get_config"]()
    except ValueError as error:
        fail(f"{file}: {error}")
    if not isinstance(config, Config):
        fail(f"{file}: get_config() returns {type(config).__name__}, not a Config")
    return config, module.get("__doc__") or ""


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Returns the last value of a flag in the command line; None if it is not there."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = inline if equals else next(iter(arguments[i + 1 :]), None)
    return value


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
