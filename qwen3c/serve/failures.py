"""What goes wrong at a provider: statuses and exceptions of the HTTP client, each as a
Failure with a word for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

OURS = (400, 413, 422)  # the request is wrong, and would be anywhere
MISCONFIGURED = 300.0  # seconds: nobody expects a wrong key to become right by itself


class Failure(Exception):
    """What went wrong at a provider. reason: a word for x-qwen3c-fallback and for logs.

    opens: this failure opens the breaker by itself, for `seconds` if they are given. Others count.
    """

    def __init__(self, reason: str, *, opens: bool = False, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.opens, self.seconds = reason, opens, seconds


def failure_of_status(status: int, retry_after: str | None, now: Callable[[], datetime]) -> Failure | None:
    """The failure that an HTTP status is; None for 200 and for those that are the request's own fault."""
    if status == 200 or status in OURS:
        return None
    reason = f"http_{status}"
    if status == 429:
        return Failure(reason, seconds=_seconds(retry_after, now))
    if status >= 500 or status == 408:
        return Failure(reason)
    if status >= 400:
        return Failure(reason, opens=True, seconds=MISCONFIGURED)
    return Failure("captive", opens=True)  # a redirect or an empty page: no provider


def is_mistaken(reason: str) -> bool:
    """Whether a failure will last until somebody changes the settings."""
    return reason.startswith("http_4") and reason not in ("http_408", "http_429")


def failure_of(error: Exception) -> Failure:
    """The failure that an exception of the HTTP client is. Other exceptions are mistakes of this program."""
    import socket
    import ssl

    import anyio

    httpx2 = import_client()
    if isinstance(error, httpx2.ConnectTimeout):
        return Failure("connect_timeout", opens=True)
    if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError)):
        for cause in _causes(error):
            # a connection that ends before a request is sent ended in the handshake
            if isinstance(cause, (ssl.SSLError, anyio.EndOfStream, anyio.BrokenResourceError)):
                return Failure("tls", opens=True)
            if isinstance(cause, socket.gaierror):
                return Failure("dns", opens=True)
            if isinstance(cause, ConnectionRefusedError):
                return Failure("connect_refused", opens=True)
        return Failure("unreachable", opens=True)
    if isinstance(error, (httpx2.TransportError, httpx2.StreamError)):
        return Failure("cut")
    raise error


def _causes(error: BaseException | None) -> list[BaseException]:
    """An exception and all that led to it, of groups the members."""
    causes: list[BaseException] = []
    waiting = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or cause in causes:
            continue
        causes.append(cause)
        waiting += [cause.__cause__, cause.__context__, *getattr(cause, "exceptions", ())]
    return causes


def _seconds(retry_after: str | None, now: Callable[[], datetime]) -> float | None:
    """A Retry-After in seconds, which may be a number or a date; None if it is neither, or over."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = date.timestamp() - now().timestamp()
    return seconds if seconds > 0 and math.isfinite(seconds) else None


def import_client() -> Any:
    try:
        import httpx2
    except ImportError:
        raise ImportError("an upstream needs httpx2: pip install 'qwen3c[serve]'") from None
    return httpx2
