"""How run.py, export.py and train.py end: exit status, last line, and the name they go by.

Exit statuses: 0 done, 1 stdout or stderr cannot be written to, 2 refused, 128 + N ended by signal N. Whatever
goes wrong is one line on stderr, "NAME: error: ...", and never a traceback.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..system.files import reason
from ..system.terminal import CLEAR_LINE, abandon_closed_streams, can_redraw, escaped, open_streams, unheard
from .signals import Ended, ending

PACKAGE = __name__.partition(".")[0]
COMPILED = ("engine.engine", "engine.forward", "kernels.table")  # the modules that setup.py builds
WRITE_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EBADF, errno.EAGAIN}
CANNOT_WRITE, REFUSED = 1, 2
SIGPIPE = 13  # by its number: Windows has no such signal


def answer(
    argv: Sequence[str] | None,
    *,
    script: str,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    work: Callable[[argparse.Namespace], int],
    ended: Callable[[argparse.Namespace, str], str] | None = None,
    cure: str = "",
) -> int:
    """The exit status of a command: `work` does what `parse` read from argv (None: the command line).

    script: the program's name if its start does not tell one (see program_name).
    ended: (arguments, what the signal did) -> the last line after a signal; None: no such line.
    cure: advice for when memory runs out: what takes less.
    """
    open_streams()
    args = parse(argv)
    with ending():
        try:
            status = work(args)
            sys.stdout.flush()
        except KeyboardInterrupt as interrupt:
            end = interrupt if isinstance(interrupt, Ended) else Ended()
            line = end.line or (ended(args, end.word) if ended else "")
            _say_last(line and f"{program_name(script)}: {line}")
            status = end.status
        except (ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
            status = _failed(script, error, cure)
        abandon_closed_streams()
    return status


def _failed(script: str, error: Exception, cure: str) -> int:
    """Report an error; returns the status. A closed stdout (`| head`) is no error but ends as by SIGPIPE."""
    if not is_write_error(error):
        say_error(script, one_line(error, cure))
        return REFUSED
    if isinstance(error, BrokenPipeError):
        return 128 + SIGPIPE
    say_error(script, f"cannot write: {one_line(error)}")
    return CANNOT_WRITE


def _say_last(line: str) -> None:
    """Print `line` in place of the ^C that the terminal shows; if it is empty, end the line of the ^C."""
    begin = ""
    if sys.stderr.isatty():
        begin = CLEAR_LINE if line and can_redraw(sys.stderr) else "\n"
    with unheard():
        print(begin + line, end="\n" * bool(line), file=sys.stderr, flush=True)


def say_error(script: str, message: str) -> None:
    """One line on stderr, "NAME: error: ..."; if stderr is closed, nothing."""
    with unheard():
        text = escaped(" ".join(message.split()))
        print(f"{program_name(script)}: error: {text}", file=sys.stderr, flush=True)


@contextmanager
def concerning(path: str) -> Iterator[None]:
    """Within, a MemoryError, or an OSError that names no file, becomes an error about `path`."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path}: {one_line(error)}") from error


# ----------------------------------------------------------------------------
# Words


def program_name(script: str) -> str:
    """What a person typed to start this program: an installed command, `python -m` and a module, or a script.

    If it was started in no such way (`python -c`, a test), the name is `script`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith(PACKAGE):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"python -m {PACKAGE}" if started.parent.name == PACKAGE else script
    if started.suffix == ".py":
        return started.name
    return started.stem if started.stem.startswith(PACKAGE) else script


def one_line(error: Exception, cure: str = "") -> str:
    """An error in one line for people. cure: advice for a MemoryError without any text."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        about = " ".join(str(error).split()) if isinstance(error, MemoryError) else ""
        about = about or _room_left() or cure
        return f"out of memory: {about}" if about else "out of memory"
    if isinstance(error, OSError):
        return reason(error) if error.filename is None else f"{error.filename}: {reason(error)}"
    if isinstance(error, ImportError):
        return _missing(error)
    return " ".join(str(error).split())


def is_write_error(error: Exception) -> bool:
    """Whether an error comes from writing to stdout or stderr: an OSError without a file name."""
    return isinstance(error, OSError) and error.filename is None and error.errno in WRITE_ERRORS


def _room_left() -> str:
    """How much address space is left under this process's limit, in words; "" without a limit."""
    from ..system.machine import address_space

    limit = address_space()
    if limit is None:
        return ""
    return f"{limit.name} leaves {limit.left >> 20} of {limit.size >> 20} MiB of address space"


def _missing(error: ImportError) -> str:
    """Why a module could not be imported, and what to do about it."""
    if isinstance(error.__cause__, ImportError):
        error = error.__cause__  # NumPy's ImportError is a page of advice around the real reason
    if (error.name or "").startswith(PACKAGE) and not _is_built():
        return "the engine is not built: `make run` (or `pip install .`) in the folder of qwen3c builds it"
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: `pip install .` in the folder of qwen3c builds and installs what is missing"
    return text


def _is_built() -> bool:
    try:
        return all(importlib.util.find_spec(f"{PACKAGE}.{name}") for name in COMPILED)
    except ImportError:
        return False  # find_spec of a submodule imports its package, which may itself import what is missing


# ----------------------------------------------------------------------------
# Arguments


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors are one line; the usage is in --help."""

    def __init__(self, script: str, *, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog=prog or program_name(script), **options)
        self._script = script

    def error(self, message: str) -> NoReturn:
        say_error(self._script, message)
        self.exit(REFUSED)


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `low`."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is not at least {low}")
        return value

    return whole_number
