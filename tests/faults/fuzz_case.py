"""Fuzzes one parser after another, in a child process with limits of time and memory.

A fuzzer makes values at random, mostly files that were good and are changed a little.
A parser may read them, or raise a ValueError of one line. Anything else is a failure:
other exceptions and warnings, more than two seconds of CPU time or 512 MB for a value,
and the death of the process.
"""

import copy
import faulthandler
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

MAX_SECONDS = 2
MAX_BYTES = 512 << 20
MODULES = (
    "weight_fuzzers_case",
    "tokenizer_fuzzers_case",
    "text_fuzzers_case",
    "run_fuzzers_case",
)
"""Each has `FUZZERS`: name -> (function, number of examples in the quick suite). The
function takes an empty folder, and returns a strategy and what reads its values."""

# Strategies.

HUGE = 10**400
"""An integer that no float can hold."""
WORDS = ["", "x", "a" * 300, "\x1b[31m\n", "\ud800", "\0", "é", "..", "/etc/passwd"]
SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-300, 1e308]),
    st.sampled_from([1 << 24, 1 << 31, 1 << 63, 1 << 64, HUGE, float("inf")]),
    st.just(float("nan")),
    st.sampled_from(WORDS),
    st.floats(),
    st.integers(-10, 1 << 70),
    st.text(max_size=8),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=2),
    st.sampled_from([[], {}, [[]], [{}], {"a": {"a": []}}, ["a", 1.0]]),
)

_NUMBERS = [
    0,
    1,
    2,
    3,
    31,
    32,
    33,
    255,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 63,
    (1 << 64) - 1,
]
_OFFSETS = st.integers(0, 9999)
_EDITS = st.one_of(
    st.tuples(st.just("bytes"), _OFFSETS, st.binary(min_size=1, max_size=8)),
    st.tuples(
        st.just("bytes"),
        _OFFSETS,
        st.sampled_from(_NUMBERS).map(lambda n: n.to_bytes(8, "little")),
    ),
    st.tuples(st.just("insert"), _OFFSETS, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), _OFFSETS, st.integers(1, 40)),
    st.tuples(st.just("copy"), _OFFSETS, _OFFSETS),
    st.tuples(st.just("flip"), _OFFSETS, st.integers(0, 7)),
    st.tuples(st.just("cut"), _OFFSETS, st.none()),
)


def damaged(content):
    """Strategy: bytes with a few of them changed, most of them near the start."""
    return st.lists(_EDITS, min_size=1, max_size=6).map(
        lambda edits: _damage(content, edits)
    )


def _damage(content, edits):
    content = bytearray(content)
    for kind, where, what in edits:
        at = where * where // 9999 * len(content) // 9999
        if kind == "bytes":
            content[at : at + len(what)] = what
        elif kind == "insert":
            content[at:at] = what
        elif kind == "delete":
            del content[at : at + what]
        elif kind == "copy":
            start = what * len(content) // 9999
            content[at : at + 30] = content[start : start + 30]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << what
        elif kind == "cut" and where % 3 == 0:
            del content[at:]
    return bytes(content)


def changed(values, replacements=VALUES):
    """Strategy: JSON values with up to three of those inside removed or replaced,
    by others or by each other."""
    places = [path for path in _places(values) if path]
    others = st.sampled_from(places).map(lambda path: _inside(values, path))
    edits = st.tuples(st.sampled_from(places), st.booleans(), replacements | others)
    return st.lists(edits, min_size=1, max_size=3).map(lambda e: _edit(values, e))


def _places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        is_dict = isinstance(value, dict)
        items = list(value.items() if is_dict else enumerate(value))
        for key, inner in items[: 40 if is_dict else 6]:
            yield from _places(inner, (*path, key))


def _inside(value, path):
    for key in path:
        value = value[key]
    return value


def _edit(values, edits):
    values = copy.deepcopy(values)
    for path, removes, new in edits:
        try:
            holder = _inside(values, path[:-1])
            if removes and new is None:
                del holder[path[-1]]
            else:
                with np.errstate(over="ignore"):  # of an array that this is put into
                    holder[path[-1]] = copy.deepcopy(new)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            continue  # an earlier edit took it away, or left what cannot hold this
    return values


