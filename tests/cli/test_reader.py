"""Messages that are typed: lines, blocks, and the history that outlives the program.

python -m pytest tests/cli/test_reader.py
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from qwen3c.cli import reader


class FakeReadline:
    """The history of GNU readline, as far as History uses it."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def set_auto_history(self, on: bool) -> None:
        assert not on

    def add_history(self, text: str) -> None:
        if "unsayable" in text:
            raise UnicodeEncodeError("ascii", text, 0, 1, "not in this locale")
        self.entries.append(text)


def history_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[reader.History, list[str]]:
    monkeypatch.setattr(reader, "history_path", lambda: path)
    readline = FakeReadline()
    return reader.History(readline), readline.entries


def test_the_history_has_one_entry_for_a_message_of_many_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "history"
    history, entries = history_of(path, monkeypatch)
    for text in ["one", "two\n\nlines \\n é🎉", "two\n\nlines \\n é🎉", " ", "", "unsayable"]:
        history.add(text)
    assert entries == ["one", "two\n\nlines \\n é🎉"]
    assert history_of(path, monkeypatch)[1] == entries  # in the file at once
    assert path.stat().st_mode & 0o077 == 0 or os.name != "posix"


def test_an_older_history_still_loads_and_a_long_one_is_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"a \\040 b\n\nc\xff\n")
    assert history_of(path, monkeypatch)[1] == ["a \\040 b", "c\ufffd"]
    path.write_bytes(b"_HiStOrY_V2_\na\\040b\\303\\251\n")  # the form that libedit writes
    assert history_of(path, monkeypatch)[1] == ["a bé"]
    assert path.read_text() == "a bé\n"  # an entry appended to it would be read back as libedit's
    many = [str(i) for i in range(2 * reader.HISTORY_ENTRIES + 1)]
    path.write_text("\n".join(many) + "\n")
    assert history_of(path, monkeypatch)[1] == many[-reader.HISTORY_ENTRIES :]
    assert path.read_text().split() == many[-reader.HISTORY_ENTRIES :]


def test_a_history_that_cannot_be_kept_is_no_reason_to_complain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "history", tmp_path / "folder", None):
        history, entries = history_of(path, monkeypatch)  # type: ignore[arg-type]
        history.add("one")
        assert entries == ["one"]
    assert capsys.readouterr() == ("", "")


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
    lines_read, messages = reader.MessageReader(), []
    while True:
        try:
            messages.append(lines_read.read())
        except EOFError:
            break
    assert messages == expected


def test_history_goes_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert reader.history_path() == tmp_path / "qwen3c" / "history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name == "posix":
        assert reader.history_path() == tmp_path / ".local" / "state" / "qwen3c" / "history"
