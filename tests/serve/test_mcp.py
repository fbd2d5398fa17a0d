"""The MCP server over real sockets and pipes, spoken to by the official client in both eras of the protocol.

python -m pytest tests/serve/test_mcp.py
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import mcp_types as types
import numpy as np
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_fixtures import app, box_models, serving
from numpy.typing import NDArray
from small_models import export_small_model

from qwen3c import Model
from qwen3c.serve.mcp import Call, Client as Client_, Local, fault_in, new_proxy, new_server, routes_of
from qwen3c.serve.models import Models
from qwen3c.system.files import MODEL_IN_THE_BOX

ERAS = ("legacy", "2026-07-28")
NAMES = ["chat", "generate", "embed", "rerank", "count_tokens", "score"]
HELLO = [{"role": "user", "content": "hello"}]
LONG = {"prompt": "abc", "max_tokens": 3000, "temperature": 0}  # with endless_models
FEW = 500  # passes of some 3,000


@pytest.fixture(scope="module")
def box() -> Model:
    return Model(MODEL_IN_THE_BOX, threads=1)


@asynccontextmanager
async def served(models: Models) -> AsyncIterator[tuple[str, Models]]:
    async with models.open(), serving(app(Local(models))) as url:
        yield f"{url}/mcp", models


@pytest.fixture(scope="module")
def endless_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Models]:
    """A model with random weights, which repeats itself and does not end a reply."""
    path = export_small_model(tmp_path_factory.mktemp("endless"), context=4096)
    assert Model(path, threads=1).complete("abc", 3000, temperature=0).finish_reason == "length"
    return lambda: Models({"endless": lambda: Model(path, threads=1)})


def with_models(models: Models, check: Callable[[str, Models], Awaitable[None]]) -> None:
    async def run() -> None:
        async with served(models) as (url, _):
            await check(url, models)

    asyncio.run(run())


def with_box(check: Callable[[str, Models], Awaitable[None]]) -> None:
    with_models(box_models(), check)


async def passes_until_idle(models: Models) -> int:
    """How many passes the engine makes from now until it has nothing to do."""
    scheduler = (await models.get()).scheduler
    before = scheduler.counters.passes
    while scheduler.n_running or scheduler.n_waiting:
        await asyncio.sleep(0.001)
    return scheduler.counters.passes - before


async def until_begun(models: Models, tokens: int = 3) -> None:
    counters = (await models.get()).scheduler.counters
    while counters.generated_tokens < tokens:
        await asyncio.sleep(0.001)


def text_of(result: types.CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    return content.text


# ----------------------------------------------------------------------------
# Tools


@pytest.mark.parametrize("era", ERAS)
def test_the_tools_come_in_one_order_and_say_what_they_take_and_give(era: str) -> None:
    async def check(url: str, models: Models) -> None:
        async with Client(url, mode=era) as client:
            tools = (await client.list_tools()).tools
            assert [tool.name for tool in tools] == NAMES
            for tool in tools:
                assert tool.annotations and tool.annotations.read_only_hint
                assert tool.output_schema and tool.input_schema["additionalProperties"] is False
                assert "model" not in tool.input_schema["properties"]  # there is but one

    with_box(check)


@pytest.mark.parametrize("era", ERAS)
def test_a_tool_gives_what_the_model_gives(era: str, box: Model) -> None:
    greedy = {"max_tokens": 9, "temperature": 0}

    async def check(url: str, models: Models) -> None:
        async with Client(url, mode=era) as client:

            async def call(name: str, **arguments: Any) -> Any:
                result = await client.call_tool(name, arguments)
                assert not result.is_error, text_of(result)
                return result.structured_content

            found = await call("chat", messages=HELLO, **greedy)
            reply = box.chat(HELLO, max_tokens=9, temperature=0)
            assert found["text"] == reply.text and found["finish_reason"] == reply.finish_reason
            assert found["prompt_tokens"] == len(box.chat_prompt(HELLO))
            found = await call("generate", prompt="def add(", seed=7, max_tokens=9, stop=["\n"])
            assert found["text"] == box.complete("def add(", 9, seed=7, stop=["\n"]).text
            again = await call("generate", prompt="def add(", seed=7, max_tokens=9, stop=["\n"])
            assert again["text"] == found["text"] and again["cached_tokens"] > 0
            texts = [f"text {i}" for i in range(20)]  # more than are embedded at once
            assert (await call("embed", texts=texts))["embeddings"] == box.embed(texts).tolist()
            assert (await call("count_tokens", text="hello"))["tokens"] == len(box.tokenizer.encode("hello"))
            counted = await call("count_tokens", messages=HELLO)
            assert counted["tokens"] == len(box.chat_prompt(HELLO)) and counted["context"] >= 512

    with_box(check)


def test_score_gives_the_log_probability_of_each_token_after_its_context(box: Model) -> None:
    async def check(url: str, models: Models) -> None:
        async with Client(url) as client:
            arguments = {"text": " hello world", "context": "def f():", "top": 2}
            found = (await client.call_tool("score", arguments)).structured_content
            before, ids = box.text_prompt("def f():"), box.tokenizer.encode(" hello world")
            rows = box.session().forward([*before, *ids], logits="all")[:, : box.config.n_tokens]
            assert [token["id"] for token in found["tokens"]] == ids
            for i, token in enumerate(found["tokens"]):
                row = rows[len(before) + i - 1].astype("float64")
                expected = row[ids[i]] - float(_log_sum_exp(row))
                assert token["logprob"] == pytest.approx(expected, abs=1e-5)
                assert len(token["top"]) == 2 and token["top"][0]["id"] == int(row.argmax())
            assert found["scored_tokens"] == len(ids)
            assert found["total_logprob"] == pytest.approx(sum(t["logprob"] for t in found["tokens"]))

    with_box(check)


def _log_sum_exp(row: NDArray[np.float32]) -> float:
    return float(np.log(np.exp(row - row.max()).sum()) + row.max())


def test_rerank_orders_documents_as_the_model_does(tmp_path: Path) -> None:
    import test_retrieval

    from qwen3c.convert.export import export

    source = test_retrieval.write_source(tmp_path / "source", context=1024, dtype="F32")
    export(source, tmp_path / "model.bin")
    model = Model(tmp_path / "model.bin", threads=1)
    documents = [f"document {i}" for i in range(18)]
    scores = model.rerank("which?", documents).tolist()

    async def run() -> None:
        async with served(Models({"ranker": lambda: model})) as (url, _), Client(url) as client:
            arguments = {"query": "which?", "documents": documents, "top_n": 4}
            found = (await client.call_tool("rerank", arguments)).structured_content["results"]
            assert [each["score"] for each in found] == sorted(scores, reverse=True)[:4]
            assert all(scores[each["index"]] == each["score"] for each in found)

    asyncio.run(run())


def test_several_models_are_chosen_by_name(tmp_path: Path) -> None:
    path = export_small_model(tmp_path)

    async def run() -> None:
        models = Models(
            {"box": lambda: Model(MODEL_IN_THE_BOX, threads=1), "small": lambda: Model(path, threads=1)}
        )
        async with served(models) as (url, _), Client(url) as client:
            schema = (await client.list_tools()).tools[0].input_schema
            assert schema["properties"]["model"]["enum"] == ["box", "small"]
            contexts = [
                (await client.call_tool("count_tokens", {"text": "a", **choice})).structured_content[
                    "context"
                ]
                for choice in ({}, {"model": "box"}, {"model": "small"})
            ]
            assert contexts[0] == contexts[1] != contexts[2] == 256
            refused = await client.call_tool("count_tokens", {"text": "a", "model": "other"})
            assert refused.is_error and text_of(refused).startswith("model: ")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("generate", {}, "'prompt' is a required property"),
        ("generate", {"prompt": 5}, "prompt: 5 is not of type 'string'"),
        ("generate", {"prompt": "a", "max_tokens": 0}, "max_tokens: 0 is less than the minimum of 1"),
        ("generate", {"prompt": "a", "max_tokens": True}, "max_tokens: True is not of type 'integer'"),
        ("generate", {"prompt": "a", "stop": ["a", ""]}, "stop[1]: '' should be non-empty"),
        ("generate", {"prompt": "a", "temprature": 1}, "('temprature' was unexpected)"),
        ("generate", {"prompt": "a", "top_p": 2}, "top_p: 2 is greater than the maximum of 1"),
        ("chat", {"messages": []}, "messages: [] should be non-empty"),
        ("chat", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role: 'tool' is not one of"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0]: 'content' is a required property"),
        ("chat", {"messages": HELLO, "thinking": True}, "thinking"),
        ("embed", {"texts": "one"}, "texts: 'one' is not of type 'array'"),
        ("rerank", {"query": "a", "documents": [1]}, "documents[0]: 1 is not of type 'string'"),
        ("count_tokens", {}, "give either text or messages"),
        ("score", {"text": "a", "top": 21}, "top: 21 is greater than the maximum of 20"),
        ("generate", {"prompt": "a " * 4000}, "the context holds 512"),
        ("score", {"text": "a " * 4000}, "the context holds 512"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_an_error_that_names_it(
    many_calls: Callable[[str, dict[str, Any]], Any], name: str, arguments: dict[str, Any], fault: str
) -> None:
    result = many_calls(name, arguments)
    assert result.is_error and fault in text_of(result) and "\n" not in text_of(result), text_of(result)


@pytest.fixture(scope="module")
def many_calls() -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """Calls to one server, each by a client of its own."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    ended = asyncio.Event()
    urls: list[str] = []

    async def run() -> None:
        async with served(box_models()) as (url, _):
            urls.append(url)
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait()

    async def call(name: str, arguments: dict[str, Any]) -> Any:
        async with Client(urls[0]) as client:
            return await client.call_tool(name, arguments)

    yield lambda name, arguments: asyncio.run(call(name, arguments))
    loop.call_soon_threadsafe(ended.set)
    thread.join()


