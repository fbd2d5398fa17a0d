"""A real server over sockets, in a thread, and a client that holds all it sees against OpenAI's schemas."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from openai_schema import check_body, check_chunk

from qwen3c import Model
from qwen3c.serve.api import Api
from qwen3c.serve.app import create_app
from qwen3c.serve.models import Models, Served, ServeOptions

BOX = Path(__file__).parents[2] / "qwen3c" / "data" / "model.bin"


@dataclass
class Server:
    """A server that answers. address: http://127.0.0.1:PORT."""

    address: str
    api: Api

    @property
    def served(self) -> Served:
        """The default model."""
        return next(one for one in self.api.models.loaded if one.name == self.api.models.names[0])

    @property
    def model(self) -> Model:
        return self.served.model


@contextmanager
def running(paths: Mapping[str, Path], **options: Any) -> Iterator[Server]:
    """A server of the models at `paths`, by alias, the first loaded; options: of ServeOptions."""

    def opener(path: Path) -> Callable[[], Model]:
        return lambda: Model(path, 2)

    options.setdefault("kv_bytes", 256 << 20)
    openers = {alias: opener(path) for alias, path in paths.items()}
    api = Api(Models(openers, ServeOptions(**options), files=paths))
    config = uvicorn.Config(create_app(api), log_level="error", lifespan="on", http="h11")
    # with its protocol, or asyncio leaves Nagle on, and each answer waits 40 ms for an acknowledgement
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive())
            assert server.started
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", api)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def asking(address: str, path: str, **fields: Any) -> Iterator[socket.socket]:
    """A request that has been sent; the connection is closed at the end of the block, whatever has come."""
    host, _, port = address.rpartition("/")[2].partition(":")
    body = json.dumps(fields).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    head = "\r\n".join([*lines, "", ""])
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def eventually(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until it is; fail if that does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)


@dataclass
class Answer:
    """status, headers and the JSON body of an answer."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["error"]
        return found


class Client:
    """Requests to a server; every body and chunk is checked."""

    def __init__(self, address: str) -> None:
        self.http = httpx2.Client(base_url=address, timeout=60, trust_env=False)

    def get(self, path: str) -> Answer:
        return self._checked(path, self.http.get(path))

    def post(self, path: str, body: Any = None, **fields: Any) -> Answer:
        """body: JSON, or bytes as they are; else the fields."""
        if isinstance(body, bytes):
            headers = {"content-type": "application/json"}
            return self._checked(path, self.http.post(path, content=body, headers=headers))
        return self._checked(path, self.http.post(path, json=fields if body is None else body))

    def ok(self, path: str, **fields: Any) -> Any:
        """The body of an answer that must be right."""
        answer = self.post(path, **fields)
        assert answer.status == 200, answer.body
        return answer.body

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The data of all events of a stream, which must end with [DONE] or an error."""
        with self.http.stream("POST", path, json=fields | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            *texts, last = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        found = [json.loads(text) for text in texts]
        if last != "[DONE]":
            found.append(json.loads(last))
            assert "error" in found[-1]
        for chunk in found:
            check_chunk(path, chunk)
        return found

    def _checked(self, path: str, response: httpx2.Response) -> Answer:
        body = response.json()
        check_body(path, response.status_code, body)
        return Answer(response.status_code, response.headers, body)
