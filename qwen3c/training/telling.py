"""What a run prints on stderr: lines, progress, and what is being done while a person waits.

No error of printing ends a run: if the terminal or pipe is closed, the words are lost, not the weights.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ..system.terminal import Progress, unheard, waiting, write_at_once

PATIENCE = 0.3  # seconds after which a task that runs is shown
REMINDER = 60.0  # seconds between two lines if lines cannot be redrawn


class Telling:
    """Prints for one run. quiet: print only errors, as all processes of a run but the first do."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._progress: Progress | None = None
        self._status = ""

    def say(self, line: str) -> None:
        """Print `line`."""
        if not self.quiet:
            with unheard():
                if self._progress:
                    self._progress.clear()
                print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show `what` and its seconds while the block runs, once that takes longer than PATIENCE."""
        if self.quiet:
            yield
            return
        if self._progress:
            self._progress.clear()
        with waiting(what, delay=PATIENCE, reminder=REMINDER, words=_with_dots):
            yield

    @contextlib.contextmanager
    def steps(self, first: int) -> Iterator[None]:
        """Within, step() draws the progress of the run. first: the step from which it starts or resumes."""
        self._progress = Progress(self._describe, delay=0.0, pause=REMINDER, start=first)
        try:
            yield
        finally:
            self._progress.clear()
            self._progress = None

    def step(self, step: int, steps: int, status: str = "") -> None:
        """Draw the step and `status`; an empty `status` keeps the last one."""
        self._status = status or self._status
        if self._progress and not self.quiet:
            self._progress(step, steps)

    def _describe(self, done: float, total: float, rate: float) -> str:
        return f"step {done:,.0f} of {total:,.0f}" + (f"  {self._status}" if self._status else "")

    def at_once(self, line: str) -> None:
        """Print a line from a signal handler, which may have interrupted another line."""
        if not self.quiet:
            write_at_once(line)


def _with_dots(what: str, seconds: float) -> str:
    return f"{what} ..." + (f" {seconds:.0f} s" if seconds >= 1 else "")
