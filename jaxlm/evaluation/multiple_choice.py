"""Multiple choice: the answer to which the model gives the largest log-likelihood.

Texts are split into tokens, and accuracies are defined, as in lm-evaluation-harness.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxlm.config import ModelConfig
from jaxlm.data.sources import BUNDLED
from jaxlm.fields import nearest
from jaxlm.files.strict_json import parse
from jaxlm.infer.prefill import PREFILL_TOKENS
from jaxlm.infer.scoring import score_tokens
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

_FIELDS = {"context", "choices", "answer"}
BUNDLED_FOLDER = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Question:
    """A text, and texts of which one continues it rightly."""

    context: str
    """Text before the choice."""
    choices: tuple[str, ...]
    """At least two; a space is put before each."""
    answer: int
    """Index of the right choice."""


@dataclass
class Accuracy:
    """How many questions were answered rightly, by three ways to compare choices."""

    questions: int = 0
    """Number of questions."""
    right: int = 0
    """By log-likelihood."""
    right_by_characters: int = 0
    """By log-likelihood for each character of the choice."""
    right_by_bytes: int = 0
    """By log-likelihood for each UTF-8 byte of the choice."""

    def rates(self) -> dict[str, float]:
        """The three accuracies, by the names that lm-evaluation-harness gives them."""
        n = max(self.questions, 1)
        return {
            "acc": self.right / n,
            "acc_norm": self.right_by_characters / n,
            "acc_bytes": self.right_by_bytes / n,
        }


def read_questions(path: Path) -> list[Question]:
    """Reads questions from JSON lines: `context`, `choices`, `answer`.

    Args:
      path: a file, or `bundled:NAME`.

    Raises:
      ValueError: for anything wrong, with its line.
    """
    if str(path).startswith(BUNDLED):
        path = _bundled(str(path).removeprefix(BUNDLED))
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    questions = [
        _question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise ValueError(f"{path}: no question")
    return questions


def _bundled(name: str) -> Path:
    files = {p.stem: p for p in sorted(BUNDLED_FOLDER.glob("*.jsonl"))}
    if name not in files:
        raise ValueError(
            f"--choices: no bundled questions {name!r}{nearest(name, list(files))}: "
            f"use {', '.join(BUNDLED + known for known in files)}"
        )
    return files[name]


def _question(line: bytes, where: str) -> Question:
    value = parse(line, where)
    if not isinstance(value, dict) or set(value) != _FIELDS:
        names = ", ".join(sorted(_FIELDS))
        raise ValueError(f"{where}: a question is an object with the fields {names}")
    context, choices, answer = value["context"], value["choices"], value["answer"]
    if not isinstance(context, str) or not context.strip():
        raise ValueError(f"{where}: context is {json.dumps(context)}: give a text")
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: choices is no list of two or more texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: answer is {json.dumps(answer)}: it must be the index of a "
            f"choice, 0 to {len(choices) - 1}"
        )
    return Question(context, tuple(choices), answer)


def accuracy(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
) -> Iterator[Accuracy]:
    """Answers questions, and yields the counts so far after each batch of them."""
    counts, batch = Accuracy(), []
    for number, question in enumerate(questions, start=1):
        batch.append(question)
        longest = max(len(q.context) for q in batch)
        choices = sum(len(q.choices) for q in batch)
        is_last = number == len(questions)
        # About four characters a token: enough for batches of all widths.
        if is_last or longest * choices >= 4 * PREFILL_TOKENS:
            _answer(config, params, tokenizer, batch, counts)
            batch = []
            yield counts


def _answer(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    questions: list[Question],
    counts: Accuracy,
) -> None:
    pairs = [(q.context, f" {choice}") for q in questions for choice in q.choices]
    values = iter(loglikelihoods(config, params, tokenizer, pairs))
    for question in questions:
        found = np.array([next(values)[0] for _ in question.choices])
        characters = np.array([len(c) for c in question.choices])
        sizes = np.array([len(c.encode()) for c in question.choices])
        counts.questions += 1
        counts.right += int(found.argmax() == question.answer)
        by_characters, by_bytes = found / characters, found / sizes
        counts.right_by_characters += int(by_characters.argmax() == question.answer)
        counts.right_by_bytes += int(by_bytes.argmax() == question.answer)


def loglikelihoods(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
) -> list[tuple[float, bool]]:
    """Returns how likely each continuation is after its context.

    A text that is longer than the model's context loses its first tokens.

    Args:
      pairs: (context, continuation), neither of them empty.

    Returns:
      For each pair the log-likelihood of the continuation (nats), and whether greedy
      sampling would give it.

    Raises:
      ValueError: if a continuation has no token after its context, or is longer than
        the model's context.
    """
    texts, starts = [], []
    for context, continuation in pairs:
        ids, start = _pair_ids(tokenizer, context, continuation)
        cut = max(len(ids) - config.context_length, 0)
        if not 0 < start - cut < len(ids) - cut:
            raise ValueError(
                f"the continuation {continuation[:40]!r} has {len(ids) - start} tokens "
                f"after its context; it must have from 1 to {config.context_length - 1}"
            )
        texts.append(ids[cut:])
        starts.append(start - cut)
    if not texts:
        return []
    scored = score_tokens(config, params, texts, num_tokens=tokenizer.vocab_size)
    return [
        (
            float(text.logprobs[start - 1 :].sum(dtype=np.float64)),
            bool(text.is_largest[start - 1 :].all()),
        )
        for text, start in zip(scored, starts, strict=True)
    ]


def _pair_ids(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[Int[np.ndarray, " n"], int]:
    """Returns the ids of both, and where the continuation begins.

    Spaces at the end of the context belong to the continuation, since a token often
    begins with its space.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    ids = tokenizer.encode_prompt(kept + continuation)
    return ids, len(tokenizer.encode_prompt(kept))
