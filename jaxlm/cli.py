"""Command lines: configs from files and flags, and the verbs of `jaxlm`."""

import contextlib
import dataclasses
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_type_hints

import jax
import tyro

from jaxlm.checkpoint.conversion import convert
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.config import Config, nearest
from jaxlm.ops.attention.tuning import tune
from jaxlm.ops.linear import compute_dtype
from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png
from jaxlm.train.stopping import EXIT_USAGE
from jaxlm.verify.verification import NUM_TOKENS, verify, write_certificate

T = TypeVar("T")
# What `jaxlm verify` exits with when a check is past its gate.
EXIT_FAILED = 1


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
    known = set(_flags(kind if default is None else default, flat))
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known:
            close = nearest(name, sorted(known))
            fail(f"unknown option {argument!r}{close}; --help lists them all")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
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
            fail(f"{_first_part(said.getvalue())}; --help tells more")
        raise
    if left:
        fail(f"unknown option {left[0]!r}; --help lists them all")
    return value


def _first_part(box: str) -> str:
    """What tyro says in the first part of a framed message, on one line."""
    # Frames and rules are drawn with other signs where the terminal has no Unicode.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    parts = re.split(r"^[─-]{4,}$", "\n".join(lines), flags=re.MULTILINE)
    said = (" ".join(part.split()).rstrip(".") for part in parts if part.strip())
    return next(said, "the arguments are wrong")


def _flags(config: Any, flat: tuple[str, ...], prefix: str = "--") -> Iterator[str]:
    """Flags of a dataclass, or of one of its values where that decides."""
    yield "--help"
    hints = get_type_hints(config if isinstance(config, type) else type(config))
    for f in dataclasses.fields(config):
        name = prefix + f.name.replace("_", "-")
        value = _default(f) if isinstance(config, type) else getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, (), prefix if f.name in flat else f"{name}.")
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
    arguments: Sequence[str], default_file: Path
) -> tuple[Config, Checkpoint | None]:
    """`[CONFIG_FILE] [--section.field value ...]` as a `Config`.

    Also returns the checkpoint of --init-from, opened, where there is one.

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
    initial = None
    path = _value_of("--init-from", flags) or config.init_from
    if path is not None:
        try:
            rows = _value_of("--data.sequence-length", flags)
            initial = open_checkpoint(path)
            config = _with_model_of(initial, config, rows is not None)
        except ValueError as error:
            fail(f"--init-from: {error}")
    usage = "train.py [CONFIG_FILE] [--section.field value ...]"
    about = f"{module.get('__doc__') or ''}\nusage: {usage}; defaults from {file}"
    config = parse(Config, config, flags, prog="train.py", description=about)
    return config, initial


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag; the last one counts."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = inline if equals else next(iter(arguments[i + 1 :]), None)
    return value


def _with_model_of(
    checkpoint: Checkpoint, config: Config, rows_are_given: bool
) -> Config:
    """The config with the model of a checkpoint, run as the config's own would be."""
    own = {name: getattr(config.model, name) for name in NOT_KEPT}
    model = dataclasses.replace(checkpoint.config, **own)
    data, length = config.data, model.context_length
    if data.sequence_length > length:
        data = dataclasses.replace(data, sequence_length=length)
        if not rows_are_given:
            context = f"the context of {checkpoint.path}"
            print(f"rows of {length} tokens, {context}", file=sys.stderr)
    return dataclasses.replace(config, model=model, data=data)


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


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint as one of another kind: jaxlm, Hugging Face or GGUF."""

    src: tyro.conf.Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    dst: tyro.conf.Positional[Path]
    """The new folder or .gguf file."""
    to: Literal["jaxlm", "hf", "gguf"] | None = None
    """The kind; None goes by the name, and turns runs into hf and others into runs."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Of the parameters; None keeps what is stored (f16 in GGUF)."""
    tokenizer: bool = True
    """Write the tokenizer as well."""

    def run(self) -> None:
        """Converts and says what was written."""
        kind = convert(
            self.src,
            self.dst,
            to=self.to,
            dtype=self.dtype,
            with_tokenizer=self.tokenizer,
        )
        print(f"{self.dst} ({kind})")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare a model with transformers, or with values kept of it, and with itself."""

    src: tyro.conf.Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    against: str | None = None
    """A Hugging Face folder or .gguf file that transformers reads, or a certificate
    (.json) of another copy; None takes transformers, else SRC's own certificate."""
    tokens: int = NUM_TOKENS
    """Length of the text, cut to the model's context."""
    out: Path | None = None
    """Where the certificate goes; None is beside the checkpoint."""

    def run(self) -> None:
        """Prints the table and writes the certificate; exits with 1 past a gate."""
        if self.out is not None and not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out}: {self.out.parent} is no folder")
        use_compile_cache()
        found = verify(self.src, against=self.against, num_tokens=self.tokens)
        print(found)
        print(write_certificate(found, self.out))
        if not found.passed:
            raise SystemExit(EXIT_FAILED)


@dataclasses.dataclass(frozen=True)
class Tune:
    """Measure block sizes of attention on this device, and keep the best ones."""

    what: tyro.conf.Positional[Literal["attention"]]
    """What to tune."""
    implementation: str | None = None
    """One of them; None takes all that have block sizes and run here."""
    batch: int = 4
    length: int = 1024
    """Tokens of a row."""
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    window: int | None = None

    def run(self) -> None:
        """Prints a line for each candidate, and the file that keeps the best."""
        for line in tune(
            self.implementation,
            batch=self.batch,
            length=self.length,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=compute_dtype(self.dtype),
            window=self.window,
        ):
            print(line, flush=True)


VERBS: dict[str, type] = {
    "convert": Convert,
    "report": Report,
    "tune": Tune,
    "verify": Verify,
}


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
