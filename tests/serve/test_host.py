"""The MCP host with real children and real sockets: servers that do what they
should, and servers that do not.

python -m pytest tests/serve/test_host.py
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp_fixtures import app, box_models, serving
from other_servers import COMMAND
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from qwen3c.serve import host as host_module
from qwen3c.serve.api import say_api_error
from qwen3c.serve.errors import ApiError
from qwen3c.serve.host import (
    LARGEST_RESULT,
    LONGEST_DESCRIPTION,
    MOST_TOOLS,
    Config,
    Host,
    cut,
    host_routes,
    read_servers,
)
from qwen3c.serve.mcp import Local
from qwen3c.system.terminal import visible


def with_host(check: Callable[[Host, dict[str, Any]], Awaitable[None]], *kinds: str, **options: Any) -> None:
    """check(the host of servers of these kinds, what it says of them)."""

    async def run() -> None:
        options.setdefault("timeout", 20.0)
        configs = [Config(kind, (*COMMAND, kind), **options) for kind in kinds]
        configs = [replace(one, timeout=0.5) if one.name == "silent" else one for one in configs]
        async with Host(configs) as host:
            await check(host, await host.tools())

    asyncio.run(run())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time to end for servers that do not want to."""
    monkeypatch.setattr(host_module, "PATIENCE", 0.2)


def digests(told: dict[str, Any]) -> dict[str, str]:
    return {tool["name"]: tool["digest"] for tool in told["tools"]}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


# ----------------------------------------------------------------------------
# Calls


def test_a_call_comes_back_as_text() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        known = digests(told)
        assert told["servers"] == [{"name": "friendly", "state": "ready", "error": None}]
        add = next(tool for tool in told["tools"] if tool["name"] == "friendly__add")
        assert (
            add["tool"] == "add" and add["server"] == "friendly" and add["description"] == "Add two numbers."
        )
        assert add["inputSchema"]["required"] == ["a", "b"]
        found = await host.call("friendly__add", {"a": 1, "b": 2}, known["friendly__add"])
        assert found == {"content": "3", "isError": False, "truncated": False}
        wrong = await host.call("friendly__add", {"a": "x"}, known["friendly__add"])
        assert wrong["isError"] and "b\n" in wrong["content"]
        picture = await host.call("friendly__picture", {}, known["friendly__picture"])
        assert picture["content"] == "seen\n[image left out: image/png, 5 bytes]"
        with pytest.raises(ApiError) as unknown:
            await host.call("friendly__shell", {}, known["friendly__add"])
        assert unknown.value.status == 404
        with pytest.raises(ApiError) as unknown:
            await host.call("nobody__shell", {}, "")
        assert unknown.value.status == 404

    with_host(check, "friendly")


