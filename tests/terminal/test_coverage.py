"""docs/TERMINAL.md names a test for everything a person can type, in all circumstances, and the tests exist.

python -m pytest tests/terminal/test_coverage.py
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from modes import MODES
from screen import ROOT

from qwen3c.cli import options, train_options

HERE = Path(__file__).parent
PAGE = (ROOT / "docs" / "TERMINAL.md").read_text(encoding="utf-8")
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith("|--")
]
CIRCUMSTANCES, ROWS = TABLE[0][1:], {row[0].strip("`"): row[1:] for row in TABLE[1:]}
TESTS = dict(re.findall(r"^- (\w+): `([\w.]+::\w+)`$", PAGE, re.MULTILINE))
MODULES_OF_BENCHMARKS = {  # imported by the scripts, or started by them
    "ctranslate2_peer", "engines", "llamacpp", "openvino_peer", "ours", "pictures", "random_model", "worker",
}  # fmt: skip
MODULES_OF_RECIPE = {"arithmetic", "conversations", "functions", "rewards", "talk"}


def test_the_circumstances_are_those_of_a_terminal() -> None:
    assert CIRCUMSTANCES == [
        "terminal", "pipe", "dumb terminal", "narrow", "interrupted", "closed", "resized", "suspended",
    ]  # fmt: skip


def test_everything_that_can_be_typed_has_a_row_and_nothing_else_has() -> None:
    modes = {f"run.py -m {mode}" for mode in {*options.MODES, *MODES}}
    stages = next(
        a for a in train_options.new_parser()._actions if isinstance(a, argparse._SubParsersAction)
    ).choices
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0]
    installed = {line.split(" = ")[0] for line in scripts.splitlines()}
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    expected = modes | {"export.py"} | {f"train.py {stage}" for stage in stages} | installed
    expected |= {f"make {target}" for target in targets}
    for folder, modules in (
        ("examples", set()),
        ("benchmarks", MODULES_OF_BENCHMARKS),
        ("recipe", MODULES_OF_RECIPE),
    ):
        expected |= {f"{folder}/{p.name}" for p in (ROOT / folder).glob("*.py") if p.stem not in modules}
    expected.add("python -m qwen3c")
    assert set(ROWS) == expected


def test_the_scripts_of_the_root_are_those_of_the_table() -> None:
    scripts = {path.name for path in ROOT.glob("*.py")} - {"setup.py", "environment.py"}  # make's
    assert scripts == {name.split()[0] for name in ROWS if re.match(r"\w+\.py", name)}


@pytest.mark.parametrize("name", ROWS)
def test_no_cell_is_empty(name: str) -> None:
    """A cell names tests, or gives a reason of at least three words."""
    cells = ROWS[name]
    assert len(cells) == len(CIRCUMSTANCES)
    for circumstance, cell in zip(CIRCUMSTANCES, cells, strict=True):
        reason = re.fullmatch(r"\((?:[^\s()]+\s+){2,}[^()]+\)", cell)
        assert reason or (cell and set(cell.split()) <= TESTS.keys()), f"{name}, {circumstance}: {cell!r}"


def test_every_named_test_exists_and_every_name_is_used() -> None:
    for test in TESTS.values():
        file, function = test.split("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
    assert (
        TESTS.keys()
        == {word for cells in ROWS.values() for cell in cells for word in cell.split()} & TESTS.keys()
    )


def test_a_test_of_many_commands_has_the_command_that_names_it() -> None:
    """The ids of all tests as pytest collects them; a mode or an example is a parameter of some."""
    pytest_ = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "--no-header",
    ]  # with the -q of pyproject.toml: a line each
    files = [str(HERE / name) for name in ("test_modes.py", "test_examples.py")]
    done = subprocess.run([*pytest_, *files], cwd=ROOT, capture_output=True, text=True, timeout=60)
    ids = [line.rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line]
    assert ids, done.stdout + done.stderr
    parameters = {f"run.py -m {mode}": mode for mode in MODES}
    parameters |= {name: Path(name).stem for name in ROWS if name.startswith("examples/")}
    for name, parameter in parameters.items():
        for code in {
            word for cell in ROWS[name] for word in cell.split() if word[0] in "ME" and word in TESTS
        }:
            with_it = rf"{re.escape(TESTS[code])}\[(?:.*-)?{re.escape(parameter)}\]"
            collected = [id for id in ids if id.startswith(TESTS[code] + "[")]
            assert not collected or any(re.fullmatch(with_it, id) for id in collected), (name, code)
