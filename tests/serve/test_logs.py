"""The log: a line a request, of numbers and names; never what was said.

python -m pytest tests/serve/test_logs.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from small_server import JSON, App, serving

from qwen3c.serve.logs import Log, Record


def lines(level: str, as_json: bool, *records: Record) -> list[str]:
    stream = io.StringIO()
    log = Log(level, as_json, stream)
    for record in records:
        log.request(record)
    return stream.getvalue().splitlines()


def record(**fields: object) -> Record:
    made = Record("POST", "/v1/chat/completions", "req_1", status=200)
    for name, value in fields.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    return made


def test_a_line_has_what_is_known() -> None:
    known = record(
        seconds=1.234,
        queue=0.003,
        prompt=812,
        cached=790,
        completion=215,
        rate=9.84,
        key="alice",
        model="m",
        backend="local",
    )
    (line,) = lines("info", False, known)
    stamp, _, rest = line.partition(" ")
    assert stamp.endswith("Z") and "T" in stamp
    assert rest == (
        "POST /v1/chat/completions 200 1234 ms | queued 3 ms | 812 in, 790 cached, 215 out | 9.8 tok/s"
        " | m | local | key alice | req_1"
    )


def test_json_has_the_same_by_names() -> None:
    found = json.loads(lines("info", True, record(seconds=1.5, prompt=8, key="alice"))[0])
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "info",
        "event": "request",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "ms": 1500,
        "prompt_tokens": 8,
        "key": "alice",
        "request_id": "req_1",
    }


def test_levels_sort_by_what_went_wrong() -> None:
    records = [record(status=status, seconds=0.0) for status in (200, 404, 500)] + [
        record(path="/health", seconds=0.0)
    ]
    assert [len(lines(level, False, *records)) for level in ("debug", "info", "warning", "error")] == [
        4,
        3,
        2,
        1,
    ]
    assert (
        " warning: " in lines("info", False, records[1])[0]
        and " error: " in lines("info", False, records[2])[0]
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_stays_a_line_whatever_a_client_sends(as_json: bool) -> None:
    hostile = record(path="/\x1b[31m\n2026 forged\r\x9b" + "x" * 1000, seconds=0.0)
    found = lines("info", as_json, hostile)
    assert len(found) == 1 and "\x1b" not in found[0] and "\x9b" not in found[0] and len(found[0]) < 500


@pytest.mark.parametrize("as_json", [False, True])
def test_no_prompt_reply_key_or_query_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """At the level that says most, whatever the request comes to."""
    (tmp_path / "keys").write_text("alice sk-canary\n")
    good, wrong = {**JSON, "x-api-key": "sk-canary"}, {**JSON, "authorization": "Bearer sk-canary2"}
    body = b'{"prompt": "canary"}'
    with serving(
        App("canary"), api_keys_file=str(tmp_path / "keys"), log_json=as_json, log_level="debug"
    ) as server:
        for path in ("/x?q=canary", "/fails", "/breaks", "/%?canary", "/v1/models?key=canary"):
            for headers in (
                good,
                wrong,
                {**good, "host": "evil.com"},
                {**good, "content-type": "text/canary"},
            ):
                server.ask("POST", path, headers, body)
        server.exchange(b"canary canary\r\n\r\n")
        server.exchange(
            b"POST /x HTTP/1.1\r\nHost: localhost\r\ncanary: canary\r\nTransfer-Encoding: canary\r\n\r\n"
        )
    captured = capsys.readouterr()
    assert "canary" not in captured.err and captured.out == ""
    assert captured.err.count("alice") >= 3
