"""Command lines into dataclasses: the field `train.steps` is the flag `--train.steps`.

argparse splits the command line and lays out `--help`. The table of flags, the values
and the words about wrong ones come from the dataclass itself.

Nothing here imports JAX, so a wrong flag is reported at once.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from jaxlm.config import matches, must_be
from jaxlm.train.stopping import EXIT_USAGE

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""An argument without a flag; in messages it is the name of the field in capitals."""
Flat = Annotated[T, "flat"]
"""A dataclass whose flags have no prefix."""

# A flag, or an argument without one -> what other programs call it.
_OTHER_WORDS = {
    "--optimizer.learning-rate": "lr",
    "--optimizer.weight-decay": "wd",
    "--optimizer.warmup-steps": "warmup",
    "--optimizer.clip-norm": "grad-clip max-grad-norm gradient-clip",
    "--optimizer.name": "optim",
    "--train.steps": "epochs num-epochs num-train-epochs max-steps max-iters iters",
    "--train.batch-size": "batch bs per-device-train-batch-size",
    "--train.accumulation-steps": "gradient-accumulation-steps",
    "--train.run-dir": "out out-dir output-dir output save-dir",
    "--train.checkpoint-every": "save-steps save-every",
    "--train.eval-every": "eval-interval eval-steps",
    "--data.path": "data data-dir dataset text train-file input",
    "--data.sequence-length": "seq-len seq-length max-seq-length block-size",
    "--model.num-layers": "n-layer n-layers layers depth",
    "--model.num-heads": "n-head n-heads heads",
    "--model.model-dim": "n-embd d-model hidden-size dim",
    "--model.hidden-dim": "intermediate-size d-ff ffn-dim",
    "--model.dtype": "precision",
    "--init-from": "model model-name model-name-or-path checkpoint pretrained",
    "--num-samples": "n num-return-sequences",
    "--temperature": "temp",
    "--max-new-tokens": "n-predict num-predict max-tokens max-length length num-tokens",
    "--system": "system-prompt",
    "--to": "format type outtype",
    "--against": "reference",
    "RUN": "run model model-name model-name-or-path checkpoint ckpt",
    "SRC": "src input model checkpoint",
    "DST": "dst out output outfile",
    "RUNS": "run runs run-dir",
}
_ADVICE = {
    "the same command again resumes a run": "resume resume-from-checkpoint continue",
    "JAX_PLATFORMS=cpu in the environment selects the device": "device gpu cpu cuda",
}
_MORE = "--help lists the flags, the most useful first"
_YES_AND_NO = {"true", "false", "yes", "no", "on", "off", "1", "0"}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "BOOL"}


@dataclass(frozen=True)
class Flag:
    """A field of a dataclass on the command line."""

    path: str
    """The field, with the names of the sections around it: `train.steps`."""
    name: str
    """`--train.steps`; for an argument without a flag, its name in capitals."""
    hint: Any
    """The type of the field."""
    default: Any
    """Default of the field; MISSING without one."""
    owner: type
    """The dataclass that the field belongs to."""
    section: str
    """The name before the flags of a dataclass inside another; "" is the outermost."""

    @property
    def is_positional(self) -> bool:
        return not self.name.startswith("--")

    @property
    def takes_many(self) -> bool:
        return get_origin(self.hint) is tuple

    @property
    def doc(self) -> str:
        """The text below the field."""
        return _docs(self.owner)[self.path.rpartition(".")[2]]

    @property
    def off(self) -> str | None:
        """The flag that sets a boolean to False."""
        section, dot, last = self.name[2:].rpartition(".")
        return f"--{section}{dot}no-{last}" if self.hint is bool else None


def flags_of(kind: type) -> list[Flag]:
    """Returns the flags of a dataclass, with those of the dataclasses in it."""
    return list(_flags(kind, None, "", "--", ""))


