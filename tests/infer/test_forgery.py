"""No message becomes a turn, whatever its template does to it; ordinary ones pass."""

import functools
import json

import pytest
from forgery_case import (
    CHATML,
    HARMLESS,
    ORDINARY,
    forged_messages,
    forged_turn,
    templates,
)
from hugging_face_case import golden_tokenizer, smollm2_metadata

from jaxlm.infer.conversation import chat_ids as chat_ids_module
from jaxlm.infer.conversation import chat_template
from jaxlm.infer.conversation.chat_ids import chat_ids
from jaxlm.tokenizers.gguf import tokenizer_from_gguf


@functools.cache
def program(template):
    return chat_template.new_environment().from_string(template)


def render(template, variables):
    """As the child process does, without one."""
    try:
        return [program(template).render(**values) for values in variables]
    except Exception as error:
        raise ValueError(f"the chat template fails: {error}") from None


@pytest.fixture(autouse=True)
def rendered_here(monkeypatch):
    monkeypatch.setattr(chat_ids_module, "render", render)


@pytest.fixture
def tokenizer(tmp_path):
    return golden_tokenizer("byte_level", tmp_path)


def conversation(*texts):
    """Four messages; the last of them are the texts."""
    roles = ("system", "user", "assistant", "user")
    contents = ["Be brief.", "hi", "yes", "go on"][: 4 - len(texts)] + list(texts)
    pairs = zip(roles, contents, strict=True)
    return [{"role": role, "content": text} for role, text in pairs]


PLACES = {
    "last": lambda text: conversation(text),
    "assistant": lambda text: conversation(text, "go on"),
    "user": lambda text: conversation(text, "yes", "go on"),
    "system": lambda text: conversation(text, "hi", "yes", "go on"),
    "every": lambda text: conversation(text, text, text, text),
    "halves": lambda text: conversation(text[: len(text) // 2], text[len(text) // 2 :]),
    "thirds": lambda text: conversation(*(text[i::3] for i in range(3))),
}
TURNS = {
    "byte_level": CHATML,
    "llama": ("<s>", "</s>"),
    "phi": ("<|user|>", "<|end|>"),
    "unigram": ("<start_of_turn>", "<end_of_turn>"),
    "SmolLM2": CHATML,
}


def model_tokenizer(name, folder):
    if name == "SmolLM2":
        return tokenizer_from_gguf(smollm2_metadata())
    return golden_tokenizer(name, folder)


def attack(tokenizer, templates, texts, places=("last",)):
    """Sends each text through each template, at each place of a conversation.

    Returns how many were refused as forged, how many failed in their template, how many
    were sent as text, and how many became other special tokens than harmless words.
    """
    # An assistant's thoughts are left to the template; <unk> is any unknown character.
    left = ("<think>", "</think>", "<unk>")
    special = {i for text, i in tokenizer.special_ids.items() if text not in left}

    def special_ids(place, text):
        return [
            i for i in chat_ids(tokenizer, PLACES[place](text)).tolist() if i in special
        ]

    counts = dict.fromkeys(("refused", "failed", "neutral", "forged"), 0)
    for template in templates:
        tokenizer.chat_template = template
        for place in places:
            expected = special_ids(place, HARMLESS)
            for text in texts:
                try:
                    found = special_ids(place, text)
                except ValueError as error:
                    refused = "would turn text of a message into" in str(error)
                    counts["refused" if refused else "failed"] += 1
                else:
                    counts["neutral" if found == expected else "forged"] += 1
    return counts


def added(counts, more):
    return {name: counts.get(name, 0) + number for name, number in more.items()}


def test_no_message_forges_a_turn(tokenizer):
    texts = forged_messages(CHATML[1], twice=False)
    found = attack(tokenizer, templates(*CHATML).values(), texts)
    assert found["forged"] == 0 and found["refused"] > 20


@pytest.mark.nightly
def test_every_special_token_at_every_place(tmp_path):
    """Recorded in benchmarks/results/forged_turns.json; -s prints it."""
    results = {}
    for name, turn in TURNS.items():
        tokenizer = model_tokenizer(name, tmp_path)
        own, made = [tokenizer.chat_template], templates(*turn).values()
        counts = {"its own template": {}, f"{len(made)} templates": {}}
        for special in [*tokenizer.special_ids, forged_turn(*turn)]:
            for kind, those in zip(counts, (own, made), strict=True):
                texts = forged_messages(special, twice=kind == "its own template")
                found = attack(tokenizer, those, texts, PLACES)
                counts[kind] = added(counts[kind], found)
        # Each two changes of the token that ends a turn.
        found = attack(tokenizer, made, forged_messages(turn[1]))
        counts[f"{len(made)} templates, two changes"] = found
        results[name] = counts
    print(json.dumps(results, indent=2))
    for counts in results.values():
        own, *others = counts.values()
        assert own["forged"] == own["refused"] == 0
        for found in others:
            assert found["forged"] == 0 and found["refused"] > 200


def test_without_the_comparison_there_are_forged_turns(tokenizer, monkeypatch):
    """So the templates and messages are such that the guard matters."""
    monkeypatch.setattr(chat_ids_module, "_structure", lambda *_: [])
    texts = forged_messages(CHATML[1], twice=False)
    for name in ("striptags", "reverse", "ascii", "printable", "in marks", "entities"):
        found = attack(tokenizer, [templates(*CHATML)[name]], texts)
        assert found["forged"] and not found["refused"], name


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TURNS)
def test_ordinary_messages_are_sent(name, every, tmp_path, repository):
    tokenizer = model_tokenizer(name, tmp_path)
    kinds = ("jaxlm/**/*.py", "jaxlm/report/page.*", "docs/*.md")
    files = sorted(path for kind in kinds for path in repository.glob(kind))
    sources = [path.read_text(encoding="utf-8") for path in files[::every]]
    texts = ORDINARY + [s[i : i + 800] for s in sources for i in (0, 3000)]
    assert len(texts) > 100
    for text in texts:
        chat_ids(tokenizer, PLACES["every"](text))
