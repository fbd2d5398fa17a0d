"""The MCP server: what the models here can do, as tools for other people's programs.

    chat, generate     a reply, with progress after every pass
    embed, rerank      vectors, and documents by how well they answer a query
    count_tokens       what a text or a conversation takes
    score              the log-probability of every token of a text

mcp_routes serves them at /mcp (streamable HTTP, with and without the handshake of before 2026-07-28),
cli/mcp.py over stdin and stdout. Local has the tools of the models here, Proxy those of a server that
runs elsewhere. A call ends with its request: closing the stream, or `notifications/cancelled`, frees the
engine after the pass under way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..drivers.reply import Reply
from ..drivers.retrieval import embedding_prompts, instruct, relevance, rerank_prompts, unit_vectors
from ..drivers.score import TokenScore
from .ask import Ask, KeyLimits, Progress, Stream
from .errors import ApiError
from .models import Models, Served

if TYPE_CHECKING:
    import mcp_types as types
    from mcp.client import Client as SDKClient
    from mcp.server import Server, ServerRequestContext
    from starlette.routing import BaseRoute
    from starlette.types import Message, Receive, Scope, Send

    from ..model import Model

NEEDED = "MCP needs the extra `mcp`: pip install 'qwen3c[mcp]'"
PATH = "/mcp"
LARGEST_MESSAGE = 64 << 20  # bytes of one answer of our own server that Proxy takes: vectors are long
AT_ONCE = 16  # texts that are embedded, or documents that are judged, between two reports of progress
SHOWN = 200  # characters of an error about arguments, which may quote them
GONE = "qwen3c.gone"  # in the scope of a request: an event, set when its client has closed the connection
T = TypeVar("T")


# ----------------------------------------------------------------------------
# The tools


@dataclass
class Call:
    """One call of a tool. told: the last progress, which may only grow."""

    served: Served
    arguments: dict[str, Any]
    client: Client
    report: Callable[[float, float | None, str], Awaitable[None]]
    told: float = -1

    async def progress(self, done: float, total: float | None, message: str) -> None:
        """Tell the client how far the call is, unless it knows."""
        if done > self.told:
            self.told = done
            await self.report(done, total, message)

    async def submit(self, prompts: list[list[int]], **wanted: Any) -> Stream:
        """What the engine brings of the prompts; wanted: fields of Ask."""
        ask = Ask(prompts, namespace=self.client.name, priority=self.client.priority, **wanted)
        return await self.served.submit(ask, self.client.limits)

    async def rows(self, prompts: list[list[int]], doing: str, **wanted: Any) -> list[Any]:
        """The row of each prompt (see Ask), some prompts at a time."""
        found: list[Any] = []
        for i in range(0, len(prompts), AT_ONCE):
            await self.progress(i, len(prompts), f"{doing}, {i} of {len(prompts)} done")
            some = prompts[i : i + AT_ONCE]
            ask = Ask(some, namespace=self.client.name, priority=self.client.priority, **wanted)
            found += (await self.served.rows(ask, self.client.limits))[0]
        return found


@dataclass(frozen=True)
class ToolOfOurs:
    """A tool: what it is called, takes and gives, and the function that runs it.

    run: a call -> the structured result. text: of the result, the text for those who read no structure.
    """

    name: str
    title: str
    description: str
    properties: dict[str, Any]
    required: tuple[str, ...]
    output: dict[str, Any]
    run: Callable[[Call], Awaitable[dict[str, Any]]]
    text: Callable[[dict[str, Any]], str] = lambda found: json.dumps(found, ensure_ascii=False)

    def input_schema(self, names: Sequence[str]) -> dict[str, Any]:
        """The schema of the arguments; where there are several models one may be named."""
        choice = {"type": "string", "enum": list(names), "description": "which model"}
        properties = self.properties | ({"model": choice} if len(names) > 1 else {})
        return _object(properties, self.required)


async def _chat(call: Call) -> dict[str, Any]:
    arguments, served = call.arguments, call.served
    messages, thinking = arguments["messages"], arguments.get("thinking")
    prompt = await served.work(served.model.chat_prompt, messages, thinking, None, served.context)
    return await _reply(call, prompt)


async def _generate(call: Call) -> dict[str, Any]:
    served, text = call.served, call.arguments["prompt"]
    return await _reply(call, await served.work(served.model.text_prompt, text, served.context))


async def _reply(call: Call, prompt: list[int]) -> dict[str, Any]:
    arguments, max_tokens = call.arguments, call.arguments.get("max_tokens")
    sampling: Any = {name: arguments[name] for name in _SAMPLING if name in arguments}
    stop = tuple(arguments.get("stop", ()))
    stream = await call.submit([prompt], max_tokens=max_tokens, sampling=sampling, stop=stop)
    n_prompt, n_tokens, reply = len(prompt), 0, Reply()
    total = None if max_tokens is None else n_prompt + max_tokens
    try:
        async for update in stream:
            if update.progress is not None:
                await call.progress(*_stage(update.progress, total))
            if update.event is not None:
                reply.add(update.event)
                n_tokens += update.event.token is not None
                await call.progress(n_prompt + n_tokens, total, f"writing, {n_tokens} tokens")
    finally:
        stream.cancel()
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "finish_reason": reply.finish_reason or "length",
        "prompt_tokens": n_prompt,
        "cached_tokens": stream.stats[0].cached_tokens,
        "completion_tokens": n_tokens,
    }


def _stage(progress: Progress, total: int | None) -> tuple[int, int | None, str]:
    if progress.stage == "queued":
        return 0, total, f"queued, number {progress.position}"
    return progress.processed, total, f"reading, {progress.processed} of {progress.total} tokens"


async def _embed(call: Call) -> dict[str, Any]:
    texts, instruction, model = call.arguments["texts"], call.arguments.get("instruction"), call.served.model
    if instruction is not None:
        texts = [instruct(text, instruction) for text in texts]
    prompts = await call.served.work(embedding_prompts, model, model.tokenizer, texts)
    rows = await call.rows(prompts, "embedding", vectors=True)
    vectors = unit_vectors(rows, model.config.dim)
    return {"embeddings": vectors.tolist(), "dimensions": model.config.dim}


async def _rerank(call: Call) -> dict[str, Any]:
    arguments, model = call.arguments, call.served.model
    prompts, answers = await call.served.work(
        rerank_prompts,
        model,
        model.tokenizer,
        arguments["query"],
        arguments["documents"],
        arguments.get("instruction"),
    )
    scores = relevance(await call.rows(prompts, "judging", rows=True), answers).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    best = order[: arguments.get("top_n", len(order))]
    return {"results": [{"index": i, "score": scores[i]} for i in best]}


async def _count_tokens(call: Call) -> dict[str, Any]:
    arguments, model = call.arguments, call.served.model
    if ("text" in arguments) == ("messages" in arguments):
        raise ValueError("give either text or messages")
    if "text" in arguments:
        ids = await call.served.work(model.tokenizer.encode, arguments["text"])
    else:
        ids = await call.served.work(model.chat_prompt, arguments["messages"], arguments.get("thinking"))
    return {"tokens": len(ids), "context": call.served.context}


async def _score(call: Call) -> dict[str, Any]:
    arguments, model = call.arguments, call.served.model
    before = await call.served.work(model.text_prompt, arguments.get("context", ""))
    ids = await call.served.work(model.tokenizer.encode, arguments["text"])
    top = arguments.get("top", 0)
    stream = await call.submit([[*before, *ids]], max_tokens=0, echo=top)
    scores: list[TokenScore] = []
    try:
        async for update in stream:
            if update.progress is not None:
                await call.progress(*_stage(update.progress, update.progress.total))
            scores = update.scores or scores
    finally:
        stream.cancel()
    return await call.served.work(_described_scores, model, scores[len(before) :], top)


def _described_scores(model: Model, scores: list[TokenScore], top: int) -> dict[str, Any]:
    def token(id: int, logprob: float | None) -> dict[str, Any]:
        return {"id": id, "text": model.tokenizer.decode([id]), "logprob": logprob}

    known = [score.logprob for score in scores if score.logprob is not None]
    return {
        "tokens": [
            token(score.token, score.logprob) | ({"top": [token(*each) for each in score.top]} if top else {})
            for score in scores
        ],
        "total_logprob": sum(known),
        "scored_tokens": len(known),
    }


def _object(properties: dict[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _list(items: dict[str, Any], least: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **({"minItems": least} if least else {}), **more}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}
_SAMPLING: dict[str, Any] = {
    "temperature": {"type": "number", "minimum": 0, "description": "0 always takes the most likely token"},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "seed": {"type": "integer", "minimum": 0, "description": "the same seed gives the same text"},
}
_MESSAGES = _list(
    {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["system", "user", "assistant"]},
            "content": _TEXT,
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
    1,
    description="the conversation so far, the last message last",
)
_THINKING = {"type": "boolean", "description": "whether the model may think first, if it can choose"}
_REPLYING = {
    "max_tokens": {"type": "integer", "minimum": 1, "description": "at most so many tokens"},
    "stop": _list({"type": "string", "minLength": 1}, description="texts that end the reply"),
    **_SAMPLING,
}
_REPLY = _object(
    {
        "text": _TEXT,
        "thinking": _TEXT,
        "finish_reason": {"type": "string", "enum": ["stop", "length", "cancelled"]},
        "prompt_tokens": _COUNT,
        "cached_tokens": _COUNT,
        "completion_tokens": _COUNT,
    }
)
_TOKEN = {"id": _COUNT, "text": _TEXT, "logprob": {"type": ["number", "null"]}}
_DOCUMENTS = _list(_TEXT, 1, description="what to choose from")

TOOLS = (
    ToolOfOurs(
        "chat",
        "Chat",
        "Ask the local language model: a conversation in, its reply out.",
        {"messages": _MESSAGES, "thinking": _THINKING, **_REPLYING},
        ("messages",),
        _REPLY,
        _chat,
        lambda found: str(found["text"]),
    ),
    ToolOfOurs(
        "generate",
        "Complete text",
        "How the local language model goes on from a bare text, without roles.",
        {"prompt": _TEXT, **_REPLYING, "max_tokens": {**_REPLYING["max_tokens"], "default": 256}},
        ("prompt",),
        _REPLY,
        _generate,
        lambda found: str(found["text"]),
    ),
    ToolOfOurs(
        "embed",
        "Embed texts",
        "Texts as vectors of length 1: the product of two is how alike they are.",
        {
            "texts": _list({"type": "string", "minLength": 1}, 1),
            "instruction": {
                "type": "string",
                "description": "what the texts, as queries, search for; absent for documents",
            },
        },
        ("texts",),
        _object({"embeddings": _list(_list(_NUMBER)), "dimensions": _COUNT}),
        _embed,
    ),
    ToolOfOurs(
        "rerank",
        "Rank documents",
        "Documents by how likely each meets a query, the best first.",
        {
            "query": _TEXT,
            "documents": _DOCUMENTS,
            "instruction": {"type": "string", "description": "what the search is for"},
            "top_n": {"type": "integer", "minimum": 1},
        },
        ("query", "documents"),
        _object({"results": _list(_object({"index": _COUNT, "score": _NUMBER}))}),
        _rerank,
    ),
    ToolOfOurs(
        "count_tokens",
        "Count tokens",
        "How many tokens a text or a conversation takes, and how many fit.",
        {"text": _TEXT, "messages": _MESSAGES, "thinking": _THINKING},
        (),
        _object({"tokens": _COUNT, "context": _COUNT}),
        _count_tokens,
    ),
    ToolOfOurs(
        "score",
        "Score a text",
        "The log-probability, in nats, of every token of a text under the model.",
        {
            "text": {"type": "string", "minLength": 1},
            "context": {"type": "string", "description": "what stands before the text and is not scored"},
            "top": {
                "type": "integer",
                "minimum": 0,
                "maximum": 20,
                "description": "likeliest tokens to list in each place",
            },
        },
        ("text",),
        _object(
            {
                "tokens": _list(_object(_TOKEN | {"top": _list(_object(_TOKEN))}, tuple(_TOKEN))),
                "total_logprob": _NUMBER,
                "scored_tokens": _COUNT,
            }
        ),
        _score,
    ),
)


def fault_in(arguments: Mapping[str, Any], schema: dict[str, Any]) -> str | None:
    """What is wrong with the arguments of a call, beginning with the field; None if nothing is."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(arguments))
    if error is None:
        return None
    path = error.json_path.removeprefix("$").removeprefix(".")
    text = f"{path}: {error.message}" if path else error.message
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


