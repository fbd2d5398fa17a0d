"""What MCP's conformance suite talks to: our server with the tools that the suite
calls, and our host as a client.

python tests/serve/mcp_fixtures.py server PORT     serves on 127.0.0.1:PORT
python tests/serve/mcp_fixtures.py ours PORT       the same, with our own tools and the model in the box
python tests/serve/mcp_fixtures.py client URL      lists and calls the tools of the server at URL
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import mcp_types as types
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from qwen3c.model import Model
from qwen3c.serve.host import Config, Host
from qwen3c.serve.mcp import Local, Provider, failed, routes_of
from qwen3c.serve.models import Models
from qwen3c.system.files import MODEL_IN_THE_BOX

if TYPE_CHECKING:
    from mcp.server import ServerRequestContext

IN_A_HEADER = {"type": "object", "properties": {"region": {"type": "string", "x-mcp-header": "Region"}}}
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
SOUND = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAA="
SCHEMA_2020 = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}


def _resource(uri: str, mime_type: str, text: str) -> types.EmbeddedResource:
    contents = types.TextResourceContents(uri=uri, mime_type=mime_type, text=text)
    return types.EmbeddedResource(type="resource", resource=contents)


_IMAGE = types.ImageContent(type="image", data=PICTURE, mime_type="image/png")
RESULTS: dict[str, list[Any]] = {
    "test_simple_text": [types.TextContent(type="text", text="This is a simple text response for testing.")],
    "test_image_content": [_IMAGE],
    "test_audio_content": [types.AudioContent(type="audio", data=SOUND, mime_type="audio/wav")],
    "test_embedded_resource": [
        _resource("test://embedded-resource", "text/plain", "This is an embedded resource content.")
    ],
    "test_multiple_content_types": [
        types.TextContent(type="text", text="Multiple content types test:"),
        _IMAGE,
        _resource("test://mixed-content-resource", "application/json", '{"test": "data", "value": 123}'),
    ],
    "test_tool_with_progress": [types.TextContent(type="text", text="done")],
    "test_region": [types.TextContent(type="text", text="taken")],
    "json_schema_2020_12_tool": [types.TextContent(type="text", text="taken")],
}


class Fixtures:
    """The tools that the suite calls, as a Provider."""

    async def tools(self) -> list[types.Tool]:
        schemas: dict[str, Any] = {"json_schema_2020_12_tool": SCHEMA_2020, "test_region": IN_A_HEADER}
        return [
            types.Tool(
                name=name, description="of the suite", input_schema=schemas.get(name, {"type": "object"})
            )
            for name in [*RESULTS, "test_error_handling"]
        ]

    async def call(
        self, context: ServerRequestContext[Any, Any], name: str, arguments: dict[str, Any]
    ) -> Any:
        if name == "test_tool_with_progress":
            for done in (0, 50, 100):
                await context.session.report_progress(done, 100, f"step {done} of 100")
                await asyncio.sleep(0.05)
        if name == "test_error_handling":
            return failed("This tool intentionally returns an error for testing")
        return types.CallToolResult(content=RESULTS[name])


def app(provider: Provider, hosts: list[str] | None = None) -> Starlette:
    """Our routes of /mcp alone."""
    names = hosts or ["127.0.0.1:*", "localhost:*"]
    routes, running = routes_of(provider, names, [f"http://{name}" for name in names])

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with running():
            yield

    return Starlette(routes=routes, lifespan=lifespan)


class _Server(uvicorn.Server):
    """A server that leaves signals alone: it runs inside a test."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(application: ASGIApp, port: int = 0) -> AsyncIterator[str]:
    """Within, an app is served on 127.0.0.1; its URL."""
    config = uvicorn.Config(application, port=port, log_level="error", timeout_graceful_shutdown=1)
    server = _Server(config)
    running = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


def box_models() -> Models:
    """The model in the box, on one thread."""
    opener: Callable[[], Model] = lambda: Model(MODEL_IN_THE_BOX, threads=1)  # noqa: E731
    return Models({"box": opener})


async def main(what: str, argument: str) -> None:
    if what == "client":
        await be_client(argument)
        return
    async with contextlib.AsyncExitStack() as stack:
        provider: Provider = Fixtures()
        if what == "ours":
            provider = Local(await stack.enter_async_context(box_models().open()))
        await stack.enter_async_context(serving(app(provider), int(argument)))
        await asyncio.Event().wait()


async def be_client(url: str) -> None:
    """List the tools at `url` and call each, as the suite expects of a client in all its scenarios."""
    context = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT", "{}"))
    given = {call["name"]: call["arguments"] for call in context.get("toolCalls", ())}
    async with Host([Config("suite", url=url, timeout=20)]) as host:
        found = await host.tools()
        print(found["servers"], [tool["tool"] for tool in found["tools"]], file=sys.stderr)
        if os.environ.get("MCP_CONFORMANCE_SCENARIO") == "initialize":
            return
        schemas = {tool["tool"]: tool["inputSchema"] for tool in found["tools"]}
        given["json_schema_echo"] = {"schema": schemas.get("json_schema_2020_12_tool")}
        for tool in found["tools"]:
            print(
                await host.call(tool["name"], given.get(tool["tool"], {"a": 5, "b": 3}), tool["digest"]),
                file=sys.stderr,
            )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
