"""HTTP/1.1 for clients that are slow, broken or hostile: uvicorn's h11 protocol with timeouts and limits of
its own.

A connection owes a header within `header_timeout`, then a body within `body_timeout`, and takes what it is
sent without a stall of `write_timeout`. What is not HTTP is refused in JSON and let go; so is what came after
it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
MAX_TARGET = 8 << 10  # bytes of path and query
LINGER = 2.0  # seconds that a refused client has to take the answer
LINGER_BYTES = 64 << 20  # and what it may send meanwhile, which nobody reads
SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
_NOT_HTTP = {
    400: "this is no HTTP/1.1 request that can be understood",
    405: "this server is no proxy: CONNECT is not allowed",
    414: f"the path and query of a request may have {MAX_TARGET} bytes",
    431: f"the header of a request may have {MAX_HEADERS} fields and {MAX_HEADER_BYTES} bytes",
    501: "of all transfer encodings only chunked is understood",
    505: "only HTTP/1.0 and HTTP/1.1 are spoken here",
}


@dataclass(frozen=True)
class Limits:
    """Seconds that a client has for what it owes, and how many connections there may be at once."""

    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    connections: int = 2048


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def protocol(limits: Limits, refused: Callable[[ApiError], None]) -> type[H11Protocol]:
    """The class that uvicorn makes one object of for each connection.

    refused: called with what was answered to bytes that never became a request.
    """
    return type("Protocol", (_Protocol,), {"limits": limits, "refused": staticmethod(refused)})


class _Connection(h11.Connection):
    """h11's parser, with limits on headers; what it raised last is `refusal`, ready to be sent."""

    refusal: ApiError
    pipelined = False  # whether the client sent more than one request before it had an answer

    def next_event(self) -> Any:
        in_header = self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            if status == 431 and not in_header:
                status = 400  # a chunk without an end
            elif status == 431 and b"\n" not in self.trailing_data[0]:
                status = 414
            self._refuse(status)
            raise
        if isinstance(event, h11.Request) and (status := _refused(event)):
            self._refuse(status)
            raise h11.RemoteProtocolError(self.refusal.message)
        self.pipelined = self.pipelined or event is h11.PAUSED
        return event

    def _refuse(self, status: int) -> None:
        self.refusal = ApiError(status, _NOT_HTTP.get(status, _NOT_HTTP[400]), code="bad_http")


def _refused(request: h11.Request) -> int:
    """The status that answers a request which is larger or stranger than need be; 0 if it is neither."""
    names = [name for name, _ in request.headers]
    size = sum(len(name) + len(value) + 4 for name, value in request.headers)
    if request.http_version not in (b"1.0", b"1.1"):
        return 505
    if request.method == b"CONNECT":
        return 405
    if len(request.target) > MAX_TARGET:
        return 414
    if len(names) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        return 431
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        return 400  # two lengths: what stands between us and the client may believe the other one
    return 0


