"""A server around a small application, to try what stands before every application: guard, HTTP layer,
service.

    with serving(header_timeout=0.3) as server:
        answer = server.get("/health")

As a program it serves until a signal ends it: python tests/small_server.py '{"port": 0, "drain": 1}'
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen3c.serve.config import Settings
from qwen3c.serve.guard import Receive, Scope, Send
from qwen3c.serve.keys import Keys
from qwen3c.serve.service import Service, open_sockets

PATIENCE = 20.0  # seconds that a test waits for something before it fails
JSON = {"content-type": "application/json"}


class App:
    """Answers what it was asked, as JSON. seen: paths. left: paths whose client went away before the answer.

    /slow waits until the client leaves, or is cancelled; /large sends 64 MiB, /whole 64 MiB at once; /fails
    raises with `secret` in the exception; /breaks raises in the middle of its answer.
    """

    def __init__(self, secret: str = "") -> None:
        self.secret = secret
        self.seen: list[str] = []
        self.left: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        path = scope["path"]
        self.seen.append(path)
        body = (await receive())["body"]
        if path == "/slow" and (await receive())["type"] == "http.disconnect":
            self.left.append(path)
            return
        if path == "/fails":
            raise RuntimeError(self.secret)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        if path == "/breaks":
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            raise RuntimeError(self.secret)
        if path == "/whole":
            await send({"type": "http.response.body", "body": b"x" * (64 << 20)})
            return
        for _ in range(1024 * (path == "/large")):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        state = scope["state"]
        said = {
            "method": scope["method"],
            "path": path,
            "key": state["key"].name,
            "body": body.decode("latin-1"),
        }
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


@dataclasses.dataclass
class Answer:
    """A parsed answer; status 0 if none came before the connection was closed."""

    raw: bytes
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""

    def __post_init__(self) -> None:
        head, _, self.body = self.raw.partition(b"\r\n\r\n")
        if head:
            first, *lines = head.decode("latin-1").split("\r\n")
            self.status = int(first.split()[1])
            self.headers = dict(line.lower().split(": ", 1) for line in lines)
            if self.headers.get("transfer-encoding") == "chunked":
                self.body = _unchunked(self.body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def _unchunked(data: bytes) -> bytes:
    parts = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        parts, data = parts + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return parts


class Running:
    """A service in a thread of its own."""

    def __init__(self, app: ASGIApp, **settings: Any) -> None:
        self.settings = Settings(**{"port": 0, "log_level": "debug", **settings})
        sockets = open_sockets(self.settings)
        self.host, self.port = sockets[0].getsockname()[:2]
        self.keys = Keys(self.settings.api_keys_file)
        self.service = Service(app, self.settings, sockets, self.keys)
        self.thread = threading.Thread(target=self.service.run)

    @property
    def connections(self) -> int:
        return len(self.service._server.server_state.connections)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)

    def exchange(self, *parts: bytes) -> bytes:
        """All that comes back until the server closes the connection, after `parts` were sent."""
        with self.connect() as client:
            try:
                for part in parts:
                    client.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has heard enough
            return read_all(client)

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        lines = [f"{method} {path} HTTP/1.1"]
        own = {
            "host": f"localhost:{self.port}",
            "connection": "close",
            **({"content-length": str(len(body))} if body else {}),
        }
        lines += [f"{name}: {value}" for name, value in {**own, **(headers or {})}.items() if value]
        return Answer(self.exchange("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body))

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, {name.replace("_", "-"): value for name, value in headers.items()})


def read_all(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    try:
        while part := client.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


@contextmanager
def serving(app: ASGIApp | None = None, **settings: Any) -> Iterator[Running]:
    """A server for as long as the block runs."""
    running = Running(app or App(), **settings)
    running.thread.start()
    try:
        assert running.service.ready.wait(PATIENCE), "the server did not start"
        yield running
    finally:
        running.service.stop()
        running.service.stop()
        running.thread.join(PATIENCE)
        assert not running.thread.is_alive()


def wait_until(condition: Callable[[], object], what: str) -> None:
    """AssertionError if `condition` does not hold within PATIENCE."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    try:
        asyncio.run(asyncio.wait_for(poll(), PATIENCE))
    except asyncio.TimeoutError:
        raise AssertionError(what) from None


if __name__ == "__main__":
    chosen = Settings(**json.loads(sys.argv[1]))
    service = Service(App(), chosen, open_sockets(chosen), Keys(chosen.api_keys_file))
    sys.exit(service.run())
