"""Cloud first, local fallback: every row of the table, by a provider on loopback that fails as told.

python -m pytest tests/serve/test_upstream.py
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import selectors
import socket
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpcore2
import pytest
from fake_provider import (
    DONE,
    ROLE,
    USAGE,
    Provider,
    Script,
    Step,
    chunk,
    chunked,
    error,
    event,
    head,
    stream,
)

from qwen3c.serve.breaker import FAILURES, Breaker
from qwen3c.serve.errors import ApiError
from qwen3c.serve.failures import Failure
from qwen3c.serve.upstream import Answer, Declined, Route, Settings, Upstream, read_key

KEY = "sk-canary-4f1d"
ASK: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "hi"}]}
START = datetime(2026, 11, 30, 12, 0, 0)


class Clock:
    """Time that only a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds - 1000)

    async def sleep(self, seconds: float) -> None:
        wakes = asyncio.Event()
        self._sleepers.append((self.seconds + seconds, wakes))
        await wakes.wait()

    def move(self, seconds: float) -> None:
        self.seconds += seconds
        for at, wakes in self._sleepers:
            if at <= self.seconds:
                wakes.set()


T = TypeVar("T")


def settings(url: str, **options: Any) -> Settings:
    chosen: dict[str, Any] = {"key": KEY, "first_delta": 5.0, "silence": 5.0} | options
    return Settings(url, "M", **chosen)


def new_upstream(url: str, clock: Clock, **options: Any) -> Upstream:
    return Upstream(
        settings(url, **options), clock=clock, now=clock.now, sleep=clock.sleep, random=lambda: 0.5
    )


def talk(url: str, work: Callable[[Upstream, Clock], Awaitable[T]], **options: Any) -> T:
    """What `work` returns, given an Upstream of a clock that stands still."""

    async def run() -> T:
        clock = Clock()
        upstream = new_upstream(url, clock, **options)
        assert KEY not in repr(upstream.settings) + repr(upstream.__dict__)
        try:
            return await work(upstream, clock)
        finally:
            assert KEY not in repr(upstream.state())
            await upstream.aclose()

    return asyncio.run(run())


async def text_of(answer: Answer) -> str:
    return "".join([choice["delta"].get("content") or "" async for c in answer for choice in c["choices"]])


async def until(condition: Callable[[], object]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to be")


def unkeyed(failed: ApiError) -> ApiError:
    """An error that nowhere holds the key."""
    told = "".join(traceback.format_exception(failed)) + repr(failed) + json.dumps(failed.openai())
    told += json.dumps([failed.anthropic(), failed.headers()])
    assert KEY not in told
    return failed


class _Log(logging.Handler):
    """Every line that is logged, by whatever library, with all that its record holds."""

    def __init__(self) -> None:
        super().__init__(1)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record) + repr(record.__dict__))


@pytest.fixture(autouse=True)
def no_key_in_logs() -> Iterator[None]:
    root, kept = logging.getLogger(), _Log()
    level = root.level
    root.addHandler(kept)
    root.setLevel(1)
    yield
    root.removeHandler(kept)
    root.setLevel(level)
    assert not [line for line in kept.lines if KEY in line]


@pytest.fixture(autouse=True)
def certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpcore2, "default_ssl_context", _ssl_context)


_ssl_context = functools.cache(httpcore2.default_ssl_context)


# ----------------------------------------------------------------------------
# An answer


@pytest.mark.parametrize("streaming", [True, False])
def test_a_provider_that_answers_is_who_speaks(streaming: bool) -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        answer = await upstream.open(ASK, stream=streaming)
        assert isinstance(answer, Answer) and answer.model == "cloud-m"
        if streaming:
            assert await text_of(answer) == "Hello ☃"
        else:
            completion = answer.completion()
            assert completion["choices"][0]["message"]["content"] == "Hello ☃"
            assert completion["model"] == "cloud-m" and completion["usage"]["total_tokens"] == 10
        assert upstream.state() == {"model": "M", "state": "ok", "reason": None, "until": None}

    with Provider(stream("Hel", "lo ☃")) as provider:
        talk(provider.url, work)
        (request,) = provider.requests
        assert request.path == "/v1/chat/completions"
        assert request.headers["authorization"] == f"Bearer {KEY}"  # so that the tests of no key can fail


