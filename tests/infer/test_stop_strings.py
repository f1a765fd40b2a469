"""Stop strings found in tokens, against a search in the text."""

import random

import numpy as np
import pytest

from jaxlm.infer.rules.automata import ENDED, Automata, Automaton
from jaxlm.infer.rules.automaton_cache import AutomatonCache
from jaxlm.infer.rules.stop_strings import StopText, stop_automaton, until_stop

# Tokens of one to four letters, one without text, and one with half of a character.
TOKENS = ["a", "b", "c", "ab", "ba", "abc", "cab", "", "bcab", "aaaa"]
TOKEN_BYTES = (*(t.encode() for t in TOKENS), "é".encode()[:1], "é".encode()[1:])
STRINGS = [("abca",), ("aa", "bcb"), (), ("cabcab", "bb", "é"), ("aaaaaaa",)]


def first_stopped(strings, tokens):
    """The number of tokens after which the automaton stops; None if it does not."""
    size = len(TOKEN_BYTES) + 3
    automata = Automata(size)
    # Of other rows, before and after it.
    state, table = 1, automata.table
    if strings:
        held = {s: stop_automaton(s, TOKEN_BYTES, size) for s in (("c",), strings)}
        state, table = automata.hold(held)[strings], automata.table
    for n, token in enumerate(tokens, start=1):
        state = table[state, token]
        if state == ENDED:
            # It stays so, whatever comes.
            assert (table[ENDED] == ENDED).all()
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


def stop(*strings):
    return stop_automaton(strings, TOKEN_BYTES, len(TOKEN_BYTES))


def test_rows_do_not_meet():
    """Each row has the states of its own strings, and equal ones share them."""
    automata = Automata(len(TOKEN_BYTES))
    first = automata.hold({"first": stop("abc"), "other": stop("abd")})
    same = automata.hold({"first": stop("abc")})
    assert same["first"] == first["first"] != first["other"]
    abc, table = TOKENS.index("abc"), automata.table
    assert table[first["first"], abc] == ENDED
    assert table[first["other"], abc] == first["other"]


def test_states_of_rows_that_run_stay_where_they_are():
    """Automata that come and go, beside one that stays."""
    automata = Automata(len(TOKEN_BYTES))
    (kept,) = automata.hold({"kept": stop("cab")}).values()
    rows = automata.table[kept : kept + 3].copy()
    assert (rows == ENDED).any()
    for n in range(40):
        strings = "ab" * (1 + n % 7) + "c"
        (start,) = automata.hold({n: stop(strings)}).values()
        assert start + len(strings) <= kept or start >= kept + 3
        automata.release([n])
        np.testing.assert_array_equal(automata.table[kept : kept + 3], rows)
    # What no one holds makes room, so the table need not grow for all that have been.
    assert len(automata.table) <= 32
    with pytest.raises(ValueError, match="together they are too long"):
        long = Automaton(np.zeros((20_000, 12), np.int16), np.zeros(20_000, np.int16))
        automata.hold(dict.fromkeys("ab", long))


def test_the_size_of_the_table_takes_few_values():
    sizes = set()
    for n in range(1, 40):
        automata = Automata(len(TOKEN_BYTES))
        automata.hold({n: stop("x" * n)})
        sizes.add(len(automata.table))
    assert len(sizes) == 3
    assert len(Automata(12).table) == min(sizes)


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
    table = Automata(1_000_000).table
    assert isinstance(table, np.ndarray) and table.strides[1] == 0


def test_automata_are_kept_up_to_a_number_of_bytes():
    made = []

    def get(cache, size):
        def make():
            made.append(size)
            return Automaton(np.zeros((size, 9), np.int16), np.zeros(size, np.int16))

        return cache.get(size, make)

    # A state takes 20 bytes.
    cache = AutomatonCache(100)
    for size in (2, 3, 2):
        get(cache, size)
    assert made == [2, 3]
    # The one that was used last stays; and the newest, though it is too large.
    for size in (1, 2, 3, 90, 90, 3, 90):
        get(cache, size)
    assert made == [2, 3, 1, 3, 90, 3, 90]
