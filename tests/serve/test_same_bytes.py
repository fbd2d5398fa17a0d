"""What a request gets does not depend on what else the server does: not a byte, over any surface.

Each request is asked alone of a server with an empty cache, then among others: cold and warm cache, streamed
or not, beside replies that are cancelled, with so little memory that sequences are preempted and evicted.

python -m pytest tests/serve/test_same_bytes.py; with `-m slow` 200 requests instead of 60
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import Server, running
from small_models import TINY_QWEN3
from test_chat import WEATHER, gathered, whole
from test_retrieval import write_source

from qwen3c.convert.export import export

CHAT, TEXTS, MESSAGES, RESPONSES = (
    "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses",
)  # fmt: skip
MODELS = ("caller", "thinker")  # random weights and the tokens of tool calls; trained, and thinks
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
WORDS = (
    "who are you what is 27 + 45 def parse list dict 🐍 naïve tell me about the import of textwrap".split()
)
Request = tuple[str, dict[str, Any]]


def request(i: int) -> Request:
    """The i-th request, which has one right answer: (path, fields)."""
    draw = random.Random(i)
    fields: dict[str, Any] = {"model": draw.choice(MODELS)}
    path = draw.choice((CHAT, CHAT, TEXTS, MESSAGES, RESPONSES))
    system = " ".join(
        WORDS * draw.choice((0, 1, 6))
    )  # beginnings that requests share, some of several blocks
    text = " ".join(draw.choices(WORDS, k=draw.randrange(1, 24)))
    fields |= {CHAT: chat, TEXTS: texts, MESSAGES: messages, RESPONSES: responses}[path](draw, system, text)
    if path != MESSAGES:
        fields |= sampling(draw, i, path)
    return path, fields


def sampling(draw: random.Random, seed: int, path: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": draw.choice((0, 0.7, 1.0, 1.6)), "top_p": draw.choice((0.5, 0.95, 1)),
        "top_k": draw.choice((0, 5, 50)), "min_p": draw.choice((0, 0.05)),
        "presence_penalty": draw.choice((0, 0.8)), "frequency_penalty": draw.choice((0, -0.5, 1.5)),
    }  # fmt: skip
    if path != RESPONSES:
        options |= {"repetition_penalty": draw.choice((1, 1.3)), "n": draw.choice((1, 1, 2, 3))}
        options["logit_bias"] = {str(draw.randrange(290)): draw.choice((-100, 5)) for _ in range(3)}
    chosen = draw.sample(sorted(options), draw.randrange(len(options) + 1))
    stop = draw.choice((None, "e", ["th", " a"]))
    return {name: options[name] for name in chosen} | {"seed": seed} | ({"stop": stop} if stop else {})


def chat(draw: random.Random, system: str, text: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    if draw.random() < 0.4:
        turns += [{"role": "assistant", "content": "I see."}, {"role": "user", "content": "Go on"}]
    fields: dict[str, Any] = {"messages": turns, "max_tokens": draw.randrange(1, 48)}
    fields |= draw.choice(({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": draw.randrange(1, 6)}))
    fields |= draw.choice(({}, {"thinking_budget": 6}, {"chat_template_kwargs": {"enable_thinking": False}}))
    kind = draw.randrange(7)
    if kind == 0:
        fields["response_format"] = {"type": "json_object"}
    elif kind == 1:
        wanted = {"name": "person", "strict": True, "schema": SCHEMA}
        fields["response_format"] = {"type": "json_schema", "json_schema": wanted}
    elif kind == 2:
        fields |= draw.choice(({"guided_choice": ["yes", "no"]}, {"guided_regex": "[0-9]{3}-[a-f]+"}))
    elif kind in (3, 4):
        named = {"type": "function", "function": {"name": "weather"}}
        fields |= {"tools": [WEATHER, CLOCK], "tool_choice": draw.choice(("required", "none", named, "auto"))}
        fields |= {"max_tokens": 120, "parallel_tool_calls": draw.choice((True, False)), "model": "caller"}
    return fields


def texts(draw: random.Random, system: str, text: str) -> dict[str, Any]:
    ids = [draw.randrange(290) for _ in range(draw.randrange(1, 40))]
    prompt = draw.choice((f"{system} {text}", ids, [text, "and", "then"], [ids, [5, 6]]))
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randrange(0, 40)}
    fields |= draw.choice(
        ({}, {"logprobs": 0}, {"logprobs": 4}, {"logprobs": 2, "echo": True}, {"echo": True})
    )
    return fields | draw.choice(({}, {"return_token_ids": True}, {"guided_json": SCHEMA}))


def messages(draw: random.Random, system: str, text: str) -> dict[str, Any]:
    """These have no seed in Anthropic's API: the most likely tokens it is."""
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": draw.randrange(1, 48),
    }
    fields |= {"temperature": 0, "system": system} if system else {"top_k": 1}
    fields |= draw.choice(({}, {"thinking": {"type": "enabled", "budget_tokens": 5}}))
    fields |= draw.choice(({}, {"stop_sequences": ["e", "zz"]}))
    if draw.random() < 0.4:
        weather = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
        fields |= {
            "tools": [weather],
            "tool_choice": {"type": draw.choice(("any", "auto"))},
            "model": "caller",
        }
    return fields


