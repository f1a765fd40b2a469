"""What all tests share: where caches go, which device is used, and slow proofs."""

import gc
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# Set here, before anything imports jax; child processes inherit all of it. Tests write
# nothing outside temporary folders; processes that test beside each other share one, and
# the compiled programs in it.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXLM_TEST_PLATFORM", "cpu")
_CACHE = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="jaxlm-tests-")
    os.environ["XDG_CACHE_HOME"] = os.environ["XDG_STATE_HOME"] = _CACHE.name
    # Most of the time would go into LLVM's work on programs that run once. XLA's own
    # passes are not touched: the optimized HLO, its FLOPs and its memory are those of
    # users.
    flags = "--xla_backend_optimization_level=0"
    flags += " --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    # Processes share small programs too: writing and reading one costs less than LLVM.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{_CACHE.name}/compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Nobody reads which line an operation is from, and compiling without takes less.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# What a shell runs in the background ignores Ctrl-C, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

# JAX keeps millions of objects, which take long to look through.
gc.set_threshold(50_000, 20, 50)

# Test folders are no packages, so that two files may have one name. Modules that
# several files of a folder share are found by name.
sys.path += [str(p.parent) for p in Path(__file__).parent.glob("**/*_case.py")]

import shape_checks_case

shape_checks_case.install()


def pytest_addoption(parser):
    parser.addoption(
        "--run-slow", action="store_true", help="run the slow proofs too (minutes)"
    )


def pytest_collection_modifyitems(config, items):
    missing = set()
    if not (find_spec("torch") and find_spec("transformers")):
        # Their goldens are compared everywhere.
        missing.add("parity")
    if not find_spec("libtpu"):
        missing.add("aot")
    if "nightly" not in config.getoption("markexpr"):
        missing.add("nightly")
    left_out = [i for i in items if any(map(i.get_closest_marker, missing))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if config.getoption("--run-slow"):
        items.sort(key=lambda item: item.get_closest_marker("long") is None)
        return
    skip = pytest.mark.skip(reason="slow: needs --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session):
    # What was imported stays, and need not be looked through again.
    gc.freeze()


def pytest_unconfigure(config):
    if _CACHE:
        _CACHE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def no_lines_about_waits():
    """In this process, however busy the machine is; children begin with their own."""
    from jaxlm.terminal import progress

    progress.WAIT_SECONDS = progress.DELAY_SECONDS = 1000.0


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of train.py and sample.py."""
    return Path(__file__).parents[1]


@pytest.fixture
def compilations():
    """Names of the programs that XLA compiles from here on, as a growing list."""
    from jax import monitoring

    names = []

    def listen(event, _seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    monitoring.register_event_duration_secs_listener(listen)
    yield names
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def shakespeare():
    from jaxlm.data.sources import BUNDLED_FOLDER

    return (BUNDLED_FOLDER / "shakespeare.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def models(shakespeare):
    """A SentencePiece tokenizer of each algorithm, trained on a part of the text."""
    from jaxlm.tokenizers.sentencepiece.trainer import train_sentencepiece

    text = shakespeare[:100_000]
    return {a: train_sentencepiece([text], 500, a) for a in ("bpe", "unigram")}
