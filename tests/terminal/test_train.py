"""train.py as a person types it: every stage on any terminal, in a pipe, stopped in every way, resumed.

python -m pytest tests/terminal/test_train.py
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for library in ("torch", "transformers", "accelerate", "matplotlib"):
    pytest.importorskip(library, reason="training needs the extra `train` (make oracles)")

from nano import NANO, write_chat, write_tasks, write_text  # noqa: E402
from screen import ROOT, Terminal, environment, run_typed  # noqa: E402

TRAIN = [sys.executable, str(ROOT / "train.py")]
PROGRESS = re.compile(r"\d+%  step [\d,]+ of [\d,]+  loss \d+\.\d+, [\d,]+ tok/s  .* left")
# evaluated and saved when it is stopped, and never before
ENDLESS = ["--steps", "100000", "--evaluate-every", "100000", "--checkpoint-every", "100000"]
THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where commands are typed, with the files of README's "Train a model"."""
    folder = tmp_path_factory.mktemp("here")
    write_text(folder / "texts")
    write_chat(folder / "chat.jsonl")
    write_tasks(folder / "tasks.jsonl")
    (folder / "rewards.py").write_text(
        "def exact(prompt, completion, task):\n    return len(completion) / 9\n"
    )
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> tuple[int, str, bytes]:
    """A pretraining typed at 80 columns; the model is in `folder`/base."""
    command = ["pretrain", "texts/", "-o", "base", *NANO, "--steps", "60", "--evaluate-every", "30"]
    return run_typed([*TRAIN, *command], cwd=folder, env=THREAD)


def steps_done(out: Path) -> int:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sum("loss" in record for record in records)


def drawn(raw: bytes) -> list[str]:
    """Every state of the line that is drawn again and again, without the lines that stay."""
    return [piece for piece in raw.decode().split("\r\x1b[K") if piece and "\n" not in piece]


def test_pretraining_shows_what_it_does_and_leaves_its_results(base: tuple[int, str, bytes]) -> None:
    status, text, raw = base
    assert status == 0, text
    lines = text.splitlines()
    assert re.match(r"[\d,]+ tokens of text .* 60 steps are", lines[0])
    assert [line.split(":")[0] for line in lines[1:]] == ["step 0", "step 30", "step 60", "base"], text
    assert "`export.py base model.bin` makes it run" in text
    states = drawn(raw)
    assert "loading PyTorch ..." in states
    assert any(PROGRESS.search(state) for state in states), states
    assert max(map(len, states)) < 80
    assert b"\x1b[2m" not in raw  # figures are what people read, not an aside


def test_a_narrow_terminal_shows_the_percentage_and_no_line_twice(
    folder: Path, base: tuple[int, str, bytes]
) -> None:
    command = ["sft", "chat.jsonl", "--model", "base", "-o", "tuned", "--steps", "40", "--batch", "2"]
    status, text, raw = run_typed([*TRAIN, *command], cwd=folder, env=THREAD, columns=20)
    assert status == 0, text
    assert max(map(len, drawn(raw))) < 20
    assert any(re.search(r"\d+%  \d+ s left", state) for state in drawn(raw))
    assert "%" not in text and "..." not in text  # nothing drawn stays
    assert "step 0: validation_l\noss " in text and "\nstep 40: validation_" in text


def test_a_dumb_terminal_gets_plain_lines(folder: Path, base: tuple[int, str, bytes]) -> None:
    command = ["grpo", "tasks.jsonl", "--model", "base", "-o", "final", "--reward", "rewards:exact",
               "--steps", "2", "--batch", "2", "--max-tokens", "8"]  # fmt: skip
    status, text, raw = run_typed([*TRAIN, *command], cwd=folder, env={**THREAD, "TERM": "dumb"})
    assert status == 0, text
    assert b"\x1b" not in raw and b"\r" not in raw.replace(b"\r\n", b"")
    assert "step 2: validation_reward" in text and "`export.py final model.bin` makes it run" in text


