"""Requests without a connection: lines in the format of OpenAI's Batch API, answered in this process.

    line -> Item -> the endpoint of a surface -> its status and body -> answer: a line again

The endpoints are those of the server, so what a body may hold is read in one place. An answer follows from
its request and the model alone, whatever ran beside or before it: its ids and, where the request has none,
its seed follow from the custom_id; `created` is 0; what tells of the run (timings, tokens found in the cache)
is left out. So a batch that was cut short and goes on ends in the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from ..system.terminal import escaped
from .api import Api
from .errors import ApiError, server_error
from .fields import Fields, parse_json
from .streams import dump
from .surfaces import chat, completions, embeddings

SURFACES = (chat, completions, embeddings)
SEEDED = ("/v1/chat/completions", "/v1/completions")  # whose replies are drawn
SEED_BYTES = 6  # what every JSON reader holds exactly
PASS_SECONDS = 2.0  # of a pass: nobody waits for the next token of a reply, an interrupt waits for the pass
AHEAD = 16  # requests beyond those that run, made ready meanwhile
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Item:
    """A request of a batch. number: of its line, from 1. custom_id: the answer's, one of its own.

    body: any JSON value; what is wrong with it, its answer says.
    """

    number: int
    custom_id: str
    method: str
    url: str
    body: Any

    @property
    def digest(self) -> bytes:
        """What ids and seed are made of."""
        return hashlib.sha256(self.custom_id.encode()).digest()

    @property
    def beginning(self) -> str:
        """What of the prompt comes first, as text: requests with near ones have much of their prompts in
        common.
        """
        body = self.body if isinstance(self.body, dict) else {}
        return json.dumps([self.url, *map(body.get, ("tools", "messages", "prompt", "input"))])


def read_items(lines: Iterable[bytes]) -> list[Item]:
    """The requests of a batch; empty lines are none. ValueError, with its number, for a line that cannot be
    answered: no JSON object, or without a custom_id of its own.
    """
    items: dict[str, Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = _item(number, parse_json(line))
        except ApiError as error:
            raise ValueError(f"line {number}: {error.message.replace('the body', 'it')}") from None
        before = items.setdefault(item.custom_id, item)
        if before is not item:
            raise ValueError(f"line {number}: custom_id {item.custom_id!r} is that of line {before.number}")
    return list(items.values())


def _item(number: int, value: Any) -> Item:
    body = value.pop("body", None) if isinstance(value, dict) else None  # what is wrong in it ends no batch
    fields = Fields(value)
    custom_id = fields.text("custom_id")
    if not custom_id:
        raise fields.error("custom_id", "is missing")
    method, url = fields.text("method", "POST"), fields.text("url", "")
    fields.finish()
    return Item(number, custom_id, str(method), str(url), body)


# ----------------------------------------------------------------------------
# Answers


@dataclass(frozen=True)
class Answer:
    """The answer to an item: its status and the whole line, with its newline."""

    custom_id: str
    status: int
    line: bytes


class EngineFailedError(RuntimeError):
    """The engine could not go on: what it left unanswered may have an answer another time."""


async def answered(api: Api, items: Sequence[Item], running: int) -> AsyncGenerator[Answer, None]:
    """The answers as they come.

    running: sequences at once; some more are made ready meanwhile. Requests whose prompts begin alike run
    beside and after each other, where the scheduler finds in its cache what they have in common.
    EngineFailedError if the engine fails.
    """
    endpoints: dict[str, Endpoint] = {
        route.path: route.endpoint for surface in SURFACES for route in surface.routes(api)
    }
    waiting = iter(sorted(items, key=lambda item: item.beginning))
    tasks: set[asyncio.Task[Answer]] = set()
    try:
        while True:
            following = islice(waiting, running + AHEAD - len(tasks))
            tasks |= {asyncio.create_task(_answered(endpoints, item)) for item in following}
            if not tasks:
                return
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answered(endpoints: dict[str, Endpoint], item: Item) -> Answer:
    id = item.digest.hex()[:24]
    try:
        status, body = await _ask(endpoints, item, id)
    except ApiError as error:
        if error.code == "engine_failed" or error.status == 503:
            raise EngineFailedError(f"line {item.number}: {error.message}") from None
        status, body = error.status, error.openai()
    except Exception as error:
        failed = server_error(f"the server failed ({type(error).__name__})")
        status, body = failed.status, failed.openai()
    response = {"status_code": status, "request_id": id, "body": body}
    answer = {"id": f"batch_req_{id}", "custom_id": item.custom_id, "response": response, "error": None}
    line = escaped(dump(answer))  # the same JSON, and nothing a terminal acts on
    return Answer(item.custom_id, status, line.encode() + b"\n")


async def _ask(endpoints: dict[str, Endpoint], item: Item, id: str) -> tuple[int, Any]:
    """The status and the body of the answer. ApiError if the request is refused."""
    endpoint = endpoints.get(item.url)
    if endpoint is None:
        raise ApiError(
            404, f"url = {item.url!r} is none of {', '.join(endpoints)}", param="url", code="not_found"
        )
    if item.method != "POST":
        raise ApiError(
            405, f"method = {item.method!r} is not POST", param="method", code="method_not_allowed"
        )
    body = item.body
    if isinstance(body, dict):
        if body.get("stream") is True:
            raise ApiError(400, "stream is not supported: the answers of a batch are whole", param="stream")
        if item.url in SEEDED and body.get("seed") is None:
            body = body | {"seed": int.from_bytes(item.digest[:SEED_BYTES], "big")}
    scope = {"type": "http", "method": "POST", "path": item.url, "headers": [], "state": {"request_id": id}}
    response = await endpoint(Request(scope, _receiving(json.dumps(body).encode())))
    return response.status_code, lasting(json.loads(bytes(response.body)))


def _receiving(body: bytes) -> Callable[[], Awaitable[Message]]:
    """What a request receives: its body, and then nothing, for nobody leaves."""
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> Message:
        message = next(messages, None)
        return message if message is not None else await asyncio.get_running_loop().create_future()

    return receive


def lasting(body: dict[str, Any]) -> dict[str, Any]:
    """The body of an answer without what tells of the run it came from."""
    kept = {name: value for name, value in body.items() if name != "timings"}
    if "created" in kept:
        kept["created"] = 0
    kept["usage"] = {k: v for k, v in body["usage"].items() if k != "prompt_tokens_details"}
    return kept
