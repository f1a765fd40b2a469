"""JSON schemas as automata: the texts are JSON values that a schema allows.

Not all of them: objects have the named properties in their order, and no others;
numbers have at most 15 digits; a space may follow `,` and `:`, and nothing else.
A keyword that could not be held is refused.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.fields import nearest
from jaxlm.infer.grammar.byte_automaton import (
    LAST_CHARACTER,
    Part,
    characters,
    choice,
    members,
    repeat,
    sequence,
    text,
)
from jaxlm.infer.grammar.regex import one_character, regex

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
# Keyword -> the type that it is about, where a schema names none.
_OF_TYPE = {
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("minimum", "maximum"), "number"),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), "number"),
}
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_VALUES = ("const", "enum")
# They change nothing.
_NOTES = frozenset(
    [
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "definitions",
        "title",
        "description",
        "default",
        "examples",
        "readOnly",
        "writeOnly",
        "deprecated",
    ]
)
_KNOWN = {"type", *_OF_TYPE, *_ALONE, *_VALUES, *_NOTES}
_DATE = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
}
_MAX_DIGITS = 15
_INTEGER = rf"-?(0|[1-9]\d{{0,{_MAX_DIGITS - 1}}})"
_NUMBER = rf"{_INTEGER}(\.\d{{1,{_MAX_DIGITS}}})?([eE][+-]?\d{{1,2}})?"
_COMMA = regex(", ?")
_COLON = regex(": ?")
# A value that a schema says nothing about has arrays and objects so deep.
_FREE_DEPTH = 1


def json_schema(schema: Any) -> Part:
    """Returns the JSON texts that a schema allows.

    Args:
      schema: an object or a boolean, as JSON has them.

    Raises:
      ValueError: for a schema that is wrong, allows nothing, or has a keyword that
        cannot be held; one line that begins with its place, as `$.properties.name`.
    """
    return _Compiler(schema).part(schema, "$")


def any_object() -> Part:
    """Returns objects of any names; what is in them is nested once at most."""
    return _object_of(_anything(_FREE_DEPTH))


class _Compiler:
    def __init__(self, root: Any):
        self._root = root
        self._open: tuple[str, ...] = ()
        """References that are being followed."""
        self._followed: dict[str, Part] = {}
        """What references lead to: schemas of a kilobyte can have 2**30 of them."""

    def part(self, schema: Any, at: str) -> Part:
        if schema is True or schema == {}:
            return _anything(_FREE_DEPTH)
        if schema is False:
            raise ValueError(f"{at}: false allows nothing")
        if not isinstance(schema, dict):
            raise ValueError(f"{at} is {_shown(schema)}: a schema is an object")
        for name in schema:
            if name not in _KNOWN:
                raise ValueError(
                    f"{at}: the keyword {_shown(name)} cannot be held"
                    f"{nearest(name, sorted(_KNOWN))}"
                )
        try:
            return self._part(schema, at)
        except RecursionError:
            raise ValueError(f"{at}: nested too deeply") from None

    def _part(self, schema: dict[str, Any], at: str) -> Part:
        alone = [name for name in _ALONE if name in schema]
        if alone:
            others = sorted(set(schema) - set(alone[:1]) - _NOTES)
            if others:
                raise ValueError(
                    f"{at}: {alone[0]} cannot be held together with {', '.join(others)}"
                )
            return self._alone(alone[0], schema[alone[0]], at)
        types = self._types(schema, at)
        if any(name in schema for name in _VALUES):
            return self._values(schema, types, at)
        makers: Mapping[str, Callable[[dict[str, Any], str], Part]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda *_: choice(text("true"), text("false")),
            "null": lambda *_: text("null"),
        }
        return choice(*(makers[name](schema, at) for name in types))

    def _types(self, schema: dict[str, Any], at: str) -> list[str]:
        given = schema.get("type")
        if given is None:
            about = {_OF_TYPE[name] for name in schema if name in _OF_TYPE}
            return sorted(about) or list(TYPES)
        types = given if isinstance(given, list) else [given]
        for name in types:
            if name not in TYPES:
                near = nearest(name, list(TYPES)) if isinstance(name, str) else ""
                raise ValueError(f"{at}.type: there is no type {_shown(name)}{near}")
        if not types:
            raise ValueError(f"{at}.type is empty: it allows nothing")
        return types

    def _alone(self, name: str, value: Any, at: str) -> Part:
        if name == "$ref":
            return self._reference(value, at)
        if not isinstance(value, list) or not value:
            raise ValueError(f"{at}.{name} is {_shown(value)}: give a list of schemas")
        if name == "allOf" and len(value) > 1:
            raise ValueError(f"{at}.allOf: more than one schema cannot be held")
        if name == "oneOf":
            self._check_apart(value, f"{at}.oneOf")
        return choice(*(self.part(s, f"{at}.{name}[{i}]") for i, s in enumerate(value)))

    def _check_apart(self, schemas: Sequence[Any], at: str) -> None:
        """Raises a ValueError unless no value can match two of the schemas."""
        seen: list[str] = []
        for i, schema in enumerate(schemas):
            here = f"{at}[{i}]"
            if not isinstance(schema, dict) or not isinstance(schema.get("type"), str):
                raise ValueError(f"{here}: it needs a type of its own; or take anyOf")
            # An integer is a number.
            name = "number" if schema["type"] == "integer" else schema["type"]
            if name in seen:
                raise ValueError(f"{here}: a second {name} may match too: take anyOf")
            seen.append(name)

    def _reference(self, value: Any, at: str) -> Part:
        if not isinstance(value, str) or not value.startswith("#"):
            raise ValueError(f"{at}.$ref is {_shown(value)}: it must begin with #/")
        if value in self._open:
            raise ValueError(
                f"{at}.$ref: {value} contains itself, which no finite automaton can "
                "hold: write its levels out"
            )
        if value in self._followed:
            return self._followed[value]
        target = self._root
        for name in value.removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or name not in target:
                raise ValueError(f"{at}.$ref: {_shown(value)} leads nowhere")
            target = target[name]
        before, self._open = self._open, (*self._open, value)
        part = self.part(target, value)
        self._open = before
        self._followed[value] = part
        return part

    def _values(self, schema: dict[str, Any], types: list[str], at: str) -> Part:
        values = schema.get("enum", [schema.get("const")])
        if "const" in schema and "enum" in schema:
            raise ValueError(f"{at}: const cannot be held together with enum")
        extra = sorted({*schema} - {*_VALUES, "type"} - _NOTES)
        if extra:
            raise ValueError(
                f"{at}: enum cannot be held together with {', '.join(extra)}"
            )
        if not isinstance(values, list):
            raise ValueError(f"{at}.enum is {_shown(values)}: give a list of values")
        fit = [v for v in values if _type_of(v) & {*types}]
        if not fit:
            raise ValueError(f"{at}: none of the values has the type: nothing is left")
        return choice(*map(_value, fit))

    def _object(self, schema: dict[str, Any], at: str) -> Part:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict):
            raise ValueError(f"{at}.properties is {_shown(properties)}: give an object")
        if not isinstance(required, list):
            raise ValueError(f"{at}.required is {_shown(required)}: give a list")
        for name in required:
            if name not in properties:
                raise ValueError(f"{at}.required: {_shown(name)} is not in properties")
        others = schema.get("additionalProperties", False)
        if not properties and others is not False:
            inside = self.part(others, f"{at}.additionalProperties")
            return _object_of(inside)
        parts = []
        for name, value in properties.items():
            key = sequence(_value(name), _COLON)
            inside = self.part(value, f"{at}.properties.{name}")
            parts.append((name in required, sequence(key, inside)))
        return sequence(text("{"), members(parts, _COMMA), text("}"))

    def _array(self, schema: dict[str, Any], at: str) -> Part:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise ValueError(f"{at}.prefixItems is {_shown(first)}: give a list")
        least, most = _bounds(schema, "minItems", "maxItems", at)
        items = schema.get("items", True)
        begin = [self.part(s, f"{at}.prefixItems[{i}]") for i, s in enumerate(first)]
        begin = begin if most is None else begin[:most]
        parts = [(i < least, part) for i, part in enumerate(begin)]
        if items is False:
            if least > len(begin):
                raise ValueError(f"{at}: fewer items are allowed than minItems {least}")
            return sequence(text("["), _prefix(parts), text("]"))
        item = self.part(items, f"{at}.items")
        more = None if most is None else most - len(begin)
        if not begin:
            return _list("[", item, "]", least, most)
        rest = repeat(sequence(_COMMA, item), max(least - len(begin), 0), more)
        whole = sequence(*_joined(begin), rest)
        if least >= len(begin):
            return sequence(text("["), whole, text("]"))
        return sequence(text("["), choice(_prefix(parts), whole), text("]"))

    def _string(self, schema: dict[str, Any], at: str) -> Part:
        used = [n for n in ("pattern", "format") if n in schema]
        lengths = [n for n in ("minLength", "maxLength") if n in schema]
        if len(used + lengths[:1]) > 1:
            names = " and ".join(used + lengths)
            raise ValueError(f"{at}: {names} cannot be held together")
        if used == ["pattern"]:
            return _quoted(self._regex(schema["pattern"], f"{at}.pattern"))
        if used:
            name = schema["format"]
            if name not in _FORMATS:
                known = ", ".join(_FORMATS)
                raise ValueError(
                    f"{at}.format: {_shown(name)} cannot be held; known: {known}"
                )
            return _quoted(regex(_FORMATS[name]))
        least, most = _bounds(schema, "minLength", "maxLength", at)
        return _quoted(repeat(_json_character(), least, most))

    def _regex(self, pattern: Any, at: str) -> Part:
        if not isinstance(pattern, str):
            raise ValueError(f"{at} is {_shown(pattern)}: give a regular expression")
        try:
            return regex(pattern, in_json=True, whole=False)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None

    def _number(self, schema: dict[str, Any], at: str) -> Part:
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if name in schema:
                raise ValueError(
                    f"{at}.{name} cannot be held for numbers: take the type integer"
                )
        return regex(_NUMBER)

    def _integer(self, schema: dict[str, Any], at: str) -> Part:
        low, high = None, None
        for name, step in (("minimum", 0), ("exclusiveMinimum", 1)):
            if (bound := _bound(schema, name, at)) is not None:
                low = bound + step if low is None else max(low, bound + step)
        for name, step in (("maximum", 0), ("exclusiveMaximum", 1)):
            if (bound := _bound(schema, name, at)) is not None:
                high = bound - step if high is None else min(high, bound - step)
        if low is None and high is None:
            return regex(_INTEGER)
        largest = 10**_MAX_DIGITS - 1
        low = -largest if low is None else low
        high = largest if high is None else high
        if low > high:
            raise ValueError(f"{at}: no integer is from {low} to {high}")
        negative = (
            [sequence(text("-"), _natural(max(1, -high), -low))] if low < 0 else []
        )
        natural = [_natural(max(low, 0), high)] if high >= 0 else []
        return choice(*negative, *natural)


def _natural(low: int, high: int) -> Part:
    """The digits of integers from low to high, 0 <= low <= high."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = 0 if digits == 1 else 10 ** (digits - 1)
        first, last = max(low, first), min(high, 10**digits - 1)
        parts.append(_same_length(str(first), str(last)))
    return choice(*parts)