def responses(draw: random.Random, system: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"input": text, "max_output_tokens": draw.randrange(1, 48)}
    fields |= {"instructions": system} if system else {}
    fields |= draw.choice(({}, {"include": ["message.output_text.logprobs"], "top_logprobs": 3}))
    format = {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}
    fields |= draw.choice(({}, {}, {"text": {"format": format}}))
    if draw.random() < 0.3:
        weather = {"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"]}  # type: ignore[index]
        fields |= {"tools": [weather], "tool_choice": "required", "model": "caller", "max_output_tokens": 90}
    return fields


# ----------------------------------------------------------------------------
# Asking


async def ask(client: httpx2.AsyncClient, one: Request, stream: bool) -> Any:
    """What was said, in a form that is the same streamed or not."""
    path, fields = one
    if not stream:
        response = await client.post(path, json=fields)
        assert response.status_code == 200, (one, response.text)
        return said(path, response.json(), [])
    async with client.stream("POST", path, json=fields | {"stream": True}) as response:
        lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
        assert response.status_code == 200, (one, lines)
    return said(path, None, [json.loads(line) for line in lines if line != "[DONE]"])


def said(path: str, body: Any, events: list[dict[str, Any]]) -> Any:
    """Texts, thoughts, calls, tokens, log-probabilities and why it ended. body: None if events came."""
    if path == CHAT:
        choices = gathered(events) if body is None else whole(body)
        return [choice | {"calls": [call["function"] for call in choice["calls"]]} for choice in choices]
    if path == TEXTS:
        return pieced(events if body is None else [body])
    if path == RESPONSES:
        output = (events[-1]["response"] if body is None else body)["output"]
        return [{name: value for name, value in item.items() if "id" not in name} for item in output]
    return (
        blocks(events)
        if body is None
        else [spoken(body["content"]), body["stop_reason"], body["stop_sequence"]]
    )


