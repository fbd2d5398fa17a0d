"""A model by its name as a person types it: fetched with a bar, interrupted, resized, closed; listed, pruned.

python -m pytest tests/terminal/test_named.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub
from screen import ROOT, SHELL, Terminal, run_typed
from small_models import write_small_model

RUN = [sys.executable, str(ROOT / "run.py")]
INFO = [*RUN, "owner/Small", "-m", "info"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("source"), n_layers=4)


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add("owner/Small", source)
        yield hub


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str | None]:
    return {**hub.environment(tmp_path), "QWEN3C_THREADS": "1"}


def begun(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").rglob("*") if path.suffix in (".part", ".tmp")]


@pytest.mark.parametrize("columns", [20, 80])
def test_a_name_is_fetched_with_a_bar_that_leaves_no_trace(
    hub: Hub, env: dict[str, str | None], tmp_path: Path, columns: int
) -> None:
    hub.faults = [Fault("^cdn:", "slow", 0.1)]
    with Terminal(INFO, columns=columns, rows=60, env=env) as terminal:
        drawn: list[str] = []

        def draw() -> bool:
            line = terminal.current_line
            if "%" in line and line not in drawn:
                drawn.append(line)
            return not terminal._child.isalive()

        terminal.wait_until(draw, "the end")
        assert terminal.finish() == 0
        terminal.assert_left_as_found()
        text = " ".join(terminal.text.split())
        assert "fetching owner/Small: 0.5 MiB converting owner/Small to 8 bits: 0.5 MiB name Small" in text
        assert "#" not in text and "s left" not in text and "asking" not in text and "checking" not in text
    assert all(len(line) < columns for line in drawn) and len(drawn) > 3, drawn
    percents = [int(re.findall(r"(\d+)%", line)[0]) for line in drawn]
    assert percents == sorted(percents) and "s left" in drawn[len(drawn) // 2]
    assert ("[#" in drawn[2] and "MB/s" in drawn[2]) == (columns == 80)
    assert not begun(tmp_path)
    status, again, _ = run_typed(INFO, columns=columns, rows=60, env=env)
    assert status == 0 and "fetching" not in again


def test_ctrl_c_says_that_the_rest_can_come_later(
    hub: Hub, env: dict[str, str | None], tmp_path: Path
) -> None:
    hub.faults = [Fault("^cdn:", "slow", 0.1)]
    with Terminal(INFO, env=env) as terminal:
        terminal.wait_for("[####")
        terminal.press("ctrl-c")
        assert terminal.finish() == 130
        assert terminal.lines[-1] == "owner/Small: what has arrived is kept, the same command goes on"
        assert "#" not in terminal.text and "Traceback" not in terminal.text
        terminal.assert_left_as_found()
    assert begun(tmp_path)
    hub.faults = []
    status, text, _ = run_typed(INFO, rows=60, env=env)
    assert status == 0 and re.search(
        r"^fetching owner/Small: 0.5 MiB, 0.\d MiB are here$", text, re.MULTILINE
    )
    assert not begun(tmp_path)


def test_the_bar_follows_the_window(hub: Hub, env: dict[str, str | None]) -> None:
    hub.faults = [Fault("^cdn:", "slow", 0.2)]
    with Terminal(INFO, columns=80, rows=60, env=env) as terminal:
        terminal.wait_for("[###")
        terminal.resize(24, 60)
        terminal.wait_until(lambda: re.match(r" *\d+%  \d+ s left$", terminal.current_line), "the short line")
        terminal.resize(100, 60)
        terminal.wait_until(lambda: "[###" in terminal.current_line, "the bar again")
        assert terminal.finish() == 0


def test_a_window_that_closes_ends_it_and_the_next_goes_on(
    hub: Hub, env: dict[str, str | None], tmp_path: Path
) -> None:
    hub.faults = [Fault("^cdn:", "slow", 0.1)]
    with Terminal(INFO, env=env) as terminal:
        terminal.wait_for("[####")
        terminal.hang_up()
        assert terminal.finish_unseen() == 129
    assert begun(tmp_path)
    hub.faults = []
    assert run_typed(INFO, rows=60, env=env)[0] == 0


def test_it_goes_on_after_ctrl_z_and_fg(hub: Hub, env: dict[str, str | None]) -> None:
    hub.faults = [Fault("^cdn:", "slow", 0.1)]
    with Terminal(SHELL, rows=60, env={**env, "PS1": "$ "}) as terminal:
        terminal.wait_for("$")
        terminal.type(" ".join(map(str, INFO)) + "\r")
        terminal.wait_for("[##")
        terminal.press("ctrl-z")
        terminal.wait_for("Stopped")
        terminal.type("fg\r")
        terminal.wait_for("fits here")
        terminal.type("exit\r")
        assert terminal.finish() == 0


def test_a_dumb_terminal_and_a_pipe_get_plain_lines(hub: Hub, env: dict[str, str | None]) -> None:
    status, text, raw = run_typed(INFO, rows=60, env={**env, "TERM": "dumb"})
    assert status == 0 and text.startswith("fetching owner/Small: 0.5 MiB\nconv") and b"\x1b" not in raw
    command = f"{RUN[0]} {RUN[1]} -m models | cat; {RUN[0]} {RUN[1]} -m models --prune < /dev/null"
    status, text, _ = run_typed(["bash", "-c", command], columns=120, env=env)
    assert status == 2 and "owner/Small  8 bits  " in text
    assert text.splitlines()[-1] == (
        "run.py: error: --prune asks before it deletes, and nobody is at a terminal: --yes says it"
    )


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_the_list_fits_and_prune_asks_first(
    hub: Hub, env: dict[str, str | None], tmp_path: Path, term: str
) -> None:
    env = {**env, "TERM": term}
    assert run_typed([*INFO], rows=60, env=env)[0] == 0
    status, text, _ = run_typed([*RUN, "-m", "models"], env=env)
    commit = hub.repositories["owner/Small"].commit[:8]
    assert status == 0 and text.splitlines()[:3] == [
        f"owner/Small  8 bits  {commit}",
        "    file 0.3 MiB, memory 46.7 MiB at context 256 of 256",
        "    downloaded 0.5 MiB",
    ]
    for answer, left in (("n", True), ("", True), ("y", False)):
        with Terminal([*RUN, "-m", "models", "--prune"], columns=30, rows=60, env=env) as terminal:
            terminal.wait_for("[y/N]")
            terminal.type(f"{answer}\r")
            assert terminal.finish() == 0
            said = " ".join(terminal.text.split())
            assert ("nothing was deleted" in said) == left and ("are free again" in said) != left, said
        assert bool(list((tmp_path / "cache").rglob("*.safetensors"))) == left
    with Terminal([*RUN, "owner/Small", "-m", "models", "--prune"], env=env) as terminal:
        terminal.wait_for("[y/N]")
        terminal.press("ctrl-c")
        assert terminal.finish() == 130 and "Traceback" not in terminal.text
    assert list((tmp_path / "cache").rglob("*.bin"))
