"""The loss of whole documents, against a uniform model and a slow definition."""

import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm import tree
from jaxlm.checkpoint.save import save
from jaxlm.cli import main
from jaxlm.commands import eval as eval_module
from jaxlm.data.sources import find_source
from jaxlm.evaluation.text_loss import TextLoss, text_loss
from jaxlm.flags.arguments import EvalArguments
from jaxlm.infer.scoring import score
from jaxlm.model.params import quantize_matrices
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe

TOKENIZER = ByteTokenizer()
CONFIG = toy(vocab_size=TOKENIZER.vocab_size, context_length=32)
PARAMS = make_params(CONFIG, std=0.5)
TEXT = "It is é long text, of more than one window of the model's context. " * 3


def last(*arguments, **options):
    return [*text_loss(*arguments, **options)][-1]


def test_a_uniform_model_has_the_loss_log_v():
    head = jnp.zeros_like(PARAMS["lm_head"]["kernel"])
    params = tree.replace(PARAMS, "lm_head/kernel", head)
    texts = [TEXT, "", "é", "short"]
    sums = last(CONFIG, params, TOKENIZER, texts, context=32, stride=8)
    assert sums.documents == 3
    # Without a bos token nothing predicts the first byte of a document.
    assert sums.bytes == sums.tokens == sum(len(t.encode()) for t in texts) - 3
    v = TOKENIZER.vocab_size
    np.testing.assert_allclose(sums.loss, math.log(v), rtol=1e-6)
    np.testing.assert_allclose(sums.perplexity, v, rtol=1e-5)
    np.testing.assert_allclose(sums.bits_per_byte, math.log2(v), rtol=1e-6)


@pytest.mark.parametrize("context, stride", [(32, 31), (32, 16), (20, 1)])
def test_each_token_is_predicted_once_after_enough_others(context, stride):
    ids = TOKENIZER.encode(TEXT).tolist()
    sums = last(CONFIG, PARAMS, TOKENIZER, [TEXT], context=context, stride=stride)
    # The window of token t ends at the first end of a window that is after it.
    ends = [min(t, len(ids)) for t in range(context, len(ids) + stride, stride)]
    total, texts = 0.0, []
    for t in range(1, len(ids)):
        end = next(e for e in ends if e > t)
        start = 0 if end == context else ends.index(end) * stride
        texts.append(ids[start : t + 1])
        assert t < context or len(texts[-1]) > context - stride
    total = sum(float(s[-1]) for s in score(CONFIG, PARAMS, texts, num_tokens=257))
    assert sums.tokens == len(ids) - 1
    np.testing.assert_allclose(-sums.nats, total, rtol=1e-5)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, ValueError("bad text")])
def test_what_was_measured_until_it_ended_is_told(tmp_path, monkeypatch, capsys, end):
    def some(*_, **__):
        yield TextLoss(2, 10, 10, 5.0)
        if isinstance(end, ValueError):
            raise end
        signal.raise_signal(end)

    monkeypatch.setattr(eval_module, "text_loss", some)
    (tmp_path / "t.txt").write_text(TEXT)
    source = find_source(str(tmp_path / "t.txt"))
    chosen = EvalArguments(src="run", text="t.txt")
    with pytest.raises((KeyboardInterrupt, SystemExit, ValueError)):
        eval_module._measure_text(CONFIG, PARAMS, TOKENIZER, source, chosen)
    line = capsys.readouterr().err.splitlines()[-1]
    figures = "loss 0.5000, perplexity 1.6487"
    assert line == f"ended early; of the first 10 tokens: {figures}"


def test_special_tokens_that_a_text_spells_out_are_told(tmp_path, capsys):
    tokenizer = train_bpe(["abc"], CONFIG.vocab_size)
    save(tmp_path / "run", CONFIG, PARAMS, tokenizer)
    (tmp_path / "a.txt").write_text("abc<|endoftext|>abc")
    (tmp_path / "b.txt").write_text("abc<|endoftext|>")
    call = ["eval", str(tmp_path / "run"), "--text", str(tmp_path / "*.txt")]
    assert main([*call, "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "documents      2" in out
    assert err.count("the text has <|endoftext|>, which is read as these charact") == 1


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    save(tmp_path / "run", CONFIG, PARAMS, TOKENIZER)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in (TEXT, "abc")))
    flags = ["--context", "32", "--stride", "10", "--dtype", "float32"]
    assert (
        main(["eval", str(tmp_path / "run"), "--text", str(file), *flags, "--json"])
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    sums = last(CONFIG, PARAMS, TOKENIZER, [TEXT, "abc"], context=32, stride=10)
    assert figures == {
        "loss": sums.loss,
        "perplexity": sums.perplexity,
        "bits_per_byte": sums.bits_per_byte,
        "documents": 2,
        "tokens": sums.tokens,
        "bytes": sums.bytes,
        "context": 32,
        "stride": 10,
    }
    flags = [*flags, "--weights", "int8", "--json"]
    assert main(["eval", str(tmp_path / "run"), "--text", str(file), *flags]) == 0
    rounded = quantize_matrices(jax.tree.map(jnp.asarray, PARAMS), "int8")
    sums = last(CONFIG, rounded, TOKENIZER, [TEXT, "abc"], context=32, stride=10)
    assert json.loads(capsys.readouterr().out)["loss"] == sums.loss != figures["loss"]
    questions = tmp_path / "questions.jsonl"
    question = {"context": "The sky is", "choices": ["blue", "a fish"], "answer": 0}
    questions.write_text(json.dumps(question) + "\n")
    assert main(["eval", str(tmp_path / "run"), "--choices", str(questions)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["questions", "1"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --text or --choices"),
        (
            ["--text", "a", "--context", "64"],
            "--context is 64: it must be from 2 to the model's context of 32",
        ),
        (
            ["--text", "a", "--stride", "32"],
            "--stride is 32: it must be at least 1 and less than the context of 32",
        ),
        (["--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--choices", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    ],
)
def test_wrong_flags(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run", CONFIG, PARAMS, TOKENIZER)
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
