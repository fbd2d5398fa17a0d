"""Broken progress, status lines, prompts and colours: each is noticed by a test of this folder.

A module is broken in a copy of the tree, in one way after the other, by what is appended to it; the tests
that are named must pass there before and fail after. Minutes, so only on request:

python -m pytest -m slow tests/terminal/test_mutations.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from screen import ROOT

pytestmark = pytest.mark.slow

# what notices: a file of tests, and which of them
PROGRESS = "tests/terminal/test_modes.py", "test_progress_leaves_nothing_behind and perplexity"
NARROW = "tests/terminal/test_modes.py", "test_progress_leaves_nothing_behind and 20 and bench"
DUMB = "tests/terminal/test_modes.py", "test_a_dumb_terminal and perplexity"
COLOUR = (
    "tests/terminal/test_modes.py",
    "test_no_color_is_no_colour and generate or test_notes_are_dim and generate",
)
INTERRUPT = "tests/terminal/test_modes.py", "test_text_that_came_before_ctrl_c_stays"
EXPORT = "tests/terminal/test_export.py", "test_the_bar_goes_from_nothing_to_all"
PROMPT = "tests/terminal/test_chat.py", "test_the_first_screen"
KEYS = "tests/terminal/test_chat.py", "test_ctrl_z_gives"


@dataclass(frozen=True)
class Mutation:
    """`code`, appended to `module` of qwen3c/, breaks it; `tests` notice."""

    tests: tuple[str, str]
    code: str
    module: str = "system/terminal.py"


MUTATIONS = {
    "the time left divides by what is done": Mutation(
        EXPORT,
        "_line = progress_line\n"
        "def progress_line(done, total, seconds, describe, width, **rest):\n"
        "    (total - done) / (done / seconds)\n"
        "    return _line(done, total, seconds, describe, width, **rest)",
    ),
    "a progress line is as wide as it likes": Mutation(
        EXPORT,
        "_line = progress_line\n"
        "def progress_line(done, total, seconds, describe, width, **rest):\n"
        "    return _line(done, total, seconds, describe, width and 999, **rest)",
    ),
    "progress is not drawn": Mutation(PROGRESS, "StatusLine.show = lambda self, text: None"),
    "a status line is never erased": Mutation(PROGRESS, "StatusLine.clear = lambda self: None"),
    "a status line is written over, not erased": Mutation(PROGRESS, "CLEAR_LINE = '\\r'"),
    "a status line ends in a line feed": Mutation(
        PROGRESS,
        "_show = StatusLine.show\nStatusLine.show = lambda self, text: _show(self, lambda: text() + '\\n')",
    ),
    "a status line is not cut": Mutation(NARROW, "columns = lambda stream: 10_000"),
    "a status line fills the last column": Mutation(
        NARROW, "_columns = columns\ncolumns = lambda stream: _columns(stream) + 1"
    ),
    "a dumb terminal is redrawn": Mutation(DUMB, "can_redraw = lambda stream: stream.isatty()"),
    "NO_COLOR is not asked for": Mutation(COLOUR, "has_colour = lambda stream: can_redraw(stream)"),
    "nothing is dim": Mutation(COLOUR, "has_colour = lambda stream: False"),
    "dim is never reset": Mutation(COLOUR, "RESET = ''"),
    "Ctrl-C is not caught": Mutation(
        INTERRUPT, "@contextmanager\ndef interruptible():\n    yield lambda: False", "cli/signals.py"
    ),
    "there is no prompt": Mutation(
        PROMPT,
        "_read = MessageReader._line\nMessageReader._line = lambda self, prompt: _read(self, '')",
        "cli/reader.py",
    ),
    "the prompt is another one": Mutation(
        PROMPT,
        "_read = MessageReader._line\nMessageReader._line = lambda self, prompt: _read(self, '%' + prompt)",
        "cli/reader.py",
    ),
    "Ctrl-Z loses the line": Mutation(
        KEYS, "_edited_line = lambda readline, prompt: input(prompt)", "cli/reader.py"
    ),
}


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
def sound() -> set[tuple[str, str]]:
    """The selections of tests that were seen to pass."""
    return set()


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_is_broken_is_noticed(what: str, tree: Path, sound: set[tuple[str, str]]) -> None:
    mutation = MUTATIONS[what]
    if mutation.tests not in sound:
        done = run_tests(tree, *mutation.tests)
        assert done.returncode == 0, f"fails before anything is broken:\n{done.stdout[-3000:]}"
        sound.add(mutation.tests)
    module = tree / "qwen3c" / mutation.module
    whole = module.read_text(encoding="utf-8")
    try:
        module.write_text(f"{whole}\n\n{mutation.code}\n", encoding="utf-8")
        done = run_tests(tree, *mutation.tests)
    finally:
        module.write_text(whole, encoding="utf-8")
    assert done.returncode == 1, f"nobody noticed:\n{done.stdout[-3000:]}"
    assert "SyntaxError" not in done.stdout and "NameError" not in done.stdout, done.stdout[-3000:]


def run_tests(tree: Path, file: str, chosen: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", file, "-x", "-k", chosen, "-p", "no:cacheprovider"]
    # without byte code: that of the same length and second would be taken for what is there now
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PATIENCE": "15"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
