"""Files written whole or not at all, and what the system says where that fails."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKS = fcntl is not None  # whether lock() does anything here
MODEL_IN_THE_BOX = Path(__file__).parents[1] / "data" / "model.bin"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path; what the block writes there replaces `path` at its end, but not after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it over; on any error the target is what it was. OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """What was written to a file is on the disk when this returns."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """What was created or renamed in it is on the disk when this returns, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)


def lock(file: BinaryIO, wait: bool) -> None:
    """Lock an open file until it is closed. OSError if another process holds the lock and wait is false."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def reason(error: OSError) -> str:
    """What the system says about a failed call; where too many files are open, also how many are allowed."""
    said = error.strerror or str(error)
    if error.errno != errno.EMFILE:
        return said
    try:
        import resource

        return f"{said}: the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n)"
    except (ImportError, OSError):  # Windows; or too many files are open to import a module
        return f"{said}: `ulimit -n` says how many this process may have"
