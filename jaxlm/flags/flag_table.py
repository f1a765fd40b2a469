"""The flags of a dataclass: its field `train.steps` is the flag `--train.steps`."""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""An argument without a flag; in messages it is the name of the field in capitals."""
Flat = Annotated[T, "flat"]
"""A dataclass whose flags have no prefix."""


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
    """The value without the flag; MISSING if it has to be given."""
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


def flags_of(kind: type, defaults: Any = None) -> list[Flag]:
    """Returns the flags of a dataclass, with those of the dataclasses in it.

    Args:
      defaults: an instance whose fields are the defaults; None takes those of `kind`.
    """
    return list(_flags(kind, defaults, "", "--", ""))


def _flags(
    kind: type, defaults: Any, path: str, prefix: str, section: str
) -> Iterator[Flag]:
    hints = get_type_hints(kind, include_extras=True)
    for f in dataclasses.fields(kind):
        hint, *marks = _without_marks(hints[f.name])
        inner, name = section_of(hint), f.name.replace("_", "-")
        default = getattr(defaults, f.name, default_of(f))
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


def section_of(hint: Any) -> Any:
    """Returns the dataclass that a field holds; None if it holds none."""
    options = (hint, *get_args(hint))
    return next((x for x in options if dataclasses.is_dataclass(x)), None)


def default_of(f: dataclasses.Field) -> Any:
    """Returns the default of a field; MISSING without one."""
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


def in_flags(message: str, kind: type) -> str:
    """Returns a message in which the fields of a dataclass are named by their flags."""
    names = {flag.path: flag.name for flag in flags_of(kind) if "." in flag.path}
    # The longest first, as a path may begin another.
    paths = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    if not names:
        return message
    return re.sub(rf"(?<![\w./-])({paths})(?!\w)", lambda path: names[path[0]], message)