def as_json(value):
    """Bytes of a JSON file, with raw characters; lone surrogates are not UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def json_files(values, replacements=VALUES):
    """Strategy: bytes of a JSON file whose values, or whose text, are damaged."""
    return st.one_of(
        changed(values, replacements).map(as_json),
        changed(values, replacements).map(lambda v: json.dumps(v).encode()),
        damaged(as_json(values)),
        st.sampled_from([b"", b"null", b"[]", b"{}", b"\xef\xbb\xbf{}", b"1" * 5000]),
        st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b'"' + b"x" * 100_000]),
    )


def read_one_file(path, read):
    """What writes a file, and reads it."""

    def read_value(content):
        path.write_bytes(content)
        return read(path)

    return read_value


# In the child process.


def fuzzers():
    return {
        n: f for m in MODULES for n, f in importlib.import_module(m).FUZZERS.items()
    }


class Attempts:
    """Reads values within the limits, and counts them."""

    def __init__(self, read, last):
        self.read, self.last = read, last
        self.count = self.refused = 0
        self.slowest = 0.0

    def __call__(self, value):
        self.count += 1
        self.last.write_bytes(repr(value).encode("utf-8", "replace")[:1_000_000])
        allow_memory(MAX_BYTES)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            self.read(value)
        except ValueError as error:
            self.refused += 1
            check_message(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.slowest = max(self.slowest, time.process_time() - start)


def check_message(error):
    message = str(error)
    own = type(error) is ValueError or type(error).__module__.startswith("jaxlm.")
    if not (own and message and message.isprintable() and len(message) < 1000):
        raise AssertionError(
            f"not one line of a ValueError: {message[:2000]!r}"
        ) from error


def allow_memory(more):
    """Allows this process so many bytes more than it has now; None: any number."""
    if sys.platform != "linux":
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = resource.RLIM_INFINITY if more is None else now + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def fuzz(job, work):
    """Runs one fuzzer, for a number of examples or for some minutes."""
    make, examples = fuzzers()[job["name"]]
    (work / job["name"]).mkdir()
    strategy, read = make(work / job["name"])
    attempts = Attempts(read, work / "last")
    end = time.monotonic() + 60 * job["minutes"]

    def rounds():
        if not job["minutes"]:
            yield None
        first = time.time_ns() % 10**9
        while job["minutes"] and time.monotonic() < end:
            yield first
            first += 1

    failure = None
    for number in rounds():

        @settings(
            max_examples=500 if job["minutes"] else examples,
            deadline=None,
            derandomize=number is None,  # a new example must not fail another change
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(strategy)
        def test(value):
            attempts(value)

        try:
            (test if number is None else seed(number)(test))()
        except Exception:
            lines = [line[:500] for line in traceback.format_exc().splitlines()]
            failure = "\n".join([*lines[-40:], f"seed {number}"])
            break
    allow_memory(None)
    return {
        "count": attempts.count,
        "refused": attempts.refused,
        "slowest": attempts.slowest,
        "failure": failure,
    }


def main():
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp

    # JAX's threads, of which each core has several, take no addresses of a value's.
    jnp.arange(3).block_until_ready()
    tests = Path(__file__).parents[1]
    sys.path += sorted({str(p.parent) for p in tests.glob("**/*_case.py")})
    work = Path(sys.argv[1])
    set_hypothesis_home_dir(work / "hypothesis")
    # Where a parser hangs, Python's stack is printed, and the process ends.
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    warnings.simplefilter("error")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a parser prints is no answer
    for line in sys.stdin:
        print(json.dumps(fuzz(json.loads(line), work)), file=answers, flush=True)


# In the tests.


class FuzzProcess:
    """A child process that runs fuzzers; started again when it dies."""

    def __init__(self):
        self._child = None

    def _start(self):
        self._work = tempfile.TemporaryDirectory(prefix="jaxlm-fuzz-")
        self._folder = Path(self._work.name)
        with open(self._folder / "stderr", "wb") as errors:
            self._child = subprocess.Popen(
                [sys.executable, __file__, self._work.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # An arena of malloc for each thread takes 64 MB of addresses.
                env={**os.environ, "MALLOC_ARENA_MAX": "1",
                     "ARROW_DEFAULT_MEMORY_POOL": "system"},
            )  # fmt: skip

    def run(self, name, minutes=0.0):
        """Runs a fuzzer; returns its counts, and its failure or None."""
        if self._child is None:
            self._start()
        self._child.stdin.write(json.dumps({"name": name, "minutes": minutes}) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        code = None if answer else self._child.wait()
        said = (self._folder / "stderr").read_text(errors="replace")
        if answer:
            found = json.loads(answer)
            # A panic of Rust, although caught, writes to a user's terminal.
            _, panicked, what = said.partition(" panicked at ")
            found["failure"] = found["failure"] or (panicked and panicked + what[:3000])
            return found
        last = self._folder / "last"
        value = last.read_text(errors="replace")[:3000] if last.is_file() else ""
        self.close()
        return {"count": 0, "refused": 0, "slowest": 0.0,
                "failure": f"{said[-3000:]}\nended with {code}, reading {value}"}  # fmt: skip

    def close(self):
        if self._child is not None:
            self._child.stdin.close()
            self._child.stdout.close()
            self._child.wait()
            self._work.cleanup()
            self._child = None


if __name__ == "__main__":
    # The modules of the fuzzers import this one.
    sys.modules["fuzz_case"] = sys.modules["__main__"]
    main()