def pieced(bodies: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of completions, put together of pieces."""
    found: dict[int, dict[str, Any]] = {}
    for piece in (choice for body in bodies for choice in body["choices"]):
        choice = found.setdefault(piece["index"], {"text": "", "ids": [], "logprobs": {}, "finish": None})
        choice["text"] += piece["text"]
        choice["ids"] += piece.get("token_ids") or []
        choice["finish"] = piece["finish_reason"] or choice["finish"]
        for name, values in (piece["logprobs"] or {}).items():
            choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
    return found


def blocks(events: list[dict[str, Any]]) -> list[Any]:
    """A message of Anthropic's, put together of events."""
    content: list[dict[str, Any]] = []
    ended: dict[str, Any] = {}
    for event in events:
        delta = event.get("delta", {})
        if event["type"] == "content_block_start":
            content.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            for name in ("text", "thinking"):
                content[-1][name] = content[-1].get(name, "") + delta.get(name, "")
            content[-1]["json"] += delta.get("partial_json", "")
        elif event["type"] == "message_delta":
            ended = delta
    for block in content:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"])
    return [spoken(content), ended["stop_reason"], ended["stop_sequence"]]


def spoken(content: list[dict[str, Any]]) -> list[Any]:
    return [
        [block["type"], block.get(block["type"]), block.get("name"), block.get("input")] for block in content
    ]


async def alone(client: httpx2.AsyncClient, server: Server, wanted: list[Request]) -> list[Any]:
    """Each request as the only one that the server ever saw: its cache is emptied after each."""
    found = []
    for one in wanted:
        found.append(await ask(client, one, stream=False))
        for served in server.api.models.loaded:
            served.scheduler.tree.clear()
    return found


async def mixed(client: httpx2.AsyncClient, wanted: list[Request], seed: int) -> list[Any]:
    """All of them in some order, up to 32 at once, half streamed; others beside them are let go of."""
    draw = random.Random(seed)
    found: list[Any] = [None] * len(wanted)
    places = asyncio.Semaphore(32)

    async def one(i: int) -> None:
        async with places:
            found[i] = await ask(client, wanted[i], draw.random() < 0.5)

    async def left(i: int) -> None:
        async with places:
            path, fields = wanted[i]
            try:
                with_stream = fields | {"stream": draw.random() < 0.5}
                await asyncio.wait_for(client.post(path, json=with_stream), draw.random() * 0.05)
            except asyncio.TimeoutError:
                pass

    todo = [one(i) for i in range(len(wanted))] + [
        left(i) for i in draw.sample(range(len(wanted)), len(wanted) // 2)
    ]
    draw.shuffle(todo)
    await asyncio.gather(*todo)
    return found


def run(server: Server, work: Any) -> Any:
    async def main() -> Any:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(
            base_url=server.address, timeout=120, limits=limits, trust_env=False
        ) as client:
            return await work(client)

    return asyncio.run(main())


# ----------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("same")
    export(write_source(directory / "source", context=1024), directory / "model.bin")
    return {"caller": directory / "model.bin", "thinker": TINY_QWEN3}


@pytest.fixture(scope="module")
def roomy(paths: dict[str, Path]) -> Iterator[Server]:
    with running(paths, queue=512) as server:
        yield server


def differences(found: list[Any], expected: list[Any]) -> list[int]:
    return [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]


@pytest.mark.parametrize("n", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_the_same_bytes_alone_and_in_company(roomy: Server, paths: dict[str, Path], n: int) -> None:
    wanted = [request(i) for i in range(n)]
    expected = run(roomy, lambda client: alone(client, roomy, wanted))
    for seed in (1, 2):  # cold, then warm
        found = run(roomy, lambda client, seed=seed: mixed(client, wanted, seed))
        assert differences(found, expected) == []
    assert all(served.scheduler.counters.cached_tokens > 0 for served in roomy.api.models.loaded)
    # the longest of these requests takes 4 blocks of 256 positions, and up to 32 of them come at once
    with running(paths, queue=512, kv_bytes=8 * roomy.model.kv_block_bytes) as narrow:
        for seed in (3, 4):
            found = run(narrow, lambda client, seed=seed: mixed(client, wanted, seed))
            assert differences(found, expected) == []
        counters = [served.scheduler.counters for served in narrow.api.models.loaded]
        assert sum(one.preemptions for one in counters) > 0 and sum(one.evictions for one in counters) > 0


def test_a_difference_would_be_seen(roomy: Server) -> None:
    """Requests whose tokens are drawn, with another seed."""
    seeded = [one for one in map(request, range(60)) if one[1].get("temperature") in (1.0, 1.6)]
    wanted = [
        (path, fields | {"top_k": 0, "top_p": 1, "min_p": 0}) for path, fields in seeded if path == CHAT
    ]
    shifted = [(path, fields | {"seed": fields["seed"] + 1}) for path, fields in wanted]
    expected = run(roomy, lambda client: alone(client, roomy, wanted))
    assert len(differences(run(roomy, lambda client: mixed(client, shifted, 5)), expected)) > len(wanted) / 2
