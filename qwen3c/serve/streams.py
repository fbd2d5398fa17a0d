"""Answers that come piece by piece: server-sent events, and whole answers whose client
may leave before they are done.

Beside every reply a watcher waits for the client to leave, for starlette's own responses notice it only at
the next write. A reply whose client has left is cancelled after the pass under way, whatever its state.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, server_error

T = TypeVar("T")
PING = 10.0  # seconds without an event after which a comment goes out
COMMENT = ": ping\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientLeftError(Exception):
    """The client has closed the connection before its answer was done."""


async def client_left(receive: Receive) -> None:
    """Returns once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` returns. If the client leaves before, `work` is cancelled and ClientLeftError raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(client_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class Events(Protocol):
    """What is said piece by piece. ping: the event that says that nothing is to be said yet."""

    ping: str

    def events(self) -> AsyncGenerator[str, None]:
        """Texts of whole events, such as "data: {...}\\n\\n"; one text may hold several."""

    def failed(self, error: ApiError) -> str:
        """The event that says that the stream breaks off."""


class EventStream(Response):
    """Server-sent events as they come, a ping after so many seconds of silence, and always an end.

    An ApiError that the events raise becomes an event, after which the stream is closed. ended: awaited at
    the end, whatever has happened.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        said: Events,
        ended: Callable[[], Awaitable[None]],
        *,
        headers: Mapping[str, str] | None = None,
        ping: float = PING,
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})}, media_type=self.media_type)
        del self.headers["content-length"]
        self._said = said
        self._ended = ended
        self._seconds = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._said.events()
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            await unless_left(receive, self._send_all(events, send))
        except (ClientLeftError, OSError):
            return
        finally:
            await events.aclose()
            await self._ended()

    async def _send_all(self, events: AsyncGenerator[str, None], send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            async for text in pinged(events, self._seconds, self._said.ping):
                await write(text)
        except ApiError as error:
            await write(self._said.failed(error))
        except (asyncio.CancelledError, OSError):
            raise
        except Exception:
            await write(self._said.failed(server_error("the server failed")))
            raise
        finally:
            with contextlib.suppress(OSError):
                await write("", more=False)


async def pinged(events: AsyncIterator[str], seconds: float, ping: str) -> AsyncIterator[str]:
    """The events, and `ping` whenever there was none for so many seconds."""
    waiting = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield ping
                continue
            try:
                yield waiting.result()
            except StopAsyncIteration:
                return
            waiting = asyncio.ensure_future(anext(events))
    finally:
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
            await waiting


def data(value: Any) -> str:
    """An event without a name, as OpenAI's completions have them."""
    return f"data: {dump(value)}\n\n"


def event(name: str, value: Any) -> str:
    """An event with a name, as OpenAI's responses and Anthropic's messages have them."""
    return f"event: {name}\ndata: {dump(value)}\n\n"


def dump(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


DONE = "data: [DONE]\n\n"
