"""The chat, from a pipe and at a terminal: messages, commands, signals.

python -m pytest tests/cli/test_repl.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import RUN, command, in_process, text_of

from qwen3c import Model
from qwen3c.cli.repl import parse_command

pytestmark = pytest.mark.usefixtures("default_model")


def test_messages_from_a_pipe_are_answered_one_by_one(model: Model) -> None:
    stdin = 'first\n"""\nsecond\nline\n"""\n\n/foo\n /foo\n/no_think x\n'
    done = command("-m", "chat", "-n", "6", "-s", "4", "--no-think", "--json", input=stdin.encode())
    replies = [json.loads(line) for line in done.out.splitlines()]
    assert (
        done.status == 2 and "unknown command /foo" in done.err
    )  # stdin is no terminal, so a failed command shows in the status
    messages: list[dict[str, Any]] = []
    for i, (said, reply) in enumerate(
        zip(["first", "second\nline", " /foo", "/no_think x"], replies, strict=True)
    ):
        messages.append({"role": "user", "content": said})
        prompt = model.chat_prompt(messages, thinking=False)
        assert reply["text"] == text_of(model, prompt, 6, seed=4 + i)
        assert reply["prompt_tokens"] == len(prompt)
        messages.append({"role": "assistant", "content": reply["text"]})
    assert replies[0]["cached_tokens"] == 0
    assert all(reply["cached_tokens"] > 8 for reply in replies[1:])


def test_a_conversation_that_no_longer_fits_goes_on_without_the_message(small: str) -> None:
    stdin = "short\n" + "long " * 200 + "\nshort\n"
    done = command(small, "-m", "chat", "-n", "4", "--json", input=stdin.encode())
    replies = [json.loads(line) for line in done.out.splitlines()]
    assert len(replies) == 2 and done.status == 2
    assert re.search(r"error: prompt is \d+ tokens, the context holds 256", done.err)


def test_overflow_drop_goes_on_without_the_oldest_turns(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = ("ab " * 20 + "\n") * 12
    done = command(small, "-m", "chat", "-n", "4", "--json", "--overflow", "drop", input=stdin.encode())
    assert done.status == 0 and len(done.out.splitlines()) == 12
    assert re.search(r"^\(\d+ oldest messages are no longer told to the model\)$", done.err, re.MULTILINE)
    stopped = command(small, "-m", "chat", "-n", "4", "--json", input=stdin.encode())
    assert stopped.status == 2 and len(stopped.out.splitlines()) < 12
    assert "this model holds no more; /clear forgets what was said, /set overflow drop" in stopped.err
    done = in_process(capsys, "-m", "generate", "-i", "x", "--overflow", "drop")
    assert done.status == 2 and "--overflow belongs to -m chat" in done.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", ("help", "")),
        ("/system be kind\nand brief ", ("system", "be kind\nand brief")),
        ("/set top_k 5", ("set", "top_k 5")),
        ("/think", ("think", "")),
        ("/nothink", ("nothink", "")),
        ("/unknown", ("unknown", "")),
        ("/set-context 5", ("set-context", "5")),
        ("/Help", ("help", "")),
        ("/?", ("help", "")),
        ("/quit", ("exit", "")),
        ("/BYE now", ("exit", "now")),
        ("/Think about it", None),
        ("/No_think", None),
        ("/usr/bin/x", None),
        ("/??", None),
        ("/think about it", None),
        ("/no_think", None),
        ("/no_think about it", None),
        ("please /think", None),
        (" /help", None),
        ("/usr/bin is what?", None),
        ("/* comment */", None),
        ("//", None),
        ("/", None),
        ("", None),
    ],
)
def test_what_is_a_command_and_what_a_message(text: str, expected: tuple[str, str] | None) -> None:
    assert parse_command(text) == expected


class Terminal:
    """run.py on a pseudo-terminal that is its controlling one, as in a terminal window."""

    LAUNCHER = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, *args: str, **environment: str) -> None:
        import fcntl
        import termios

        self._master, slave = os.openpty()
        # nothing wraps here; tests/terminal has windows of every width
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 240, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LAUNCHER, *RUN, *args],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm", **environment},
        )  # fmt: skip
        os.close(slave)
        self._raw = b""
        self.seen = ""  # output without escape codes and without the ^C that a terminal shows
        self._read = 0

    def expect(self, pattern: str, seconds: float = 30) -> str:
        """Wait for `pattern` in the output since the last wait; returns the text up to its end."""
        deadline = time.monotonic() + seconds
        while not (match := re.compile(pattern).search(self.seen, self._read)):
            ready = select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]
            try:
                data = os.read(self._master, 65536) if ready else b""
            except OSError:
                data = b""
            assert data, f"waited for {pattern!r}, saw {self.seen[self._read :]!r}"
            self._raw += data
            self.seen = re.sub(r"\r|\^C|\x1b\[[?0-9;]*[A-Za-z]", "", self._raw.decode(errors="replace"))
        found = self.seen[self._read : match.end()]
        self._read = match.end()
        return found

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C. Python's readline notices it with the next key, should it come between two keys."""
        for _ in range(30):
            self.send("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(pattern, seconds=1)
                return
        self.expect(pattern, seconds=0)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


OpenTerminal = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[OpenTerminal]:
    opened: list[Terminal] = []

    def open_terminal(*args: str, **environment: str) -> Terminal:
        places = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
        opened.append(Terminal(*args, **places, **environment))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.close()


SPEED_LINE = r"prompt \d+ tok.*\| seed \d+.*\n"


def test_a_conversation_at_a_terminal(terminal: OpenTerminal, tmp_path: Path) -> None:
    t = terminal("-m", "chat", "-t", "1.5", "-s", "1", "--no-think")
    assert "thinking off | temperature 1.5" in t.expect(r"/help lists the commands, Ctrl-D leaves")
    t.expect("> ")
    # Ctrl-C stops the reply and keeps it
    t.send("write a lot\r")
    t.expect(r"write a lot\n(.|\n){40}")
    t.send("\x03")
    assert "| stopped" in t.expect(SPEED_LINE)
    # a paste is one message, whatever lines it has
    t.expect("> ")
    t.send("/set max_tokens 5\r")
    t.expect("> ")
    t.send("\x1b[200~pasted\n\n/help\ntext\x1b[201~\r")
    assert re.search(r"\(\d+ cached\).*reply 5 tok .*cut at max tokens", t.expect(SPEED_LINE))
    t.expect("> ")
    # a block between quotes is one message
    t.send('"""a block\r')
    t.expect(r"\.\.\. ")
    t.send('of two"""\r')
    t.expect(SPEED_LINE)
    t.expect("> ")
    t.send("/regen\r")
    t.expect(SPEED_LINE)
    t.expect("> ")
    # /no_think is for the model, no command
    t.send("/no_think hi\r")
    t.expect(SPEED_LINE)
    t.expect("> ")
    t.send("/foo\r")
    t.expect(r"error: unknown command /foo")
    t.expect("> ")
    t.send("typed and given up")
    t.expect("given up")
    t.interrupt_until(r"\(Ctrl-D or /exit leaves\)")
    t.expect("> ")
    t.send(f"/save {tmp_path}/saved.json\r")
    t.expect("8 messages saved")
    t.expect("> ")
    t.send("\x04")
    assert t.process.wait(30) == 0
    messages = json.loads((tmp_path / "saved.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == [
        "write a lot",
        "pasted\n\n/help\ntext",
        "a block\nof two",
        "/no_think hi",
    ]
    # at Ctrl-C the terminal itself may discard output that was on its way
    assert len(messages[1]["content"]) >= 40 and messages[1]["content"][:30] in t.seen
    history = (tmp_path / "state" / "qwen3c" / "history").read_text()
    assert "write a lot" in history and (tmp_path / "state/qwen3c/history").stat().st_mode & 0o077 == 0


def test_two_ctrl_c_in_a_row_do_not_end_a_conversation(terminal: OpenTerminal) -> None:
    t = terminal("-m", "chat", "-t", "1.5", "-n", "2000", "-s", "1", "--no-think")
    t.expect("> ")
    t.send("write\r")
    t.expect(r"write\n(.|\n){10}")
    t.send("\x03\x03")
    t.expect("> ")
    t.send("/set max_tokens 3\r")
    t.expect("> ")
    t.send("again\r")
    assert "reply 3 tok" in t.expect(SPEED_LINE)
    t.expect("> ")
    t.send("/exit\r")
    assert t.process.wait(30) == 0


def test_without_readline_lines_that_come_at_once_are_one_message(
    terminal: OpenTerminal, tmp_path: Path
) -> None:
    (tmp_path / "readline.py").write_text("raise ImportError")
    t = terminal("-m", "chat", "-n", "2", PYTHONPATH=str(tmp_path))
    t.expect("> ")
    t.send("pasted\nlines\n")
    t.expect(SPEED_LINE)
    t.expect("> ")
    t.send("typed\n")
    t.expect(SPEED_LINE)
    t.expect("> ")
    t.send(f"/save {tmp_path}/saved.json\n")
    t.expect("4 messages saved")
    messages = json.loads((tmp_path / "saved.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["pasted\nlines", "typed"]


def test_a_conversation_can_be_loaded_and_its_settings_seen(terminal: OpenTerminal, tmp_path: Path) -> None:
    saved = {"qwen3c": "conversation", "system": "be kind", "messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(saved))
    (tmp_path / "other.json").write_text("{}")
    t = terminal("-m", "chat", "-n", "3")
    for line, answer in [
        (f"/load {tmp_path}/c.json", "2 messages from"),
        ("/system", "system: be kind"),
        ("/system be brief", "system: be brief"),
        ("/set", r"max_tokens 3\n.*temperature 0.6 \(default\)"),
        ("/set top_k 5", "> "),
        ("/set", r"top_k 5\n"),
        ("/set top_k default", "> "),
        ("/set", r"top_k 20 \(default\)"),
        ("/set top_k many", "error: 'many' is not a number"),
        ("/set top_k -1", "error: top_k = -1 is not"),
        ("/set nothing 1", "error: there is no setting 'nothing'"),
        ("/nothink", "thinking off"),
        ("/set", r"temperature 0.7 \(default\)"),
        (f"/load {tmp_path}/other.json", "is not a saved conversation"),
        (f"/save {tmp_path}/other.json", "is not a saved conversation"),
        (f"/load {tmp_path}/none.json", "none.json: No such file"),
        ("/save", "error: which file"),
        (f"/save {tmp_path}/c.json", "2 messages saved"),
        ("/clear", "forgotten"),
        ("/regen", "error: there is no reply yet"),
        ("/help", "/load FILE"),
    ]:
        t.expect("> ")
        t.send(line + "\r")
        t.expect(re.escape(line.split()[0]))
        t.expect(answer) if answer != "> " else None
    t.send("\x04")
    t.expect(".*")
    assert json.loads((tmp_path / "c.json").read_text()) == saved | {"system": "be brief"}
    assert (tmp_path / "other.json").read_text() == "{}"
