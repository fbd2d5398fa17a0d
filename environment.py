"""Makes the virtual environment of `make` and builds the engine in it, showing each step.

    python environment.py .venv -e .              # the package, editable
    python environment.py .venv --extras test     # what extras of pyproject.toml name, nothing is built again

On a terminal one line is drawn again and again; elsewhere each step is a line. A second run has nothing to
do, as make knows. What fails is said with the end of what pip had to say.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from qwen3c.system.terminal import StatusLine, can_redraw, note

# what pip -v prints -> what is being done
STEPS = (
    (
        re.compile(r"\s*Downloading (?:\S*/)?([A-Za-z0-9_.]+)-\d\S* \(([\d.]+ [kMG]B)\)"),
        "downloading {0} ({1})",
    ),
    (re.compile(r"\s*Cythonizing qwen3c/(?:\w+/)*(\w+\.pyx)"), "translating {0} to C"),
    (re.compile(r".* -c (?:\S*/)?(?!openmp)(\w+)\.c .*"), "compiling {0}"),
    (re.compile(r"\s*Installing collected packages"), "installing"),
)
REMARK = re.compile(r"\s*qwen3c: (.*)")  # a remark of setup.py in pip's output
LAST_LINES = 25  # of pip's output, shown if it fails


def main(arguments: list[str]) -> int:
    """arguments: the directory of the environment, then what pip is to install, or --extras and their
    names.
    """
    directory, *packages = arguments
    installed = packages[-1]
    if packages[0] == "--extras":
        packages = requirements(packages[1:])
        installed = f"what {installed} needs"
    begin, python = time.monotonic(), Path(directory, "bin", "python")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        "-v",
    ]
    steps = [("asking which packages are needed", [*pip, *packages])]
    if python.exists():
        note(f"installing {installed} in {directory}")
    else:
        note(f"setting up in {directory}, once: what it needs is downloaded (about 50 MB)")
        steps.insert(0, ("making the virtual environment", [sys.executable, "-m", "venv", directory]))
    if "-e" in packages:
        note("the engine is compiled, which takes about a minute")
    for step, command in steps:
        status = run(step, command)
        if status:
            return status
    note(f"done in {time.monotonic() - begin:.0f} s")
    return 0


def requirements(extras: list[str]) -> list[str]:
    """The packages that extras of pyproject.toml name, with those of the extras that they name in turn."""
    from pip._vendor import tomli  # Python 3.10 has no tomllib, and every environment has pip

    with open(Path(__file__).with_name("pyproject.toml"), "rb") as file:
        groups = tomli.load(file)["project"]["optional-dependencies"]
    found: list[str] = []
    for extra in extras:
        for package in groups[extra]:
            inner = re.fullmatch(r"qwen3c\[(.*)\]", package)
            found += requirements(inner[1].split(",")) if inner else [package]
    return list(dict.fromkeys(found))


def run(step: str, command: list[str]) -> int:
    """The exit status of a command whose steps are shown while it works."""
    shown = Steps(step)
    last: deque[str] = deque(maxlen=LAST_LINES)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                text = line.decode(errors="replace").rstrip()
                last.append(text)
                shown.hear(text)
        finally:
            shown.clear()
    remarks = [match[1] for match in map(REMARK.match, last) if match]
    if child.returncode and remarks:
        print(f"qwen3c: {remarks[-1]}", file=sys.stderr)
    elif child.returncode:
        print(*last, f"qwen3c: {' '.join(command)} failed", sep="\n", file=sys.stderr)
    return child.returncode


class Steps:
    """Shows the current step on stderr: one line, redrawn with its seconds, or a line for each step."""

    def __init__(self, step: str) -> None:
        self._begin = time.monotonic()
        self._status = StatusLine(delay=0)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._step = ""
        self._say(step)
        if can_redraw(sys.stderr):
            threading.Thread(target=self._draw, daemon=True).start()

    def hear(self, line: str) -> None:
        """Take a line of the command's output, which may begin another step."""
        remark = REMARK.match(line)
        if remark:
            with self._lock:
                self._status.clear()
                note(remark[1])
        for pattern, words in STEPS:
            match = pattern.match(line)
            if match:
                self._say(words.format(*match.groups()))
                return

    def clear(self) -> None:
        """Stop drawing."""
        self._ended.set()
        with self._lock:
            self._status.clear()

    def _say(self, step: str) -> None:
        if step != self._step and not can_redraw(sys.stderr):
            note(step)
        self._step = step

    def _draw(self) -> None:
        while not self._ended.wait(0.1):
            with self._lock:
                if not self._ended.is_set():
                    self._status.show(lambda: f"{time.monotonic() - self._begin:4.0f} s  {self._step}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
