"""How replies are shown: thoughts dim, between tags or not at all; the answer always as it is.

python -m pytest tests/test_output.py
"""

from __future__ import annotations

import io
import sys

import pytest

from qwen3c.generate import Event
from qwen3c.output import ReplyWriter

THOUGHT = [Event(1, "hm", True), Event(2, "", True), Event(3, " so", True), Event(4, "yes", False)]
TOOL = Event(5, "", False, tool_call={"name": "f", "arguments": {"a": "é"}})


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(
    events: list[Event], monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO, hide: bool = False
) -> str:
    monkeypatch.setattr(sys, "stdout", stdout)
    writer = ReplyWriter(hide)
    for event in events:
        writer.add(event)
    writer.end(None)  # type: ignore[arg-type]
    return stdout.getvalue()


def test_thoughts_are_dim_on_a_terminal_and_between_tags_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert shown(THOUGHT, monkeypatch, FakeTerminal()) == "\x1b[2mhm so\x1b[0m\n\nyes\n"
    assert shown(THOUGHT, monkeypatch, io.StringIO()) == "<think>\nhm so\n</think>\n\nyes\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(THOUGHT, monkeypatch, FakeTerminal()) == "<think>\nhm so\n</think>\n\nyes\n"


def test_hidden_thoughts_leave_a_note_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(THOUGHT, monkeypatch, io.StringIO(), hide=True) == "yes\n"
    assert capsys.readouterr().err == "(thinking, not shown)\n"


def test_the_terminal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert shown(THOUGHT[:1], monkeypatch, FakeTerminal()) == "\x1b[2mhm\x1b[0m\n\n"
    assert shown([Event(1, "a\n", False)], monkeypatch, io.StringIO()) == "a\n"
    assert shown([], monkeypatch, io.StringIO()) == ""


def test_tool_calls_are_shown_as_the_model_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
    assert shown([TOOL], monkeypatch, io.StringIO()) == expected
