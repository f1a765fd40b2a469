"""Stop strings found in tokens, against a search in the text."""

import random

import numpy as np
import pytest

from jaxlm.infer.rules.stop_strings import STOPPED, StopText, stop_table, until_stop

# Tokens of one to four letters, one without text, and one with half of a character.
TOKENS = ["a", "b", "c", "ab", "ba", "abc", "cab", "", "bcab", "aaaa"]
TOKEN_BYTES = [*(t.encode() for t in TOKENS), "é".encode()[:1], "é".encode()[1:]]
STRINGS = [("abca",), ("aa", "bcb"), (), ("cabcab", "bb", "é"), ("aaaaaaa",)]


def first_stopped(strings, tokens):
    """The number of tokens after which the automaton stops; None if it does not."""
    table = stop_table([(), strings], TOKEN_BYTES, len(TOKEN_BYTES) + 3)
    _, state = table.start_states
    for n, token in enumerate(tokens, start=1):
        state = table.next_states[state, token]
        if state == STOPPED:
            # It stays so, whatever comes.
            assert (table.next_states[STOPPED] == STOPPED).all()
            return n
    return None


@pytest.mark.parametrize("strings", STRINGS)
def test_the_automaton_stops_where_the_text_contains_one(strings):
    rng = random.Random(0)
    stopped = 0
    for _ in range(300):
        tokens = [rng.randrange(len(TOKEN_BYTES) + 3) for _ in range(12)]
        data, wanted = b"", None
        for n, token in enumerate(tokens, start=1):
            data += TOKEN_BYTES[token] if token < len(TOKEN_BYTES) else b""
            if any(s.encode() in data for s in strings):
                wanted = n
                break
        assert first_stopped(strings, tokens) == wanted
        stopped += wanted is not None
    assert 0 < stopped < 300 or not strings


def test_rows_do_not_meet():
    """Each row has the states of its own strings, and equal ones share them."""
    rows = [("abc",), (), ("abd",), ("abc",)]
    table = stop_table(rows, TOKEN_BYTES, len(TOKEN_BYTES))
    first, none, other, same = table.start_states
    assert first == same and len({first, none, other}) == 3
    abc = TOKENS.index("abc")
    assert table.next_states[first, abc] == STOPPED
    assert table.next_states[none, abc] == none
    assert table.next_states[other, abc] == other


def test_the_size_of_the_table_takes_few_values():
    sizes = {
        len(stop_table([("x" * n,)], TOKEN_BYTES, 12).next_states) for n in range(1, 40)
    }
    assert len(sizes) == 3
    assert len(stop_table([()], [], 12).next_states) == min(sizes)


@pytest.mark.parametrize("strings", STRINGS)
def test_text_is_cut_before_a_stop_string(strings):
    rng = random.Random(1)
    for _ in range(300):
        pieces = [rng.choice(["a", "b", "c", "é", "ab", "", "cab"]) for _ in range(9)]
        text = "".join(pieces)
        stop, shown = StopText(strings), []
        for piece in pieces:
            shown.append(stop.feed(piece))
            # What was shown is never taken back.
            assert text.startswith("".join(shown))
            if stop.is_stopped:
                break
        found = [text.find(s) for s in strings if s in text]
        assert stop.is_stopped == bool(found)
        shown.append(stop.finish())
        if not found:
            assert "".join(shown) == text
        else:
            assert not any(s in "".join(shown) for s in strings)
            assert "".join(shown) in {text[:at] for at in range(len(text))}


def test_only_a_possible_start_is_held_back():
    stop = StopText(["\nUser:"])
    assert stop.feed("Hi.\n") == "Hi."
    assert stop.feed("Us") == ""
    assert stop.feed("ing") == "\nUsing"
    assert stop.feed(" it\nUser: x") == " it" and stop.is_stopped
    assert stop.feed("more") == stop.finish() == ""
    assert until_stop("one\nUser: two", ["\nUser:"]) == "one"
    assert until_stop("one\nUse", ["\nUser:"]) == "one\nUse"


def test_no_stop_strings_take_no_memory():
    """The table of a large vocabulary is a view of one column."""
    table = stop_table([()], [], 1_000_000).next_states
    assert isinstance(table, np.ndarray) and table.strides[1] == 0
