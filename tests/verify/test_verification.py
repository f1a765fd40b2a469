"""`jaxlm verify` against an independent NumPy implementation, and on damaged models."""

import dataclasses
import errno
import json
import os
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_case import nested, weights

from jaxlm import load, tree
from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.cli import main
from jaxlm.config import Config, DataConfig, RopeScaling
from jaxlm.model.presets import preset, toy
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.verify import comparing, peer
from jaxlm.verify import verification as verify_module
from jaxlm.verify.check import Check, table
from jaxlm.verify.expected import TextIds, from_json, observe
from jaxlm.verify.find_reference import Reference
from jaxlm.verify.hard_texts import HARD_TEXTS, check_ids, check_round_trip
from jaxlm.verify.verification import Verification, verify, write_certificate

TOKENIZER = ByteTokenizer()
CONFIG = dataclasses.replace(
    toy(preset("smollm2-135m")), vocab_size=257, dtype="float32"
)


class NumpyLlama:
    """A Llama in float64, written from the formulas of the papers, not from jaxlm."""

    name = "numpy 1"

    def __init__(self, config, flat):
        self.config = config
        self.flat = {k: v.astype(np.float64) for k, v in flat.items()}

    def run(self, tokens):
        x = self.flat["embed/table"][tokens]
        stages = [x]
        for i in range(self.config.num_layers):
            w = {
                k.removeprefix("layers/"): v[i]
                for k, v in self.flat.items()
                if k.startswith("layers/")
            }
            x = x + self.attention(w, self.norm(x, w["attn_norm/scale"]))
            h = self.norm(x, w["mlp_norm/scale"])
            gate = h @ w["mlp/gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp/up"])) @ w["mlp/down"]
            stages.append(x)
        x = self.norm(x, self.flat["final_norm/scale"])
        logits = x @ self.flat["embed/table"].T
        return logits.astype(np.float32), np.stack(stages).astype(np.float32)

    def norm(self, x, scale):
        mean = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.config.norm_epsilon) * scale

    def rotate(self, x):
        half = x.shape[-1] // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(self, w, x):
        out = 0
        heads = self.config.num_heads // self.config.num_kv_heads
        q = self.rotate(np.einsum("td,dnh->tnh", x, w["attn/q"]))
        k = self.rotate(np.einsum("td,dnh->tnh", x, w["attn/k"]))
        v = np.einsum("td,dnh->tnh", x, w["attn/v"])
        for n in range(self.config.num_heads):
            scores = q[:, n] @ k[:, n // heads].T / np.sqrt(self.config.head_dim)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out = out + p @ v[:, n // heads] @ w["attn/o"][n]
        return out


@pytest.fixture(scope="module")
def flat():
    return weights(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    text = verify_module._text(CONFIG, TOKENIZER, 96)[0]
    assert bytes(text[:13].tolist()) == b"THE TRAGEDY O"
    return text


@pytest.fixture(scope="module")
def expected(flat, tokens):
    texts = tuple(TextIds(t, tuple(t.encode()), t) for t in HARD_TEXTS)
    return observe(
        *(NumpyLlama(CONFIG, flat), tokens, 32, 24),
        how="read nothing",
        versions={"numpy": "1"},
        texts=texts,
        first_ids=(),
        texts_how="is UTF-8",
    )


@pytest.fixture(scope="module")
def kept(expected, tmp_path_factory):
    """A certificate of another copy of the model."""
    file = tmp_path_factory.mktemp("kept") / "certificate.json"
    content = {"format": 1, "fingerprint": "0" * 64, "passed": True, "summary": ""}
    file.write_text(json.dumps({**content, "reference": expected.to_json()}))
    return file


@pytest.fixture(autouse=True)
def as_without_transformers(monkeypatch):
    monkeypatch.setattr(peer, "installed", lambda *names: False)
    # As in `verify`, so that compiled programs are shared.
    with jax.default_matmul_precision("highest"):
        yield


def write(folder, flat, tokenizer=TOKENIZER):
    write_hf(folder, CONFIG, jax.tree.map(jnp.asarray, nested(flat)), tokenizer)
    return folder


@pytest.fixture(scope="module")
def model(flat, tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "m", flat)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def command(*arguments):
    """Returns the exit code of `jaxlm verify`."""
    try:
        return main(["verify", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def rows(folder):
    checks = certificate.read(open_checkpoint(folder))["checks"]
    return {c["name"]: c for c in checks}


def reported(path):
    lines = []
    load(path, report=lines.append)
    return lines


@pytest.mark.slow
def test_equal_models_pass_and_load_reports_it(copy, kept, capsys):
    assert command(copy, "--against", kept) == 0
    out, err = capsys.readouterr()
    assert "24 of 24 alike" in out and out.count("passed") == 9, out
    assert "against numpy 1, which read nothing, on 20" in out
    assert f"its values are kept in {kept} for other bytes than these" in out
    assert "jaxlm: decoding with a cache" in err
    found = rows(copy)
    assert all(c["passed"] for c in found.values())
    assert found["first layer that differs"]["measured"].startswith("none")
    assert 0 < found["logits, largest difference"]["value"] < 3e-5
    assert found["KL divergence, nats"]["value"] < 1e-8
    (line,) = reported(copy)
    assert line.startswith(f"{copy}: verified against numpy 1: logits within ")
    # Its own certificate now has the values, and the next run uses them.
    assert command(copy) == 0
    out, _ = capsys.readouterr()
    assert f"kept in {copy / 'certificate.json'}\n" in out
    assert certificate.read(open_checkpoint(copy))["reference"]["name"] == "numpy 1"


@pytest.mark.slow
def test_without_a_reference_the_table_shows_it(copy, capsys):
    assert command(copy) == 0
    out, _ = capsys.readouterr()
    assert "no independent implementation: torch and transformers are not" in out
    assert "passed, but without an independent implementation" in out
    assert out.count("not checked") == 5
    assert certificate.read(open_checkpoint(copy))["reference"] is None
    # Nothing independent was compared, which is no news at every load.
    assert reported(copy) == []


@pytest.mark.parametrize(
    "passed, reference, words",
    [
        (True, {}, ": verified well"),
        (True, None, None),
        (False, None, ": FAILED verification well"),
    ],
)
def test_load_reports_a_comparison_or_a_failure(copy, passed, reference, words):
    checkpoint = open_checkpoint(copy)
    findings = {"passed": passed, "summary": "well", "reference": reference}
    certificate.write(checkpoint, findings)
    line = certificate.summary(checkpoint)
    assert line == (words and f"{copy}{words}")


def test_the_table_fits_80_columns():
    names = [getattr(comparing, name) for name in ("FIRST_LAYER", "LARGEST", "GREEDY")]
    long = "24 of 24 texts come back, 12 have characters that it lacks"
    names += [comparing.DECODING, comparing.BATCH, "tokenizer, round trip"]
    note = (
        "prompts of 1, 3, 24, 47, 496 tokens, where two likeliest tokens differ a bit"
    )
    checks = [
        Check(n, long, "all, or a tie", p, note)
        for n, p in zip(names, 3 * [True, None], strict=True)
    ]
    lines = table(checks).splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    assert shown.count(f"(12 have characters that it lacks; {note})") == 6


def damaged(flat, name, change):
    x = flat[name].copy()
    change(x)
    return {**flat, name: x}


def roll_head(x):
    x[1, :, 2] = np.roll(x[1, :, 2], 1, axis=-1)


def scale(i):
    def change(x):
        x[i] *= 1.02

    return change


DAMAGE = [
    ("layers/attn/q", roll_head, "layer 1"),
    ("layers/attn/v", lambda x: np.negative(x[0, :, 1], out=x[0, :, 1]), "layer 0"),
    ("layers/mlp_norm/scale", scale((0, 5)), "layer 0"),
    ("layers/attn_norm/scale", scale((1, 7)), "layer 1"),
    ("embed/table", scale(...), "the embeddings"),
    ("final_norm/scale", scale(11), "none"),
]


@pytest.mark.parametrize("name, change, where", DAMAGE)
def test_damaged_weights_fail_with_the_right_layer(
    name, change, where, flat, expected, tokens
):
    params = jax.tree.map(jnp.asarray, nested(damaged(flat, name, change)))
    ours = comparing.full_pass(CONFIG, params, tokens)
    for reference in (expected, expected.sample()):
        layers, logits, _ = comparing.compare_with(reference, CONFIG, ours)
        assert layers.measured.startswith(where)
        assert layers.passed is (where == "none")
        assert not logits.passed


@pytest.mark.slow
def test_a_damaged_folder_ends_with_1(flat, kept, tmp_path, capsys):
    folder = write(tmp_path / "bad", damaged(flat, *DAMAGE[0][:2]))
    assert command(folder, "--against", kept) == 1
    out, _ = capsys.readouterr()
    assert "layer 1 (" in out and "FAILED, " in out
    assert rows(folder)["first layer that differs"]["passed"] is False
    (line,) = reported(folder)
    assert line.startswith(f"{folder}: FAILED verification against numpy 1: past the")


def test_weights_that_are_not_finite_fail(flat, tmp_path, capsys):
    def change(x):
        x[0, 0] = np.nan

    folder = write(tmp_path / "nan", damaged(flat, "layers/mlp/up", change))
    assert command(folder) == 1
    assert "all numbers are finite" in capsys.readouterr().out


@pytest.mark.slow
def test_a_certificate_is_bound_to_the_bytes(copy, model, flat, kept, tmp_path, capsys):
    assert command(copy, "--against", kept) == 0
    # Another modification time, but the same bytes.
    os.utime(copy / "model.safetensors", (0, 0))
    assert "verified against numpy 1" in reported(copy)[0]
    other = write(tmp_path / "other", damaged(flat, *DAMAGE[2][:2]))
    shutil.copy(other / "model.safetensors", copy)
    (line,) = reported(copy)
    assert line.startswith("warning: ") and "belongs to other weights" in line
    capsys.readouterr()
    assert command(copy) == 0
    out, _ = capsys.readouterr()
    assert "belongs to other weights than these" in out
    assert certificate.read(open_checkpoint(copy))["reference"] is None


@pytest.mark.slow
def test_a_run_and_its_steps(flat, tmp_path):
    config = Config(model=CONFIG, data=DataConfig(sequence_length=64))
    params = jax.tree.map(jnp.asarray, nested(flat))
    with CheckpointManager(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(
                *(step, params, {}),
                config=config,
                tokenizer=TOKENIZER,
                data_fingerprint="",
            )
    step = tmp_path / "checkpoints" / "1"
    for path in (tmp_path, step):
        assert command(path) == 0
        assert certificate.read(open_checkpoint(path))["passed"]
    # Not inside the step, because its manifest does not list it.
    assert (tmp_path / "checkpoints" / "1.certificate.json").is_file()
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink(missing_ok=True)
    for file in (tmp_path / "checkpoints" / "2").glob("*manifest*"):
        file.unlink()
    lines = reported(tmp_path)
    assert any("using step 1" in line for line in lines)
    assert lines[-1].startswith("warning: ")


def test_a_sample_reads_back_exactly(expected):
    sample = expected.sample()
    again = from_json(json.loads(json.dumps(expected.to_json())))
    for f in dataclasses.fields(sample):
        a, b = getattr(sample, f.name), getattr(again, f.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b
    assert sample.sample() is sample


BROKEN = {
    "logits": [[1.0]],
    "rows": [-1],
    "tokens": [10**12],
    "ids": "x",
    "greedy": [300] * 24,
    "places": [[0, 0, 0]],
    "residual": [[float("nan")]],
    "name": "two\nlines",
    "versions": [],
    "texts": 3,
    "first_ids": ["a"],
    "prompt_length": 10_000,
    "model_dim": 48.5,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_certificate_is_one_line(name, kept, tmp_path, capsys):
    content = json.loads(kept.read_text())
    content["reference"][name] = BROKEN[name]
    with pytest.raises(ValueError):
        from_json(content["reference"])
    del content["reference"][name]
    with pytest.raises(ValueError, match=name):
        from_json(content["reference"])


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "[" * 10**5, '{"format": 1}', '{"format": 2}'),
        '{"format": 1, "fingerprint": "", "passed": true, "summary": "\\u001b[31m"}',
        '{"format": 1, "fingerprint": "", "passed": "yes", "summary": ""}',
    ],
)
def test_load_survives_any_certificate(text, copy):
    (copy / "certificate.json").write_text(text)
    (line,) = reported(copy)
    assert line.startswith("warning: ") and line.isprintable()


def test_user_errors_are_one_line(copy, kept, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    content = {"format": 1, "fingerprint": "", "passed": True, "summary": ""}
    empty.write_text(json.dumps({**content, "reference": None}))
    wider = tmp_path / "wider.json"
    reference = {**json.loads(kept.read_text())["reference"], "vocab_size": 300}
    wider.write_text(json.dumps({**content, "reference": reference}))
    for arguments, words in (
        ([tmp_path / "nothing"], "does not exist"),
        ([copy, "--against", tmp_path / "none.json"], "No such file"),
        ([copy, "--against", tmp_path / "none"], "no such folder or file"),
        ([copy, "--against", empty], "no values of an independent implementation"),
        ([copy, "--against", wider], "is of another model"),
        ([copy, "--against", copy], "pip install 'jaxlm[parity]'"),
        ([copy, "--tokens", 0], "--tokens is 0: it must be at least 1"),
        ([copy, "--out", tmp_path / "no" / "c.json"], "is not a folder"),
        ([copy, "--out", tmp_path], "is a folder: give a file, as"),
        ([copy, "--agianst", empty], "did you mean '--against'"),
    ):
        assert command(*arguments) == 2
        out, err = capsys.readouterr()
        assert words in err and not out
        assert err.splitlines()[-1].startswith("error: ")


def test_a_file_that_is_no_certificate_is_not_replaced(copy):
    """Beside a model, where nobody has named it."""
    own = copy / "certificate.json"
    own.write_text('{"school": "..."}')
    verification = Verification(
        *(open_checkpoint(copy, report=lambda _: None), "", ""),
        Reference(None, "none"),
        (),
    )
    line = write_certificate(verification)
    assert line.startswith(f"no certificate: {own}: it is there") and "--out" in line
    assert own.read_text() == '{"school": "..."}'


@pytest.mark.slow
def test_a_certificate_that_cannot_be_written_is_reported(
    copy, kept, tmp_path, capsys, monkeypatch
):
    full = OSError(errno.ENOSPC, "No space left on device", "c.json")
    with monkeypatch.context() as patched:
        patched.setattr(certificate, "replacing", mock.Mock(side_effect=full))
        assert command(copy, "--against", kept, "--out", tmp_path / "c.json") == 0
    out, _ = capsys.readouterr()
    assert "no certificate: " in out and "--out FILE" in out
    assert command(copy, "--against", kept, "--out", tmp_path / "c.json") == 0
    assert json.loads((tmp_path / "c.json").read_text())["passed"] is True


def test_too_little_memory_is_an_error_with_numbers(copy, monkeypatch):
    monkeypatch.setattr(verify_module, "_available_memory", lambda: 10**6)
    with pytest.raises(ValueError, match=r"takes 0.0 GB .* but 0.0 GB of memory are"):
        verify(copy, report=lambda line: None)


def test_a_tie_of_greedy_tokens_passes(expected, flat):
    params = jax.tree.map(jnp.asarray, nested(flat))
    greedy = expected.greedy.copy()
    greedy[20] += 1
    for gap, passed in ((1e-6, True), (1e-2, False)):
        gaps = expected.gaps.copy()
        gaps[20] = gap
        other = dataclasses.replace(expected, greedy=greedy, gaps=gaps)
        check = comparing.compare_greedy(other, CONFIG, params)
        assert check.passed is passed
        assert check.measured == "20 of 24 alike"
        assert ("no tie" in check.note) is not passed


@pytest.mark.slow
def test_decoding_is_compared_with_the_full_pass(flat, tokens):
    params = jax.tree.map(jnp.asarray, nested(flat))
    ours = comparing.full_pass(CONFIG, params, tokens)
    assert comparing.check_decoding(CONFIG, params, tokens, ours).passed
    logits = ours.logits.copy()
    logits[40, 5] += 0.01
    wrong = dataclasses.replace(ours, logits=logits)
    assert not comparing.check_decoding(CONFIG, params, tokens, wrong).passed
    logits[40, 5] = np.nan
    assert not comparing.check_decoding(CONFIG, params, tokens, wrong).passed


def test_a_tie_of_a_router_ends_the_comparison():
    margins = np.full(64, 0.1, np.float32)
    ours = comparing.FullPass(
        np.zeros((64, 2), np.float32), np.zeros((1, 64, 2), np.float32), margins
    )
    at, shares = np.arange(64), np.zeros(64)
    assert comparing._first_tie(shares, at, ours, 1e-4) is None
    shares[30] = 5
    assert comparing._first_tie(shares, at, ours, 1e-4) is None  # nothing explains it
    margins[30] = 1e-6
    assert comparing._first_tie(shares, at, ours, 1e-4) == 30
    shares[3] = np.nan
    margins[3] = 1e-6
    assert comparing._first_tie(shares, at, ours, 1e-4) is None  # too few are left
    # In a sample, the tie may be at a token that it does not contain.
    margins[:] = 0.1
    margins[29] = 1e-6
    shares = np.array([0.0] * 10 + [9.0])
    at = np.array([0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30])
    assert comparing._first_tie(shares, at, ours, 1e-4) == 10


def test_the_steady_length_depends_on_the_scaling():
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context_length=48)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    assert comparing.steady_length(config) == 48
    linear = dataclasses.replace(scaling, kind="linear")
    config = dataclasses.replace(CONFIG, rope_scaling=linear)
    assert comparing.steady_length(config) == CONFIG.context_length


class Broken(ByteTokenizer):
    """Loses carriage returns, as files opened in text mode do."""

    def decode(self, ids):
        return super().decode(ids).replace("\r", "")


def test_tokenizers(expected):
    (check,) = check_round_trip(TOKENIZER, 257)
    assert check.passed and check.measured.startswith(f"{len(HARD_TEXTS)} of ")
    (check,) = check_round_trip(Broken(), 257)
    assert check.passed is False and "come back changed" in check.measured
    (check,) = check_round_trip(TOKENIZER, 200)
    assert check.passed is False and "is not below the model's vocabulary" in check.note
    (check,) = check_round_trip(CharTokenizer("helo, world!H W"), 20)
    assert check.passed and "have characters that it lacks" in check.measured

    (check,) = check_ids(TOKENIZER, expected)
    assert check.passed
    (check,) = check_ids(TOKENIZER, dataclasses.replace(expected, first_ids=(1,)))
    assert (
        check.passed is False
        and "begins a text with [1], but jaxlm with []" in check.note
    )
    texts = (TextIds("ab", (1, 2), "ab"), TextIds("a", (97,), "A"))
    (check,) = check_ids(TOKENIZER, dataclasses.replace(expected, texts=texts))
    assert check.measured == "0 of 2 texts alike" and "ids of 'ab'" in check.note


def test_hard_texts_contain_hard_characters():
    everything = "".join(HARD_TEXTS)
    assert len(set(HARD_TEXTS)) == len(HARD_TEXTS)
    for part in (
        "\0",
        "\r\n",
        "<|im_end|>",
        "\U0001f44d\U0001f3fd",
        "e\u0301",
        " " * 40,
    ):
        assert part in everything


def test_without_a_tokenizer_the_text_is_random_but_fixed():
    ids, what = verify_module._text(CONFIG, None, 50)
    again, _ = verify_module._text(CONFIG, CharTokenizer("ab"), 50)
    assert what == "50 tokens drawn at random" and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, again)
    windowed = dataclasses.replace(
        CONFIG, layer_pattern=("local",), window=64, context_length=128
    )
    _, what = verify_module._text(windowed, TOKENIZER, 50)
    assert "the window of 64 is not reached (--tokens 128)" in what


def test_the_table_shows_numbers_that_json_lacks():
    check = Check("logits", "nan", "1e-4", False, "a note", float("nan"))
    assert check.to_json()["value"] is None
    text = table([check, Check("b", "-", "all", None)])
    assert "FAILED\n  (a note)\n" in text and "not checked" in text


def test_the_independent_implementation_is_one(flat, tokens):
    """The NumPy Llama and jaxlm agree, so both would have to have the same bug."""
    logits, residual = NumpyLlama(CONFIG, flat).run(tokens)
    params = jax.tree.map(jnp.asarray, nested(flat))
    ours = comparing.full_pass(CONFIG, params, tokens)
    assert np.abs(ours.logits - logits).max() < 1e-4 * logits.std()
    assert np.abs(ours.residual - residual).max() < 1e-4 * residual.std()
    assert tree.count(params) == sum(x.size for x in flat.values())