# ----------------------------------------------------------------------------
# The server


def require_mcp() -> None:
    """ImportError, with what to install, where the SDK is missing."""
    try:
        import mcp  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError(NEEDED) from None


class Provider(Protocol):
    """Tools and what runs them: those of a model here, or of a server elsewhere."""

    async def tools(self) -> list[types.Tool]:
        """The tools, always in the same order."""

    async def call(
        self, context: ServerRequestContext[Any, Any], name: str, arguments: dict[str, Any]
    ) -> Any:
        """The types.CallToolResult. MCPError if there is no such tool."""


class Local:
    """The tools of the models here."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._by_name = {tool.name: tool for tool in TOOLS}

    async def tools(self) -> list[types.Tool]:
        import mcp_types as types

        return [
            types.Tool(
                name=tool.name,
                title=tool.title,
                description=tool.description,
                input_schema=tool.input_schema(self._models.names),
                output_schema=tool.output,
                annotations=types.ToolAnnotations(
                    read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
                ),
            )
            for tool in TOOLS
        ]

    async def call(
        self, context: ServerRequestContext[Any, Any], name: str, arguments: dict[str, Any]
    ) -> types.CallToolResult:
        from mcp.shared.exceptions import MCPError
        from mcp_types import INVALID_PARAMS

        tool = self._by_name.get(name)
        if tool is None:
            raise MCPError(
                INVALID_PARAMS, f"unknown tool {name[:SHOWN]!r}; there are {', '.join(self._by_name)}"
            )
        fault = fault_in(arguments, tool.input_schema(self._models.names))
        if fault:
            return failed(fault)
        try:
            return await self._run(tool, context, arguments)
        except (ApiError, ValueError, MemoryError) as error:
            return failed(" ".join(str(error).split()) or type(error).__name__)

    async def _run(
        self, tool: ToolOfOurs, context: ServerRequestContext[Any, Any], arguments: dict[str, Any]
    ) -> types.CallToolResult:
        import mcp_types as types

        served = await self._models.get(arguments.get("model"))
        defaults = {name: each["default"] for name, each in tool.properties.items() if "default" in each}
        client = _client(context.request)
        call = Call(served, defaults | arguments, client, context.session.report_progress)
        found = await while_connected(context.request, tool.run(call))
        if found is None:
            return failed("cancelled")
        text = types.TextContent(type="text", text=await served.work(tool.text, found))
        return types.CallToolResult(content=[text], structured_content=found)


@dataclass(frozen=True)
class Client:
    """Who asks. name: of the key, a namespace of the prefix cache."""

    name: str = ""
    priority: int = 0
    limits: KeyLimits = field(default_factory=KeyLimits)


def _client(request: Any) -> Client:
    """Who asks, as the guard has found; nobody in particular over stdio (None)."""
    key = None if request is None else getattr(request.state, "key", None)
    return Client() if key is None else Client(key.name, max(key.priority, 0), key.limits)


def failed(text: str) -> types.CallToolResult:
    """The result of a call that failed; the model that called reads `text`."""
    import mcp_types as types

    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=True)


async def while_connected(request: Any, work: Awaitable[T]) -> T | None:
    """What `work` comes to; None, and it is cancelled, once the client of an HTTP request is gone.

    The SDK cancels calls itself where the protocol says so. Before 2026-07-28 it does not, and the result of
    a call whose stream is closed reaches nobody.
    """
    gone: asyncio.Event | None = request.scope.get(GONE) if request is not None else None
    if gone is None:
        return await work
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        waiting.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


def new_server(provider: Provider) -> Server[Any]:
    """A server of these tools, for any transport. ImportError if the SDK is missing."""
    require_mcp()
    import mcp_types as types
    from mcp.server import Server
    from mcp.server.caching import CacheHint

    from .. import __version__

    async def list_tools(context: Any, params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=await provider.tools())

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        return await provider.call(context, params.name, params.arguments or {})

    return Server(
        "qwen3c",
        version=__version__,
        title="qwen3c",
        instructions="A language model on this computer: it chats, completes, embeds, ranks and scores.",
        cache_hints={"tools/list": CacheHint(ttl_ms=60_000), "server/discover": CacheHint(ttl_ms=60_000)},
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def mcp_routes(
    models: Models, *, hosts: Sequence[str] | None, origins: Sequence[str] = ()
) -> tuple[list[BaseRoute], Callable[[], AbstractAsyncContextManager[None]]]:
    """The routes of /mcp, and the context manager that the app's lifespan has to enter around serving.

    hosts, origins: which Host and Origin headers are answered, such as "127.0.0.1:8080" and
    "http://127.0.0.1:8080"; ":*" at the end is any port; without hosts the app has to check them itself. Who
    asks is the `key` in the state of the request, if the guard has put one there.
    """
    return routes_of(Local(models), hosts, origins)


def routes_of(
    provider: Provider, hosts: Sequence[str] | None, origins: Sequence[str] = ()
) -> tuple[list[BaseRoute], Callable[[], AbstractAsyncContextManager[None]]]:
    """The routes of /mcp for any tools; see mcp_routes."""
    server = new_server(provider)
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from mcp.server.transport_security import TransportSecuritySettings
    from starlette.routing import Route

    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=hosts is not None,
        allowed_hosts=list(hosts or ()),
        allowed_origins=list(origins),
    )
    manager = StreamableHTTPSessionManager(server, security_settings=security)
    return [Route(PATH, endpoint=_Endpoint(manager.handle_request))], manager.run


class _Endpoint:
    """An ASGI app that leaves an event in the scope of each request, set when its client has gone."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.Event()

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                gone.set()
            return message

        await self._app({**scope, GONE: gone}, heard, send)


