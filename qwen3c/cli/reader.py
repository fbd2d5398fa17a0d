"""Messages typed by a person: lines with editing, completion and a history that outlives the program."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ..system.files import write_whole
from ..system.terminal import can_redraw

FENCE = '"""'
HISTORY_ENTRIES = 1000
# stands for a line break within an entry of the history file, where an entry is one line
NEWLINE_IN_ENTRY = "\x1f"
LIBEDIT = b"_HiStOrY_V2_"  # the first line of a history file by libedit
PASTE_PAUSE = 0.02  # seconds; lines that follow faster than this were pasted


class MessageReader:
    """Messages from stdin: a line each; a block between lines of three quotes, or a paste, is one message.

    complete: the line typed so far -> the lines that Tab may complete it to.
    """

    def __init__(self, complete: Callable[[str], list[str]] = lambda line: []) -> None:
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _load_readline() if self._interactive else None
        self._history = History(self._readline) if self._readline is not None else None
        # libedit, which some Pythons have instead of readline, reads a paste line by line; so does a dumb
        # terminal, which cannot mark where a paste begins and ends
        libedit = self._readline is not None and "libedit" in (self._readline.__doc__ or "")
        self._gathers_pastes = self._readline is not None and not libedit and can_redraw(sys.stdout)
        if self._readline is not None:
            switch = "on" if self._gathers_pastes else "off"
            self._readline.parse_and_bind(f"set enable-bracketed-paste {switch}")
            self._readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
            self._readline.set_completer_delims(" \t\n")
            self._readline.set_completer(_completer(self._readline, complete))

    def read(self) -> str:
        """The next message. EOFError at the end of the input, KeyboardInterrupt on Ctrl-C."""
        text = self._line("> ")
        while self._paste_goes_on():
            text += "\n" + self._line("")
        is_block = text.lstrip().startswith(FENCE)
        typed = self._whole_block(text) if is_block else text
        if self._history is not None:
            self._history.add(typed)
        return _without_fences(typed) if is_block else typed

    def ask(self, question: str) -> str:
        """One line, in answer to a question; what was typed before it was asked is no answer."""
        if os.name == "posix" and sys.stdin.isatty():
            import termios

            termios.tcflush(sys.stdin, termios.TCIFLUSH)
        return self._line(question)

    def _whole_block(self, text: str) -> str:
        while not text.strip()[len(FENCE) :].endswith(FENCE):
            try:
                text += "\n" + self._line("... ")
            except EOFError:
                break
        return text

    def _line(self, prompt: str) -> str:
        if self._interactive:
            return input(prompt) if self._readline is None else _edited_line(self._readline, prompt)
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _paste_goes_on(self) -> bool:
        if not self._interactive or self._gathers_pastes or os.name != "posix":
            return False
        return bool(select.select([sys.stdin], [], [], PASTE_PAUSE)[0])


class _Suspended(Exception):
    """Ctrl-Z while a line is typed; the argument is the text typed so far."""


def _edited_line(readline: Any, prompt: str) -> str:
    """input(), but Ctrl-Z restores the terminal for the shell, and `fg` shows prompt and text again."""
    typed = ""

    def suspend(number: int, frame: FrameType | None) -> None:
        raise _Suspended(readline.get_line_buffer())

    def insert() -> None:
        readline.insert_text(typed)

    while True:
        previous = signal.signal(signal.SIGTSTP, suspend)
        readline.set_startup_hook(insert)
        try:
            return input(prompt)
        except _Suspended as suspended:
            typed = suspended.args[0]
        finally:
            readline.set_startup_hook()
            signal.signal(signal.SIGTSTP, previous)
        signal.raise_signal(signal.SIGTSTP)  # the process stops here until `fg`


def _without_fences(block: str) -> str:
    return block.strip().removeprefix(FENCE).removesuffix(FENCE).strip("\n")


def _completer(readline: Any, complete: Callable[[str], list[str]]) -> Callable[[str, int], str | None]:
    """A function for readline.set_completer, which asks it for the n-th completion of a word."""

    def completer(word: str, n: int) -> str | None:
        line = readline.get_line_buffer()[: readline.get_endidx()]
        if not line.startswith("/"):
            return word + "\t" if n == 0 else None  # in a message the Tab key is a tab
        begin = readline.get_begidx()
        return next(iter([each[begin:] for each in complete(line)][n:]), None)

    return completer


class History:
    """The messages typed before, for the arrow keys; kept in a file for later runs.

    An entry is written at once, so that no end of the program loses it. A file that cannot be read or written
    is ignored: a read-only home is no error.
    """

    def __init__(self, readline: Any) -> None:
        self._readline = readline
        self._path = history_path()
        self._last = ""
        readline.set_auto_history(False)  # or each line of a block would become an entry
        for entry in self._read():
            self._remember(entry)

    def add(self, text: str) -> None:
        """Append `text`, of any number of lines, as one entry, unless it is empty or the last entry again."""
        if not text.strip() or text == self._last:
            return
        self._remember(text)
        try:
            if self._path is not None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with open(descriptor, "a", encoding="utf-8", errors="replace", newline="\n") as file:
                    file.write(text.replace("\n", NEWLINE_IN_ENTRY) + "\n")
        except OSError:
            pass

    def _remember(self, text: str) -> None:
        self._last = text
        try:
            self._readline.add_history(text)
        except ValueError:
            pass  # the locale cannot encode a character of it

    def _read(self) -> list[str]:
        """The entries of the file; a long file is cut to its newest entries."""
        try:
            if self._path is None or not self._path.is_file():
                return []
            data = self._path.read_bytes()
            entries = [line for line in _plain(data).decode("utf-8", "replace").split("\n") if line]
            if len(entries) > 2 * HISTORY_ENTRIES or data.startswith(LIBEDIT):
                entries = entries[-HISTORY_ENTRIES:]
                write_whole(self._path, "".join(entry + "\n" for entry in entries))
                self._path.chmod(0o600)
        except OSError:
            return []
        return [entry.replace(NEWLINE_IN_ENTRY, "\n") for entry in entries[-HISTORY_ENTRIES:]]


def _plain(data: bytes) -> bytes:
    """The lines of a history file. libedit's files begin with the line LIBEDIT and have octal escapes."""
    if not data.startswith(LIBEDIT):
        return data
    lines = data.partition(b"\n")[2]
    return re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), lines)


def state_directory() -> Path | None:
    """The directory for files that outlive a chat; None if there is no home directory."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "qwen3c"
    except RuntimeError:
        return None


def history_path() -> Path | None:
    """The path of the history file; None if there is no home directory."""
    directory = state_directory()
    return directory and directory / "history"


def _load_readline() -> Any:
    """The readline module, or None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    return readline
