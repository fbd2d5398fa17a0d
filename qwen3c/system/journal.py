"""What a long run has done so far, in a file that outlives it: after a kill the next run goes on from there.

    {"head": ...}    what the lines belong to: a run of something else must not go on with them
    line             one of JSON for each thing that is done, in the order in which they were

A line that a kill has cut, and what a power cut has left behind it, is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

SYNC_SECONDS = 1.0  # a power cut costs about this much; a kill costs nothing


class Journal:
    """Lines by key, in an open file that can be read and appended to.

    key: of a line's JSON value; None if it is none of the run's. head: what the first line says, None in a
    new file. ValueError if the file holds something else than a journal.
    """

    def __init__(self, file: BinaryIO, key: Callable[[Any], str | None]) -> None:
        self._file = file
        self._synced = time.monotonic()
        self.head: dict[str, Any] | None = None
        self._places: dict[str, tuple[int, int]] = {}  # key -> where its line begins, its bytes
        self._end = 0
        file.seek(0)
        for line in file:
            value = json_value(line)
            if self.head is None:
                if line.endswith(b"\n") and not (isinstance(value, dict) and value.keys() == {"head"}):
                    raise ValueError("it was not left by a run like this one")
                if value is None:
                    break
                self.head = value["head"]
            else:
                found = None if value is None else key(value)
                if found is None or found in self._places:
                    break
                self._places[found] = (self._end, len(line))
            self._end += len(line)
        file.truncate(self._end)
        file.seek(self._end)

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def begin(self, head: dict[str, Any]) -> None:
        """Say what the lines belong to."""
        self.head = head
        self._append(json.dumps({"head": head}).encode() + b"\n")

    def add(self, key: str, line: bytes) -> None:
        """One thing more is done. line: of JSON, with its newline."""
        start = self._end
        self._append(line)
        self._places[key] = (start, len(line))

    def _append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        self._end += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def write(self, keys: Iterable[str], out: BinaryIO) -> None:
        """Write the lines of those of `keys` that are there, in this order."""
        for key in keys:
            if key in self._places:
                start, size = self._places[key]
                self._file.seek(start)
                out.write(self._file.read(size))
        self._file.seek(self._end)


def json_value(line: bytes) -> Any:
    """The JSON value of a whole line; None if it was cut or damaged."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
