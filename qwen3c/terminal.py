"""A person at a terminal: lines read with editing and history, notes and progress, Ctrl-C.

stdout is left to model text; what is said here goes to stderr. Any of the streams may be a terminal,
a file, a pipe that closes early, or not be there at all.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import select
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from .files import write_whole

DIM, RESET, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
FENCE = '"""'
HISTORY_ENTRIES = 1000
NEWLINE_IN_ENTRY = (
    "\x1f"  # stands for a line break within an entry of the history file: one line is one entry
)
LIBEDIT = b"_HiStOrY_V2_"  # the first line of a history file by libedit
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f]"
)  # C0, DEL and C1: a terminal acts on them instead of showing them
BAR_WIDTH = 24
PASTE_PAUSE = 0.02  # seconds: lines that follow faster than this were not typed
COMPILED = ("engine", "kernels")  # the modules that setup.py builds
WRITE_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EBADF, errno.EAGAIN}


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
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def escaped(text: str, keep: str = "") -> str:
    """`text` with its control characters as JSON writes them (\\u001b), but for those in `keep`.

    For text of a file or a model on its way to a terminal, where it must not move the cursor or worse.
    """
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


def note(text: str) -> None:
    """What the program does, on stderr; on a terminal its lines break between words."""
    text = escaped(text, keep="\n\t")
    if sys.stderr.isatty():
        text = _wrapped(text, max(columns(sys.stderr) - 1, 1))
    print(f"{DIM}{text}{RESET}" if has_colour(sys.stderr) else text, file=sys.stderr, flush=True)


def _wrapped(text: str, width: int) -> str:
    """A word longer than `width`, such as a path, stays whole, so that it can be copied."""
    wrapper = textwrap.TextWrapper(
        width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False, expand_tabs=False
    )
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def program_name(script: str) -> str:
    """What a person typed to start this program: an installed command, `python -m` and a module, else `script`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("qwen3c"):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    started = Path(sys.argv[0])
    if started.name == "__main__.py" and started.parent.name == "qwen3c":
        return "python -m qwen3c"
    return started.stem if started.stem.startswith("qwen3c") else script


def one_line(error: Exception) -> str:
    """What went wrong, for a person."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return _out_of_memory(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"{error.strerror}: `ulimit -n` says how many this process may have"
    if isinstance(error, ImportError) and not _is_built():
        return "the engine is not built: `make run` (or `pip install .`) in the folder of qwen3c builds it"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: `pip install .` in the folder of qwen3c builds and installs what is missing"
    return " ".join(str(error).split())


def is_write_error(error: Exception) -> bool:
    """Whether a write to stdout or stderr failed, which have no file name that an error could give."""
    return isinstance(error, OSError) and error.filename is None and error.errno in WRITE_ERRORS


def _out_of_memory(error: Exception) -> str:
    if isinstance(error, MemoryError) and str(error):
        return f"out of memory: {error}"
    from .machine import address_space

    limit = address_space()
    if limit is None:
        return "out of memory: a smaller context (-c) takes less"
    return f"out of memory: {limit.name} leaves {limit.left >> 20} of {limit.size >> 20} MiB of address space"


def _is_built() -> bool:
    return all(importlib.util.find_spec(f"{__package__}.{name}") for name in COMPILED)


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


@contextmanager
def endable() -> Iterator[Callable[[], int]]:
    """Within, the first SIGTERM or SIGHUP acts as Ctrl-C does; the yielded function returns its number, 0 before.

    Later ones are ignored, so that nothing disturbs what is done at the end. A signal that is ignored stays so.
    """
    number = 0

    def handle(received: int, frame: FrameType | None) -> None:
        nonlocal number
        if not number:
            number = received
            interrupt = signal.getsignal(signal.SIGINT)
            if not callable(interrupt):
                raise KeyboardInterrupt
            interrupt(signal.SIGINT, frame)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = [(number, signal.signal(number, handle)) for number in heard]
    try:
        yield lambda: number
    finally:
        for each, handler in previous:
            signal.signal(each, handler)


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


def at_this_rate(done: float, total: float, seconds: float) -> float | None:
    """Seconds left if the rest goes as fast as what was done in `seconds`; None if that says nothing yet."""
    return max(total - done, 0) * seconds / done if done > 0 and seconds > 0 else None


@contextmanager
def waiting(what: str, delay: float = 1.0) -> Iterator[None]:
    """While the block runs, a status line such as "loading model.bin  3 s", from `delay` seconds on.

    A thread draws it, because what takes long in the block is one call. The block itself must print nothing.
    """
    status, begin, ended = StatusLine(delay), time.monotonic(), threading.Event()

    def draw() -> None:
        status.show(lambda: f"{what}  {time.monotonic() - begin:.0f} s")

    def draw_on() -> None:
        while not ended.wait(0.1):
            draw()

    draw()
    thread = threading.Thread(target=draw_on, daemon=True)
    is_drawn = can_redraw(sys.stderr)
    try:
        if is_drawn:
            thread.start()
    except RuntimeError:
        is_drawn = False  # no thread to be had: then it is waited in silence
    try:
        yield
    finally:
        ended.set()
        if is_drawn:
            thread.join()
        status.clear()


