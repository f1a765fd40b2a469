"""Fuzzers of the files that a run reads back, of flags, and of config files."""

import json
import os
from pathlib import Path

from checkpoint_case import CONFIG
from fuzz_case import (
    SCALARS,
    VALUES,
    WORDS,
    changed,
    damaged,
    json_files,
    read_one_file,
)
from hypothesis import strategies as st

from jaxlm.chat import transcript
from jaxlm.fields import to_dict
from jaxlm.flags.arguments import ARGUMENTS, read_arguments
from jaxlm.flags.config_file import RunArguments, read_config
from jaxlm.flags.flag_table import flags_of
from jaxlm.ops.attention.dense import DenseSettings
from jaxlm.ops.attention.tuning.tuning_cache import measured, settings_file
from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report
from jaxlm.train.metrics import FILE_NAME, MetricsWriter, read_metrics
from jaxlm.train.run_log import Goodput

# The log of a run.


def _rows(folder):
    values = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0}
    values |= {"mfu": None, "data_wait_s": 0.0, "step_s": 0.1, "tokens": 9, "wall_s": 1}
    values["time_s"] = {"steps": 1.0, "lost": 0.0}
    with MetricsWriter(folder) as log:
        for step in range(1, 5):
            log.write("train", step, **values)
        log.write("eval", 4, loss=2.0, bits_per_byte=1.0, targets=9)
        log.write("sample", 4, text="x\n", prompt="y")
        log.write("event", 4, event="resume")
    return (folder / FILE_NAME).read_bytes()


_VALUES_OF_ROWS = VALUES | st.sampled_from(["nan", "inf", "train", "eval"])


def _lines(good):
    """Strategy: lines without checksums, as of earlier versions, some of them changed."""
    rows = []
    for line in good.splitlines():
        row = json.loads(line)
        del row["crc32"]
        rows.append(row)
    row = st.sampled_from(rows).flatmap(
        lambda r: st.just(r) | changed(r, _VALUES_OF_ROWS)
    )
    lines = row.map(lambda r: json.dumps(r).encode())
    return st.lists(lines, max_size=6).map(b"\n".join)


def metrics(folder):
    """A resumed run reads any log, and goes on with it."""
    good = _rows(folder)
    path = folder / FILE_NAME

    def read(content):
        path.write_bytes(content)
        with MetricsWriter(folder, resume_step=3) as log:
            assert log.lost_rows == 0
            Goodput(log.last_train, log.last_before)
        read_metrics(folder)  # what was kept
        path.write_bytes(content)
        read_metrics(folder)

    return damaged(good) | _lines(good), read


def reports(folder):
    """A report of a damaged log and config."""
    good, config = _rows(folder), to_dict(CONFIG)

    def read(value):
        rows, content = value
        (folder / FILE_NAME).write_bytes(rows)
        (folder / "config.json").write_bytes(content)
        write_report(load_runs([folder]), folder / "report.html")

    lines = _lines(good) | damaged(good)
    return st.tuples(lines, json_files(config)), read


def transcripts(folder):
    messages = [
        {"role": "user", "content": "hi é"},
        {"role": "assistant", "content": ""},
    ]
    return json_files(messages), read_one_file(folder / "a.json", transcript.load)


def tuning_cache(folder):
    os.environ["XDG_CACHE_HOME"] = str(folder)
    path = settings_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"dense, cpu, 8, float32": {"block": 128}, "xla": {"block": 64}}

    def read(path):
        measured("dense, cpu, 8, float32", DenseSettings())

    return json_files(values), read_one_file(path, read)


# Command lines.

_TEXTS = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "1e999", "nan", "None", "True", "4" * 5000, "1_0"]
    ),
    st.sampled_from(["--", "-", "---", "=", "@x", "a=b", "1.5", "١", "0x10", " 3 "]),
    st.sampled_from(WORDS),
    st.integers(-9, 1 << 70).map(str),
    st.text(max_size=8),
)


def _command_lines():
    def words(kind):
        flags = flags_of(ARGUMENTS[kind])
        names = [n for f in flags for n in (f.name, f.off) if n and n.startswith("--")]
        # Not those that open a checkpoint, which has fuzzers of its own.
        names = [n for n in names if n not in ("--init-from", "--help")]
        name = st.sampled_from(names)
        typed = st.one_of(
            st.tuples(name, _TEXTS).map("=".join),
            st.tuples(name, _TEXTS),
            name,
            _TEXTS,
            st.tuples(name, st.integers(2, 30)).map(lambda x: x[0][: x[1]]),
            name.map(lambda n: n.replace("-", "_")),
        )
        flat = st.lists(typed, max_size=5).map(
            lambda words: [w for x in words for w in ([x] if isinstance(x, str) else x)]
        )
        return st.tuples(st.just(kind), flat)

    return st.sampled_from(sorted(ARGUMENTS)).flatmap(words)


def command_lines(folder):
    def read(value):
        verb, words = value
        if {"--help", "-h"} & set(words) or any("init" in word for word in words):
            return
        read_arguments(verb, words, "jaxlm")

    return _command_lines(), read


_SOURCE = '''
"""A run."""
from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

inf = nan = float("inf")

def get_config():
    return Config({})
'''


def config_files(folder):
    """Python files: whoever runs one trusts it, but mistakes in it are explained."""
    sections = {"model": "ModelConfig", "data": "DataConfig", "train": "TrainConfig",
                "optimizer": "OptimizerConfig"}  # fmt: skip
    flags = [f for f in flags_of(RunArguments) if f.section in sections]

    def source(parts):
        fields = {}
        for flag, value in parts:
            name = flag.path.rpartition(".")[2]
            fields.setdefault(flag.section, {})[name] = repr(value)
        text = ", ".join(
            f"{section}={sections[section]}({', '.join(f'{k}={v}' for k, v in x.items())})"
            for section, x in fields.items()
        )
        return _SOURCE.format(text).encode("utf-8", "surrogatepass")

    parts = st.tuples(st.sampled_from(flags), VALUES | SCALARS)
    good = Path(read_config.__defaults__[0]).read_bytes()
    texts = st.one_of(
        st.lists(parts, min_size=1, max_size=3).map(source),
        damaged(good),
        st.binary(max_size=30).map(lambda b: good + b"\n" + b),
    )
    return texts, read_one_file(folder / "a.py", lambda path: read_config([str(path)]))


FUZZERS = {
    "metrics.jsonl": (metrics, 50),
    "report": (reports, 30),
    "conversation": (transcripts, 50),
    "tuning cache": (tuning_cache, 50),
    "command line": (command_lines, 30),
    "config file": (config_files, 60),
}
