"""Strict reading of the keys that describe a model in a published file."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxlm.config import nearest

# More layers, or wider ones, than any model has: a broken or hostile file.
_MOST = 1 << 24
MOST_LAYERS = 4096

REQUIRED = object()


class Keys:
    """The keys that describe a model in a file: each is read, or has no effect."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._values = dict(values)

    def __contains__(self, name: str) -> bool:
        return name in self._values  # also where it is null

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """A value of any type; null is as if absent.

        Raises:
          ValueError: when it is absent and has no default.
        """
        value = self._values.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.where}: {name} is missing")
        return default

    def peek(self, name: str) -> Any:
        """A value, left to be read later."""
        return self._values.get(name)

    def put(self, name: str, value: Any) -> None:
        """Another value for a key, as if the file had it."""
        self._values[name] = value

    def _typed(
        self, name: str, default: Any, kinds: tuple[type, ...], what: str
    ) -> Any:
        value = self.take(name, default)
        wrong = isinstance(value, bool) and bool not in kinds
        if value is not default and (wrong or not isinstance(value, kinds)):
            raise ValueError(f"{self.where}: {name} is {value!r}, and not {what}")
        return value

    def count(self, name: str, default: Any = REQUIRED, most: int = _MOST) -> Any:
        """A whole number from 1 to `most`, or the default."""
        value = self._typed(name, default, (int,), "a whole number")
        if value is not default and not 1 <= value <= most:
            raise ValueError(f"{self.where}: {name} is {value}, not from 1 to {most}")
        return value

    def index(self, name: str, default: int) -> int:
        """A whole number from 0 on."""
        value = self._typed(name, default, (int,), "a whole number")
        if value < 0:
            raise ValueError(f"{self.where}: {name} is {value}, below 0")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number, or the default."""
        value = self._typed(name, default, (int, float), "a number")
        if value is not default and not math.isfinite(value):
            raise ValueError(f"{self.where}: {name} is {value}, and not finite")
        return value if value is None else float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """true or false."""
        return self._typed(name, default, (bool,), "true or false")

    def choice(self, name: str, choices: Mapping[str, Any], default: Any) -> Any:
        """The value that one of several words stands for."""
        word = self.take(name, default)
        if not isinstance(word, str) or word not in choices:
            raise ValueError(
                f"{self.where}: {name} is {word!r}{nearest(str(word), list(choices))}; "
                f"known are {', '.join(choices)}"
            )
        return choices[word]

    def items(self, name: str, kind: type, default: Any = REQUIRED) -> list[Any]:
        """A list of values of one type."""
        values = self._typed(name, default, (list,), "a list")
        if values is default:
            return values
        kinds = (int, float) if kind is float else (kind,)
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kinds)]
        if wrong or len(values) > MOST_LAYERS:
            raise ValueError(
                f"{self.where}: {name} is no list of at most {MOST_LAYERS} "
                f"{kind.__name__} values"
            )
        return values

    def values(self, name: str) -> dict[str, Any]:
        """A dictionary inside this one; empty when it is absent."""
        return self._typed(name, {}, (dict,), "a dictionary")

    def section(self, name: str) -> "Keys":
        """The keys of a dictionary inside this one; none when it is absent."""
        return Keys(self.values(name), f"{self.where}: {name}")

    def must(self, name: str, *allowed: Any) -> None:
        """A key that may be absent or have one of few values.

        Raises:
          ValueError: when it has another.
        """
        value = self._values.pop(name, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.where}: {name} is {value!r}, which this jaxlm cannot compute "
                f"(it can with {' or '.join(map(repr, allowed)) or 'null'})"
            )

    def drop(self, *names: str) -> None:
        """Keys that have no effect here."""
        for name in names:
            self._values.pop(name, None)

    def done(self, no_effect: Collection[str] = ()) -> None:
        """Raises ValueError when a key that may have an effect was not read."""
        left = sorted(n for n, v in self._values.items() if v is not None)
        left = [name for name in left if name not in no_effect]
        if left:
            raise ValueError(
                f"{self.where}: this jaxlm does not know {', '.join(left)}, which may "
                "change what the model computes: the model is not read"
            )
