"""A server under load for as long as you like: nothing is lost, doubled, changed or leaked.

    python benchmarks/soak.py --requests 10000 --clients 24 --slow 64 --seconds 1800

Starts `run.py MODEL -m serve` and asks it from many connections at once: whole replies and streams, a third
of them cancelled at random moments, slow readers, bodies that are no request. Every reply is compared with
what the same request got alone; a cancelled one must be the beginning of it. Then memory and descriptors are
looked at, SIGTERM comes in the middle of streams, and after SIGKILL the server is started again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parents[1]
ADDRESS = "/v1/chat/completions"
TEXTS = (
    "Who are you?",
    "What is 27 + 45?",
    "def parse(",
    "Tell me about lists.",
    "What does textwrap do?",
    "🐍 naïve?",
)
CANARY = {
    "messages": [{"role": "user", "content": "Who are you?"}],
    "seed": 7,
    "max_tokens": 40,
    "logprobs": True,
}
BROKEN = (
    b"",
    b"{",
    b"[]",
    b'{"messages":',
    b"\xff\xfe",
    b'{"messages":[]}',
    b"[" * 50_000,
    b'{"messages":"x"}',
    b'{"messages":[{"role":"user","content":"x"}],"max_tokens":-1}',
    b'{"model":5,"messages":NaN}',
)


class Server:
    """The server in a process of its own."""

    def __init__(self, model: str, options: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [
            sys.executable,
            str(ROOT / "run.py"),
            model,
            "-m",
            "serve",
            "--port",
            str(self.port),
            *options,
        ]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> float:
        """Start it; seconds until it answers."""
        begin = time.monotonic()
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        while True:
            try:
                if httpx2.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return time.monotonic() - begin
            except httpx2.TransportError:
                time.sleep(0.02)
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with status {self.process.returncode}")

    def rss(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, server: Server, n_requests: int, seconds: float, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.left = n_requests
        self.until = time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.samples: list[tuple[int, int]] = []  # (requests so far, resident bytes)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        self.client = httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False)
        self.wanted = [self._request(i) for i in range(60)]
        self.expected: list[str] = []

    def _request(self, i: int) -> dict[str, Any]:
        """A request whose reply is always the same."""
        draw = random.Random(i)
        text = TEXTS[i % len(TEXTS)] * draw.choice([1, 1, 4])
        request = {
            "messages": [{"role": "user", "content": text}],
            "seed": i,
            "max_tokens": draw.randrange(1, 90),
        }
        return request | draw.choice(
            [{}, {"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}, {"stop": ["e"]}]
        )

    async def learn(self) -> None:
        """What each request gets when it is alone."""
        for request in self.wanted:
            body = (await self.client.post(ADDRESS, json=request)).json()
            self.expected.append(body["choices"][0]["message"]["content"])
        self.canary = (await self.client.post(ADDRESS, json=CANARY)).json()["choices"]

    async def run(self, clients: int, slow: int) -> None:
        """All requests."""
        await self.learn()
        tasks = [asyncio.create_task(self._client()) for _ in range(clients)]
        readers = [asyncio.create_task(self._slow_reader()) for _ in range(slow)]
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*tasks)
        for task in (*readers, watch):
            task.cancel()
        await asyncio.gather(*readers, watch, return_exceptions=True)
        await self.client.aclose()

    async def _client(self) -> None:
        while self.left > 0 and time.monotonic() < self.until:
            self.left -= 1
            kind = self.random.random()
            try:
                if kind < 0.08:
                    await self._broken()
                elif kind < 0.42:
                    await self._cancelled()
                else:
                    await self._whole(stream=kind < 0.7)
            except httpx2.TransportError as error:
                self.fault(f"{type(error).__name__} {error}")

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print("FAULT", what[:300], flush=True)

    async def _whole(self, stream: bool) -> None:
        i = self.random.randrange(len(self.wanted))
        if not stream:
            response = await self.client.post(ADDRESS, json=self.wanted[i])
            self.seen[str(response.status_code)] += 1
            if response.status_code == 200:
                self._compare(i, response.json()["choices"][0]["message"]["content"], True)
            elif response.status_code != 429:
                self.fault(f"{response.status_code} {response.text}")
            return
        text, ended = "", False
        async with self.client.stream("POST", ADDRESS, json=self.wanted[i] | {"stream": True}) as response:
            self.seen[str(response.status_code)] += 1
            if response.status_code != 200:
                if response.status_code != 429:
                    self.fault(f"{response.status_code}")
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    text += self._content(line)
        if not ended:
            self.fault("a stream without an end")
        self._compare(i, text, True)

    async def _cancelled(self) -> None:
        """A client that leaves: before a whole answer is there, or after some pieces of a stream."""
        i = self.random.randrange(len(self.wanted))
        pieces, text = self.random.randrange(0, 30), ""
        if pieces < 8:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    self.client.post(ADDRESS, json=self.wanted[i]), self.random.random() * 0.2
                )
            self.seen["cancelled"] += 1
            return
        async with self.client.stream("POST", ADDRESS, json=self.wanted[i] | {"stream": True}) as response:
            self.seen["cancelled" if response.status_code == 200 else str(response.status_code)] += 1
            if response.status_code != 200:
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += self._content(line)
                    pieces -= 1
                if pieces < 0:
                    break
        self._compare(i, text, False)

    def _content(self, line: str) -> str:
        chunk = json.loads(line[6:])
        if "error" in chunk:
            self.fault(line)
            return ""
        return chunk["choices"][0]["delta"].get("content") or "" if chunk["choices"] else ""

    def _compare(self, i: int, text: str, whole: bool) -> None:
        expected = self.expected[i]
        if text != expected if whole else not expected.startswith(text):
            self.fault(f"request {i}: {text!r} is not {expected!r}")

    async def _broken(self) -> None:
        response = await self.client.post(
            ADDRESS, content=self.random.choice(BROKEN), headers={"content-type": "application/json"}
        )
        self.seen[f"broken {response.status_code}"] += 1
        if not 400 <= response.status_code < 500 or "error" not in response.json():
            self.fault(f"a broken body got {response.status_code}")

    async def _slow_reader(self) -> None:
        """A client that takes a byte now and then, until the server has had enough of it."""
        while True:
            try:
                connection = socket.socket()
                # the kernel's own buffer would hold all
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.server.port))
                reader, writer = await asyncio.open_connection(sock=connection, limit=64)
                asked = self.wanted[self.random.randrange(60)] | {"logprobs": True, "top_logprobs": 20}
                body = json.dumps(asked | {"stream": True}).encode()
                host = f"host: 127.0.0.1:{self.server.port}"
                head = f"POST {ADDRESS} HTTP/1.1\r\n{host}\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                self.seen["slow reader"] += 1
                try:
                    while await reader.read(64):
                        await asyncio.sleep(self.random.random() * 2)
                finally:
                    writer.close()
            except OSError:
                await asyncio.sleep(0.5)

    async def _watch(self) -> None:
        """Look at memory, and at a request that must never change."""
        while True:
            await asyncio.sleep(2)
            self.samples.append((sum(self.seen.values()), self.server.rss()))
            response = await self.client.post(ADDRESS, json=CANARY)
            if response.status_code != 200:
                if response.status_code != 429:
                    self.fault(f"the canary got {response.status_code}")
            elif response.json()["choices"] != self.canary:
                self.fault("the canary has changed")
            self.seen["canary"] += 1


def slope(samples: list[tuple[int, int]]) -> float:
    """Bytes per request, by least squares over the second half of the samples."""
    half = samples[len(samples) // 2 :]
    if len(half) < 10:  # the cache still fills
        return 0.0
    return statistics.linear_regression([n for n, _ in half], [rss for _, rss in half]).slope


async def drains(server: Server, wanted: dict[str, Any]) -> tuple[int, int]:
    """SIGTERM in the middle of 8 streams: (how many came to their end, the exit status)."""

    async def one(client: httpx2.AsyncClient) -> bool:
        async with client.stream(
            "POST", ADDRESS, json=wanted | {"stream": True, "max_tokens": 400}
        ) as response:
            return "data: [DONE]" in [line async for line in response.aiter_lines()]

    async with httpx2.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        tasks = [asyncio.create_task(one(client)) for _ in range(8)]
        await asyncio.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    status = await asyncio.to_thread(server.process.wait, 30)
    return sum(end is True for end in ends), status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "qwen3c" / "data" / "model.bin"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--slow", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--option", action="append", default=[], help="of the server; repeatable")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    server = Server(args.model, args.option)
    before = server.descriptors(), server.rss()
    soak = Soak(server, args.requests, args.seconds, args.seed)
    begin = time.monotonic()
    asyncio.run(soak.run(args.clients, args.slow))
    seconds = time.monotonic() - begin
    time.sleep(3)
    after = server.descriptors(), server.rss()
    print(f"{sum(soak.seen.values())} requests in {seconds:.0f} s: {dict(soak.seen)}")
    print(f"descriptors {before[0]} -> {after[0]}, resident {before[1] >> 20} -> {after[1] >> 20} MiB")
    growth = slope(soak.samples) * 1000 / 2**20
    print(f"slope {growth:.3f} MiB per 1,000 requests")
    if growth > 1:
        soak.fault("memory grows by more than 1 MiB per 1,000 requests")
    if after[0] > before[0] + 4:
        soak.fault("descriptors are left open")
    whole, status = asyncio.run(drains(server, soak.wanted[1]))
    print(f"SIGTERM: {whole} of 8 streams came to their end, status {status}")
    if whole < 8 or status:
        soak.fault("SIGTERM cut streams that had begun")
    server.start()
    server.process.kill()
    server.process.wait()
    print(f"after SIGKILL it answers again in {server.start():.2f} s")
    server.process.terminate()
    server.process.wait()
    print(f"faults: {len(soak.faults)}")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
