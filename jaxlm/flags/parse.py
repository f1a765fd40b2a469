"""Parses command lines into dataclasses.

argparse splits the command line. The values, and the words about wrong ones, come from
the dataclass itself.

Nothing here imports JAX, so a wrong flag is reported at once.
"""

import argparse
import dataclasses
import itertools
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxlm.fields import matches, must_be
from jaxlm.files.local_path import local_path
from jaxlm.flags.flag_table import Flag, default_of, flags_of, section_of
from jaxlm.flags.help_text import add_flags, help_text
from jaxlm.flags.suggestions import suggestion
from jaxlm.terminal.printable import shown_value

T = TypeVar("T")
_MORE = "--help lists the flags, the most useful first"
_YES_AND_NO = {"true", "false", "yes", "no", "on", "off", "1", "0"}


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
    names = Counter(word.partition("=")[0] for word in words)
    for flag in flags.values():
        # Of one value the last is taken, on which scripts rely; a list would lose some.
        if flag.takes_many and names[flag.name] > 1:
            raise ValueError(
                f"{flag.name} is there {names[flag.name]} times: give all its values "
                f"after one, {flag.name} A B"
            )
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        usage=" ",
    )
    add_flags(parser, flags.values())
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
            raise ValueError(
                f"unknown flag {shown_value(typed)}{suggestion(word, known)}; {_MORE}"
            )
    if left:
        raise ValueError(f"unexpected argument {shown_value(left[0])}; {_MORE}")
    return {
        path: _value(flags[path], given) if path in flags else given
        for path, given in vars(found).items()
    }


def _with_hyphens(argument: str) -> str:
    """Writes a flag with hyphens, as both spellings are the same; -o is --out."""
    name, equals, value = argument.partition("=")
    if name == "-o":
        name = "--out"
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name + equals + value


def _fail_on_value(switch: Flag) -> None:
    raise ValueError(f"{switch.name} takes no value: {switch.off} is its opposite")


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
    if isinstance(given, list):
        given = "--"  # argparse drops it from `--prompt=--`, before Python 3.12.5
    return _from_text(flag, flag.hint, given)


def _from_text(flag: Flag, hint: Any, text: str) -> Any:
    is_union = get_origin(hint) in (types.UnionType, Union)
    options = get_args(hint) if is_union else (hint,)
    if Path in options:
        local_path(text, flag.name)
    # So that `None` is no text.
    for option in sorted(options, key=lambda x: x is not types.NoneType):
        try:
            value = _convert(option, text)
        except ValueError:
            continue
        if matches(value, option):
            return value
    # A value None is that of a flag that is left out.
    kinds = [must_be(x, text) for x in options if x is not types.NoneType]
    raise ValueError(
        f"{flag.name} is {shown_value(text)}: it must be {' or '.join(kinds)}"
    )


def _convert(hint: Any, text: str) -> Any:
    """Returns what a text stands for; any other value if it does not fit."""
    if hint is types.NoneType or hint is bool:
        return {"None": None, "True": True, "False": False}.get(text, text)
    if get_origin(hint) is Literal:
        return next((x for x in get_args(hint) if str(x) == text), text)
    return hint(text)


def with_values(
    kind: type, base: Any, values: Mapping[str, Any], where: str = ""
) -> Any:
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
        before = default_of(f) if base is None else getattr(base, f.name)
        if f.name in values:
            changed[f.name] = values[f.name]
        elif inside:
            section = section_of(hints[f.name])
            assert section is not None
            changed[f.name] = with_values(section, before, inside, where + start)
        elif before is dataclasses.MISSING:
            name = where + f.name if where else f.name.upper()
            raise ValueError(f"{name} is missing; {_MORE}")
    return kind(**changed) if base is None else dataclasses.replace(base, **changed)
