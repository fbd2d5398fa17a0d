"""run.py -m serve as it is typed: what it says before it is ready, while it serves, and when it stops.

python -m pytest tests/terminal/test_serve.py
"""

from __future__ import annotations

import json
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from screen import ROOT, SHELL, Terminal, run_typed
from small_models import TINY_QWEN3

SERVE = [
    sys.executable,
    str(ROOT / "run.py"),
    str(TINY_QWEN3),
    "-m",
    "serve",
    "--port",
    "0",
    "-j",
    "1",
    "--cache-memory",
    "16 MiB",
]


def port(terminal: Terminal) -> int:
    """Where it listens, once it says so; a narrow terminal breaks the line between words."""
    terminal.wait_for("no API keys")
    found = re.search(r"http://127\.0\.0\.1:(\d+)", terminal.text)
    assert found, terminal.text
    return int(found[1])


def ask(port: int) -> dict[str, object]:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def test_it_says_what_it_serves_answers_and_ends_on_ctrl_c() -> None:
    with Terminal(SERVE, columns=200) as t:
        assert ask(port(t))["object"] == "chat.completion"
        t.wait_for("POST /v1/chat/completions 200 ")
        first, *log = t.lines
        assert re.fullmatch(
            r"serving tiny-qwen3 at http://127\.0\.0\.1:\d+ \| context 2048 of 2048 \| KV f16: \S+ \S+ in all"
            r" \| threads 1 \| \w+ \| no API keys",
            first,
        )
        assert len(log) == 1 and " 12 in, 0 cached, 4 out | " in log[0]
        t.press("ctrl-c")
        assert t.finish() == 0
        assert "Traceback" not in t.text and "error" not in t.text, t.text
        t.assert_left_as_found()


@pytest.mark.parametrize("columns", [80, 20])
def test_a_dumb_or_narrow_terminal_gets_plain_lines_between_words(columns: int) -> None:
    with Terminal(SERVE, columns=columns, env={"TERM": "dumb"}) as t:
        t.wait_for("keys")
        t.send_signal(signal.SIGTERM)
        assert t.finish() == 0
        assert b"\x1b" not in t.raw
        said = " ".join(t.lines)
        assert "| context 2048 of 2048 | KV f16:" in said, t.text


def test_a_window_that_closes_ends_it() -> None:
    with Terminal(SERVE) as t:
        port(t)
        t.hang_up()
        assert t.finish_unseen() == 128 + signal.SIGHUP


def test_it_serves_on_while_the_window_changes_and_after_it_was_suspended() -> None:
    with Terminal(SHELL, columns=200) as t:
        t.type("PS1='$ '; clear\r")
        t.wait_until(lambda: t.current_line == "$", "the prompt of the shell")
        t.type(" ".join(f"'{word}'" for word in SERVE) + "\r")
        where = port(t)
        t.resize(60, 20)
        assert ask(where)["object"] == "chat.completion"
        t.press("ctrl-z")
        t.wait_for("Stopped")
        t.type("fg\r")
        assert ask(where)["object"] == "chat.completion"
        t.press("ctrl-c")
        t.wait_until(lambda: t.current_line == "$", "the prompt of the shell")
        t.type("echo status $?\r")
        t.wait_for("status 0")


def test_nohup_and_an_ampersand_leave_it_running(tmp_path: Path) -> None:
    """Ctrl-C in the shell that started it is not for it; SIGTERM is."""
    with Terminal(SHELL, columns=200, cwd=tmp_path) as t:
        t.type("PS1='$ '; clear\r")
        t.wait_until(lambda: t.current_line == "$", "the prompt of the shell")
        t.type("nohup " + " ".join(f"'{word}'" for word in SERVE) + " > out 2> err &\r")
        t.wait_until(
            lambda: (tmp_path / "err").exists() and "no API keys" in (tmp_path / "err").read_text(),
            "the server",
        )
        t.press("ctrl-c")
        t.type("kill -HUP $!; sleep 0.3; kill -TERM $! && wait $!; echo status $?\r")
        t.wait_for("status 0")
        assert (tmp_path / "out").read_text() == ""


def test_stdout_stays_empty_and_any_stream_may_be_a_pipe(tmp_path: Path) -> None:
    command = " ".join(f"'{word}'" for word in SERVE)
    with Terminal(["bash", "-c", f"exec {command} < /dev/null | tee out"], cwd=tmp_path) as t:
        assert ask(port(t))["object"] == "chat.completion"
        t.press("ctrl-c")
        t.finish()
        assert (tmp_path / "out").read_text() == "" and "Traceback" not in t.text
    with Terminal(["bash", "-c", f"exec {command} 2> err"], cwd=tmp_path) as t:
        err = tmp_path / "err"
        t.wait_until(lambda: err.exists() and "no API keys" in err.read_text(), "the server")
        t.press("ctrl-c")
        assert t.finish() == 0
        assert "\x1b" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 lets other computers in, which takes keys: --api-keys FILE (a line: NAME KEY)",
        ),
        (["--api-keys", "nothing"], "nothing: No such file or directory"),
        (["--config", "nothing"], "nothing: No such file or directory"),
        (["--config", "bad.toml"], "bad.toml: prot: there is no such setting; did you mean port?"),
        (["--model-alias", "a"], "argument --model-alias: 'a' is not NAME=PATH"),
        (
            ["--model-alias", "a=nothing"],
            "nothing: No such file or directory; `python export.py DIR model.bin` makes one",
        ),
        (["--port", "70000"], "--port: expected a whole number from 0 to 65535, not 70000"),
        (
            ["--cache-memory", "2 G"],
            "--cache-memory: expected bytes, such as 2147483648 or \"2 GiB\", not '2 G'",
        ),
        (["--isa", "x86"], "x86"),
        (["--fd", "99"], "file descriptor 99 is no socket: Bad file descriptor"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_it_refuses_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "bad.toml").write_text("prot = 1\n")
    status, text, _ = run_typed([*SERVE, *arguments], columns=250, cwd=tmp_path)
    lines = [line for line in text.splitlines() if line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("run.py: error: "), text
    assert said in lines[0]


def test_the_configuration_is_printed_and_read_back(tmp_path: Path) -> None:
    def printed(*arguments: str) -> str:
        status, text, _ = run_typed(
            [*SERVE[:2], *arguments, "--print-config"], columns=250, rows=80, cwd=tmp_path
        )
        assert status == 0, text
        return text + "\n"

    first = printed(str(TINY_QWEN3), "-m", "serve", "--running", "3", "--model-alias", "b=b.bin")
    assert "running = 3\n" in first and f'path = "{tmp_path}/b.bin"' in first
    (tmp_path / "serve.toml").write_text(first)
    assert printed("--config", "serve.toml") == first
