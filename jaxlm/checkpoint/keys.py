"""Strict reading of the keys with which a published file describes a model."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxlm.fields import MAX_FLOAT, nearest
from jaxlm.terminal.printable import shown, shown_value

# No model is wider or deeper: larger numbers mean a broken or hostile file.
MAX_COUNT = 1 << 24
MAX_LAYERS = 4096

REQUIRED = object()


class Keys:
    """The keys of one file. `done` checks that each was read or has no effect."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._values = dict(values)

    def __contains__(self, name: str) -> bool:
        return name in self._values  # also if its value is null

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Takes a value of any type; null counts as absent.

        Raises:
          ValueError: if it is absent and has no default.
        """
        value = self._values.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.where}: {name} is missing")
        return default

    def peek(self, name: str) -> Any:
        """Returns a value that is still to be taken."""
        return self._values.get(name)

    def put(self, name: str, value: Any) -> None:
        """Replaces the value of a key, as if the file had it."""
        self._values[name] = value

    def _typed(
        self, name: str, default: Any, kinds: tuple[type, ...], what: str
    ) -> Any:
        value = self.take(name, default)
        wrong = isinstance(value, bool) and bool not in kinds
        if value is not default and (wrong or not isinstance(value, kinds)):
            raise ValueError(
                f"{self.where}: {name} is {shown_value(value)}, not {what}"
            )
        return value

    def count(self, name: str, default: Any = REQUIRED, most: int = MAX_COUNT) -> Any:
        """Takes an integer from 1 to `most`, or the default."""
        value = self._typed(name, default, (int,), "an integer")
        if value is not default and not 1 <= value <= most:
            raise ValueError(
                f"{self.where}: {name} is {shown_value(value)}, not from 1 to {most}"
            )
        return value

    def index(self, name: str, default: int) -> int:
        """Takes an integer >= 0, or the default."""
        value = self._typed(name, default, (int,), "an integer")
        if value < 0:
            raise ValueError(f"{self.where}: {name} is {value}, below 0")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """Takes a finite number, or the default."""
        value = self._typed(name, default, (int, float), "a number")
        # Compared first: a longer integer has no float.
        if value is not default and not abs(value) <= MAX_FLOAT:
            raise ValueError(
                f"{self.where}: {name} is {shown_value(value)}, not finite in float32"
            )
        return value if value is None else float(value)

    def positive(self, name: str, default: float) -> float:
        """Takes a finite number above 0, or the default."""
        value = self.number(name, default)
        if value <= 0:
            raise ValueError(f"{self.where}: {name} is {value}, not above 0")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """Takes true or false, or the default."""
        return self._typed(name, default, (bool,), "true or false")

    def choice(self, name: str, choices: Mapping[str, Any], default: Any) -> Any:
        """Takes one of several words, and returns the value that it stands for."""
        word = self.take(name, default)
        if not isinstance(word, str) or word not in choices:
            raise ValueError(
                f"{self.where}: {name} is {shown_value(word)}"
                f"{nearest(str(word)[:100], list(choices))}; "
                f"known are {', '.join(choices)}"
            )
        return choices[word]

    def items(self, name: str, kind: type, default: Any = REQUIRED) -> list[Any]:
        """Takes a list of values of one type, or the default."""
        values = self._typed(name, default, (list,), "a list")
        if values is default:
            return values
        kinds = (int, float) if kind is float else (kind,)
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kinds)]
        if kind is float:
            wrong = wrong or [v for v in values if not abs(v) <= MAX_FLOAT]
        if wrong or len(values) > MAX_LAYERS:
            raise ValueError(
                f"{self.where}: {name} is not a list of at most {MAX_LAYERS} "
                f"{kind.__name__} values"
            )
        return values

    def values(self, name: str) -> dict[str, Any]:
        """Takes a nested dictionary; an absent one is empty."""
        return self._typed(name, {}, (dict,), "a dictionary")

    def section(self, name: str) -> "Keys":
        """Takes the keys of a nested dictionary; none if it is absent."""
        return Keys(self.values(name), f"{self.where}: {name}")

    def must(self, name: str, *allowed: Any) -> None:
        """Takes a key that must be absent, null or one of the allowed values.

        Raises:
          ValueError: if it has another value.
        """
        value = self._values.pop(name, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.where}: {name} is {shown_value(value)}, which this jaxlm "
                f"cannot compute "
                f"(only {' or '.join(map(repr, allowed)) or 'null'})"
            )

    def drop(self, *names: str) -> None:
        """Takes keys that have no effect here."""
        for name in names:
            self._values.pop(name, None)

    def done(self, no_effect: Collection[str] = ()) -> None:
        """Raises ValueError if a key that may have an effect was not taken."""
        left = sorted(n for n, v in self._values.items() if v is not None)
        left = [shown(name) for name in left if name not in no_effect]
        if left:
            raise ValueError(
                f"{self.where}: this jaxlm does not know {', '.join(left[:8])}, which "
                "may change what the model computes: the model is not read"
            )
