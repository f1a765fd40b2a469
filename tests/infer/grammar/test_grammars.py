"""Constrained decoding: what is written matches, whatever the model and the rules."""

import json
import re

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from examples_case import FIXED
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_case import make_params, toy

from jaxlm.config import SampleConfig
from jaxlm.infer.generate import generate
from jaxlm.infer.grammar import byte_automaton
from jaxlm.infer.grammar.byte_automaton import DEAD, characters, determinize
from jaxlm.infer.grammar.json_schema import any_object, json_schema
from jaxlm.infer.grammar.regex import regex
from jaxlm.infer.grammar.token_grammar import token_grammar
from jaxlm.infer.rules.automata import (
    ENDS,
    FORBIDDEN,
    FREE,
    Automata,
    StateTable,
)
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.sampling import keep_allowed
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TOKENIZER = ByteTokenizer()
# Bytes, the end, and some longer tokens, one of which ends inside a character.
LONGER = (
    b'{"',
    b'": ',
    b'", "',
    b"abc",
    b"12",
    b"true",
    b"\xc3\xa9x",
    b"ab\xc3",
    b"  ",
)
TOKEN_BYTES = (*TOKENIZER.token_bytes, *LONGER)
V = len(TOKEN_BYTES)
CONFIG = toy(vocab_size=V, num_layers=1, context_length=256)
PARAMS = make_params(CONFIG, std=0.5)
SAMPLE = SampleConfig(stop_ids=(256,), max_new_tokens=60)


def accepts(automaton, data):
    state = 0
    for byte in data:
        state = automaton.next_states[state, byte]
        if state == DEAD:
            return False
    return bool(automaton.accepts[state])


def walk(grammar, budget, rng, longest=False):
    """Draws tokens as the decoding scan does, without a model."""
    state, tokens = 0, []
    while len(tokens) < budget:
        row = grammar.transitions[state]
        needs = np.where(row >= 0, grammar.needs[np.maximum(row, 0)], 0)
        allowed = np.flatnonzero((row != FORBIDDEN) & (needs < budget - len(tokens)))
        assert allowed.size, "a row has a token that may follow"
        if longest and (going := allowed[row[allowed] >= 0]).size:
            allowed = going
        token = int(rng.choice(allowed))
        if token == 256:
            break
        tokens.append(token)
        state = row[token]
        if state == ENDS:
            break
    return b"".join(TOKEN_BYTES[token] for token in tokens)


PATTERNS = (
    "abc|de*f?", "[a-cx]+[^b]", "(ab){2,3}", "(a|b)*a(a|b){2}", r"\d+\.\d{2}", r"\s?\w\W",
    "a*?b+?", ".é.", "[^\\x00-\\x7f]{1,2}", "(?s).", "(?x) a b # c", "^a$", "", "()|a", r"[^\W]",
    "\U0001f600|[\u0800-\U00010001]", r"\S\D",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_accepts_what_python_matches(pattern):
    automaton = determinize(regex(pattern))
    rng = np.random.default_rng(0)
    alphabet = [*"abcdefx1290. _\n-#", "é", "\u0800", "\uffff", "\U0001f600"]
    grammar = token_grammar(regex(pattern), TOKEN_BYTES, V, SAMPLE)
    matched = 0
    for _ in range(200):
        text = walk(grammar, int(grammar.needs[0]) + 6, rng).decode()
        assert re.fullmatch(pattern, text, re.ASCII) and re.fullmatch(pattern, text)
        # The same text with another character, or with one less.
        at = int(rng.integers(0, len(text) + 1))
        text = text[:at] + str(rng.choice([*alphabet, ""])) + text[at + 1 :]
        wanted = [re.fullmatch(pattern, text, flags) is not None for flags in (0, re.A)]
        found = accepts(automaton, text.encode())
        # Categories are narrower beyond ASCII.
        assert found == all(wanted) or (not found and "\\" in pattern), text
        assert found == all(wanted) or not text.isascii(), text
        matched += all(wanted)
    assert matched < 200


@settings(**FIXED, max_examples=30)
@given(st.data())
def test_characters_are_exact(data):
    ends = data.draw(st.lists(st.tuples(*[st.integers(0, 0x10FFFF)] * 2), max_size=3))
    ranges = [(min(pair), max(pair)) for pair in ends]
    automaton = determinize(characters(ranges))
    for near in {
        0,
        0x10FFFF,
        *(x + d for pair in ranges for x in pair for d in (-1, 0, 1)),
    }:
        if 0 <= near <= 0x10FFFF and not 0xD800 <= near <= 0xDFFF:
            wanted = any(low <= near <= high for low, high in ranges)
            assert accepts(automaton, chr(near).encode()) == wanted


NAMES = st.sampled_from(["a", "b", "é", 'q"', "\\"])
SCALARS = st.one_of(
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-120, 120), st.integers(0, 300)),
    st.builds(lambda low: {"type": "integer", "exclusiveMinimum": low}, st.integers(-99, 99)),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, st.integers(0, 2), st.integers(0, 3)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(['^[a-c]+$', '^"\\\\?', "b$", "^\n?x$", "^\\S\\d*$"])),
    st.builds(lambda v: {"enum": v}, st.lists(st.sampled_from([1, None, True, "x\n", "é", 2.5, [1], {"k": 0}]), min_size=1)),
    st.sampled_from([{"type": "number"}, {"type": ["boolean", "null"]}, {"const": {"a": [1]}}, {"type": "string", "format": "date-time"}, {}]),
)  # fmt: skip