def _flags(
    kind: type, base: Any, path: str, prefix: str, section: str
) -> Iterator[Flag]:
    hints = get_type_hints(kind, include_extras=True)
    for f in dataclasses.fields(kind):
        hint, *marks = _without_marks(hints[f.name])
        inner, name = _section(hint), f.name.replace("_", "-")
        default = getattr(base, f.name, _default(f))
        if inner is not None and "flat" in marks:
            yield from _flags(inner, default, f"{path}{f.name}.", prefix, section)
        elif inner is not None:
            here = f"{path}{f.name}"
            yield from _flags(inner, default, f"{here}.", f"{prefix}{name}.", here)
        else:
            name = f.name.upper() if "positional" in marks else prefix + name
            yield Flag(path + f.name, name, hint, default, kind, section)


def _without_marks(hint: Any) -> tuple[Any, ...]:
    """Splits `Positional[...]` and `Flat[...]` into the type and its mark."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def _section(hint: Any) -> type | None:
    """Returns the dataclass of a field that holds one, or holds one or None."""
    options = (hint, *get_args(hint))
    return next((x for x in options if dataclasses.is_dataclass(x)), None)


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


@functools.cache
def _docs(kind: type) -> Mapping[str, str]:
    """Returns the text below each field of a dataclass and of those it extends."""
    docs = dict.fromkeys((f.name for f in dataclasses.fields(kind)), "")
    for base in kind.__mro__[:-1]:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                docs[ast.unparse(field.target)] = " ".join(text.split())
    return docs


def fail(error: Exception | str, code: int = EXIT_USAGE) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


def parse(
    kind: type[T], arguments: Sequence[str], *, prog: str, first: Sequence[str] = ()
) -> T:
    """Parses a command line into a dataclass; `--help` prints and exits with code 0.

    Args:
      kind: the dataclass.
      arguments: the command line.
      prog: the program, for `--help`.
      first: paths of the flags that `--help` begins with.

    Raises:
      ValueError: for an unknown flag (with the nearest known one), a missing argument
        or value, and a value that the dataclass does not accept.
    """
    values = read_flags(kind, arguments)
    if "help" in values:
        print(help_text(kind, prog, first=first), end="")
        raise SystemExit(0)
    return with_values(kind, None, values)


def read_flags(kind: type, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the values that a command line gives to the fields of a dataclass.

    Args:
      kind: the dataclass.
      arguments: the command line.

    Returns:
      Path of a field -> its value, of the field's type; `help` if that is asked for.

    Raises:
      ValueError: for an unknown flag (with the nearest known one), a missing or
        superfluous value, and a value of the wrong type.
    """
    flags = {flag.path: flag for flag in flags_of(kind)}
    switches = {name: f for f in flags.values() if f.off for name in (f.name, f.off)}
    words = [_with_hyphens(argument) for argument in arguments]
    for word, after in itertools.pairwise(words):
        if word in switches and after.lower() in _YES_AND_NO:
            _fail_on_value(switches[word])
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        usage=" ",
    )
    _add_flags(parser, flags.values())
    try:
        found, left = parser.parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").partition("/")[0]
        if name in switches:
            _fail_on_value(switches[name])
        raise ValueError(
            f"{name} needs a value (write {name}=VALUE if it begins with a dash)"
        ) from None
    for word in left:
        if word.startswith("-"):
            known = [name for f in flags.values() for name in (f.name, f.off) if name]
            typed = arguments[words.index(word)]
            raise ValueError(f"unknown flag {typed!r}{_near(word, known)}; {_MORE}")
    if left:
        raise ValueError(f"unexpected argument {left[0]!r}; {_MORE}")
    return {
        path: _value(flags[path], given) if path in flags else given
        for path, given in vars(found).items()
    }


