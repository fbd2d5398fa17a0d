"""When a provider is asked and when it is left alone. No I/O, no waiting: the clock is the caller's.

    closed: it is asked  --3 failures in 60 s, or one that says enough-->  open: it is not
    open  --its time is over: somebody probes-->  closed, or open again for twice as long

The waits are 10 s, doubled at each opening up to 300 s, +-20 % so that many programs do not
come back at once. A reply takes the wait back to 10 s; a probe that succeeds does not, for it
shows only that somebody is there.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .failures import Failure

FAILURES, WINDOW = 3, 60.0  # this many in this many seconds open the breaker
SHORTEST, LONGEST, JITTER = 10.0, 300.0, 0.2  # seconds, seconds, share
LATEST = 86_400.0  # seconds of a Retry-After that are believed


@dataclass(frozen=True)
class Opened:
    """An open breaker: why, and until when on its clock."""

    reason: str
    until: float


class Breaker:
    """clock: monotonic seconds. random: uniform in [0, 1)."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, random: Callable[[], float] = random.random
    ) -> None:
        self._clock, self._random = clock, random
        self._failures: deque[float] = deque()  # when they were
        self._wait = SHORTEST
        self.opened: Opened | None = None  # None: closed

    def fail(self, failure: Failure) -> None:
        """Take note of a failed request.

        If the breaker is open already, from requests that began before it opened, only a later end counts.
        """
        now = self._clock()
        if failure.seconds is not None:
            until = now + min(failure.seconds, LATEST)
            if self.opened is None or until > self.opened.until:
                self.opened = Opened(failure.reason, until)
        elif self.opened is None:
            self._failures.append(now)
            while self._failures[0] <= now - WINDOW:
                self._failures.popleft()
            if failure.opens or len(self._failures) >= FAILURES:
                self._open(failure.reason)

    def fail_probe(self, failure: Failure) -> None:
        """A probe of the open breaker failed: it stays open, longer."""
        if failure.seconds is not None:
            self.opened = Opened(failure.reason, self._clock() + min(failure.seconds, LATEST))
        else:
            self._open(failure.reason)

    def close(self) -> None:
        """A probe succeeded: the provider is asked again."""
        self.opened = None
        self._failures.clear()

    def answered(self) -> None:
        """A reply began."""
        if self.opened is None:
            self._wait = SHORTEST

    def _open(self, reason: str) -> None:
        spread = 1 - JITTER + 2 * JITTER * self._random()
        self.opened = Opened(reason, self._clock() + self._wait * spread)
        self._wait = min(2 * self._wait, LONGEST)