def test_an_error_about_arguments_is_short_whatever_they_hold() -> None:
    assert len(fault_in({"a": "x" * 100_000}, {"properties": {"a": {"type": "number"}}}) or "") <= 200


def test_a_tool_that_there_is_not_is_an_error_of_the_protocol() -> None:
    async def check(url: str, models: Models) -> None:
        for era in ERAS:
            async with Client(url, mode=era) as client:
                with pytest.raises(MCPError, match="unknown tool 'shell'; there are chat, generate"):
                    await client.session.send_request(
                        types.CallToolRequest(params=types.CallToolRequestParams(name="shell")),
                        types.CallToolResult,
                    )

    with_box(check)


# ----------------------------------------------------------------------------
# Progress and cancel


@pytest.mark.parametrize("era", ERAS)
def test_progress_comes_with_every_pass_and_only_grows(era: str) -> None:
    told: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    async def check(url: str, models: Models) -> None:
        async with Client(url, mode=era) as client:
            arguments = {"prompt": "x = 1\n" * 60, "max_tokens": 8, "temperature": 0}
            found = await client.call_tool("generate", arguments, progress_callback=note)
            n_prompt, n = (found.structured_content[f"{what}_tokens"] for what in ("prompt", "completion"))
            done = [progress for progress, _, _ in told]
            assert done == sorted(set(done)) and {total for _, total, _ in told} == {n_prompt + 8}
            writing = [message for _, _, message in told if message and message.startswith("writing")]
            assert writing == [f"writing, {i + 1} tokens" for i in range(n)]
            assert f"reading, {n_prompt} of {n_prompt} tokens" in {message for _, _, message in told}

    with_box(check)


