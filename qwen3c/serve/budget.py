"""What may be asked of a provider in a day, and what has been: a file may keep it over restarts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

from ..system.files import write_whole

log = logging.getLogger(__name__)


class Budget:
    """Requests and tokens of a day, which begins at local midnight. None is no limit.

    file: where what is spent is written after each change, and read from at the start; of this process
    alone. OSError or ValueError, which name it, if it cannot be written or holds something else.
    """

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        now: Callable[[], datetime],
        file: Path | None = None,
    ) -> None:
        self._limits = (requests, tokens)
        self._now = now
        self._day = now().date()
        self._spent = [0, 0]
        self._file = file
        self._writer: ThreadPoolExecutor | None = None  # the disk may take its time
        if file is not None:
            self._read(file)
            write_whole(file, self._text())
            self._writer = ThreadPoolExecutor(1, "budget")

    def add(self, requests: int, tokens: int) -> None:
        """So much more is spent."""
        self._turn()
        self._spent = [self._spent[0] + requests, self._spent[1] + tokens]
        if self._writer is not None:
            self._writer.submit(self._write, self._text())

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be asked today."""
        self._turn()
        pairs = zip(self._spent, self._limits, strict=True)
        return any(limit is not None and spent >= limit for spent, limit in pairs)

    def until(self) -> datetime:
        """The next midnight."""
        tomorrow = self._now() + timedelta(days=1)
        return tomorrow.replace(hour=0, minute=0, second=0, microsecond=0)

    def close(self) -> None:
        """Wait until all is written."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
            self._writer = None

    def _turn(self) -> None:
        if self._now().date() != self._day:
            self._day, self._spent = self._now().date(), [0, 0]

    def _read(self, file: Path) -> None:
        try:
            found = json.loads(file.read_bytes())
            day, spent = found["day"], [found["requests"], found["tokens"]]
            sound = isinstance(day, str) and all(type(one) is int and one >= 0 for one in spent)
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(
                f"{file}: not a file of what was spent at a provider; without it all counts from 0"
            )
        if day == self._day.isoformat():
            self._spent = spent

    def _text(self) -> str:
        requests, tokens = self._spent
        return json.dumps({"day": self._day.isoformat(), "requests": requests, "tokens": tokens}) + "\n"

    def _write(self, text: str) -> None:
        assert self._file is not None
        try:
            write_whole(self._file, text)
        except OSError as error:
            log.warning("what is spent at the provider cannot be written: %s", error.strerror)
