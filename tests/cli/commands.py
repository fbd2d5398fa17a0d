"""Commands called by tests, in their process and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import TINY_QWEN3

from qwen3c import Model, format
from qwen3c.cli import run

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, str(ROOT / "run.py")]
PACKAGES = Path(format.__file__).parent.parent  # where `import qwen3c` finds the package under test
TINY = str(TINY_QWEN3)
PROMPT = "def fibonacci(n):\n"
COMPLETE = ["-m", "generate"]


class Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def in_process(capsys: pytest.CaptureFixture[str], *args: str) -> Result:
    capsys.readouterr()
    try:
        status = run.main([*args])
    except SystemExit as leave:
        status = int(leave.code or 0)
    return Result(status, *capsys.readouterr())


def command(*args: str, **options: Any) -> Result:
    """run.py as a process of its own, stdin empty unless given."""
    options = {"input": b"", "timeout": 60, "capture_output": True, **options}
    done = subprocess.run([*RUN, *args], **options)
    return Result(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def text_of(model: Model, prompt: list[int], n: int, **sampling: Any) -> str:
    return "".join(event.text for event in model.generate(prompt, n, **sampling))


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own, which imports the package under test."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=PACKAGES, capture_output=True, text=True, timeout=100, check=False)