def composed(inside):
    def an_object(properties, data):
        return {"type": "object", "properties": properties, "required": data}

    return st.one_of(
        st.dictionaries(NAMES, inside, max_size=3).flatmap(
            lambda p: st.builds(an_object, st.just(p), st.lists(st.sampled_from([*p]), unique=True) if p else st.just([]))
        ),
        st.builds(lambda s, low, n: {"type": "array", "items": s, "minItems": low, "maxItems": low + n}, inside, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda a, b, low: {"type": "array", "prefixItems": [a, b], "items": False, "minItems": low}, inside, inside, st.integers(0, 2)),
        st.builds(lambda a, b, low: {"type": "array", "prefixItems": [a], "items": b, "minItems": low, "maxItems": 3}, inside, inside, st.integers(0, 3)),
        st.builds(lambda s: {"type": "object", "additionalProperties": s}, inside),
        st.builds(lambda *s: {"anyOf": [*s]}, inside, inside),
    )  # fmt: skip


ONCE = st.one_of(SCALARS, composed(SCALARS))
SCHEMAS = st.one_of(ONCE, composed(ONCE))


@settings(**FIXED, max_examples=30)
@given(SCHEMAS, st.integers(0, 30), st.integers(0, 99))
def test_each_text_parses_and_fits_its_schema(schema, more, seed):
    grammar = token_grammar(json_schema(schema), TOKEN_BYTES, V, SAMPLE)
    # The smallest budget, and larger ones; long texts are cut off by them.
    budget = int(grammar.needs[0]) + more
    rng = np.random.default_rng(seed)
    for longest in (False, True):
        text = walk(grammar, budget, rng, longest).decode()
        value = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


RULES = (
    {}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.5}, {"no_repeat_ngram": 1},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0}, {"min_new_tokens": 60}, {"typical_p": 0.2},
    {"bias_ids": (65, 66), "biases": (100.0, 100.0)}, {"repetition_penalty": 5.0, "dry_multiplier": 9.0},
    {"top_n_sigma": 0.5, "temperature": 5.0},
)  # fmt: skip


