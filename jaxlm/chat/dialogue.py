"""The dialogue with a person: messages, answers, and commands that begin with a slash.

Answers go to stdout, and everything else to stderr.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from jax.errors import JaxRuntimeError

from jaxlm.chat import transcript
from jaxlm.chat.prompt import DraftDropped
from jaxlm.chat.unsaved import Unsaved
from jaxlm.fields import nearest
from jaxlm.infer.conversation.conversation import Answer, ContextFull, Conversation
from jaxlm.terminal.interrupts import TextInterrupts
from jaxlm.terminal.printable import error_line, printable
from jaxlm.terminal.progress import Waiting

# The end of the program would be that of the conversation: a device or this process
# without memory, a file that cannot be.
_SURVIVED = (ValueError, OSError, MemoryError, JaxRuntimeError)
STOPPING = "stopping as soon as possible; Ctrl-C again ends the program"
WAIT = "compiling and reading the message"
KEYS = """\
//...         send a message that begins with a slash
Alt-Enter, or a backslash at the end of a line, begins a new line; several
pasted lines are one message. The arrow up brings back earlier messages.
Ctrl-C stops an answer, and Ctrl-D leaves."""


class Dialogue:
    """Reads messages, and shows what the model answers."""

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        *,
        on_terminal: bool,
        unsaved: Unsaved | None = None,
    ):
        """Prepares the dialogue; `hold` begins it.

        Args:
          conversation: the model and its messages.
          read: returns the next message; raises EOFError at the end, DraftDropped for a
            Ctrl-C that gives up a draft, and KeyboardInterrupt for another.
          on_terminal: an error is shown, and the dialogue goes on. Otherwise nobody
            might see it, so it is raised.
          unsaved: keeps the messages until the dialogue ends in order; None: nothing.
        """
        self._conversation = conversation
        self._unsaved = unsaved or Unsaved(None)
        self._read = read
        self._on_terminal = on_terminal
        self._is_over = self._is_told = False

    def hold(self) -> None:
        """Holds the dialogue until `/exit` or the end of the input.

        Raises:
          ValueError: not on a terminal: for a wrong command, and as `Conversation.ask`.
        """
        self._hold()
        self._unsaved.forget()

    def _hold(self) -> None:
        may_leave = False
        while not self._is_over:
            try:
                text = self._read()
            except EOFError:
                return
            except DraftDropped:
                may_leave = False
                continue
            except KeyboardInterrupt:
                if may_leave or not self._on_terminal:
                    self._unsaved.forget()
                    raise
                may_leave = True
                say("press Ctrl-C again or type /exit")
                continue
            may_leave = False
            try:
                self._take(text)
            except KeyboardInterrupt:
                if not self._on_terminal:
                    raise
                say("stopped")
            except _SURVIVED as error:
                if not self._on_terminal:
                    raise
                say(f"error: {error_line(error)}")
            self._keep()

    def _keep(self) -> None:
        try:
            self._unsaved.keep(self._conversation.messages)
        except OSError as error:
            if not self._is_told:
                say(
                    "if this chat is cut off it is lost, without /save: "
                    f"{error_line(error)}"
                )
            self._is_told = True

    def _take(self, text: str) -> None:
        if text.startswith("//"):
            self._ask(text[1:])
        elif text.startswith("/"):
            self._run(text)
        elif text.strip():
            self._ask(text)

    def _ask(self, text: str) -> None:
        blank = "your message is taken back"
        self._answer(lambda show: self._conversation.ask(text, show), blank)

    def _retry(self) -> None:
        self._answer(self._conversation.retry, "the conversation stays as it was")

    def _run(self, text: str) -> None:
        name, *rest = text.strip().split(maxsplit=1)
        if name not in COMMANDS:
            raise ValueError(
                f"no command {name!r}{nearest(name, list(COMMANDS))}; to send it, "
                "begin with //"
            )
        usage, _, run = COMMANDS[name]
        if (rest and not usage) or (usage == "FILE" and not rest):
            raise ValueError(f"usage: {name} {usage}".rstrip())
        run(self, *rest)

    def _answer(
        self, ask: Callable[[Callable[[str], bool]], Answer], if_blank: str
    ) -> None:
        interrupts = TextInterrupts(STOPPING)
        with interrupts, Waiting(WAIT) as waiting:

            def show(text: str) -> bool:
                if interrupts.received is not None:
                    return True
                if text:
                    waiting.finish()
                    interrupts.are_raised = False
                    shown = printable(text) if self._on_terminal else text
                    print(shown, end="", flush=True)
                return False

            try:
                interrupts.are_raised = True
                answer = ask(show)
            except ContextFull as error:
                used = bool(self._conversation.messages)
                remedy = "/reset forgets it" if used else "send a shorter message"
                raise ContextFull(f"{error}: {remedy}") from None
        if answer.text or not self._on_terminal:
            print(flush=True)
        if not answer.text.strip():
            was_stopped = answer.ended == "interrupted"
            reason = "stopped before the first word" if was_stopped else "no answer"
            say(f"{reason}: {if_blank}")
        elif answer.ended == "at the limit":
            say(f"stopped after {answer.tokens} tokens: --max-new-tokens allows more")
        elif answer.ended == "at the context":
            say(
                f"the model's context of {self._conversation.config.context_length} "
                "tokens is full: /reset forgets the conversation"
            )
        if self._on_terminal:
            print(flush=True)

    def _help(self) -> None:
        for name, (usage, summary, _) in COMMANDS.items():
            say(f"{f'{name} {usage}':13} {summary}")
        say(KEYS)

    def _reset(self) -> None:
        self._conversation.reset()
        kept = "" if self._conversation.system is None else "; the system message stays"
        say(f"the conversation is forgotten{kept}")

    def _system(self, text: str | None = None) -> None:
        self._conversation.set_system(text)
        say("no system message" if text is None else "the system message is set")

    def _save(self, file: str) -> None:
        path = Path(os.path.expanduser(file))
        transcript.save(self._conversation.messages, path)
        self._unsaved.forget(self._conversation.messages)
        say(f"saved {self._size()} to {path}")

    def _load(self, file: str) -> None:
        self._conversation.load(transcript.load(Path(os.path.expanduser(file))))
        self._unsaved.forget(self._conversation.messages)
        say(f"loaded {self._size()}")

    def _size(self) -> str:
        number = len(self._conversation.messages)
        return f"{number} message{'s' * (number != 1)}"

    def _stats(self) -> None:
        if (last := self._conversation.last_answer) is not None:
            cached = last.prompt_tokens - last.prefill_tokens
            say(f"last answer  {rate(last.tokens, last.decode_s)}")
            say(f"read for it  {rate(last.prefill_tokens, last.prefill_s)}")
            say(f"from cache   {rate(cached, 0.0)}")
        used, config = self._conversation.num_tokens(), self._conversation.config
        say(f"context      {used} of {config.context_length} tokens")

    def _exit(self) -> None:
        self._is_over = True


# Command -> what may follow it, what it does, and how.
COMMANDS = {
    "/help": ("", "list these commands", Dialogue._help),
    "/reset": ("", "forget all messages but the system message", Dialogue._reset),
    "/system": ("TEXT", "set the system message; alone: remove it", Dialogue._system),
    "/save": ("FILE", "write the messages to a file (JSON)", Dialogue._save),
    "/load": ("FILE", "go on with the messages of a file", Dialogue._load),
    "/retry": ("", "answer the last message again", Dialogue._retry),
    "/stats": ("", "tokens, their speed, and how full the context is", Dialogue._stats),
    "/exit": ("", "leave", Dialogue._exit),
}


def rate(tokens: int, seconds: float) -> str:
    """Formats `23 tokens at 41.2 tokens/s`."""
    noun = f"{tokens} token{'s' * (tokens != 1)}"
    return f"{noun} at {tokens / seconds:.1f} tokens/s" if seconds else noun


def say(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr, flush=True)
