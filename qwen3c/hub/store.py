"""Where models of the Hub are kept here: the cache, and who may write to it.

    Qwen--Qwen3-0.6B/                   a folder for each repository
        refs/main                       the commit that a branch or a tag meant when it was asked for
        COMMIT/
            bits-8.bin, bits-4.bin      converted, by the options of the conversion
            Qwen3-Q8_0.gguf.bits-8.bin  the same of a GGUF file
            source/                     what was downloaded, as it is in the repository; NAME.part: so far
    .locks/                             one process at a time writes to a folder

A file stands under its name when it is whole, and not before; so whatever ends a process, the next one goes
on.
Nothing here opens a socket or needs the client of the Hub.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..system.files import write_whole
from ..system.names import MAIN, Name, is_commit

BITS = "8"  # of a conversion that says nothing else
PART = ".part"  # ends the name of a file that is not whole yet
COMPLETE = ".complete"  # in `source`: every file of safetensors that is read is there
_BETWEEN = "--"  # in place of a slash; no repository has it in its name
_WAIT = 0.1  # seconds between two looks at a lock that another process holds


def root() -> Path:
    """The folder of the cache: QWEN3C_CACHE, else that of XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("QWEN3C_CACHE"):
        return Path(os.path.abspath(chosen))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3c"


class Place:
    """Where a model of the Hub is here, or would be."""

    def __init__(self, name: Name) -> None:
        self.name = name
        self.folder = root() / name.repository.replace("/", _BETWEEN)
        self._ref = self.folder / "refs" / name.revision.replace("/", _BETWEEN)

    def commit(self) -> str | None:
        """The commit that the revision meant when it was first asked for; None if it never was."""
        if is_commit(self.name.revision):
            return self.name.revision
        try:
            commit = self._ref.read_text(encoding="utf-8").strip()
        except OSError:
            return None
        return commit if is_commit(commit) else None

    def remember(self, commit: str) -> None:
        """From now on the revision means `commit`, without asking anyone; and a person wants that commit."""
        self._ref.parent.mkdir(parents=True, exist_ok=True)
        for leftover in self._ref.parent.glob(".*.tmp"):  # of a process that was killed here
            leftover.unlink()
        write_whole(self._ref, commit + "\n")

    def forget(self) -> None:
        """The revision is to be asked for again."""
        self._ref.unlink(missing_ok=True)

    def model(self, commit: str, bits: str) -> Path:
        """The converted model."""
        of_file = f"{self.name.file.replace('/', _BETWEEN)}." if self.name.file else ""
        return self.folder / commit / f"{of_file}bits-{bits}.bin"

    def source(self, commit: str) -> Path:
        """The folder of what was downloaded."""
        return self.folder / commit / "source"

    def whole_source(self, commit: str) -> Path | None:
        """What the exporter is given, a directory or a GGUF file, once all of it is there."""
        folder = self.source(commit)
        whole = folder / (self.name.file or COMPLETE)
        return (whole if self.name.file else folder) if whole.is_file() else None


def find(name: Name, bits: str = BITS) -> Path | None:
    """The converted model of a name; None if it is not here."""
    place = Place(name)
    commit = place.commit()
    path = place.model(commit, bits) if commit else None
    return path if path and path.is_file() else None


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Within, no other process writes to the folder of a repository. Whatever ends a process frees its lock.

    waiting: called again and again while another process has it. Without it nobody waits, and the value is
    whether the lock was free.
    """
    from filelock import FileLock, Timeout

    (root() / ".locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(root() / ".locks" / f"{folder.name}.lock")
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if waiting is None:
                yield False
                return
            waiting()
            time.sleep(_WAIT)
    try:
        yield True
    finally:
        lock.release()


# ----------------------------------------------------------------------------
# What is kept


@dataclass(frozen=True)
class Kept:
    """What is kept of one commit of a repository.

    revisions: the branches and tags that mean it, and its own hash if a person asked for that. models:
    converted files. sources: what was downloaded whole. parts: what was begun.
    """

    repository: str
    commit: str
    revisions: tuple[str, ...]
    models: tuple[Path, ...]
    sources: tuple[Path, ...]
    parts: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return root() / self.repository.replace("/", _BETWEEN) / self.commit

    def name_of(self, model: Path) -> str:
        """What a person types for a converted model, without its bits."""
        revision = MAIN if MAIN in self.revisions else min(self.revisions, default=self.commit)
        file, dot, _ = model.name.partition(".gguf.bits-")
        return str(Name(self.repository, revision, file.replace(_BETWEEN, "/") + ".gguf" if dot else ""))

    @staticmethod
    def bits_of(model: Path) -> str:
        """The bits that a converted model was asked for with."""
        match = re.search(r"bits-([\d.]+)\.bin$", model.name)
        return match[1] if match else ""


def inventory() -> list[Kept]:
    """Everything in the cache, by repository and commit."""
    kept = []
    for folder in sorted(root().glob(f"*{_BETWEEN}*")):
        refs: dict[str, list[str]] = {}
        for ref in sorted(folder.glob("refs/[!.]*")):
            refs.setdefault(ref.read_text(encoding="utf-8").strip(), []).append(
                ref.name.replace(_BETWEEN, "/")
            )
        for commit in sorted(path.name for path in folder.iterdir() if is_commit(path.name)):
            files = sorted(path for path in (folder / commit / "source").rglob("*") if path.is_file())
            models = sorted((folder / commit).glob("*bits-*.bin"))
            unfinished = {path for path in files if path.suffix == PART}
            unfinished |= set((folder / commit).glob(".*.tmp"))
            kept.append(
                Kept(
                    folder.name.replace(_BETWEEN, "/"), commit, tuple(refs.get(commit, ())),
                    tuple(path for path in models if not path.name.startswith(".")),
                    tuple(path for path in files if path not in unfinished), tuple(sorted(unfinished)),
                )
            )  # fmt: skip
    return kept


def needless(kept: Kept) -> list[Path]:
    """Files that no start needs: what was downloaded for models that are converted, and older commits."""
    if kept.models and kept.revisions:
        return [*kept.sources, *kept.parts]
    return [] if kept.revisions else [*kept.models, *kept.sources, *kept.parts]


def remove(kept: Kept, paths: list[Path]) -> None:
    """Delete files of one commit, then the folders that are empty, and what was remembered of them."""
    for path in sorted(
        paths, key=lambda path: path.name != COMPLETE
    ):  # what says that the others are there, first
        path.unlink(missing_ok=True)
    if any(path.is_file() and path.name != COMPLETE for path in kept.folder.rglob("*")):
        return
    import shutil  # 5 ms that a start with a model in the cache does not take

    shutil.rmtree(kept.folder, ignore_errors=True)
    for revision in kept.revisions:
        Place(Name(kept.repository, revision)).forget()
    for folder in (kept.folder.parent / "refs", kept.folder.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()
