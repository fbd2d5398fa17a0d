"""What the server says of itself on stderr: one line a request, as text or as JSON; never a prompt, a reply
or a key.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..system.terminal import escaped, unheard
from .ask import Stream

LEVELS = ("debug", "info", "warning", "error")
QUIET = ("/health", "/metrics")  # asked every few seconds, by machines
MAX_PATH = 120  # characters of a path that are shown


@dataclass
class Record:
    """What is known of one request; whoever serves it fills in its part.

    path: without the query. status: 0 where the client left before an answer. queue, ttft: seconds. prompt:
    tokens, of them `cached` from the prefix cache; completion: tokens of the reply. key: the name of the API
    key. backend: local or
    cloud.
    """

    method: str = ""
    path: str = ""
    request_id: str = ""
    key: str = ""
    status: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    model: str | None = None
    queue: float | None = None
    ttft: float | None = None
    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    rate: float | None = None
    backend: str | None = None
    fallback: str | None = None

    def tell(self, model: str, stream: Stream) -> None:
        """Take in what a model's stream for this request came to."""
        stats = stream.stats
        self.model, self.backend = model, "local"
        self.prompt = sum(one.prompt_tokens for one in stats)
        self.cached = sum(one.cached_tokens for one in stats)
        self.completion = sum(one.generated_tokens for one in stats)
        firsts = [job.first_token for job in stream.jobs if job.first_token is not None]
        if firsts:
            self.ttft = min(firsts)
            self.queue = max(self.ttft - min(one.prefill_seconds for one in stats), 0.0)
            self.rate = sum(one.decode_rate for one in stats)

    def finish(self) -> None:
        self.seconds = time.monotonic() - self.started

    def fields(self) -> dict[str, Any]:
        """What is known, by names for programs; times in milliseconds."""
        known = {
            "method": self.method,
            "path": self.path[:MAX_PATH],
            "status": self.status,
            "ms": _ms(self.seconds),
            "queue_ms": _ms(self.queue),
            "ttft_ms": _ms(self.ttft),
            "prompt_tokens": self.prompt,
            "cached_tokens": self.cached,
            "completion_tokens": self.completion,
            "tokens_per_second": None if self.rate is None else round(self.rate, 2),
            "model": self.model,
            "backend": self.backend,
            "fallback": self.fallback,
            "key": self.key or None,
            "request_id": self.request_id,
        }
        return {name: value for name, value in known.items() if value is not None}

    def line(self) -> str:
        """The same for a person."""
        parts = [f"{self.method} {self.path[:MAX_PATH]} {self.status or 'left'} {_ms(self.seconds)} ms"]
        if self.queue is not None:
            parts.append(f"queued {_ms(self.queue)} ms")
        if self.prompt is not None:
            parts.append(f"{self.prompt} in, {self.cached or 0} cached, {self.completion or 0} out")
        if self.rate is not None:
            parts.append(f"{self.rate:.1f} tok/s")
        for word in (self.model, self.backend, self.fallback):
            if word:
                parts.append(word)
        if self.key:
            parts.append(f"key {self.key}")
        return " | ".join(filter(None, [*parts, self.request_id]))


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


class Log:
    """Lines on `stream` (None: whatever stderr is), from `level` on. Control characters are escaped in all of
    them.
    """

    def __init__(self, level: str = "info", as_json: bool = False, stream: TextIO | None = None) -> None:
        self.level = LEVELS.index(level)
        self.as_json = as_json
        self._stream = stream

    def request(self, record: Record) -> None:
        """A request that is over: a warning if it was refused, an error if the server failed."""
        level = "error" if record.status >= 500 else "warning" if record.status >= 400 else "info"
        if record.path in QUIET and record.status < 400:
            level = "debug"
        self._write(level, "request", record.line, record.fields())

    def say(self, level: str, message: str, **fields: Any) -> None:
        """Anything else that a person who runs the server wants to know."""
        self._write(level, "message", lambda: message, {"message": message, **fields})

    def _write(self, level: str, event: str, line: Any, fields: Mapping[str, Any]) -> None:
        if LEVELS.index(level) < self.level:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        if self.as_json:
            text = json.dumps({"time": stamp, "level": level, "event": event, **fields})
        else:
            mark = "" if level == "info" or level == "debug" else f"{level}: "
            text = f"{stamp} {mark}{line()}"
        with unheard():
            print(escaped(text), file=self._stream or sys.stderr, flush=True)