def _with_hyphens(argument: str) -> str:
    """Writes a flag with hyphens, as both spellings are the same."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name + equals + value


def _fail_on_value(switch: Flag) -> None:
    raise ValueError(f"{switch.name} takes no value: {switch.off} is its opposite")


class _Switch(argparse.Action):
    """Sets a boolean field: `--fresh`, `--no-fresh`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _add_flags(group: argparse._ActionsContainer, flags: Any) -> None:
    """Adds flags, whose values stay texts, to a parser or to a group of its help."""
    for flag in flags:
        about = flag.doc.replace("%", "%%") + _shown_default(flag).replace("%", "%%")
        if flag.off is not None:
            names = (flag.name, flag.off)
            group.add_argument(
                *names, dest=flag.path, nargs=0, action=_Switch, help=about
            )
            continue
        options: dict[str, Any] = {"metavar": _metavar(flag.hint), "help": about}
        if flag.takes_many:
            options["nargs"] = "*"
        if flag.is_positional:
            # Whether it is missing is asked when the dataclass is made.
            options = {"nargs": "?", **options, "metavar": flag.name}
            group.add_argument(flag.path, **options)
        else:
            group.add_argument(flag.name, dest=flag.path, **options)
    if isinstance(group, argparse.ArgumentParser):
        group.add_argument("-h", "--help", dest="help", action="store_true")


def _value(flag: Flag, given: Any) -> Any:
    """Returns the value of a flag from its text or texts (a boolean is one already).

    Raises:
      ValueError: if a text does not fit the type.
    """
    if flag.off is not None:
        return given
    if flag.takes_many:
        (element, *_) = get_args(flag.hint)
        return tuple(_from_text(flag, element, text) for text in given)
    return _from_text(flag, flag.hint, given)


def _from_text(flag: Flag, hint: Any, text: str) -> Any:
    is_union = get_origin(hint) in (types.UnionType, Union)
    options = get_args(hint) if is_union else (hint,)
    # So that `None` is no text.
    for option in sorted(options, key=lambda x: x is not types.NoneType):
        try:
            value = _convert(option, text)
        except ValueError:
            continue
        if matches(value, option):
            return value
    raise ValueError(f"{flag.name} is {text!r}: it must be {must_be(hint, text)}")


def _convert(hint: Any, text: str) -> Any:
    """Returns what a text stands for; any other value if it does not fit."""
    if hint is types.NoneType or hint is bool:
        return {"None": None, "True": True, "False": False}.get(text, text)
    if get_origin(hint) is Literal:
        return next((x for x in get_args(hint) if str(x) == text), text)
    return hint(text)


def with_values(
    kind: type[T], base: T | None, values: Mapping[str, Any], where: str = ""
) -> T:
    """Returns a dataclass with the values of the paths of fields.

    Args:
      kind: the dataclass.
      base: the instance to change; None starts from the defaults of `kind`.
      values: path of a field, as in `Flag.path`, -> value.
      where: what the paths of fields begin with in messages.

    Raises:
      ValueError: if a field without a default gets no value, and what the dataclass
        raises.
    """
    hints, changed = get_type_hints(kind), {}
    for f in dataclasses.fields(kind):
        start = f"{f.name}."
        inside = {k[len(start) :]: v for k, v in values.items() if k.startswith(start)}
        before = _default(f) if base is None else getattr(base, f.name)
        if f.name in values:
            changed[f.name] = values[f.name]
        elif inside:
            section = _section(hints[f.name])
            assert section is not None
            changed[f.name] = with_values(section, before, inside, where + start)
        elif before is dataclasses.MISSING:
            name = where + f.name if where else f.name.upper()
            raise ValueError(f"{name} is missing; {_MORE}")
    return kind(**changed) if base is None else dataclasses.replace(base, **changed)


