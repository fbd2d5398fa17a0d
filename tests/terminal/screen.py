"""A program on a pseudo-terminal, its screen as a person sees it, and keys as a person types them.

    with Terminal([sys.executable, "run.py"], columns=20) as terminal:
        terminal.wait_for("> ")
        terminal.type("hello\\r")

pexpect owns the pseudo-terminal and the child; pyte draws what the child writes. Tests compare the screen,
not the escape codes that made it.
"""

from __future__ import annotations

import os
import signal
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pexpect
import pyte

ROOT = Path(__file__).parents[2]
SHELL = ("bash", "--norc", "--noprofile", "-i")  # for Ctrl-Z and fg, which only a shell gives a meaning
KEYS = {
    "ctrl-c": "\x03", "ctrl-d": "\x04", "ctrl-z": "\x1a", "ctrl-l": "\x0c", "ctrl-a": "\x01",
    "ctrl-u": "\x15",
    "up": "\x1b[A", "down": "\x1b[B", "left": "\x1b[D", "right": "\x1b[C", "tab": "\t", "enter": "\r",
    "backspace": "\x7f",
}  # fmt: skip
PATIENCE = float(os.environ.get("PATIENCE", "60"))  # seconds that a test waits for something before it fails


class _Screen(pyte.HistoryScreen):
    """pyte's screen, which also knows dim text (as a colour) and remembers the lines that were erased."""

    def __init__(self, columns: int, rows: int) -> None:
        self.erased: list[str] = []
        super().__init__(columns, rows, history=100_000)

    def select_graphic_rendition(self, *attributes: int, **options: Any) -> None:
        super().select_graphic_rendition(*attributes, **options)
        if attributes and attributes[-1] in (2, 22):
            self.cursor.attrs = self.cursor.attrs._replace(fg="dim" if attributes[-1] == 2 else "default")

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        line = str(self.display[self.cursor.y]).rstrip()
        if line:
            self.erased.append(line)
        super().erase_in_line(how, private)


