"""A batch beside the engine's own rate, clients of a server, and a loop that shares no prefixes.

    python benchmarks/batch.py model.bin --requests 256

Ragged requests for /v1/completions, of random token ids, the most likely tokens after them; tokens generated
a second, prompts and all. The ways to answer them take turns, the median of each is shown:

    batch      as -m batch answers them
    engine     Model.generate_many, 16 at once: the engine without requests around it
    clients    a server of its own process, asked by so many clients, each in a loop
    shared     requests that begin with the same tokens: the batch, and a loop that reads every prompt whole
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from qwen3c import Model
from qwen3c.drivers.batch import drive
from qwen3c.drivers.reply import ReplySettings, ReplyState
from qwen3c.format import ModelFile
from qwen3c.serve.api import Api
from qwen3c.serve.batch import PASS_SECONDS, answered, read_items
from qwen3c.serve.models import Models, ServeOptions

ROOT = Path(__file__).parents[1]
URL = "/v1/completions"
PREFIX, TAIL, REPLY = 1000, 16, 16  # tokens of requests that begin alike
Asked = list[tuple[list[int], int]]  # prompts with the tokens that are wanted after them
Result = tuple[int, float]  # tokens generated, and in how many seconds


def ragged(n: int, n_tokens: int, seed: int) -> Asked:
    draw = random.Random(seed)
    return [
        ([draw.randrange(n_tokens) for _ in range(draw.randrange(16, 128))], draw.randrange(16, 97))
        for _ in range(n)
    ]


def alike(n: int, n_tokens: int, context: int, seed: int) -> Asked:
    draw = random.Random(seed)
    prefix = [draw.randrange(n_tokens) for _ in range(min(PREFIX, context // 2))]
    return [(prefix + [draw.randrange(n_tokens) for _ in range(TAIL)], REPLY) for _ in range(n)]


def bodies(asked: Asked) -> list[dict[str, Any]]:
    return [{"model": "m", "prompt": ids, "max_tokens": n, "temperature": 0} for ids, n in asked]


# ----------------------------------------------------------------------------
# Ways to answer; a model is loaded before the clock starts


def by_batch(path: str, asked: Asked, running: int) -> Result:
    """What -m batch does, without its files."""
    lines = [
        json.dumps({"custom_id": f"{i}", "url": URL, "body": body}).encode()
        for i, body in enumerate(bodies(asked))
    ]

    async def work() -> Result:
        options = ServeOptions(running, 1 << 30, None, PASS_SECONDS, offline=True)
        async with Models({"m": lambda: Model(path)}, options).open() as models:
            begin = time.perf_counter()
            async with contextlib.aclosing(answered(Api(models), read_items(lines), running)) as answers:
                found = [json.loads(answer.line)["response"]["body"] async for answer in answers]
            seconds = time.perf_counter() - begin
        return sum(int(body["usage"]["completion_tokens"]) for body in found), seconds

    return asyncio.run(work())


def by_engine(path: str, asked: Asked, running: int = 16) -> Result:
    """The loop of generate_many, which has one max_tokens for all, with one for each."""
    with Model(path) as model:
        sampling = model.sampling(False, temperature=0.0)
        vocabulary = replace(model.vocabulary, bare=True)
        begin = time.perf_counter()
        states = ((ids, ReplyState(vocabulary, ids, sampling, n, ReplySettings())) for ids, n in asked)
        tokens = sum(event.token is not None for _, event in drive(model, states, running))
        return tokens, time.perf_counter() - begin


def by_loop(path: str, asked: Asked) -> Result:
    """One after another, each prompt read whole."""
    with Model(path) as model:
        begin = time.perf_counter()
        events = (event for ids, n in asked for event in model.generate(ids, n, temperature=0))
        return sum(event.token is not None for event in events), time.perf_counter() - begin


def by_clients(address: str, clients: int, asked: Callable[[int], Asked], run: int) -> Result:
    """Each client asks, waits for the answer and asks again."""
    with httpx2.Client(base_url=address, timeout=3600, trust_env=False) as http:

        def ask(body: dict[str, Any]) -> int:
            return int(http.post(URL, json=body).raise_for_status().json()["usage"]["completion_tokens"])

        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            return sum(pool.map(ask, bodies(asked(run)))), time.perf_counter() - begin


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """A server of the model in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(ROOT / "run.py"), model, "-m", "serve", "--port", f"{port}"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"{address}/health", trust_env=False).status_code == 200:
                        break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


# ----------------------------------------------------------------------------
# In turns


def race(ways: dict[str, Callable[[int], Result]], runs: int) -> None:
    """Each way on the requests of each run, in turns; the first is what the others are compared with.

    A way is told the number of the run, so that no run finds in a cache what an earlier one left there.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs):
        for name in ways if run % 2 == 0 else reversed(ways):
            tokens, seconds = ways[name](run)
            rates[name].append(tokens / seconds)
    first = next(iter(ways))
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(rates[first], found, strict=True)]
        beside = "" if name == first else f"  {first} is {statistics.median(ratios):.2f} times that"
        print(f"  {name:24} {statistics.median(found):8.1f} tok/s{beside}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64, help="of the batch (default: 64)")
    parser.add_argument("--shared", type=int, default=32, help="requests that begin alike (default: 32)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="(default: 1 16)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("engine", "clients", "shared"))
    args = parser.parse_args()
    config = ModelFile(args.model).config

    def asked(run: int) -> Asked:
        return ragged(args.requests, config.n_tokens, run)

    def begin_alike(run: int) -> Asked:
        return alike(args.shared, config.n_tokens, config.context, run)

    def batch(run: int) -> Result:
        return by_batch(args.model, asked(run), args.concurrency)

    if args.only in (None, "engine"):
        print(f"{args.requests} ragged requests")
        race({"batch": batch, "engine, 16 at once": lambda run: by_engine(args.model, asked(run))}, args.runs)
    for n in args.clients if args.only in (None, "clients") else ():
        print(f"{args.requests} ragged requests, {n} clients of a server")
        with server(args.model) as address:
            clients = functools.partial(by_clients, address, n, asked)
            race({"batch": batch, "clients": clients}, args.runs)
    if args.only in (None, "shared"):
        print(f"{args.shared} requests that begin with the same {min(PREFIX, config.context // 2)} tokens")
        race(
            {
                "batch": lambda run: by_batch(args.model, begin_alike(run), args.concurrency),
                "loop": lambda run: by_loop(args.model, begin_alike(run)),
            },
            args.runs,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
