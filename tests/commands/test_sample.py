"""sample.py in child processes, on a run made without training."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from terminal_case import CTRL_C, Terminal
from toy_case import make_params, toy

from jaxlm.checkpoint.save import save
from jaxlm.cli import main
from jaxlm.commands.generating.generation import open_model
from jaxlm.commands.sample import (
    Printer,
    read_prompt,
    read_proposer,
    write_beams,
    write_samples,
)
from jaxlm.config import MeshConfig, SampleConfig
from jaxlm.flags.arguments import SampleArguments
from jaxlm.infer.beam_search import beam_search
from jaxlm.infer.generate import generate
from jaxlm.infer.speculative.proposals import PromptLookup
from jaxlm.model.params import quantize_matrices
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.printable import printable
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TOKENIZER = ByteTokenizer()
# One new token that is part of the text.
A = np.full((1, 1), ord("a")), np.ones((1, 1), bool)
# Half of it is more than what a program can write ahead of a reader into a small pipe.
CONTEXT, PIPE_BYTES = 16_384, 4096


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with runs/tiny, whose model mostly samples ASCII letters."""
    home = tmp_path_factory.mktemp("home")
    model = toy(vocab_size=TOKENIZER.vocab_size, context_length=CONTEXT)
    params = make_params(model, std=0.5)
    params["lm_head"]["kernel"][:, :97] = params["lm_head"]["kernel"][:, 123:] = 0
    params["lm_head"]["kernel"][:, 97:123] *= 3
    save(home / "runs" / "tiny", model, params, TOKENIZER)
    return home, model, params


def start(home, repository, *arguments, **streams):
    return subprocess.Popen(
        [sys.executable, repository / "sample.py", *arguments],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(repository)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        pipesize=PIPE_BYTES,
    )


def run(home, repository, *arguments):
    child = start(home, repository, *arguments)
    out, err = child.communicate()
    return child.returncode, out.decode(), err.decode()


@pytest.mark.slow
def test_the_text_is_that_of_generate(home, repository):
    folder, model, params = home
    code, out, err = run(
        *(folder, repository, "--prompt", "abc", "--num-samples", "2", "--stats"),
        *("--max-new-tokens", "20", "--seed", "3", "--temperature", "0.9"),
    )
    assert code == 0, err
    sample = SampleConfig(
        max_new_tokens=20, temperature=0.9, stop_ids=TOKENIZER.stop_ids
    )
    prompts = [TOKENIZER.encode("abc").tolist()] * 2
    result = generate(
        *(model, params, prompts, sample, jax.random.key(3)),
        num_tokens=TOKENIZER.vocab_size,
    )
    texts = [
        "abc" + TOKENIZER.decode(tokens[:length])
        for tokens, length in zip(result.tokens, result.lengths, strict=True)
    ]
    assert out == f"--- sample 1\n{texts[0]}\n--- sample 2\n{texts[1]}\n"
    assert texts[0] != texts[1] and len(texts[0]) > 10
    assert "prefill 6 tokens in" in err and "decode 40 tokens in" in err


