"""-m batch as a person types it: how far it is, interrupted, gone on with, closed; mistakes.

python -m pytest tests/terminal/test_batch.py
"""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest
from modes import SLOWLY, Desk, furnish
from screen import SHELL, Terminal

FILES = ["-m", "batch", "requests.jsonl", "-o", "answers.jsonl"]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    furnish(tmp_path)
    return Desk(tmp_path)


def command(desk: Desk, *more: str, pace: str = "drawn") -> list[str]:
    return [*SLOWLY, pace, "run.py", str(desk.model), "-j", "1", *FILES, *more]


def custom_ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_it_shows_how_far_it_is_and_how_long_it_will_take(desk: Desk) -> None:
    with Terminal(command(desk, "--concurrency", "4"), cwd=desk.folder, columns=100) as terminal:
        assert terminal.finish() == 0, terminal.text
        terminal.assert_left_as_found()
        shown = [line for line in terminal.erased if "of 24 answers" in line]
        assert any(
            re.search(r"\d+%  \d+ of 24 answers  [\d.]+ a second  \d+ s left$", line) for line in shown
        )
        assert re.match(r"24 answers in answers.jsonl \| prompts \d+ tok \(\d+ cached\)", terminal.lines[-1])
    assert custom_ids(desk.folder / "answers.jsonl") == [f"{i}" for i in range(24)]


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(desk: Desk) -> None:
    part = desk.folder / "answers.jsonl.part"
    with Terminal(command(desk, "--concurrency", "2"), cwd=desk.folder, columns=120) as terminal:
        terminal.wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") > 4, "answers")
        terminal.press("ctrl-c")
        assert terminal.finish(timeout=10) == 130
        terminal.assert_left_as_found()
        kept = re.fullmatch(
            r"run.py: interrupted; (\d+) of 24 answers are in answers.jsonl.part, "
            r"with which the same command goes on",
            terminal.lines[-1],
        )
        assert kept and "^C" not in terminal.text and "Traceback" not in terminal.text
    with Terminal(command(desk, pace="quick"), cwd=desk.folder, columns=120) as terminal:
        assert terminal.finish() == 0, terminal.text
        assert f"answers.jsonl.part: {kept[1]} of 24 answers are there" in terminal.lines
        assert f"| {kept[1]} were there |" in terminal.lines[-1]
    assert custom_ids(desk.folder / "answers.jsonl") == [f"{i}" for i in range(24)] and not part.exists()


def test_a_closed_terminal_keeps_what_is_answered(desk: Desk) -> None:
    part = desk.folder / "answers.jsonl.part"
    with Terminal(command(desk, "--concurrency", "2"), cwd=desk.folder) as terminal:
        terminal.wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") > 2, "answers")
        terminal.hang_up()
        terminal.finish_unseen(timeout=10)
    assert part.read_bytes().count(b"\n") > 2 and part.read_bytes().endswith(b"\n")


def test_a_suspended_run_goes_on_in_the_foreground(desk: Desk) -> None:
    with Terminal(SHELL, cwd=desk.folder, env={"PS1": "$ "}, columns=200) as shell:
        shell.wait_for("$")
        shell.type(shlex.join(command(desk, "--concurrency", "8")) + "\r")
        shell.wait_until((desk.folder / "working").exists, "work")
        shell.press("ctrl-z")
        shell.wait_for("Stopped")
        held = (desk.folder / "answers.jsonl.part").read_bytes()
        time.sleep(0.2)
        assert (desk.folder / "answers.jsonl.part").read_bytes() == held
        shell.type("fg\r")
        shell.wait_until((desk.folder / "answers.jsonl").exists, "the answers")
        assert "Traceback" not in shell.text
    assert custom_ids(desk.folder / "answers.jsonl") == [f"{i}" for i in range(24)]


def test_a_mistake_is_one_line(desk: Desk) -> None:
    (desk.folder / "requests.jsonl").write_text('{"custom_id": "a"}\n{"custom_id": "a"}\n')
    with Terminal(command(desk, pace="quick"), cwd=desk.folder, columns=120) as terminal:
        assert terminal.finish() == 2
        assert terminal.lines == ["run.py: error: requests.jsonl, line 2: custom_id 'a' is that of line 1"]
