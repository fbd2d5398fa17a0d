"""The MCP host: tools of other people's servers, for the page and for `-m chat`.

    read_servers       FILE, as Cursor and llama-server write it -> Config
    Host.tools         every server's state and tools; connects what is not connected
    Host.call          one call, limited in time and size
    host_routes        the same two for the page, and for nobody else

Whatever a server says is untrusted: descriptions are text with nothing in it that a screen acts on, a tool is
known by the digest of its whole definition, and a call with another digest is refused. Servers are started
with little of our environment, in a process group of their own that ends with us, however we end.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..system.terminal import visible
from .errors import ApiError
from .fields import Fields, parse_json
from .mcp import innermost, require_mcp

if TYPE_CHECKING:
    from mcp.client import Client
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

KEYS = ("type", "command", "args", "env", "cwd", "timeout_ms", "url", "headers")
TYPES = {"stdio": "command", "http": "url", "streamable-http": "url", "streamableHttp": "url"}
INHERITED = ("PATH", "HOME", "LANG")  # what a server gets of our environment
TIMEOUT = 60.0  # seconds of a call, and of a connection
LARGEST_RESULT = 16 << 10  # bytes of a result that the model reads
LARGEST_MESSAGE = 8 << 20  # bytes of a message of a server; a longer one ends the connection
LARGEST_DEFINITION = 64 << 10  # bytes of a tool's definition
LONGEST_DESCRIPTION = 2000  # characters
LONGEST_NAME = 64  # characters: what other programs that take tools allow
MOST_TOOLS = 256  # of a server
MOST_PAGES = 32
PATIENCE = 2.0  # seconds that a server has to end after its stdin, and again after SIGTERM
TAIL = 2000  # bytes of a server's stderr that are remembered
# Runs a server and waits for it. When its own parent dies, the kernel tells it, and the whole group dies with
# it.
SUPERVISOR = """\
import ctypes, os, signal, sys
def end(*_):
    os.killpg(0, signal.SIGKILL)
signal.signal(signal.SIGUSR1, end)
ctypes.CDLL(None).prctl(1, signal.SIGUSR1)
if os.getppid() != int(sys.argv[1]):
    end()
