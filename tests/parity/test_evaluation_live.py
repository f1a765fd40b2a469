"""Evaluation beside transformers, and inside lm-evaluation-harness."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.checkpoint.conversion import convert
from jaxlm.checkpoint.save import save
from jaxlm.evaluation.multiple_choice import accuracy, read_questions
from jaxlm.evaluation.text_loss import text_loss
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

pytestmark = pytest.mark.parity

TOKENIZER = ByteTokenizer()
CONFIG = toy(vocab_size=TOKENIZER.vocab_size, context_length=64)
PARAMS = make_params(CONFIG, std=0.3)
TEXT = "Perplexity is the exponential of the mean negative log-likelihood. " * 4


def transformers_loss(folder, ids, context, stride):
    """The loop of transformers' guide to perplexity, with exact sums."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        targets = inputs.clone()
        targets[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=targets).loss
        # The model shifts labels, so the first of a window is never predicted.
        predicted = int((targets[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * predicted, count + predicted, end
        if end == len(ids):
            break
    return total / count, count


@pytest.mark.parametrize("context, stride", [(64, 32), (48, 10)])
def test_the_loss_is_that_of_transformers(tmp_path, context, stride):
    save(tmp_path / "run", CONFIG, PARAMS, TOKENIZER)
    convert(str(tmp_path / "run"), tmp_path / "hf", to="hf", with_tokenizer=False)
    expected, count = transformers_loss(
        tmp_path / "hf", TOKENIZER.encode(TEXT).tolist(), context, stride
    )
    *_, sums = text_loss(
        *(CONFIG, PARAMS, TOKENIZER, [TEXT]), context=context, stride=stride
    )
    assert sums.tokens == count
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)


HARNESS_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
{rest}
metadata: {{version: 1}}
"""
CHOICE = """\
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
ROLLING = """\
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """\
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.skipif(not find_spec("lm_eval"), reason="needs the extra eval")
# Of the harness and its data sets.
@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_all_kinds_of_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from jaxlm.evaluation.harness import JaxLM

    rng = np.random.default_rng(0)
    file = tmp_path / "questions.jsonl"
    with file.open("w") as lines:
        for _ in range(8):
            words = ["".join(rng.choice([*"abcdé"], n)) for n in (2, 4, 9)]
            question = {"context": words[1] + " " + words[2] + "?", "choices": words}
            lines.write(json.dumps({**question, "answer": int(rng.integers(3))}) + "\n")
    kinds = {
        "choice": ("multiple_choice", CHOICE),
        "rolling": ("loglikelihood_rolling", ROLLING),
        "until": ("generate_until", UNTIL),
    }
    for name, (kind, rest) in kinds.items():
        task = HARNESS_TASK.format(name=name, kind=kind, rest=rest, file=file)
        (tmp_path / f"{name}.yaml").write_text(task)
    results = simple_evaluate(
        JaxLM(CONFIG, PARAMS, TOKENIZER),
        tasks=[*kinds],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    *_, counts = accuracy(CONFIG, PARAMS, TOKENIZER, read_questions(file))
    found = {name: results["choice"][f"{name},none"] for name in counts.rates()}
    assert found == pytest.approx(counts.rates())
    assert 0 < results["rolling"]["bits_per_byte,none"] < 20
    assert results["until"]["exact_match,none"] == 0
