"""A chat that asks a provider first, as a person types it: who spoke is on the
screen, whatever the provider does.

python -m pytest tests/terminal/test_cloud.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_provider import ROLE, Provider, Script, chunk, error, head, stream
from screen import ROOT, Terminal
from small_models import TINY_QWEN3

KEY = "sk-canary-77"
COMMAND = [
    sys.executable,
    str(ROOT / "run.py"),
    str(TINY_QWEN3),
    "-m",
    "chat",
    "-j",
    "1",
    "-s",
    "1",
    "--no-think",
    "-n",
    "4",
]
Chat = Callable[..., Terminal]


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    def start(provider: Provider, *options: str) -> Terminal:
        command = [*COMMAND, "--upstream", provider.url, "--upstream-model", "M", *options]
        env = {"XDG_STATE_HOME": str(tmp_path / "state"), "QWEN3C_UPSTREAM_KEY": KEY}
        return Terminal(command, env=env, columns=120)

    return start


def ask(terminal: Terminal, line: str) -> list[str]:
    """Type a line where the prompt stands; what is shown until it stands there again."""
    terminal.wait_until(lambda: terminal.current_line == ">", "the prompt")
    before = len(terminal.lines)
    terminal.type(line + "\r")
    terminal.wait_until(
        lambda: len(terminal.lines) > before and terminal.current_line == ">", f"what {line} brings"
    )
    return terminal.lines[before:-1]


def leave(terminal: Terminal) -> None:
    terminal.wait_until(lambda: terminal.current_line == ">", "the prompt")
    terminal.press("ctrl-d")
    assert terminal.finish() == 0
    terminal.assert_left_as_found()
    assert "Traceback" not in terminal.text and KEY.encode() not in terminal.raw


def said(provider: Provider) -> list[list[tuple[str, str]]]:
    """The messages of each request for a reply."""
    return [[(m["role"], m["content"]) for m in request.body["messages"]] for request in provider.asked]


def test_the_cloud_speaks_first_and_the_model_where_it_fails(chat: Chat) -> None:
    with Provider(stream("Hel\x1b[2J", "lo ☃")) as provider, chat(provider, "-y", "be kind") as t:
        shown = ask(t, "one")
        assert "cloud first: M at 127.0.0.1" in t.text
        assert shown[0] == r"Hel\u001b[2Jlo ☃"  # a provider's control characters reach no terminal either
        assert shown[-1].startswith("cloud: cloud-m | prompt 7 tok | reply 3 tok ")
        provider.answer_with(error(401))
        assert ask(t, "two")[-1].startswith("local: tiny-qwen3 (fallback: misconfigured) | ")
        assert ask(t, "three")[-1].startswith("local: tiny-qwen3 (fallback: misconfigured) | ")
        leave(t)
        assert provider.asked[0].headers["authorization"] == f"Bearer {KEY}"
        first, second = said(provider)
        hello = [("system", "be kind"), ("user", "one"), ("assistant", "Hel\x1b[2Jlo ☃"), ("user", "two")]
        assert (first, second) == (hello[:2], hello)  # both backends have the one conversation


def test_the_backend_is_chosen_and_shown(chat: Chat) -> None:
    with Provider(stream("ok"), error(500)) as provider, chat(provider) as t:
        assert ask(t, "/set backend") == ["backend auto (default)"]
        assert ask(t, "/set backend local") == ["backend local"]
        assert ask(t, "hi")[-1].startswith("local: tiny-qwen3 | ") and not provider.requests
        assert ask(t, "/set backend cloud") == ["backend cloud"]
        assert ask(t, "hi")[-1].startswith("cloud: cloud-m | ")
        assert "error: M: the cloud does not answer: http_500" in ask(t, "again")
        assert "backend cloud" in ask(t, "/set")
        assert "none of auto, local, cloud" in ask(t, "/set backend both")[0]
        leave(t)


def test_a_reply_that_breaks_off_stays_and_can_be_asked_for_again(chat: Chat) -> None:
    cut = [head(), ROLE, chunk({"content": "Hel"})]
    with Provider(cut, stream("Hello")) as provider, chat(provider) as t:
        shown = ask(t, "hi")
        assert shown[0] == "Hel" and shown[-1].endswith("interrupted (cut); /regen asks again")
        assert ask(t, "/regen")[0] == "Hello"
        assert ask(t, "and")[0] == "Hello"
        leave(t)
        assert said(provider)[1:] == [
            [("user", "hi")],
            [("user", "hi"), ("assistant", "Hello"), ("user", "and")],
        ]


def test_ctrl_c_ends_the_cloud_at_once_and_what_came_stays(chat: Chat) -> None:
    slow: Script = [head(), ROLE, chunk({"content": "Hel"}), "silence"]
    with Provider(slow, ["silence"], stream("ok")) as provider, chat(provider) as t:
        t.wait_until(lambda: t.current_line == ">", "the prompt")
        t.type("hi\r")
        t.wait_for("Hel")
        t.press("ctrl-c")
        t.wait_for("| stopped")
        t.wait_until(lambda: t.current_line == ">", "the prompt")
        t.type("more\r")
        t.wait_until(lambda: len(provider.asked) == 2, "the question")
        t.press("ctrl-c")
        t.wait_for("(nothing was said; the question is not kept)")
        assert ask(t, "last")[0] == "ok"
        leave(t)
        assert said(provider)[2] == [("user", "hi"), ("assistant", "Hel"), ("user", "last")]


def test_offline_nothing_leaves_the_machine(chat: Chat) -> None:
    with Provider(stream("ok")) as provider, chat(provider, "--offline") as t:
        assert ask(t, "hi")[-1].startswith("local: tiny-qwen3 (fallback: offline) | ")
        assert "offline: M is not asked" in t.text
        leave(t)
        assert provider.connections == 0


def test_piped_messages_are_answered_by_the_cloud_as_json() -> None:
    with Provider(stream("one"), stream("two"), error(401)) as provider:
        command = [*COMMAND, "--json", "--upstream", provider.url, "--upstream-model", "M"]
        done = subprocess.run(command, input="a\nb\nc\n", capture_output=True, text=True, timeout=60)
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [line["text"] for line in lines[:2]] == ["one", "two"]
    assert [line["backend"] for line in lines] == ["cloud: cloud-m"] * 2 + [
        "local: tiny-qwen3 (fallback: misconfigured)"
    ]
    assert lines[0]["generated_tokens"] == 3 and lines[0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--upstream", "https://a"], "--upstream URL and --upstream-model M belong together"),
        (["--upstream", "http://example.com/v1", "--upstream-model", "M"], "https, or --upstream-insecure"),
        (["--upstream", "https://u:secret@a", "--upstream-model", "M"], "no user or password in the URL"),
        (["--upstream-tokens", "5"], "limit an --upstream"),
        (["--json", "--logprobs", "1", "--upstream", "https://a", "--upstream-model", "M"], "--logprobs"),
    ],
)
def test_what_cannot_be_meant_is_one_line(options: list[str], complaint: str) -> None:
    done = subprocess.run([*COMMAND, *options], input="", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and "secret" not in done.stderr
    assert complaint in done.stderr and done.stderr.startswith("run.py: error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