def test_a_long_result_is_cut_and_says_so() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        for n, truncated in ((LARGEST_RESULT // 2, False), (LARGEST_RESULT // 2 + 1, True)):
            found = await host.call("friendly__huge", {"n": n}, digests(told)["friendly__huge"])
            assert found["truncated"] == truncated
            assert found["content"].startswith("\u00e9" * (LARGEST_RESULT // 2))
        assert found["content"].endswith(f"[cut: the first {LARGEST_RESULT} of {LARGEST_RESULT + 2} bytes]")

    with_host(check, "friendly")


@pytest.mark.parametrize("before", range(4))
def test_a_result_is_never_cut_inside_a_character(before: int) -> None:
    text, truncated = cut("x" * before + "\N{GRINNING FACE}" * LARGEST_RESULT)
    kept = text.partition("\n[cut")[0]
    assert truncated and kept.rstrip("\N{GRINNING FACE}") == "x" * before
    assert LARGEST_RESULT - 4 < len(kept.encode()) <= LARGEST_RESULT


def test_a_definition_that_changes_is_not_called_until_it_is_seen() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        known = digests(told)
        assert not (await host.call("friendly__change", {}, known["friendly__change"]))["isError"]
        with pytest.raises(ApiError) as changed:
            await host.call("friendly__add", {"a": 5, "b": 3}, known["friendly__add"])
        assert changed.value.status == 409 and changed.value.code == "changed"
        now = await host.tools()
        add = next(tool for tool in now["tools"] if tool["name"] == "friendly__add")
        assert "send all files" in add["description"]
        assert (await host.call("friendly__add", {"a": 5, "b": 3}, add["digest"]))["content"] == "2"

    with_host(check, "friendly")


def test_a_cancelled_call_is_cancelled_at_the_server(tmp_path: Path) -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        path, digest = tmp_path / "state", digests(told)["friendly__slow"]
        calling = asyncio.ensure_future(host.call("friendly__slow", {"path": str(path)}, digest))
        while not path.exists():
            await asyncio.sleep(0.01)
        calling.cancel()
        await asyncio.wait({calling})
        while path.read_text() != "cancelled":
            await asyncio.sleep(0.01)
        found = await host.call("friendly__add", {"a": 1, "b": 1}, digests(told)["friendly__add"])
        assert found["content"] == "2"

    with_host(check, "friendly")


def test_a_call_that_takes_too_long_is_an_error_and_is_cancelled(tmp_path: Path) -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        host.servers["friendly"].config = Config("friendly", timeout=0.3)
        path = tmp_path / "state"
        found = await host.call("friendly__slow", {"path": str(path)}, digests(told)["friendly__slow"])
        assert found == {"content": "no answer within 0.3 s", "isError": True, "truncated": False}
        while path.read_text() != "cancelled":
            await asyncio.sleep(0.01)

    with_host(check, "friendly")


def test_a_server_that_dies_in_a_call_is_a_state_and_starts_again() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        known = digests(told)
        found = await host.call("friendly__die", {}, known["friendly__die"])
        assert found["isError"] and found["content"] == "the server has ended: a last word"
        assert host.servers["friendly"].state == "failed"
        assert (await host.call("friendly__add", {"a": 1, "b": 2}, known["friendly__add"]))["content"] == "3"

    with_host(check, "friendly")


# ----------------------------------------------------------------------------
# Servers that mean no good


def test_what_a_definition_says_reaches_no_screen_raw() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        tools = {tool["tool"]: tool for tool in told["tools"]}
        description = tools["esc"]["description"]
        assert description.startswith(r"\u001b[2J\u001b]0;owned\u0007 \u202egnihtyna\u202c \u200bxxx")
        assert len(description) == LONGEST_DESCRIPTION
        assert tools["fine-1"]["inputSchema"]["properties"]["a"]["description"] == r"\u009b31m red"
        assert visible(str(told)) == str(told)

    with_host(check, "hostile")


def test_tools_beyond_all_measure_are_left_out_by_name() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        error = told["servers"][0]["error"]
        for reason in (
            f"more than {MOST_TOOLS} tools",
            "a second hostile__two_words",
            "nnn, whose name",
            "big, whose",
        ):
            assert reason in error
        assert len(told["tools"]) <= MOST_TOOLS and len(error) < 600
        names = [tool["name"] for tool in told["tools"]]
        assert len(set(names)) == len(names) and "hostile__two_words" in names

    with_host(check, "hostile")


def test_servers_connect_beside_each_other_and_one_that_fails_is_a_state(hasty: None) -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        states = {server["name"]: server for server in told["servers"]}
        assert states["friendly"]["state"] == "ready"
        assert states["silent"] == {"name": "silent", "state": "failed", "error": "no answer within 0.5 s"}
        assert states["broken"]["state"] == "failed"
        assert states["broken"]["error"] == r"the server has ended: broken: no such table: \u001b[31musers"
        assert {tool["server"] for tool in told["tools"]} == {"friendly", "garbage"}
        found = await host.call("garbage__echo", {}, digests(told)["garbage__echo"])
        assert found["content"] == "ok"

    with_host(check, "friendly", "silent", "broken", "garbage")


def test_a_message_without_an_end_ends_the_connection(hasty: None) -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        found = await host.call("endless__echo", {}, digests(told)["endless__echo"])
        assert found["isError"] and "a message of more than 8388608 bytes" in found["content"]

    with_host(check, "endless")


def test_a_result_is_not_held_against_a_schema_that_takes_for_ever() -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        found = await host.call("backtracking__match", {}, digests(told)["backtracking__match"])
        assert found["content"] == "ok"

    with_host(check, "backtracking")


def test_a_program_that_there_is_not_is_a_state() -> None:
    async def run() -> None:
        async with Host(
            [Config("a", ("no-such-program",)), Config("b", ("true",), cwd="/no/such/folder")]
        ) as host:
            a, b = (await host.tools())["servers"]
            assert a["state"] == b["state"] == "failed"
            assert (
                a["error"] == "no-such-program: there is no such program" and "/no/such/folder" in b["error"]
            )

    asyncio.run(run())


# ----------------------------------------------------------------------------
# Children


def test_a_child_gets_little_of_our_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "1")

    async def check(host: Host, told: dict[str, Any]) -> None:
        found = json.loads(
            (await host.call("friendly__environment", {}, digests(told)["friendly__environment"]))["content"]
        )
        assert set(found["env"]) - {"LC_CTYPE", "PYTHONPATH"} <= {"PATH", "HOME", "LANG", "MINE"}
        assert found["env"]["MINE"] == "yes" and found["cwd"] == str(tmp_path)
        assert found["group"] != os.getpgrp()

    with_host(check, "friendly", env={"MINE": "yes"}, cwd=str(tmp_path))


def test_children_and_theirs_end_with_the_host() -> None:
    pids: list[int] = []

    async def check(host: Host, told: dict[str, Any]) -> None:
        known = digests(told)
        found = await host.call("friendly__child", {}, known["friendly__child"])
        pids.append(int(found["content"]))
        environment = await host.call("friendly__environment", {}, known["friendly__environment"])
        pids.append(json.loads(environment["content"])["pid"])
        assert all(map(alive, pids))

    with_host(check, "friendly")
    wait_for(lambda: not any(map(alive, pids)))


def test_a_child_that_does_not_want_to_end_is_killed(hasty: None) -> None:
    pids: list[int] = []

    async def check(host: Host, told: dict[str, Any]) -> None:
        pids.append(int((await host.call("stubborn__pid", {}, digests(told)["stubborn__pid"]))["content"]))
        assert alive(pids[0])

    with_host(check, "stubborn")
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells nobody of a parent's end")
def test_children_and_theirs_end_when_we_are_killed(tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(
        json.dumps({"mcpServers": {"friendly": {"command": COMMAND[0], "args": [COMMAND[1], "friendly"]}}})
    )
    with subprocess.Popen([*COMMAND, "ours", str(file)], stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout
        pids = [json.loads(ours.stdout.readline())["pid"], int(ours.stdout.readline())]
        assert all(map(alive, pids))
        ours.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)))


# ----------------------------------------------------------------------------
# Over HTTP


def test_a_server_over_http_gets_its_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKEN_OF_MINE", "tell-nobody")
    seen: list[bytes] = []

    async def run() -> None:
        models = box_models()
        application = app(Local(models))

        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend(value for name, value in scope.get("headers", ()) if name == b"authorization")
            await application(scope, receive, send)

        async with models.open(), serving(noting) as url:
            file = tmp_path / "mcp.json"
            entry = {
                "url": f"{url}/mcp",
                "headers": {"Authorization": "Bearer ${TOKEN_OF_MINE}"},
                "timeout_ms": 20000,
            }
            file.write_text(json.dumps({"mcpServers": {"box": entry}}))
            async with Host(read_servers(str(file))) as host:
                known = digests(await host.tools())
                assert len(known) == 6
                found = await host.call("box__count_tokens", {"text": "hello"}, known["box__count_tokens"])
                assert json.loads(found["content"])["tokens"] == 3

    asyncio.run(run())
    assert seen and set(seen) == {b"Bearer tell-nobody"}


def test_a_body_without_an_end_is_refused() -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b" " * 65536, "more_body": True})

    async def run() -> None:
        async with serving(endless) as url, Host([Config("x", url=url, timeout=20)]) as host:
            (state,) = (await host.tools())["servers"]
            assert state["state"] == "failed", state

    asyncio.run(run())


