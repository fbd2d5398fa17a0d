"""What every endpoint has at hand: the models, who asks, the body of the request, and how errors are said."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from .ask import Ask, KeyLimits, Stream
from .errors import VERSION, ApiError, server_error, speaks_anthropic
from .fields import Fields, parse_json
from .models import Models, Served
from .streams import PING, Events, EventStream, dump, unless_left

if TYPE_CHECKING:
    from .upstream import Upstream

UNLIMITED = KeyLimits()
FINGERPRINT = (
    f"qwen3c-{__version__}"  # OpenAI's name for what the bits of a reply depend on, beside the request
)


class Client(Protocol):
    """Who asks, as the guard has found. name: of the key, which is a namespace of the prefix cache."""

    @property
    def name(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def limits(self) -> KeyLimits: ...


@dataclass(frozen=True)
class Anonymous:
    """A client of a server without keys."""

    name: str = ""
    priority: int = 0
    limits: KeyLimits = UNLIMITED


class Reply(Events, Protocol):
    """What a stream of the engine comes to, in the words of a surface."""

    stream: Stream

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is sent at once."""


@dataclass
class Api:
    """models: those that answer. ping: seconds of silence after which a stream gets a comment.

    ended: told about every stream that has ended, with the request it answers. draining: whether the server
    is about to end, and takes no new work. needs_key, mcp: what /props says of keys and of the MCP server.
    provider: who is offered a chat first. started: in seconds since 1970.
    """

    models: Models
    ping: float = PING
    ended: Callable[[Request, Served, Stream], None] = lambda request, served, stream: None
    draining: bool = False
    needs_key: bool = False
    mcp: bool = False
    provider: Upstream | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    async def fields(self, request: Request) -> Fields:
        """The fields of the body. ApiError 400 if it is no JSON object."""
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ApiError(400, "the body ended early") from None
        return Fields(parse_json(body))

    async def answer(
        self, request: Request, served: Served, reply: Reply, streams: bool, headers: dict[str, str]
    ) -> Response:
        """The answer that `reply` makes, whole or in events; a client that leaves cancels it."""
        stream = reply.stream

        async def ended() -> None:
            stream.cancel()
            self.ended(request, served, stream)

        if streams:
            return EventStream(reply, ended, headers=headers, ping=self.ping)
        try:
            return json_answer(await unless_left(request.receive, reply.whole()), headers=headers)
        finally:
            await ended()

    def client(self, request: Request) -> Client:
        """Who asks."""
        client: Client = getattr(request.state, "key", None) or Anonymous()
        return client

    def request_id(self, request: Request) -> str:
        """The id in the request's answer, given by the client or made here."""
        found: str = getattr(request.state, "request_id", None) or secrets.token_hex(12)
        return found

    def told(self, request: Request, **known: Any) -> None:
        """Note what the log has to know of a request: backend, model, fallback."""
        record = getattr(request.state, "record", None)
        for name, value in known.items():
            if record is not None:
                setattr(record, name, value)

    def headers(
        self, served: Served, ignored: list[str], ask: Ask | None = None, fallback: str | None = None
    ) -> dict[str, str]:
        """Headers of an answer of `served`. ignored: fields of the request that nobody knows.

        fallback: why the provider that was offered the request does not answer it.
        """
        headers = {"x-qwen3c-backend": "local", "x-qwen3c-model": header_text(served.name)}
        if fallback:
            headers["x-qwen3c-fallback"] = fallback
        if ignored:
            headers["x-qwen3c-ignored"] = header_text(", ".join(ignored))
        if ask is not None and ask.grammar is not None and ask.grammar.dropped:
            headers["x-qwen3c-dropped"] = header_text(", ".join(ask.grammar.dropped))
        return headers

    def priority(self, request: Request, fields: Fields) -> int:
        """When it is the request's turn: vLLM's `priority`, lower comes sooner; no
        sooner than the key allows.
        """
        return max(self.client(request).priority, 0) + (fields.whole("priority", 0, 1000, 0) or 0)


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON body."""
    return Response(dump(value), status, headers, "application/json")


def header_text(text: str) -> str:
    """Text as a header may hold it: printable ASCII, not too long, no space at its ends."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)[:200].strip()


# ----------------------------------------------------------------------------
# Errors


async def say_api_error(request: Request, error: Exception) -> Response:
    """The answer to a request that ended in an ApiError, in the words of its surface."""
    assert isinstance(error, ApiError)
    anthropic = speaks_anthropic(request.url.path, VERSION in request.headers)
    body = error.anthropic() if anthropic else error.openai()
    return JSONResponse(body, error.status, error.headers())


async def say_http_error(request: Request, error: Exception) -> Response:
    """The answer where no endpoint is, or not for this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        found = ApiError(405, f"{request.method} is not for this address", code="method_not_allowed")
    else:
        found = ApiError(error.status_code, "there is nothing at this address", code="not_found")
    answer = await say_api_error(request, found)
    answer.headers.update(error.headers or {})
    return answer


async def say_failure(request: Request, error: Exception) -> Response:
    """The answer when the server failed: never a traceback, never a path."""
    return await say_api_error(request, server_error("the server failed"))