signal.signal(signal.SIGTERM, lambda *_: None)
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
os.close(0)
os.close(1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
"""


# ----------------------------------------------------------------------------
# Untrusted text


def described(text: str) -> str:
    """A description as it is shown and told to a model: visible, and not for ever."""
    text = visible(text)
    return text if len(text) <= LONGEST_DESCRIPTION else text[: LONGEST_DESCRIPTION - 1] + "…"


def _clean(schema: Any) -> Any:
    """A schema whose titles and descriptions are cleaned; what a call must match to the letter stays."""
    if isinstance(schema, dict):
        return {
            key: described(value) if key in ("title", "description", "$comment") and isinstance(value, str)
            else _clean(value)
            for key, value in schema.items()
        }  # fmt: skip
    return [_clean(value) for value in schema] if isinstance(schema, list) else schema


def cut(text: str) -> tuple[str, bool]:
    """(at most LARGEST_RESULT bytes of `text`, with a note where it was cut, whether it was)."""
    data = text.encode("utf-8", "replace")
    if len(data) <= LARGEST_RESULT:
        return data.decode(), False
    kept = data[:LARGEST_RESULT].decode("utf-8", "ignore")
    return f"{kept}\n[cut: the first {LARGEST_RESULT} of {len(data)} bytes]", True


def text_of(content: Sequence[Any], structured: Any = None) -> str:
    """The text of a result: its text parts; of other parts that they were left out."""
    parts = []
    for part in content:
        if part.type == "text":
            parts.append(part.text)
        elif part.type in ("image", "audio"):
            size = len(base64.b64decode(part.data, validate=False)) if len(part.data) < LARGEST_MESSAGE else 0
            parts.append(f"[{part.type} left out: {visible(part.mime_type)}, {size} bytes]")
        else:
            uri = getattr(part, "uri", None) or getattr(getattr(part, "resource", None), "uri", "")
            parts.append(f"[{part.type} left out: {visible(str(uri))[:200]}]")
    if not parts and structured is not None:
        parts.append(json.dumps(structured, ensure_ascii=False))
    return "\n".join(parts)


# ----------------------------------------------------------------------------
# FILE


@dataclass(frozen=True, repr=False)
class Config:
    """A server as FILE has it: a command, or a URL. It has no repr: env and headers may hold secrets.

    timeout: seconds of a call.
    """

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = TIMEOUT


def read_servers(path: str) -> list[Config]:
    """The servers that a file names under mcpServers. ValueError names the file, the server and the field."""
    with open(path, "rb") as file:
        body = file.read()
    try:
        top = Fields(parse_json(body))
        servers = top.object("mcpServers")
        if servers is None:
            raise ValueError("mcpServers is missing")
        found = [_config(name, servers) for name in top.raw("mcpServers")]
        _refuse_others(top.finish(), ("mcpServers",), "")
    except (ApiError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    names = [sanitised(config.name) for config in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{path}: mcpServers: two servers are called {name} where their tools are named")
    return found


def _config(name: str, servers: Fields) -> Config:
    where = f"mcpServers.{visible(name)[:LONGEST_NAME]}"
    raw = servers.raw(name)
    server = Fields(raw, where)
    if not name:
        raise ValueError("a server of mcpServers has no name")
    _refuse_others(raw, KEYS, where)
    command, url = server.text("command"), server.text("url")
    if (command is None) == (url is None):
        raise ValueError(f"{where} needs either command or url")
    kind = server.text("type", choices=tuple(TYPES))
    if kind is not None and (TYPES[kind] == "command") != (command is not None):
        raise ValueError(f"{where}.type is {kind}, which has a {TYPES[kind]}")
    for other in ("args", "env", "cwd") if url is not None else ("headers",):
        if other in server:
            raise ValueError(f"{where}.{other} belongs to a server with a {'command' if url else 'url'}")
    if url is not None and urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{where}.url is neither http:// nor https://")
    timeout = server.whole("timeout_ms", 1, 3_600_000)
    return Config(
        name,
        (command, *(server.texts("args", 1000) or ())) if command is not None else (),
        _texts(server, "env"),
        server.text("cwd"),
        url,
        _texts(server, "headers"),
        TIMEOUT if timeout is None else timeout / 1000,
    )


def _refuse_others(value: Iterable[str], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            place = f"{where}.{visible(key)}" if where else visible(key)
            raise ValueError(f"{place[:200]} is no field; there are {', '.join(known)}")


def _texts(server: Fields, name: str) -> dict[str, str]:
    """An object of texts, in which ${NAME} stands for a variable of the environment."""
    values = server.raw(name) or {}
    fields = Fields(values, server.path(name))
    return {key: _expanded(fields.text(key) or "", fields.path(key)) for key in values}


def _expanded(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{where}: the environment has no variable {match[1]}")
        return os.environ[match[1]]

    return re.sub(r"\$\{(?:env:)?(\w+)\}", value, text)


def sanitised(name: str) -> str:
    """`name` as a part of the name of a function."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:LONGEST_NAME]


# ----------------------------------------------------------------------------
# One server


@dataclass(frozen=True)
class HostTool:
    """A tool of a server. name: server__tool. digest: of the whole definition, as the server sent it."""

    name: str
    server: str
    tool: str
    description: str
    input_schema: dict[str, Any]
    digest: str

    def described(self) -> dict[str, Any]:
        """As the page has it."""
        return {
            "name": self.name,
            "server": visible(self.server),
            "tool": visible(self.tool),
            "description": self.description,
            "inputSchema": self.input_schema,
            "digest": self.digest,
        }

    def function(self) -> dict[str, Any]:
        """As a chat template has it."""
        told = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": told}


class Tail:
    """The end of what a server writes to stderr: all of it is read, or the server would wait."""

    def __init__(self) -> None:
        self._kept = b""
        self.fault = ""  # of ours with the server, which says more than what it wrote

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Read to the end."""
        while piece := await stream.read(1 << 16):
            self._kept = (self._kept + piece)[-TAIL:]

    def last_line(self) -> str:
        """The last line that says something, "" if there is none."""
        if self.fault:
            return self.fault
        lines = self._kept.decode("utf-8", "replace").split("\n")
        return visible(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:200]


class Server:
    """A connection to one server, which a task of its own keeps. state: "idle",
    "connecting", "ready" or "failed".
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state = "idle"
        self.error: str | None = None
        self.tools: dict[str, HostTool] = {}
        self._client: Client | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Connect if need be and ask for the tools. It does not raise: `state` and `error` say how it
        went.
        """
        async with self._lock:
            if self._client is None:
                await self._connect()
            if self._client is None:
                return
            try:
                await asyncio.wait_for(self._list(self._client), self.config.timeout)
            except Exception as error:
                self._fail(self._reason(error))

    async def call(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The result of a call as the page has it; an answer that does not come is an error among them."""
        import mcp_types as types

        client = self._client
        if client is None:
            return _result(f"the server is not there: {self.error}", True)
        request = types.CallToolRequest(params=types.CallToolRequestParams(name=tool, arguments=arguments))
        try:
            # not call_tool, which holds a result against a schema of the server's, and that may take for ever
            answer = client.session.send_request(request, types.CallToolResult)
            result = await asyncio.wait_for(answer, self.config.timeout)
        except asyncio.TimeoutError:
            return _result(f"no answer within {self.config.timeout:g} s", True)
        except Exception as error:
            if self._ended.is_set() and self._keeper is not None:
                await asyncio.wait({self._keeper})
                return _result(self.error or "the server has ended", True)
            return _result(self._reason(error), True)
        return _result(text_of(result.content, result.structured_content), result.is_error)

    async def close(self) -> None:
        """End the connection, and the process behind it."""
        await self._end()
        self.state, self.tools = "idle", {}

    async def _end(self) -> None:
        self._ended.set()
        if self._keeper is not None:
            if self._client is None:
                self._keeper.cancel()  # it connects, and hears of nothing else
            await asyncio.wait({self._keeper})
            self._keeper = None

    async def _connect(self) -> None:
        await self._end()
        self.state, self.error = "connecting", None
        self._ended = asyncio.Event()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.ensure_future(self._keep(ready, self._ended))
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({ready, self._keeper}, timeout=self.config.timeout, return_when=first)
        finally:
            if not ready.done():
                self._keeper.cancel()
        if not ready.done() and not self._keeper.done():
            await self._end()
            self._fail(self._reason(asyncio.TimeoutError()))

    async def _keep(self, ready: asyncio.Future[None], ended: asyncio.Event) -> None:
        """Hold the connection until `ended`. A client must be left by the task that entered it."""
        tail = Tail()
        try:
            async with AsyncExitStack() as stack:
                client = await self._enter(stack, tail, ended)
                self._client, self.state = client, "ready"
                ready.set_result(None)
                await ended.wait()
                self._client = None
            fault = ""
        except Exception as error:
            fault = self._reason(error)
        finally:
            self._client = None
        if self.state != "failed":  # else somebody knows better why
            last = tail.last_line()
            self._fail(f"{'the server has ended' if not fault or last else fault}{f': {last}' * bool(last)}")

    async def _enter(self, stack: AsyncExitStack, tail: Tail, ended: asyncio.Event) -> Client:
        from mcp.client import Client
        from mcp.client.streamable_http import streamable_http_client
        from mcp_types import Implementation

        from .. import __version__

        if self.config.url is None:
            transport: Any = child(self.config, tail, ended)
        else:
            http = await stack.enter_async_context(_http_client(self.config))
            transport = streamable_http_client(
                self.config.url, http_client=http, max_sse_event_size=LARGEST_MESSAGE
            )
        ours = Implementation(name="qwen3c", version=__version__)
        client = Client(transport, cache=None, client_info=ours)
        return await stack.enter_async_context(client)

    async def _list(self, client: Client) -> None:
        definitions: list[Any] = []
        cursor = None
        for _ in range(MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            definitions += page.tools
            cursor = page.next_cursor
            if cursor is None or len(definitions) > MOST_TOOLS:
                break
        left_out = [f"more than {MOST_TOOLS} tools"] if len(definitions) > MOST_TOOLS or cursor else []
        tools: dict[str, HostTool] = {}
        for definition in definitions[:MOST_TOOLS]:
            tool, fault = self._tool(definition)
            if tool is None:
                left_out.append(fault)
            elif tool.name in tools:
                left_out.append(f"a second {tool.name}")
            else:
                tools[tool.name] = tool
        self.tools, self.state = tools, "ready"
        self.error = f"left out: {', '.join(left_out)[:500]}" if left_out else None

    def _tool(self, definition: Any) -> tuple[HostTool | None, str]:
        """The tool, or why it is left out."""
        whole = definition.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"meta"})
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        shown = visible(definition.name)[:LONGEST_NAME]
        if len(text) > LARGEST_DEFINITION:
            return None, f"{shown}, whose definition takes {len(text)} bytes"
        name = f"{sanitised(self.config.name)}__{sanitised(definition.name)}"
        if len(name) > LONGEST_NAME or not definition.name:
            return None, f"{shown}, whose name is too long or empty"
        return HostTool(
            name,
            self.config.name,
            definition.name,
            described(definition.description or ""),
            _clean(definition.input_schema),
            hashlib.sha256(text.encode()).hexdigest(),
        ), ""

    def _fail(self, error: str) -> None:
        self.state, self.error, self.tools = "failed", error, {}
        self._ended.set()
        self._client = None

    def _reason(self, error: Exception) -> str:
        """What went wrong, in one line without the values of headers."""
        text = visible(innermost(error)).replace("\n", " ")
        if isinstance(error, asyncio.TimeoutError):
            text = f"no answer within {self.config.timeout:g} s"
        for secret in (*self.config.headers.values(), *self.config.env.values()):
            text = text.replace(secret, "…") if len(secret) > 3 else text
        return text[:500]


