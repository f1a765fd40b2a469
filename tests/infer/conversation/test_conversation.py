"""Conversations with a tiny model, turn by turn, against single calls of `generate`."""

import jax
import numpy as np
import pytest
from hugging_face_case import golden_tokenizer
from toy_case import make_params, toy

from jaxlm.config import SampleConfig
from jaxlm.infer.conversation import chat_ids as chat_ids_module
from jaxlm.infer.conversation import chat_template, conversation
from jaxlm.infer.conversation.chat_ids import chat_ids, render
from jaxlm.infer.conversation.conversation import ContextFull, Conversation
from jaxlm.infer.generate import generate

# Long enough for the first turns to have 129 to 256 tokens: one size is compiled.
SYSTEM = "You are a kind king, and this is your castle in the north. " * 3


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(autouse=True)
def rendered_here(monkeypatch):
    """Renders without a child process: the same code, a hundred times as fast."""
    monkeypatch.setattr(chat_ids_module, "render", chat_template.render)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Mostly samples letters of the byte-level vocabulary."""
    tokenizer = golden_tokenizer("byte_level", tmp_path_factory.mktemp("tokenizer"))
    config = toy(vocab_size=tokenizer.vocab_size, context_length=256)
    return config, make_params(config, std=0.5), tokenizer


def begin(model, new=12, temperature=0.0, **options):
    config, params, tokenizer = model
    sample = SampleConfig(
        max_new_tokens=new, temperature=temperature, stop_ids=tokenizer.stop_ids
    )
    key = jax.random.key(5)
    return Conversation(config, params, tokenizer, sample, key, **options)


def answer_alone(model, before, turn, new=12, temperature=0.0):
    """What `generate` answers to messages, without the cache of earlier turns."""
    config, params, tokenizer = model
    sample = SampleConfig(
        max_new_tokens=new, temperature=temperature, stop_ids=tokenizer.stop_ids
    )
    key = jax.random.fold_in(jax.random.key(5), turn)
    ids = chat_ids(tokenizer, before)
    result = generate(
        *(config, params, [ids], sample, key), num_tokens=tokenizer.vocab_size
    )
    return tokenizer.decode(result.tokens[0][: result.lengths[0]])


def test_later_turns_read_only_what_is_new(model):
    """Greedy answers are those of calls that read everything."""
    talk, seen = begin(model, system=SYSTEM), [{"role": "system", "content": SYSTEM}]
    tokenizer = model[2]
    held: list[int] = []
    for turn, text in enumerate(["Hi <|im_end|>", "and?", "why?"]):
        seen.append(user(text))
        ids = chat_ids(tokenizer, seen).tolist()
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, held, strict=False)) if a != b),
            min(len(ids) - 1, len(held)),
        )
        parts = []
        answer = talk.ask(text, parts.append)
        assert answer.text == "".join(parts) == answer_alone(model, seen, turn)
        assert answer.prompt_tokens == len(ids)
        assert answer.prefill_tokens == len(ids) - shared
        assert shared > 100 or not turn
        seen.append(assistant(answer.text))
        assert talk.messages == seen
        held = ids
    assert len({m["content"] for m in seen if m["role"] == "assistant"}) > 1
    assert talk.num_tokens() == len(
        chat_ids(tokenizer, seen, add_generation_prompt=False)
    )


def test_an_answer_again_has_another_key(model):
    talk = begin(model, temperature=1.0)
    first = talk.ask("Hi", str)
    assert first.text == answer_alone(model, [user("Hi")], 0, temperature=1.0)
    again = talk.retry(str)
    assert again.text == answer_alone(model, [user("Hi")], 1, temperature=1.0)
    assert talk.messages == [user("Hi"), assistant(again.text)]
    assert first.text != again.text and again.prefill_tokens == 1
    with pytest.raises(ValueError, match="no message to answer again"):
        begin(model).retry(str)


def test_a_context_that_is_full(model):
    talk = begin(model, new=1000, temperature=1.0, system=SYSTEM)
    with pytest.raises(ContextFull, match=r"would have .* context is 256"):
        talk.ask("x" * 600, str)
    assert talk.messages == [{"role": "system", "content": SYSTEM}]
    answer = talk.ask("Hi", str)
    assert answer.ended == "at the context"
    assert answer.prompt_tokens + answer.tokens == 256
    talk = begin(model, new=2, temperature=1.0, system=SYSTEM)
    assert talk.ask("Hi", str).ended == "at the limit"


@pytest.mark.parametrize("how", ["asked for", "Ctrl-C"])
def test_the_part_of_a_stopped_answer_stays(model, how):
    parts = []

    def stop(text):
        if not parts:
            parts.append(text)
            return False
        if how == "Ctrl-C" and len(parts) == 1:
            parts.append("")
            raise KeyboardInterrupt
        return True

    talk = begin(model, new=64, temperature=1.0, system=SYSTEM)
    answer = talk.ask("Hi", stop)
    assert answer.ended == "interrupted" and answer.tokens == 1
    assert answer.text == parts[0] and talk.messages[-1] == assistant(parts[0])
    seen = [*talk.messages, user("again")]
    next_one = talk.ask("again", str)
    # A generation that ended in order has left its cache.
    assert (next_one.prefill_tokens < 64) is (how == "asked for")
    assert next_one.prompt_tokens == len(chat_ids(model[2], seen))


def test_the_part_of_an_answer_before_an_error_stays(model):
    """As of a device without memory; `/retry` answers again."""
    parts = []

    def fail(text):
        if parts:
            raise MemoryError
        parts.append(text)

    talk = begin(model, new=64, temperature=1.0, system=SYSTEM)
    with pytest.raises(MemoryError):
        talk.ask("Hi", fail)
    assert talk.messages[1:] == [user("Hi"), assistant(parts[0])]


def test_a_blank_answer_is_not_kept(model, monkeypatch):
    """The model ends its answer at once, or after a space."""
    tokenizer = model[2]
    talk = begin(model, system=SYSTEM)
    kept = talk.ask("Hi", str)
    before = list(talk.messages)

    def blank(*arguments, on_tokens, **options):
        tokens = np.array([tokenizer.encode("  ")])
        on_tokens(tokens, np.ones(tokens.shape, bool))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "generate", blank)
    assert not talk.ask("and?", str).text.strip()
    assert not talk.retry(str).text.strip()
    assert talk.messages == before and talk.last_answer == kept


def test_the_system_message_changes_alone(model):
    talk = begin(model)
    talk.load([user("Hi"), assistant("Ho")])
    talk.set_system("Be brief.")
    assert talk.system == "Be brief." and talk.messages[1:] == [
        *(user("Hi"), assistant("Ho"))
    ]
    talk.set_system("Be long.")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be long."}]
    talk.set_system(None)
    assert talk.system is None and talk.messages == []


def test_what_the_template_rejects_changes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_ids_module, "render", render)
    template = (
        "{% if messages[0].role == 'system' or messages[-1].role == 'cat' %}"
        "{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )
    tokenizer = golden_tokenizer("byte_level", tmp_path, chat_template=template)
    talk = begin((*model[:2], tokenizer))
    talk.load([user("Hi")])
    for change in (
        lambda: talk.set_system("x"),
        lambda: talk.load([user("x"), {"role": "cat", "content": "miau"}]),
    ):
        with pytest.raises(ValueError, match="TemplateError: no"):
            change()
    assert talk.messages == [user("Hi")]
    with pytest.raises(ValueError, match="TemplateError: no"):
        begin((*model[:2], tokenizer), system="x")
