"""A person at a terminal: lines read with editing and history, notes and progress, Ctrl-C.

stdout is left to model text; what is said here goes to stderr. Any of the streams may be a terminal,
a file, a pipe that closes early, or not be there at all.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

DIM, RESET, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
FENCE = '"""'
HISTORY_LINES = 1000
PASTE_PAUSE = 0.02  # seconds: lines that follow faster than this were not typed


def open_streams() -> None:
    """Make sys.stdin, stdout and stderr usable whatever the caller closed and whatever the locale says."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            # files and pipes carry UTF-8; a terminal shows what its own encoding has
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """One line about what the program does, on stderr."""
    print(f"{DIM}{text}{RESET}" if has_colour(sys.stderr) else text, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """What went wrong, for a person."""
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory: a smaller context (-c) takes less"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: `pip install .` in the folder of qwen3c builds and installs what is missing"
    return " ".join(str(error).split())


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C makes the yielded function return True; another one raises."""
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class StatusLine:
    """One line on stderr that changes while something takes time; nothing where stderr is no terminal."""

    def __init__(self, delay: float = 0.5, interval: float = 0.1) -> None:
        self._next = time.monotonic() + delay
        self._interval = interval
        self._shown = False

    def show(self, text: Callable[[], str]) -> None:
        now = time.monotonic()
        if now >= self._next and sys.stderr.isatty():
            self._next = now + self._interval
            self._shown = True
            print(CLEAR_LINE + text(), end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------
# In


class MessageReader:
    """Messages from stdin: a line each; a block between lines of three quotes, or a paste, is one message."""

    def __init__(self) -> None:
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _load_readline() if self._interactive else None
        # libedit, which some Pythons have for readline, takes a paste line by line
        self._gathers_pastes = self._readline is not None and "libedit" not in (self._readline.__doc__ or "")
        if self._readline is not None and self._gathers_pastes:
            self._readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self) -> str:
        """The next message. EOFError at the end of the input, KeyboardInterrupt on Ctrl-C."""
        text = self._line("> ")
        while self._paste_goes_on():
            text += "\n" + self._line("")
        return self._block(text) if text.lstrip().startswith(FENCE) else text

    def close(self) -> None:
        """Save the history."""
        path = history_path()
        if self._readline is None or path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._readline.set_history_length(HISTORY_LINES)
            self._readline.write_history_file(path)
            path.chmod(0o600)
        except OSError:
            pass  # a read-only home is no reason to complain on the way out

    def _block(self, text: str) -> str:
        text = text.lstrip()[len(FENCE) :]
        while not text.rstrip().endswith(FENCE):
            try:
                text += "\n" + self._line("... ")
            except EOFError:
                return text.strip("\n")
        return text.rstrip()[: -len(FENCE)].strip("\n")

    def _line(self, prompt: str) -> str:
        if self._interactive:
            return input(prompt)
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


def history_path() -> Path | None:
    """Where lines typed are kept between runs; None if there is no home."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        base = Path(state) if state else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "qwen3c" / "history"


def _load_readline() -> Any:
    """The readline module with the history read, or None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    path = history_path()
    try:
        if path is not None:
            readline.read_history_file(path)
    except (OSError, ValueError):
        pass
    return readline
