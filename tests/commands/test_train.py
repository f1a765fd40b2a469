"""The samples of a run are checked before its first step."""

import jax
import pytest
from toy_case import make_params, toy

from jaxlm.commands.train import make_sampler, train
from jaxlm.config import Config, DataConfig, SampleConfig, TrainConfig
from jaxlm.sharding.mesh import make_mesh
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TOKENIZER = ByteTokenizer()
MODEL = toy(vocab_size=TOKENIZER.vocab_size, context_length=40)


@pytest.mark.parametrize(
    "sample, settings, message",
    [
        ({}, {"sample_prompt": ""}, r"^--train\.sample-prompt is empty: give"),
        (
            {},
            {"sample_prompt": "x" * 40},
            r"^--train\.sample-prompt has 40 tokens, .* context of 40: shorten it$",
        ),
        ({"stop_ids": (999,)}, {}, r"^--sample\.stop-ids: 999 is not in the vocab"),
    ],
)
def test_a_run_that_cannot_sample_is_refused_before_its_first_step(
    tmp_path, sample, settings, message
):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("some words to train on\n" * 50)
    config = Config(
        model=MODEL,
        data=DataConfig(
            path=(str(text),),
            cache_dir=str(tmp_path / "cache"),
            tokenizer="bytes",
            sequence_length=16,
        ),
        sample=SampleConfig(**sample),
        train=TrainConfig(steps=200, batch_size=2, run_dir=str(run), **settings),
    )
    with jax.set_mesh(make_mesh(config.mesh)), pytest.raises(ValueError, match=message):
        train(config)
    assert not (run / "metrics.jsonl").exists()


def test_a_sample_ends_with_the_context():
    settings = TrainConfig(sample_prompt="x" * 30, sample_tokens=200)
    config = Config(model=MODEL, data=DataConfig(sequence_length=16), train=settings)
    sample = make_sampler(config, TOKENIZER)
    text = sample(make_params(MODEL), 1)
    assert 0 < len(text) <= 10