def test_only_what_is_allowed_goes_up() -> None:
    body = {
        **ASK,
        "temperature": 0.5,
        "seed": 3,
        "logit_bias": None,
        "user": "me",
        "top_k": 5,
        "min_p": 0.1,
        "stream": False,
        "chat_template_kwargs": {"enable_thinking": True},
        "thinking_budget": 3,
        "return_progress": True,
        "n": 2,
        "messages": [{"role": "assistant", "content": "a", "reasoning_content": "secret"}],
    }
    with Provider(stream("ok")) as provider:
        talk(provider.url, lambda upstream, clock: upstream.open(body, stream=False))
        (request,) = provider.asked
        assert request.body == {
            "model": "M",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "seed": 3,
            "n": 2,
            "messages": [{"role": "assistant", "content": "a"}],
        }
        assert set(request.headers) == {
            "host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "authorization",
            "content-length",
        }  # fmt: skip


@pytest.mark.parametrize("asked", [True, False])
def test_the_usage_chunk_is_the_last_and_only_where_it_was_asked_for(asked: bool) -> None:
    async def work(upstream: Upstream, clock: Clock) -> list[dict[str, Any]]:
        answer = await upstream.open(ASK | {"stream_options": {"include_usage": asked}}, stream=True)
        assert isinstance(answer, Answer)
        return [c async for c in answer]

    counted: dict[str, Any] = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    script = [head(), ROLE, chunk({"content": "a"}, **counted), chunk({}, "stop"), USAGE, DONE]
    with Provider(script) as provider:
        chunks = talk(provider.url, work)
    assert [bool(c["choices"]) for c in chunks] == [True, True, True] + [False] * asked
    assert [("usage" in c) for c in chunks] == [False, False, False] + [True] * asked
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {c["id"] for c in chunks} == {"up-1"} and {c["model"] for c in chunks} == {"cloud-m"}