def _same_length(low: str, high: str) -> Part:
    """Digits from low to high, which are of one length."""
    if not low.strip("0") and not high.strip("9"):
        return repeat(characters([(48, 57)]), len(low), len(low))
    rest = len(low) - 1
    if low[0] == high[0]:
        return sequence(text(low[0]), _same_length(low[1:], high[1:]))
    parts = [sequence(text(low[0]), _same_length(low[1:], "9" * rest))]
    if int(low[0]) + 1 < int(high[0]):
        middle = characters([(ord(low[0]) + 1, ord(high[0]) - 1)])
        parts.append(sequence(middle, repeat(characters([(48, 57)]), rest, rest)))
    parts.append(sequence(text(high[0]), _same_length("0" * rest, high[1:])))
    return choice(*parts)


def _bounds(
    schema: dict[str, Any], least: str, most: str, at: str
) -> tuple[int, int | None]:
    low, high = _bound(schema, least, at) or 0, _bound(schema, most, at)
    if low < 0 or (high is not None and high < low):
        raise ValueError(f"{at}: nothing has {least} {low} and {most} {high}")
    return low, high


def _bound(schema: dict[str, Any], name: str, at: str) -> int | None:
    value = schema.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and type(value) is not int:
        raise ValueError(f"{at}.{name} is {_shown(value)}: it must be an integer")
    if value is not None and abs(value) >= 10**_MAX_DIGITS:
        raise ValueError(f"{at}.{name}: at most {_MAX_DIGITS} digits can be held")
    return value


