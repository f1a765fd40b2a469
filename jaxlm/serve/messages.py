"""Messages and tools that clients send, checked, in the form that templates know."""

import re
from collections.abc import Mapping
from typing import Any

from jaxlm.fields import nearest
from jaxlm.files.strict_json import parse_object
from jaxlm.serve.bodies import Wrong
from jaxlm.terminal.printable import shown_value

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Role -> its fields beside the role and the content.
_MORE = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
_TEXTS = ("text", "input_text", "output_text")
# What an item that this server has sent has beside its text.
_OF_ITEMS = ("type", "id", "status")


def messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a chat, with text as their content.

    Raises:
      Wrong: for another role, a content that is no text, or calls that are none.
    """
    given = body.get("messages")
    if not given:
        raise Wrong("messages", "give at least one")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(given)]


def input_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the instructions and the input of `/v1/responses` as messages.

    Raises:
      Wrong: as `messages`.
    """
    given, instructions = body.get("input"), body.get("instructions")
    if not given:
        raise Wrong("input", "give a text, or a list of messages")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    first = [] if instructions is None else [("system", instructions)]
    found = [{"role": role, "content": content} for role, content in first]
    for i, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind != "message":
            what = f"{shown_value(kind)} is no message, and nothing else is taken here"
            raise Wrong(f"input[{i}].type", what)
        if isinstance(item, dict):
            item = {k: v for k, v in item.items() if k not in _OF_ITEMS}
        found.append(_message(f"input[{i}]", item))
    return found


def tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the tools that the model may call.

    Raises:
      Wrong: for tools that are no functions, or must be called.
    """
    given, choice = body.get("tools") or [], body.get("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise Wrong("tool_choice", 'it is "auto" or "none": no tool can be forced')
    found = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(given)]
    return found if choice == "auto" else []


def _message(at: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Wrong(at, "it is no object with a role and a content")
    message = {name: value for name, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Wrong(f"{at}.role", f"{shown_value(role)} is none of {', '.join(ROLES)}")
    known = ("role", "content", *_MORE.get(role, ()))
    _check_names(at, message, known)
    found: dict[str, Any] = {"role": role}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not calls:
            raise Wrong(f"{at}.tool_calls", "it is no list of calls")
        ats = [f"{at}.tool_calls[{i}]" for i in range(len(calls))]
        found["tool_calls"] = list(map(_call, ats, calls))
        content = "" if content is None else content
    for name in ("tool_call_id", "name"):
        if name in message:
            found[name] = _text(f"{at}.{name}", message[name])
    return {**found, "content": _content(f"{at}.content", content)}


def _content(at: str, content: Any) -> str:
    if not isinstance(content, list):
        return _text(at, content)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise Wrong(at, "this server takes parts of text only")
        _check_names(at, part, ("type", "text", "annotations", "logprobs"))
    return "".join(part["text"] for part in content)


def _tool(at: str, tool: Any) -> dict[str, Any]:
    function = _function(at, tool)
    _check_names(at, function, ("name", "description", "parameters", "strict"))
    if function.pop("strict", False) is not False:
        raise Wrong(f"{at}.function.strict", "a call is not held to its schema here")
    _text(f"{at}.function.description", function.get("description", ""))
    if not isinstance(function.get("parameters", {}), dict):
        raise Wrong(f"{at}.function.parameters", "it is no object")
    return {"type": "function", "function": function}


def _call(at: str, call: Any) -> dict[str, Any]:
    function = _function(at, call)
    _check_names(at, function, ("name", "arguments"))
    where = f"{at}.function.arguments"
    arguments = _text(where, function.get("arguments"))
    try:
        # Templates write objects, each in its own way.
        function["arguments"] = parse_object(arguments, "the text", allow_nan=False)
    except ValueError as error:
        raise Wrong(where, str(error)) from None
    id_ = _text(f"{at}.id", call.get("id", ""))
    return {"type": "function", "id": id_, "function": function}


def _function(at: str, value: Any) -> dict[str, Any]:
    """Returns the function of a tool or of a call, with a name."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type") != "function":
        raise Wrong(at, 'it is no {"type": "function", "function": {...}}')
    _check_names(at, value, ("type", "id", "function"))
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Wrong(
            f"{at}.function.name",
            f"{shown_value(name)} is no name of 1 to 64 letters, digits, _ and -",
        )
    return {name: value for name, value in function.items() if value is not None}


def _text(at: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong(at, "it is no text")
    return value


def _check_names(at: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            near = nearest(name, list(known))
            raise Wrong(f"{at}.{name}", f"this server has no such field{near}")
