"""JSON from files that may be damaged or hostile."""

import json
from typing import Any

from jaxlm.terminal.printable import shown


def parse(text: str | bytes, where: str, *, allow_nan: bool = True) -> Any:
    """Parses JSON whose objects have unique names.

    Args:
      text: bytes are UTF-8.
      where: what the text is, for messages.
      allow_nan: allow NaN and Infinity, which Python writes, but JSON does not have.

    Raises:
      ValueError: if it is anything else, or nested too deeply.
    """
    constant: dict[str, Any] = {} if allow_nan else {"parse_constant": _no_constant}
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_unique, **constant)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def parse_object(
    text: str | bytes, where: str, *, allow_nan: bool = True
) -> dict[str, Any]:
    """Parses a JSON object; arguments and errors as `parse`."""
    value = parse(text, where, allow_nan=allow_nan)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen = set()
        duplicate = next(n for n, _ in pairs if n in seen or seen.add(n))
        raise ValueError(f"the name {shown(duplicate)} appears twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
