"""`jaxlm chat` as a program: on a terminal, in a pipe, and from sample.py."""

import json
import os
import re
import stat
import subprocess
import sys

import jax
import pytest
from hugging_face_case import golden_tokenizer
from terminal_case import CTRL_C, CTRL_D, UP, Terminal
from toy_case import make_params, toy

from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.checkpoint.save import save
from jaxlm.config import SampleConfig
from jaxlm.infer.conversation.conversation import Conversation

# Answers never end by themselves, and a long one is more than what a terminal takes that
# nobody reads.
CONTEXT = 65_536
PASTE = "\x1b[200~one\n  two\x1b[201~"
ALT_ENTER = "\x1b\r"
# However busy the machine is, the terminal answers in time where the cursor is, and
# the keys of an escape sequence belong together.
PATIENT = """
import sys
from jaxlm import cli
from prompt_toolkit.application import Application
from prompt_toolkit.renderer import Renderer

def patient(application, *arguments, **options):
    begin(application, *arguments, **options)
    application.ttimeoutlen, application.timeoutlen = 600.0, None

begin, Application.__init__ = Application.__init__, patient
Renderer.CPR_TIMEOUT = 600
sys.exit(cli.main(["chat", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with runs/tiny, which has a chat template."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = golden_tokenizer("byte_level", tmp_path_factory.mktemp("tokenizer"))
    model = toy(vocab_size=tokenizer.vocab_size, context_length=CONTEXT)
    params = make_params(model, std=0.5)
    for i in tokenizer.stop_ids:
        params["lm_head"]["kernel"][:, i] = 0
    save(home / "runs" / "tiny", model, params, tokenizer)
    return home


class Chat(Terminal):
    """The program on a terminal. Each step waits for the prompt after it."""

    def ask(self, keys, *shown):
        """Sends a message, and stops its answer after a few characters."""
        self.send(keys)
        # An answer that begins with a combining character adds it to the line before.
        message = re.escape("\n".join(shown)) + r"[^\n]*"
        self.wait_for(rf"\n> {message}\n+(?!compiling)[\s\S]{{3}}")
        self.send(CTRL_C)
        self.wait_for(rf"(?s)\n> {message}\n.*\n\n>\Z")

    def command(self, text):
        """Returns the lines that a command shows."""
        self.send(f"{text}\r")
        shown = self.wait_for(rf"(?s)\n> {re.escape(text)}\n(.*\n)>\Z")
        return shown[1].splitlines()


@pytest.mark.slow
def test_a_conversation_on_a_terminal(home, repository, tmp_path):
    environment = {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(repository)}
    program = [sys.executable, "-c", PATIENT, "--max-new-tokens", "60000"]
    history = tmp_path / "jaxlm" / "chat_history"
    with Chat(program, cwd=home, environment=environment) as chat:
        chat.wait_for(r"\n\n>\Z")
        assert chat.lines() == [
            "sampling from runs/tiny, the newest run",
            f"runs/tiny: jaxlm, 17.5k parameters, context of {CONTEXT} tokens",
            "/help lists commands and keys; /exit or Ctrl-D leaves",
            "",
            ">",
        ]
        assert chat.command("/sats") == [
            "error: no command '/sats' (did you mean '/stats'?); to send it, begin with //"
        ]
        chat.ask("Hi\r", "Hi")
        chat.ask(f"{PASTE} three\r", "one", "    two three")
        chat.ask(f"a\\\rb{ALT_ENTER}c\r", "a", "  b", "  c")
        chat.ask(f"{UP}!\r", "a", "  b", "  c!")
        assert chat.command("/save talk.json") == ["saved 8 messages to talk.json"]
        chat.send(CTRL_C)
        chat.wait_for(r"press Ctrl-C again or type /exit\n>\Z")
        chat.send(CTRL_D)
        assert chat.wait() == 0
        assert not chat.cursor_is_hidden
        assert "compiling" not in "\n".join(chat.lines())
    messages = json.loads((home / "talk.json").read_text())
    sent = [m["content"] for m in messages if m["role"] == "user"]
    assert sent == ["Hi", "one\n  two three", "a\nb\nc", "a\nb\nc!"]
    assert all(m["content"] for m in messages)
    assert "+c!\n" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.slow
def test_in_a_pipe_each_line_is_a_message(home, repository):
    flags = ["--chat", "--seed", "5", "--max-new-tokens", "12", "-v"]
    done = subprocess.run(
        [sys.executable, repository / "sample.py", *flags],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(repository)},
        input="Hé\n\n/stats\n//and?\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "sampling from runs/tiny, the newest run\n" in done.stderr
    assert "attention of global layers, decode: auto took cached" in done.stderr
    opened = open_checkpoint(home / "runs" / "tiny")
    config, params = load(opened)
    tokenizer = opened.tokenizer()
    sample = SampleConfig(
        max_new_tokens=12, temperature=0.8, stop_ids=tokenizer.stop_ids
    )
    talk = Conversation(config, params, tokenizer, sample, jax.random.key(5))
    first, second = talk.ask("Hé", str).text, talk.ask("/and?", str).text
    assert done.stdout == f"{first}\n{second}\n"
