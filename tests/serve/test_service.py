"""A server from its sockets to its end: signals, drain, systemd.

python -m pytest tests/serve/test_service.py
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_server import PATIENCE, App, read_all, serving, wait_until
from starlette.types import Receive, Scope, Send

from qwen3c.cli.options import parse
from qwen3c.serve.config import Settings, read
from qwen3c.serve.keys import Keys
from qwen3c.serve.service import Service, open_sockets

ROOT = Path(__file__).parents[2]
SERVER = [sys.executable, str(ROOT / "tests" / "small_server.py")]
SLOW = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
# the program after it, with a socket as descriptor 3 as systemd hands it over; argv[1]: the socket's
# descriptor here
HAND_OVER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])"""


class Process:
    """tests/small_server.py, ready, in a process of its own without a terminal. port: where it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        self.said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said)
        self.port = int(found[1]) if found else 0

    def connect(self, request: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        client.sendall(request)
        return client

    def status(self, request: bytes = HEALTH) -> int:
        with self.connect(request) as client:
            return int(read_all(client).split()[1])

    def end(self, *signals: int) -> int:
        """The exit status after these signals."""
        for number in signals:
            self.process.send_signal(number)
        assert self.process.stdout is not None and self.process.stderr is not None
        out, err = self.process.communicate(timeout=PATIENCE)
        self.said += err
        assert out == ""
        return self.process.returncode


@contextmanager
def started(
    command: Sequence[str] = SERVER,
    env: dict[str, str] | None = None,
    fds: Sequence[int] = (),
    **settings: Any,
) -> Iterator[Process]:
    process = subprocess.Popen(
        [*command, json.dumps({"port": 0, "log_level": "debug", **settings})],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        env={**os.environ, **(env or {})},
    )
    try:
        yield Process(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_slow(server: Process) -> socket.socket:
    """A client whose request is under way."""
    client = server.connect(SLOW)
    assert server.status() == 200  # which arrived after it
    return client


# ----------------------------------------------------------------------------
# The end


def test_a_server_that_is_told_to_stop_ends_well() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with started() as server:
            assert server.status() == 200
            assert server.end(number) == 0
            assert "Traceback" not in server.said


def test_what_is_under_way_may_finish() -> None:
    """The client leaves while the server drains, so that its request ends by itself, long before the drain
    does.
    """
    with started(drain=300) as server:
        client = wait_for_slow(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        while "stopping: 1 request has 300 s left" not in server.said:
            server.said += server.process.stderr.readline()
        with pytest.raises(OSError):
            wait_until(lambda: server.connect().close(), "the server to accept nobody any more")
        client.close()
        assert server.end() == 0


def test_what_takes_longer_than_the_drain_is_told_so() -> None:
    with started(drain=0.2) as server, wait_for_slow(server) as client:
        server.process.send_signal(signal.SIGTERM)
        raw = read_all(client)
        assert raw.startswith(b"HTTP/1.1 503 ") and b'"code": "stopping"' in raw
        assert server.end() == 0


def test_a_second_signal_ends_it_at_once() -> None:
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)):
        with started(drain=300) as server, wait_for_slow(server) as client:
            server.process.send_signal(first)
            assert server.process.stderr is not None
            while "stopping" not in server.said:
                server.said += server.process.stderr.readline()
            server.process.send_signal(second)
            assert read_all(client).startswith(b"HTTP/1.1 503 ")
            assert server.end() == 0


def test_an_idle_connection_does_not_hold_up_the_end() -> None:
    with started(drain=300) as server, server.connect(), server.connect(b"GET /hea"):
        assert server.status() == 200
        assert server.end(signal.SIGTERM) == 0


# ----------------------------------------------------------------------------
# The beginning


def test_a_port_in_use_is_one_line() -> None:
    with serving() as server:
        with pytest.raises(ValueError) as error:
            open_sockets(Settings(port=server.port))
        assert (
            str(error.value) == f"127.0.0.1:{server.port}: Address already in use; --port N takes another one"
        )


def test_a_host_that_is_not_here_is_one_line() -> None:
    for host in ("192.0.2.1", "nothing.invalid"):
        with pytest.raises(ValueError) as error:
            open_sockets(Settings(host=host))
        assert str(error.value).startswith(f"{host}:8080: ") and "\n" not in str(error.value)


def test_an_application_that_does_not_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        try:
            raise ValueError("model.bin: damaged")
        except ValueError:
            await send(
                {"type": "lifespan.startup.failed", "message": "Traceback (most recent call last): ..."}
            )
            raise

    settings = Settings(port=0)
    with pytest.raises(ValueError, match=r"^model\.bin: damaged$"):
        Service(broken, settings, open_sockets(settings), Keys()).run()
    assert capsys.readouterr().err == ""


def test_a_socket_that_others_reach_takes_keys_whoever_opened_it() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener, pytest.raises(ValueError, match="takes keys"):
        Service(App(), Settings(), [listener], Keys())


def test_a_server_starts_again_on_the_same_port_at_once() -> None:
    port = 0
    for _ in range(3):
        with started(port=port) as server, server.connect(HEALTH) as client:
            port = server.port
            assert read_all(client).startswith(b"HTTP/1.1 200")
            server.process.kill()


# ----------------------------------------------------------------------------
# Keys and systemd


def test_a_hangup_reads_the_keys_again_and_drops_no_request(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice k-a\n")
    keys.chmod(0o600)
    ask = b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Api-Key: %s\r\n\r\n"
    with started(api_keys_file=str(keys)) as server:
        assert "API keys: 1" in server.said
        assert (server.status(ask % b"k-a"), server.status(ask % b"k-b")) == (200, 401)
        with server.connect(SLOW.replace(b"\r\n\r\n", b"\r\nX-Api-Key: k-a\r\n\r\n")) as client:
            assert server.status() == 200  # which arrived after it
            keys.write_text("bob k-b\n")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.status(ask % b"k-b") == 200, "the new key")
            assert server.status(ask % b"k-a") == 401
            keys.write_text("broken\n")
            server.process.send_signal(signal.SIGHUP)
            assert server.process.stderr is not None
            while "the API keys stay as they were" not in server.said:
                server.said += server.process.stderr.readline()
            assert server.status(ask % b"k-b") == 200
            client.settimeout(0.05)
            with pytest.raises(TimeoutError):
                client.recv(1)
        assert server.end(signal.SIGTERM) == 0
    assert "k-a" not in server.said and "k-b" not in server.said


def test_systemd_is_told_when_it_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        with started(env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}) as server:
            told = [manager.recv(100) for _ in range(4)]
            assert told.count(b"READY=1") == 1 and told.count(b"WATCHDOG=1") == 3
            assert server.end(signal.SIGTERM) == 0
            while told[-1] == b"WATCHDOG=1":
                told.append(manager.recv(100))
            assert told[-1] == b"STOPPING=1"


def test_a_socket_of_systemd_is_listened_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, fd = listener.getsockname()[1], listener.fileno()
        command = [sys.executable, "-c", HAND_OVER, str(fd), *SERVER]
        with started(command, fds=(fd,)) as server:
            assert server.port == port and server.status() == 200
            assert server.end(signal.SIGTERM) == 0


def test_a_socket_may_be_given_by_its_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        with started(fds=(fd,), fd=fd) as server:
            assert server.port == listener.getsockname()[1] and server.status() == 200
            assert server.end(signal.SIGTERM) == 0
    for wrong in (0, 999):
        with pytest.raises(ValueError, match="is no socket"):
            open_sockets(Settings(fd=wrong))


def test_sockets_for_another_process_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    (listener,) = open_sockets(Settings(port=0))
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_small_pieces_do_not_wait_for_acknowledgements() -> None:
    """asyncio turns Nagle off where a socket names its protocol."""
    (listener,) = open_sockets(Settings(port=0))
    with listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_what_is_packaged_fits_the_program() -> None:
    """The commands of the unit and of the image have only flags that there are, and the configuration can be
    read.
    """
    packaging = ROOT / "packaging"
    assert read(str(packaging / "qwen3c.toml"))["models"]
    (unit,) = re.findall(r"^ExecStart=\S+ (.*)$", (packaging / "qwen3c.service").read_text(), re.MULTILINE)
    image = (packaging / "Dockerfile").read_text()
    entry, command = [
        json.loads(re.findall(rf"^{word} (\[.*)$", image, re.MULTILINE)[-1]) for word in ("ENTRYPOINT", "CMD")
    ]
    for arguments in (unit.split(), [*entry[1:], *command]):
        assert parse(arguments).mode == "serve"
