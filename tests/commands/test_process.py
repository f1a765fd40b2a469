"""The setup of a command's process."""

import logging
import os
import stat
import subprocess
import sys

import jax
import pytest

from jaxlm.checkpoint.opened import print_to_stderr
from jaxlm.commands import process
from jaxlm.commands.process import fail, log_on_stderr, use_compile_cache


def test_the_compile_cache_is_the_users_own(monkeypatch, tmp_path):
    names = ["jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"]
    names.append("jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    folder = tmp_path / "jaxlm" / "xla"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    try:
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_was_chosen_is_said_only_when_asked_for(verbose, capsys):
    logger = logging.getLogger("jaxlm.ops.attention.dispatch")
    before = logging.getLogger("jaxlm").handlers
    with log_on_stderr(verbose):
        logger.info("auto took dense")
        logger.warning("slow")
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == ["auto took dense", "slow"][not verbose :]
    assert logging.getLogger("jaxlm").handlers is before


@pytest.mark.skipif(sys.platform != "linux", reason="options of glibc")
@pytest.mark.parametrize("face", [["train.py"], ["-m", "jaxlm.cli", "train"]])
def test_malloc_is_set_up_before_jax_is_imported(face, repository, tmp_path):
    """The program restarts itself with the same command line."""
    # The interpreter imports this at the start of each process.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; print('start', 'GLIBC_TUNABLES' in os.environ, 'jax' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    paths = os.pathsep.join([str(tmp_path), str(repository)])
    done = subprocess.run(
        [sys.executable, *face, "--train.step", "3"],
        cwd=repository,
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["start False False", "start True False"]
    assert done.returncode == 2 and "did you mean '--train.steps'" in done.stderr


def test_messages_are_one_short_line_without_signs(capsys):
    with pytest.raises(SystemExit):
        fail("a.gguf: key \x1b[31mred\n\u202e" + "x" * 60_000 + ": remove it")
    line = capsys.readouterr().err
    assert line.startswith(r"error: a.gguf: key \x1b[31mred\n\u202exxx")
    assert line.endswith(": remove it\n") and len(line) <= 310
    with log_on_stderr(verbose=False):
        logging.getLogger("jaxlm.any").warning("a\x1b[2Jb")
    print_to_stderr("c\nd")
    assert capsys.readouterr().err == "a\\x1b[2Jb\nc\\nd\n"


def test_who_reads_nothing_stops_nobody(monkeypatch):
    # A pager or tee that is stopped: with the pipe full, SIGTERM was not answered.
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(process._Lossy, "_wait_seconds", 0.01)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as taken, os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "__stderr__", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with process.lossy_output(stdout=False):
            for number in range(10_000):
                print(f"line {number:>20}", file=sys.stderr)
            assert b"line                    0\n" in os.read(reader, 1 << 20)
            print("there is room again", file=sys.stderr)
        stream.close()
        assert b"there is room again\n" in taken.read()