# ----------------------------------------------------------------------------
# The tools of a server that runs elsewhere


def innermost(error: BaseException) -> str:
    """What went wrong, in one line: of errors that task groups wrap, the first."""
    while (inner := getattr(error, "exceptions", None)) is not None:
        error = inner[0]
    text = " ".join(str(error).split())
    return text or type(error).__name__


class Proxy:
    """The tools of the server at `url`, called there with progress and cancel. Use `new_proxy`."""

    def __init__(self, client: SDKClient) -> None:
        self._client = client

    async def tools(self) -> list[types.Tool]:
        return list((await self._client.list_tools(cache_mode="bypass")).tools)

    async def call(
        self, context: ServerRequestContext[Any, Any], name: str, arguments: dict[str, Any]
    ) -> types.CallToolResult:
        import mcp_types as types

        async def report(progress: float, total: float | None, message: str | None) -> None:
            await context.session.report_progress(progress, total, message)

        request = types.CallToolRequest(params=types.CallToolRequestParams(name=name, arguments=arguments))
        return await self._client.session.send_request(
            request, types.CallToolResult, progress_callback=report
        )


@asynccontextmanager
async def new_proxy(url: str, key: str | None = None) -> AsyncIterator[Proxy]:
    """A Proxy of the server at `url`, such as http://127.0.0.1:8080. key: its API key.

    ValueError, in one line, if nothing there answers.
    """
    require_mcp()
    import httpx2
    from mcp.client import Client
    from mcp.client.streamable_http import streamable_http_client

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx2.Timeout(10.0, read=None)  # a long prompt is read in silence
    async with httpx2.AsyncClient(headers=headers, timeout=timeout) as http:
        address = url.rstrip("/").removesuffix(PATH) + PATH
        transport = streamable_http_client(address, http_client=http, max_sse_event_size=LARGEST_MESSAGE)
        client = Client(transport, cache=None)
        try:
            await client.__aenter__()
        except Exception as error:
            raise ValueError(f"{address}: {innermost(error)}") from error
        try:
            yield Proxy(client)
        finally:
            await client.__aexit__(None, None, None)
