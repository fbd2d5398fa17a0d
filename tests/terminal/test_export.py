"""export.py as a person types it: the bar drawn, on any terminal, at any speed, interrupted, resized, closed.

python -m pytest tests/terminal/test_export.py
QWEN3C_EXPORTS=200 python -m pytest tests/terminal/test_export.py -k every_architecture
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from screen import ROOT, Terminal, run_typed
from small_models import write_small_model

from qwen3c.format import MAGIC, ModelFile

EXPORT = [sys.executable, str(ROOT / "export.py")]
N_EXPORTS = int(os.environ.get("QWEN3C_EXPORTS", 12))

# export.py with its bar drawn at once, and a pause before each slice: the first argument, in seconds
SLOW = """
import functools, sys, time
from qwen3c.cli import export as command
from qwen3c.convert import quantise
seconds, convert = float(sys.argv.pop(1)), quantise.convert

def convert_slowly(*arguments):
    time.sleep(seconds)
    return convert(*arguments)

quantise.convert = convert_slowly
command.Progress = functools.partial(command.Progress, delay=0)
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("source"), n_layers=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


# export.py with its bar drawn at once, and a pause before each step of a calibration
SLOW_CALIBRATION = """
import functools, sys, time
from qwen3c.cli import export as command
from qwen3c.convert import calibrate
tick = calibrate.Calibration._tick

def tick_slowly(*arguments):
    time.sleep(0.05)
    tick(*arguments)

calibrate.Calibration._tick = tick_slowly
command.Progress = functools.partial(command.Progress, delay=0)
sys.exit(command.main(sys.argv[1:]))
"""


def slow(source: Path, target: Path, seconds: float = 0.1) -> list[str]:
    return [sys.executable, "-c", SLOW, str(seconds), str(source), str(target), "--threads", "1"]


def assert_reported(text: str, status: int, target: Path) -> None:
    """The report stands there alone: nothing of the bar is left, no traceback."""
    assert status == 0 and target.exists(), text
    assert ModelFile(target).file_size == target.stat().st_size
    assert "mlp.down_proj" in text and "Traceback" not in text
    assert "left" not in text and "#" not in text and "reading" not in text and "writing" not in text, text


def assert_nothing_written(target: Path) -> None:
    assert list(target.parent.iterdir()) == []


# ----------------------------------------------------------------------------
# Drawn


