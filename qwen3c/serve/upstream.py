"""Cloud first, local fallback: a request is offered to a provider, and what comes of it is an Answer or
Declined.

    upstream = Upstream(Settings("https://api.example.com/v1", "model-m", key=read_key()))
    match await upstream.open(body, "auto", stream=True):
        case Declined(reason): ...  # answer locally, and say why
        case answer: ...            # its first delta is there; async for chunk in answer

Nothing is handed out before the first content, reasoning or tool delta; until then every failure ends in
Declined. After it a failure is an ApiError with the code "upstream_interrupted": a continuation is never
guessed. The provider is asked once: the fallback is the retry. A reply that is not streamed to its client is
read to its end first, so that any failure of it ends in Declined.

The key is in one place, the headers of a request. It is in no repr, log line, error or argument of a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from .breaker import Breaker, Opened
from .budget import Budget
from .errors import ApiError
from .failures import OURS, Failure, failure_of, failure_of_status, import_client, is_mistaken
from .provider import Chunk, Events, Shape, Whole, joined, parsed

if TYPE_CHECKING:
    import httpx2

Route = Literal["auto", "local", "cloud"]
ROUTES: tuple[Route, ...] = ("auto", "local", "cloud")
KEY_VARIABLE, CREDENTIAL = "QWEN3C_UPSTREAM_KEY", "upstream-key"
LONGEST_KEY = 8192  # bytes
LONGEST_ERROR = 64 << 10  # bytes of a provider's error that are read
LAST_BYTES = 0.05  # seconds that the end of a transfer may come after the end of the answer
# what of a request goes up; its model is the provider's
ALLOWED = (
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "top_logprobs",
    "logit_bias",
)
OF_A_MESSAGE = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id")
# they bind the text to a form that no provider knows of, so such a request is answered here
LOCAL_ONLY = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",
    "json_schema",
)
FORMATS = ("text", "json_object", "json_schema")
log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())  # a chat on a terminal says it in its own words


@dataclass(frozen=True)
class Settings:
    """A provider and how far it is trusted. ValueError if the URL is none that a key may be sent to.

    url: up to and without /chat/completions. model: what it is asked for. offline: no socket is ever opened.
    insecure: plain http to other machines is allowed. proxy_from_env: HTTPS_PROXY and the like,
    SSL_CERT_FILE too, are heeded. requests, tokens: at most so many a day, None for no limit. connect,
    first_delta, silence: seconds. state: the file that remembers what of these was spent, None for none.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    offline: bool = False
    insecure: bool = False
    proxy_from_env: bool = False
    requests: int | None = None
    tokens: int | None = None
    connect: float = 2.0
    first_delta: float = 15.0
    silence: float = 30.0
    state: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", checked_url(self.url, self.insecure))
        if not self.model or not self.model.isprintable():
            raise ValueError("--upstream-model: the name of a model at the provider")

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