def test_ids_of_tool_calls_are_told_once_and_indices_have_no_holes() -> None:
    def call(index: int, arguments: str) -> dict[str, Any]:
        function = {"name": "f", "arguments": arguments}
        return {"tool_calls": [{"index": index, "id": f"c{index}", "type": "function", "function": function}]}

    async def work(upstream: Upstream, clock: Clock) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        answer = await upstream.open(ASK, stream=True)
        assert isinstance(answer, Answer)
        whole = await upstream.open(ASK, stream=False)
        assert isinstance(whole, Answer)
        return [c async for c in answer], whole.completion()

    pieces = [call(3, '{"a"'), call(3, ":1}"), call(7, "{}")]
    with Provider([head(), *map(chunk, pieces), chunk({}, "tool_calls"), DONE]) as provider:
        chunks, completion = talk(provider.url, work)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    told = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [(piece["index"], piece.get("id")) for piece in told] == [(0, "c3"), (0, None), (1, "c7")]
    assert told[1] == {"index": 0, "function": {"arguments": ":1}"}}
    (choice,) = completion["choices"]
    assert [c["function"]["arguments"] for c in choice["message"]["tool_calls"]] == ['{"a":1}', "{}"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None


def test_a_provider_that_does_not_stream_answers_too() -> None:
    message = {"role": "assistant", "content": "hey", "reasoning": "hm"}
    body = {
        "id": "up-2",
        "model": "n",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }

    async def work(upstream: Upstream, clock: Clock) -> Any:
        answer = await upstream.open(ASK, stream=False)
        assert isinstance(answer, Answer)
        return answer.completion()["choices"][0]["message"]

    with Provider([head(200, "application/json") + json.dumps(body).encode()]) as provider:
        told = talk(provider.url, work)
    assert told == {"role": "assistant", "content": "hey", "refusal": None, "reasoning_content": "hm"}


def test_events_come_in_any_pieces_and_lines() -> None:
    """Data of several lines, CRLF, comments, other fields, no space after the colon, a byte at a time."""
    whole = b"".join([ROLE, chunk({"content": "a\u2603"}), chunk({}, "stop"), DONE])
    lines = whole.replace(b', "', b',\ndata:"').replace(b"\n", b"\r\n: c\r\nid: 1\r\n")
    lines = lines.replace(b"\r\n: c\r\nid: 1\r\n\r\n: c\r\nid: 1\r\n", b"\r\n\r\n")

    async def work(upstream: Upstream, clock: Clock) -> str:
        answer = await upstream.open(ASK, stream=True)
        assert isinstance(answer, Answer)
        return await text_of(answer)

    with Provider([head(), *(lines[i : i + 1] for i in range(len(lines)))]) as provider:
        assert talk(provider.url, work) == "a☃"


def test_half_a_surrogate_pair_does_not_reach_the_client() -> None:
    broken = chunk({"content": "@"}).replace(b"@", b"a\\ud83d")

    async def work(upstream: Upstream, clock: Clock) -> str:
        answer = await upstream.open(ASK, stream=True)
        assert isinstance(answer, Answer)
        return await text_of(answer)

    with Provider([head(), broken, chunk({}, "stop"), DONE]) as provider:
        assert talk(provider.url, work) == "a\ufffd"


def test_a_whole_answer_leaves_its_connection_to_the_next() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        for _ in range(3):
            answer = await upstream.open(ASK, stream=True)
            assert isinstance(answer, Answer) and await text_of(answer) == "a"

    with Provider(stream("a")) as provider:
        talk(provider.url, work)
        assert (len(provider.requests), provider.connections) == (3, 1)


# ----------------------------------------------------------------------------
# The table, before a delta

HTML = [head(200, "text/html") + b"<html>log in</html>"]
EARLY_ERROR = [head(), ROLE, b": ping\n\n", event({"error": {"message": "busy", "code": 503}}), DONE]
BEFORE: dict[str, tuple[Script, str, float]] = {  # script, reason, seconds that the breaker opens for; 0: +1
    "200 HTML": (HTML, "captive", 10),
    "redirect": ([head(302, "text/html", "location: http://127.0.0.1:1/")], "captive", 10),
    "204": ([head(204)], "captive", 10),
    "bad JSON": ([head(), event("{nope")], "not_json", 10),
    "bad chunk": ([head(), event({"choices": [{"delta": {"content": 7}}]})], "not_json", 10),
    "unknown choice": (
        [head(), event({"choices": [{"index": 9, "delta": {"content": "a"}}]})],
        "not_json",
        10,
    ),
    "deep JSON": ([head(), event("[" * 100_000)], "not_json", 10),
    "huge line": ([head(), b"data: " + b"x" * (5 << 20)], "not_json", 10),
    "JSON that is no answer": ([head(200, "application/json") + b"[1]"], "not_json", 10),
    "error JSON": (error(200), "error_event", 0),
    "early error": (EARLY_ERROR, "error_event", 0),
    "error by its name": ([head(), b'event: error\ndata: {"message": "no"}\n\n'], "error_event", 0),
    "closed": ([head()], "cut", 0),
    "role and end": ([head(), ROLE, DONE], "cut", 0),
    "reset": (["reset"], "cut", 0),
    "reset after headers": ([head(), ROLE, "reset"], "cut", 0),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9\r\n", "reset"], "cut", 0),
    "chunked garbage": ([chunked(ROLE, end=False) + b"zz\r\n!!"], "cut", 0),
    **{f"{status}": (error(status), f"http_{status}", 0) for status in (408, 429, 500, 502, 503, 504, 529)},
    "429 with seconds": (error(429, "retry-after: 77"), "http_429", 77),
    "429 with a date": (error(429, "retry-after: DATE"), "http_429", 90),
    **{f"{status}": (error(status), "misconfigured", 300) for status in (401, 402, 403, 404, 405)},
}


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("row", BEFORE)
def test_before_a_delta_the_local_model_answers(row: str, streaming: bool) -> None:
    script, reason, seconds = BEFORE[row]
    date = (START + timedelta(seconds=90)).astimezone().strftime("%a, %d %b %Y %H:%M:%S %z").encode()
    script = [step.replace(b"DATE", date) if isinstance(step, bytes) else step for step in script]

    async def work(upstream: Upstream, clock: Clock) -> None:
        assert await upstream.open(ASK, stream=streaming) == Declined(reason)
        opened = upstream.breaker.opened
        if seconds:
            assert opened and opened.until - clock() == pytest.approx(seconds, abs=0.01)
            kept = "misconfigured" if reason == "misconfigured" else "breaker_open"
            assert await upstream.open(ASK, stream=streaming) == Declined(kept)
        else:
            assert opened is None
            for _ in range(FAILURES - 1):
                assert await upstream.open(ASK, stream=streaming) == Declined(reason)
            opened = upstream.breaker.opened
            assert opened and opened.until - clock() == pytest.approx(10)
            assert await upstream.open(ASK, stream=streaming) == Declined("breaker_open")

    with Provider(script) as provider:
        talk(provider.url, work)
        assert len(provider.requests) == (1 if seconds else FAILURES)  # never twice for one request


@pytest.mark.parametrize("kind", ["refused", "dns", "tls", "backlog", "unreachable"])
def test_a_provider_that_cannot_be_reached_is_left_alone_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"refused": "connect_refused", "backlog": "connect_timeout"}
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, Provider(stream("a")) as provider:
        port = listening.getsockname()[1]
        url, fillers = f"http://127.0.0.1:{port}/v1", []
        if kind == "refused":
            listening.close()
        elif kind == "backlog":
            for _ in range(4):  # nobody accepts: what comes now waits
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
                fillers.append(filler)
        elif kind == "tls":
            url = provider.url.replace("http:", "https:")
        elif kind == "unreachable":
            url = "https://255.255.255.255/v1"
        else:
            url = "https://provider.invalid/v1"

            def unknown(*_: object, **__: object) -> NoReturn:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

            monkeypatch.setattr(socket, "getaddrinfo", unknown)

        async def work(upstream: Upstream, clock: Clock) -> None:
            assert await upstream.open(ASK, stream=True) == Declined(reasons.get(kind, kind))
            assert upstream.breaker.opened and upstream.breaker.opened.until - clock() == pytest.approx(10)
            assert upstream.state()["state"] == "open"

        talk(url, work, connect=0.3)
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_wrong_request_comes_back_in_the_providers_words(status: int) -> None:
    told = {"message": f"too long, {KEY}", "type": "bad", "param": "messages", "code": "c", "limit": 5}

    async def work(upstream: Upstream, clock: Clock) -> ApiError:
        with pytest.raises(ApiError) as failed:
            await upstream.open(ASK, stream=True)
        assert upstream.breaker.opened is None
        return unkeyed(failed.value)

    with Provider(error(status, body={"error": told})) as provider:
        failed = talk(provider.url, work)
    assert failed.status == status
    assert failed.openai() == {"error": told | {"message": "too long, [key]"}}
    with Provider([head(status, "text/html") + b"<h1>"]) as provider:
        assert talk(provider.url, work).message == f"the provider answered {status}"