@pytest.mark.slow
def test_rows_follow_their_own_grammar_with_every_rule(compilations):
    """Rows with other grammars, a free one, and budgets from the least on."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["n"],
    }
    parts = [regex(r"[a-z]{2,}( [a-z]+)*\."), json_schema(schema), any_object()]
    checks = [
        lambda text: re.fullmatch(r"[a-z]{2,}( [a-z]+)*\.", text),
        lambda text: jsonschema.validate(json.loads(text), schema) is None,
        lambda text: isinstance(json.loads(text), dict),
    ]
    samples, grammars, tests = [], [], []
    for i, rule in enumerate(RULES):
        made = token_grammar(parts[i % 3], TOKEN_BYTES, V, SAMPLE)
        budget = int(made.needs[0]) + (0, 1, 7, 50)[i % 4]
        samples.append(
            SampleConfig(stop_ids=(256,), **{"max_new_tokens": budget, **rule})
        )
        grammars.append(made)
        tests.append(checks[i % 3])
    prompts = [[65, 66, 67]] * (len(RULES) + 1)
    samples.append(SAMPLE)
    call = (CONFIG, PARAMS, prompts, samples)
    for seed in range(3):
        result = generate(
            *call, seed, token_bytes=TOKEN_BYTES, grammars=[*grammars, None]
        )
        for test, row in zip(tests, result.rows, strict=False):
            text = b"".join(TOKEN_BYTES[token] for token in row)
            assert test(text.decode()), text
        if not seed:
            free = generate(*call, 0, token_bytes=TOKEN_BYTES)
            np.testing.assert_array_equal(free.rows[-1], result.rows[-1])
    # Other grammars of the same size compile nothing.
    before = list(compilations)
    digits = token_grammar(regex(r"[0-9]{2,}( [0-9]+)*\."), TOKEN_BYTES, V, SAMPLE)
    grammars[::3] = [digits] * len(grammars[::3])
    generate(*call, 9, token_bytes=TOKEN_BYTES, grammars=[*grammars, None])
    assert compilations == before


def test_only_tokens_that_leave_time_for_the_end_are_kept():
    """Their logits are as they were, so draws have the distribution among them."""
    grammar = token_grammar(regex("(ab|cde)*x"), TOKEN_BYTES, V, SAMPLE)
    automata = Automata(V)
    (start,) = automata.hold({0: grammar}).values()
    table = StateTable(jnp.asarray(automata.table), jnp.asarray(automata.needs))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, V)), jnp.float32)
    # Without a grammar, and with room for 1, 2, 3 and 4 tokens.
    states = jnp.array([FREE, start, start, start, start])
    left = jnp.array([1, 1, 2, 3, 4])
    kept = np.asarray(keep_allowed(logits, table, states, left))
    np.testing.assert_array_equal(kept[0], logits[0])
    abc = TOKEN_BYTES.index(b"abc")
    allowed = [[*b"x"], [*b"x"], [*b"axc", abc][:2], [*b"axc", abc]]
    for row, same, ids in zip(kept[1:], np.asarray(logits)[1:], allowed, strict=True):
        assert np.flatnonzero(row > NEVER).tolist() == sorted(ids)
        np.testing.assert_array_equal(row[ids], same[ids])
    # Rules before it left no token that may follow.
    kept = keep_allowed(jnp.full((5, V), NEVER), table, states, left)
    assert np.flatnonzero(np.asarray(kept)[1] > NEVER).tolist() == [*b"x"]


def test_characters_that_the_vocabulary_lacks_are_not_begun():
    """Without bytes of its own, é can be written by `éx` only."""
    few = tuple(b for b in TOKEN_BYTES if b[:1] not in (b"\xc3", b"\xa9"))
    few = (*few, b"\xc3\xa9x", b"\xc3")
    sample = SampleConfig(stop_ids=(few.index(b""),))
    grammar = token_grammar(regex("é(x|y)"), few, len(few), sample)
    assert np.flatnonzero(grammar.transitions[0] != FORBIDDEN).tolist() == [
        len(few) - 2
    ]
    assert grammar.needs[0] == 1
    with pytest.raises(ValueError, match="spell no text"):
        token_grammar(regex("éy"), few, len(few), sample)
    forbidden = SampleConfig(forbidden_ids=(ord("b"),))
    with pytest.raises(ValueError, match="spell no text"):
        token_grammar(regex("ab"), TOKENIZER.token_bytes, V, forbidden)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(", "the pattern is wrong: missing ), unterminated subpattern at position 0"),
        ("(?=a)b", "looks ahead or back, which no finite automaton can do"),
        (r"(a)\1", "refers to a group"),
        ("(?i)a", "has a flag"),
        ("a(?i:b)", "has a flag inside"),
        ("a^b", "inside, which no finite automaton"),
        ("(a{1000}){1000}", "too many repetitions"),
        ("(){4294967294}b{90000}", "too many repetitions"),
        ("(a|b)*a(a|b){20}", "more than 8,192 states"),
        ("(" * 5000 + ")" * 5000, "nested or repeated too often"),
        ("a{" + "9" * 30 + "}", "nested or repeated too often"),
    ],
)
def test_wrong_patterns(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        determinize(regex(pattern))


def test_sets_of_parts_that_take_long_to_join_are_refused(monkeypatch):
    """`^((a?){60}){60}$` took 105 s until it was refused."""
    monkeypatch.setattr(byte_automaton, "_MAX_JOINED", 1_000)
    with pytest.raises(ValueError, match=r"in too many ways: bound them lower"):
        determinize(regex("((a?){9}){9}"))


def test_patterns_that_take_long_are_refused_or_not_minimized(monkeypatch):
    """`(a{1,90}){1,90}` took 29 s, and a chain of 8,000 states 15 s."""
    texts = [b"", b"ab" * 9, b"a" * 31 + b"7" * 30, b"7a"]
    wanted = [accepts(determinize(regex("[a-z]{0,40}[0-9]{0,40}")), t) for t in texts]
    monkeypatch.setattr(byte_automaton, "_MAX_WORK", 5_000)
    chain = determinize(regex("[a-z]{0,40}[0-9]{0,40}"))
    assert [accepts(chain, t) for t in texts] == wanted == [True, True, True, False]
    with pytest.raises(ValueError, match=r"in too many ways: bound them lower"):
        determinize(regex("(a{1,20}){1,20}"))


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "strin"}, "$.type: there is no type \"strin\" (did you mean 'string'?)"),
        ({"type": "object", "propertees": {}}, "$: the keyword \"propertees\" cannot be held (did you mean 'properties'?)"),
        ({"properties": {"a": {"not": {}}}}, '$.properties.a: the keyword "not" cannot be held'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems" cannot be held'),
        ({"required": ["a"]}, '$.required: "a" is not in properties'),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "$: no integer is from 3 to 2"),
        ({"type": "number", "minimum": 3}, "$.minimum cannot be held for numbers"),
        ({"type": "string", "pattern": "("}, "$.pattern: the pattern is wrong"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern and maxLength cannot be held together"),
        ({"type": "string", "format": "email"}, 'format: "email" cannot be held'),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "contains itself"),
        ({"$ref": "#/nowhere"}, "leads nowhere"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "a second number may match too"),
        ({"anyOf": [{}], "type": "null"}, "anyOf cannot be held together with type"),
        ({"type": "null", "enum": [1]}, "none of the values has the type"),
        (False, "$: false allows nothing"),
        ({"items": []}, "$.items is []: a schema is an object"),
        ({"minLength": -1}, "nothing has minLength -1"),
        ({"maxItems": "3"}, '$.maxItems is "3": it must be an integer'),
    ],
)  # fmt: skip
def test_wrong_schemas(schema, message):
    with pytest.raises(ValueError) as error:
        json_schema(schema)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["anyOf", "prefixItems"])
def test_references_that_multiply_are_bounded(kind):
    twice = {f"d{i}": {kind: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    schema = {"$defs": {**twice, "d40": {"type": "null"}}, "$ref": "#/$defs/d0"}
    # Where each call is checked, the limit of nesting is met first.
    limits = "too many repetitions|nested or repeated too often"
    with pytest.raises(ValueError, match=limits):
        determinize(json_schema(schema))


def test_references_are_followed():
    schema = {"$defs": {"a/b": {"type": "integer"}}, "items": {"$ref": "#/$defs/a~1b"}}
    automaton = determinize(json_schema({**schema, "type": "array"}))
    assert accepts(automaton, b"[1, 22,3]") and not accepts(automaton, b'["a"]')
