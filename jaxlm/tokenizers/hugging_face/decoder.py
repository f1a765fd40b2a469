"""How the tokens of a tokenizer.json become bytes, according to its decoder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from jaxlm.terminal.printable import shown_value

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@dataclass
class Decoding:
    """How the text of a token becomes bytes, according to the file's `decoder`."""

    byte_level: bool = False
    """Each character of a token is a byte."""
    byte_fallback: bool = False
    """`<0x0A>` is a byte."""
    replacements: list[tuple[str, str]] = field(default_factory=list)
    leading_spaces: Literal["keep", "drop one", "drop token"] = "keep"

    def bytes_of(self, token: str) -> bytes:
        """Returns the bytes that a token of the model adds to a text."""
        if self.byte_level:
            alphabet = byte_of_character()
            if all(c in alphabet for c in token):
                return bytes(alphabet[c] for c in token)
            return token.encode("utf-8")
        if self.byte_fallback and (match := _BYTE_PIECE.match(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


def decoding_of(steps: Sequence[Mapping[str, Any]]) -> Decoding:
    """Reads the steps of a decoder; raises ValueError for an unsupported one."""
    out, fused = Decoding(), False
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and len(steps) == 1:
            out.byte_level = True
        elif kind == "ByteFallback" and not fused:
            out.byte_fallback = True
        elif kind == "Replace" and not fused and "String" in step.get("pattern", {}):
            out.replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and _strips_one(step):
            out.leading_spaces = "drop one" if step["start"] else "keep"
        elif kind == "Metaspace" and not fused:
            out.replacements.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                out.leading_spaces = "drop token"
        else:
            raise ValueError(_no_decoder(f"has the step {shown_value(step)}"))
    if not steps:
        raise ValueError(_no_decoder("is missing"))
    return out


def _strips_one(step: Mapping[str, Any]) -> bool:
    return (step["content"], step["stop"]) == (" ", 0) and step["start"] in (0, 1)


def _no_decoder(what: str) -> str:
    return (
        f"the decoder {what}: jaxlm knows byte-level decoders and those of "
        "SentencePiece (Replace, ByteFallback, Fuse, Strip of one space, Metaspace)"
    )


@cache
def byte_of_character() -> dict[str, int]:
    """Returns GPT-2's alphabet: a visible character for each byte.

    Bytes that are printable in Latin-1 are written as themselves, the 68 others as the
    characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    characters = {chr(b): b for b in visible}
    return characters | {chr(0x100 + i): b for i, b in enumerate(others)}