# ----------------------------------------------------------------------------
# The table, after a delta

HELLO = [ROLE, chunk({"content": "Hel"})]
SNOWMAN = chunk({"content": "☃"})
AFTER: dict[str, tuple[Script, str]] = {
    "cut inside a character": ([head(), *HELLO, SNOWMAN[: SNOWMAN.index(b"\xe2") + 2]], "cut"),
    "cut between chunks": ([chunked(*HELLO, end=False)], "cut"),
    "no finish_reason": ([head(), *HELLO, DONE], "cut"),
    "end without [DONE]": ([head(), *HELLO], "cut"),
    "reset": ([head(), *HELLO, "reset"], "cut"),
    "chunked garbage": ([chunked(*HELLO, end=False) + b"zz\r\n!!"], "cut"),
    "bad chunk": ([head(), *HELLO, event("{nope")], "not_json"),
    "error event": ([head(), *HELLO, event({"error": {"message": KEY}})], "error_event"),
    "finished by an error": ([head(), *HELLO, chunk({}, "error")], "error_event"),
    "huge line": ([head(), *HELLO, b"data: " + b"x" * (5 << 20)], "not_json"),
    "stall": ([head(), *HELLO, b": ping\n\n", "silence"], "silent"),
}


@pytest.mark.parametrize("row", AFTER)
def test_after_a_delta_the_reply_breaks_off_and_what_came_stands(row: str) -> None:
    script, reason = AFTER[row]

    async def work(upstream: Upstream, clock: Clock) -> None:
        for n in range(1, FAILURES + 1):
            answer, text = await upstream.open(ASK, stream=True), ""
            assert isinstance(answer, Answer)
            with pytest.raises(ApiError) as failed:
                async for c in answer:
                    text += c["choices"][0]["delta"].get("content", "")
            assert text == "Hel"  # nothing more, nothing less, and whole characters
            assert unkeyed(failed.value).code == "upstream_interrupted"
            assert failed.value.openai()["error"]["reason"] == reason
            assert failed.value.openai()["error"]["type"] == "server_error"
            opens = reason == "not_json" or n == FAILURES
            assert bool(upstream.breaker.opened) == opens
            if opens:
                return

    with Provider(script) as provider:
        talk(provider.url, work, silence=0.2)


