"""At a terminal and elsewhere: messages read, notes and progress shown.

python -m pytest tests/system/test_terminal.py
"""

from __future__ import annotations

import errno
import io
import sys
import time

import pytest

from qwen3c.system import terminal


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def describe(done: float, total: float, rate: float) -> str:
    return f"{done:g} of {total:g}  {rate:g}/s"


@pytest.mark.parametrize(
    ("done", "seconds", "width", "expected"),
    [
        (0, 0.0, 80, "[                        ]   0%  0 of 200  0/s"),  # nothing is known yet: no time left
        (0, 5.0, 80, "[                        ]   0%  0 of 200  0/s"),
        (100, 0.0, 80, "[############            ]  50%  100 of 200  0/s"),  # a clock that has not moved
        (100, 10.0, 80, "[############            ]  50%  100 of 200  10/s  10 s left"),
        (100, 10.0, 61, "[############            ]  50%  100 of 200  10/s  10 s left"),
        (100, 10.0, 60, " 50%  100 of 200  10/s  10 s left"),
        (100, 10.0, 20, " 50%  10 s left"),
        (100, 10.0, 10, " 50%"),
        (100, 10.0, 0, " 50%  100 of 200  10/s  10 s left"),
        (200, 10.0, 80, "[########################] 100%  200 of 200  20/s  0 s left"),
        (300, 10.0, 80, "[########################] 100%  300 of 200  30/s  0 s left"),  # a source that grew
        (1, 100.0, 0, "  0%  1 of 200  0.01/s  5 h 31 min left"),
        (50, 100.0, 0, " 25%  50 of 200  0.5/s  5 min 00 s left"),
    ],
)
def test_a_progress_line_fits_the_width_and_knows_no_time_left_at_the_start(
    done: int, seconds: float, width: int, expected: str
) -> None:
    assert terminal.progress_line(done, 200, seconds, describe, width) == expected


def test_an_empty_task_is_done() -> None:
    assert terminal.progress_line(0, 0, 0.0, describe, 0) == "100%  0 of 0  0/s"


def test_progress_is_redrawn_on_a_terminal_and_printed_every_ten_seconds_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for stream in (FakeTerminal(), io.StringIO()):
        now = 100.0
        monkeypatch.setattr(sys, "stderr", stream)
        progress = terminal.Progress(describe)
        for second in range(1, 21):
            now = 100.0 + second
            progress(second, 20)
        shown[stream.isatty()] = stream.getvalue()
    assert shown[False].splitlines() == [" 50%  10 of 20  1/s  10 s left", "100%  20 of 20  1/s  0 s left"]
    assert shown[True].count("\r") == 20 and "\n" not in shown[True]


def test_a_status_line_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, expected in ((FakeTerminal(), "\r\x1b[Kbusy\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        status = terminal.StatusLine(delay=0)
        status.show(lambda: "busy")
        status.clear()
        status.clear()
        assert stream.getvalue() == expected
    quick = terminal.StatusLine(delay=100)
    quick.show(lambda: pytest.fail("shown before it takes long"))


def test_the_time_left_is_what_the_caller_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, expected in ((7.0, " 50%  1 of 2  0.25/s  7 s left"), (None, " 50%  1 of 2  0.25/s")):
        line = terminal.progress_line(
            1,
            2,
            4.0,
            describe,
            0,
            predict=lambda done, total, so_far, s=seconds: s,  # type: ignore[misc]
        )
        assert line == expected


def test_control_characters_are_shown_instead_of_obeyed() -> None:
    assert terminal.escaped("a\x1b]0;x\x07\x9b1m\x7f\r\n\té🎉") == (
        r"a\u001b]0;x\u0007\u009b1m\u007f\u000d\u000a\u0009é🎉"
    )
    assert terminal.escaped("\x1b\r\n\t", keep="\n\t") == "\\u001b\\u000d\n\t"


def test_notes_break_between_words_on_a_terminal_and_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "columns", lambda stream: 13)
    monkeypatch.setenv("TERM", "dumb")
    text = "one two-three four\n\n/a/path/of/many/letters \x1b[2J"
    broken = "one\ntwo-three\nfour\n\n/a/path/of/many/letters\n\\u001b[2J\n"
    for stream, expected in (
        (FakeTerminal(), broken),
        (io.StringIO(), text.replace("\x1b", "\\u001b") + "\n"),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.note(text)
        assert stream.getvalue() == expected


def test_a_wait_without_a_measure_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, expected in ((FakeTerminal(), "\r\x1b[Kwriting\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = terminal.Progress(describe, delay=100)
        progress.say("writing")
        progress.clear()
        assert stream.getvalue() == expected


def test_a_line_that_nobody_can_see_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(FakeTerminal):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "the terminal is gone")

    class ClosedPipe(Closed):
        def isatty(self) -> bool:
            return False

    monkeypatch.setenv("TERM", "xterm")
    for stream in (Closed(), ClosedPipe()):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = terminal.Progress(describe, delay=0, pause=0)
        progress(1, 2)
        progress.say("writing")
        progress.clear()
