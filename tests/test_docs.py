"""What the README promises exists: its commands, its files, its flags, its Python."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OF_THEIR_TIME = {"ATTEMPTS.md", "CHANGELOG.md"}  # they may name files that are gone
MAKEFILE = (ROOT / "Makefile").read_text()


def block(text: str, heading: str, index: int = 0) -> str:
    """An indented block after a heading: the first, if no index is given."""
    after = text.split(f"\n{heading}\n")[1]
    return textwrap.dedent(re.findall(r"(?:^ {4}.*\n)+", after, re.MULTILINE)[index])


def indented(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def test_every_make_command_is_a_target_with_a_help_line() -> None:
    mentioned = {
        target
        for line in indented(README)
        if line.startswith("make ")
        for target in line.split("#")[0].split()[1:]
    }
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)) - {"help"}
    explained = set(re.findall(r"^## make ([a-z-]+)", MAKEFILE, re.MULTILINE))
    assert {"run", "test"} <= mentioned <= targets
    assert explained == targets
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony and set(phony[1].split()) == targets | {"help"}


def test_every_flag_of_a_command_in_the_readme_exists() -> None:
    for script in ("run.py", "export.py", "train.py"):
        # after python, or after the number of processes to launch
        commands = re.findall(rf"^    .*(?:python|\d) {re.escape(script)} (.*)", README, re.MULTILINE)
        assert commands
        for command in commands:
            words = shlex.split(command, comments=True)
            stage = words[:1] if script == "train.py" else []
            help_text = subprocess.run(
                [sys.executable, str(ROOT / script), *stage, "--help"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for word in words:
                if word.startswith("-"):
                    assert re.search(rf"(?<![\w-]){word}(?![\w-])", help_text), f"{script} {word}"


def tree(text: str) -> Iterator[str]:
    """The paths of a tree that is drawn by indentation: `NAME/` is a folder, `a.py, b.py` are two files."""
    folders: dict[int, str] = {}
    for line in text.splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r" {2,}", line.strip())[0].split(", ")
        above = "".join(folder for depth, folder in sorted(folders.items()) if depth < indent)
        folders = {depth: folder for depth, folder in folders.items() if depth < indent}
        if names[0].endswith("/"):
            folders[indent] = names[0]
        yield from (above + name for name in names)


def sources(folder: str) -> set[str]:
    """Files of a folder that people write: none that Cython makes, none that its folder's line stands for."""
    found = {path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".pyx", ".c", ".h")}
    made = {path.with_suffix(".c") for path in found if path.suffix == ".pyx"}
    wings = set((ROOT / folder).rglob("*/__init__.py"))
    return {str(path.relative_to(ROOT)) for path in found - made - wings}


def test_the_tree_of_the_architecture_is_that_of_the_sources() -> None:
    named = [path for path in tree(block(ARCHITECTURE, "## The house")) if path.startswith("qwen3c/")]
    files = [path for path in named if not path.endswith("/")]
    assert len(set(files)) == len(files)
    assert set(files) == sources("qwen3c")
    for path in named:
        assert (ROOT / path).is_dir() == path.endswith("/")


def imported(path: Path) -> set[str]:
    """Rooms of qwen3c (modules and folders at its top) that a source imports from, anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    rooms = set()
    pattern = r"^[ \t]*from (\.+)([\w.]*) c?import (\([^)]*\)|.*)"
    for dots, name, names in re.findall(pattern, path.read_text(), re.MULTILINE):
        base = package[: len(package) - len(dots) + 1]
        parts = (*base, *name.split(".")) if name else base
        rooms |= {parts[1]} if len(parts) > 1 else set(re.findall(r"\w+", re.sub(r" as \w+|#.*", "", names)))
    return rooms - {"__version__"}


def test_imports_run_down_the_floors() -> None:
    floors = [line.split() for line in block(ARCHITECTURE, "## The house", 1).splitlines()]
    floor = {room: i for i, rooms in enumerate(floors) for room in rooms}
    sources = [p for p in (ROOT / "qwen3c").rglob("*.p*") if p.suffix in (".py", ".pyi", ".pyx", ".pxd")]
    rooms = {path: path.relative_to(ROOT / "qwen3c").parts[0].split(".")[0] for path in sources}
    assert set(rooms.values()) - {"__init__"} == floor.keys()
    arrows = {(str(p.relative_to(ROOT)), to) for p, room in rooms.items() for to in imported(p) if to != room}
    assert ("qwen3c/model.py", "engine") in arrows and ("qwen3c/engine/engine.pyx", "memory") in arrows
    up = {
        (path, to)
        for path, to in arrows
        if (room := rooms[ROOT / path]) != "__init__" and floor[to] <= floor[room]
    }
    assert not up


def test_the_tree_of_the_readme_is_that_of_the_folders() -> None:
    named = {path for path in tree(block(README, "## Where things are")) if path.endswith("/")}
    top = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} | {"docs/"}
    wings = {f"qwen3c/{path.parent.name}/" for path in ROOT.glob("qwen3c/*/*.py")}
    assert named == {name for name in top | wings if not name.startswith(("build", "."))}


def test_what_a_newcomer_is_told_to_change_is_there() -> None:
    """CONTRIBUTING's "How to add": each name stands in the file that it is said to stand in."""
    told = re.findall(r"`(\w+)` in `([\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert {path for _, path in told} >= {
        "format.py",
        "drivers/sampler.py",
        "cli/options.py",
        "kernels/dispatch.c",
    }
    for name, path in told:
        assert re.search(rf"\b{name}\b", (ROOT / "qwen3c" / path).read_text()), f"{name} in {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"(?<![\w/.])[\w/]+\.md\b", text):
        assert any((ROOT / folder / name).exists() for folder in ("", "docs")), name
    if page.name not in OF_THEIR_TIME:
        for path in re.findall(r"`((?:[a-z_]+/)+[a-z0-9_]+\.(?:py|pyx|c|h))`", text):
            assert any((ROOT / folder / path).exists() for folder in ("", "qwen3c")), path


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "qwen3c import" in code
    ]
    model = ROOT / "qwen3c" / "data" / "model.bin"
    exec(code.replace('"model.bin"', repr(str(model))).replace("max_tokens=200", "max_tokens=5"), {})
    assert capsys.readouterr().out


def test_what_runs_before_a_commit_is_what_lint_installs() -> None:
    hooks = re.findall(r"entry: \.venv/bin/(\w+)", (ROOT / ".pre-commit-config.yaml").read_text())
    pinned = re.search(r"^lint = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pinned and set(hooks) == set(re.findall(r'"(\w+)==[\d.]+"', pinned[1])) == {"ruff", "mypy"}


def test_ci_runs_what_contributing_promises() -> None:
    """It installs the oracles, then runs lint, the README's test command and the ARM tests."""
    parts = re.findall(r"^part make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert parts == ["oracles", "lint", "test || part again", "test-arm", "sanitize", "serial", "slow"]
    assert "make test" in indented(README)[1]


def test_every_test_that_is_named_is_there() -> None:
    """Checked in documents, the Makefile, tests and sources."""
    folders = ("tests", "qwen3c", "benchmarks", "recipe", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    pages = [path for path in PAGES if path.name not in OF_THEIR_TIME]
    missing = {
        f"{path.relative_to(ROOT)} names {name}"
        for path in [*sources, *pages, ROOT / "Makefile"]
        for name in re.findall(r"(?<![\w/])tests/[\w/]+\.(?:py|c|bin)\b", path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing
