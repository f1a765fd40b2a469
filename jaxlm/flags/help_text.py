"""The text of `--help`: every flag, with its meaning, values and default."""

import argparse
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jaxlm.flags.flag_table import Flag, flags_of

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "BOOL"}


def help_text(
    kind: type,
    prog: str,
    defaults: Any = None,
    *,
    about: str = "",
    first: Sequence[str] = (),
) -> str:
    """Returns the text of `--help`.

    Args:
      kind: the dataclass; its docstring begins the text, where `{prog}` is the program.
      prog: the program.
      defaults: as `flags_of` takes them.
      about: more text, below the docstring.
      first: paths of the flags that come first.
    """
    flags = flags_of(kind, defaults)
    free = [flag for flag in flags if flag.is_positional]
    usage = [prog]
    for flag in free:
        name = f"{flag.name} ..." if flag.takes_many else flag.name
        usage.append(name if flag.default is dataclasses.MISSING else f"[{name}]")
    columns = min(shutil.get_terminal_size().columns, 88) - 2
    text = f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{about}".replace("{prog}", prog)
    paragraphs = (
        textwrap.fill(p, columns, break_on_hyphens=False, break_long_words=False)
        for p in text.split("\n\n")
    )
    parser = argparse.ArgumentParser(
        usage=" ".join([*usage, "[--flag VALUE ...]"]),
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
            is_section = members[0].section == title
            about_it = inspect.getdoc(members[0].owner) if is_section else None
            add_flags(parser.add_argument_group(title, about_it), members)
    return parser.format_help()


def _metavar(hint: Any) -> str:
    (first, *_) = get_args(hint) or (hint,)
    is_choice = Literal in (get_origin(hint), get_origin(first))
    return "NAME" if is_choice else _METAVARS[first]


def _values_and_default(flag: Flag) -> str:
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


class _Switch(argparse.Action):
    """Sets a boolean field: `--fresh`, `--no-fresh`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def add_flags(group: argparse._ActionsContainer, flags: Iterable[Flag]) -> None:
    """Adds flags, whose values stay texts, to a parser or to a group of its help."""
    for flag in flags:
        about = f"{flag.doc}{_values_and_default(flag)}".replace("%", "%%")
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
            # `with_values` finds out whether it is missing.
            options = {"nargs": "?", **options, "metavar": flag.name}
            group.add_argument(flag.path, **options)
        else:
            group.add_argument(flag.name, dest=flag.path, **options)
    if isinstance(group, argparse.ArgumentParser):
        group.add_argument("-h", "--help", dest="help", action="store_true")
