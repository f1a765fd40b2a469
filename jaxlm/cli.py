"""Command lines: configs from files and flags, and the verbs of `jaxlm`."""

import dataclasses
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import jax
import tyro

from jaxlm.config import Config, nearest
from jaxlm.train.curves import load_runs
from jaxlm.train.picture import draw_loss_png
from jaxlm.train.report import write_report
from jaxlm.train.stopping import EXIT_USAGE

T = TypeVar("T")


def fail(error: Exception | str, code: int = EXIT_USAGE) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


def parse(
    kind: type[T],
    default: T | None,
    arguments: Sequence[str],
    *,
    flat: tuple[str, ...] = (),
    **options: Any,
) -> T:
    """Command-line flags as a dataclass.

    Exits with code 2 and a message that names the flag, for unknown names (with the
    nearest), wrong types and impossible values.

    Args:
      flat: fields that are dataclasses but whose flags have no prefix.
      options: for `tyro.cli`.
    """
    known = set(_flags(kind() if default is None else default, flat))
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known:
            close = nearest(name, sorted(known))
            fail(f"unknown option {argument!r}{close}; --help lists them all")
    value, left = tyro.cli(
        kind,
        default=default,
        args=list(arguments),
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
        **options,
    )
    if left:
        fail(f"unknown option {left[0]!r}; --help lists them all")
    return value


def _flags(config: Any, flat: tuple[str, ...], prefix: str = "--") -> Iterator[str]:
    yield "--help"
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        name = prefix + f.name.replace("_", "-")
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, (), prefix if f.name in flat else f"{name}.")
        elif not any(map(dataclasses.is_dataclass, get_args(hints[f.name]))):
            yield name  # a section that is None has no flags
            if isinstance(value, bool):
                section, dot, last = name[2:].rpartition(".")
                yield f"--{section}{dot}no-{last}"


def read_config(arguments: Sequence[str], default_file: Path) -> Config:
    """`[CONFIG_FILE] [--section.field value ...]` as a `Config`.

    Exits with code 2 for a file or a flag that is wrong.
    """
    file, flags = default_file, list(arguments)
    if flags and not flags[0].startswith("-"):
        file = Path(flags.pop(0))
    if not file.is_file():
        names = [str(p) for p in sorted(default_file.parent.glob("*.py"))]
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
    usage = "train.py [CONFIG_FILE] [--section.field value ...]"
    about = f"{module.get('__doc__') or ''}\nusage: {usage}; defaults from {file}"
    return parse(Config, config, flags, prog="train.py", description=about)


def use_compile_cache() -> None:
    """Keeps compiled programs in a folder of the user's own, 0700."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "jaxlm" / "xla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A cached program is run without a check, so nobody else may write there.
    folder.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw one run, or several over each other: an HTML file and a PNG beside it."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders."""
    out: Path | None = None
    """HTML file; None is report.html in the run, or comparison.html for several."""

    def run(self) -> None:
        """Writes the two files and says where they are."""
        if not self.runs:
            raise ValueError("name at least one run folder")
        load_runs(self.runs)
        out = self.out
        if out is None:
            single = len(self.runs) == 1
            out = self.runs[0] / "report.html" if single else Path("comparison.html")
        picture = out.with_suffix(".png") if self.out or len(self.runs) > 1 else None
        print(write_report(self.runs, out))
        print(draw_loss_png(self.runs, picture or self.runs[0] / "loss.png"))


VERBS: dict[str, type] = {"report": Report}


def main(arguments: Sequence[str] | None = None) -> None:
    """`jaxlm VERB ...`"""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jaxlm VERB ...   (jaxlm VERB --help tells more)\n")
        for name, verb in VERBS.items():
            print(f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}")
        raise SystemExit(0 if arguments else EXIT_USAGE)
    verb = arguments.pop(0)
    if verb not in VERBS:
        fail(f"no verb {verb!r}{nearest(verb, list(VERBS))}; verbs: {', '.join(VERBS)}")
    command = parse(VERBS[verb], None, arguments, prog=f"jaxlm {verb}")
    try:
        command.run()
    except ValueError as error:
        fail(error)