def checked_url(url: str, insecure: bool = False) -> str:
    """`url` without a / at its end; ValueError if it is not one of a provider."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("--upstream: not a URL") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"--upstream: no user or password in the URL; the key comes from {KEY_VARIABLE}")
    if not url.isprintable() or " " in url or parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"--upstream {url!r}: not an http or https URL with a host")
    if parts.query or parts.fragment:
        raise ValueError("--upstream: no ? and no # in the URL of a provider")
    if parts.scheme == "http" and not insecure and not _is_loopback(host):
        raise ValueError(
            f"--upstream {url}: http shows key and text to the network; https, or --upstream-insecure"
        )
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(variable: str = KEY_VARIABLE) -> str | None:
    """The provider's key from the environment, else from a systemd credential; None if there is neither.

    ValueError, which does not hold the key, if no header can carry it.
    """
    where, key = variable, os.environ.get(variable, "")
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not key and directory and (path := Path(directory, CREDENTIAL)).exists():
        where = str(path)
        with open(path, "rb") as file:
            key = file.read(LONGEST_KEY + 1).decode("latin-1")
    key = key.strip()
    if len(key) > LONGEST_KEY or not all("!" <= character <= "~" for character in key):
        raise ValueError(
            f"{where}: not a key: at most {LONGEST_KEY} printable ASCII characters without spaces"
        )
    return key or None


@dataclass(frozen=True)
class Declined:
    """The provider does not answer this request: it is answered here. reason: for x-qwen3c-fallback."""

    reason: str


class Answer(AsyncIterator[Chunk]):
    """A reply of the provider: chat.completion.chunk objects, role chunks first, the
    usage chunk last if asked for.

    model: who spoke, in the provider's words. usage: as the provider counted, None if it did not say.
    ApiError with the code "upstream_interrupted": the reply broke off. aclose() ends it at any time, and must
    be called if it is left early.
    """

    def __init__(
        self,
        response: httpx2.Response,
        shape: Shape,
        silence: float,
        ended: Callable[[Answer, Failure | None], None],
    ) -> None:
        """ended: called once, with what went wrong or None."""
        self._response, self._shape, self._silence = response, shape, silence
        self._ended = ended
        self._events: Events | Whole | None = None
        self._chunks: deque[Chunk] = deque()
        self._over = False
        self._reported = False

    @property
    def model(self) -> str:
        return self._shape.model

    @property
    def usage(self) -> dict[str, Any] | None:
        return self._shape.usage

    @property
    def size(self) -> int:
        """Characters of text, thoughts and arguments that came."""
        return self._shape.size

    async def begin(self) -> None:
        """Read up to the first delta. Failure if there is none."""
        if self._response.headers.get("content-encoding", "identity") != "identity":
            raise Failure("captive", opens=True)  # nobody was asked to compress
        kind = self._response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "text/event-stream":
            self._events = Events(self._response.aiter_raw())
        elif kind == "application/json":
            self._events = Whole(await _bytes(self._response))
        else:
            raise Failure("captive", opens=True)
        while not self._chunks and not self._over:
            await self._read()

    async def read_all(self) -> None:
        """Read to the end, for a client that gets it in one piece. Failure if it breaks off."""
        while not self._over:
            await self._read_soon()
        await self.aclose()

    def completion(self) -> dict[str, Any]:
        """The whole as one chat.completion, of an answer that was opened with stream=False."""
        return joined(list(self._chunks), self.usage)

    async def __anext__(self) -> Chunk:
        try:
            while not self._chunks and not self._over:
                await self._read_soon()
        except Failure as failure:
            await self._end(failure)
            raise interrupted(failure) from None
        if not self._chunks:
            await self.aclose()
            raise StopAsyncIteration
        return self._chunks.popleft()

    async def aclose(self) -> None:
        """End the reply and the connection that brings it. Idempotent."""
        await self._end(None)

    async def _end(self, failure: Failure | None) -> None:
        self._over = True
        if not self._reported:
            self._reported = True
            self._ended(self, failure)
        with contextlib.suppress(Exception):  # a connection that was reset cannot be closed in order
            await self._response.aclose()

    async def _read_soon(self) -> None:
        import anyio

        with anyio.move_on_after(self._silence) as scope:
            await self._read()
        if scope.cancelled_caught:
            raise Failure("silent")

    async def _read(self) -> None:
        """Take in one event."""
        import anyio

        assert self._events is not None
        try:
            event = await anext(self._events, None)
        except Failure:
            raise
        except Exception as error:
            raise failure_of(error) from None
        if event is not None:
            self._chunks += self._shape.take(event)
        else:
            self._chunks += self._shape.end(self._events.said_done)
            self._over = True
            with anyio.move_on_after(LAST_BYTES):  # with them the connection is free for the next request
                await self._events.drain()


def interrupted(failure: Failure) -> ApiError:
    return ApiError(
        502, "the provider's answer broke off; what came of it stands", code="upstream_interrupted",
        type="server_error", extra={"reason": failure.reason},
    )  # fmt: skip


class Upstream:
    """A provider, its breaker and its budget. Of one event loop; nothing is opened before the first request.

    clock: monotonic seconds. now: the local time, for midnight. sleep: waits for the end of an open breaker.
    ImportError, in one line, if httpx2 is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.settings = settings
        self.breaker = Breaker(clock, random)
        self._clock, self._now, self._sleep = clock, now, sleep
        file = None if settings.state is None else Path(settings.state)
        self._budget = Budget(settings.requests, settings.tokens, now, file)
        self._probing: asyncio.Task[None] | None = None
        # made here: to read the certificates takes long enough to be felt in a request
        self._client = None if settings.offline else self._new_client()

    def state(self) -> dict[str, Any]:
        """For /health and /props. until: seconds since 1970 when it will be asked again,
        None if that is now or never.
        """
        state, reason, until = "ok", None, None
        opened = self.breaker.opened
        if self.settings.offline:
            state, reason = "offline", "offline"
        elif opened:
            reason = opened.reason
            state = "misconfigured" if is_mistaken(reason) else "open"
            until = round(self._now().timestamp() + max(opened.until - self._clock(), 0))
        elif self._budget.is_spent:
            state, reason, until = "budget", "budget", round(self._budget.until().timestamp())
        return {"model": self.settings.model, "state": state, "reason": reason, "until": until}

    def route(self, header: str | None, model: str | None) -> tuple[Route, str | None]:
        """(route, model of the local names) of the header x-qwen3c-route and the field `model`.

        A model may be "local/NAME" or "cloud/NAME"; cloud/ may be followed by
        nothing. ApiError if neither can be.
        """
        prefix, slash, name = (model or "").partition("/")
        route = prefix if slash and prefix in ("local", "cloud") else None
        if header is not None and header not in ROUTES:
            raise ApiError(400, f"x-qwen3c-route: one of {', '.join(ROUTES)}", param="x-qwen3c-route")
        if route and header not in (None, "auto", route):
            raise ApiError(400, f"model {prefix}/… and x-qwen3c-route: {header} contradict", param="model")
        if route == "cloud" and name not in ("", self.settings.model):
            raise ApiError(
                404, f"the cloud model here is {self.settings.model!r}", param="model", code="model_not_found"
            )
        chosen: Any = route or header or "auto"
        return chosen, ((name or None) if route == "local" else None if route else model)

    async def open(self, body: dict[str, Any], route: Route = "auto", *, stream: bool) -> Answer | Declined:
        """Offer a checked request to the provider. stream: whether its client sees the reply as it comes.

        ApiError: the provider says that the request is wrong (400, 413, 422), or with the route
        "cloud" anything else than an answer.
        """
        kept = self._kept(body, route)
        failure = Failure(kept) if kept else None
        if failure is None:
            try:
                return await self._ask(body, stream)
            except Failure as error:
                failure = error
                self._note(failure)
        reason = "misconfigured" if is_mistaken(failure.reason) else failure.reason
        if route == "cloud":
            raise self._unavailable(failure.reason, body)
        return Declined(reason)

    async def aclose(self) -> None:
        """Stop probing and close the connections."""
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing
        if self._client is not None:
            await self._client.aclose()
        self._budget.close()

    # ------------------------------------------------------------------------
    # Asking

    def _kept(self, body: dict[str, Any], route: Route) -> str | None:
        """Why a request is not even offered, None if it is."""
        if route == "local":
            return "route_local"
        if self.settings.offline:
            return "offline"
        if _local_field(body):
            return "local_field"
        if self.breaker.opened:
            return "misconfigured" if is_mistaken(self.breaker.opened.reason) else "breaker_open"
        return "budget" if self._budget.is_spent else None

    async def _ask(self, body: dict[str, Any], stream: bool) -> Answer:
        """An answer whose first delta is there, or all of it. Failure if there is none."""
        import anyio

        sent, with_usage = self._translated(body)
        self._budget.add(1, 0)
        answer: Answer | None = None

        def ended(answer: Answer, failure: Failure | None) -> None:
            self._budget.add(0, _tokens(answer, len(sent)))
            if failure is not None:
                self._note(failure)

        try:
            with anyio.move_on_after(self.settings.first_delta) as scope:
                response = await self._send("POST", "/chat/completions", sent)
                shape = Shape(self.settings.model, body.get("n") or 1, with_usage)
                answer = Answer(response, shape, self.settings.silence, ended)
                await self._check(response)
                await answer.begin()
            if scope.cancelled_caught or answer is None:
                raise Failure("first_delta_timeout")
            if not stream:
                await answer.read_all()
        except BaseException:
            if answer is not None:
                await answer.aclose()
            raise
        self.breaker.answered()
        return answer

    def _translated(self, body: dict[str, Any]) -> tuple[bytes, bool]:
        """The body that goes up, and whether the client asked for the usage chunk.

        The provider is always asked to stream and to count: a silent one is noticed, and the budget is known.
        """
        sent = {name: body[name] for name in ALLOWED if body.get(name) is not None}
        sent["messages"] = [
            {name: message[name] for name in OF_A_MESSAGE if name in message} for message in body["messages"]
        ]
        sent |= {"model": self.settings.model, "stream": True, "stream_options": {"include_usage": True}}
        asked = body.get("stream_options") or {}
        return json.dumps(sent).encode(), bool(asked.get("include_usage"))

    async def _send(self, method: str, path: str, content: bytes | None = None) -> httpx2.Response:
        assert self._client  # offline nothing is sent
        try:
            request = self._client.build_request(method, self.settings.url + path, content=content)
            return await self._client.send(request, stream=True)
        except Exception as error:
            raise failure_of(error) from None

    async def _check(self, response: httpx2.Response) -> None:
        """Raise what a status says; ApiError with the provider's own words where the request is wrong."""
        status = response.status_code
        if status in OURS:
            raise self._provider_error(status, await _bytes(response, LONGEST_ERROR))
        failure = failure_of_status(status, response.headers.get("retry-after"), self._now)
        if failure:
            raise failure

    def _provider_error(self, status: int, body: bytes) -> ApiError:
        try:
            error = parsed(body).get("error")
        except Failure:
            error = None
        if isinstance(error, str):
            error = {"message": error}
        told = error if isinstance(error, dict) else {}
        text = json.dumps(told)
        if self.settings.key and self.settings.key in text:  # some repeat what they were sent
            told = json.loads(text.replace(self.settings.key, "[key]"))
        message, type = told.pop("message", None), told.pop("type", None)
        param, code = told.pop("param", None), told.pop("code", None)
        return ApiError(
            status,
            str(message or f"the provider answered {status}"),
            param=param if isinstance(param, str) else None,
            code=None if code is None else str(code),
            type=type if isinstance(type, str) else "invalid_request_error",
            extra=told,
        )

    def _unavailable(self, reason: str, body: dict[str, Any]) -> ApiError:
        """The error of a request that only the provider may answer."""
        if reason == "local_field":
            name = _local_field(body)
            return ApiError(
                400, f"{name}: a provider does not know it; only the local model does", param=name
            )
        state = self.state()
        waits = state["until"] is not None
        status = 504 if reason.endswith("timeout") else 503 if waits or reason == "offline" else 502
        return ApiError(
            status,
            f"the cloud does not answer: {reason}",
            code="upstream_unavailable",
            type="server_error",
            retry_after=max(state["until"] - self._now().timestamp(), 1) if waits else None,
            should_retry=False,
            extra={"reason": reason},
        )

    def _new_client(self) -> httpx2.AsyncClient:
        from http.cookiejar import CookieJar, DefaultCookiePolicy

        httpx2 = import_client()
        headers = {"accept": "text/event-stream, application/json", "accept-encoding": "identity"}
        headers |= {"content-type": "application/json", "user-agent": "qwen3c"}
        if self.settings.key:
            headers["authorization"] = f"Bearer {self.settings.key}"
        return httpx2.AsyncClient(
            headers=headers,
            cookies=CookieJar(
                DefaultCookiePolicy(allowed_domains=[])
            ),  # it keeps none: users share the client
            follow_redirects=False,
            trust_env=self.settings.proxy_from_env,
            timeout=httpx2.Timeout(None, connect=self.settings.connect),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=8),
        )

    # ------------------------------------------------------------------------
    # The breaker

    def _note(self, failure: Failure) -> None:
        """Take note of a failure; if it opened the breaker, one log line and a probe in the background."""
        before = self.breaker.opened
        self.breaker.fail(failure)
        opened = self.breaker.opened
        if opened and (before is None or opened.reason != before.reason):
            self._say(opened)
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe_until_closed())

    def _say(self, opened: Opened) -> None:
        seconds = max(opened.until - self._clock(), 0)
        if is_mistaken(opened.reason):
            cure = "check the key" if opened.reason != "http_404" else "check --upstream and --upstream-model"
            log.warning("upstream %s misconfigured: %s: %s", self.settings.host, opened.reason, cure)
        else:
            log.info("upstream %s: %s, not asked for %.0f s", self.settings.host, opened.reason, seconds)

    async def _probe_until_closed(self) -> None:
        while (opened := self.breaker.opened) is not None:
            if (seconds := opened.until - self._clock()) > 0:
                await self._sleep(seconds)
                continue
            try:
                await self._probe(opened.reason)
            except Failure as failure:
                self.breaker.fail_probe(failure)
            else:
                self.breaker.close()
                log.info("upstream %s answers again", self.settings.host)

    async def _probe(self, reason: str) -> None:
        """GET /models. Failure if nobody is there whom it would help to ask.

        A provider need not have the list: 404 is a sign of life, unless it is 404 that opened the breaker.
        """
        import anyio

        with anyio.move_on_after(self.settings.first_delta) as scope:
            response = await self._send("GET", "/models")
            try:
                failure = failure_of_status(
                    response.status_code, response.headers.get("retry-after"), self._now
                )
                if failure and not (failure.reason == "http_404" != reason):
                    raise failure
                if not failure and "json" not in response.headers.get("content-type", ""):
                    raise Failure("captive", opens=True)
            finally:
                with contextlib.suppress(Exception):
                    await response.aclose()
        if scope.cancelled_caught:
            raise Failure("probe_timeout")


def _local_field(body: dict[str, Any]) -> str | None:
    """The field of a request that binds its reply to what only the local model can
    keep, None if there is none.
    """
    for name in LOCAL_ONLY:
        if body.get(name) is not None:
            return name
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") not in FORMATS:
        return "response_format.type"
    return None


def _tokens(answer: Answer, sent: int) -> int:
    """Tokens that an answer costs: as the provider counted, else four bytes or characters each, up and down.

    An answer without one delta costs none.
    """
    if answer.usage:
        return int(answer.usage["total_tokens"])
    return (sent + answer.size) // 4 if answer.size else 0


async def _bytes(response: httpx2.Response, most: int = 16 << 20) -> bytes:
    """The body, up to `most` bytes of it."""
    body = bytearray()
    try:
        async for piece in response.aiter_raw():
            body += piece
            if len(body) >= most:
                break
    except Exception as error:
        raise failure_of(error) from None
    return bytes(body[:most])