@pytest.mark.parametrize("row", AFTER)
def test_a_reply_that_nobody_has_seen_is_given_by_the_local_model(row: str) -> None:
    script, reason = AFTER[row]
    with Provider(script) as provider:
        got = talk(provider.url, lambda upstream, clock: upstream.open(ASK, stream=False), silence=0.2)
    assert got == Declined(reason)


def test_a_finished_reply_without_done_is_whole() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        answer = await upstream.open(ASK, stream=True)
        assert isinstance(answer, Answer) and await text_of(answer) == "Hel"
        assert upstream.breaker.opened is None

    with Provider([head(), *HELLO, chunk({}, "stop")]) as provider:
        talk(provider.url, work)


def test_a_client_that_leaves_frees_the_connection_and_is_no_failure() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        answer = await upstream.open(ASK, stream=True)
        assert isinstance(answer, Answer)
        await anext(answer)
        await answer.aclose()
        asking = asyncio.create_task(upstream.open(ASK, stream=True))
        await until(lambda: len(provider.requests) == 2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert upstream.breaker.opened is None and not upstream.breaker._failures
        assert upstream._client and not upstream._client._transport._pool.connections  # type: ignore[attr-defined]

    with Provider([head(), *HELLO, "silence"], [head(), "silence"]) as provider:
        talk(provider.url, work)


# ----------------------------------------------------------------------------
# How long it takes, on a clock that is in a hurry

SPEED = 12.0


class _Hurried(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout and timeout / SPEED)


class HurriedLoop(asyncio.SelectorEventLoop):
    """An event loop whose second is a twelfth of a second."""

    def __init__(self) -> None:
        super().__init__(_Hurried())

    def time(self) -> float:
        return super().time() * SPEED


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("backlog", 2), ("silent", 15), ("pings", 15), ("body", 15), ("stall", 30)],
)
def test_patience_ends_as_the_table_says(kind: str, seconds: float) -> None:
    """2 s for a connection, 15 s for the first delta, 30 s of silence: of the loop's clock, which runs
    ahead.
    """
    pings: list[Step] = [head(), ROLE, *[b": ping\n\n"] * 3, "silence"]
    scripts: dict[str, list[Step]] = {
        "backlog": ["silence"],
        "silent": ["silence"],
        "pings": pings,
        "body": [head(200, "application/json") + b'{"choices": [', "silence"],
        "stall": [head(), *HELLO, "silence"],
    }
    reasons = {"backlog": "connect_timeout", "stall": "silent"}
    loop = HurriedLoop()

    async def work(url: str) -> tuple[Answer | Declined, float]:
        upstream = Upstream(Settings(url, "M", KEY), clock=loop.time)
        begin = loop.time()
        got = await upstream.open(ASK, stream=False)
        taken = loop.time() - begin
        await upstream.aclose()
        return got, taken

    with Provider(scripts[kind]) as provider, socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}" if kind == "backlog" else provider.url
        try:
            got, taken = loop.run_until_complete(work(url))
        finally:
            loop.close()
            for filler in fillers:
                filler.close()
    assert got == Declined(reasons.get(kind, "first_delta_timeout"))
    assert seconds - 0.1 <= taken < 1.5 * seconds + 3


# ----------------------------------------------------------------------------
# The breaker


