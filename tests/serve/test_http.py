"""The HTTP layer: what a client owes it has to give in time, and what is no HTTP is refused in JSON.

python -m pytest tests/serve/test_http.py
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator

import pytest
from small_server import App, Running, read_all, serving, wait_until

HOST = b"Host: localhost\r\n"
POST = b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + HOST


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server that waits a fraction of a second for what a client owes."""
    with serving(header_timeout=0.3, body_timeout=0.3, write_timeout=0.3, keep_alive=0.3) as running:
        yield running


def refusal(raw: bytes) -> tuple[int, str]:
    """(status, code) of an answer that must be a whole error in OpenAI's shape on a connection that is then
    closed.
    """
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "content-type: application/json" in lines and "connection: close" in lines, raw
    assert "x-content-type-options: nosniff" in lines and any(
        line.startswith("x-request-id: ") for line in lines
    )
    assert f"content-length: {len(body)}" in lines
    error = json.loads(body)["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


def test_a_header_that_does_not_end_is_refused(server: Running) -> None:
    assert refusal(server.exchange(b"GET /x HTTP/1.1\r\nHo")) == (408, "timeout")


def test_a_connection_that_says_nothing_is_closed_in_silence(server: Running) -> None:
    assert server.exchange() == b""


def test_a_body_that_does_not_end_is_refused_and_no_application_sees_it() -> None:
    app = App()
    with serving(app, body_timeout=0.3) as server:
        assert refusal(server.exchange(POST + b'Content-Length: 100\r\n\r\n{"a":')) == (408, "timeout")
        assert refusal(server.exchange(POST + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n')) == (
            408,
            "timeout",
        )
    assert app.seen == []


def test_a_second_request_on_a_connection_has_to_come_in_time_too(server: Running) -> None:
    with server.connect() as client:
        client.sendall(HEALTH + b"\r\n")
        first = b""
        while not first.endswith(b"\r\n0\r\n\r\n"):
            first += client.recv(1 << 16)
        client.sendall(b"GET /x HT")
        assert refusal(read_all(client)) == (408, "timeout")


def test_an_idle_connection_is_closed_after_a_while(server: Running) -> None:
    assert server.exchange(HEALTH + b"\r\n").count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /" + b"a" * 70000, 414),
        (HEALTH + b"A: b\r\n" * 101 + b"\r\n", 431),
        (HEALTH + b"A: " + b"b" * 33000 + b"\r\n\r\n", 431),
        (HEALTH + b"A: " + b"b" * 70000, 431),
        (HEALTH + b"A: b\r\n" * 20000, 431),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /x HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (POST + b"Content-Length: -2\r\n\r\n{}", 400),
        (POST + b"Content-Length: +2\r\n\r\n{}", 400),
        (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"e" * 70000, 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (HEALTH + HOST + b"\r\n", 400),
        (HEALTH + b"Bad Name: x\r\n\r\n", 400),
        (HEALTH + b"A: \x00\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"CONNECT evil.com:80 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"\r\n\r\n\r\n", 400),
    ],
    ids=range(30),
)
def test_what_is_no_request_is_refused_in_json(server: Running, request_: bytes, status: int) -> None:
    assert refusal(server.exchange(request_))[0] == status
    assert server.get("/health").status == 200


def test_random_bytes_end_in_a_refusal_or_in_silence(server: Running) -> None:
    random_ = random.Random(1)
    for i in range(200):
        noise = bytearray(random_.randbytes(random_.randrange(1, 600)))
        if i % 2:  # something like a request, broken somewhere
            noise = bytearray(POST + b"Content-Length: 2\r\n\r\n{}")
            for _ in range(random_.randrange(1, 5)):
                noise[random_.randrange(len(noise))] = random_.randrange(256)
        raw = server.exchange(bytes(noise) + b"\r\n\r\n")
        assert not raw or (200 <= int(raw.split()[1]) < 506 and int(raw.split()[1]) != 500), raw
    assert server.get("/health").status == 200


def test_lengths_that_lie_do_not_mix_two_requests(server: Running) -> None:
    """A body longer than announced is no second request."""
    raw = server.exchange(POST + b"Content-Length: 2\r\n\r\n{}GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
    assert raw.count(b"HTTP/1.1 ") == 1 and raw.startswith(b"HTTP/1.1 200")


def test_of_requests_sent_at_once_the_first_is_answered_and_the_connection_closed(server: Running) -> None:
    raw = server.exchange((HEALTH + b"\r\n") * 3)
    assert raw.count(b"HTTP/1.1 200") == 1


def test_a_client_that_sent_too_much_is_still_seen_to_leave() -> None:
    app = App()
    with serving(app) as server:
        with server.connect() as client:
            client.sendall(b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n" + b"x" * 100_000)
            wait_until(lambda: app.seen, "the request to arrive")
            client.sendall(b"x" * 1000)
            assert server.get("/health").status == 200  # which arrived after it
        wait_until(lambda: app.left, "the application to hear that its client left")


def test_an_answer_before_the_body_reaches_a_client_that_is_still_sending(server: Running) -> None:
    """Closed with bytes unread, TCP would reset the connection, and who fails to send does not read why."""
    for _ in range(5):
        with server.connect() as client:
            client.sendall(POST + b"Content-Length: 10485760\r\n\r\n" + b" " * (10 << 20))
            assert refusal(read_all(client)) == (413, "too_large")


def test_a_reader_that_stalls_is_dropped(server: Running) -> None:
    with server.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /large HTTP/1.1\r\n" + HOST + b"\r\n")
        wait_until(lambda: server.connections == 1, "the connection")
        wait_until(lambda: server.connections == 0, "the server to drop a reader that stalls")


def test_a_reader_that_stalls_when_all_is_written_is_dropped_too(server: Running) -> None:
    """The application is done, the connection is closing, and what is left waits for its reader."""
    with server.connect() as client:
        client.sendall(b"GET /whole HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
        assert client.recv(1)
        wait_until(lambda: server.connections == 0, "the server to drop a reader that stalls")


def test_a_reader_that_is_only_slow_gets_everything() -> None:
    with serving(write_timeout=3.0) as server, server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
        received = 0
        for _ in range(6):
            time.sleep(0.2)
            received += len(client.recv(4 << 20))
        while part := client.recv(1 << 20):
            received += len(part)
        assert received > 64 << 20


def test_a_client_is_served_beside_a_hundred_that_send_a_byte_now_and_then(server: Running) -> None:
    clients = [server.connect() for _ in range(100)]
    try:
        for i, byte in enumerate(b"GET /"):
            for client in clients:
                try:
                    client.sendall(bytes([byte]))
                except OSError:
                    pass  # dropped already
            assert server.ask("POST", "/x", {"content-type": "application/json"}, b"{}").status == 200, i
        wait_until(lambda: server.connections == 0, "every slow connection to be closed")
        assert refusal(read_all(clients[0])) == (408, "timeout")
    finally:
        for client in clients:
            client.close()


def test_a_connection_too_many_is_told_so_at_once() -> None:
    with serving(connections=3) as server:
        held = [server.connect() for _ in range(3)]
        wait_until(lambda: server.connections == 3, "three connections")
        raw = server.exchange(HEALTH + b"\r\n")
        assert refusal(raw) == (503, "overloaded") and b"\r\nretry-after: 1\r\n" in raw
        for client in held:
            client.close()
        wait_until(lambda: server.connections == 0, "the connections to end")
        assert server.get("/health").status == 200


def test_no_answer_names_the_server_or_its_version(server: Running) -> None:
    for raw in (server.get("/health").raw, server.get("/nothing").raw, server.exchange(b"x\r\n\r\n")):
        assert b"uvicorn" not in raw.lower() and b"\r\nserver:" not in raw.lower()


def test_an_expectation_is_met_only_if_the_body_is_wanted(server: Running) -> None:
    expect = POST + b"Expect: 100-continue\r\nContent-Length: "
    with server.connect() as client:
        client.sendall(expect + b"2\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"{}")
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    assert refusal(server.exchange(expect + b"99999999\r\n\r\n")) == (413, "too_large")
