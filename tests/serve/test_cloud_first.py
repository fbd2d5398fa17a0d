"""Cloud first through the whole program: who answers, what says so, and that no line of the log has the key.

The table row by row, without a server around it, is in test_upstream.py.

python -m pytest tests/serve/test_cloud_first.py
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_provider import ROLE, Provider, Script, chunk, error, event, head, stream
from servers import BOX
from small_server import Running
from test_upstream import EARLY_ERROR, HTML, KEY

from qwen3c.cli.serve import _application
from qwen3c.serve.api import Api
from qwen3c.serve.config import ModelSettings, Settings
from qwen3c.serve.upstream import Settings as Cloud, Upstream

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}
HALF = [head(), ROLE, chunk({"content": "Hel"})]
SNOWMAN = chunk({"content": "☃"})


class Site:
    """A server with a provider before its model."""

    def __init__(self, api: Api, address: str, log: io.StringIO) -> None:
        self._api, self.log = api, log
        self.http = httpx2.Client(base_url=address, timeout=30, trust_env=False)

    def before(self, url: str, **options: Any) -> None:
        """Whom it asks first from now on, with a breaker that never opened."""
        self._api.provider = Upstream(Cloud(url, "M", key=KEY, first_delta=0.3, silence=0.3, **options))

    def ask(self, **fields: Any) -> httpx2.Response:
        return self.http.post(CHAT, json=ASK | fields)

    def state(self) -> dict[str, Any]:
        """What /health says of the provider."""
        found: dict[str, Any] = self.http.get("/health").json()["upstream"]
        return found


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    settings = Settings(models={"box": ModelSettings(str(BOX))}, default_model="box", cache_memory=32 << 20)
    app, api = _application(settings, needs_key=False)
    server = Running(app)
    server.service.log._stream = log = io.StringIO()
    server.thread.start()
    assert server.service.ready.wait(30)
    opened = Site(api, f"http://127.0.0.1:{server.port}", log)
    yield opened
    opened.http.close()
    server.service.stop()
    server.thread.join(30)
    assert not server.thread.is_alive()


@pytest.fixture
def here(site: Site, caplog: pytest.LogCaptureFixture) -> Iterator[Site]:
    """The site; no line of its log and no record of any library has the key."""
    with caplog.at_level("DEBUG"):
        yield site
    said = site.log.getvalue() + caplog.text
    assert "| local |" in said or "| cloud |" in said
    assert KEY not in said and "Traceback" not in said


def texts(response: httpx2.Response) -> tuple[str, list[dict[str, Any]]]:
    """What a stream said, and its events."""
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for one in events for choice in one.get("choices", ())]
    return "".join(pieces), events


def test_a_provider_that_answers_is_named(here: Site) -> None:
    with Provider(stream("Hel", "lo")) as provider:
        here.before(provider.url)
        whole = here.ask()
        assert whole.json()["choices"][0]["message"]["content"] == "Hello"
        assert (whole.headers["x-qwen3c-backend"], whole.headers["x-qwen3c-model"]) == ("cloud", "cloud-m")
        streamed = here.ask(stream=True)
        assert streamed.headers["x-qwen3c-backend"] == "cloud" and texts(streamed)[0] == "Hello"
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert "x-qwen3c-fallback" not in streamed.headers and here.state()["state"] == "ok"
        assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in provider.asked)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def full_backlog() -> tuple[list[socket.socket], str]:
    """A port whose queue of connections is full: nobody accepts, nobody refuses."""
    taken = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [taken]
    for _ in range(4):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(taken.getsockname())
        waiting.append(client)
    return waiting, f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


FALLS_BACK: dict[str, tuple[Script, str, str]] = {  # script, reason, state of the provider after it
    "silent": (["silence"], "first_delta_timeout", "ok"),
    "401": (error(401), "misconfigured", "misconfigured"),
    "404": (error(404), "misconfigured", "misconfigured"),
    "429": (error(429, "retry-after: 77"), "http_429", "open"),
    "500": (error(500), "http_500", "ok"),
    "503": (error(503), "http_503", "ok"),
    "200 HTML": (HTML, "captive", "open"),
    "early error": (EARLY_ERROR, "error_event", "ok"),
    "bad chunk": ([head(), event("{nope")], "not_json", "open"),
    "RST": (["reset"], "cut", "ok"),
    "cut before a word": ([head(), ROLE], "cut", "ok"),
}


@pytest.mark.parametrize("row", FALLS_BACK)
def test_the_model_here_answers_and_says_why(here: Site, row: str) -> None:
    script, reason, state = FALLS_BACK[row]
    here.before("http://127.0.0.1:1/v1", offline=True)
    expected = here.ask()
    with Provider(script) as provider:
        for stream_ in (False, True):
            here.before(provider.url)
            answer = here.ask(stream=stream_)
            assert (answer.status_code, answer.headers["x-qwen3c-backend"]) == (200, "local")
            assert (answer.headers["x-qwen3c-fallback"], answer.headers["x-qwen3c-model"]) == (reason, "box")
            content = texts(answer)[0] if stream_ else answer.json()["choices"][0]["message"]["content"]
            assert content == expected.json()["choices"][0]["message"]["content"]
            assert here.state()["state"] == state and KEY not in answer.text
        assert len(provider.asked) == 2  # never twice for one request


def test_a_provider_that_cannot_be_reached_is_left_alone(here: Site) -> None:
    waiting, full = full_backlog()
    for url, options in ((closed_port(), {}), (full, {"connect": 0.2})):
        here.before(url, **options)
        reasons = [here.ask().headers["x-qwen3c-fallback"] for _ in range(2)]
        assert reasons[0].startswith("connect") and reasons[1] == "breaker_open"
        assert here.state()["state"] == "open"
    for one in waiting:
        one.close()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_wrong_request_is_the_clients(here: Site, status: int) -> None:
    with Provider(error(status)) as provider:
        here.before(provider.url)
        answer = here.ask()
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, f"no: {status}")
        assert here.state()["state"] == "ok"


@pytest.mark.parametrize(
    "script",
    [
        [*HALF, SNOWMAN[: SNOWMAN.index(b"\xe2") + 2]],
        HALF,
        [*HALF, "reset"],
        [*HALF, event("{")],
        [*HALF, "silence"],
    ],
    ids=["cut inside UTF-8", "no [DONE]", "RST", "bad chunk", "stall"],
)
def test_a_reply_that_breaks_off_says_so_and_is_not_gone_on_with(here: Site, script: Script) -> None:
    with Provider(script) as provider:
        here.before(provider.url)
        answer = here.ask(stream=True)
        said, events = texts(answer)
        assert said == "Hel" and events[-1]["error"]["code"] == "upstream_interrupted"
        assert "[DONE]" not in answer.text and answer.headers["x-qwen3c-backend"] == "cloud"


def test_the_program_keeps_its_key_to_itself(tmp_path: Path) -> None:
    with Provider(error(401, body={"error": {"message": f"bad key {KEY}"}})) as provider:
        command = [sys.executable, str(ROOT / "run.py"), str(BOX), "-m", "serve", "--port", "0", "--log-json"]
        command += ["--upstream", provider.url, "--upstream-model", "M"]
        env = {**os.environ, "QWEN3C_UPSTREAM_KEY": KEY}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", first)
            assert found, first
            answers = [httpx2.post(found[0] + CHAT, json=ASK, timeout=30, trust_env=False) for _ in range(2)]
            process.terminate()
            said = first + process.stderr.read()
        assert process.returncode == 0
        assert [answer.headers["x-qwen3c-fallback"] for answer in answers] == ["misconfigured"] * 2
        assert len(provider.asked) == 1 and provider.asked[0].headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in said and "Traceback" not in said
        assert said.count("misconfigured") >= 1
