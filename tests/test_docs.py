"""What the README promises exists: its commands, its files, its flags, its Python."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


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
    assert set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()) == targets | {"help"}


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


def test_the_tree_names_every_source_and_nothing_else() -> None:
    tree = README.split("## How it is built")[1].split("Start with")[0]
    named = set(re.findall(r"\b([a-z_]+\.(?:py|pyx|pyi|h|c|bin))\b", tree))
    sources = {
        path.name
        for path in (ROOT / "qwen3c").rglob("*.py*")
        if path.suffix != ".pyc" and path.name not in ("__init__.py", "py.typed")
    }
    assert sources <= named, sources - named
    for name in named:
        assert list(ROOT.glob(f"**/{name}")), name
    for path in re.findall(r"[\w/]+\.md", README):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    model = ROOT / "qwen3c" / "data" / "model.bin"
    exec(code.replace('"model.bin"', repr(str(model))).replace("max_tokens=200", "max_tokens=5"), {})
    assert capsys.readouterr().out


def test_the_speed_table_says_where_when_and_how() -> None:
    speed = README.split("## Speed")[1].split("\n## ")[0]
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", speed) and "threads" in speed and "benchmarks/" in speed
    assert speed.count("|") > 12