class Progress:
    """How far a long task is: call it with (done, total) as often as you like.

    On a terminal it is a StatusLine; elsewhere a line of its own every `pause` seconds.
    describe: (done, total, done per second) -> the words between the percentage and the time left.
    predict: (done, total, seconds so far) -> seconds left, or None while nobody can say.
    start: what was done before, by an earlier run; it says nothing about the speed.
    """

    def __init__(
        self,
        describe: Callable[[float, float, float], str],
        *,
        predict: Callable[[float, float, float], float | None] = at_this_rate,
        start: float = 0.0,
        delay: float = 0.5,
        pause: float = 10.0,
    ) -> None:
        self._describe = describe
        self._predict = predict
        self._start = start
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
        return progress_line(
            done, total, seconds, self._describe, width, predict=self._predict, start=self._start
        )


def progress_line(
    done: float,
    total: float,
    seconds: float,
    describe: Callable[[float, float, float], str],
    width: int,
    *,
    predict: Callable[[float, float, float], float | None] = at_this_rate,
    start: float = 0.0,
) -> str:
    """A line such as "[######      ]  50%  1.20 of 2.40 GB  600 MB/s  2 s left", for `width` columns.

    The bar and then the words go where they do not fit; width 0: a line without a bar. See Progress for the rest.
    """
    share = min(max(done / total, 0.0), 1.0) if total else 1.0
    rate = max(done - start, 0) / seconds if seconds > 0 else 0.0
    seconds_left = predict(done - start, total - start, seconds)
    left = "" if seconds_left is None else f"  {time_left(seconds_left)}"
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
    """Messages from stdin: a line each; a block between lines of three quotes, or a paste, is one message.

    complete: the line typed so far -> the lines that the Tab key may make of it.
    """

    def __init__(self, complete: Callable[[str], list[str]] = lambda line: []) -> None:
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _load_readline() if self._interactive else None
        self._history = History(self._readline) if self._readline is not None else None
        # libedit, which some Pythons have for readline, takes a paste line by line; so does a dumb terminal,
        # which has no codes to say where a paste begins and ends
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
    """Ctrl-Z while a line is typed; the argument is what it holds so far."""


def _edited_line(readline: Any, prompt: str) -> str:
    """input(), but Ctrl-Z gives the shell its terminal as it was, and `fg` shows prompt and text again."""
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
        signal.raise_signal(signal.SIGTSTP)  # here it stops, until `fg`


def _without_fences(block: str) -> str:
    return block.strip().removeprefix(FENCE).removesuffix(FENCE).strip("\n")


def _completer(readline: Any, complete: Callable[[str], list[str]]) -> Callable[[str, int], str | None]:
    """What readline.set_completer takes: the n-th text for the word that the cursor is in."""

    def completer(word: str, n: int) -> str | None:
        line = readline.get_line_buffer()[: readline.get_endidx()]
        if not line.startswith("/"):
            return word + "\t" if n == 0 else None  # in a message the Tab key is a tab
        begin = readline.get_begidx()
        return next(iter([each[begin:] for each in complete(line)][n:]), None)

    return completer


class History:
    """What was typed before, for the arrow keys, here and after a restart.

    An entry goes to the file as soon as there is one, so that no end of the program loses it. Where the file
    cannot be read or written there is none: a read-only home is no reason to complain.
    """

    def __init__(self, readline: Any) -> None:
        self._readline = readline
        self._path = history_path()
        self._last = ""
        readline.set_auto_history(False)  # it would take the lines of a block one by one
        for entry in self._read():
            self._remember(entry)

    def add(self, text: str) -> None:
        """Append `text`, of any number of lines, as one entry, unless it is empty or the last one again."""
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
            pass  # the locale has no such character

    def _read(self) -> list[str]:
        """The entries of the file; one that has grown long is cut to its end."""
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
    """A history file as lines; libedit's own kind begins with a line of its name and has characters in octal."""
    if not data.startswith(LIBEDIT):
        return data
    lines = data.partition(b"\n")[2]
    return re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), lines)


def state_directory() -> Path | None:
    """Where what should outlive a chat is kept; None if there is no home."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "qwen3c"
    except RuntimeError:
        return None


def history_path() -> Path | None:
    """Where lines typed are kept between runs; None if there is no home."""
    directory = state_directory()
    return directory and directory / "history"


def _load_readline() -> Any:
    """The readline module, or None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    return readline
