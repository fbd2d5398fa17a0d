"""Files written whole or not at all; and what a file that is not the expected one most likely is."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

# first bytes -> (what such a file is, what to do with it)
KINDS = {
    b"GGUF": ("a GGUF file", "`python export.py {path} model.bin` converts it"),
    b"version https://git-lfs": ("a git-lfs pointer", "`git lfs pull` in its folder fetches the file itself"),
    b"PK\x03\x04": (
        "a PyTorch or zip file",
        "export.py converts a folder with *.safetensors, or a GGUF file",
    ),
    b"<!DOCTYPE html": ("a web page", "the download brought no model; `hf download` does"),
}
SAFETENSORS = ("a safetensors file", "`python export.py {folder} model.bin` converts its folder")
MODEL_IN_THE_BOX = Path(__file__).with_name("data") / "model.bin"
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, by the format's own rule


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path whose file, once the block is done, takes the place of `path`; on any error nothing does."""
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
    """The same for what was created or renamed in it, where the system can say so."""
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


def likely_kind(path: str, start: bytes) -> str | None:
    """What a file that begins with `start` (nine bytes or more) is and what to do with it; None if nobody can tell."""
    found = next(
        (kind for first, kind in KINDS.items() if start[: len(first)].lower() == first.lower()), None
    )
    if found is None and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_SAFETENSORS_HEADER:
        found = SAFETENSORS
    if found is None:
        return None
    kind, advice = found
    return f"{kind}; " + advice.format(
        path=shlex.quote(path), folder=shlex.quote(os.path.dirname(path) or ".")
    )


def download_hint(path: str) -> str | None:
    """How to fetch `path` if it is no path, but reads like a model's name on the Hugging Face Hub; else None."""
    owner, _, name = path.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) or os.path.exists(owner):
        return None
    if name.endswith((".bin", ".gguf", ".safetensors", ".json")):
        return None
    return f"`hf download {path} --local-dir {name}` fetches it from the Hugging Face Hub"


def hint_if_missing(path: str) -> str:
    """What to do where a model.bin was expected at `path` and nothing is there; goes behind the complaint."""
    download = download_hint(path)
    if download is None:
        return "; `python export.py DIR model.bin` makes one of a Hugging Face model or a GGUF file"
    return f"; {download}, then `python export.py {path.partition('/')[2]} model.bin` converts it"


def hint_if_directory(path: str) -> str:
    """What to do where a model.bin was expected and `path` is a directory; "" if nobody can tell."""
    inside = os.path.join(path, "model.bin")
    if os.path.isfile(inside):
        return f"; did you mean {inside}?"
    if os.path.isfile(os.path.join(path, "config.json")):
        return f"; `python export.py {shlex.quote(path)} model.bin` converts it"
    return ""


def reason(error: OSError) -> str:
    """What the system says about a failed call; of too many open files, how many are allowed."""
    said = error.strerror or str(error)
    if error.errno != errno.EMFILE:
        return said
    try:
        import resource

        return f"{said}: the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n)"
    except (ImportError, OSError):  # Windows; or there is no file left to open the module with
        return f"{said}: `ulimit -n` says how many this process may have"
