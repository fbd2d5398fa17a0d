"""make run as a person types it: it says what it does while it sets up, and nothing when that is done.

python -m pytest tests/terminal/test_make.py

What downloads and builds is a stand-in, so that nothing here takes minutes; what make, setup.py and
environment.py do is real, and so is the conversation at the end of the one that is set up already.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from screen import ROOT, SHELL, Terminal, environment

PIP = """\
Collecting numpy<3,>=1.26 (from qwen3c==0.1.0)
  Downloading numpy-2.3.1-cp312-cp312-manylinux_2_28_x86_64.whl (16.6 MB)
  Cythonizing qwen3c/engine.pyx because it changed.
  gcc -pthread -O3 -c /tmp/x/openmp.c -o /tmp/x/openmp.o -fopenmp
  gcc -pthread -O3 -c qwen3c/kernels/avx2.c -o build/avx2.o
"""
REMARK = "  qwen3c: the compiler has no OpenMP; the engine will run on one thread\n"


def make(tmp_path: Path, pip: str = PIP, status: int = 0, pause: str = "0.4") -> list[str]:
    """make with a stand-in environment: its pip prints the lines of `pip` with pauses, its engine only
    greets.
    """
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    (tmp_path / "pip").write_text(pip)
    (bin / "python").write_text(
        f"#!/bin/sh\n"
        f'if [ "$2" = pip ]; then '
        f'while IFS= read -r line; do echo "$line"; sleep {pause}; done < {tmp_path}/pip; '
        f"exit {status}; fi\n"
        f"echo the engine runs: $@\n"
    )
    (bin / "python").chmod(0o755)
    return ["make", "--no-print-directory", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}", "run"]


def piped(command: list[str], **env: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("columns", [20, 80])
def test_every_step_is_shown_while_it_is_done_and_gone_when_it_is(tmp_path: Path, columns: int) -> None:
    with Terminal(make(tmp_path), columns=columns) as terminal:
        if columns == 80:
            terminal.wait_for("the engine is compiled, which takes about a minute")
            for step in ("downloading numpy (16.6 MB)", "translating engine.pyx to C", "compiling avx2"):
                terminal.wait_for(f" s  {step}")
        assert terminal.finish() == 0
        assert "the engine runs" in terminal.text.replace("\n", "")
        left = [line for line in terminal.lines if " s  " in line]
        assert not left, terminal.text
        assert "openmp" not in terminal.text


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": None}])
def test_a_terminal_that_cannot_redraw_gets_a_line_for_each_step(
    tmp_path: Path, env: dict[str, str | None]
) -> None:
    with Terminal(make(tmp_path, pause="0"), env=env) as terminal:
        assert terminal.finish() == 0
        assert b"\x1b" not in terminal.raw
        assert terminal.lines.index("downloading numpy (16.6 MB)") < terminal.lines.index("compiling avx2")


def test_in_a_pipe_each_step_is_a_line_on_stderr_and_stdout_is_the_models(tmp_path: Path) -> None:
    command = make(tmp_path, pause="0")
    done = piped(command)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("the engine runs: run.py -m generate") and len(done.stdout.splitlines()) == 1
    )
    assert done.stderr.splitlines()[1:-1] == [
        "the engine is compiled, which takes about a minute",
        "asking which packages are needed",
        "downloading numpy (16.6 MB)",
        "translating engine.pyx to C",
        "compiling avx2",
    ]
    again = piped(command)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, ""), (
        "the second run has nothing to say"
    )


def test_a_remark_of_the_build_stays_on_the_screen(tmp_path: Path) -> None:
    with Terminal(make(tmp_path, PIP + REMARK)) as terminal:
        assert terminal.finish() == 0
        assert "the compiler has no OpenMP; the engine will run on one thread" in terminal.lines


def test_a_refusal_of_setup_is_the_one_thing_said_of_a_failure(tmp_path: Path) -> None:
    done = piped(
        make(tmp_path, PIP + "  qwen3c: Python's headers are needed\n  note: pip\n", status=1, pause="0")
    )
    assert done.returncode == 2
    assert "note: pip" not in done.stderr and "\nqwen3c: Python's headers are needed\n" in done.stderr


def test_what_else_fails_is_said_with_the_end_of_it(tmp_path: Path) -> None:
    done = piped(make(tmp_path, PIP + "ERROR: No space left on device\n", status=1, pause="0"))
    assert done.returncode == 2
    assert "ERROR: No space left on device" in done.stderr and "failed" in done.stderr
    assert not (tmp_path / "venv" / "ready").exists()


def test_ctrl_c_ends_it_with_a_clean_line(tmp_path: Path) -> None:
    with Terminal(make(tmp_path, PIP * 50)) as terminal:
        terminal.wait_for("downloading numpy")
        terminal.press("ctrl-c")
        assert terminal.finish() != 0
        assert "Traceback" not in terminal.text
    assert not (tmp_path / "venv" / "ready").exists()


def test_a_closed_terminal_ends_it_and_what_it_started(tmp_path: Path) -> None:
    with Terminal(make(tmp_path, PIP * 50)) as terminal:
        terminal.wait_for("downloading numpy")
        terminal.hang_up()
        assert terminal.finish_unseen(timeout=10) != 0
        deadline = time.monotonic() + 10  # make ends before what it started does
        while is_group(terminal.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_group(terminal.pid)
    assert not (tmp_path / "venv" / "ready").exists()


def is_group(pid: int) -> bool:
    """Whether a process of this group still runs."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_goes_on_after_ctrl_z_and_fg_in_a_smaller_window(tmp_path: Path) -> None:
    with Terminal(SHELL, env={"PS1": "$ "}, cwd=ROOT) as shell:
        shell.wait_for("$")
        shell.type(f"{shlex.join(make(tmp_path))}; echo status=$?\r")
        shell.wait_until(lambda: " s  downloading numpy (16.6 MB)" in shell.current_line, "the first step")
        shell.press("ctrl-z")
        shell.wait_for("Stopped")
        shell.resize(20, 24)
        shell.type("clear; fg\r")
        shell.wait_until(
            lambda: shell.current_line.lstrip()[1:] == " s  translating e"[:15], "a shorter line"
        )
        shell.wait_until(lambda: any("the engine runs" in line for line in shell.lines), "the end")
        assert not [line for line in shell.lines if " s  " in line], shell.text


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"CC": "/nowhere/cc"}, "qwen3c: a C compiler is needed"),
        ({}, "qwen3c: /nowhere/python is not installed"),
    ],
)
def test_what_is_missing_is_said_first_in_one_line(
    tmp_path: Path, env: dict[str, str | None], said: str
) -> None:
    command = make(tmp_path)
    if not env:
        command[2] = "PYTHON=/nowhere/python"
    done = piped(command, **env)
    mine = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert done.returncode == 2 and len(mine) == 1 and mine[0].startswith(said) and not done.stdout


def test_where_all_is_built_make_run_is_a_conversation(tmp_path: Path) -> None:
    """This Python in the place of the environment's, which is newer than every source."""
    command = make(tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "venv" / "ready").touch()
    with Terminal(command, columns=100, env={"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        terminal.wait_until(lambda: terminal.current_line == ">", "the prompt")
        terminal.type("What is 27 + 45?\r")
        terminal.wait_for("72")
        terminal.wait_for("reply ")
        terminal.press("ctrl-d")
        assert terminal.finish() == 0
        assert "compil" not in terminal.text and "download" not in terminal.text