def _result(text: str, is_error: bool) -> dict[str, Any]:
    content, truncated = cut(text)
    return {"content": content, "isError": is_error, "truncated": truncated}


# ----------------------------------------------------------------------------
# Transports


def supervised(command: Sequence[str]) -> list[str]:
    """The command that starts a server so that it ends with us, also when we are
    killed, where the system can.
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", SUPERVISOR, str(os.getpid()), *command]


@asynccontextmanager
async def child(config: Config, tail: Tail, ended: asyncio.Event) -> AsyncIterator[tuple[Any, Any]]:
    """A transport for the SDK: a server in a process group of its own. `ended` is set when it ends.

    OSError if it cannot be started.
    """
    import anyio
    from mcp.shared.message import SessionMessage

    env = {name: os.environ[name] for name in INHERITED if name in os.environ} | dict(config.env)
    program, *arguments = config.command
    found = shutil.which(program, path=env.get("PATH"))
    if found is None:
        raise FileNotFoundError(f"{program}: there is no such program")
    process = await asyncio.create_subprocess_exec(
        *supervised([os.path.abspath(found), *arguments]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
        cwd=config.cwd,
        start_new_session=True,
        limit=LARGEST_MESSAGE,
    )
    assert process.stdin and process.stdout and process.stderr
    stdin, stdout = process.stdin, process.stdout
    to_client, reading = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    writing, from_client = anyio.create_memory_object_stream[SessionMessage](0)

    async def read() -> None:
        from mcp_types import jsonrpc_message_adapter

        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with to_client:
                while line := await _line(stdout, tail):
                    with suppress(ValueError):
                        await to_client.send(SessionMessage(jsonrpc_message_adapter.validate_json(line)))
        ended.set()

    async def write() -> None:
        with suppress(OSError, anyio.ClosedResourceError):
            async for message in from_client:
                stdin.write(message.message.model_dump_json(by_alias=True, exclude_unset=True).encode())
                stdin.write(b"\n")
                await stdin.drain()

    tasks = [asyncio.ensure_future(each) for each in (read(), write(), tail.follow(process.stderr))]
    try:
        yield reading, writing
    finally:
        try:
            await _stop(process)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            for task in tasks:
                task.cancel()
            for stream in (to_client, reading, writing, from_client):
                stream.close()
            transport = getattr(process, "_transport", None)  # nothing public closes it while a pipe is open
            if transport is not None:
                transport.close()


async def _line(stream: asyncio.StreamReader, tail: Tail) -> bytes:
    """The next line; b"" at the end, and for a line that is too long, which ends the connection."""
    try:
        return await stream.readline()
    except ValueError:
        tail.fault = f"a message of more than {LARGEST_MESSAGE} bytes"
        return b""


async def _stop(process: asyncio.subprocess.Process) -> None:
    """As the protocol has it: its stdin ends, then SIGTERM; the caller kills what is left."""
    assert process.stdin
    process.stdin.close()
    for number in (signal.SIGTERM, None):
        deadline = time.monotonic() + PATIENCE
        while process.returncode is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)  # wait() would wait for the end of its pipes, too
        if process.returncode is not None:
            return
        if number is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)


@asynccontextmanager
async def _http_client(config: Config) -> AsyncIterator[Any]:
    """An HTTP client that sends the headers, and takes no body larger than a message may be."""
    import httpx2

    class Limited(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for piece in self._stream:
                size += len(piece)
                if size > LARGEST_MESSAGE:
                    raise httpx2.ReadError(f"a body of more than {LARGEST_MESSAGE} bytes")
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def limit(response: Any) -> None:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            response.stream = Limited(response.stream)

    timeout = httpx2.Timeout(min(config.timeout, 30.0), read=config.timeout)
    hooks: Any = {"response": [limit]}
    async with httpx2.AsyncClient(headers=dict(config.headers), timeout=timeout, event_hooks=hooks) as http:
        yield http


# ----------------------------------------------------------------------------
# All of them


class Host:
    """The servers of a file. ImportError, with what to install, if the SDK is missing.

    It belongs to the event loop in which it is first used, and `async with` closes it.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        require_mcp()
        self.servers = {config.name: Server(config) for config in configs}

    async def __aenter__(self) -> Host:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections, and the processes behind them."""
        await asyncio.gather(*(server.close() for server in self.servers.values()))

    async def refresh(self) -> list[HostTool]:
        """Every tool there is now: all servers are asked at once, and connected if need be."""
        await asyncio.gather(*(server.refresh() for server in self.servers.values()))
        return [tool for server in self.servers.values() for tool in server.tools.values()]

    async def tools(self) -> dict[str, Any]:
        """{"servers": their names, states and errors; "tools": theirs}, as the page has it."""
        tools = await self.refresh()
        states = [
            {"name": visible(server.config.name), "state": server.state, "error": server.error}
            for server in self.servers.values()
        ]
        return {"servers": states, "tools": [tool.described() for tool in tools]}

    async def call(self, name: str, arguments: dict[str, Any], digest: str) -> dict[str, Any]:
        """{"content": text, "isError", "truncated"} of one call.

        digest: of the definition that the person saw. ApiError 404 if there is no such tool, 409 if its
        definition is another one now; the server is asked for it before each call.
        """
        server = self._owner(name)
        await server.refresh()
        tool = server.tools.get(name)
        if tool is None and server.state == "failed":
            return _result(f"the server is not there: {server.error}", True)
        if tool is None:
            raise ApiError(
                404, f"there is no tool {visible(name)[:LONGEST_NAME]}", param="name", code="unknown_tool"
            )
        if tool.digest != digest:
            raise ApiError(409, f"the definition of {name} has changed", param="digest", code="changed")
        return await server.call(tool.tool, arguments)

    def _owner(self, name: str) -> Server:
        """The server that a tool belongs to, by its name. ApiError 404 if there is none."""
        for server in self.servers.values():
            if name in server.tools:
                return server
        for server in self.servers.values():
            if name.startswith(sanitised(server.config.name) + "__"):
                return server
        raise ApiError(
            404, f"there is no tool {visible(name)[:LONGEST_NAME]}", param="name", code="unknown_tool"
        )


# ----------------------------------------------------------------------------
# For the page


def host_routes(host: Host) -> list[BaseRoute]:
    """GET /page/tools and POST /page/tools/call, for our page: requests of other origins get 403.

    The app answers an ApiError, and a client that has left (see app.py).
    """
    from starlette.routing import Route

    from .api import json_answer
    from .streams import unless_left

    async def tools(request: Request) -> Response:
        _check_origin(request)
        return json_answer(await unless_left(request.receive, host.tools()))

    async def call(request: Request) -> Response:
        _check_origin(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be application/json")
        fields = Fields(parse_json(await request.body()))
        name, digest = fields.text("name"), fields.text("digest")
        arguments = fields.raw("arguments")
        for field_, value in (("name", name), ("digest", digest)):
            if value is None:
                raise fields.error(field_, "is missing")
        if not isinstance(arguments, dict):
            raise fields.error("arguments", "is not an object")
        fields.finish()
        work = host.call(name or "", arguments, digest or "")
        return json_answer(await unless_left(request.receive, work))

    return [
        Route("/page/tools", tools, methods=["GET"]),
        Route("/page/tools/call", call, methods=["POST"]),
    ]


def _check_origin(request: Request) -> None:
    """ApiError 403 unless a page of this very server asks: other programs have no business with these
    tools.
    """
    headers = request.headers
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None:
        ours = urlsplit(origin).netloc == headers.get("host", "") and site in (None, "same-origin")
    else:
        ours = site == "same-origin"
    if not ours:
        raise ApiError(403, "these tools are for the page of this server", code="forbidden_origin")