@pytest.mark.parametrize("era", ERAS)
def test_a_cancelled_call_frees_the_engine(era: str, endless_models: Callable[[], Models]) -> None:
    async def check(url: str, models: Models) -> None:
        async with Client(url, mode=era) as client:
            calling = asyncio.ensure_future(client.call_tool("generate", LONG))
            await until_begun(models)
            calling.cancel()
            await asyncio.wait({calling})
            assert await passes_until_idle(models) < FEW  # how many, the sockets decide
            assert not (await client.call_tool("count_tokens", {"text": "a"})).is_error

    with_models(endless_models(), check)


@pytest.mark.parametrize("version", ["2025-11-25", "2026-07-28"])
def test_a_connection_that_closes_in_the_middle_frees_the_engine(
    version: str, endless_models: Callable[[], Models]
) -> None:
    """As an httpx client does it, which says nothing before it leaves."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
        "progressToken": 1,
    }
    call = {"name": "generate", "arguments": LONG, "_meta": meta}
    headers = {"accept": "application/json, text/event-stream", "mcp-protocol-version": version}

    def message(method: str, params: Any) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}

    async def check(url: str, models: Models) -> None:
        async with httpx2.AsyncClient(headers=headers) as http:
            if version == "2025-11-25":
                begin = {
                    "protocolVersion": version,
                    "capabilities": {},
                    "clientInfo": {"name": "t", "version": "1"},
                }
                answer = await http.post(url, json=message("initialize", begin))
                http.headers["mcp-session-id"] = answer.headers["mcp-session-id"]
                await http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
            else:
                http.headers.update({"mcp-method": "tools/call", "mcp-name": "generate"})
            async with http.stream("POST", url, json=message("tools/call", call)) as answer:
                assert answer.status_code == 200
                await until_begun(models)
        assert await passes_until_idle(models) < FEW

    with_models(endless_models(), check)


def test_a_call_that_waits_for_its_turn_can_be_cancelled(endless_models: Callable[[], Models]) -> None:
    async def check(url: str, models: Models) -> None:
        async with Client(url) as client:
            calls = [
                asyncio.ensure_future(client.call_tool("generate", LONG)) for _ in range(70)
            ]  # 64 run at once
            await until_begun(models)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            assert await passes_until_idle(models) < FEW

    with_models(endless_models(), check)


def test_what_is_told_of_progress_never_falls() -> None:
    """A prompt that is read again, after a preemption, is not told of until it is further than before."""
    told: list[float] = []

    async def report(done: float, total: float | None, message: str) -> None:
        told.append(done)

    async def run() -> None:
        model: Any = None
        call = Call(model, {}, Client_(), report)
        for done in (0, 0, 5, 3, 5, 6):
            await call.progress(done, None, "")

    asyncio.run(run())
    assert told == [0, 5, 6]


# ----------------------------------------------------------------------------
# Who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:80"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 400),
    ],
)
@pytest.mark.parametrize("version", ["2025-11-25", "2026-07-28"])
def test_other_pages_are_refused(headers: dict[str, str], status: int, version: str) -> None:
    async def check(url: str, models: Models) -> None:
        ours = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
        async with httpx2.AsyncClient(headers={**ours, "mcp-protocol-version": version}) as http:
            body = '{"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}'
            assert (await http.post(url, content=body, headers=headers)).status_code == status

    with_box(check)


def test_only_the_named_hosts_are_answered() -> None:
    routes, _ = routes_of(Local(box_models()), ["me.example:8080"], [])
    assert [getattr(route, "path", "") for route in routes] == ["/mcp"]


# ----------------------------------------------------------------------------
# --url


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[Client]:
    """A client of a server whose tools are those of the server at `url`."""
    async with new_proxy(url) as proxy, serving(app(proxy)) as own, Client(f"{own}/mcp") as client:
        yield client


def test_a_proxy_hands_on_results_progress_and_cancel(endless_models: Callable[[], Models]) -> None:
    told: list[str | None] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append(message)

    async def check(url: str, models: Models) -> None:
        async with proxied(url) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == NAMES
            arguments = {"prompt": "def add(", "max_tokens": 5, "temperature": 0}
            found = await client.call_tool("generate", arguments, progress_callback=note)
            assert found.structured_content["completion_tokens"] == 5 and told[-1] == "writing, 5 tokens"
            refused = await client.call_tool("generate", {"prompt": 1})
            assert refused.is_error and "prompt: 1" in text_of(refused)
            large = {
                "texts": [f"{i}" for i in range(1000)]
            }  # more than the megabyte that the SDK takes by itself
            vectors = (await client.call_tool("embed", large)).structured_content["embeddings"]
            assert len(vectors) == 1000 and len(json.dumps(vectors)) > 1 << 20
            before = (await models.get()).scheduler.counters.generated_tokens
            calling = asyncio.ensure_future(client.call_tool("generate", LONG))
            await until_begun(models, before + 3)
            calling.cancel()
            await asyncio.wait({calling})
            assert await passes_until_idle(models) < FEW

    with_models(endless_models(), check)


def test_a_server_of_tools_needs_no_model() -> None:
    """new_server takes any Provider: what a transport does is the same for all."""

    class Nothing:
        async def tools(self) -> list[types.Tool]:
            return []

        async def call(self, context: Any, name: str, arguments: dict[str, Any]) -> Any:
            raise AssertionError

    async def run() -> None:
        async with Client(new_server(Nothing())) as client:
            assert (await client.list_tools()).tools == []

    anyio.run(run)
