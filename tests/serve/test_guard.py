"""Who is let in: every request is decided on its header, before any route is looked up.

python -m pytest tests/serve/test_guard.py
"""

from __future__ import annotations

import itertools
import json
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_server import JSON, PATIENCE, App, Running, serving

SECRET = "sk-c0ffee-and-more"
BEARER = {"authorization": f"Bearer {SECRET}"}
SITE = "https://chat.example.com"
ROUTES = [
    "/",
    "/health",
    "/metrics",
    "/props",
    "/openapi.json",
    "/tokenize",
    "/detokenize",
    "/mcp",
    "/rerank",
    "/page/tools",
    "/v1/models",
    "/v1/chat/completions",
    "/chat/completions",
    "/models/m",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models/some%2Fmodel",
    "/nothing",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]


@pytest.fixture(scope="module")
def open_server() -> Iterator[Running]:
    with serving(max_body=1000, cors_origins=(SITE,), allowed_hosts=("llm.lan",)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# comment\nalice {SECRET} running=2\nbob sk-another-key\n")
    keys.chmod(0o600)
    with serving(api_keys_file=str(keys), cors_origins=(SITE,)) as server:
        yield server


# ----------------------------------------------------------------------------
# Host and Origin


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in (
                "localhost",
                "LOCALHOST:1",
                "127.0.0.1",
                "127.0.0.1:8080",
                "[::1]",
                "[::1]:80",
                "llm.lan",
                "LLM.lan:9",
            )
        ),
        *(
            (host, 403)
            for host in (
                "evil.com",
                "evil.com:8080",
                "localhost.evil.com",
                "evil.localhost",
                "127.0.0.1.evil.com",
                "localhost@evil.com",
                "localhost:80:80",
                "localhost:",
                "localhost:x",
                "localhost/",
                "localhost#",
                "localhost?",
                "localhost, evil.com",
                "10.0.0.1",
                "127.0.0.2",
                "0x7f000001",
                "[::]",
                "::1",
                "localhost ",
                "\xe9",
                "*",
                ".",
                "xn--lcalhost-",
            )
            if host != "localhost "
        ),
    ],
)
def test_only_names_of_this_computer_are_served(open_server: Running, host: str, status: int) -> None:
    """Another Host is a page whose DNS was pointed here."""
    assert open_server.get("/x", host=host).status == status


def test_a_host_that_is_empty_or_missing_is_refused(open_server: Running) -> None:
    assert b" 403 " in open_server.exchange(b"GET /health HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n")
    assert b" 403 " in open_server.exchange(b"GET /health HTTP/1.0\r\n\r\n")


def test_a_server_for_other_computers_is_asked_for_by_any_of_its_addresses_but_by_no_other_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "keys").write_text(f"alice {SECRET}\n")
    with serving(host="0.0.0.0", api_keys_file=str(tmp_path / "keys")) as server:
        for host, status in (
            ("192.168.1.7:8080", 200),
            ("[fe80::1]", 200),
            ("localhost", 200),
            ("evil.com", 403),
        ):
            assert server.ask("GET", "/x", {"host": host, **BEARER}).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (SITE, 200),
        ("http://localhost:{port}", 200),
        ("https://localhost:{port}", 200),
        *(
            (origin, 403)
            for origin in (
                "https://evil.com",
                "null",
                SITE + ".evil.com",
                SITE + "/",
                SITE.replace("https", "http"),
                SITE.upper(),
                "http://localhost",
                "http://localhost:1",
                "http://127.0.0.1:{port}",
                "file://",
                "*",
                "chrome-extension://x",
                "localhost:{port}",
            )
        ),
    ],
)
def test_only_pages_from_here_and_of_listed_sites_may_ask(
    open_server: Running, origin: str, status: int
) -> None:
    answer = open_server.get("/x", origin=origin.format(port=open_server.port))
    assert answer.status == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (SITE if origin == SITE else None)
    assert "access-control-allow-credentials" not in answer.headers


def test_a_listed_page_can_read_errors_and_the_headers_that_matter(locked: Running) -> None:
    answer = locked.get("/x", origin=SITE)
    assert answer.status == 401 and answer.headers["access-control-allow-origin"] == SITE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "origin"


