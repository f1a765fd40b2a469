"""Wrong inputs of every program: one line each, with what is wrong and the remedy."""

import shlex
import shutil
import sys

import pytest
from terminal_case import Terminal
from toy_case import make_params, toy

from jaxlm.checkpoint.save import save
from jaxlm.cli import main
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

CONFIG = """
from jaxlm.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1,
                          head_dim=8, hidden_dim=16, context_length=64),
        data=DataConfig(path=("text.txt",), sequence_length=32),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=2, batch_size=2, run_dir="run", eval_every=0,
                          sample_every=0, compile_cache=False),
    )
"""
FILES = {
    "tiny.py": CONFIG,
    "import.py": "import not_there",
    "name.py": CONFIG.replace("TrainConfig(", "TrainConfg("),
    "syntax.py": "def get_config(:",
    "divides.py": "def get_config():\n    return 1 / 0",
    "heads.py": CONFIG.replace("num_kv_heads=1", "num_kv_heads=3"),
    "none.py": "x = 1",
    "exits.py": "raise SystemExit(0)",
    "three.py": "def get_config(): return 3",
    "text.txt": "It was a bright cold day in April.\n" * 100,
    "line.txt": "It was a bright cold day in April. " * 100,
    "empty.txt": "",
    "short.txt": "It was",
    "latin.txt": "\xe9t\xe9\n".encode("latin-1") * 200,
    "rows.jsonl": '{"body": "It was a bright cold day."}\n' * 50,
    "rows.json": '{"text": "It was a bright cold day."}\n' * 50,
    "list.json": '[\n {"text": "It was a bright cold day."}\n]',
    "broken.jsonl": '{"text": "It was\n' * 50,
    "broken.txt.gz": b"\x1f\x8b123",
    "broken.gguf": b"GGUF1234",
    "broken/config.json": "{",
    "unknown/config.json": '{"model_type": "unheard-of"}',
    "nothing/": "",
    "site.html": "<!doctype html>\n<p>mine",
    "photo.png": b"\x89PNG",
    "mine/report.html": "<!doctype html>\n<p>mine",
    "drawn/loss.png": b"\x89PNG",
    "notes.json": "[]",
    "lost/metrics.jsonl": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files, a run in runs/tiny, and one that is damaged."""
    folder = tmp_path_factory.mktemp("folder")
    for name, content in FILES.items():
        file = folder / name
        (file if name.endswith("/") else file.parent).mkdir(exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif not name.endswith("/"):
            file.write_text(content)
    tokenizer = ByteTokenizer()
    model = toy(vocab_size=tokenizer.vocab_size, context_length=64)
    save(folder / "runs" / "tiny", model, make_params(model), tokenizer)
    damaged = folder / "runs" / "damaged"
    shutil.copytree(folder / "runs" / "tiny", damaged)
    for file in (damaged / "checkpoints").glob("*/*.json"):
        file.write_text("{")
    return folder


FLAGS = "; --help lists the flags, the most useful first"
NO_CHECKPOINT = "is not a checkpoint: it "
# Command line -> what the line on stderr contains; `error: ` begins it.
WRONG = {
    # Verbs.
    "trian": "no verb 'trian' (did you mean 'train'?); verbs: train, sample, chat,",
    "--halp": "no verb '--halp'; verbs: train, sample, chat,",
    # Flags of a run.
    "train --train.steps many": "--train.steps is 'many': it must be an integer",
    "train --train.steps 1.5": "--train.steps is '1.5': it must be an integer",
    "train --train.steps": "--train.steps needs a value",
    "train --train.steps --fresh": "--train.steps needs a value",
    "train --train.steps 0": "--train.steps is 0: it must be > 0",
    "train --train.steps 2147483648": "--train.steps is 2147483648: it must be below",
    "train --train.steps 99999999999999999999": "it must be below 2**63",
    "train --train.step=3": "'--train.step=3' (did you mean '--train.steps'?)" + FLAGS,
    "train --modl.num-layers 3": "(did you mean '--model.num-layers'?)",
    "train --model.rope-scaling x": "(did you mean '--model.rope-scaling.",
    "train --data x": "unknown flag '--data' (did you mean '--data.path'?)",
    "train --train.step 3": "'--train.step' (did you mean '--train.steps'?)" + FLAGS,
    "train --lr 3": "(did you mean '--optimizer.learning-rate'?)" + FLAGS,
    "train --learning_rate 3": "'--learning_rate' (did you mean '--optimizer.learn",
    "train --epochs 3": "unknown flag '--epochs' (did you mean '--train.steps'?)",
    "train --max-steps 3": "unknown flag '--max-steps' (did you mean '--train.steps'?)",
    "train --batch_size 3": "'--batch_size' (did you mean '--train.batch-size'?)",
    "train --model_name gpt2": "'--model_name' (did you mean '--init-from'?)",
    "train --device cuda": "(JAX_PLATFORMS=cpu in the environment selects the device)",
    "train --resume": "unknown flag '--resume' (the same command again resumes a run)",
    "train --fresh yes": "--fresh takes no value: --no-fresh is its opposite",
    "train --fresh=1": "--fresh takes no value: --no-fresh is its opposite",
    "train --optimizer.name adam": "one of 'adamw', 'lion', 'muon', 'adafactor' (did",
    "train --optimizer.learning-rate 1e": "learning-rate is '1e': it must be a number",
    "train --optimizer.learning-rate nan": "learning-rate is nan: it must be finite",
    "train --optimizer.b1 1": "--optimizer.b1 is 1.0: it must be in [0, 1)",
    "train --model.num-layers 0": "--model.num-layers is 0: it must be > 0",
    "train --model.num-kv-heads 3": "a multiple of --model.num-kv-heads 3, as each",
    "train --model.head-dim 7": "--model.head-dim * --model.rope-fraction is 7: it m",
    "train --model.dtype fp16": "one of 'auto', 'float32', 'bfloat16' (did you mean",
    "train --model.rope-scaling.factor 2": "--model.rope-scaling.kind is missing",
    "train --data.sequence-length 4096": "more than --model.context-length 64: make",
    "train --data.weights 1 x": "--data.weights is 'x': it must be a number",
    "train --data.weights 1 2": "--data.weights has 2 numbers for 1 entries of --data.",
    "train --data.holdout-fraction 1": "--data.holdout-fraction is 1.0: it must be in",
    "train --mesh.fsdp 0": "--mesh.fsdp is 0: it must be >= 1, or -1",
    "train --mesh.x 0": "unknown flag '--mesh.x'",
    "train --mesh.data 3": "--mesh.data 3 x --mesh.fsdp 1 x --mesh.expert 1 x --mesh.context 1 x",
    "train --mesh.fsdp -1": "--mesh.data and --mesh.fsdp are -1: only one axis can",
    # Config files.
    "train shakespear": "no config file 'shakespear' (did you mean 'shakespeare'?): ",
    "train tiny.py import.py": "unexpected argument 'import.py'" + FLAGS,
    "train import.py": "import.py:1: ModuleNotFoundError: No module named 'not_there'",
    "train name.py": "name.py:10: NameError: name 'TrainConfg' is not defined",
    "train syntax.py": "syntax.py:1: SyntaxError: invalid syntax",
    "train divides.py": "divides.py:2: ZeroDivisionError: division by zero",
    "train heads.py": "heads.py:6: model.num_heads is 2: it must be a multiple of model",
    "train exits.py": "exits.py:1: SystemExit: 0",
    "train --data.path text.txt tiny.py": "tiny.py is a config file, and --data.path tak",
    "train --data.path text.txt --data.path=line.txt": "--data.path is there 2 times: gi",
    "train none.py": "none.py: no function get_config(); define it",
    "train finetune --fresh": "finetune needs --init-from CHECKPOINT, whose model it t",
    "doctor finetune": "finetune needs --init-from CHECKPOINT, whose model it trains",
    "train three.py": "three.py: get_config() returns int, not a Config",
    "train text.txt": "is no config file, which is in Python: to train on a text, give -",
    "train runs/tiny": "is a folder, not a config file: a text is given by --data.path,",
    # Texts.
    "train --data.path nope.txt": "--data.path: 'nope.txt' does not exist (did you",
    "train --data.path rows.json": "rows.json: it has JSON objects with the field 'text'",
    "train --data.path list.json": "list.json: it has JSON objects with the field 'text'",
    "train --data.path *.nope": "--data.path: no file matches the glob '*.nope'",
    "train --data.path nothing": "nothing: no text in this folder",
    "train --data.path empty.txt": "empty.txt: the file is empty: it has no document",
    "train --data.path short.txt": "add text or lower --data.sequence-length",
    "train --data.path latin.txt": "convert the file, or set --data.invalid-utf8 to",
    "train --data.path rows.jsonl": "no field 'text'; the fields are body: set --data.f",
    "train --data.path broken.jsonl": "broken.jsonl, line 1: this line is not JSON",
    "train --data.path broken.txt.gz": "the compressed file is damaged or truncated",
    "train --data.tokenizer-model x": "but --data.tokenizer is 'chars': set --data.tok",
    "train --data.tokenizer sentencepiece --data.tokenizer-model nope": (
        "--data.tokenizer-model: nope: no such SentencePiece .model file"
    ),
    "train --data.tokenizer sentencepiece --data.tokenizer-vocab-size 99999": (
        "--data.tokenizer-vocab-size is 99999, but this text yields at most"
    ),
    "train --data.cache-dir text.txt": "set --data.cache-dir to a folder that you can",
    "train --model.vocab-size 3": "--model.vocab-size is 3, but the tokenizer has",
    "train --data.path line.txt --train.sample-every 1 --train.sample-prompt é": (
        "or turn samples off with --train.sample-every 0"
    ),
    "train --train.sample-every 1 --sample.stop-ids 999": "--sample.stop-ids: 999 is",
    "train --train.run-dir text.txt": "choose another with --train.run-dir, or fix its",
    "train --train.run-dir runs/tiny": "set it back, or start over with --fresh",
    "train --init-from nope": f"--init-from: nope {NO_CHECKPOINT}",
    "train --init-from broken": "--init-from: broken/config.json is not valid JSON",
    "train --init-from runs/tiny --data.tokenizer bytes": (
        "--data.tokenizer: --init-from takes the tokenizer of the checkpoint"
    ),
    "train --init-from unknown": "model_type is 'unheard-of'; known are llama,",
    # Samples and conversations.
    "sample nope": f"nope {NO_CHECKPOINT}",
    "sample runs/tinny": "runs/tiny",
    "sample --temprature 1": "'--temprature' (did you mean '--temperature'?)",
    f"sample runs/tiny --prompt {'é' * 32}": (
        "--prompt has 64 tokens, with 1 new one 65: more than the context of 64; "
        "shorten the prompt"
    ),
    "sample ROMEO:": "; a text goes after --prompt",
    "sample --system x": "unknown flag '--system'",
    "sample nothing": "it is empty; run folders nearby: ",
    "sample broken": "broken/config.json is not valid JSON",
    "sample broken.gguf": "broken.gguf: GGUF version 875770417, not 2 or 3",
    "sample text.txt": "text.txt: not a GGUF file",
    "sample runs/tiny extra": "unexpected argument 'extra'" + FLAGS,
    "sample --model runs/tiny": "'--model' (RUN is given without a flag)" + FLAGS,
    "sample --temperature hot": "--temperature is 'hot': it must be a number",
    "sample --temperature -1": "--temperature is -1.0: it must be in [0, 100]",
    "sample --top-p 2": "--top-p is 2.0: it must be in (0, 1]",
    "sample --max-tokens 3": "'--max-tokens' (did you mean '--max-new-tokens'?)",
    "sample --num-samples 0": "--num-samples is 0: it must be at least 1",
    "sample runs/tiny --num-samples 1000000000": "1,000,000,000 samples need at least 3",
    "sample --dtype float16": "--dtype is 'float16': it must be one of 'auto', 'float3",
    "sample --seed -1": "--seed is -1: it must be in [0, 2**32)",
    "sample --stop-ids x": "--stop-ids is 'x': it must be an integer",
    "sample --prompt": "--prompt needs a value",
    "sample runs/tiny --mesh.data 3": "--mesh.data 3 x --mesh.fsdp 1 x",
    "sample runs/tiny --mesh.data -1": "--mesh.data is -1: give its number of devices",
    "sample runs/tiny --stop-ids 999": "--stop-ids: 999 is not in the vocabulary",
    "sample --chat --prompt x": "unknown flag '--prompt'",
    "chat nope": f"nope {NO_CHECKPOINT}",
    "chat runs/tiny": (
        "this model has no chat template, which formats a conversation: take a model "
        "that was trained to chat, or continue a text with `jaxlm sample`"
    ),
    "chat --seed x": "--seed is 'x': it must be an integer",
    "chat --num-samples 2": "unknown flag '--num-samples'",
    # Verbs for checkpoints and runs.
    "convert": "SRC is missing" + FLAGS,
    "train --data.sequence-length 128": "128, more than --model.context-length 64:",
    "train --data.path ''": "--data.path is ('',): it must be at least one path",
    "train --data.path ~no-such-user/x": "'~no-such-user/x' does not exist",
    "train --data.cache-dir ''": "--data.cache-dir is '': it must be not empty",
    "train --train.run-dir ''": "--train.run-dir is '': it must be not empty",
    "train --train.run-dir \udcff": "\\udcff is not UTF-8: choose another with --train",
    "train --init-from ''": "--init-from: the path of the checkpoint is empty",
    "sample ~no-such-user/x": f"~no-such-user/x {NO_CHECKPOINT}",
    "convert runs/tiny": "DST is missing" + FLAGS,
    "convert nope x": f"nope {NO_CHECKPOINT}",
    "convert runs/tiny nothing": "nothing already exists: choose another name",
    "convert runs/tiny s3://bucket/x.gguf": "DST s3://bucket/x.gguf is a URL, and it mu",
    "convert runs/tiny '~/x.gguf'": "DST ~/x.gguf begins with ~, which the shell has no",
    "report runs/tiny --out site.html": "--out site.html is there, and is not a page of",
    "report runs/tiny --out photo.html": "photo.png is there, and the picture beside ph",
    "report runs/tiny --out runs/tiny/checkpoints/0/params/x.html": "inside of a step, ",
    "report mine": "the report mine/report.html is there, and is not a page of jaxlm",
    "report drawn": "drawn/loss.png is there, and the picture beside drawn/report.html",
    "look runs/tiny --prompt x --lens-text text.txt --lens runs/tiny/checkpoints/0/x": (
        "--lens runs/tiny/checkpoints/0/x is inside of a step, which would be damaged"
    ),
    "look runs/tiny --prompt x --out site.html": "site.html is there, and is not a page",
    "sample runs/tiny --look text.txt": "--look text.txt: the name of a page ends in .h",
    "sample runs/tiny --look site.html": "--look site.html is there, and is not a page",
    "verify runs/tiny --out notes.json": "notes.json is there, and is not a certificate",
    "verify runs/tiny --out broken.gguf": "the name of a certificate ends in .json",
    "report runs/tiny --out=~/x.html": "--out ~/x.html begins with ~, which the shell",
    "train --train.run-dir runs/tiny --init-from runs/tiny --fresh": "--fresh moves as",
    "convert runs/tiny x.gguf --dtype q9": "of 'f32', 'f16', 'bf16', 'q8_0'\n",
    "convert runs/tiny new/x.ggf": "new/x.ggf: did you mean new/x.gguf? --to hf or --to",
    "convert runs/tiny x --to gguf": "a GGUF file ends in .gguf: write x.gguf",
    "convert runs/tiny x --format gguf": "'--format' (did you mean '--to'?)",
    "verify": "SRC is missing" + FLAGS,
    "verify nope": f"nope {NO_CHECKPOINT}",
    "verify runs/tiny --tokens 0": "--tokens is 0: it must be at least 1",
    "verify runs/tiny --out no/x.json": "--out no/x.json: no is not a folder; make it",
    "report": "RUNS is missing: name at least one run folder",
    "report nope": "nope/metrics.jsonl: no such file; is nope the folder of a run?",
    "serve runs/tiny --slots 20000": "--slots is 20000: it must be at most 1024",
    "serve runs/tiny --port 99999": "--port is 99999: it must be at most 65535",
    "report runs/tiny --out runs/tiny/metrics.jsonl": "page ends in .html",
    "report lost --uot x": "'--uot' (did you mean '--out'?)",
    "tune": "WHAT is missing" + FLAGS,
    "tune attn": "WHAT is 'attn': it must be 'attention'",
    "tune attention --batch 0": "--batch is 0: it must be at least 1",
    "tune attention --implementation nope": "--implementation is 'nope': it must be one",
    "doctor nope": "no config file 'nope': give the path of one, or a name of",
    "doctor --data.pth x": "'--data.pth' (did you mean '--data.path'?)",
}


def with_config(line):
    """The words of a command line; a training run takes the tiny config."""
    words = shlex.split(line)
    if words[0] == "train" and (len(words) == 1 or words[1].startswith("-")):
        words.insert(1, "tiny.py")
    return words


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_input_is_one_line_with_a_remedy(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(with_config(line))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert WRONG[line] in err
    assert not (folder / "run").exists()  # as the run was not begun


def test_checkpoints_that_cannot_be_read_have_a_code_of_their_own(
    folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(with_config("train --train.run-dir runs/damaged"))
    err = capsys.readouterr().err
    assert end.value.code == 3
    assert err.startswith("error: ") and err.count("\n") == 1, err


ON_A_TERMINAL = (
    *("train --train.steps many", "train --lr 3", "train name.py", "train shakespear"),
    *("sample nope", "sample --temperature hot", "chat runs/tiny", "convert", "tune x"),
)
RUN_EACH = """
import shlex, sys
from jaxlm.cli import main
for line in sys.argv[1:]:
    try: main(shlex.split(line))
    except SystemExit as end: assert end.code == 2
"""


def test_a_terminal_shows_what_a_pipe_gets(folder, repository, monkeypatch, capsys):
    """In one process, whose three streams are a terminal."""
    monkeypatch.chdir(folder)
    lines = [shlex.join(with_config(line)) for line in ON_A_TERMINAL]
    for line in lines:
        with pytest.raises(SystemExit):
            main(shlex.split(line))
    command = [sys.executable, "-c", RUN_EACH, *lines]
    places = {"cwd": folder, "environment": {"PYTHONPATH": str(repository)}}
    with Terminal(command, columns=300, **places) as terminal:
        assert terminal.wait() == 0
        assert terminal.lines() == capsys.readouterr().err.splitlines()