def test_three_failures_in_a_minute_open_the_breaker() -> None:
    clock = Clock()
    breaker = Breaker(clock, lambda: 0.5)
    for pause in (0, 31, 31, 28):  # the first is forgotten when the third comes
        assert breaker.opened is None
        clock.move(pause)
        breaker.fail(Failure("http_500"))
    assert breaker.opened and breaker.opened.until == clock() + 10


def test_waits_double_up_to_five_minutes_and_a_reply_takes_them_back() -> None:
    clock = Clock()
    breaker = Breaker(clock, lambda: 0.5)
    waits = []
    for i in range(7):
        failure = Failure("dns", opens=True)
        breaker.fail_probe(failure) if i % 2 else breaker.fail(failure)  # what opened it makes no difference
        assert breaker.opened
        waits.append(breaker.opened.until - clock())
        clock.seconds = breaker.opened.until
        if not i % 2:
            continue
        breaker.close()
    assert waits == [10, 20, 40, 80, 160, 300, 300]
    breaker.close()
    breaker.answered()
    breaker.fail(Failure("dns", opens=True))
    assert breaker.opened and breaker.opened.until - clock() == 10


def test_waits_are_spread_by_a_fifth() -> None:
    for random, wait in ((0.0, 8.0), (0.999, 12.0)):
        breaker = Breaker(lambda: 0.0, lambda random=random: random)  # type: ignore[misc]
        breaker.fail(Failure("dns", opens=True))
        assert breaker.opened and breaker.opened.until == pytest.approx(wait, abs=0.01)


def test_requests_under_way_do_not_shorten_the_wait() -> None:
    clock = Clock()
    breaker = Breaker(clock, lambda: 0.5)
    breaker.fail(Failure("http_401", opens=True, seconds=300))
    for failure in (Failure("http_429", seconds=5), Failure("dns", opens=True)):
        breaker.fail(failure)
        assert breaker.opened and breaker.opened.until == clock() + 300
    breaker.fail(Failure("http_429", seconds=1e9))
    assert breaker.opened and breaker.opened.until == clock() + 86_400  # nobody is believed for longer


def test_an_open_breaker_is_probed_in_the_background_and_never_by_a_request() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        for _ in range(FAILURES):
            await upstream.open(ASK, stream=True)
        assert upstream.state() == {
            "model": "M",
            "state": "open",
            "reason": "http_500",
            "until": round(clock.now().timestamp()) + 10,
        }
        provider.answer_with(stream("a"))
        provider.models = error(503)[0]  # type: ignore[assignment]
        await asyncio.sleep(0)
        clock.move(9.9)
        assert await upstream.open(ASK, stream=True) == Declined("breaker_open")
        clock.move(0.2)
        await until(lambda: upstream.breaker.opened and upstream.breaker.opened.reason == "http_503")
        assert await upstream.open(ASK, stream=True) == Declined("breaker_open")
        provider.models = head(200, "text/html")  # a captive portal is no sign of life
        await asyncio.sleep(0)
        clock.move(20.1)
        await until(lambda: upstream.breaker.opened and upstream.breaker.opened.reason == "captive")
        provider.models = head(200, "application/json") + b"{}"
        await asyncio.sleep(0)
        clock.move(40.1)
        await until(lambda: upstream.breaker.opened is None)
        assert isinstance(await upstream.open(ASK, stream=False), Answer)

    with Provider(error(500)) as provider:
        talk(provider.url, work)
        methods = "".join(request.method[0] for request in provider.requests)
        assert methods == "PPP" + "GGG" + "P"
        assert {request.path for request in provider.requests if request.method == "GET"} == {"/v1/models"}


def test_a_wrong_key_is_told_once_and_tried_again_after_five_minutes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        both = [upstream.open(ASK, stream=True) for _ in range(2)]
        assert await asyncio.gather(*both) == [Declined("misconfigured")] * 2
        assert upstream.state()["state"] == "misconfigured"
        for _ in range(3):
            assert await upstream.open(ASK, stream=True) == Declined("misconfigured")
        provider.models = error(401)[0]  # type: ignore[assignment]
        await asyncio.sleep(0)
        clock.move(300)
        await until(lambda: upstream.breaker.opened and upstream.breaker.opened.until == clock() + 300)
        provider.models = head(200, "application/json") + b"{}"
        clock.move(300)
        await until(lambda: upstream.breaker.opened is None)

    with Provider(error(401)) as provider:
        talk(provider.url, work)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("qwen3c")]
    assert len(warnings) == 1 and "check the key" in warnings[0].getMessage()


