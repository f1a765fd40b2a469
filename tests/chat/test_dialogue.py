"""The dialogue: what is sent, what is shown, and each command."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys

import pytest
from conversation_case import scripted
from jax.errors import JaxRuntimeError

from jaxlm.chat import dialogue, transcript
from jaxlm.chat.dialogue import COMMANDS, Dialogue
from jaxlm.chat.prompt import DraftDropped
from jaxlm.chat.unsaved import Unsaved, not_ended
from jaxlm.terminal.progress import Waiting


class Keyboard:
    """Returns the messages given; an exception in their place is raised."""

    def __init__(self, messages):
        self._left = iter(messages)

    def __call__(self):
        message = next(self._left, EOFError())
        if isinstance(message, str):
            return message
        raise message


@pytest.fixture
def hold(monkeypatch, tmp_path, capsys):
    """Holds a dialogue; returns stdout, stderr and the conversation."""

    def hold(typed, answers=(), on_terminal=True, **options):
        talk = scripted(monkeypatch, tmp_path, answers, **options)
        Dialogue(talk, Keyboard(typed), on_terminal=on_terminal).hold()
        return *capsys.readouterr(), talk

    return hold


def contents(talk):
    return [message["content"] for message in talk.messages]


def test_answers_go_to_stdout(hold):
    out, err, talk = hold(["Hi", "", "  ", "and?", "/exit", "no"], ["One.", "Two."])
    assert (out, err) == ("One.\n\nTwo.\n\n", "")
    assert contents(talk) == ["Hi", "One.", "and?", "Two."]
    out, err, _ = hold(["Hi", "and?"], ["One.", "Two."], on_terminal=False)
    assert (out, err) == ("One.\nTwo.\n", "")


def test_a_message_may_begin_with_a_slash(hold):
    _, err, talk = hold(["//etc/hosts is\nwhat?"], ["A file."])
    assert contents(talk) == ["/etc/hosts is\nwhat?", "A file."] and not err


@pytest.mark.parametrize(
    "typed, words",
    [
        (
            "/hepl",
            "no command '/hepl' (did you mean '/help'?); to send it, begin with //",
        ),
        ("/usr/bin/env", "no command '/usr/bin/env'; to send it, begin with //"),
        ("/", "no command '/'"),
        ("/save", "usage: /save FILE"),
        ("/load  ", "usage: /load FILE"),
        ("/reset all", "usage: /reset"),
        ("/retry", "there is no message to answer again"),
        ("/load nowhere.json", "nowhere.json: No such file"),
    ],
)
def test_a_wrong_command_is_one_line_and_nothing_is_sent(hold, typed, words):
    out, err, talk = hold([typed, "Hi"], ["Ho"])
    assert err.startswith(f"error: {words}") and err.count("\n") == 1
    assert out == "Ho\n\n" and contents(talk) == ["Hi", "Ho"]
    # Nobody would see it in a pipe.
    with pytest.raises(ValueError) as error:
        hold([typed, "Hi"], ["Ho"], on_terminal=False)
    assert str(error.value).startswith(words)


def test_help_lists_the_commands(hold):
    _, err, _ = hold(["/help"])
    lines = err.splitlines()
    assert [line.split()[0] for line in lines[: len(COMMANDS)]] == list(COMMANDS)
    assert "Alt-Enter" in err and "Ctrl-D" in err
    assert max(map(len, lines)) <= 80


def test_reset_and_system(hold):
    typed = ["/system Be brief.", "Hi", "/reset", "/system", "/reset", "Ho"]
    _, err, talk = hold(typed, ["1", "2"])
    assert err.splitlines() == [
        "the system message is set",
        "the conversation is forgotten; the system message stays",
        "no system message",
        "the conversation is forgotten",
    ]
    assert contents(talk) == ["Ho", "2"]


def test_retry_replaces_the_answer(hold):
    out, _, talk = hold(["Hi", "/retry"], ["One.", "Two."])
    assert out == "One.\n\nTwo.\n\n" and contents(talk) == ["Hi", "Two."]


def test_an_empty_answer_is_not_kept(hold):
    typed = ["Hi", "Ho", "/retry", "He"]
    _, err, talk = hold(typed, ["One.", " ", "", "Four."])
    assert err.splitlines() == [
        "no answer: your message is taken back",
        "no answer: the conversation stays as it was",
    ]
    assert contents(talk) == ["Hi", "One.", "He", "Four."]


def test_stats(hold):
    _, err, talk = hold(["/stats", "Hi", "/stats"], ["One."])
    size, count = talk.config.context_length, talk.num_tokens()
    answer = talk.last_answer
    assert err.splitlines() == [
        f"context      0 of {size} tokens",
        f"last answer  {answer.tokens} tokens at {answer.tokens / 2:.1f} tokens/s",
        "read for it  7 tokens at 14.0 tokens/s",
        f"from cache   {answer.prompt_tokens - 7} tokens",
        f"context      {count} of {size} tokens",
    ]


def test_a_conversation_goes_on_from_a_file(hold, tmp_path):
    file = tmp_path / "talk one.json"
    _, err, talk = hold(["Hé", f"/save {file}", "and?", f"/save {file}"], ["1", "2"])
    assert err == f"saved 2 messages to {file}\nsaved 4 messages to {file}\n"
    saved = json.loads(file.read_text())
    assert saved == talk.messages and len(saved) == 4
    _, err, talk = hold(["lost", f"/load {file}", "why?"], ["0", "3"])
    assert err == "loaded 4 messages\n"
    assert contents(talk) == ["Hé", "1", "and?", "2", "why?", "3"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("[", "is not valid JSON"),
        ("{}", "holds no list"),
        ('[{"role": "user"}]', "message 0 is not an object of strings"),
        ('[{"role": "user", "content": 1}]', "message 0 is not"),
        ('[{"role": "a b", "content": ""}]', "has the role 'a b'"),
    ],
)
def test_a_wrong_file_is_one_line(hold, tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    _, err, talk = hold(["Hi", f"/load {tmp_path / 'x.json'}"], ["Ho"])
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert contents(talk) == ["Hi", "Ho"]


def test_no_other_file_is_overwritten(hold, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    _, err, _ = hold([f"/save {file}", f"/save {tmp_path / 'no' / 'x'}"])
    assert "exists and is not a conversation: choose another name\n" in err
    assert err.endswith("No such file or directory\n") and err.count("\n") == 2
    assert file.read_text() == "mine"


def test_a_file_that_cannot_be_does_not_end_it(hold, tmp_path):
    file = tmp_path / "talk.json"
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(1 << 40)
    typed = ["Hi", f"/save {file}", f"/save {tmp_path / ('x' * 300)}"]
    typed += [f"/load {hole.name}", "/reset", f"/save {file}", "again", "Ho"]
    typed += [f"/save {file}"]
    _, err, talk = hold(typed, ["1", JaxRuntimeError("RESOURCE_EXHAUSTED"), "2"])
    # The part that was shown before the error stays.
    assert contents(talk) == ["again", "part", "Ho", "2"]
    lines = err.splitlines()
    assert [line[:5] for line in lines if "forgotten" not in line] == [
        *("saved", "error", "error", "error", "error", "error"),
    ]
    assert "File name too long" in lines[1] and "more than" in lines[2]
    # The earlier conversation is not replaced by an empty one, and by no other.
    for line in (lines[4], lines[6]):
        assert "talk.json has another conversation, of 2 messages: choose" in line
    assert [m["content"] for m in json.loads(file.read_text())] == ["Hi", "1"]


def test_what_a_link_leads_to_is_replaced(hold, tmp_path):
    """As a file in the folder of a sync client."""
    file, link = tmp_path / "far.json", tmp_path / "near.json"
    hold(["Hi", f"/save {file}"], ["1"])
    link.symlink_to(file)
    hold(["Hi", "and?", f"/save {link}"], ["1", "2"])
    assert link.is_symlink() and len(transcript.load(file)) == 4


def test_a_conversation_is_kept_until_the_chat_ends_in_order(
    monkeypatch, tmp_path, capsys
):
    """A terminal that is closed or a kill had taken it."""
    folder, mine = tmp_path / "conversations", tmp_path / "mine.json"

    def held(*typed):
        """What is kept when the messages are typed and the program then ends."""
        talk = scripted(monkeypatch, tmp_path, ["One", "Two", "Three"])
        kept = []

        def read():
            kept[:] = [transcript.load(path) for path in folder.glob("*.json")]
            return keyboard()

        keyboard, unsaved = Keyboard(typed), Unsaved(folder)
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            Dialogue(talk, read, on_terminal=True, unsaved=unsaved).hold()
        return kept, [*folder.glob("*.json")]

    assert held("/system Be brief.") == ([], [])
    kept, left = held("Hi", "and?")
    assert [[m["content"] for m in one] for one in kept] == [
        ["Hi", "One", "and?", "Two"]
    ]
    assert not left  # Ctrl-D ends in order, as do two Ctrl-C.
    assert not held("Hi", KeyboardInterrupt(), KeyboardInterrupt())[1]
    for done in (f"/save {mine}", f"/load {mine}", "/reset"):
        assert held("Hi", done) == ([], [])
    _, [path] = held(f"/load {mine}", "more", SystemExit(143))  # as for SIGTERM
    assert [m["content"] for m in transcript.load(path)] == ["Hi", "One", "more", "One"]
    assert folder.stat().st_mode & 0o077 == 0
    assert not_ended(None) == not_ended(tmp_path / "no") == []
    # So is one that an error ends, as where the answers go into a pipe.
    talk, unsaved = scripted(monkeypatch, tmp_path, ["One"]), Unsaved(folder)
    read = Keyboard(["Hi", "/sav x"])
    with pytest.raises(ValueError, match="/sav"):
        Dialogue(talk, read, on_terminal=False, unsaved=unsaved).hold()
    path.unlink()
    [path] = folder.glob("*.json")
    assert [m["content"] for m in transcript.load(path)] == ["Hi", "One"]
    # Where nothing can be written, that is said once.
    path.unlink()
    folder.rmdir()
    folder.write_text("")
    capsys.readouterr()
    assert held("Hi", "and?") == ([], [])
    assert capsys.readouterr().err.count("if this chat is cut off it is lost") == 1


def test_conversations_of_processes_that_are_gone_are_found(tmp_path):
    """Whatever their numbers: each container begins with 1."""
    (tmp_path / "notes.json").write_text("mine")
    program = (
        "import os, sys, pathlib\n"
        "from jaxlm.chat.unsaved import Unsaved\n"
        "unsaved = Unsaved(pathlib.Path(sys.argv[1]))\n"
        "for words in ('Hi', 'there'):\n"
        "    unsaved.keep([{'role': 'user', 'content': words}])\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
        "os._exit(1)\n"
    )
    for number in (1, 2):
        command = [sys.executable, "-c", program, tmp_path]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as chat:
            assert chat.stdout.readline()
            assert len(not_ended(tmp_path)) == number - 1  # This one is running.
    newest, oldest = not_ended(tmp_path)
    assert newest.stat().st_mtime_ns > oldest.stat().st_mtime_ns
    assert transcript.load(newest) == [{"role": "user", "content": "there"}]


def test_a_conversation_is_not_written_into_a_step(tmp_path):
    """It would be deleted with the step, or damage it."""
    step = tmp_path / "run" / "checkpoints" / "8"
    (step / "params").mkdir(parents=True)
    for name in ("meta.json", "manifest.json"):
        (step / name).touch()
    for folder in (step, step / "params"):
        with pytest.raises(ValueError, match="inside of a step"):
            transcript.save([{"role": "user", "content": "Hi"}], folder / "talk.json")
        assert not (folder / "talk.json").exists()


def test_only_the_same_conversation_is_replaced(tmp_path):
    """Many begin with the same words. The last answer may be another: /retry."""
    file, said = tmp_path / "talk.json", ["Hi", "Hello", "An essay", "Long"]

    def save(*contents, system=None):
        roles = itertools.cycle(["user", "assistant"])
        messages = [
            {"role": r, "content": c} for r, c in zip(roles, contents, strict=False)
        ]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        transcript.save(messages, file)
        assert transcript.load(file) == messages

    save(*said)
    for other in (
        ("Hi", "Hello", "A joke", "Ha", "Another", "Ho"),
        ("Hi", "Hey", *said[2:]),
        said[:2],
        (),
    ):
        with pytest.raises(ValueError, match="another conversation, of 4 messages"):
            save(*other)
    save(*said[:3], "Short")
    save(*said[:3], "Short", "Thanks", "Welcome", system="Be polite.")


def test_a_full_context_does_not_end_it_on_a_terminal(hold):
    typed = ["x" * 600, "Hi", "again " * 20, "/reset", "Ho"]
    _, err, talk = hold(typed, ["One. " * 40, "Two."], context_length=100, new=99)
    first, full, second, forgotten = err.splitlines()
    assert first.startswith("error: ") and first.endswith("send a shorter message")
    assert full == (
        "the model's context of 100 tokens is full: /reset forgets the conversation"
    )
    assert second.startswith("error: ") and second.endswith("/reset forgets it")
    assert forgotten == "the conversation is forgotten"
    assert contents(talk) == ["Ho", "Two."]
    with pytest.raises(ValueError, match="send a shorter message"):
        hold(["x" * 600], context_length=100, on_terminal=False)


def test_a_limit_names_its_flag(hold):
    _, err, _ = hold(["Hi"], ["word " * 100])
    assert err == "stopped after 40 tokens: --max-new-tokens allows more\n"


def test_ctrl_c_keeps_the_part_that_was_shown(hold):
    out, err, talk = hold(["Hi", "Ho"], [KeyboardInterrupt(), "Two."])
    assert out == "part\n\nTwo.\n\n" and not err
    assert contents(talk) == ["Hi", "part", "Ho", "Two."]


def test_ctrl_c_after_the_first_words_lets_the_generation_end(hold, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def interrupting(*texts, **options):
        if texts == ("O",):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("builtins.print", interrupting)
    _, _, talk = hold(["Hi", "Ho"], ["Once", "Two."])
    assert contents(talk) == ["Hi", "O", "Ho", "Two."]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_wait_is_over_before_the_first_words(hold, monkeypatch):
    events = []

    class Recorded(Waiting):
        def finish(self):
            events.append("over")
            super().finish()

    monkeypatch.setattr(dialogue, "Waiting", Recorded)
    monkeypatch.setattr("builtins.print", lambda *texts, **_: events.extend(texts))
    hold(["Hi"], ["Ho"])
    assert events[:2] == ["over", "H"]
    # Also when there are none.
    events.clear()
    hold(["x" * 600], context_length=100)
    assert events[0] == "over" and events[1].startswith("error: ")


def test_ctrl_c_at_the_prompt_asks_once(hold):
    stop = KeyboardInterrupt()
    _, err, _ = hold([stop, "Hi", stop, "/exit"], ["Ho"])
    assert err == "press Ctrl-C again or type /exit\n" * 2
    with pytest.raises(KeyboardInterrupt):
        hold([stop, stop])
    with pytest.raises(KeyboardInterrupt):
        hold([stop], on_terminal=False)


def test_ctrl_c_in_a_draft_only_drops_the_draft(hold):
    stop, drop = KeyboardInterrupt(), DraftDropped()
    _, err, talk = hold([stop, drop, stop, drop, drop, "Hi"], ["Ho"])
    assert err == "press Ctrl-C again or type /exit\n" * 2
    assert contents(talk) == ["Hi", "Ho"]


def test_an_answer_cannot_move_the_cursor(hold):
    text = "a\x1b[2Jb\tc\nd"
    out, _, talk = hold(["Hi"], [text])
    assert out == "a\N{REPLACEMENT CHARACTER}[2Jb\tc\nd\n\n"
    assert contents(talk)[1] == text
    assert hold(["Hi"], [text], on_terminal=False)[0] == f"{text}\n"
