"""Config files and command lines become configs; what is wrong in them, one line.

Nothing here imports JAX, so that a wrong flag is answered at once.
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
# The folder of config files is a part of the package as well.
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
    """Command-line flags as a dataclass.

    Exits with code 2 and a message that names the flag, for unknown names (with the
    nearest), wrong types and impossible values.

    Args:
      kind: the dataclass.
      arguments: the command line.
      default: a value of it whose fields are the defaults; None takes those of `kind`.
      flat: fields that are dataclasses but whose flags have no prefix.
      options: for `tyro.cli`.
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
    """The first part of a framed message of tyro's, on one line."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # colours, when stdout is a terminal
    # Frames and rules are drawn with other signs where the terminal has no Unicode.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    parts = re.split(r"^[─-]{4,}$", "\n".join(lines), flags=re.MULTILINE)
    texts = (" ".join(part.split()).rstrip(".") for part in parts if part.strip())
    return next(texts, "the arguments are wrong")


def flag_names(
    config: Any, flat: tuple[str, ...] = (), prefix: str = "--"
) -> Iterator[str]:
    """Flags of a dataclass, or of one of its values where the value decides.

    Args:
      config: a dataclass or a value of one.
      flat: as for `parse`.
      prefix: of the names.
    """
    yield "--help"
    hints = get_type_hints(config if isinstance(config, type) else type(config))
    for f in dataclasses.fields(config):
        name = prefix + f.name.replace("_", "-")
        value = _default(f) if isinstance(config, type) else getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flag_names(value, (), prefix if f.name in flat else f"{name}.")
        elif not any(map(dataclasses.is_dataclass, get_args(hints[f.name]))):
            yield name  # a section that is None has no flags
            if hints[f.name] is bool:
                section, dot, last = name[2:].rpartition(".")
                yield f"--{section}{dot}no-{last}"


def _default(f: dataclasses.Field) -> Any:
    """The default of a field; None for one that must be given."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return None if f.default is dataclasses.MISSING else f.default


def read_config(
    arguments: Sequence[str],
    default_file: Path = DEFAULT_CONFIG,
    *,
    prog: str = "jaxlm train",
) -> "tuple[Config, Checkpoint | None]":
    """`[CONFIG_FILE] [--section.field value ...]` as a `Config`.

    Exits with code 2 for a file or a flag that is wrong.

    Args:
      arguments: the command line.
      default_file: the config file when the command line names none.
      prog: the program, for `--help`.

    Returns:
      The config, and the checkpoint that `--init-from` names, opened.
    """
    file, flags = default_file, list(arguments)
    if flags and not flags[0].startswith("-"):
        file = Path(flags.pop(0))
    config, about = _run_config_file(file, default_file.parent)
    initial = None
    path = _value_of("--init-from", flags) or config.init_from
    if path is not None:
        # Only this needs JAX.
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
    """What `get_config` of a file returns, and the file's docstring."""
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
    """The value of a flag; the last one counts."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = inline if equals else next(iter(arguments[i + 1 :]), None)
    return value


def _with_model_of(
    checkpoint: "Checkpoint", config: Config, rows_are_given: bool
) -> Config:
    """The config with a checkpoint's model, run as the config's own would be."""
    own = {name: getattr(config.model, name) for name in NOT_KEPT}
    model = dataclasses.replace(checkpoint.config, **own)
    data, length = config.data, model.context_length
    if data.sequence_length > length:
        data = dataclasses.replace(data, sequence_length=length)
        if not rows_are_given:
            print(
                f"rows of {length} tokens, the context of {checkpoint.path}",
                file=sys.stderr,
            )
    return dataclasses.replace(config, model=model, data=data)
