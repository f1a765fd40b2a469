"""Programs in a process of their own: what they answer, and how they can fail."""

import json

import pytest

from jaxlm.files import limited_process
from jaxlm.files.limited_process import LimitedProgram, run_limited


def run(path, source, job=None):
    path.write_text(source)
    return run_limited(str(path), [json], job, "the work", cpu_seconds=1, most=1000)


def test_answers_and_failures(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    monkeypatch.setattr(limited_process, "MAX_SECONDS", 1000)  # on a busy machine
    echo = "import json, sys; print(json.dumps({'job': json.load(sys.stdin)}))"
    assert run(program, echo, [1, "é"]) == {"job": [1, "é"]}
    for source, message in (
        ('print(\'{"error": "is wrong"}\')', "^the work is wrong$"),
        (
            "import no_such_module",
            "process of the work ended with status 1: ModuleNotFound",
        ),
        ("print('{}' + ' ' * 2000)", None),
        ("print(' ' * 2000 + '{}')", "ended with status 0: no message"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\n"
            "while True: pass",
            "^the work ran for more than 1 s and was stopped$",
        ),
    ):
        if message is None:
            assert run(program, source) == {}
            continue
        with pytest.raises(ValueError, match=message):
            run(program, source)
    monkeypatch.setattr(limited_process, "MAX_SECONDS", 0.5)
    with pytest.raises(ValueError, match="did not finish within"):
        run(program, "import time; time.sleep(100)")


def test_jobs_share_a_process_until_one_fails(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    key = 'error' if json.loads(line) == 'fail' else 'pid'\n"
        "    print(json.dumps({key: os.getpid()}), flush=True)\n"
    )
    program = LimitedProgram(str(path), [json], "it", cpu_seconds=1, most=1000)
    first = program.run("a")["pid"]
    assert program.run("b")["pid"] == first
    with pytest.raises(ValueError, match=f"^it {first}$"):
        program.run("fail")
    assert program.run("c")["pid"] != first
    program.close()