def _json_character() -> Part:
    return one_character([(0, LAST_CHARACTER)], in_json=True)


def _quoted(part: Part) -> Part:
    return sequence(text('"'), part, text('"'))


def _value(value: Any) -> Part:
    """One JSON value, in the form that Python writes."""
    return text(json.dumps(value, ensure_ascii=False))


def _joined(parts: list[Part]) -> list[Part]:
    return [p if i == 0 else sequence(_COMMA, p) for i, p in enumerate(parts)]


def _prefix(parts: list[tuple[bool, Part]]) -> Part:
    """The first of these parts, with commas between; those that are True must come."""
    if not parts:
        return text("")
    (must, part), *rest = parts

    def after(rest: list[tuple[bool, Part]]) -> Part:
        if not rest:
            return text("")
        (must, part), *rest = rest
        whole = sequence(_COMMA, part, after(rest))
        return whole if must else choice(text(""), whole)

    whole = sequence(part, after(rest))
    return whole if must else choice(text(""), whole)


def _list(begin: str, part: Part, end: str, least: int, most: int | None) -> Part:
    """So many parts, with commas between."""
    more = None if most is None else most - 1
    if most == 0:
        inside = text("")
    else:
        rest = repeat(sequence(_COMMA, part), max(least - 1, 0), more)
        inside = sequence(part, rest)
        inside = inside if least else choice(text(""), inside)
    return sequence(text(begin), inside, text(end))


def _object_of(value: Part) -> Part:
    key = _quoted(repeat(_json_character(), 0, None))
    return _list("{", sequence(key, _COLON, value), "}", 0, None)


def _anything(depth: int) -> Part:
    """Any value whose arrays and objects are nested so deep."""
    string = _quoted(repeat(_json_character(), 0, None))
    plain = [text("true"), text("false"), text("null"), regex(_NUMBER), string]
    if not depth:
        return choice(*plain)
    inside = _anything(depth - 1)
    return choice(*plain, _list("[", inside, "]", 0, None), _object_of(inside))


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    names = {str: "string", list: "array", dict: "object", type(None): "null"}
    return {names[type(value)]}


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=True)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
