"""A Hugging Face Hub on loopback, as its client sees it, which can be told to go wrong.

    with Hub() as hub:
        hub.add("owner/model", directory)
        hub.faults.append(Fault(r"safetensors", "cut", 1000))
        ... HF_ENDPOINT=hub.url

Small files come from the Hub itself; weights by a redirect to another origin, as from a CDN, which must never
see the token. Every request is noted in `asked`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".gguf", ".bin")


@dataclass
class Fault:
    """What goes wrong for requests whose path has `where` in it, `times` times.

    what: "status" (value: the number; headers), "cut" (after value bytes), "reset" (the same, by RST), "flip"
    (a byte of the body), "short" (value bytes, said to be all), "long" (value bytes too many), "no range"
    (the whole body where a part was asked for), "other range" (a part from elsewhere), "slow" (value seconds
    before each piece), "hang" (nothing for value seconds), "body" (these bytes instead), "move" (a redirect
    to itself).
    """

    where: str
    what: str
    value: Any = None
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str
    private: bool = False
    gated: bool = False
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the listing says otherwise


class Hub:
    """Repositories behind two addresses: the Hub's and the CDN's. token: what opens what is private."""

    token = "hf_right"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str]] = []  # method and path
        self.tokens_at_cdn: list[str] = []
        self.sent = 0  # bytes of bodies
        self.watch: Callable[[int], None] | None = None  # told how many bytes were sent, while they are
        self.lock = threading.Lock()
        self._servers = [self._serve(Handler), self._serve(Cdn)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def _serve(self, kind: type[Handler]) -> ThreadingHTTPServer:
        handler = type(kind.__name__, (kind,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, content: Path | dict[str, bytes], **options: Any) -> Repository:
        """A repository of the files of a folder, or of these; its commit follows from them."""
        files = content if isinstance(content, dict) else {
            str(path.relative_to(content)): path.read_bytes() for path in content.rglob("*") if path.is_file()
        }  # fmt: skip
        state = hashlib.sha1(repr([(path, digest(path, files[path])) for path in sorted(files)]).encode())
        self.repositories[name] = Repository(files, state.hexdigest(), **options)
        return self.repositories[name]

    def paths(self) -> list[str]:
        """Files that were asked for, in order."""
        return [
            path.partition("/resolve/")[2].partition("/")[2] for _, path in self.asked if "/resolve/" in path
        ]

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables for a process of its own that uses this Hub, with its caches in `folder`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf"), "QWEN3C_CACHE": str(folder / "cache"),
            "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip


def digest(path: str, data: bytes) -> str:
    if path.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The Hub: its API, and files of a commit."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.asked.append((self.command, path))
            fault = next(
                (f for f in self.hub.faults if f.times and re.search(f.where, self.place(path))), None
            )
            if fault:
                fault.times -= 1
        try:
            if fault and fault.what in ("status", "body", "move", "hang") and self.broken(fault):
                return
            self.answer(path, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def place(self, path: str) -> str:
        return path

    def broken(self, fault: Fault) -> bool:
        """Answer in place of what was asked for; whether that was all."""
        if fault.what == "hang":
            time.sleep(fault.value)
            return False
        if fault.what == "move":
            self.plain(302, b"", {"Location": self.path})
        elif fault.what == "status":
            self.plain(fault.value, b"no", fault.headers)
        else:
            self.plain(200, fault.value, fault.headers)
        return True

    def plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self, path: str, fault: Fault | None) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (match or file or re.match("(.*)", path))[1]  # type: ignore[index]
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != self.hub.token:
            self.plain(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.private and not token):
            self.plain(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not token:
            self.plain(401, b"", {"X-Error-Code": "GatedRepo"})
        elif match and (match[2] or "main") not in ("main", "v1", repository.commit):
            self.plain(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif match:
            self.list_files(name, repository)
        elif file and file[3] in repository.files and file[2] in ("main", repository.commit):
            data = repository.files[file[3]]
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{digest(file[3], data)}"'}
            if file[3].endswith(LFS):
                linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
                self.plain(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/{name}/{file[3]}"})
            else:
                self.send_body(data, headers, fault)
        else:
            self.plain(404, b"", {"X-Error-Code": "EntryNotFound"})

    def list_files(self, name: str, repository: Repository) -> None:
        siblings = []
        for path, data in repository.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": "0" * 40}
            if path.endswith(LFS):
                entry["lfs"] = {"sha256": digest(path, data), "size": len(data), "pointerSize": 130}
            else:
                entry["blobId"] = digest(path, data)
            siblings.append(entry | repository.listed.get(path, {}))
        listing = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        self.plain(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def send_body(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        what, value = (fault.what, fault.value) if fault else ("", 0)
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start and what != "no range" else 0
        if first and first >= len(data):
            self.plain(416, b"")
            return
        if what == "other range":
            first = max(first - 1, 0)
        body = data[first:]
        if what == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if what == "short":
            body = body[:value]
        if what == "long":
            body += bytes(value)
        self.send_response(206 if start and what != "no range" else 200)
        if start and what != "no range":
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = value if what in ("cut", "reset") else len(body)
        self.send_pieces(body[:end], value if what == "slow" else 0)
        if what == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what in ("cut", "reset"):
            self.close_connection = True

    def send_pieces(self, body: bytes, pause: float) -> None:
        for at in range(0, len(body), 1 << 14):
            time.sleep(pause)
            piece = body[at : at + (1 << 14)]
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            if self.hub.watch:
                self.hub.watch(self.hub.sent)


class Cdn(Handler):
    """Where the weights are: another origin, which knows no tokens."""

    def place(self, path: str) -> str:
        return f"cdn:{path}"

    def answer(self, path: str, fault: Fault | None) -> None:
        if "Authorization" in self.headers:
            self.hub.tokens_at_cdn.append(self.headers["Authorization"])
        _, owner, name, file = path.split("/", 3)
        self.send_body(self.hub.repositories[f"{owner}/{name}"].files[file], {}, fault)