@pytest.mark.parametrize(("status", "closes"), [(503, True), (404, False)])
def test_a_provider_without_a_list_of_models_is_alive(status: int, closes: bool) -> None:
    async def work(upstream: Upstream, clock: Clock) -> bool:
        for _ in range(FAILURES):
            await upstream.open(ASK, stream=True)
        opened = upstream.breaker.opened
        await asyncio.sleep(0)
        clock.move(300)
        await until(lambda: upstream.breaker.opened != opened)
        return upstream.breaker.opened is None

    with Provider(error(status), models=error(404)[0]) as provider:  # type: ignore[arg-type]
        assert talk(provider.url, work) == closes


# ----------------------------------------------------------------------------
# Routes, budgets, offline


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [(error(500), 502, "http_500"), (error(401), 503, "http_401"), (HTML, 503, "captive"), (["silence"], 504, "first_delta_timeout")],
)  # fmt: skip
def test_the_cloud_route_has_no_fallback(script: Script, status: int, reason: str) -> None:
    async def work(upstream: Upstream, clock: Clock) -> ApiError:
        with pytest.raises(ApiError) as failed:
            await upstream.open(ASK, "cloud", stream=True)
        return unkeyed(failed.value)

    with Provider(script) as provider:
        failed = talk(provider.url, work, first_delta=0.3)
    assert (failed.status, failed.code) == (status, "upstream_unavailable")
    assert failed.openai()["error"]["reason"] == reason
    assert failed.headers()["x-should-retry"] == "false"


def test_what_only_the_local_model_can_keep_stays_here() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        assert await upstream.open(ASK, "local", stream=True) == Declined("route_local")
        for more in ({"guided_regex": "a+"}, {"response_format": {"type": "regex", "pattern": "a"}}):
            assert await upstream.open(ASK | more, stream=True) == Declined("local_field")
            with pytest.raises(ApiError) as failed:
                await upstream.open(ASK | more, "cloud", stream=True)
            assert failed.value.status == 400 and failed.value.param in (
                "guided_regex",
                "response_format.type",
            )

    with Provider(stream("a")) as provider:
        talk(provider.url, work)
        assert not provider.connections


def test_routes_are_named_by_header_or_model() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        assert upstream.route(None, None) == ("auto", None)
        assert upstream.route("cloud", "qwen3") == ("cloud", "qwen3")
        assert upstream.route(None, "local/qwen3") == ("local", "qwen3")
        assert upstream.route("auto", "cloud/M") == ("cloud", None)
        assert upstream.route(None, "org/qwen3") == ("auto", "org/qwen3")
        for wrong in (("both", None), ("local", "cloud/M"), (None, "cloud/dearer")):
            with pytest.raises(ApiError):
                upstream.route(*wrong)

    talk("http://localhost:1", work)


def test_a_spent_budget_lasts_until_midnight() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        for _ in range(2):
            assert isinstance(await upstream.open(ASK, stream=False), Answer)
        midnight = datetime(2026, 12, 1).timestamp()
        assert await upstream.open(ASK, stream=False) == Declined("budget")
        assert upstream.state() == {"model": "M", "state": "budget", "reason": "budget", "until": midnight}
        clock.move(12 * 3600 - 1)
        assert await upstream.open(ASK, stream=False) == Declined("budget")
        clock.move(1)
        assert isinstance(await upstream.open(ASK, stream=False), Answer)

    for limit in ({"requests": 2}, {"tokens": 15}):  # a reply of stream() costs 10
        with Provider(stream("a")) as provider:
            talk(provider.url, work, **limit)
            assert len(provider.requests) == 3


