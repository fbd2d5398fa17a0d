"""No error of printing ends a run."""

from __future__ import annotations

import io
import os
import sys
import time

import pytest

from qwen3c.training import telling
from qwen3c.training.telling import Telling, unheard  # type: ignore[attr-defined]


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    """Made inside the test, because pytest replaces stderr for each phase."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(telling, "PATIENCE", 0.01)
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def wait_for(stream: FakeTerminal, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert text in stream.getvalue()


def test_what_takes_long_is_shown_with_its_seconds_and_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with Telling().doing("reading"):
        wait_for(screen, "reading ... 1 s")
    assert screen.getvalue().endswith("\r\x1b[K") and "\n" not in screen.getvalue()


def test_a_line_takes_the_place_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    words = Telling()
    with words.steps(0):
        words.step(1, 4, "loss 2.0")
        words.say("step 1: judged")
    assert screen.getvalue().endswith("25%  step 1 of 4  loss 2.0  0 s left\r\x1b[Kstep 1: judged\n")


def test_quiet_says_nothing_and_so_do_all_processes_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    for words in (Telling(quiet=True), Telling()):
        with words.doing("reading"), words.steps(0):
            words.step(1, 2)
            words.say("line")
    assert screen.getvalue() == ""


def test_a_terminal_that_is_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
        words = Telling()
        for _ in range(3):
            words.say("does anybody hear?")
            with unheard():
                print("or this?", file=sys.stderr, flush=True)
        os._exit(7)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