def test_a_listed_page_may_ask_first_what_it_may_send(locked: Running) -> None:
    """Without a key, which browsers do not send then."""
    asked = {
        "origin": SITE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "Authorization, content-type,x-api-key, x-stainless-os, "
        "anthropic-version, x-evil",
    }
    answer = locked.ask("OPTIONS", "/v1/chat/completions", asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == SITE.lower()
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert allowed == ["authorization", "content-type", "x-api-key", "x-stainless-os", "anthropic-version"]
    assert "post" in answer.headers["access-control-allow-methods"]
    for changed in ({"origin": "https://evil.com"}, {"origin": ""}, {"host": "evil.com"}):
        answer = locked.ask("OPTIONS", "/v1/chat/completions", {**asked, **changed})
        assert answer.status in (401, 403)


# ----------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {SECRET[:-1]}"},
        {"authorization": f"Bearer {SECRET}x"},
        {"authorization": SECRET},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": "Bearer \xe9\xff"},
        {"authorization": f"Bearer {SECRET}\xa0"},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"authorization": f"Bearer {SECRET}", "x-api-key": "sk-another-key"},
        {"authorization": f"Bearer {SECRET}", "x-api-key": "wrong"},
        {"authorization": f"Bearer {SECRET}", "Authorization": f"Bearer {SECRET}"},
        {"x-api-key": SECRET, "X-Api-Key": SECRET},
        {"authorization": f"Bearer {SECRET.upper()}"},
        {"cookie": f"key={SECRET}"},
        {"authorization": "Bearer " + "k" * 9000},
    ],
    ids=range(18),
)
def test_without_one_right_key_every_route_and_method_is_refused(
    locked: Running, headers: dict[str, str]
) -> None:
    for method, path in itertools.product(METHODS, ROUTES):
        if method in ("GET", "HEAD") and path in ("/", "/health"):
            continue
        answer = locked.ask(method, path, headers)
        assert answer.status == 401, (method, path)
        assert answer.headers["www-authenticate"] == "bearer"
        if method != "HEAD":
            assert SECRET not in answer.raw.decode("latin-1") and "error" in answer.json


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "/Health",
        "//health",
        "/health/../v1/models",
        "/./health",
        "/health%2f..%2fv1%2fmodels",
        "/%68ealth",
        "http://localhost/health",
        "/v1/models?/health",
        "/health;/v1/models",
        "/v1/models#/health",
        "/v1/models/../../health",
        "*",
        "/health%00",
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(locked: Running, path: str) -> None:
    app = locked.service._guard._app
    assert isinstance(app, App)
    before = len(app.seen)
    for host in (
        "",
        "localhost/health",
        "localhost/?",
        "localhost/health?x=",
    ):  # a URL made of it would be another
        answer = locked.ask("GET", path, {"host": host} if host else {})
        assert answer.status in (400, 401, 403, 404)
    assert len(app.seen) == before


@pytest.mark.parametrize(
    "headers",
    [BEARER, {"authorization": f"bearer  {SECRET}"}, {"x-api-key": SECRET}, {**BEARER, "x-api-key": SECRET}],
)
def test_with_a_right_key_the_application_knows_whose_it_is(locked: Running, headers: dict[str, str]) -> None:
    assert locked.ask("GET", "/v1/models", headers).json["key"] == "alice"


def test_health_and_the_page_itself_need_no_key(locked: Running) -> None:
    for method, path in itertools.product(("GET", "HEAD"), ("/", "/health", "/health?x=1")):
        assert locked.ask(method, path).status == 200


def test_errors_have_the_shape_of_their_surface(locked: Running) -> None:
    assert locked.get("/v1/messages").json["type"] == "error"
    error = locked.get("/v1/chat/completions").json["error"]
    assert (error["code"], error["param"]) == ("invalid_api_key", None)


# ----------------------------------------------------------------------------
# Path and body


BAD_PATHS = [
    "/../",
    "/%2e%2e/",
    "/..%5c",
    "//",
    "//x",
    "/x//y",
    "/a/../b",
    "/a/./b",
    "/..",
    "/.",
    "/a/..",
    "/%00",
    "/x%00.html",
    "/%2e",
    "/x%2fy",
    "/%",
    "/%zz",
    "/x\\y",
    "/..\\",
    "/etc/passwd/../..",
    "/v1/models/..",
    "/v1/models/%2e%2e",
    "/v1/models/a%2f..%2fb",
    "/v1/models/%00",
    "/v1/models/a%5cb",
    "/v1/models/%0d%0aset-cookie:x",
    "/v1/models//x",
    "/v1/models/%2f%2fx",
    "http://evil.com/",
    "https://localhost/",
    "/|",
    '/"',
    "/<script>",
    "/'",
    "/{x}",
    "/x;y",
    "/$x",
    "/~/../x",
    "*",
    "/%u002e",
    "/%c0%ae%c0%ae/",
    "/%252e%252e/%2e",
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_no_odd_path_reaches_a_route(open_server: Running, path: str) -> None:
    answer = open_server.get(path)
    assert answer.status == 404 and answer.json["error"]["code"] == "not_found"
    assert "passwd" not in answer.body.decode()


def test_two_hundred_climbing_paths_reach_no_route(open_server: Running) -> None:
    up = ["..", "%2e%2e", ".%2e", "%2E.", "..%2f..", "%252e%252e/..", "..\\..", "..%5c.."]
    ends = ["etc/passwd", "model.bin", "proc/self/environ", "keys", ""]
    for start, step, times, end in itertools.product(("/", "/v1/models/"), up, (1, 4, 9), ends):
        assert open_server.get(start + "/".join([step] * times) + "/" + end).status == 404


def test_names_of_models_may_have_slashes_and_escapes(open_server: Running) -> None:
    for path in ("/v1/models/a/b", "/v1/models/Qwen%2FQwen3-0.6B", "/v1/models/a%3Ab", "/v1/models/a%20b"):
        assert open_server.get(path).status == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ('application/json;charset="utf-8"', 200),
        ("", 415),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/json; charset=utf-16", 415),
        ("application/jsonx", 415),
        ("application/json, text/plain", 415),
        ("*/*", 415),
    ],
)
def test_a_body_is_plain_json(open_server: Running, kind: str, status: int) -> None:
    """What a page may send without asking first is none of it."""
    assert open_server.ask("POST", "/x", {"content-type": kind}, b"{}").status == status


