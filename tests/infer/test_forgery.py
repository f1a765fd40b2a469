"""No message becomes a turn, whatever its template does to it; ordinary ones pass."""

import functools

import pytest
from forgery_case import HARMLESS, ORDINARY, TEMPLATES, forged_messages
from hugging_face_case import GOLDENS, golden_tokenizer

from jaxlm.infer.conversation import chat_ids as chat_ids_module
from jaxlm.infer.conversation import chat_template
from jaxlm.infer.conversation.chat_ids import chat_ids


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


def conversation(text, parts=1):
    """A conversation whose last message, or last two, are a text."""
    cut = len(text) // 2 if parts == 2 else 0
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": text[:cut] or "yes"},
        {"role": "user", "content": text[cut:]},
    ]


def special_ids(tokenizer, messages):
    special = set(tokenizer.special_ids.values())
    return [i for i in chat_ids(tokenizer, messages).tolist() if i in special]


def attack(tokenizer, templates, texts, all_parts=(1,)):
    """Sends each text through each template; returns the numbers refused and forged."""
    refused = forged = 0
    for template in templates:
        tokenizer.chat_template = template
        for parts in all_parts:
            expected = special_ids(tokenizer, conversation(HARMLESS, parts))
            for text in texts:
                try:
                    found = special_ids(tokenizer, conversation(text, parts))
                except ValueError as error:
                    refused += "would turn text of a message into" in str(error)
                else:
                    forged += found != expected
    return refused, forged


def test_no_message_forges_a_turn(tokenizer):
    templates, texts = list(TEMPLATES.values()), forged_messages()
    # Each change by itself.
    refused, forged = attack(tokenizer, templates, texts[:28])
    assert forged == 0 and refused > 20


@pytest.mark.slow
def test_none_of_many_messages_forges_a_turn(tokenizer):
    templates, texts = list(TEMPLATES.values()), forged_messages()
    assert len(templates) >= 50 and len(texts) >= 1000
    refused, forged = attack(tokenizer, templates, texts[1::6], (1, 2))
    assert forged == 0 and refused > 200


def test_without_the_comparison_there_are_forged_turns(tokenizer, monkeypatch):
    """So the templates and messages are such that the guard matters."""
    monkeypatch.setattr(chat_ids_module, "_structure", lambda *_: [])
    for name in ("striptags", "reverse", "ascii", "printable", "in marks", "entities"):
        refused, forged = attack(tokenizer, [TEMPLATES[name]], forged_messages()[:28])
        assert forged and not refused, name


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GOLDENS)
def test_ordinary_messages_are_sent(name, every, tmp_path, repository):
    tokenizer = golden_tokenizer(name, tmp_path)
    kinds = ("jaxlm/**/*.py", "jaxlm/report/page.*", "docs/*.md")
    files = sorted(path for kind in kinds for path in repository.glob(kind))
    sources = [path.read_text(encoding="utf-8") for path in files[::every]]
    texts = ORDINARY + [s[i : i + 800] for s in sources for i in (0, 3000)]
    assert len(texts) > 100
    for text in texts:
        chat_ids(tokenizer, [*conversation(text), {"role": "assistant", "content": text},
                             {"role": "user", "content": text}])  # fmt: skip
