"""How replies are shown: thoughts dim, between tags or not at all; the answer always as it is.

python -m pytest tests/cli/test_output.py
"""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3c.cli.output import JsonWriter, Reading, ReplyWriter, cost_by_depth, speed_line
from qwen3c.drivers.reply import Event, Reply, Stats

THOUGHT = [Event(1, "hm", True), Event(2, "", True), Event(3, " so", True), Event(4, "yes", False)]
TOOL = Event(5, "", False, tool_calls=({"name": "f", "arguments": {"a": "é"}},))


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


def test_control_characters_of_a_model_reach_a_pipe_and_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    hostile = "a\x1b]0;b\x07\x9b\r\n\té"
    said = [Event(1, hostile, False)]
    assert shown(said, monkeypatch, io.StringIO()) == hostile + "\n"
    assert shown(said, monkeypatch, FakeTerminal()) == "a\\u001b]0;b\\u0007\\u009b\\u000d\n\té\n"
    called = [Event(1, "", False, tool_calls=({"name": "\x9b2J"},))]
    assert "\x9b" in shown(called, monkeypatch, io.StringIO())
    assert '{"name": "\\u009b2J"}' in shown(called, monkeypatch, FakeTerminal())


def test_json_on_a_terminal_is_the_same_json_without_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hostile = "a\x1b\x9b\x7fé"
    generation: Any = SimpleNamespace(reply=Reply(text=hostile))
    lines = []
    for stream in (io.StringIO(), FakeTerminal()):
        monkeypatch.setattr(sys, "stdout", stream)
        JsonWriter(str).end(generation)
        lines.append(stream.getvalue())
        assert json.loads(lines[-1])["text"] == hostile and lines[-1].endswith("}\n")
    assert "\x9b" in lines[0] and not set("\x1b\x7f\x9b") & set(lines[1])


def reply_of(context: int = 4096, held: int = 337, **stats: Any) -> Any:
    session = SimpleNamespace(context=context, tokens=[0] * held)
    return SimpleNamespace(stats=Stats(**stats), session=session)


FINISHED: dict[str, Any] = {"seed": 3141592653, "prompt_tokens": 300, "cached_tokens": 100,
                            "read_tokens": 200, "prefill_seconds": 1.0,
            "generated_tokens": 37, "decode_seconds": 1.0, "finish_reason": "length"}  # fmt: skip


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (1000, "prompt 300 tok 200 tok/s (100 cached) | reply 37 tok 36.0 tok/s | context 337/4096 | seed "
            "3141592653 | cut at max tokens (-n)"),
        (120, "prompt 300 tok 200 tok/s (100 cached) | reply 37 tok 36.0 tok/s | context 337/4096 | cut at "
            "max tokens (-n)"),
        (99,
         "prompt 300 tok 200 tok/s | reply 37 tok 36.0 tok/s | context 337/4096 | cut at max tokens (-n)"),
        (79, "prompt 300 tok 200 tok/s | reply 37 tok 36.0 tok/s | cut at max tokens (-n)"),
        (70, "reply 37 tok 36.0 tok/s | cut at max tokens (-n)"),
        (10, "reply 37 tok 36.0 tok/s | cut at max tokens (-n)"),
    ],
)  # fmt: skip
def test_the_speed_line_leaves_out_what_matters_least(width: int, line: str) -> None:
    assert speed_line(reply_of(**FINISHED), width) == line


def test_the_longest_speed_line_fits_100_columns() -> None:
    huge = {"prompt_tokens": 131072, "cached_tokens": 100000, "read_tokens": 10000, "generated_tokens": 10000}
    generation = reply_of(context=131072, held=131072, **FINISHED | huge)
    for width in (79, 99):
        assert len(speed_line(generation, width)) <= width
    assert "prompt 110000 of 131072 tok 10000 tok/s | reply 10000 tok 9999 tok/s" in speed_line(
        generation, 99
    )


def test_the_speed_line_of_a_stopped_prompt_tells_what_was_read() -> None:
    stopped = {"prompt_tokens": 20000, "cached_tokens": 0, "read_tokens": 2688, "prefill_seconds": 27.0,
               "generated_tokens": 0, "finish_reason": "cancelled"}  # fmt: skip
    for width in (1000, 10):
        line = speed_line(reply_of(held=2688, **FINISHED | stopped), width)
        assert line.startswith("prompt 2688 of 20000 tok 99.6 tok/s | ") and line.endswith("stopped")
        assert "reply" not in line
    unread = stopped | {"read_tokens": 0, "prefill_seconds": 0.0}
    assert speed_line(reply_of(**FINISHED | unread), 10) == "prompt 0 of 20000 tok | stopped"


def test_a_reply_of_one_token_has_no_rate() -> None:
    one = FINISHED | {"generated_tokens": 1, "decode_seconds": 0.001}
    assert "| reply 1 tok | context" in speed_line(reply_of(**one))


def test_the_speed_line_tells_of_tokens_that_came_several_a_pass() -> None:
    drafted = FINISHED | {"decode_passes": 10, "drafted_tokens": 40, "accepted_tokens": 30}
    passes = f"({(FINISHED['generated_tokens'] - 1) / 10:.1f} tokens a pass) | context"
    assert passes in speed_line(reply_of(**drafted))
    assert "a pass" not in speed_line(reply_of(**FINISHED | {"decode_passes": 10, "drafted_tokens": 9}))


@pytest.mark.parametrize(("a", "b"), [(1e-3, 2e-7), (1e-3, 0.0), (0.0, 1e-6)])
def test_the_cost_of_depth_is_found(a: float, b: float) -> None:
    pieces = [(256.0, depth, a + b * depth) for depth in (128.0, 384.0, 640.0, 896.0)]
    assert cost_by_depth(pieces) == pytest.approx((a, b), abs=1e-12)


def test_neither_part_of_the_cost_is_negative() -> None:
    faster = [(64.0, 32.0, 2e-3), (256.0, 192.0, 1e-3), (256.0, 448.0, 1e-3)]  # a cold start
    assert cost_by_depth(faster)[1] == 0.0 and cost_by_depth(faster)[0] > 1e-3
    steep = [(1.0, 10.0, 1e-9), (1.0, 20.0, 1.0)]
    assert min(cost_by_depth(steep)) >= 0.0
    assert cost_by_depth([(64.0, 32.0, 1e-3)]) == (1e-3, 0.0)


def test_the_time_left_of_a_prompt_knows_that_depth_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that cost 1 ms + 1 us of depth: 10,000 of 20,000 take 60 s, the rest 160 s, not 60."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    monkeypatch.setattr("qwen3c.system.terminal.columns", lambda stream: 120)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    reading, stats, lines = Reading(), Stats(prompt_tokens=20000), {}
    for done in range(250, 10001, 250):
        stats.read_tokens, stats.prefill_seconds = done, 1e-3 * done + 1e-6 * done**2 / 2
        clock[0] = 1 + done
        reading(stats, done, 20000)
        lines[done] = sys.stderr.getvalue().rpartition("\x1b[K")[2]  # type: ignore[union-attr]
    assert lines[10000].startswith("[############            ]  50%  reading 10000 of 20000 tok  167 tok/s  ")
    assert lines[10000].endswith("  2 min 40 s left")
    assert "left" not in lines[1750] and lines[2000].endswith(
        "3 min 36 s left"
    )  # with less of the prompt read, no time left is predicted