def test_a_compressed_body_is_refused(open_server: Running) -> None:
    assert open_server.ask("POST", "/x", {**JSON, "content-encoding": "gzip"}, b"{}").status == 415


def test_a_post_without_a_body_needs_no_type(open_server: Running) -> None:
    assert open_server.ask("POST", "/x", {"content-length": "0"}).status == 200


def test_the_largest_body_arrives_whole_and_a_larger_one_not_at_all(open_server: Running) -> None:
    chunked = {**JSON, "transfer-encoding": "chunked", "content-length": ""}
    for size, status in ((1000, 200), (1001, 413)):
        body = b"x" * size
        whole = open_server.ask("POST", "/x", JSON, body)
        parts = open_server.ask(
            "POST",
            "/x",
            chunked,
            b"a\r\n" + body[:10] + b"\r\n%x\r\n" % (size - 10) + body[10:] + b"\r\n0\r\n\r\n",
        )
        assert whole.status == parts.status == status
        if status == 200:
            assert whole.json["body"] == parts.json["body"] == body.decode()


def test_large_bodies_that_are_read_at_once_are_bounded_together() -> None:
    with serving(max_body=100_000) as server:
        head = b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += b"content-length: 100000\r\n\r\n"
        clients = [server.connect() for _ in range(17)]
        for client in clients:
            client.sendall(head + b" " * 99_999)
        answered, _, _ = select.select(clients, [], [], PATIENCE)
        answers = [client.recv(100) for client in answered]
        assert len(answers) == 1 and b" 503 " in answers[0]
        for client in clients:
            client.close()


# ----------------------------------------------------------------------------
# Every answer


def test_every_answer_has_the_headers_that_keep_browsers_from_guessing(
    open_server: Running, locked: Running
) -> None:
    answers = [
        open_server.get("/x"),
        open_server.get("/%"),
        open_server.get("/x", host="evil.com"),
        locked.get("/x"),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert len(answer.headers["x-request-id"]) > 8


def test_a_request_id_is_taken_over_if_it_is_plain(open_server: Running) -> None:
    assert open_server.get("/x", x_request_id="abc-1.2_3").headers["x-request-id"] == "abc-1.2_3"
    for odd in ("a b", "a\x1b[31m", "a" * 129, "\xe9", "<x>"):
        answer = open_server.get("/x", x_request_id=odd)
        if answer.status == 200:  # h11 refuses some
            assert answer.headers["x-request-id"].startswith("req_")


def test_an_application_that_fails_is_a_plain_500(capsys: pytest.CaptureFixture[str]) -> None:
    canary = "the-prompt-in-an-exception"
    with serving(App(secret=canary)) as server:
        answer = server.get("/fails")
        assert answer.status == 500 and answer.json["error"]["type"] == "server_error"
        assert (
            b"Traceback" not in answer.raw and canary.encode() not in answer.raw and b".py" not in answer.raw
        )
        cut = server.get("/breaks")
        assert cut.status == 200 and not cut.raw.endswith(b"0\r\n\r\n"), (
            "an answer that broke off looks complete"
        )
        assert server.get("/x").status == 200
    said = capsys.readouterr().err
    assert "RuntimeError at small_server.py" in said and answer.headers["x-request-id"] in said
    assert canary not in said and "Traceback" not in said


def test_a_websocket_is_refused(open_server: Running) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "x",
    }
    with open_server.connect() as client:
        lines = [f"{name}: {value}" for name, value in {"host": "localhost", **upgrade}.items()]
        client.sendall("\r\n".join(["GET /x HTTP/1.1", *lines, "", ""]).encode())
        assert b" 101 " not in client.recv(1 << 16)


def test_the_body_of_the_answer_is_json(open_server: Running) -> None:
    assert json.loads(open_server.ask("POST", "/x", JSON, b"[1]").body)["body"] == "[1]"
