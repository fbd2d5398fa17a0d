"""What every part of the program says to a person while it works: notes, status lines, progress.

stdout is left to model text; what is said here goes to stderr. Any of the streams may be a terminal,
a file, a pipe that closes early, or not be there at all.
"""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

DIM, RESET, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
# C0, DEL and C1: a terminal acts on them instead of showing them
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
BAR_WIDTH = 24
REPORT_WIDTH = 79  # columns of what is printed as a page: a terminal of 80 keeps the last one free
DRAWN_EVERY = 0.1  # seconds between two drawings of a line


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


def abandon_closed_streams() -> None:
    """Point each closed standard stream at the null device, or the flush at exit would fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _lead_nowhere(stream)


@contextmanager
def unheard() -> Iterator[None]:
    """Within, a closed stderr is no error: from the first failure on, what is written to it is dropped."""
    try:
        yield
    except BlockingIOError:
        pass  # the reader is slow, not gone
    except OSError:
        _lead_nowhere(sys.stderr)


def _lead_nowhere(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def write_at_once(line: str) -> None:
    """Write a line of its own to stderr from a signal handler, which may have interrupted another line."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())


def has_colour(stream: TextIO) -> bool:
    """Whether text on `stream` may be written dim, by escape codes."""
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def escaped(text: str, keep: str = "") -> str:
    """`text` with its control characters as JSON writes them (\\u001b), but for those in `keep`.

    For text of a file or a model on its way to a terminal, where it must not move the cursor or worse.
    """
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


def visible(text: str) -> str:
    """`text` with whatever a screen acts on, or does not show, as \\uXXXX, but for newlines and tabs."""
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else f"\\u{ord(letter):04x}"
        for letter in text
    )


def note(text: str) -> None:
    """Print `text` on stderr; on a terminal its lines break between words."""
    text = escaped(text, keep="\n\t")
    if sys.stderr.isatty():
        text = "\n".join(wrapped(text, max(columns(sys.stderr) - 1, 1)))
    print(f"{DIM}{text}{RESET}" if has_colour(sys.stderr) else text, file=sys.stderr, flush=True)


def wrapped(text: str, width: int = REPORT_WIDTH, indent: int = 0) -> list[str]:
    """`text` as lines of at most `width` columns; continuation lines are indented.

    A word longer than `width`, such as a path, stays whole, so that it can be copied.
    """
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )
    return [part for line in text.split("\n") for part in wrapper.wrap(line) or [""]]


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
    """Write to stderr; failure is ignored. A closed terminal ends the program by SIGHUP, not by this."""
    with unheard():
        print(text, end="", file=sys.stderr, flush=True)


class StatusLine:
    """One line on stderr, drawn again while something takes time, and cut to the width of the terminal.

    It is drawn on a terminal only. delay: seconds before it appears. interval: seconds between two drawings.
    """

    def __init__(self, delay: float = 0.5, interval: float = DRAWN_EVERY) -> None:
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
            # the last column stays free: in it the terminal would wrap, and the line could not be redrawn
            line = text[: max(columns(sys.stderr) - 1, 1)]
            _draw(CLEAR_LINE + line)

    def clear(self) -> None:
        """Erase what was drawn."""
        if self._shown:
            self._shown = False
            _draw(CLEAR_LINE)


def at_this_rate(done: float, total: float, seconds: float) -> float | None:
    """Seconds left if the rest is as fast as what was done in `seconds`; None while nothing is done."""
    return max(total - done, 0) * seconds / done if done > 0 and seconds > 0 else None


def _with_seconds(what: str, seconds: float) -> str:
    return f"{what}  {seconds:.0f} s"


@contextmanager
def waiting(
    what: str,
    *,
    delay: float = 1.0,
    reminder: float | None = None,
    words: Callable[[str, float], str] = _with_seconds,
) -> Iterator[None]:
    """While the block runs, a status line such as "loading model.bin  3 s", from `delay` seconds on.

    A thread draws it, because what takes long in the block is one call. The block itself must print nothing.
    reminder: seconds between two lines that are printed where nothing can be redrawn; None: there are none.
    words: (what, seconds so far) -> the line.
    """
    begin, ended = time.monotonic(), threading.Event()
    redraws = can_redraw(sys.stderr)
    status = StatusLine(delay)

    def line() -> str:
        return words(what, time.monotonic() - begin)

    def draw_on() -> None:
        pause = DRAWN_EVERY if redraws else reminder
        while not ended.wait(pause):
            if redraws:
                status.show(line)
            else:
                _draw(line() + "\n")

    status.show(line)
    thread: threading.Thread | None = None
    if redraws or reminder is not None:
        thread = threading.Thread(target=draw_on, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            thread = None  # no thread can be started: wait in silence
    try:
        yield
    finally:
        ended.set()
        if thread:
            thread.join()
        status.clear()


class Progress:
    """How far a long task is: call it with (done, total) as often as you like.

    On a terminal it is a StatusLine; elsewhere a line of its own every `pause` seconds.
    describe: (done, total, done per second) -> the words between the percentage and the time left.
    predict: (done, total, seconds so far) -> seconds left, or None while that is unknown.
    start: what an earlier run has done already; it does not count towards the speed.
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
        """Draw `text` in place of the progress, before a wait of unknown length."""
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

    What does not fit is left out: first the bar, then the words. width 0: a line without a bar. See Progress.
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
