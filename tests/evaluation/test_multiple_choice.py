"""Multiple choice: against log-probabilities added up by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.evaluation.multiple_choice import (
    Question,
    accuracy,
    loglikelihoods,
    read_questions,
)
from jaxlm.infer.scoring import score, score_tokens
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TOKENIZER = ByteTokenizer()
CONFIG = toy(vocab_size=TOKENIZER.vocab_size, context_length=32)
PARAMS = make_params(CONFIG, std=0.5)


def by_hand(text, first):
    ids = TOKENIZER.encode(text).tolist()[-32:]
    values = score(CONFIG, PARAMS, [ids], num_tokens=257)[0]
    return values[len(values) - first :].sum()


def test_loglikelihoods_are_sums_over_the_continuation():
    pairs = [("ab", " c"), ("ab ", "de"), ("x" * 40, " é"), ("q", "r")]
    found = loglikelihoods(CONFIG, PARAMS, TOKENIZER, pairs)
    # The space at the end of a context belongs to what follows.
    lengths = [2, 3, 3, 1]
    expected = [by_hand("".join(p), n) for p, n in zip(pairs, lengths, strict=True)]
    np.testing.assert_allclose([value for value, _ in found], expected, rtol=1e-5)


def test_greedy_is_what_greedy_sampling_gives():
    ids = np.array([[5, 6, token] for token in range(257)])
    scored = score_tokens(CONFIG, PARAMS, ids)
    likeliest = [text.is_largest[1] for text in scored]
    best = max(range(257), key=lambda token: scored[token].logprobs[1])
    assert likeliest == [token == best for token in range(257)]


def test_three_accuracies_compare_choices_differently():
    rng = np.random.default_rng(0)
    words = ["é" * n for n in (1, 2, 5, 9)] + ["abc", "abcdefgh", "z"]
    questions = [
        Question(
            "".join(rng.choice([*"abcd "], 5)) + "?",
            tuple(rng.choice(words, 3, False)),
            int(rng.integers(3)),
        )
        for _ in range(40)
    ]
    *_, counts = accuracy(CONFIG, PARAMS, TOKENIZER, questions)
    right = np.zeros(3, int)
    for q in questions:
        sums = np.array(
            [by_hand(f"{q.context} {c}", 1 + len(c.encode())) for c in q.choices]
        )
        sizes = [
            np.ones(3),
            [len(c) for c in q.choices],
            [len(c.encode()) for c in q.choices],
        ]
        right += [int(np.argmax(sums / size) == q.answer) for size in sizes]
    assert len({*right}) == 3, "the three must differ for this to be a test"
    found = (counts.right, counts.right_by_characters, counts.right_by_bytes)
    assert counts.questions == 40 and found == tuple(right)
    assert counts.rates() == dict(
        zip(("acc", "acc_norm", "acc_bytes"), right / 40, strict=True)
    )


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": " "}, 'line 2: context is " ": give a text'),
        ({"choices": ["b"]}, "line 2: choices is no list of two or more texts"),
        (
            {"answer": 2},
            "line 2: answer is 2: it must be the index of a choice, 0 to 1",
        ),
        ({"answer": True}, "line 2: answer is true"),
        (
            {"label": 1},
            "line 2: a question is an object with the fields answer, choices, context",
        ),
    ],
)
def test_wrong_questions(tmp_path, change, message):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"q\.jsonl: no question"):
        read_questions(file)


@pytest.mark.parametrize(
    "name, num_choices", [("knowledge", 4), ("sense", 3), ("grammar", 2)]
)
def test_bundled_questions_favor_no_place_and_no_length(name, num_choices):
    questions = read_questions(Path(f"bundled:{name}"))
    assert len({q.context for q in questions}) == len(questions) >= 40
    places = np.bincount([q.answer for q in questions])
    assert len(places) == num_choices and np.ptp(places) <= 1
    for question in questions:
        assert len(set(question.choices)) == num_choices
        for choice in question.choices:
            text = f"{question.context} {choice}"
            assert text == " ".join(text.split()) and text[-1] in ".?", text
    # Who takes the longest or the shortest choice is near to chance.
    for sign in (1, -1):
        sizes = [sign * np.array([len(c) for c in q.choices]) for q in questions]
        right = [
            np.mean(x.argmax() == q.answer)
            for x, q in zip(sizes, questions, strict=True)
        ]
        assert np.mean(right) < 1 / num_choices + 0.2


def test_bundled_questions_that_do_not_exist():
    message = (
        r"--choices: no bundled questions 'grammer' \(did you mean 'grammar'\?\): use "
        "bundled:grammar, bundled:knowledge, bundled:sense"
    )
    with pytest.raises(ValueError, match=message):
        read_questions(Path("bundled:grammer"))