def _near(word: str, known: list[str]) -> str:
    """Returns what an unknown flag may stand for, in brackets; "" without an idea."""
    name = word.partition("=")[0]
    last = name.lstrip("-").rpartition(".")[2]
    for flag, others in _OTHER_WORDS.items():
        if flag in known and last in others.split():
            if flag.startswith("--"):
                return f" (did you mean {flag!r}?)"
            return f" ({flag} is given without a flag)"
    for advice, others in _ADVICE.items():
        if last in others.split():
            return f" ({advice})"
    by_last = {flag.lstrip("-").rpartition(".")[2]: flag for flag in reversed(known)}
    options = {flag.lstrip("-"): flag for flag in known} | by_last
    close = [last, *difflib.get_close_matches(name.lstrip("-"), options)]
    near = next((options[option] for option in close if option in options), None)
    return "" if near is None else f" (did you mean {near!r}?)"


def in_flags(message: str, kind: type) -> str:
    """Returns a message in which the fields of a dataclass are named by their flags."""
    names = {flag.path: flag.name for flag in flags_of(kind) if "." in flag.path}
    # The longest first, as a path may begin another.
    paths = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    if not names:
        return message
    return re.sub(rf"(?<![\w./-])({paths})(?!\w)", lambda path: names[path[0]], message)


def help_text(
    kind: type,
    prog: str,
    default: Any = None,
    *,
    about: str = "",
    first: Sequence[str] = (),
) -> str:
    """Returns the text of `--help`.

    Args:
      kind: the dataclass; its docstring begins the text, where `{prog}` is the program.
      prog: the program.
      default: an instance whose fields are the defaults; None takes those of `kind`.
      about: more text, below the docstring.
      first: paths of the flags that come first.
    """
    flags = flags_of(kind)
    if default is not None:
        flags = [dataclasses.replace(f, default=_at(default, f)) for f in flags]
    free = [flag for flag in flags if flag.is_positional]
    usage = [f"{f.name} ..." if f.takes_many else f.name for f in free]
    usage = [
        name if flag.default is dataclasses.MISSING else f"[{name}]"
        for name, flag in zip(usage, free, strict=True)
    ]
    columns = min(shutil.get_terminal_size().columns, 88) - 2
    text = f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{about}".replace("{prog}", prog)
    paragraphs = (
        textwrap.fill(p, columns, break_on_hyphens=False) for p in text.split("\n\n")
    )
    parser = argparse.ArgumentParser(
        usage=" ".join([prog, *usage, "[--flag VALUE ...]"]),
        description="\n\n".join(paragraphs),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=6, width=columns
        ),
        add_help=False,
    )
    matter = [flag for path in first for flag in flags if flag.path == path]
    groups = {"arguments": free, "the flags that matter most": matter}
    for flag in flags:
        if flag not in free and flag not in matter:
            groups.setdefault(flag.section or "flags", []).append(flag)
    for title, members in groups.items():
        if members:
            doc = (
                inspect.getdoc(members[0].owner) if members[0].section == title else ""
            )
            _add_flags(parser.add_argument_group(title, doc or None), members)
    return parser.format_help()


def _at(config: Any, flag: Flag) -> Any:
    """Returns what an instance has in the field of a flag, else the flag's default."""
    for name in flag.path.split("."):
        config = getattr(config, name, flag.default)
    return config


def _metavar(hint: Any) -> str:
    (first, *_) = get_args(hint) or (hint,)
    return "NAME" if Literal in map(get_origin, (hint, first)) else _METAVARS[first]


def _shown_default(flag: Flag) -> str:
    """Returns what follows a flag's help: the possible values and the default."""
    parts = []
    for option in (flag.hint, *get_args(flag.hint)):
        if get_origin(option) is Literal:
            parts.append(f"one of {', '.join(map(str, get_args(option)))}")
    value = flag.default
    if value is not dataclasses.MISSING and not flag.is_positional:
        texts = map(str, value) if isinstance(value, tuple) else [str(value)]
        shown = " ".join(x if x.isprintable() else repr(x) for x in texts)
        parts.append(f"default: {shown or 'none'}")
    return f" ({'; '.join(parts)})" if parts else ""
