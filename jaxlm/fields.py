"""Fields of dataclasses such as those of a config: their checks, and their JSON."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from jaxlm.terminal.printable import shown_value

# The largest number in float32, in which everything is computed or accumulated.
MAX_FLOAT = 3.4028234663852886e38
# What a value must be, as messages say it.
_RULES: dict[str, Callable[[Any], bool]] = {
    "> 0": lambda x: x > 0,
    "> 3": lambda x: x > 3,
    ">= 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "at least 1, at most a million": lambda x: 1 <= x <= 1e6,
    ">= 1, or -1": lambda x: x >= 1 or x == -1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "below 2**31": lambda x: x < 2**31,
    "in [0, 100]": lambda x: 0 <= x <= 100,
    "all at least 0.001": lambda x: all(v >= 0.001 for v in x),
    "at least one path": lambda x: bool(x) and all(x),
    "not empty": bool,
    "at least one value": bool,
    ">= 0 and not all zero": lambda x: min(x) >= 0 and sum(x) > 0,
}


def check(config: Any, where: str, rule: str, *names: str) -> None:
    """Raises ValueError for a field, other than None, that breaks the rule."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not _RULES[rule](value):
            raise ValueError(
                f"{where}.{name} is {shown_value(value)}: it must be {rule}"
            )


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return any(matches(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(matches(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}


def must_be(hint: Any, value: Any) -> str:
    """Returns what a value must be to fit a field: `an integer`.

    Args:
      hint: the type of the field.
      value: the wrong value; the nearest of several possible ones is suggested.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        names = [str(a) for a in args]
        if len(names) == 1:
            return repr(args[0])
        options = ", ".join(repr(a) for a in args)
        return f"one of {options}{nearest(str(value)[:100], names)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(must_be(a, value) for a in args)
    if origin is tuple:
        return f"a tuple, and each of its values {must_be(args[0], value)}"
    return _KINDS.get(hint, f"a {hint.__name__}")


def check_types(config: Any, where: str) -> None:
    """Raises ValueError for a field of the wrong type, infinite or not a number."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, float) and not abs(v) <= MAX_FLOAT for v in numbers):
            raise ValueError(
                f"{where}.{f.name} is {shown_value(value)}: it must be finite in "
                "float32"
            )
        if any(isinstance(v, int) and abs(v) >= 2**63 for v in numbers):
            raise ValueError(
                f"{where}.{f.name} is {shown_value(value)}: it must be below 2**63"
            )
        if not matches(value, hint):
            kind = must_be(hint, value)
            raise ValueError(
                f"{where}.{f.name} is {shown_value(value)}: it must be {kind}"
            )
        if float in (hint, *get_args(hint)) and isinstance(value, int):
            # Integers are valid floats, but 1 and 1.0 must give equal configs.
            object.__setattr__(config, f.name, float(value))


def nearest(name: str, options: list[str]) -> str:
    """Returns ` (did you mean X?)` for the option most like `name`, else ""."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as plain values for JSON (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def named_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of `to_dict` by dotted name, such as `train.steps`."""
    named = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            named |= named_values(value, f"{prefix}{name}.")
        else:
            named[prefix + name] = value
    return named


# Fields of earlier versions that stored configs may have, by class.
_RETIRED = {"TrainConfig": ("tensorboard",)}


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Inverts `to_dict`.

    Raises:
      ValueError: for an unknown, missing or wrongly typed field, named by its path.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {shown_value(values)}: it must be a JSON object")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    retired = _RETIRED.get(cls.__name__, ())
    values = {name: value for name, value in values.items() if name not in retired}
    for name in values:
        if name not in known:
            raise ValueError(
                f"{where}: unknown field {shown_value(name)}"
                f"{nearest(name[:100], list(known))}"
            )
    kwargs = {
        name: _value_from_json(value, hints[name], f"{where}.{name}")
        for name, value in values.items()
    }
    for name, f in known.items():
        is_required = f.default is f.default_factory is dataclasses.MISSING
        if name not in kwargs and is_required:
            raise ValueError(f"{where}: field {name!r} is missing")
    return cls(**kwargs)


def _value_from_json(value: Any, hint: Any, where: str) -> Any:
    for option in get_args(hint) or (hint,):
        is_config = isinstance(option, type) and dataclasses.is_dataclass(option)
        if is_config and isinstance(value, Mapping):
            return from_dict(option, value, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def diff(old: Any, new: Any, ignore: tuple[str, ...] = ()) -> list[str]:
    """Returns a line `field: old -> new` for each field that differs."""
    lines = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if f.name in ignore or a == b:
            continue
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            lines += [f"{f.name}.{line}" for line in diff(a, b, ignore)]
        else:
            lines.append(f"{f.name}: {_shown(a)} -> {_shown(b)}")
    return lines


def _shown(value: Any) -> str:
    """Returns a value in a message; those of a tuple as on the command line."""
    if not isinstance(value, tuple):
        return repr(value)
    return " ".join(map(str, value)) or "none"
