"""A provider of chat completions on loopback that answers as a script says, down to single bytes and resets.

    with Provider(stream("Hel", "lo")) as provider:
        Settings(provider.url, "m")

Plain sockets, a thread for each connection: what an HTTP library would not do is what matters here.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, BinaryIO, Literal

Step = bytes | Literal["silence", "reset"]  # then the connection is closed
Script = Sequence[Step]
LAST_PIECE = b"0\r\n\r\n"  # of HTTP's chunked coding; after it the connection stays open
MODELS = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{"data": []}'


def event(value: Any) -> bytes:
    """One server-sent event."""
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {data}\n\n".encode()


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
    """One chat.completion.chunk as an event."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    head = {"id": "up-1", "object": "chat.completion.chunk", "created": 1764000000, "model": "cloud-m"}
    return event({**head, "choices": [choice], **more})


ROLE = chunk({"role": "assistant", "content": ""})
USAGE = event(
    {
        "id": "up-1",
        "model": "cloud-m",
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
)
DONE = event("[DONE]")


def head(status: int = 200, kind: str = "text/event-stream", *more: str) -> bytes:
    """A status line and headers; the connection's end is the body's."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", "connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    """A whole answer in HTTP's chunked coding, whose connection stays usable."""
    first = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return first + body + LAST_PIECE * end


def stream(*texts: str, reason: str = "stop") -> list[Step]:
    """A script that streams `texts` and ends as it should."""
    return [chunked(ROLE, *(chunk({"content": text}) for text in texts), chunk({}, reason), USAGE, DONE)]


def error(status: int, *more: str, body: Any = None) -> list[Step]:
    """A script that answers with a status and a JSON error."""
    told = body or {"error": {"message": f"no: {status}", "type": "t", "param": None, "code": "c"}}
    return [head(status, "application/json", *more) + json.dumps(told).encode()]


@dataclass
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any = None
    raw: bytes = field(default=b"", repr=False)


class Provider:
    """Answers POST with the scripts in turn, the last again and again, and GET with `models`."""

    def __init__(self, *scripts: Script, models: bytes = MODELS) -> None:
        self._scripts = list(scripts)
        self.models = models
        self.requests: list[Request] = []
        self.connections = 0
        self._closed = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Provider:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):  # wakes accept()
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @property
    def asked(self) -> list[Request]:
        """The requests that were for a reply."""
        return [request for request in self.requests if request.method == "POST"]

    def answer_with(self, *scripts: Script) -> None:
        """Scripts for what is asked from now on."""
        self._scripts = list(scripts)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as file:
            while (request := self._read(file)) is not None:
                self.requests.append(request)
                if request.method == "GET":
                    connection.sendall(self.models)
                    return
                script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
                for step in script:
                    if step == "silence":
                        self._closed.wait()
                        return
                    if step == "reset":
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    assert isinstance(step, bytes)
                    connection.sendall(step)
                if not (isinstance(step, bytes) and step.endswith(LAST_PIECE)):
                    return

    @staticmethod
    def _read(file: BinaryIO) -> Request | None:
        line = file.readline()
        if b" HTTP/1." not in line:  # the other end has gone, or speaks TLS
            return None
        raw, headers = line, {}
        while (text := file.readline()).strip():
            raw += text
            name, _, value = text.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers.get("content-length", 0)))
        method, path, _ = line.decode().split(" ")
        return Request(method, path, headers, json.loads(body) if body else None, raw + body)
