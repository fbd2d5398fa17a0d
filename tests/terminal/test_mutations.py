"""Broken progress, status lines, prompts and colours: each is noticed by a test of this folder.

qwen3c/system/terminal.py and two modules of qwen3c/cli are broken in a copy of the tree, in one way after the other, by what is
appended to them; the tests that are named must pass there before and fail after. Minutes, so only on request:

python -m pytest -m slow tests/terminal/test_mutations.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from screen import ROOT

pytestmark = pytest.mark.slow

PROGRESS = "test_progress_leaves_nothing_behind and perplexity and not verify"
NARROW = "test_progress_leaves_nothing_behind and 20 and (perplexity or generate)"
DUMB = "test_a_dumb_terminal and perplexity"
COLOUR = "test_no_color_is_no_colour and generate or test_notes_are_dim and generate"
INTERRUPT = "test_ctrl_c_ends_it_at_once and generate or test_text_that_came_before"
EXPORT = "an_export_typed and 80 or progress_line or test_progress_is_redrawn"
PROMPT = "test_ctrl_c_stops_a_reply_and_keeps_it"

# what is broken: (which tests notice, the code that breaks it)
MUTATIONS = {
    "the time left divides by what is done": (
        EXPORT,
        "_line = progress_line\n"
        "def progress_line(done, total, seconds, describe, width, **more):\n"
        "    (total - done) / (done / seconds)\n"
        "    return _line(done, total, seconds, describe, width, **more)",
    ),
    "a progress line is as wide as it likes": (
        EXPORT,
        "_line = progress_line\n"
        "progress_line = lambda done, total, seconds, describe, width, **more: "
        "_line(done, total, seconds, describe, width and 999, **more)",
    ),
    "progress is not drawn": (PROGRESS, "StatusLine.show = lambda self, text: None"),
    "a status line is never erased": (PROGRESS, "StatusLine.clear = lambda self: None"),
    "a status line is written over, not erased": (PROGRESS, "CLEAR_LINE = '\\r'"),
    "a status line ends in a line feed": (
        PROGRESS,
        "_show = StatusLine.show\nStatusLine.show = lambda self, text: _show(self, lambda: text() + '\\n')",
    ),
    "a status line is not cut": (NARROW, "columns = lambda stream: 10_000"),
    "a status line fills the last column": (
        NARROW,
        "_columns = columns\ncolumns = lambda stream: _columns(stream) + 1",
    ),
    "a dumb terminal is redrawn": (DUMB, "can_redraw = lambda stream: stream.isatty()"),
    "NO_COLOR is not asked for": (COLOUR, "has_colour = lambda stream: can_redraw(stream)"),
    "nothing is dim": (COLOUR, "has_colour = lambda stream: False"),
    "dim is never reset": (COLOUR, "RESET = ''"),
}
MUTATIONS_OF_SIGNALS = {
    "Ctrl-C is not caught": (
        INTERRUPT,
        "@contextmanager\ndef interruptible():\n    yield lambda: False",
    ),
}
MUTATIONS_OF_READER = {
    "there is no prompt": (
        PROMPT,
        "_read = MessageReader._line\nMessageReader._line = lambda self, prompt: _read(self, '')",
    ),
    "the prompt is another one": (
        PROMPT,
        "_read = MessageReader._line\nMessageReader._line = lambda self, prompt: _read(self, '%' + prompt)",
    ),
}
MODULES = {
    "terminal.py": MUTATIONS,
    "cli/signals.py": MUTATIONS_OF_SIGNALS,
    "cli/reader.py": MUTATIONS_OF_READER,
}
CASES = {what: (module, *case) for module, cases in MODULES.items() for what, case in cases.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without what is built, run over and remembered."""
    copy = tmp_path_factory.mktemp("mutant") / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "__pycache__", ".*_cache", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def sound() -> set[str]:
    """The selections of tests that were seen to pass."""
    return set()


@pytest.mark.parametrize("what", CASES)
def test_what_is_broken_is_noticed(what: str, tree: Path, sound: set[str]) -> None:
    module, tests, code = CASES[what]
    if tests not in sound:
        done = run_tests(tree, tests)
        assert done.returncode == 0, f"fails before anything is broken:\n{done.stdout[-3000:]}"
        sound.add(tests)
    broken = tree / "qwen3c" / module
    whole = broken.read_text(encoding="utf-8")
    try:
        broken.write_text(f"{whole}\n\n{code}\n", encoding="utf-8")
        done = run_tests(tree, tests)
    finally:
        broken.write_text(whole, encoding="utf-8")
    assert done.returncode == 1, f"nobody noticed:\n{done.stdout[-3000:]}"
    assert "SyntaxError" not in done.stdout and "NameError" not in done.stdout, done.stdout[-3000:]


def run_tests(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    files = ["tests/terminal", "tests/test_terminal.py"]
    command = [sys.executable, "-m", "pytest", *files, "-x", "-k", tests, "-p", "no:cacheprovider"]
    # without byte code: that of the same length and second would be taken for what is there now
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PATIENCE": "15"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