def test_a_spent_budget_is_known_after_a_restart(tmp_path: Path) -> None:
    async def spend(upstream: Upstream, clock: Clock) -> None:
        assert isinstance(await upstream.open(ASK, stream=False), Answer)

    async def again(upstream: Upstream, clock: Clock) -> None:
        assert await upstream.open(ASK, stream=False) == Declined("budget")

    with Provider(stream("a")) as provider:
        for work in (spend, again, again):
            talk(provider.url, work, requests=1, state=str(tmp_path / "spent"))
        assert len(provider.requests) == 1


def test_a_reply_that_is_left_early_costs_about_what_came() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        answer = await upstream.open(ASK, stream=True)
        assert isinstance(answer, Answer)
        await answer.aclose()
        assert await upstream.open(ASK, stream=True) == Declined("budget")

    with Provider([head(), ROLE, chunk({"content": "abcd" * 50}), "silence"]) as provider:
        talk(provider.url, work, tokens=60)


def test_offline_opens_no_connection() -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        routes: tuple[Route, ...] = ("auto", "local")
        for route in routes:
            for streaming in (True, False):
                got = await upstream.open(ASK, route, stream=streaming)
                assert got == Declined("route_local" if route == "local" else "offline")
        with pytest.raises(ApiError) as failed:
            await upstream.open(ASK, "cloud", stream=True)
        assert failed.value.status == 503
        clock.move(1000)
        await asyncio.sleep(0.05)
        assert upstream.state()["state"] == "offline"

    with Provider(stream("a")) as provider:
        talk(provider.url, work, offline=True)
        assert provider.connections == 0


def test_cookies_are_not_kept_and_proxies_of_the_environment_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(upstream: Upstream, clock: Clock) -> None:
        for _ in range(2):
            assert isinstance(await upstream.open(ASK, stream=False), Answer)

    script = [head(200, "text/event-stream", "set-cookie: who=me; path=/"), *HELLO, chunk({}, "stop"), DONE]
    with Provider(script) as provider, Provider(script) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        talk(provider.url, work)
        assert not proxy.connections and not any("cookie" in request.headers for request in provider.requests)
        talk(provider.url, work, proxy_from_env=True)
        assert proxy.connections


# ----------------------------------------------------------------------------
# Settings and the key


@pytest.mark.parametrize(
    "url",
    ["", "api.example.com/v1", "ftp://a/v1", "http:///v1", "https://", "https://u:sk-canary-4f1d@a/v1", "https://a/v1?key=sk-canary-4f1d",
     "https://a/#x", "http://example.com/v1", "http://10.0.0.1/v1", "https://a b/", "https://a:99999/", "https://a\n/"],
)  # fmt: skip
def test_a_url_that_no_key_may_be_sent_to_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--upstream") as refused:
        Settings(url, "M")
    assert KEY not in str(refused.value)


def test_plain_http_is_for_this_machine_or_on_request() -> None:
    for url in ("http://127.0.0.1:1/v1/", "http://localhost/v1", "http://[::1]:5", "https://example.com/v1"):
        assert Settings(url, "M").url == url.rstrip("/")
    assert Settings("http://example.com/v1", "M", insecure=True).url == "http://example.com/v1"
    assert replace(Settings("http://[::1]/v1/", "M"), key=KEY).host == "[::1]"


def test_the_key_comes_from_the_environment_or_a_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN3C_UPSTREAM_KEY", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert read_key() is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_key() is None
    (tmp_path / "upstream-key").write_text(KEY + "\n")
    assert read_key() == KEY
    monkeypatch.setenv("QWEN3C_UPSTREAM_KEY", "other")
    assert read_key() == "other"
    for wrong in (f"{KEY}\r\nx: y", f"{KEY} é", KEY * 1000):
        monkeypatch.setenv("QWEN3C_UPSTREAM_KEY", wrong)
        with pytest.raises(ValueError, match="QWEN3C_UPSTREAM_KEY: not a key") as refused:
            read_key()
        assert KEY not in str(refused.value)


def test_without_httpx2_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['httpx2'] = None\n"
        "from qwen3c.serve.upstream import Settings, Upstream\n"
        "Upstream(Settings('https://a', 'M', offline=True))\n"
        "try: Upstream(Settings('https://a', 'M'))\n"
        "except ImportError as error: print(error)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=os.environ
    )
    assert done.stdout == "an upstream needs httpx2: pip install 'qwen3c[serve]'\n", done.stderr
