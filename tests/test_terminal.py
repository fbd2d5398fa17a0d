"""At a terminal and elsewhere: messages read, notes and progress shown.

python -m pytest tests/test_terminal.py
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from qwen3c import terminal


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_status_line_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((FakeTerminal(), "\r\x1b[Kbusy\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        status = terminal.StatusLine(delay=0)
        status.show(lambda: "busy")
        status.clear()
        status.clear()
        assert stream.getvalue() == expected
    quick = terminal.StatusLine(delay=100)
    quick.show(lambda: pytest.fail("shown before it takes long"))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ('"""\none\n\ntwo\n"""\nthree', ["one\n\ntwo", "three"]),
        ('"""one\ntwo"""\n', ["one\ntwo"]),
        ('"""one"""\n', ["one"]),
        ('""""""\n', [""]),
        ('"""\nnever closed', ["never closed"]),
        ("", []),
    ],
)
def test_messages_are_lines_or_blocks(
    lines: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    reader, messages = terminal.MessageReader(), []
    while True:
        try:
            messages.append(reader.read())
        except EOFError:
            break
    assert messages == expected


def test_history_goes_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert terminal.history_path() == tmp_path / "qwen3c" / "history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name == "posix":
        assert terminal.history_path() == tmp_path / ".local" / "state" / "qwen3c" / "history"
