"""Who may ask what: every request passes here first, before any route is looked up.

In this order: Host, path, Origin, API key, kind and size of the body. All of it is decided on the bytes that
came, never on a URL made of them. The body is read here, whole, so that nothing behind begins before a
request is complete.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from .errors import VERSION, ApiError, speaks_anthropic
from .http import SECURITY_HEADERS, new_request_id
from .keys import ANONYMOUS, Key, Keys
from .logs import Log, Record

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN = frozenset({b"/", b"/health"})  # GET and HEAD of these need no key: the page holds no secret
BODIES = 16  # times the largest body: what all bodies that are being read may take together
SAFE_METHODS = frozenset({"GET", "HEAD"})
# What a browser's script may send to an origin that is listed, besides x-stainless-* of the OpenAI and
# Anthropic SDKs
CORS_HEADERS = frozenset(
    "authorization content-type accept x-api-key x-request-id anthropic-version anthropic-beta "
    "anthropic-dangerous-direct-browser-access openai-organization openai-project openai-beta user-agent "
    "x-qwen3c-route mcp-session-id mcp-protocol-version mcp-method mcp-name last-event-id".split()
)
EXPOSED = b"x-request-id, x-qwen3c-backend, x-qwen3c-fallback, retry-after, x-should-retry, mcp-session-id"
_PATH = re.compile(rb"/(?:[A-Za-z0-9._~:@+=,-]+/)*[A-Za-z0-9._~:@+=,-]*")
_MODEL_PATH = re.compile(rb"/v1/models/(?:[A-Za-z0-9._~:@+=,/-]|%[0-9A-Fa-f]{2})+")
_MODEL_NAME = re.compile(rb"[^\x00-\x1f\x7f\\]+")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_HEADER_NAME = re.compile(r"[a-z0-9-]{1,64}")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")


@dataclass(frozen=True)
class Rules:
    """hosts: names that Host may have besides those of this computer. origins: those whose pages may ask; "*"
    is all.

    public: the server listens on more than the loopback interface, and Host may be any address.
    open_paths: GET and HEAD of these need no key. max_body: bytes.
    """

    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    public: bool = False
    open_paths: Collection[bytes] = OPEN
    max_body: int = 4 << 20


class _Left(Exception):
    """The client went away before its request was complete."""


class Guard:
    """ASGI middleware. Behind it scope["state"] has `key` (a Key), `record` (a Record to fill in) and
    `request_id`.
    """

    def __init__(self, app: App, rules: Rules, keys: Keys, log: Log) -> None:
        self._app, self._rules, self._keys, self._log = app, rules, keys, log
        self._hosts = LOOPBACK | {host.lower() for host in rules.hosts}
        self._reading = 0  # bytes of the bodies that are being read
        self.failure: Exception | None = None  # why the application did not start, or did not stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            except Exception as error:
                self.failure = error
                raise
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            raise ValueError(f"an ASGI scope of type {scope['type']!r} is none that is served here")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = _visit(scope)
        record = visit.record
        answer = _Answer(send, visit, self._cors(visit))
        complete = visit.length == 0
        try:
            if self._preflight(visit):
                await answer.send_preflight(visit)
                return
            state = scope.setdefault("state", {})
            state["key"] = key = self._admit(visit)
            state["record"], state["request_id"] = record, record.request_id
            record.key = key.name
            body = await self._body(visit, receive)
            complete = True
            await self._app(scope, _replaying(body, receive), answer.send)
        except ApiError as error:
            await answer.send_error(error, closes=not complete)
        except _Left:
            record.status = scope["state"].get("refused", 0)
        except asyncio.CancelledError:
            # the server stops; an answer that has begun just ends, which its reader can tell from a complete
            # one
            await answer.send_error(
                ApiError(503, "the server is stopping", code="stopping", type="server_error", retry_after=5.0)
            )
        except Exception as error:
            self._log.say("error", _unexpected(error, record.request_id))
            await answer.send_error(
                ApiError(500, "the server failed; its log says why", code="internal", type="server_error")
            )
        finally:
            record.finish()
            self._log.request(record)

    # ------------------------------------------------------------------------
    # What is decided on the header

    def _admit(self, visit: _Visit) -> Key:
        """Whose request this is; ApiError if it is not to be answered."""
        self._check_host(visit)
        if not _is_plain(visit.path):
            raise ApiError(404, "there is nothing at this path", code="not_found")
        self._check_origin(visit)
        is_open = visit.method in SAFE_METHODS and visit.path in self._rules.open_paths
        key = ANONYMOUS if is_open else self._keys.owner(visit.headers)
        _check_kind(visit)
        if (visit.length or 0) > self._rules.max_body:
            raise self._too_large()
        return key

    def _check_host(self, visit: _Visit) -> None:
        """A page of another name that points its own DNS here (rebinding) sends that name as Host."""
        match = _AUTHORITY.fullmatch(visit.host)
        if match is None or not (
            match[1] in self._hosts
            or visit.host in self._hosts
            or (self._rules.public and _is_address(match[1]))
        ):
            raise ApiError(
                403, "this Host is not served here; --allowed-host NAME adds one", code="host_not_allowed"
            )

    def _check_origin(self, visit: _Visit) -> None:
        if visit.origin is not None and not (self._is_listed(visit.origin) or _is_own(visit)):
            raise ApiError(
                403,
                "pages of this Origin may not ask here; --cors-origin ORIGIN lists one",
                code="origin_not_allowed",
            )

    def _is_listed(self, origin: str) -> bool:
        return origin in self._rules.origins or "*" in self._rules.origins

    def _cors(self, visit: _Visit) -> Headers:
        """What lets a listed page read the answer, be it an error."""
        if visit.origin is None or not self._is_listed(visit.origin):
            return []
        return [
            (b"access-control-allow-origin", visit.origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED),
            (b"vary", b"Origin"),
        ]

    def _preflight(self, visit: _Visit) -> bool:
        """Whether a browser asks, in the name of a listed page, if it may ask; it sends no key with that."""
        if visit.method != "OPTIONS" or visit.origin is None or not self._is_listed(visit.origin):
            return False
        if visit.one(b"access-control-request-method") is None:
            return False
        self._check_host(visit)
        return True

    # ------------------------------------------------------------------------
    # The body

    async def _body(self, visit: _Visit, receive: Receive) -> bytes:
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Left
                part = message.get("body", b"")
                body += part
                self._reading += len(part)
                if len(body) > self._rules.max_body:
                    raise self._too_large()
                if self._reading > BODIES * self._rules.max_body:
                    raise ApiError(
                        503,
                        "too many large requests at once",
                        code="overloaded",
                        type="server_error",
                        retry_after=1.0,
                    )
                if not message.get("more_body", False):
                    break
        finally:
            self._reading -= len(body)
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._rules.max_body} bytes", code="too_large")


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` as if nobody had read the body yet; after it, only a disconnect comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


# ----------------------------------------------------------------------------
# The header


@dataclass
class _Visit:
    """What the header of a request says. length: of the body, None if it is chunked."""

    method: str
    path: bytes
    headers: Headers
    host: str
    origin: str | None
    length: int | None
    record: Record = field(default_factory=Record)

    def one(self, name: bytes) -> bytes | None:
        """The value of a header that is there once; ApiError 400 if there are more."""
        return _one(self.headers, name)


def _one(headers: Headers, name: bytes) -> bytes | None:
    values = [value for other, value in headers if other == name]
    if len(values) > 1:
        raise ApiError(400, f"more than one {name.decode()} header", code="bad_http")
    return values[0] if values else None


def _last(headers: Headers, name: bytes) -> bytes | None:
    return next((value for other, value in reversed(headers) if other == name), None)


def _visit(scope: Scope) -> _Visit:
    """Nothing is refused here: who is refused gets a request id and a line of the log as well."""
    headers: Headers = list(scope["headers"])
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    given = _last(headers, b"x-request-id") or b""
    hosts = [value for name, value in headers if name == b"host"]
    origin = _last(headers, b"origin")
    length = _last(headers, b"content-length")
    chunked = _last(headers, b"transfer-encoding") is not None
    record = Record(
        method=scope["method"],
        path=path.decode("latin-1"),
        request_id=given.decode() if _REQUEST_ID.fullmatch(given) else new_request_id(),
    )
    return _Visit(
        scope["method"],
        path,
        headers,
        host=hosts[0].decode("latin-1").lower() if len(hosts) == 1 else "",
        origin=None if origin is None else origin.decode("latin-1"),
        length=None if chunked else int(length) if length and length.isdigit() else 0,
        record=record,
    )


def _is_plain(path: bytes) -> bool:
    """Whether a path is one that a route may have: no escapes, no dot segments, nothing that two readers read
    differently.

    Only the name of a model may have escapes, since it may have a slash.
    """
    if _PATH.fullmatch(path):
        return not _climbs(path)
    if not _MODEL_PATH.fullmatch(path):
        return False
    name = unquote_to_bytes(path)
    return bool(_MODEL_NAME.fullmatch(name)) and not _climbs(name) and b"//" not in name


def _climbs(path: bytes) -> bool:
    return not {b".", b".."}.isdisjoint(path.split(b"/"))


def _is_own(visit: _Visit) -> bool:
    """Whether the page that asks came from here; Host has been checked already."""
    scheme, _, authority = (visit.origin or "").lower().partition("://")
    return scheme in ("http", "https") and authority == visit.host


def _is_address(host: str) -> bool:
    """Whether a Host is an IP address, which no DNS can make point here."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _check_kind(visit: _Visit) -> None:
    """ApiError 415 unless a body is plain JSON: it is what a page cannot send without asking first."""
    if visit.length == 0 or visit.method in SAFE_METHODS:
        return
    kind, *parameters = (visit.one(b"content-type") or b"").decode("latin-1").lower().split(";")
    parameters = [parameter.strip() for parameter in parameters if parameter.strip()]
    plain = {"charset=utf-8", 'charset="utf-8"', "charset=utf8"}
    if kind.strip() != "application/json" or not plain.issuperset(parameters):
        raise ApiError(415, "the body of a request is application/json, in UTF-8", code="not_json")
    if visit.one(b"content-encoding") not in (None, b"identity"):
        raise ApiError(415, "the body of a request is sent uncompressed", code="compressed")


