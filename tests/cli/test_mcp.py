"""-m mcp as an MCP host runs it: a child with pipes, that says the protocol on stdout and nothing else.

python -m pytest tests/cli/test_mcp.py
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp_fixtures import app, box_models, serving
from screen import ROOT
from starlette.types import Receive, Scope, Send

from qwen3c import Model
from qwen3c.serve.mcp import TOOLS, Local
from qwen3c.system.files import MODEL_IN_THE_BOX

RUN = [sys.executable, str(ROOT / "run.py"), "-j", "1", "-m", "mcp"]
NAMES = [tool.name for tool in TOOLS]
LONG = {"prompt": "def f(", "max_tokens": 400, "temperature": 0}


@contextmanager
def child(*options: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    with subprocess.Popen([*RUN, *options], **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def request(id: int, method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n"


INITIALIZE = (
    request(
        1,
        "initialize",
        protocolVersion="2025-11-25",
        capabilities={},
        clientInfo={"name": "t", "version": "1"},
    )
    + b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n'
)


def answers(process: subprocess.Popen[bytes], *lines: bytes) -> Iterator[dict[str, Any]]:
    """What the server says after it was told some lines; stdin stays open."""
    assert process.stdin and process.stdout
    for line in lines:
        process.stdin.write(line)
    process.stdin.flush()
    while line := process.stdout.readline():
        yield json.loads(line)


@pytest.mark.parametrize("era", ["legacy", "auto"])
def test_over_stdio_the_tools_are_the_same(era: str) -> None:
    async def run() -> None:
        parameters = StdioServerParameters(command=RUN[0], args=RUN[1:])
        async with Client(parameters, mode=era) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == NAMES
            found = await client.call_tool(
                "generate", {"prompt": "def add(", "max_tokens": 5, "temperature": 0}
            )
            model = Model(MODEL_IN_THE_BOX, threads=1)
            assert found.structured_content["text"] == model.complete("def add(", 5, temperature=0).text

    asyncio.run(run())


def test_lines_that_are_no_messages_are_answered_and_do_not_end_it() -> None:
    bad = [
        b"{\n",
        b"\xff\xfe\n",
        b"[" * 50_000 + b"\n",
        b'{"jsonrpc": "2.0"}\n',
        b'{"a": "' + b"x" * (5 << 20) + b'"}\n',
    ]
    blank = [b"\n", b"  \r\n"]
    with child() as process:
        told = answers(process, *bad, *blank, INITIALIZE, request(2, "tools/list"))
        errors = [next(told) for _ in bad]
        assert [each["error"]["code"] for each in errors] == [-32700, -32700, -32700, -32600, -32600]
        assert all(each["id"] is None for each in errors)
        assert next(told)["result"]["protocolVersion"] == "2025-11-25"
        assert len(next(told)["result"]["tools"]) == len(NAMES)


def test_half_a_surrogate_pair_is_an_error_of_the_call_or_the_line() -> None:
    line = request(2, "tools/call", name="generate", arguments={"prompt": "\ud800 a", "max_tokens": 1})
    assert b"\\ud800" in line
    with child() as process:
        told = answers(process, INITIALIZE, line, request(3, "tools/list"))
        found = {message["id"]: message for message in (next(told), next(told), next(told))}
        assert "error" in found[2] or found[2]["result"]["isError"], found[2]
        assert found[3]["result"]["tools"]


def test_it_ends_with_stdin_also_in_the_middle_of_a_call() -> None:
    with child() as process:
        told = answers(process, INITIALIZE, request(2, "tools/call", name="generate", arguments=LONG))
        next(told)
        assert process.stdin and process.stderr
        process.stdin.close()
        assert process.wait(20) == 0
        notes = process.stderr.read().decode()
        assert "qwen3c-box" in notes and "Traceback" not in notes


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_with_its_own_status(name: str) -> None:
    number = getattr(signal, name)
    with child() as process:
        told = answers(process, INITIALIZE, request(2, "tools/call", name="generate", arguments=LONG))
        next(told)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr and b"Traceback" not in process.stderr.read()


def test_a_host_that_reads_no_more_is_the_end() -> None:
    with child() as process:
        next(answers(process, INITIALIZE))
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(request(2, "tools/list"))
        process.stdin.flush()
        assert process.wait(20) == 0
        assert b"Traceback" not in process.stderr.read()


def test_a_host_that_stops_reading_does_not_keep_it_from_ending() -> None:
    """The pipe is full when the signal comes."""
    with child() as process:
        next(answers(process, INITIALIZE))
        assert process.stdin
        for i in range(100):
            process.stdin.write(request(i, "tools/list"))
        process.stdin.flush()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


def test_a_cancelled_notification_ends_the_call_over_stdio() -> None:
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 2}}
    with child() as process:
        call = request(2, "tools/call", name="generate", arguments=LONG, _meta={"progressToken": "p"})
        told = answers(process, INITIALIZE, call)
        next(told)
        while "writing" not in next(told).get("params", {}).get("message", ""):
            pass
        told = answers(process, json.dumps(cancel).encode() + b"\n", request(3, "tools/list"))
        seen = []
        for message in told:
            seen.append(message)
            if message.get("id") == 3:
                break
        assert not [each for each in seen if each.get("id") == 2 and "result" in each]
        assert sum("params" in each for each in seen) < 300


def test_a_proxy_over_stdio_loads_nothing_and_sends_its_key() -> None:
    seen: list[bytes] = []

    async def run() -> None:
        models = box_models()
        application = app(Local(models))

        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend(value for name, value in scope.get("headers", ()) if name == b"authorization")
            await application(scope, receive, send)

        async with models.open(), serving(noting) as own:
            parameters = StdioServerParameters(
                command=RUN[0], args=[*RUN[1:], "--url", own], env={"QWEN3C_API_KEY": "secret"}
            )
            async with Client(parameters) as client:
                assert (await client.call_tool("count_tokens", {"text": "a"})).structured_content[
                    "tokens"
                ] == 1

    asyncio.run(run())
    assert seen and set(seen) == {b"Bearer secret"}


def test_what_anybody_else_prints_goes_to_stderr() -> None:
    code = """
import os, sys
from qwen3c.cli.mcp import wire
with wire() as (received, sent):
    print("stray", flush=True)
    os.system("echo of a child; cat")
    os.write(sent, os.read(received, 100))
print("after", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=b"wire\n", capture_output=True, timeout=60
    )
    assert done.stdout == b"wire\nafter\n" and done.stderr == b"stray\nof a child\n"


def test_a_proxy_of_nothing_is_one_line() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run(
            [*RUN, "--url", url], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"error: {url}/mcp: " in done.stderr, done.stderr


def test_with_a_url_no_model_can_be_named() -> None:
    done = subprocess.run(
        [RUN[0], RUN[1], "some.bin", *RUN[2:], "--url", "http://x"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "--url serves the model of a running server" in done.stderr


def test_without_the_sdk_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['mcp'] = None; from qwen3c.cli.run import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "mcp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "run.py: error: MCP needs the extra `mcp`: pip install 'qwen3c[mcp]'"
