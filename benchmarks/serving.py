"""Servers under clients: tokens per second, time to the first token, the largest gap while long prompts
arrive.

    python benchmarks/serving.py ours=http://127.0.0.1:8080 llama-server=http://127.0.0.1:8081

Every server is asked the same token ids by POST /v1/completions, the servers take turns test by test.
Prompts are random ids, so speed is all that is compared. Tokens are counted by `usage`, since some
servers keep bytes of a character back. The model must be the same shape in each server; docs/SERVING.md
has the commands that start them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx2

VOCABULARY = 100_000  # ids below it are ordinary tokens of Qwen3's vocabulary
SHORT, REPLY = 64, 48  # tokens of a prompt and of its reply


@dataclass
class Answer:
    """When the pieces of a streamed reply came, in seconds after its request."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def last(self) -> float:
        return self.times[-1]

    @property
    def gap(self) -> float:
        """The longest time between two pieces."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


class Server:
    """A server under test. name: what it is called in the tables."""

    def __init__(self, name: str, url: str, model: str) -> None:
        self.name = name
        self._model = model
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx2.AsyncClient(base_url=url, timeout=3600, limits=limits, trust_env=False)
        self._random = random.Random(1)

    def prompt(self, n: int) -> list[int]:
        """A prompt that no server has seen."""
        return [self._random.randrange(1000, VOCABULARY) for _ in range(n)]

    async def ask(self, prompt: list[int], n: int, begun: Callable[[], None] = lambda: None) -> Answer:
        """n tokens after a prompt, streamed, the most likely ones. begun: called at the first."""
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "cache_prompt": True,
        }  # fmt: skip
        answer, begin = Answer(), time.perf_counter()
        headers = {"connection": "close"}
        async with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                raise ValueError(f"{self.name}: {response.status_code} {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    answer.tokens = chunk["usage"]["completion_tokens"]
                    details = chunk["usage"].get("prompt_tokens_details") or {}
                    answer.cached = details.get("cached_tokens", 0)
                if chunk["choices"] and "prompt_progress" not in chunk:
                    answer.times.append(time.perf_counter() - begin)
                    if len(answer.times) == 1:
                        begun()
        return answer

    async def close(self) -> None:
        await self._client.aclose()


# ----------------------------------------------------------------------------
# Tests: each returns its figures


async def clients(server: Server, n: int) -> dict[str, float]:
    """n clients at once, each with a prompt of its own: all tokens over the time that all took."""
    prompts = [server.prompt(SHORT) for _ in range(n)]
    begin = time.perf_counter()
    answers = await asyncio.gather(*(server.ask(prompt, REPLY) for prompt in prompts))
    seconds = time.perf_counter() - begin
    tokens = sum(answer.tokens for answer in answers)
    first = statistics.median(answer.first for answer in answers)
    decode = [(answer.tokens - 1) / (answer.last - answer.first) for answer in answers if answer.tokens > 1]
    return {"tok/s": tokens / seconds, "first token s": first, "decode tok/s each": statistics.median(decode)}


async def gap(server: Server, n_prompt: int) -> dict[str, float]:
    """The longest time between two tokens of a reply while a prompt of n_prompt tokens arrives."""
    alone = (await server.ask(server.prompt(n_prompt), 1)).first
    begun = asyncio.Event()
    stop = asyncio.Event()
    times: list[float] = []

    async def write() -> None:
        while not stop.is_set():
            answer = await server.ask(server.prompt(16), 600, begun.set)
            times.append(answer.gap)

    writing = asyncio.create_task(write())
    await begun.wait()
    await asyncio.sleep(0.5)
    first = (await server.ask(server.prompt(n_prompt), 1)).first
    stop.set()
    await writing
    return {
        "largest gap s": max(times),
        "first token alone s": alone,
        "first token s": first,
        "ratio": first / alone,
    }


async def second_turn(server: Server, n: int = 4000, others: int = 0) -> dict[str, float]:
    """The second turn of a long chat, after other chats: its first token beside that of the first turn."""
    prompt = server.prompt(n)
    first = await server.ask(prompt, 16)
    for _ in range(others):
        await server.ask(server.prompt(n // 4), 16)
    second = await server.ask(prompt + server.prompt(32), 16)
    return {"first turn s": first.first, "second turn s": second.first, "share": second.first / first.first}


async def shared_prefix(server: Server, n: int = 16, prefix: int = 2000) -> dict[str, float]:
    """n clients at once whose prompts begin with the same tokens."""
    common = server.prompt(prefix)
    prompts = [common + server.prompt(SHORT) for _ in range(n)]
    begin = time.perf_counter()
    answers = await asyncio.gather(*(server.ask(prompt, REPLY) for prompt in prompts))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "first token s": statistics.median(answer.first for answer in answers)}


TESTS: dict[str, Callable[[Server], Coroutine[Any, Any, dict[str, float]]]] = {
    "1 client": lambda server: clients(server, 1),
    "4 clients": lambda server: clients(server, 4),
    "16 clients": lambda server: clients(server, 16),
    "gap, 2,000 tokens arrive": lambda server: gap(server, 2000),
    "gap, 8,000 tokens arrive": lambda server: gap(server, 8000),
    "second turn": lambda server: second_turn(server),
    "second turn after 8 chats": lambda server: second_turn(server, others=8),
    "16 clients, shared 2,000": lambda server: shared_prefix(server),
}


async def race(servers: list[Server], names: list[str], runs: int) -> dict[str, Any]:
    """Every test on every server, in turns; the median of each figure."""
    figures: dict[str, Any] = {}
    for name in names:
        found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for run in range(runs):
            for server in servers if run % 2 == 0 else reversed(servers):
                found[server.name].append(await TESTS[name](server))
        for server in servers:
            medians = {
                key: statistics.median(one[key] for one in found[server.name])
                for key in found[server.name][0]
            }
            figures.setdefault(name, {})[server.name] = medians
            shown = "  ".join(f"{key} {value:.3f}" for key, value in medians.items())
            print(f"{name:28} {server.name:16} {shown}", flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--test", action="append", choices=TESTS, help="default: all; repeatable")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default="m", help="what the requests call the model")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    named = [one.partition("=") for one in args.servers]
    servers = [Server(name, url, args.model) for name, _, url in named]
    figures = asyncio.run(race(servers, args.test or list(TESTS), args.runs))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
