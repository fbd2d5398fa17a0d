"""A person at a terminal: lines read with editing and history, notes and progress, Ctrl-C.

stdout is left to model text; what is said here goes to stderr. Any of the streams may be a terminal,
a file, a pipe that closes early, or not be there at all.
"""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

DIM, RESET, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
FENCE = '"""'
HISTORY_LINES = 1000
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f]"
)  # C0, DEL and C1: a terminal acts on them instead of showing them
BAR_WIDTH = 24
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


def program_name(default: str) -> str:
    """What the user typed to start this program: a script, an installed command or `python -m` and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("qwen3c"):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("qwen3c") else default


def has_colour(stream: TextIO) -> bool:
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def escaped(text: str, keep: str = "") -> str:
    """`text` with its control characters as JSON writes them (\\u001b), but for those in `keep`.

    For text of a file or a model on its way to a terminal, where it must not move the cursor or worse.
    """
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


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


def abandon_closed_streams() -> None:
    """Point a standard stream that is gone at the null device, where its last flush cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def can_redraw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which a line can be drawn again; TERM=dumb says that it cannot."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def columns(stream: TextIO) -> int:
    """Characters that fit in a line of the terminal behind `stream`; 80 where nobody says."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _draw(text: str) -> None:
    """Write to stderr. Nothing ends because nobody looks any more: a closed terminal sends SIGHUP for that."""
    with suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


class StatusLine:
    """One line on stderr, drawn again while something takes time, and cut to the width of the terminal.

    It is drawn on a terminal only. delay: seconds before it appears at all. interval: seconds between two drawings.
    """

    def __init__(self, delay: float = 0.5, interval: float = 0.1) -> None:
        self._next = time.monotonic() + delay
        self._interval = interval
        self._shown = False

    def show(self, text: Callable[[], str]) -> None:
        """Draw text(), unless the last drawing was less than an interval ago."""
        if time.monotonic() >= self._next and can_redraw(sys.stderr):
            self.show_now(text())

    def show_now(self, text: str) -> None:
        """Draw `text`, before a wait in which nothing else will be drawn."""
        if can_redraw(sys.stderr):
            self._next = time.monotonic() + self._interval
            self._shown = True
            # the last column stays free: a terminal that wraps there would leave the line behind
            line = text[: max(columns(sys.stderr) - 1, 1)]
            _draw(CLEAR_LINE + line)

    def clear(self) -> None:
        """Erase what was drawn."""
        if self._shown:
            self._shown = False
            _draw(CLEAR_LINE)


class Progress:
    """How far a long task is: call it with (done, total) as often as you like.

    On a terminal it is a StatusLine; elsewhere a line of its own every `pause` seconds.
    describe: (done, total, done per second) -> the words between the percentage and the time left.
    """

    def __init__(
        self, describe: Callable[[float, float, float], str], *, delay: float = 0.5, pause: float = 10.0
    ) -> None:
        self._describe = describe
        self._status = StatusLine(delay)
        self._pause = pause
        self._begin = self._printed = time.monotonic()

    def __call__(self, done: float, total: float) -> None:
        if can_redraw(sys.stderr):
            self._status.show(lambda: self._line(done, total, columns(sys.stderr)))
        elif (now := time.monotonic()) - self._printed >= self._pause:
            self._printed = now
            _draw(self._line(done, total, 0) + "\n")

    def say(self, text: str) -> None:
        """Draw `text` in place of how far it is, before a wait that has no measure."""
        self._status.show_now(text)

    def clear(self) -> None:
        """Erase what was drawn."""
        self._status.clear()

    def _line(self, done: float, total: float, width: int) -> str:
        seconds = time.monotonic() - self._begin
        return progress_line(done, total, seconds, self._describe, width)


def progress_line(
    done: float, total: float, seconds: float, describe: Callable[[float, float, float], str], width: int
) -> str:
    """A line such as "[######      ]  50%  1.20 of 2.40 GB  600 MB/s  2 s left", for `width` columns.

    The bar and then the words go where they do not fit; width 0: a line without a bar.
    """
    share = min(max(done / total, 0.0), 1.0) if total else 1.0
    rate = done / seconds if seconds > 0 else 0.0
    left = f"  {time_left(max(total - done, 0) / rate)}" if rate else ""
    percent = f"{int(share * 100):3d}%"
    text = f"{percent}  {describe(done, total, rate)}{left}"
    bar = f"[{'#' * int(BAR_WIDTH * share):<{BAR_WIDTH}}] "
    for line in ((bar + text) if width else text, text, percent + left):
        if not width or len(line) < width:
            return line
    return percent


def time_left(seconds: float) -> str:
    """Seconds as a person says them: "8 s left", "2 min 05 s left", "3 h 10 min left"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s left"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s left"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min left"


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