def test_a_pipe_gets_plain_lines_and_nothing_goes_to_stdout(
    folder: Path, base: tuple[int, str, bytes]
) -> None:
    command = [
        *TRAIN,
        "pretrain",
        "texts/",
        "--model",
        "base",
        "-o",
        "more",
        "--steps",
        "2",
        "--threads",
        "1",
    ]
    run = subprocess.run(
        command, cwd=folder, env=environment({"NO_COLOR": "1"}), capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0 and run.stdout == "", run.stderr
    assert "\x1b" not in run.stderr and "\r" not in run.stderr
    lines = run.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["step 0", "step 2", "more"]


def test_a_run_is_resumed_suspended_continued_in_another_window_and_interrupted(
    folder: Path, base: tuple[int, str, bytes]
) -> None:
    again = " ".join([*TRAIN, "pretrain texts/ -o base --resume", *NANO, *ENDLESS])
    shell = ["/bin/bash", "--norc", "--noprofile", "-i"]
    with Terminal(shell, cwd=folder, env={**THREAD, "PS1": "$ ", "HISTFILE": None}, columns=100) as terminal:
        terminal.wait_for("$")
        terminal.type(again + "\r")
        terminal.wait_for("going on from step 60; --steps was 60 and is 100,000")
        terminal.wait_until(lambda: PROGRESS.search(terminal.current_line), "progress")
        terminal.press("ctrl-z")
        terminal.wait_for("Stopped")
        stopped_at = steps_done(folder / "base")
        terminal.type("clear; fg\r")
        terminal.wait_until(lambda: PROGRESS.search(terminal.current_line), "progress after fg")
        terminal.resize(24, 24)
        terminal.wait_until(
            lambda: re.fullmatch(r" *\d+%  \S.* left", terminal.current_line), "a line that fits the window"
        )
        terminal.resize(100, 24)
        terminal.wait_until(lambda: PROGRESS.search(terminal.current_line), "the whole line again")
        terminal.wait_until(lambda: steps_done(folder / "base") > stopped_at, "another step")
        terminal.press("ctrl-c")
        terminal.wait_for("stopping after this step; another Ctrl-C stops at once")
        terminal.wait_for("train.py: stopped after step")
        terminal.type("echo status $?\r")
        terminal.wait_for("status 130")
        assert "Traceback" not in terminal.text
    step = steps_done(folder / "base")
    assert (folder / f"base/checkpoints/step-{step:07d}/trainer.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_from_outside_leaves_a_checkpoint(
    number: int, folder: Path, base: tuple[int, str, bytes]
) -> None:
    command = [*TRAIN, "pretrain", "texts/", "-o", "base", "--resume", *NANO, *ENDLESS]
    with Terminal(command, cwd=folder, env=THREAD) as terminal:
        terminal.wait_until(lambda: PROGRESS.search(terminal.current_line), "progress")
        if number == signal.SIGHUP:
            terminal.hang_up()
            assert terminal.finish_unseen() == 128 + number
        else:
            terminal.send_signal(number)
            assert terminal.finish() == 128 + number
            assert "train.py: stopped after step" in terminal.text and "Traceback" not in terminal.text
    step = steps_done(folder / "base")
    assert (folder / f"base/checkpoints/step-{step:07d}/trainer.pt").exists()


def test_ctrl_c_while_the_libraries_load_ends_at_once(folder: Path) -> None:
    with Terminal([*TRAIN, "pretrain", "texts/", "-o", "never"], cwd=folder) as terminal:
        terminal.wait_for("loading PyTorch")
        terminal.press("ctrl-c")
        assert terminal.finish() == 130
        assert terminal.lines[-1] == "train.py: interrupted" and "Traceback" not in terminal.text
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: pretrain | sft | grpo"),
        (["pretrain", "texts/"], "the following arguments are required: -o/--out"),
        (
            ["pretrain", "texts/", "-o", "x", "--steps", "many"],
            "argument --steps: 'many' is not a whole number",
        ),
        (
            ["sft", "chat.jsonl", "--model", "x", "-o", "x"],
            "-o x is the model to tune: take another directory",
        ),
    ],
)
def test_a_usage_error_is_one_line_by_the_name_it_was_started_by(
    arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    link = tmp_path / "teach.py"
    link.symlink_to(ROOT / "train.py")
    for script, name in ((ROOT / "train.py", "train.py"), (link, "teach.py")):
        status, text, _ = run_typed([sys.executable, script, *arguments], cwd=folder, columns=200)
        assert (status, text) == (2, f"{name}: error: {message}")
