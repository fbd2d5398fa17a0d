"""Every way in: the scripts, `python -m` and the installed commands begin alike.

python -m pytest tests/cli/test_start.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3c.cli import start

ROOT = Path(__file__).parents[2]
SCRIPTS = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0].splitlines()


def test_the_installed_commands_are_ways_in() -> None:
    targets = [line.split(" = ")[1].strip('"').split(":") for line in SCRIPTS]
    assert [module for module, _ in targets] == ["qwen3c.cli.start"] * 3
    assert all(callable(getattr(start, function)) for _, function in targets)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    "command",
    [["-m", "qwen3c"], *(["-c", f"from qwen3c.cli.start import {n}; {n}()"] for n in ("run", "export",
                                                                                      "train"))],
    ids=["python -m qwen3c", "qwen3c", "qwen3c-export", "qwen3c-train"],
)  # fmt: skip
def test_ctrl_c_while_modules_load_is_no_traceback(command: list[str], ignored: bool, tmp_path: Path) -> None:
    """Ctrl-C while modules load, as from a slow disk, ends in one line; if it is ignored (`&`), nothing
    happens.
    """
    slow = "import time\nprint('loading', flush=True)\ntime.sleep({})\nraise SystemExit(7)\n"
    (tmp_path / "argparse.py").write_text(slow.format(0.5 if ignored else 60))
    process = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (7 if ignored else -signal.SIGINT, "")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("run.py --help", 0),
        ("run.py --version", 0),
        ("run.py --nonsense", 2),
        ("export.py --help", 0),
        ("export.py source", 2),
        ("train.py --help", 0),
        ("train.py sft", 2),
    ],
)
def test_help_and_usage_errors_do_not_load_the_modules_of_the_work(command: str, status: int) -> None:
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == status and "qwen3c.cli.start" in loaded
    assert not loaded & {"numpy", "qwen3c.cli.modes", "qwen3c.cli.stages", "qwen3c.convert.export"}