# Runs sample.py with waits that are shown at once, and before they go on: in their
# first second, however busy the machine is.
IMPATIENT = """
import sys
import types
from jaxlm import cli
from jaxlm.terminal import progress

def show(waiting, *arguments, **options):
    begin(waiting, *arguments, **options)
    waiting._timer.join()

begin, progress.Waiting.__init__ = progress.Waiting.__init__, show
progress.WAIT_SECONDS = 0.0
progress.time = types.SimpleNamespace(monotonic=lambda: 0.0)
sys.exit(cli.run("sample", sys.argv[1:], "sample.py"))
"""
# Says that the wait for the first tokens has begun.
TELLS = """
import pathlib
from jaxlm.commands import sample

def generate(*arguments, **options):
    pathlib.Path("waits").touch()
    return generates(*arguments, **options)

generates, sample.generate = sample.generate, generate
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-v"]])
def test_a_terminal_shows_each_wait_and_then_only_the_text(home, repository, flags):
    """The output of -v comes before the prompt."""
    arguments = ["runs/tiny", "--prompt", "<abc>", "--max-new-tokens", "40", *flags]
    with Terminal(
        [sys.executable, "-c", IMPATIENT, *arguments],
        cwd=home[0],
        environment={"PYTHONPATH": str(repository)},
        columns=400,
    ) as terminal:
        assert terminal.wait() == 0, terminal.lines()
        *before, text = terminal.lines()
        assert re.fullmatch(r"<abc>[^ ]{40}", text)
        if flags:
            assert all(line.startswith("attention on cpu: auto") for line in before)
        else:
            assert before == []
        waits = ("starting", "loading the model", "compiling and reading the prompt")
        places = [terminal.written.find(f"{wait} ... 0 s".encode()) for wait in waits]
        assert -1 < places[0] < places[1] < places[2] < terminal.written.find(b"<abc>")


def sample_short(capsys, prompt, **options):
    """The two streams for a model with a context of 64 tokens."""
    model = toy(vocab_size=TOKENIZER.vocab_size, context_length=64)
    arguments = SampleArguments(prompt=prompt, **options)
    write_samples(model, make_params(model), TOKENIZER, prompt, arguments)
    return capsys.readouterr()


@pytest.mark.slow
def test_a_long_prompt_leaves_the_rest_of_the_context(capsys):
    full = "stopped after 4 new tokens: the model's context of 64 tokens is full\n"
    shown = sample_short(capsys, 60 * "a", num_samples=2)
    parts = shown.out.split("a" * 60)
    assert (len(parts), *parts[:1]) == (3, "--- sample 1\n")
    # Before it may stand how long compiling took.
    assert shown.err.endswith(full)
    # What was asked for and fits is what comes, without a word.
    for limit in (3, 4, 5):
        sample = SampleConfig(max_new_tokens=limit)
        shown = sample_short(capsys, 60 * "a", sample=sample)
        assert shown.err.endswith(full) == (limit == 5)
    # The text may end before the context does.
    sample = SampleConfig(stop_ids=tuple(range(TOKENIZER.vocab_size)))
    shown = sample_short(capsys, 60 * "a", sample=sample)
    assert shown.out == 60 * "a" + "\n" and "stopped" not in shown.err
    assert len(sample_short(capsys, 63 * "a").out) >= 64


def without_color(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.slow
def test_json_and_colors_show_what_is_streamed(capsys):
    sample = SampleConfig(temperature=0.9, max_new_tokens=12)
    options = {"sample": sample, "num_samples": 2, "seed": 4}
    plain = sample_short(capsys, "é<a>", **options).out
    texts = [part.split("\n", 1)[1] for part in plain.split("--- sample ")[1:]]
    texts = [text.removesuffix("\n") for text in texts]

    lines = sample_short(capsys, "é<a>", json=True, top_logprobs=3, **options).out
    found = [json.loads(line) for line in lines.splitlines()]
    assert [line["prompt"] + line["text"] for line in found] == texts
    for line in found:
        assert TOKENIZER.decode(line["tokens"]) == line["text"]
        assert line["ended"] == "length" and len(line["logprobs"]) == 12
        assert np.shape(line["top_logprobs"]) == np.shape(line["top_tokens"]) == (12, 3)
        for token, logprob, top, values in zip(
            *(line["tokens"], line["logprobs"], line["top_tokens"]),
            line["top_logprobs"],
            strict=True,
        ):
            assert values == sorted(values, reverse=True) and max(values) < 0
            assert token not in top or values[top.index(token)] == logprob

    shown = sample_short(capsys, "é<a>", show_probs=True, **options).out
    legend, *rest = shown.splitlines(keepends=True)
    assert without_color(legend).split("  ")[0] == "60% or more"
    bodies = without_color("".join(rest)).split("--- sample ")[1:]
    assert bodies == [printable(f"{i}\n{t}\n") for i, t in enumerate(texts, start=1)]
    assert len(set(re.findall(r"\x1b\[38;5;(\d+)m", "".join(rest)))) > 1


@pytest.mark.slow
def test_the_best_of_several(capsys):
    """By the mean log-probability of their tokens."""
    sample, first = SampleConfig(temperature=0.9, max_new_tokens=12), set()
    for seed in range(6):
        options = {"sample": sample, "seed": seed}
        shown = sample_short(capsys, "a", num_samples=2, json=True, **options).out
        lines = [json.loads(line) for line in shown.splitlines()]
        order = np.argsort([-np.mean(line["logprobs"]) for line in lines])
        one, two = (lines[i]["text"] for i in order)
        shown = sample_short(capsys, "a", num_samples=2, best_of=2, **options).out
        assert shown == f"--- sample 1\na{one}\n--- sample 2\na{two}\n"
        assert sample_short(capsys, "a", best_of=2, **options).out == f"a{one}\n"
        first.add(int(order[0]))
    assert first == {0, 1}


def test_beams(capsys):
    model = toy(vocab_size=TOKENIZER.vocab_size, context_length=64)
    call = (model, make_params(model), TOKENIZER, "a")
    sample = SampleConfig(max_new_tokens=6, temperature=0.8)
    chosen = SampleArguments(sample=sample, beams=3, num_samples=2, length_penalty=-1.0)
    write_beams(*call, chosen)
    texts = capsys.readouterr().out.split("--- sample ")[1:]
    write_beams(*call, dataclasses.replace(chosen, json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert texts == [f"{i + 1}\na{line['text']}\n" for i, line in enumerate(lines)]
    settings = {"num_beams": 3, "max_new_tokens": 6, "length_penalty": -1.0}
    prompt, num_tokens = [TOKENIZER.encode_prompt("a")], TOKENIZER.vocab_size
    (beams,) = beam_search(*call[:2], prompt, num_tokens=num_tokens, **settings)
    assert [line["tokens"] for line in lines] == [b.tokens.tolist() for b in beams[:2]]
    scores = [b.score for b in beams[:2]]
    np.testing.assert_allclose([line["score"] for line in lines], scores, atol=1e-6)


@pytest.mark.slow
def test_weights_in_8_bits(tmp_path, capsys):
    model = toy(vocab_size=TOKENIZER.vocab_size, context_length=64, num_layers=1)
    params = make_params(model)
    save(tmp_path / "run", model, params, TOKENIZER)
    flags = ["--prompt", "a", "--max-new-tokens", "12", "--json"]
    assert main(["sample", str(tmp_path / "run"), *flags, "--weights", "int8"]) == 0
    shown = capsys.readouterr().out
    sample = SampleConfig(temperature=0.8, max_new_tokens=12)
    arguments = SampleArguments(prompt="a", sample=sample, json=True)
    with jax.set_mesh(make_mesh_of_size(MeshConfig(data=1))):
        params = jax.device_put(params, P())
        rounded = quantize_matrices(params, "int8")
        for own, is_same in ((rounded, True), (params, False)):
            write_samples(model, own, TOKENIZER, "a", arguments)
            assert (capsys.readouterr().out == shown) == is_same


@pytest.mark.slow
def test_a_stop_string_is_cut_off_every_form_of_the_text(capsys):
    """The text of a seed, up to where two of its characters stand."""
    sample = SampleConfig(max_new_tokens=20)
    whole = sample_short(capsys, "a", sample=sample).out.removesuffix("\n")
    # Characters that are bytes of the text: what is not UTF-8 is shown as U+FFFD.
    stop = re.search(r"[!-~]{2}", whole[4:])[0]
    at = whole.find(stop)
    sample = SampleConfig(max_new_tokens=20, stop_strings=("??", stop))
    assert sample_short(capsys, "a", sample=sample).out == whole[:at] + "\n"
    shown = sample_short(capsys, "a", sample=sample, show_probs=True).out
    assert without_color(shown).split("\n", 1)[1] == printable(whole[:at] + "\n")
    (line,) = sample_short(capsys, "a", sample=sample, json=True).out.splitlines()
    found = json.loads(line)
    assert (found["text"], found["ended"]) == (whole[1:at], "stop")
    assert TOKENIZER.decode(found["tokens"]).endswith(stop)


def test_a_prompt_comes_from_a_file_or_from_stdin(tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    texts = {b"two\n\n": "two\n", b"a\r\n": "a", b"": "", b"\xef\xbb\xbfa": "a"}
    for data, text in texts.items():
        path.write_bytes(data)
        assert read_prompt(SampleArguments(prompt_file=path)) == text
        stdin = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr("sys.stdin", stdin)
        assert read_prompt(SampleArguments(prompt_file=Path("-"))) == text
    monkeypatch.setattr("jaxlm.commands.sample._MAX_PROMPT_BYTES", 3)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"four")))
    with pytest.raises(ValueError, match="--prompt-file stdin: it has more than 3 by"):
        read_prompt(SampleArguments(prompt_file=Path("-")))
    assert read_prompt(SampleArguments()) == "\n"
    assert read_prompt(SampleArguments(prompt="")) == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: No such file or dir"),
        (
            ["--prompt-file", "/dev/zero"],
            "--prompt-file /dev/zero: it has more than 67",
        ),
        (["--prompt-file", "."], "--prompt-file .: Is a directory"),
        (["--prompt-file", "latin.txt"], "--prompt-file latin.txt is not UTF-8 at by"),
        (["--prompt", "a", "--prompt-file", "b"], "give --prompt or --prompt-file, no"),
        (["--json", "--show-probs"], "give --json or --show-probs, not both"),
        (["--top-logprobs", "3"], "--top-logprobs is 3: it must be 0 or more, and ne"),
        (["--show-probs"], "--show-probs colors a terminal: take --json for a file"),
        (["--best-of", "2", "--beams", "2"], "give --best-of or --beams, not both"),
        (["--beams", "2", "--num-samples", "3"], "--beams is 2: it must be at least -"),
        (["--beams", "2", "--regex", "a"], "--beams searches without --regex: leave "),
        (["--beams", "2", "--forbidden-ids", "3"], "--beams searches without --forb"),
        (["--beams", "2", "--top-k", "3"], "--beams searches without --top-k: leave"),
        (["--min-p", "2"], "--min-p is 2.0: it must be in [0, 1]"),
        (["--typical-p", "0"], "--typical-p is 0.0: it must be in (0, 1]"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0: it must be > 0"),
        (["--bias-ids", "3"], "--bias-ids has 1 ids and --biases 0 numbers: give one"),
        (["--stop-strings", ""], "--stop-strings has an empty text: leave it out"),
    ],
)
def test_wrong_flags_give_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match="2"):
        main(["sample", *flags])
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_without_a_run_the_way_to_one_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["sample"])
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: no run with a checkpoint below runs/")
    assert "python train.py" in err and err.count("\n") == 1
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        main(["sample"])
    _, err = capsys.readouterr()
    assert err.startswith("error: runs/a has no checkpoint yet: a run saves its first")


def test_the_run_that_it_takes_is_told(home, monkeypatch, capsys):
    monkeypatch.chdir(home[0])
    told = "sampling from runs/tiny, the newest run\n"
    open_model(SampleArguments())
    assert capsys.readouterr().err == told
    open_model(SampleArguments(run="runs/tiny"))
    assert told not in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_a_stream(home, repository):
    folder, _, _ = home
    child = start(
        *(folder, repository, "runs/tiny", "--prompt", "a"),
        *("--max-new-tokens", str(CONTEXT - 1)),
    )
    try:
        first = child.stdout.read(20)  # the text is streamed
        assert first.startswith(b"a") and child.poll() is None
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
        assert child.returncode == 130, err
        assert out.endswith(b"\n") and b"Traceback" not in err
        # Each token is a character: most of them were not sampled.
        assert len((first + out).decode()) < CONTEXT // 2
    finally:
        child.kill()


@pytest.mark.slow
def test_ctrl_c_before_the_text_leaves_no_traceback(home, repository):
    arguments = ["runs/tiny", "--max-new-tokens", str(CONTEXT - 1)]
    waits = home[0] / "waits"
    with Terminal(
        [sys.executable, "-c", TELLS + IMPATIENT, *arguments],
        cwd=home[0],
        environment={"PYTHONPATH": str(repository)},
    ) as terminal:
        terminal.wait_for("compiling and reading the prompt")
        # Only here is the line drawn in the moment in which the wait begins.
        while not waits.exists():
            time.sleep(0.01)
        terminal.send(CTRL_C)
        assert terminal.wait() == 130
        shown = "\n".join(terminal.lines())
        assert "Traceback" not in shown and "compiling" not in shown


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_program_without_a_word(home, repository):
    child = start(
        home[0], repository, "runs/tiny", "--max-new-tokens", str(CONTEXT // 2)
    )
    with child:
        assert child.stdout.read(5)
        child.stdout.close()
        err = child.stderr.read().decode()
    assert child.returncode == 141, err
    # Only what it waited for.
    assert [line for line in err.splitlines() if " ..." not in line] == []


def test_an_interrupt_is_raised_before_the_text_and_ends_it_after_that():
    """It may be dropped by Python where it is raised."""
    before = signal.getsignal(signal.SIGINT)
    with Printer(TOKENIZER, "", 1) as printer:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert printer.feed(*A)
    with Printer(TOKENIZER, "", 1) as printer:
        assert not printer.feed(*A)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as by a terminal and a shell
        assert printer.feed(*A)
        printer._interrupts._noted_at -= 1
        with pytest.raises(KeyboardInterrupt):  # Nobody may read what is printed.
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "flags, number, code",
    [
        (["--json"], signal.SIGINT, 130),
        (["--best-of", "3"], signal.SIGTERM, 143),
        ([], signal.SIGHUP, 129),
    ],
)
def test_a_signal_shows_what_there_is_of_all_samples(
    home, monkeypatch, capsys, flags, number, code
):
    feed = Printer.feed

    def interrupted(printer, *tokens):
        printer._interrupts.are_raised = False
        signal.raise_signal(number)
        return feed(printer, *tokens)

    monkeypatch.setattr(Printer, "feed", interrupted)
    monkeypatch.chdir(home[0])
    command = ["sample", "runs/tiny", "--prompt", "a", "--num-samples", "2", *flags]
    try:
        ended = main(command)
    except SystemExit as end:
        ended = end.code
    assert ended == code
    out = capsys.readouterr().out
    if flags == ["--json"]:
        rows = [json.loads(line) for line in out.splitlines()]
        assert [len(row["tokens"]) for row in rows] == [1, 1]
        assert [row["ended"] for row in rows] == 2 * ["interrupted"]
    else:
        assert "--- sample 1\na" in out and "--- sample 2\na" in out


@pytest.mark.parametrize("num_samples, header", [(1, ""), (2, "--- sample 1\n")])
def test_the_prompt_comes_with_the_first_tokens(num_samples, header, capsys):
    tokens, inside = (np.repeat(x, num_samples, axis=0) for x in A)
    with Printer(TOKENIZER, "prompt ", num_samples) as printer:
        assert capsys.readouterr().out == ""
        printer.feed(tokens, inside)
        assert capsys.readouterr().out == f"{header}prompt a"
        printer.feed(tokens, inside)
        assert capsys.readouterr().out == "a"
    rest = "--- sample 2\nprompt aa\n" if num_samples == 2 else ""
    assert capsys.readouterr().out == f"\n{rest}"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_terminal_gets_no_control_characters(on_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    with Printer(TOKENIZER, "", 2) as printer:
        printer.feed(np.full((2, 1), 27), np.ones((2, 1), bool))
    assert ("\x1b" in capsys.readouterr().out) != on_terminal


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_text_that_was_begun_ends_its_line(begun, stop, capsys):
    with pytest.raises(stop), Printer(TOKENIZER, "prompt ", 2) as printer:
        if begun:
            printer.feed(*(np.repeat(x, 2, axis=0) for x in A))
        raise stop
    shown = "--- sample 1\nprompt a\n" if begun else ""
    if begun and stop is ValueError:  # A second Ctrl-C has no patience for the others.
        shown += "--- sample 2\nprompt a\n"
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_a_grammar_from_a_flag(tmp_path, capsys):
    model = toy(vocab_size=TOKENIZER.vocab_size, context_length=96)
    params = make_params(model, std=0.5)
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    for flags, shown in (
        ({"regex": "[ab]{3}"}, r">[ab]{3}\n"),
        ({"json_schema": file}, r'>\{("a": ?-?\d+)?\}\n'),
    ):
        chosen = SampleArguments(sample=SampleConfig(max_new_tokens=12), **flags)
        write_samples(model, params, TOKENIZER, ">", chosen)
        assert re.fullmatch(shown, capsys.readouterr().out)
    file.write_text('{"type": "objekt"}')
    for flags, message in (
        ({"regex": "("}, "--regex: the pattern is wrong: missing )"),
        ({"json_schema": file}, r"schema.json: \$.type: there is no type \"objekt\""),
        ({"json_schema": tmp_path / "none"}, "none: No such file"),
    ):
        message = message.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=message):
            write_samples(
                *(model, params, TOKENIZER, ">", SampleArguments(**flags)),
            )
    with pytest.raises(ValueError, match="--regex or --json-schema, not both"):
        SampleArguments(regex="a", json_schema=file)


def test_speculate_is_lookup_or_a_model(tmp_path):
    assert read_proposer("lookup", None, TOKENIZER) == PromptLookup()
    assert read_proposer(None, None, TOKENIZER) is None
    with pytest.raises(ValueError, match=r"^--speculate: .*; or take lookup$"):
        read_proposer(str(tmp_path / "none"), None, TOKENIZER)
