"""`jaxlm VERB`: the verbs, what each imports, and exit codes."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import xla_bridge
from marks_case import slow_but

import jaxlm
from jaxlm import cli
from jaxlm.cli import VERBS, main
from jaxlm.commands import doctor

# What several verbs, or one of them, are made of.
SHARED = {
    "__init__",
    "arguments",
    "generation",
    "process",
    "sampled_text",
    "generation_page",
}
COMMANDS = Path(cli.__file__).parent / "commands"


def exit_of(capsys, *arguments):
    """Exit code, stdout and stderr."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_has_a_traceback_only_with_v(verbose, capsys):
    code, _, err = exit_of(capsys, "report", *["-v"] * verbose)
    assert code == 2 and err.endswith(
        "error: RUNS is missing: name at least one run folder\n"
    )
    assert ("Traceback" in err) is verbose


def test_devices_that_are_not_there(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cudda")
    monkeypatch.setattr(xla_bridge, "_backends", {})
    before = jax.config.jax_platforms
    monkeypatch.setattr(jax, "devices", lambda *_: xla_bridge.backends())
    try:
        jax.config.update("jax_platforms", "cudda")
        code, _, err = exit_of(capsys, "doctor")
    finally:
        jax.config.update("jax_platforms", before)
    assert code == 2 and err.count("\n") == 1
    assert "error: JAX finds no device with JAX_PLATFORMS='cudda' (Unable to ini" in err


def test_a_device_without_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda *_: jnp.zeros(1 << 55).sum())
    code, _, err = exit_of(capsys, "doctor")
    assert code == 2 and err.count("\n") == 1
    assert "error: the memory of a device is not enough (RESOURCE_EXHAUSTED: O" in err


def test_v_is_never_the_value_of_another_option(capsys):
    code, _, err = exit_of(capsys, "report", "--out", "-v")
    assert code == 2 and "--out needs a value" in err
    # Joined to its option it is one.
    code, _, err = exit_of(capsys, "report", "/no/such/run", "--out=-v")
    assert code == 2 and "--out -v: the name of a page ends in .html" in err


def test_help_lists_the_verbs(capsys):
    code, out, _ = exit_of(capsys, "--help")
    assert code == 0
    for name, summary in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) < 80
    assert exit_of(capsys)[0] == 2
    for flag in ("-V", "--version"):
        assert exit_of(capsys, flag) == (0, f"jaxlm {version('jaxlm')}\n", "")
    assert jaxlm.__version__ == version("jaxlm")
    code, out, _ = exit_of(capsys, "report", "--help")
    assert code == 0 and "--out" in out


def test_each_verb_is_a_file_that_says_what_it_does():
    files = {file.stem for file in COMMANDS.glob("*.py")}
    assert files - SHARED == set(VERBS)
    for verb, summary in VERBS.items():
        docstring = ast.get_docstring(ast.parse((COMMANDS / f"{verb}.py").read_text()))
        assert docstring.splitlines()[0] == f"{summary}."


def test_the_installed_command():
    jaxlm = Path(sys.executable).with_name("jaxlm")
    done = subprocess.run([jaxlm, "reprot"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'report'" in done.stderr
    assert done.stderr.count("\n") == 1  # one line, no traceback


def test_the_extra_of_the_server_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jaxlm.commands.serve", raising=False)
    with pytest.raises(SystemExit) as error:
        main(["serve", "runs/nothing"])
    assert error.value.code == 2
    assert (
        "needs the extra serve: pip install 'jaxlm[serve]'" in capsys.readouterr().err
    )


def test_a_python_without_the_dependencies_is_told_in_one_line(repository):
    """As after `python train.py` outside of the environment."""
    program = (
        "import sys; sys.path.append(sys.argv[1]); from jaxlm.cli import run, start"
    )
    program += "; start(trains=False); run('sample', [], 'sample.py')"
    # Without site packages.
    command = [sys.executable, "-S", "-c", program, repository]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(r"error: \S+ has no package \w+: activate the env", done.stderr)


def modules_after(program, repository):
    """Names of the modules that a program loads, in a fresh interpreter."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "program",
    [
        "from jaxlm.cli import main; main(['--help'])",
        "from jaxlm.cli import main\ntry: main(['reprot'])\nexcept SystemExit: pass",
        "from jaxlm.cli import main\n"
        "from jaxlm.flags.config_file import read_config\n"
        "try: read_config(['--train.step', '3'])\nexcept ValueError: pass",
        "from jaxlm.cli import main\ntry: main(['sample', '--modl', 'x'])\n"
        "except SystemExit: pass",
        "import jaxlm; jaxlm.Config; jaxlm.__version__",
    ],
)
def test_an_answer_that_needs_no_jax_does_not_wait_for_it(program, repository):
    assert "jax" not in modules_after(program, repository)


# Presses Ctrl-C when a module is about to be imported, or when the program restarts.
PRESS = """
import os, signal, sys

class Press:
    def find_spec(name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press)
if os.environ["AT"] == "the restart" and "GLIBC_TUNABLES" in os.environ:
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    "face, at",
    [
        (["train.py"], "jaxlm.commands.process"),
        (["train.py"], "the restart"),
        (["train.py"], "jax"),
        (["sample.py"], "numpy"),
        (["-m", "jaxlm.cli", "chat"], "jaxlm.infer.conversation.conversation"),
    ],
)
def test_ctrl_c_while_modules_are_imported_ends_quietly(face, at, repository, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PRESS)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    paths = os.pathsep.join([str(tmp_path), str(repository)])
    done = subprocess.run(
        [sys.executable, *face],
        cwd=repository,
        env={**environment, "PYTHONPATH": paths, "AT": at},
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


DRAWING = {"PIL", "matplotlib", "jaxlm.report.page"}
TRAINING = {"grain", "optax", "jaxlm.data", "jaxlm.train.loop"}
LEFT_OUT = {
    "sample": {"jaxlm.verify", "jaxlm.data", "jaxlm.train.loop", *DRAWING},
    "chat": {"jaxlm.verify", "jaxlm.data", "jaxlm.train.loop", *DRAWING},
    "convert": {"jaxlm.verify", "jaxlm.data", "jaxlm.infer", *DRAWING},
    "verify": {"jaxlm.train.loop", *DRAWING},
    "report": {"orbax", "sentencepiece", "jaxlm.data"},
    "tune": {"flax", "orbax", "jaxlm.model", *TRAINING, *DRAWING},
    "doctor": {"orbax", "jaxlm.verify", *TRAINING, *DRAWING},
}


@pytest.mark.parametrize("verb", slow_but(["sample"], LEFT_OUT))
def test_a_verb_imports_only_what_it_needs(verb, repository):
    loaded = modules_after(f"import jaxlm.commands.{verb}", repository)
    assert f"jaxlm.commands.{verb}" in loaded
    assert not LEFT_OUT[verb] & loaded
    others = {f"jaxlm.commands.{other}" for other in VERBS if other != verb}
    assert not others & loaded
