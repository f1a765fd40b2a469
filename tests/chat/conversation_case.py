"""A conversation whose answers are given in advance."""

from types import SimpleNamespace

import jax
import numpy as np
from hugging_face_case import golden_tokenizer
from toy_case import toy

from jaxlm.config import SampleConfig
from jaxlm.infer.conversation import chat_ids, chat_template, conversation
from jaxlm.infer.conversation.conversation import Conversation


def scripted(monkeypatch, folder, answers, context_length=512, new=40):
    """Returns a conversation; an answer that is an exception is raised after a part."""
    monkeypatch.setattr(chat_ids, "render", chat_template.render)
    tokenizer = golden_tokenizer("byte_level", folder)
    left = iter(answers)

    def generate(config, params, prompts, sample, key, *, on_tokens, **options):
        answer = next(left)
        ends = isinstance(answer, BaseException)
        ids = tokenizer.encode("part" if ends else answer)[: sample.max_new_tokens]
        for i in ids:
            if on_tokens(np.full((1, 1), i), np.ones((1, 1), bool)) is True:
                break
        if ends:
            raise answer
        return SimpleNamespace(
            state=None, prefill_tokens=np.array([7]), prefill_s=0.5, decode_s=2.0
        )

    monkeypatch.setattr(conversation, "generate", generate)
    config = toy(vocab_size=tokenizer.vocab_size, context_length=context_length)
    sample = SampleConfig(max_new_tokens=new, stop_ids=tokenizer.stop_ids)
    return Conversation(config, {}, tokenizer, sample, jax.random.key(0))
