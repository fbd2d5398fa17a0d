"""A model given by its name on the Hugging Face Hub: fetched and converted once, with progress on a terminal.

A file of that name always wins, and what is in the cache is opened without asking anyone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..memory import gib
from ..system import names, terminal

if TYPE_CHECKING:
    from ..hub.download import Progress


def model_file(given: str, bits: str | None = None) -> str:
    """The path of the model.bin that `given` means, a path or a name; bits: as --bits has them."""
    name = None if os.path.exists(given) else names.parse(given)
    if name is None:
        if bits is not None:
            raise ValueError(
                "--bits is for a model given by its name on the Hub; export.py --bits converts others"
            )
        return given
    from ..hub import store

    found = store.find(name, bits or store.BITS)
    if found is None:
        from ..hub import obtain

        with _shown(name) as progress:
            found = obtain.model(name, bits or store.BITS, progress)
    return os.fspath(found)


def export_source(given: str, *, quiet: bool = False) -> tuple[str, str | None]:
    """The path that export.py is to read, fetched if `given` is a name; and what the model is called then."""
    name = None if os.path.exists(given) else names.parse(given)
    if name is None:
        return given, None
    from ..hub import obtain

    with _shown(name, quiet) as progress:
        return os.fspath(obtain.source(name, progress)), obtain.own_name(name)


@contextmanager
def _shown(name: names.Name, quiet: bool = False) -> Iterator[Progress]:
    """What is done for a name, in a line that is drawn again; then the line is gone."""
    lines = _Lines()
    try:
        yield lines.ignore if quiet else lines.show
    except KeyboardInterrupt:
        lines.clear()
        if not quiet:
            terminal.note(f"{name}: what has arrived is kept, the same command goes on")
        raise
    finally:
        lines.clear()


class _Lines:
    """A progress line for each thing that is done, one after the other; above it, how many bytes that is."""

    def __init__(self) -> None:
        self._doing = ""
        self._told: set[str] = set()
        self._progress: terminal.Progress | None = None

    def show(self, doing: str, done: int, total: int) -> None:
        """The hub's Progress."""
        if doing != self._doing or self._progress is None:
            self.clear()
            self._doing = doing
            self._progress = terminal.Progress(self._words, start=done)
        if not total:
            self._progress.say(doing)
            return
        if doing not in self._told:
            self._told.add(doing)
            here = f", {gib(done)} are here" * bool(done)
            terminal.note(f"{doing}: {gib(total)}{here}")
        self._progress(done, total)

    def ignore(self, doing: str, done: int, total: int) -> None:
        """The same, and nobody hears it."""

    def clear(self) -> None:
        if self._progress:
            self._progress.clear()
            self._progress = None

    def _words(self, done: float, total: float, rate: float) -> str:
        if total < 1e9:
            return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s"
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate / 1e6:.1f} MB/s"
