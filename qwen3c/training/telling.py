"""What a run says on stderr: lines, how far it is, and what it is at while a person waits.

Nothing said here can end a run: a terminal that was closed, or a pipe that nobody reads, loses the words and
not the weights.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ..system.terminal import Progress, unheard, waiting, write_at_once

PATIENCE = 0.3  # seconds that something may take before it is named
REMINDER = 60.0  # seconds between two lines where nothing can be redrawn


class Telling:
    """The words of one run. quiet: only errors are said; so it is in all processes of a run but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._progress: Progress | None = None
        self._status = ""

    def say(self, line: str) -> None:
        """A line of its own."""
        if not self.quiet:
            with unheard():
                if self._progress:
                    self._progress.clear()
                print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show `what` and its seconds while the block runs, if that is long enough to be noticed."""
        if self.quiet:
            yield
            return
        if self._progress:
            self._progress.clear()
        with waiting(what, delay=PATIENCE, reminder=REMINDER, words=_with_dots):
            yield

    @contextlib.contextmanager
    def steps(self, first: int) -> Iterator[None]:
        """Within, step() draws how far the run is. first: the step that it begins or goes on from."""
        self._progress = Progress(self._describe, delay=0.0, pause=REMINDER, start=first)
        try:
            yield
        finally:
            self._progress.clear()
            self._progress = None

    def step(self, step: int, steps: int, status: str = "") -> None:
        """Draw the step, and of `status` the latest that was not empty."""
        self._status = status or self._status
        if self._progress and not self.quiet:
            self._progress(step, steps)

    def _describe(self, done: float, total: float, rate: float) -> str:
        return f"step {done:,.0f} of {total:,.0f}" + (f"  {self._status}" if self._status else "")

    def at_once(self, line: str) -> None:
        """Say a line in a signal handler, which may have interrupted another line."""
        if not self.quiet:
            write_at_once(line)


def _with_dots(what: str, seconds: float) -> str:
    return f"{what} ..." + (f" {seconds:.0f} s" if seconds >= 1 else "")