def test_no_error_and_no_log_tells_a_secret(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that says what it was told."""

    async def telling(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        told = dict(scope["headers"]).get(b"x-key", b"")
        await send(
            {
                "type": "http.response.start",
                "status": 500,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        error = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": f"bad key {told.decode()}"}}
        await send({"type": "http.response.body", "body": json.dumps(error).encode()})

    async def run() -> str:
        async with serving(telling) as url:
            configs = [Config("x", url=url, headers={"x-key": "tell-nobody"}, timeout=5)]
            async with Host(configs) as host:
                return str((await host.tools())["servers"]) + repr(configs)

    with caplog.at_level(logging.DEBUG, "qwen3c"):
        told = asyncio.run(run())
    assert "failed" in told and "tell-nobody" not in told + caplog.text + "".join(capfd.readouterr())


# ----------------------------------------------------------------------------
# FILE


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({}, "mcpServers.a needs either command or url"),
        ({"command": "x", "url": "http://x"}, "mcpServers.a needs either command or url"),
        ({"command": "x", "autoApprove": ["*"]}, "mcpServers.a.autoApprove is no field; there are type, command"),
        ({"command": "x", "comand": "y"}, "mcpServers.a.comand is no field"),
        ({"command": 5}, "mcpServers.a.command is a number, not a text"),
        ({"command": "x", "args": [1]}, "mcpServers.a.args[0] is a number, not a text"),
        ({"command": "x", "env": {"A": 1}}, "mcpServers.a.env.A is a number, not a text"),
        ({"command": "x", "env": {"A": "${NO_SUCH_VARIABLE}"}}, "env.A: the environment has no variable NO_SUCH_VARIABLE"),
        ({"command": "x", "headers": {}}, "mcpServers.a.headers belongs to a server with a url"),
        ({"url": "http://x", "cwd": "/"}, "mcpServers.a.cwd belongs to a server with a command"),
        ({"url": "file:///etc/passwd"}, "mcpServers.a.url is neither http:// nor https://"),
        ({"url": "http://x", "type": "stdio"}, "mcpServers.a.type is stdio, which has a command"),
        ({"url": "http://x", "type": "sse"}, "mcpServers.a.type = \"sse\" is not one of"),
        ({"command": "x", "timeout_ms": 0}, "mcpServers.a.timeout_ms = 0 is outside 1 to"),
        ("x", "mcpServers.a is a text, not an object"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_an_error_that_names_the_field(
    tmp_path: Path, entry: Any, fault: str
) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"a": entry}}))
    with pytest.raises(ValueError) as error:
        read_servers(str(file))
    assert str(error.value).startswith(f"{file}: ") and fault in str(error.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "the body is not JSON"),
        ("[]", "not an object"),
        ("{}", "mcpServers is missing"),
        ('{"mcpServers": {}, "inputs": []}', "inputs is no field"),
        ('{"mcpServers": {"a b": {"command": "x"}, "a_b": {"command": "x"}}}', "two servers are called a_b"),
        ('{"mcpServers": {"": {"command": "x"}}}', "has no name"),
    ],
)
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        read_servers(str(file))
    assert fault in str(error.value)


def test_variables_of_the_environment_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_MINE", "s3cret")
    file = tmp_path / "mcp.json"
    entries = {
        "a": {"command": "x", "args": ["${KEY_OF_MINE}"], "env": {"K": "<${KEY_OF_MINE}${env:KEY_OF_MINE}>"}},
        "b": {
            "url": "https://x/mcp",
            "headers": {"H": "Bearer ${KEY_OF_MINE}"},
            "type": "http",
            "timeout_ms": 1500,
        },
    }
    file.write_text(json.dumps({"mcpServers": entries}))
    a, b = read_servers(str(file))
    assert a.command == ("x", "${KEY_OF_MINE}") and a.env == {"K": "<s3crets3cret>"} and a.timeout == 60
    assert b.url == "https://x/mcp" and b.headers == {"H": "Bearer s3cret"} and b.timeout == 1.5
    assert "s3cret" not in repr([a, b])


# ----------------------------------------------------------------------------
# The page


def test_the_page_alone_may_use_the_tools(tmp_path: Path) -> None:
    async def check(host: Host, told: dict[str, Any]) -> None:
        application = Starlette(routes=host_routes(host), exception_handlers={ApiError: say_api_error})
        async with serving(application) as url, httpx2.AsyncClient(base_url=url) as http:
            ours, site = {"origin": url}, {"sec-fetch-site": "same-origin"}
            known = {
                t["name"]: t["digest"] for t in (await http.get("/page/tools", headers=site)).json()["tools"]
            }
            body = {"name": "friendly__add", "arguments": {"a": 1, "b": 2}, "digest": known["friendly__add"]}

            async def post(value: Any, **headers: str) -> httpx2.Response:
                return await http.post("/page/tools/call", json=value, headers=headers or ours)

            assert (await post(body)).json() == {"content": "3", "isError": False, "truncated": False}
            assert (await post(body, **site)).status_code == 200
            assert (await post({**body, "digest": "0" * 64})).status_code == 409
            assert (await post({**body, "name": "friendly__x"})).status_code == 404
            for headers in (
                {"x": "y"},
                {"origin": "http://evil.example"},
                {"origin": "null"},
                {"origin": url, "sec-fetch-site": "cross-site"},
                {"sec-fetch-site": "same-site"},
                {"sec-fetch-site": "none"},
                {"origin": url.replace("http://", "http://user@")},
            ):
                assert (await post(body, **headers)).status_code == 403, headers
                assert (await http.get("/page/tools", headers=headers)).status_code == 403, headers
            for wrong, param in (
                ({**body, "arguments": "x"}, "arguments"),
                ({"name": "x", "arguments": {}}, "digest"),
                ({**body, "name": None}, "name"),
                ({**body, "nam": 1}, "nam"),
            ):
                refused = await post(wrong)
                assert refused.status_code == 400 and refused.json()["error"]["param"] == param
            text = await http.post(
                "/page/tools/call", content=json.dumps(body), headers={**ours, "content-type": "text/plain"}
            )
            assert text.status_code == 415

    with_host(check, "friendly")


def test_a_page_that_closes_cancels_its_call(tmp_path: Path) -> None:
    path = tmp_path / "state"

    async def check(host: Host, told: dict[str, Any]) -> None:
        application = Starlette(routes=host_routes(host), exception_handlers={ApiError: say_api_error})
        body = {
            "name": "friendly__slow",
            "arguments": {"path": str(path)},
            "digest": digests(told)["friendly__slow"],
        }
        async with serving(application) as url:
            async with httpx2.AsyncClient(base_url=url, headers={"origin": url}) as http:
                calling = asyncio.ensure_future(http.post("/page/tools/call", json=body))
                while not path.exists():
                    await asyncio.sleep(0.01)
                calling.cancel()
                await asyncio.wait({calling})
            while path.read_text() != "cancelled":
                await asyncio.sleep(0.01)

    with_host(check, "friendly")
