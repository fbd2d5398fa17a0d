"""Python programs and run.py as processes of their own, for the tests of names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL, GGUF = "owner/Small", "owner/Small-GGUF:Small-Q8_0.gguf"


def start(script: str, *arguments: object, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(script: str, *arguments: object, env: dict[str, str]) -> tuple[int, str, str]:
    process = start(script, *arguments, env=env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def run_py(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=ROOT, env=os.environ | env | {"QWEN3C_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
