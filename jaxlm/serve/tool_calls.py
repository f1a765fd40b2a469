"""Calls of tools in an answer, as Hermes' and Qwen's models write them.

The form is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from jaxlm.files.strict_json import parse_object

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_BEGUN = "|".join(re.escape(OPENING[:n]) for n in range(len(OPENING) - 1, 0, -1))
# White space, and what may become an opening.
_HELD = re.compile(rf"\s*(?:{_BEGUN})?\Z")


class CallText:
    """Takes calls out of a text, as the text comes."""

    def __init__(self, names: Collection[str]):
        """Names of functions; a call of another one stays text."""
        self._names, self._held = names, ""
        self.calls: list[dict[str, Any]] = []
        """Those so far, as a chat completion has them."""

    def feed(self, text: str) -> str:
        """Returns the text that is no call, without white space before a call."""
        self._held += text
        shown = ""
        while OPENING in self._held:
            before, _, after = self._held.partition(OPENING)
            inner, closing, rest = after.partition(CLOSING)
            if not closing:
                return shown
            call = self._call(inner)
            if call is None:
                shown += before + OPENING + inner + CLOSING
            else:
                shown += before.rstrip()
                self.calls.append(call)
            self._held = rest
        held = _HELD.search(self._held)
        assert held is not None
        shown, self._held = shown + self._held[: held.start()], held[0]
        return shown

    def finish(self) -> str:
        """Returns the text at the end that has become no call."""
        held, self._held = self._held, ""
        return held if held.strip() or not self.calls else ""

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            call = parse_object(text, "the call", allow_nan=False)
        except ValueError:
            return None
        name, arguments = call.get("name"), call.get("arguments")
        if name not in self._names or not isinstance(arguments, dict):
            return None
        function = {"name": name, "arguments": json.dumps(arguments)}
        id_ = f"call_{secrets.token_hex(12)}"
        return {"id": id_, "type": "function", "function": function}
