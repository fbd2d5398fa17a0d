"""A server with the HTTP contract of the real one, whose replies are scripts: what
the tests of the page talk to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qwen3c.serve.page import page

MODEL = "qwen3-0.6b"
Step = (
    dict[str, Any] | float | threading.Event | str
)  # a chunk, a pause in s, a wait, or "cut": close without an end
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class Reply:
    """One scripted answer: its steps, or an error instead of them."""

    steps: Sequence[Step] = ()
    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)


def chunk(**fields: Any) -> dict[str, Any]:
    """A chat.completion.chunk; `delta` and `finish_reason` go into its one choice."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1764000000, "model": MODEL}
    if "delta" in fields or "finish_reason" in fields:
        choice = {
            "index": 0,
            "delta": fields.pop("delta", {}),
            "logprobs": None,
            "finish_reason": fields.pop("finish_reason", None),
        }
        return {**base, "choices": [choice], **fields}
    return {**base, "choices": [], **fields}


def reading(stage: str, position: int = 0, total: int = 100, processed: int = 0) -> dict[str, Any]:
    progress = {
        "total": total,
        "cache": 0,
        "processed": processed,
        "time_ms": 1.0,
        "stage": stage,
        "position": position,
    }
    return chunk(prompt_progress=progress)


def usage(prompt: int = 40, cached: int = 24, completion: int = 12, speed: float = 31.4) -> dict[str, Any]:
    return chunk(
        usage={
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        timings={
            "cache_n": cached,
            "prompt_n": prompt - cached,
            "prompt_ms": 20.0,
            "prompt_per_second": 800.0,
            "predicted_n": completion,
            "predicted_ms": 1000 * completion / speed,
            "predicted_per_second": speed,
        },
    )


def text(
    content: str, *, thinking: str = "", size: int = 7, finish: str = "stop", **figures: Any
) -> list[Step]:
    """The steps of a whole reply: thinking, content in pieces of `size` characters, the end and the usage."""
    steps: list[Step] = [chunk(delta={"role": "assistant", "content": ""})]
    for name, whole in (("reasoning_content", thinking), ("content", content)):
        steps += [chunk(delta={name: whole[i : i + size]}) for i in range(0, len(whole), size)]
    return [*steps, chunk(finish_reason=finish), usage(**figures)]


def calls(*wanted: tuple[str, str, str]) -> list[Step]:
    """The steps of a reply that calls tools: (id, name, arguments)."""
    steps: list[Step] = [chunk(delta={"role": "assistant", "content": ""})]
    for i, (id, name, arguments) in enumerate(wanted):
        call = {"index": i, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        steps.append(chunk(delta={"tool_calls": [call]}))
    return [*steps, chunk(finish_reason="tool_calls"), usage()]


def tool(name: str, description: str = "", digest: str = "d1") -> dict[str, Any]:
    server, _, own = name.partition("__")
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    return {
        "name": name,
        "server": server,
        "tool": own,
        "description": description,
        "inputSchema": schema,
        "digest": digest,
    }


class Stub:
    """The server's state, which tests set and read; it is served from a thread by `serving`."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.replies: list[Reply] = []
        self.asked: list[dict[str, Any]] = []  # bodies of chat requests
        self.headers: list[dict[str, str]] = []
        self.left: list[int] = []  # of which request the client went away before the end
        self.models = [MODEL]
        self.props: dict[str, Any] = {"thinking": "hybrid", "upstream": None}
        self.key = ""
        self.tools: list[dict[str, Any]] = []
        self.called: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {"content": "42 files", "isError": False, "truncated": False}

    def script(self, *steps: Step, **fields: Any) -> None:
        self.replies.append(Reply(steps, **fields))

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", page),
                Route("/props", self._guarded(self._props)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/page/tools", self._guarded(self._tools)),
                Route("/page/tools/call", self._guarded(self._call), methods=["POST"]),
            ]
        )

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, "this server wants an API key", "invalid_api_key")
            return await endpoint(request)

        return checked

    async def _props(self, request: Request) -> Response:
        params = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
        settings = {"n_ctx": 40960, "params": params}
        fixed = {"model_alias": MODEL, "model_path": None, "n_ctx": 40960, "total_slots": 64, "mcp": False}
        modalities = {"vision": False, "audio": False}
        return JSONResponse(
            {**fixed, "default_generation_settings": settings, "modalities": modalities, **self.props}
        )

    async def _models(self, request: Request) -> Response:
        models = [
            {
                "id": name,
                "object": "model",
                "created": 1764000000,
                "owned_by": "qwen3c",
                "context_length": 40960,
            }
            for name in self.models
        ]
        return JSONResponse({"object": "list", "data": models})

    async def _tools(self, request: Request) -> Response:
        servers = [
            {"name": name, "state": "ready", "error": None} for name in {t["server"] for t in self.tools}
        ]
        return JSONResponse({"servers": servers, "tools": self.tools})

    async def _call(self, request: Request) -> Response:
        asked = await request.json()
        found = next((t for t in self.tools if t["name"] == asked["name"]), None)
        if found is None or found["digest"] != asked["digest"]:
            return _error(409, "the definition of this tool changed", "tool_changed")
        self.called.append(asked)
        return JSONResponse(self.result)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        number = len(self.asked)
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        reply = self.replies.pop(0) if self.replies else Reply(text("Nothing was scripted."))
        headers = {"x-request-id": f"r{number}", "x-qwen3c-backend": "local", **reply.headers}
        if reply.error is not None:
            return JSONResponse({"error": reply.error}, reply.status, headers)
        return StreamingResponse(
            self._stream(number, reply.steps), media_type="text/event-stream", headers=headers
        )

    async def _stream(self, number: int, steps: Sequence[Step]) -> AsyncIterator[bytes]:
        try:
            yield b": ping\n\n"
            for step in steps:
                if isinstance(step, dict):
                    yield f"data: {json.dumps(step, ensure_ascii=False)}\n\n".encode()
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.005)
                else:
                    return
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(number)
            raise


def _error(status: int, message: str, code: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The stub on a free port of loopback, in a thread, until the block ends."""
    config = uvicorn.Config(stub.app(), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield stub
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(5)