@pytest.mark.parametrize("columns", [20, 80])
@pytest.mark.parametrize("seconds", [None, 0.0, 0.1])
def test_an_export_typed_on_a_terminal_ends_in_its_report(
    source: Path, target: Path, columns: int, seconds: float | None
) -> None:
    """Three paces: unchanged, with every step of the bar drawn, and slow."""
    command = [*EXPORT, source, target] if seconds is None else slow(source, target, seconds)
    status, text, _ = run_typed(command, columns=columns)  # type: ignore[arg-type]
    assert_reported(text, status, target)


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_the_bar_goes_from_nothing_to_all_within_its_line(source: Path, target: Path, columns: int) -> None:
    """The first call reports 0 bytes: the first tensor, the rotary frequencies, has none in the source."""
    with Terminal(slow(source, target), columns=columns) as terminal:
        drawn = []

        def draw() -> bool:
            line = terminal.current_line
            if "%" in line and line not in drawn:
                drawn.append(line)
            return not terminal._child.isalive()

        terminal.wait_until(draw, "the end")
        status = terminal.finish()
        assert_reported(terminal.text, status, target)
    assert all(len(line) < columns for line in drawn), drawn
    percents = [int(re.findall(r"(\d+)%", line)[0]) for line in drawn]
    assert len(percents) > 3 and percents == sorted(percents)
    assert percents[0] == 0 and "left" not in drawn[0] and "left" in drawn[len(drawn) // 2]
    assert ("[" in drawn[0] and "MB/s" in drawn[0]) == (columns == 80)


def test_a_bar_follows_the_window(source: Path, target: Path) -> None:
    with Terminal(slow(source, target, 0.3), columns=80) as terminal:
        terminal.wait_for("[###")
        terminal.resize(24, 10)
        terminal.wait_until(lambda: re.match(r" *\d+%  \d+ s left$", terminal.current_line), "the short line")
        terminal.resize(100, 30)
        terminal.wait_until(lambda: "[###" in terminal.current_line, "the bar again")
        assert terminal.finish() == 0
        assert terminal.lines[-1].endswith("anonymous)") and ModelFile(target)


def test_every_wait_says_what_it_is_for(source: Path, target: Path) -> None:
    """Before the first weight is read, and when the last is written."""
    script = """
import os, sys, time
from qwen3c.cli import export
from qwen3c.convert import huggingface
real = {"fsync": os.fsync, "read": huggingface._read_tokenizer}

def slowly(name):
    def call(*arguments):
        time.sleep(0.5)
        return real[name](*arguments)
    return call

os.fsync, huggingface._read_tokenizer = slowly("fsync"), slowly("read")
sys.exit(export.main(sys.argv[1:]))
"""
    with Terminal([sys.executable, "-c", script, source, target], columns=120) as terminal:
        terminal.wait_until(lambda: terminal.current_line == f"reading {source}"[:119], "what is read")
        terminal.wait_until(lambda: terminal.current_line == "writing to disk", "what is written")
        status = terminal.finish()
        assert_reported(terminal.text, status, target)


def test_a_dumb_terminal_gets_no_escape_codes(source: Path, target: Path) -> None:
    for dumb in ("dumb", None):
        status, text, raw = run_typed(slow(source, target, 0.05), env={"TERM": dumb})
        assert_reported(text, status, target)
        assert b"\x1b" not in raw and b"%  " not in raw


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_an_export_has_no_colours(source: Path, target: Path, env: dict[str, str]) -> None:
    _, _, raw = run_typed(slow(source, target, 0.05), env=env)
    assert b"%" in raw and not re.search(rb"\x1b\[[0-9;]*m", raw)


@pytest.mark.parametrize("env", [{"LC_ALL": "C", "LANG": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_plain_locale_shows_what_it_can(source: Path, target: Path, env: dict[str, str]) -> None:
    status, text, _ = run_typed([*slow(source, target, 0.0), "--name", "Kathe ☃"], env=env, columns=200)
    assert_reported(text, status, target)
    assert f"{target}: Kathe " in text


def test_an_estimate_leaves_no_line_behind(source: Path) -> None:
    status, text, _ = run_typed([*EXPORT, source, "--estimate"], columns=120)
    assert status == 0 and "reading" not in text and "INT8 in groups of 64" in text


# ----------------------------------------------------------------------------
# Streams that are no terminal


def test_stderr_in_a_file_is_plain_and_leaves_the_terminal_alone(source: Path, target: Path) -> None:
    command = f"{shlex.join(slow(source, target, 0.05))} 2> {target.parent / 'stderr'}"
    status, text, _ = run_typed(["bash", "-c", command])
    assert (status, text) == (0, "")
    report = (target.parent / "stderr").read_text()
    assert "\x1b" not in report and "\r" not in report and report.startswith("tensors ")


def test_stdout_in_a_pipe_changes_nothing_on_the_terminal(source: Path, target: Path) -> None:
    status, text, raw = run_typed(["bash", "-c", f"{shlex.join(slow(source, target, 0.05))} | cat"])
    assert_reported(text, status, target)
    assert b"%" in raw


def test_a_reader_of_stderr_that_leaves_ends_nothing(source: Path, target: Path) -> None:
    command = f"set -o pipefail; {shlex.join(slow(source, target, 0.05))} 2>&1 >/dev/null | true; echo $?"
    _, text, _ = run_typed(["bash", "-c", command])
    assert text == "0" and ModelFile(target)


# ----------------------------------------------------------------------------
# Keys and signals while it draws


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (lambda terminal: terminal.press("ctrl-c"), 130, "interrupted"),
        (lambda terminal: terminal.press("ctrl-c", "ctrl-c", "ctrl-c"), 130, "interrupted"),
        (lambda terminal: terminal.send_signal(signal.SIGTERM), 143, "terminated"),
    ],
    ids=["ctrl-c", "ctrl-c thrice", "sigterm"],
)
@pytest.mark.parametrize("columns", [20, 200])
def test_an_interrupted_export_is_one_line_and_leaves_nothing(
    source: Path, target: Path, end: Callable[[Terminal], object], status: int, words: str, columns: int
) -> None:
    with Terminal(slow(source, target), columns=columns) as terminal:
        terminal.wait_for("%")
        end(terminal)
        assert terminal.finish() == status
        text = terminal.text.replace("^C", "").replace("\n", "" if columns == 20 else "\n")
    assert text.strip() == f"export.py: error: {target}: {words}, nothing was written"
    assert_nothing_written(target)


def test_a_closed_terminal_ends_the_export_and_leaves_nothing(source: Path, target: Path) -> None:
    with Terminal(slow(source, target)) as terminal:
        terminal.wait_for("%")
        terminal.hang_up()
        assert terminal.finish_unseen() == 129
    assert_nothing_written(target)


def test_an_export_that_ignores_hang_ups_goes_on_without_its_terminal(source: Path, target: Path) -> None:
    """As nohup starts it, but with the bar still drawn where nobody sees it."""
    command = f"trap '' HUP; exec {shlex.join(slow(source, target))}"
    with Terminal(["bash", "-c", command]) as terminal:
        terminal.wait_for("%")
        terminal.hang_up()
        assert terminal.finish_unseen() == 0
    assert ModelFile(target)


def test_a_stopped_export_goes_on_in_the_foreground(source: Path, target: Path) -> None:
    script = target.with_name("slow.py")
    script.write_text(SLOW)
    typed = shlex.join([sys.executable, str(script), "0.15", str(source), str(target), "--threads", "1"])
    env: dict[str, str | None] = {"PS1": "$ ", "PYTHONPATH": str(ROOT)}
    with Terminal(["bash", "--norc", "-i"], columns=300, env=env) as terminal:
        terminal.wait_for("$")
        terminal.type(f"{typed}\r")
        terminal.wait_until(lambda: "%  " in terminal.current_line, "the bar")
        terminal.press("ctrl-z")
        terminal.wait_for("Stopped")
        assert not target.exists()
        terminal.type("fg\r")
        terminal.wait_for("MB/s), peak memory")
        terminal.type("echo status $?\r")
        terminal.wait_until(lambda: any(line == "status 0" for line in terminal.lines), "the status")
    assert ModelFile(target)


def test_keys_typed_meanwhile_harm_nothing(source: Path, target: Path) -> None:
    with Terminal(slow(source, target)) as terminal:
        terminal.wait_for("%")
        terminal.type("ls\r")
        terminal.press("up", "tab", "ctrl-l")
        assert terminal.finish() == 0
        assert "MB/s), peak memory" in terminal.text and "Traceback" not in terminal.text
    assert ModelFile(target)


# ----------------------------------------------------------------------------
# Asked for something else


def test_usage_errors_are_one_line_by_the_name_that_was_typed(source: Path, target: Path) -> None:
    link = target.parent / "qwen3c-export"
    link.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom qwen3c.cli.export import main\nmain()\n"
    )
    for command, name in (
        (EXPORT, "export.py"),
        ([sys.executable, link], "qwen3c-export"),
        ([sys.executable, "-m", "qwen3c.cli.export"], "python -m qwen3c.cli.export"),
    ):
        status, text, _ = run_typed([*command, source], columns=200)
        assert (status, text) == (2, f"{name}: error: OUT.bin is missing; with --estimate nothing is written")
        status, text, _ = run_typed([*command, "--help"], columns=80)
        assert status == 0 and text.startswith(f"usage: {name} SRC OUT.bin [options]"), text


def test_a_precious_file_is_kept_unless_forced(source: Path, target: Path) -> None:
    precious = target.with_name("precious.md")
    precious.write_text("years of work\n")
    status, text, _ = run_typed([*EXPORT, source, precious], columns=200)
    assert (status, precious.read_text()) == (2, "years of work\n")
    assert text == f"export.py: error: {precious}: exists and is not a model.bin; --force replaces it"
    assert run_typed([*EXPORT, source, precious, "--force"])[0] == 0
    assert precious.read_bytes().startswith(MAGIC)


# ----------------------------------------------------------------------------
# Every architecture

# One process for all, since most of an export of a small model is starting Python
MANY = """
import functools, sys
from qwen3c.cli import export
from qwen3c.system import terminal
export.Progress = functools.partial(export.Progress, delay=0)
terminal.StatusLine = functools.partial(terminal.StatusLine, interval=0)
for source in sys.argv[2:]:
    for threads in ("1", "2"):
        status = export.main([source, sys.argv[1], "--threads", threads])
        print("done" if status == 0 else "failed", source.rpartition("/")[2])
"""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def shapes() -> Iterator[dict[str, Any]]:
    """Every architecture in sizes from one slice to many, forever."""
    sizes: list[dict[str, Any]] = [
        {"n_layers": 1},
        {"n_layers": 3, "tied": False, "dtype": "F32"},
        {"dim": 256, "hidden_dim": 1024, "shards": 3},
        {"dim": 1024, "hidden_dim": 3072, "n_layers": 4, "n_heads": 16, "head_dim": 64, "n_kv_heads": 8},
    ]
    while True:
        for size in sizes:
            for architecture in ("qwen3", "qwen3_moe", "qwen2", "llama"):
                heads = (
                    {"head_dim": size.get("dim", 64) // size.get("n_heads", 4)}
                    if architecture == "qwen2"
                    else {}
                )
                rope = {"rope": YARN} if architecture == "qwen3" else {}
                yield {"architecture": architecture, **size, **heads, **rope}


def test_every_architecture_and_size_is_exported_with_its_bar_drawn(tmp_path: Path) -> None:
    sources = []
    for i, shape in zip(range(N_EXPORTS), shapes(), strict=False):
        sources.append(write_small_model(tmp_path / str(i), **shape) if i < 16 else tmp_path / str(i % 16))
    status, text, raw = run_typed([sys.executable, "-c", MANY, tmp_path / "model.bin", *sources], columns=100)
    assert status == 0 and "Traceback" not in text and "Error" not in text, text
    expected = [f"done {source.name}" for source in sources for _ in range(2)]
    assert [line for line in text.splitlines() if line.startswith(("done", "failed"))] == expected
    assert raw.count(b"]   0%") >= raw.count(b"] 100%") == len(expected), "not every bar was drawn to its end"


# ----------------------------------------------------------------------------
# Calibrated


def calibrating(source: Path, target: Path, text: Path) -> list[str]:
    return [
        *(sys.executable, "-c", SLOW_CALIBRATION, str(source), str(target)),
        *("--bits", "4", "--calibrate", str(text)),
    ]


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be, that is the question\n" * 20)
    return path


def test_a_calibration_says_what_it_will_take_and_ends_in_its_report(
    source: Path, target: Path, text: Path
) -> None:
    with Terminal(calibrating(source, target, text), columns=160) as terminal:
        terminal.wait_for("of memory")
        terminal.wait_until(
            lambda: "% " in terminal.current_line and "left" in terminal.current_line, "a bar"
        )
        status = terminal.finish()
        said = [line for line in terminal.lines if "calibrating" in line]
        assert len(said) == 1 and re.match(
            r"calibrating 1 blocks on [\d,]+ tokens of .*: about \d+ s, [\d.]+ [GM]iB of memory, ", said[0]
        )
        assert status == 0 and target.exists(), terminal.text
        assert "mlp.down_proj" in terminal.text and "#" not in terminal.text
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_an_interrupted_calibration_goes_on_with_the_same_command(
    tmp_path_factory: pytest.TempPathFactory, target: Path, text: Path
) -> None:
    source = write_small_model(tmp_path_factory.mktemp("deep"), n_layers=6)
    command = calibrating(source, target, text)
    done = 0
    for _ in range(2):
        with Terminal(command, columns=200) as terminal:
            first = target.with_name("model.bin.calibration") / f"block-{done + 1:03}.npz"
            terminal.wait_until(first.exists, "another block")
            terminal.press("ctrl-c")
            assert terminal.finish() == 130
            told = re.search(
                r"model.bin: interrupted after block (\d+); the same command goes on from there "
                r"\(model.bin.calibration\)$",
                terminal.lines[-1],
            )
            assert told and int(told[1]) > done, terminal.text
            done = int(told[1])
        assert not target.exists()
    status, screen, _ = run_typed(command, columns=200)
    assert status == 0 and f"from block {done + 1} on" in screen
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_text_with_a_bad_line_is_one_line(source: Path, target: Path, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("text") / "chat.jsonl"
    path.write_text('{"text": "well"}\n{"messages": [}\n')
    command = [*EXPORT, source, target, "--bits", "4", "--calibrate", path]
    status, screen, _ = run_typed(command, columns=200)
    assert status == 2 and screen.strip().count("\n") == 0
    assert f"{path}: line 2: is not JSON" in screen
    assert_nothing_written(target)
