"""Setting up: what is missing is one line, said before anything is downloaded or built.

python -m pytest tests/test_setup.py
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def missing(
    *words: str, version: tuple[object, ...] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python setup.py missing`, in a Python that claims to be of another version if one is given."""
    claim = f"sys.version_info = {version}; " if version else ""
    script = (
        f"import sys, runpy; {claim}sys.argv = ['setup.py', *sys.argv[1:]]; runpy.run_path('setup.py', "
        "run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *(words or ("missing",))],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def compiler(tmp_path: Path, body: str) -> str:
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and not done.stdout
    (only,) = done.stderr.splitlines()
    return only


def test_where_nothing_is_missing_nothing_is_said() -> None:
    done = missing("missing", "venv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_compiler_is_one_line() -> None:
    assert line(missing(CC="/nowhere/cc -m64")).startswith(
        "qwen3c: a C compiler is needed, /nowhere/cc is not one ("
    )


def test_a_compiler_that_does_not_work_is_one_line(tmp_path: Path) -> None:
    cc = compiler(
        tmp_path, "echo 'In file included from x:1:' >&2; echo 'x.h:3: fatal error: no stdlib.h' >&2; exit 1"
    )
    assert (
        line(missing(CC=cc)) == f"qwen3c: the C compiler {cc} does not work: x.h:3: fatal error: no stdlib.h"
    )
    cc = compiler(tmp_path, "exit 4")
    assert line(missing(CC=cc)) == f"qwen3c: the C compiler {cc} does not work: it ends with status 4"


def test_missing_headers_of_python_are_one_line(tmp_path: Path) -> None:
    cc = compiler(tmp_path, 'for f; do case $f in *.c) ! grep -q Python.h "$f"; exit;; esac; done')
    assert re.search(
        r"^qwen3c: Python's headers are needed, /\S+ has no Python\.h \(Debian: ", line(missing(CC=cc))
    )


def test_an_old_python_is_one_line_whatever_is_asked_of_it() -> None:
    for command in ("missing", "egg_info", "bdist_wheel", "install"):
        said = line(missing(command, version=(3, 8, 10, "final", 0)))
        assert said.startswith(
            f"qwen3c: Python 3.10 or later is needed, {sys.executable} is 3.8.10 (make run PYTHON="
        )


def test_without_a_compiler_a_build_says_it_before_it_does_anything() -> None:
    for command in ("bdist_wheel", "editable_wheel", "build_ext", "install"):
        assert line(missing(command, CC="/nowhere/cc")).startswith("qwen3c: a C compiler is needed")


def test_what_compiles_nothing_needs_no_compiler(tmp_path: Path) -> None:
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.M)
    assert version
    for words in (["--version"], ["--quiet", "egg_info", "--egg-base", str(tmp_path)]):
        done = missing(*words, CC="/nowhere/cc")
        assert done.returncode == 0 and "ython" not in done.stdout, done
        assert done.stdout.strip() in (version[1], ""), done


def test_every_package_is_installed() -> None:
    packages = re.findall(r'"([\w.]+)"', PYPROJECT.partition("\npackages = [")[2].partition("]")[0])
    found = [path.parent.relative_to(ROOT) for path in (ROOT / "qwen3c").rglob("__init__.py")]
    assert sorted(packages) == sorted(".".join(path.parts) for path in found)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_the_source_distribution_has_every_file_that_git_has(tmp_path: Path) -> None:
    done = missing("-q", "egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    packed = set((tmp_path / "qwen3c.egg-info" / "SOURCES.txt").read_text().splitlines())
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {name for name in git.stdout.splitlines() if not name.startswith(".") and (ROOT / name).exists()}
    assert not files - packed
    assert not {name for name in packed if name.endswith((".so", ".pyc")) or name.startswith("build/")}
    assert {name for name in packed if name.endswith(".c")} <= files


def test_a_missing_venv_module_is_one_line() -> None:
    script = (
        "import sys, runpy; sys.modules['ensurepip'] = None; sys.argv = ['setup.py', 'missing', 'venv'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert line(done).endswith("lacks the module venv (Debian: apt install python3-venv)")


def test_old_pythons_can_read_what_refuses_them() -> None:
    ast.parse((ROOT / "setup.py").read_text(), feature_version=(3, 6))
    assert "from __future__" not in (ROOT / "setup.py").read_text()  # which 3.6 has not
    requires = PYPROJECT.partition("requires = [")[2].partition("]")[0]
    assert "setuptools>=61; python_version<'3.10'" in requires, (
        "the resolver would refuse before setup.py can"
    )


def test_extras_have_what_the_tests_and_the_linters_need() -> None:
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL))
    for name in ("pytest", "pexpect", "pyte", "openai", "anthropic", "playwright", "jsonschema"):
        assert f'"{name}>=' in extras["test"]
    for name in ("starlette", "uvicorn", "h11", "httpx2", "llguidance", "prometheus_client"):
        assert f'"{name}>=' in extras["serve"]
    assert '"mcp>=' in extras["mcp"]
    assert all(re.search(rf'"{name}==[\d.]+"', extras["lint"]) for name in ("ruff", "mypy"))


def test_the_compiler_that_reads_no_name_of_f16c_finds_it_all_the_same() -> None:
    """clang before 15 refuses __builtin_cpu_supports("f16c")."""
    assert '"f16c"' not in (ROOT / "qwen3c" / "kernels" / "dispatch.c").read_text()


@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang")
@pytest.mark.parametrize("source", ["dispatch.c", "avx2.c", "avxvnni.c", "avx512vnni.c", "amx.c", "scalar.c"])
def test_clang_compiles_the_kernels(source: str) -> None:
    command = [
        "clang",
        "-fsyntax-only",
        "-Werror",
        "-std=c11",
        "-ffp-contract=off",
        f"qwen3c/kernels/{source}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
