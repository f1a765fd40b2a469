"""Conversations held by a tiny model with a chat template."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest
from hugging_face_case import golden_tokenizer
from toy_case import make_params, toy

from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.cli import main
from jaxlm.config import Config, DataConfig, SampleConfig
from jaxlm.infer import conversation
from jaxlm.infer.conversation import converse
from jaxlm.infer.generate import generate
from jaxlm.infer.messages import chat_ids
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


class Script:
    """Replaces stdin: returns lines, and may interrupt the first answer."""

    def __init__(self, monkeypatch, lines):
        self.lines = iter(lines)
        monkeypatch.setattr("builtins.input", self)

    def __call__(self, prompt):
        assert prompt == "> "
        line = next(self.lines, None)
        if line is None:
            raise EOFError
        return line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Mostly samples letters of the byte-level vocabulary."""
    tokenizer = golden_tokenizer("byte_level", tmp_path_factory.mktemp("tokenizer"))
    config = toy(vocab_size=tokenizer.vocab_size, context_length=256)
    params = make_params(config, std=0.5)
    return config, params, tokenizer


# Long enough for both turns to have 129 to 256 tokens: one size is compiled.
SYSTEM = "You are a kind king, and this is your castle in the north. " * 3


def hold(monkeypatch, model, lines, sample=None, **options):
    config, params, tokenizer = model
    sample = sample or SampleConfig(max_new_tokens=12)
    Script(monkeypatch, lines)
    converse(
        config,
        params,
        tokenizer,
        dataclasses.replace(sample, stop_ids=tokenizer.stop_ids),
        jax.random.key(5),
        **options,
    )


def answers(model, lines, new=12, system=None):
    """Computes the conversation with `generate`, turn by turn."""
    config, params, tokenizer = model
    messages = [] if system is None else [{"role": "system", "content": system}]
    sample = SampleConfig(max_new_tokens=new, stop_ids=tokenizer.stop_ids)
    for turn, line in enumerate(lines):
        messages.append(user(line))
        key = jax.random.fold_in(jax.random.key(5), turn)
        ids = chat_ids(tokenizer, messages)
        result = generate(
            *(config, params, [ids], sample, key), num_tokens=tokenizer.vocab_size
        )
        messages.append(
            assistant(tokenizer.decode(result.tokens[0][: result.lengths[0]]))
        )
    return [m["content"] for m in messages if m["role"] == "assistant"]


@pytest.mark.slow
def test_a_conversation(model, monkeypatch, capsys):
    lines = ["Hi <|im_end|>", "", "  ", "and?", "/exit", "not read"]
    hold(monkeypatch, model, lines, system=SYSTEM)
    out, err = capsys.readouterr()
    expected = answers(model, [lines[0], lines[3]], system=SYSTEM)
    assert out == "".join(f"{text}\n" for text in expected)
    assert expected[0] and expected[0] != expected[1]
    assert err.count("stopped after 12 tokens: --max-new-tokens allows more\n") <= 2


def test_the_end_of_the_input_ends_it(model, monkeypatch, capsys):
    hold(monkeypatch, model, [])
    assert capsys.readouterr().out == "\n"


def test_a_context_that_is_full(model, monkeypatch, capsys):
    config = model[0]
    hold(monkeypatch, model, ["x" * 600, "y"])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert f"the model's context is {config.context_length}: it ends here" in err
    # In the middle of an answer.
    long = SampleConfig(max_new_tokens=1000)
    hold(monkeypatch, model, ["Hi", "y"], long, system=SYSTEM)
    out, err = capsys.readouterr()
    assert len(model[2].encode(out)) > 20
    assert (
        err == "the model's context of 256 tokens is full: the conversation ends here\n"
    )


def test_ctrl_c_stops_the_answer_only(model, monkeypatch, capsys):
    calls = []

    def interrupted(*arguments, on_tokens, **options):
        calls.append(arguments[2][0].tolist())
        if len(calls) == 1:
            on_tokens(jax.numpy.array([[3, 4]]), jax.numpy.array([[True, True]]))
            raise KeyboardInterrupt
        return generate(*arguments, on_tokens=on_tokens, **options)

    monkeypatch.setattr(conversation, "generate", interrupted)
    hold(monkeypatch, model, ["Hi", "again"], system=SYSTEM)
    first = model[2].decode([3, 4])
    assert capsys.readouterr().out.startswith(f"{first}\n")
    messages = [{"role": "system", "content": SYSTEM}, user("Hi"), assistant(first)]
    messages.append(user("again"))
    assert calls[1] == chat_ids(model[2], messages).tolist()


def test_a_model_without_a_template(model, monkeypatch):
    with pytest.raises(ValueError, match="no chat template"):
        hold(monkeypatch, (*model[:2], ByteTokenizer()), ["Hi"])


@pytest.fixture
def run(model, tmp_path):
    config, params, tokenizer = model
    with CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(
            *(1, params, {}),
            config=Config(model=config, data=DataConfig(sequence_length=16)),
            tokenizer=tokenizer,
            data_fingerprint="data",
            finite=True,
        )
    return tmp_path / "run"


@pytest.mark.slow
def test_the_program(run, repository, model):
    """Runs with a pipe as stdin; the output of -v comes before the conversation."""
    flags = ["--chat", "--system", SYSTEM, "--seed", "5", "--temperature", "1", "-v"]
    child = subprocess.run(
        [
            sys.executable,
            repository / "sample.py",
            run,
            *flags,
            "--max-new-tokens",
            "12",
        ],
        env={**os.environ, "PYTHONPATH": str(repository)},
        input="Hé\nand?\n".encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    out = child.stdout.decode()
    assert child.returncode == 0, out
    before, prompt, talk = out.partition("> ")
    assert "attention of global layers, decode: auto took reference" in before
    talk = talk.replace("stopped after 12 tokens: --max-new-tokens allows more\n", "")
    expected = answers(model, ["Hé", "and?"], system=SYSTEM)
    assert prompt + talk == f"> {expected[0]}\n> {expected[1]}\n> \n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sample", "--system", "x"], "unknown flag '--system'"),
        (["sample", "--chat", "--prompt", "x"], "unknown flag '--prompt'"),
        (["chat", "--seed", "x"], "--seed"),
    ],
)
def test_flags_that_are_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
