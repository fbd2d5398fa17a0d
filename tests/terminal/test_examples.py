"""The scripts of examples/ as a person types them.

python -m pytest tests/terminal/test_examples.py
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from screen import ROOT, SHELL, Terminal
from small_models import TINY_QWEN3

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
FOUND: dict[str, str | None] = {"PYTHONPATH": str(ROOT)}
PLAIN: dict[str, str | None] = {"TERM": "dumb", "NO_COLOR": "1", "LANG": "C"}

every_example = pytest.mark.parametrize("name", EXAMPLES)


def command(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(TINY_QWEN3)]


def words(text: str) -> str:
    """Without blanks, and without the speed, which is never the same twice."""
    return re.sub(r"\d+ a second", "", re.sub(r"[ \n]+", "", text).replace("asecond", " a second"))


@every_example
def test_an_example_says_the_same_on_every_terminal_and_in_every_width(name: str, tmp_path: Path) -> None:
    screens = [usual_screen(name)]
    kinds: list[tuple[int, dict[str, str | None]]] = [(20, {}), (80, PLAIN)]
    for columns, kind in kinds:
        with Terminal(command(name), columns=columns, env=FOUND | kind, cwd=tmp_path) as terminal:
            screens.append(screen_at_end(terminal))
    assert len(screens[0]) > 50 and set(screens) == {screens[0]}
    assert not list(tmp_path.iterdir())


@every_example
def test_an_example_in_a_pipe_prints_what_it_prints_on_a_terminal(name: str, tmp_path: Path) -> None:
    for redirection in ("| cat", "< /dev/null 2> err"):
        shell = ["sh", "-c", f"{shlex.join(command(name))} {redirection}"]
        with Terminal(shell, env=FOUND, cwd=tmp_path) as terminal:
            assert screen_at_end(terminal) == usual_screen(name)
    assert (tmp_path / "err").read_text() == ""


@functools.cache
def usual_screen(name: str) -> str:
    """What an example leaves on a usual terminal."""
    with Terminal(command(name), env=FOUND) as terminal:
        return screen_at_end(terminal)


def screen_at_end(terminal: Terminal) -> str:
    """The words of an example that ends well and draws nothing."""
    assert terminal.finish() == 0, terminal.text
    terminal.assert_left_as_found()
    assert "Traceback" not in terminal.text and b"\x1b" not in terminal.raw
    return words(terminal.text)


@every_example
def test_ctrl_c_and_a_closed_terminal_end_an_example_at_once(name: str, tmp_path: Path) -> None:
    """They are plain Python scripts: Ctrl-C is Python's own KeyboardInterrupt, from wherever it was."""
    for how, signals in (("ctrl-c", (signal.SIGINT,)), ("closed", (signal.SIGHUP,))):
        with Terminal(held(name), env=FOUND, cwd=tmp_path) as terminal:
            terminal.wait_for("held")
            if how == "ctrl-c":
                terminal.press("ctrl-c")
                status = terminal.finish(timeout=10)
                terminal.assert_left_as_found()
                assert terminal.lines[-1] == "KeyboardInterrupt"
            else:
                terminal.hang_up()
                status = terminal.finish_unseen(timeout=10)
                with pytest.raises(ProcessLookupError):
                    os.killpg(terminal.pid, 0)
            assert -status in signals
    assert not list(tmp_path.iterdir())


@every_example
def test_ctrl_z_fg_and_another_width_change_nothing(name: str, tmp_path: Path) -> None:
    with Terminal(SHELL, env=FOUND | {"PS1": "$ "}, cwd=tmp_path, columns=200, rows=200) as shell:
        shell.type(shlex.join(held(name)) + "\r")
        shell.wait_until(lambda: "held" in shell.lines, "the example at work")
        shell.press("ctrl-z")
        shell.wait_for("Stopped")
        shell.resize(60, 200)
        shell.type("touch go; fg\r")
        shell.type("echo status=$?\r")
        shell.wait_until(lambda: "status=0" in shell.lines, "the end")
        assert "Traceback" not in shell.text


def held(name: str) -> list[str]:
    """The example, which holds once the model is open, until a file `go` is there."""
    program = (
        "import os, runpy, sys, time, qwen3c, qwen3c.model as m\n"
        "class Held(m.Model):\n"
        "    def __init__(self, *args):\n"
        "        super().__init__(*args); print('held', flush=True)\n"
        "        while not os.path.exists('go'): time.sleep(0.01)\n"
        "m.Model = qwen3c.Model = Held\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-c", program, *command(name)[1:]]
