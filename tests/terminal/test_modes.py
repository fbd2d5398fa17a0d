"""generate, trace, info, perplexity, bench and batch as a person types them: on any terminal, in any pipe,
interrupted, suspended, resized, closed.

python -m pytest tests/terminal/test_modes.py
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modes import MODES, PROMPT, Desk, furnish, one_thread
from screen import ROOT, SHELL, Terminal, run_typed

from qwen3c import Model

SGR = re.compile(rb"\x1b\[[\d;]*m")  # colours and the like
SLOW = [
    "generate",
    "perplexity",
    "info --verify",
    "bench",
    "trace --html",
    "batch",
]  # take long with a large model
# modes that take long show what they do; flags that make them long enough for several drawings
DRAWN_LONG = {"generate": ["--file", "text.txt"], "trace --html": ["-n", "40"]}
# where what it measures for seconds is not what is tested, its figures are made up; where it may take as long
# as a status line waits, there is none
PACE = {"bench": "quick", "batch": "quiet"}
SPEED = re.compile(r"(?:promptN|replyN).*$")  # in words(): the last line of a reply

Usual = Callable[[str], tuple[str, bytes]]
every_mode = pytest.mark.parametrize("mode", MODES)
every_slow_mode = pytest.mark.parametrize("mode", SLOW)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    furnish(tmp_path)
    return Desk(tmp_path)


def type_mode(desk: Desk, mode: str, *, columns: int = 80, **options: Any) -> tuple[str, bytes]:
    """Type a mode that must succeed and leave the terminal as it was: (text on the terminal, bytes behind
    it).
    """
    command = desk.command(mode, pace=PACE.get(mode, ""))
    with Terminal(command, columns=columns, cwd=desk.folder, **options) as t:
        status = t.finish()
        t.assert_left_as_found()
        assert status == 0 and "Traceback" not in t.text, t.text
        return t.text, t.raw


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Usual:
    """type_mode() of a mode on a usual terminal, typed once for all tests."""

    @functools.cache
    def typed(mode: str) -> tuple[str, bytes]:
        desk = Desk(tmp_path_factory.mktemp("usual"))
        furnish(desk.folder)
        return type_mode(desk, mode)

    return typed


def words(text: str) -> str:
    """Text without what depends on width and clock: no blanks, no rules, every number as N."""
    return re.sub(r"\d[\d.,]*", "N", re.sub(r"[\s:-]+", "", text))


# ----------------------------------------------------------------------------
# Kinds of terminals


def said_and_speed(words: str) -> tuple[str, list[str]]:
    """(words() without the speed line, the parts of that line, which drops parts that do not fit)."""
    speed = SPEED.search(words)
    return SPEED.sub("", words), speed[0].split("|") if speed else []


@every_mode
def test_every_mode_ends_well_at_80_and_at_20_columns_and_says_the_same(
    desk: Desk, mode: str, usual: Usual
) -> None:
    said, parts = said_and_speed(words(usual(mode)[0]))
    said_narrow, parts_narrow = said_and_speed(words(type_mode(desk, mode, columns=20)[0]))
    assert len(said) > 20 and said_narrow == said
    assert bool(parts) == (mode == "generate")
    assert parts_narrow == [part for part in parts if part in parts_narrow]
    assert parts[-2:] == parts_narrow[-2:], (
        "how long the reply is and why it ended stands there in every width"
    )


@every_mode
def test_a_dumb_terminal_gets_no_escape_code(desk: Desk, mode: str, usual: Usual) -> None:
    text, raw = type_mode(desk, mode, env={"TERM": "dumb"})
    assert b"\x1b" not in raw and "\r" not in raw.decode().replace("\r\n", "")
    assert words(text) == words(usual(mode)[0])


@every_mode
def test_no_color_is_no_colour_and_nothing_else(desk: Desk, mode: str, usual: Usual) -> None:
    _, plain = type_mode(desk, mode, env={"NO_COLOR": "1"})
    _, coloured = usual(mode)
    assert not SGR.search(plain)
    assert words(SGR.sub(b"", coloured).decode()) == words(plain.decode())


@pytest.mark.parametrize("mode", ["generate", "trace", "info --verify"])
def test_notes_are_dim_and_answers_are_not(desk: Desk, mode: str) -> None:
    with Terminal(desk.command(mode), cwd=desk.folder, rows=200, columns=200) as terminal:
        assert terminal.finish() == 0
        note, answer = {
            "generate": ("KV f16", "  #"),
            "trace": ("KV f16", "lm_head"),
            "info --verify": ("match", "n_layers"),
        }[mode]
        assert terminal.colours(note) == {"dim"}
        assert terminal.colours(answer) == {"default"}


@every_mode
@pytest.mark.parametrize("locale", ["C", "ascii"])
def test_a_plain_locale_shows_what_it_can(desk: Desk, mode: str, locale: str) -> None:
    """ascii: what an old system makes of LANG=C, where Python has no UTF-8 to fall back on."""
    env: dict[str, str | None] = {"LANG": "C"}
    if locale == "ascii":
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    _, raw = type_mode(desk, mode, env=env)
    assert locale == "C" or max(raw) < 128


@every_mode
def test_each_stream_may_be_a_pipe_alone(desk: Desk, mode: str) -> None:
    # as wide as a file, where the speed line is whole
    whole = words(type_mode(desk, mode, columns=200)[0])
    command = shlex.join(desk.command(mode, pace=PACE.get(mode, "")))
    for redirection in ("< file", "2> file", "> file"):
        (desk.folder / "file").write_text("")
        status, text, _ = run_typed(["sh", "-c", f"{command} {redirection}"], cwd=desk.folder, columns=200)
        hidden = (desk.folder / "file").read_text()
        assert status == 0 and "Traceback" not in text + hidden
        assert "\x1b" not in hidden and "\r" not in hidden
        # what is not on the screen is in the file
        assert sorted(words(text) + words(hidden)) == sorted(whole)


def test_a_reader_that_has_had_enough_is_no_error(desk: Desk) -> None:
    for mode in ("trace", "info"):
        _, text, _ = run_typed(["sh", "-c", shlex.join(desk.command(mode)) + " | head -1"], cwd=desk.folder)
        assert "error" not in text and "Traceback" not in text


# ----------------------------------------------------------------------------
# Work that takes long


@every_slow_mode
@pytest.mark.parametrize("columns", [20, 80])
def test_progress_leaves_nothing_behind(desk: Desk, mode: str, columns: int) -> None:
    screens = {}
    more = DRAWN_LONG.get(mode, [])
    for drawn in (False, True):
        with Terminal(
            desk.command(mode, *more, pace="drawn" if drawn else "undrawn"), cwd=desk.folder, columns=columns
        ) as terminal:
            assert terminal.finish() == 0, terminal.text
            terminal.assert_left_as_found()
            screens[drawn] = words(terminal.text)
            assert drawn == bool(terminal.erased)
            # the last column stays free
            assert all(len(line) < columns for line in terminal.erased)
    assert screens[True] == screens[False]


@every_slow_mode
def test_a_dumb_terminal_sees_no_progress_in_place(desk: Desk, mode: str) -> None:
    command = desk.command(mode, *DRAWN_LONG.get(mode, []), pace="drawn")
    status, text, raw = run_typed(command, cwd=desk.folder, env={"TERM": "dumb"})
    assert status == 0 and b"\x1b" not in raw and "Traceback" not in text
    assert b"\r" not in raw.replace(b"\r\n", b"")


@every_slow_mode
def test_a_window_made_smaller_gets_shorter_lines(desk: Desk, mode: str) -> None:
    command = desk.command(mode, *DRAWN_LONG.get(mode, []), pace="drawn")
    with Terminal(command, cwd=desk.folder, columns=100) as terminal:
        wait_for_work(terminal, desk)
        terminal.wait_until(lambda: terminal.erased, "progress")
        terminal.resize(20, 24)
        seen = len(terminal.erased)
        terminal.wait_until(lambda: len(terminal.erased) > seen + 2, "progress in a narrow window")
        assert terminal.finish() == 0, terminal.text
        terminal.assert_left_as_found()
        # two lines may have been on their way
        assert all(len(line) < 20 for line in terminal.erased[seen + 2 :])


@every_slow_mode
def test_ctrl_c_ends_it_at_once_and_leaves_the_terminal_as_it_was(desk: Desk, mode: str) -> None:
    with interrupted(desk, mode) as terminal:
        assert terminal.finish(timeout=10) == 130, terminal.text
        terminal.assert_left_as_found()
        assert "Traceback" not in terminal.text
        assert not terminal.erased or terminal.erased[-1] not in terminal.lines
    assert not (desk.folder / "page.html").exists() and not list(desk.folder.glob(".*"))


def test_text_that_came_before_ctrl_c_stays(desk: Desk) -> None:
    model = Model(str(desk.model), threads=1)
    events = model.generate(model.tokenizer.encode(PROMPT), 12, seed=1)
    first = "".join(event.text for event in events).split("\n")[0]
    command = desk.command("generate", "-n", "1500", pace="drawn")
    with Terminal(command, cwd=desk.folder, columns=200) as terminal:
        terminal.wait_for(first)
        terminal.press("ctrl-c")
        assert terminal.finish(timeout=10) == 130
        terminal.assert_left_as_found()
        assert any(line.startswith(first) for line in terminal.lines)
        # how fast it was is said after what there is of it
        assert "tok/s" in terminal.lines[-1] and "^C" not in terminal.lines[-1]


@every_slow_mode
def test_ctrl_z_and_fg_go_on_where_it_was(desk: Desk, mode: str) -> None:
    with Terminal(SHELL, cwd=desk.folder, env={"PS1": "$ "}, columns=200, rows=200) as shell:
        start(shell, desk, mode)
        shell.press("ctrl-z")
        shell.wait_for("Stopped")
        shell.type("fg\r")
        shell.wait_for("run.py", timeout=10)
        shell.type("echo status=$?\r")  # typed ahead, while it works
        shell.wait_until(lambda: "status=0" in shell.lines, "the end")
        assert "Traceback" not in shell.text


@every_slow_mode
def test_keys_typed_meanwhile_are_the_shell_s(desk: Desk, mode: str) -> None:
    with Terminal(SHELL, cwd=desk.folder, env={"PS1": "$ "}, columns=200, rows=200) as shell:
        start(shell, desk, mode)
        shell.type("echo ty''ped\r")
        shell.press("up", "left", "tab")
        shell.wait_until(lambda: "typed" in shell.lines, "what was typed ahead")
        assert "Traceback" not in shell.text


@every_slow_mode
def test_a_closed_terminal_ends_it(desk: Desk, mode: str) -> None:
    """Soon, without a traceback, a core, or a process that stays."""
    command = shlex.join(desk.command(mode, *long_enough(mode), pace="drawn"))
    with Terminal(["sh", "-c", f"ulimit -c unlimited; exec {command} 2> err"], cwd=desk.folder) as terminal:
        wait_for_work(terminal, desk)
        terminal.hang_up()
        status = terminal.finish_unseen(timeout=10)
        assert status == -signal.SIGHUP or status in (0, 1, 128 + signal.SIGHUP, 128 + signal.SIGPIPE), status
        with pytest.raises(ProcessLookupError):
            os.killpg(terminal.pid, 0)
    assert "Traceback" not in (desk.folder / "err").read_text()
    assert sorted(path.name for path in desk.folder.iterdir()) == [
        "err",
        "requests.jsonl",
        "text.txt",
        "working",
    ]


@pytest.mark.parametrize("script", ["run.py", "export.py", "train.py"])
def test_ctrl_c_while_modules_load_is_no_traceback(desk: Desk, script: str) -> None:
    """As on a machine that reads them from a slow disk."""
    (desk.folder / "argparse.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(30)\n")
    env = {"PYTHONPATH": str(desk.folder)}
    with Terminal([sys.executable, str(ROOT / script), "--help"], cwd=desk.folder, env=env) as terminal:
        terminal.wait_for("loading")
        terminal.press("ctrl-c")
        assert terminal.finish(timeout=10) in (-signal.SIGINT, 130)
        assert "Traceback" not in terminal.text


def long_enough(mode: str) -> list[str]:
    """Flags with which a mode takes until somebody stops it."""
    flags = {"generate": ["-n", "1500"], "trace --html": ["-n", "200"], "batch": ["--concurrency", "1"]}
    return flags.get(mode, [])


def start(shell: Terminal, desk: Desk, mode: str) -> None:
    shell.wait_for("$")
    shell.type("clear; " + shlex.join(desk.command(mode, pace="drawn")) + "\r")
    wait_for_work(shell, desk)


def wait_for_work(terminal: Terminal, desk: Desk) -> None:
    """Draw until the command has begun with what takes long: slowly.py leaves a file then."""
    terminal.wait_until((desk.folder / "working").exists, "work")


def interrupted(desk: Desk, mode: str) -> Terminal:
    terminal = Terminal(desk.command(mode, *long_enough(mode), pace="drawn"), cwd=desk.folder)
    wait_for_work(terminal, desk)
    time.sleep(0.1)
    terminal.press("ctrl-c")
    return terminal


# ----------------------------------------------------------------------------
# Text from the terminal


@pytest.mark.parametrize("mode", ["generate", "trace", "perplexity"])
def test_text_may_be_typed_until_ctrl_d(desk: Desk, mode: str) -> None:
    with Terminal(reading(desk, mode), cwd=desk.folder, columns=200, rows=200) as terminal:
        terminal.wait_for("Ctrl-D")
        terminal.type("def add(a, b):\r    return a\r")
        terminal.press("ctrl-d")
        assert terminal.finish() == 0, terminal.text
        terminal.assert_left_as_found()
        assert "Traceback" not in terminal.text and len(terminal.lines) > 3


@pytest.mark.parametrize("mode", ["generate", "trace", "perplexity"])
@pytest.mark.parametrize(("key", "status"), [("ctrl-d", 2), ("ctrl-c", 130)])
def test_nothing_typed_is_an_error_and_ctrl_c_leaves(desk: Desk, mode: str, key: str, status: int) -> None:
    with Terminal(reading(desk, mode), cwd=desk.folder) as terminal:
        terminal.wait_for("Ctrl-D")
        terminal.press(key)
        assert terminal.finish(timeout=10) == status, terminal.text
        assert "Traceback" not in terminal.text
        assert terminal.text.count("error") == (status == 2)


def reading(desk: Desk, mode: str) -> list[str]:
    """A command that takes its text from stdin."""
    options = {
        "generate": ["-m", "generate", "-n", "8"],
        "trace": ["-m", "trace"],
        "perplexity": ["-m", "perplexity", "-"],
    }
    return [*desk.command("info")[:-2], *one_thread(mode), *options[mode]]
