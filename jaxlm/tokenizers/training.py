"""What the trainers of tokenizers share: passages of text, and a thread to work in."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# Passages of several lines let SentencePiece learn pieces with newlines: the bundled
# text has 8% fewer tokens than with one line each.
PASSAGE_CHARACTERS = 2000
# More text hardly changes the pieces, and SentencePiece needs many times its size in
# memory.
MAX_CHARACTERS = 100_000_000


def passages(texts: Iterable[str], limit: int = MAX_CHARACTERS) -> list[str]:
    """Cuts texts into passages; keeps evenly spaced ones of at most `limit` characters.

    A passage ends after a line, else before a word, else anywhere.
    """
    kept, size, stride = [], 0, 1
    for number, passage in enumerate(cut_passages((text, True) for text in texts)):
        if number % stride:
            continue
        kept.append(passage)
        size += len(passage)
        if size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


def cut_passages(parts: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """Cuts texts that come in parts; each with whether it is the last part of a text.

    The passages do not depend on the parts, and are not cut further by `passages`.
    """
    rest = ""
    for text, is_last in parts:
        rest, start = rest + text, 0
        while start < len(rest):
            end = start + PASSAGE_CHARACTERS
            if end < len(rest):
                line = rest.rfind("\n", start, end) + 1
                end = line or rest.rfind(" ", start + 1, end)
                end = end if end > start else start + PASSAGE_CHARACTERS
            elif not is_last:
                break
            yield rest[start:end]
            start = end
        rest = rest[start:]


def interruptible(work: Callable[[], T]) -> T:
    """Calls a function in a thread, so that Ctrl-C works while a library computes."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]
