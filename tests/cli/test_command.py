"""How every command ends: its exit status, its one line, the name in it.

python -m pytest tests/cli/test_command.py
"""

from __future__ import annotations

import argparse
import errno
import importlib.machinery
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small_models import write_small_model

from qwen3c.cli import command, export, run, train
from qwen3c.cli.signals import ENDING

ROOT = Path(__file__).parents[2]
# a command and arguments that its parser takes
COMMANDS: list[tuple[ModuleType, list[str]]] = [
    (run, ["-m", "info"]),
    (export, ["source", "out.bin"]),
    (train, ["pretrain", "texts", "-o", "out"]),
]
every_command = pytest.mark.parametrize(
    ("module", "argv"), COMMANDS, ids=[module.__name__ for module, _ in COMMANDS]
)


def imported_badly() -> ImportError:
    """NumPy's ImportError is a page of advice; its cause has the reason."""
    error = ImportError("IMPORTANT: PLEASE READ THIS\n" * 20)
    error.__cause__ = ImportError("libopenblas.so: failed to map segment")
    return error


@every_command
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("of two\n  lines"), 2, "of two lines"),
        (ValueError("a file's \x1b[2J"), 2, "a file's \\u001b[2J"),
        (RuntimeError("can't start new thread"), 2, "can't start new thread"),
        (OSError(errno.EACCES, "Permission denied", "a.bin"), 2, "a.bin: Permission denied"),
        (OSError(errno.EINVAL, "Invalid argument"), 2, "Invalid argument"),
        (OSError(errno.EMFILE, "Too many open files", "a.bin"), 2,
         "a.bin: Too many open files: the limit is "),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write: No space left on device"),
        (MemoryError("no room for 4 MiB"), 2, "out of memory: no room for 4 MiB"),
        (ModuleNotFoundError("No module named 'jinja2'"), 2, "No module named 'jinja2': `pip install .` in"),
        (imported_badly(), 2, "libopenblas.so: failed to map segment"),
    ],
)  # fmt: skip
def test_every_command_says_an_error_in_the_same_line_with_the_same_status(
    module: ModuleType,
    argv: list[str],
    error: Exception,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(module, "_work", fail)
    assert module.main(argv) == status
    name = module.__name__.rpartition(".")[2]
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"{name}.py: error: {said}") and err.count("\n") == 1, err


@every_command
def test_a_reader_that_has_left_is_no_error(
    module: ModuleType, argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(module, "_work", fail)
    assert module.main(argv) == 141
    assert capfd.readouterr() == ("", "")


@every_command
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_every_command_ends_by_a_signal_with_its_number(
    module: ModuleType,
    argv: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cleaned_up = []

    def be_ended(args: argparse.Namespace) -> int:
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            cleaned_up.append(True)
        return 0

    monkeypatch.setattr(module, "_work", be_ended)
    assert module.main(argv) == 128 + getattr(signal, name) and cleaned_up
    word = ENDING[name]
    expected = {
        run: "",
        export: f"export.py: error: out.bin: {word}, nothing was written\n",
        train: f"train.py: {word}\n",
    }
    assert capfd.readouterr() == ("", expected[module])


@every_command
def test_a_usage_error_is_one_line(
    module: ModuleType, argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main([*argv, "--no\x07such\x1b"])
    name = module.__name__.rpartition(".")[2]
    expected = f"{name}.py: error: unrecognized arguments: --no\\u0007such\\u001b\n"
    assert (ended.value.code, *capfd.readouterr()) == (2, "", expected)


def test_an_error_without_a_file_is_about_what_is_being_done() -> None:
    for error, said in [
        (OSError(errno.ENOSPC, "No space left on device"), "model.bin: No space left on device"),
        (MemoryError("4 MiB"), "model.bin: out of memory: 4 MiB"),
        (MemoryError(), "model.bin: out of memory"),
    ]:
        with pytest.raises(ValueError, match=f"^{said}"), command.concerning("model.bin"):
            raise error
    with pytest.raises(OSError, match="other"), command.concerning("model.bin"):
        raise OSError(errno.EACCES, "Permission denied", "other")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_estimate_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "export.py", source, "--estimate"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "export.py: error: cannot write: No space left on device\n")


@pytest.mark.parametrize("stream", ["> /dev/full 2>&1", "2>&-", "2> /dev/full"])
@pytest.mark.parametrize("script", ["run.py", "export.py", "train.py"])
def test_an_error_that_nobody_can_read_is_still_its_status(script: str, stream: str, tmp_path: Path) -> None:
    shell = f'exec "$0" "$1" --no-such-option {stream}'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, ROOT / script], capture_output=True, cwd=tmp_path, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize(
    ("module", "start"), [("qwen3c", "[MODEL]"), ("qwen3c.cli.run", "[MODEL]"), ("qwen3c.cli.export",
                                                                                 "SRC OUT.bin")]
)  # fmt: skip
def test_a_module_of_a_command_starts_it(module: str, start: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {module} {start}"), done.stderr


@pytest.mark.parametrize(
    ("argv", "module", "name"),
    [
        ("export.py", None, "export.py"),
        ("/usr/bin/qwen3c-export", None, "qwen3c-export"),
        ("/lib/qwen3c/export.py", "qwen3c.export", "python -m qwen3c.export"),
        ("/lib/qwen3c/__main__.py", "qwen3c.__main__", "python -m qwen3c"),
        ("/lib/pytest/__main__.py", "pytest.__main__", "export.py"),
        ("-c", None, "export.py"),
        ("/bin/convert.py", None, "convert.py"),
        ("/lib/qwen3c/cli/export.py", "qwen3c.cli.export", "python -m qwen3c.cli.export"),
    ],
)
def test_a_program_is_called_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, argv: str, module: str | None, name: str
) -> None:
    spec = importlib.machinery.ModuleSpec(module, None) if module else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [argv])
    assert command.program_name("export.py") == name