class _Closing:
    """A transport whose close() is the protocol's: it may have to wait until the client has its answer."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self.close = close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(H11Protocol):
    """One connection. `_timers` holds what the client is waited for: header, body, write, linger."""

    limits: Limits
    refused: Callable[[ApiError], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = self._connection = _Connection(h11.SERVER, MAX_HEADER_BYTES)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._deaf = False  # nothing that comes is read any more
        self._lingering = False
        self._lost = False
        self._heard = self._ignored = 0  # bytes, of all requests and of those that nobody reads
        self._unsent = 0  # bytes that the client had not taken when it was last looked at

    # ------------------------------------------------------------------------
    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Closing(transport, self._close)))
        self._real = transport
        transport.set_write_buffer_limits(high=0)  # so that writing is paused as long as anything is unsent
        if len(self.connections) > self.limits.connections:
            self._refuse(
                ApiError(503, "too many connections", code="overloaded", type="server_error", retry_after=1.0)
            )
        else:
            self._wait_for("header", self.limits.header_timeout, self._header_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self._deaf = True
        self._forget(*self._timers)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        self._heard += len(data)
        if not self._deaf:
            super().data_received(data)
            return
        self._ignored += len(data)
        if self._ignored > LINGER_BYTES:
            self._real.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._real.get_write_buffer_size()
        self._wait_for("write", self.limits.write_timeout, self._look_for_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget("write")

    # ------------------------------------------------------------------------
    # What uvicorn calls

    def handle_events(self) -> None:
        super().handle_events()
        if self._deaf or self._real.is_closing():
            return
        if self._connection.pipelined and self.cycle is not None:
            # one request at a time: while reading is paused, nobody would notice that the client left
            self.cycle.keep_alive = False
            self._deaf = True
            self.flow.resume_reading()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._owes_body() and not self._deaf:
            self._close()  # answered before its body came; whoever reads on would have to do so for ever

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._connection.refusal)

    def shutdown(self) -> None:
        if self._lingering or self.cycle is None or self.cycle.response_complete:
            self._real.close()
        else:
            self.cycle.keep_alive = False

    def timeout_keep_alive_handler(self) -> None:
        self._real.close()

    # ------------------------------------------------------------------------
    # What the client owes

    def _wait_for(self, what: str, seconds: float, late: Callable[[], None]) -> None:
        self._forget(what)
        self._timers[what] = self.loop.call_later(seconds, late)

    def _forget(self, *timers: str) -> None:
        for what in timers:
            if timer := self._timers.pop(what, None):
                timer.cancel()

    def _owes_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _watch(self) -> None:
        """Wait for the header or the body that has begun, and for nothing between two requests."""
        if self._owes_body():
            self._forget("header")
            if "body" not in self._timers:
                self._wait_for("body", self.limits.body_timeout, self._body_is_late)
            return
        self._forget("body")
        if self.conn.their_state is not h11.IDLE:
            self._forget("header")
        elif "header" not in self._timers and self.conn.trailing_data[0]:
            self._wait_for("header", self.limits.header_timeout, self._header_is_late)

    def _header_is_late(self) -> None:
        if not self._heard:
            self._real.close()  # browsers open connections that they may never use
        else:
            self._refuse_late("header", self.limits.header_timeout)

    def _body_is_late(self) -> None:
        self._refuse_late("body", self.limits.body_timeout)

    def _refuse_late(self, what: str, seconds: float) -> None:
        self._refuse(
            ApiError(408, f"the {what} of the request did not come within {seconds:g} s", code="timeout")
        )

    def _look_for_progress(self) -> None:
        size = self._real.get_write_buffer_size()
        if size >= self._unsent:
            self._real.abort()
            return
        self._unsent = size
        self._wait_for("write", self.limits.write_timeout, self._look_for_progress)

    # ------------------------------------------------------------------------
    # The end

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, if no answer has begun, and let the client go.

        An application that still waits for the body learns that the client is gone; scope["state"]["refused"]
        says with which status.
        """
        if self._deaf:
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.scope["state"]["refused"] = error.status
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self._real.abort()
                return
        else:
            self.refused(error)
        self._real.write(_answer(error))
        self._linger()

    def _close(self) -> None:
        if self._lost or self._lingering or not (self._owes_body() or self._connection.pipelined):
            self._real.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Half-close, and read on for a while: closed with bytes unread, TCP would take the answer back."""
        self._deaf = self._lingering = True
        self._unset_keepalive_if_required()
        self._forget("header", "body")
        self._real.write_eof()
        self.flow.resume_reading()
        self._wait_for("linger", LINGER, self._real.abort)


def _answer(error: ApiError) -> bytes:
    """A whole answer that closes the connection, for a client whose request could not be read."""
    body = json.dumps(error.openai()).encode()
    headers = {
        b"content-type": b"application/json",
        b"content-length": b"%d" % len(body),
        b"connection": b"close",
        b"x-request-id": new_request_id().encode(),
        **{name.encode(): value.encode() for name, value in error.headers().items()},
        **SECURITY_HEADERS,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in headers.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