# ----------------------------------------------------------------------------
# The answer


class _Answer:
    """The answer on its way: what every answer has in its header is added, its status is noted."""

    def __init__(self, send: Send, visit: _Visit, headers: Headers) -> None:
        self._send = send
        self._record = visit.record
        names_version = _last(visit.headers, VERSION.encode()) is not None
        self._anthropic = speaks_anthropic(visit.path.decode("latin-1"), names_version)
        self._headers: Headers = [(b"x-request-id", visit.record.request_id.encode()), *headers]
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self._record.status = message["status"]
            own = [(name.lower(), value) for name, value in message.get("headers", ())]
            names = {name for name, _ in own}
            added = [*self._headers, *SECURITY_HEADERS.items()]
            own += [(name, value) for name, value in added if name not in names]
            message = {**message, "headers": own}
        await self._send(message)

    async def send_error(self, error: ApiError, closes: bool = False) -> None:
        """An error in the shape of the surface; nothing if an answer has begun. closes: it is the
        connection's last.
        """
        if self._begun:
            return
        headers = {"content-type": "application/json", **error.headers()}
        if closes:
            headers["connection"] = "close"
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        await self._whole(
            error.status, headers, json.dumps(error.anthropic() if self._anthropic else error.openai())
        )

    async def send_preflight(self, visit: _Visit) -> None:
        """Yes, with the headers of those asked for that are known."""
        asked = (_last(visit.headers, b"access-control-request-headers") or b"").decode("latin-1").lower()
        names = [name.strip() for name in asked.split(",")]
        known = [
            name
            for name in names
            if name in CORS_HEADERS or (name.startswith("x-stainless-") and _HEADER_NAME.fullmatch(name))
        ]
        headers = {
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": ", ".join(known),
            "access-control-max-age": "600",
        }
        if _last(visit.headers, b"access-control-request-private-network") == b"true":
            headers["access-control-allow-private-network"] = "true"
        await self._whole(204, headers, "")

    async def _whole(self, status: int, headers: dict[str, str], text: str) -> None:
        body = text.encode()
        if status != 204:
            headers["content-length"] = str(len(body))
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _unexpected(error: Exception, request_id: str) -> str:
    """An exception in one line: its type and where it came from. Its text may hold a prompt."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place} ({request_id})"