class Terminal:
    """A child process on a terminal of `columns` x `rows`.

    env: variables set for the child on top of a small, fixed environment; None as a value removes one.
    raw: every byte that the child wrote, in order.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        columns: int = 80,
        rows: int = 24,
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] = ROOT,
    ) -> None:
        program, *arguments = map(str, command)
        self._screen = _Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._child = pexpect.spawn(
            program,
            arguments,
            env=environment(env),
            cwd=str(cwd),
            dimensions=(rows, columns),
            timeout=PATIENCE,
        )
        self._child.delaybeforesend = None
        self._child.ptyproc.delayafterclose = 0  # by default each child costs 0.1 s, also one that has ended
        self._hung_up = False
        self.raw = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._hung_up and not self._child.ptyproc.terminated:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._child.ptyproc.terminated = self._child.terminated = True
        self._child.close(force=True)

    @property
    def pid(self) -> int:
        return int(self._child.pid)

    @property
    def lines(self) -> list[str]:
        """All lines, scrolled off or on the screen, without trailing blanks."""
        gone = [
            "".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top
        ]
        lines = [line.rstrip() for line in [*gone, *self._screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        """The lines, joined by newlines."""
        return "\n".join(self.lines)

    @property
    def current_line(self) -> str:
        """The line that the cursor is on, without trailing blanks."""
        return str(self._screen.display[self._screen.cursor.y]).rstrip()

    @property
    def erased(self) -> list[str]:
        """What lines showed before they were erased, in order: every state of a line that is drawn again."""
        return self._screen.erased

    def colours(self, text: str) -> set[str]:
        """The foreground colours of `text` where it first stands on the screen; {"default"} if uncoloured.

        Dim text has the colour "dim".
        """
        for y, line in enumerate(self._screen.display):
            x = line.find(text)
            if x >= 0:
                return {self._screen.buffer[y][x + i].fg for i in range(len(text))}
        raise AssertionError(f"{text!r} is not on the screen:\n{self.text}")

    def assert_left_as_found(self) -> None:
        """Assert that typing starts a line, is echoed and uncoloured, and that the cursor is visible."""
        screen = self._screen
        assert screen.cursor.x == 0, f"the cursor is left at column {screen.cursor.x}:\n{self.text}"
        assert screen.cursor.attrs == screen.default_char, f"the next text would be {screen.cursor.attrs}"
        assert not screen.cursor.hidden
        assert self.raw.count(b"\x1b[?2004h") == self.raw.count(b"\x1b[?2004l"), "pastes stay bracketed"
        flags = termios.tcgetattr(self._child.child_fd)[3]
        assert flags & termios.ECHO and flags & termios.ICANON and flags & termios.ISIG

    def read(self) -> None:
        """Draw the output that has arrived."""
        deadline = time.monotonic() + PATIENCE
        while self._draw_next(0.01) and time.monotonic() < deadline:
            pass

    def _draw_next(self, seconds: float) -> bool:
        """Draw the next piece of what the child writes; False if none came within `seconds`."""
        try:
            data = self._child.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return False
        except pexpect.EOF:
            time.sleep(0.005)  # a child that has closed its terminal may take a while to end
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        """Draw until `condition` holds; AssertionError with the screen after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            ended = not self._child.isalive()
            drawn = self._draw_next(0.05)
            if condition():
                return
            if (ended and not drawn) or time.monotonic() > deadline:
                state = f"ended with status {self.status()}" if ended else f"did not within {timeout:g} s"
                raise AssertionError(f"waiting for {what}: the program {state}; the screen:\n{self.text}")

    def wait_for(self, text: str, timeout: float = PATIENCE) -> None:
        """Draw until `text` stands in one line, on the screen or above it."""
        self.wait_until(lambda: any(text in line for line in self.lines), repr(text), timeout)

    def type(self, text: str) -> None:
        """Send `text` as a keyboard does: "\\r" is Enter."""
        self._child.send(text)

    def press(self, *keys: str) -> None:
        """Press keys by name, such as "ctrl-c" (KEYS)."""
        for key in keys:
            self.type(KEYS[key])

    def resize(self, columns: int, rows: int) -> None:
        """Change the window; the child gets SIGWINCH."""
        self._screen.resize(rows, columns)
        self._child.setwinsize(rows, columns)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def hang_up(self) -> None:
        """Close the terminal as a window manager does: the child gets SIGHUP and its streams are gone."""
        self.read()
        pty = self._child.ptyproc
        pty.fileobj.close()
        pty.closed = self._child.closed = self._hung_up = True
        self._child.child_fd = -1

    def finish(self, timeout: float = PATIENCE) -> int:
        """Draw until the child ends; its exit status, or minus the signal that ended it."""
        self.wait_until(lambda: not self._child.isalive(), "the end", timeout)
        self.read()
        return self.status()

    def finish_unseen(self, timeout: float = PATIENCE) -> int:
        """After hang_up(): wait for the child to end; its exit status, or minus the signal that ended it."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._child.ptyproc.terminated = self._child.terminated = True
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                raise AssertionError(f"still running {timeout:g} s after its terminal was closed")
            time.sleep(0.02)

    def status(self) -> int:
        """The exit status of a child that has ended, or minus the signal that ended it."""
        signal_number = self._child.signalstatus
        return -int(signal_number) if signal_number else int(self._child.exitstatus or 0)


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of a person: UTF-8 and a colour terminal, without the caller's variables."""
    kept = {
        name: os.environ[name]
        for name in ("PATH", "HOME", "XDG_STATE_HOME", "QWEN3C_ISA")
        if name in os.environ
    }
    chosen: dict[str, str | None] = {**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8", **(changes or {})}
    return {name: value for name, value in chosen.items() if value is not None}


def run_typed(command: Sequence[str | os.PathLike[str]], **options: Any) -> tuple[int, str, bytes]:
    """Run a command that asks nothing to its end: (exit status, text on the terminal, bytes behind it)."""
    with Terminal(command, **options) as terminal:
        status = terminal.finish()
        return status, terminal.text, terminal.raw
