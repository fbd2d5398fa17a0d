"""The page at the program itself: `-m serve` with two models, the tools of an MCP server, and keys.

What only a script can bring about (a cut stream, a queue, an attack) is in test_page.py, with the same page.

python -m pytest tests/serve/test_page_real.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Chat, visit
from playwright.sync_api import Browser, Route, expect
from servers import BOX
from small_models import TINY_QWEN3, export_small_model
from stub import Stub, calls

ROOT = Path(__file__).parents[2]
KEY = "sk-of-a-test"


@contextmanager
def program(*options: str | Path) -> Iterator[Stub]:
    """`-m serve` in a process of its own; of a Stub only the address."""
    command = [sys.executable, ROOT / "run.py", TINY_QWEN3, "-m", "serve", "--port", "0", *options]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = ""
            while (found := re.search(r"serving .* at (http://127\.0\.0\.1:\d+)", said)) is None:
                line = process.stderr.readline()
                assert line, said
                said += line
            site = Stub()
            site.url = found[1]
            yield site
        finally:
            process.terminate()
            said += process.stderr.read()
        assert process.wait(20) == 0
    assert "Traceback" not in said and " 500 " not in said, said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    directory = tmp_path_factory.mktemp("site")
    thinker = export_small_model(directory, thinking="always", context=1024)
    file = directory / "mcp.json"
    friendly = [str(Path(__file__).with_name("other_servers.py")), "friendly"]
    file.write_text(json.dumps({"mcpServers": {"friendly": {"command": sys.executable, "args": friendly}}}))
    others = ("--model-alias", f"box={BOX}", "--model-alias", f"thinker={thinker}")
    with program(*others, "--mcp", file) as opened:
        yield opened


@pytest.fixture
def real(browser: Browser, site: Stub) -> Iterator[Chat]:
    with visit(browser, site) as chat:
        expect(chat.page.locator("#name")).to_have_text("tiny-qwen3")  # the page knows its server
        yield chat
        chat.quiet()


def settle(chat: Chat, **values: str) -> None:
    """Settings by their labels, with _ for a space."""
    chat.button("Settings").click()
    for name, value in values.items():
        chat.page.get_by_label(name.replace("_", " ")).fill(value)
    chat.button("Done").click()


def shown(chat: Chat) -> str:
    """The text of the last reply."""
    return chat.answers.last.locator(".prose").inner_text()


def test_a_reply_streams_and_is_written_again(real: Chat) -> None:
    settle(real, Seed="1", Most_tokens="60")
    answer = real.ask("What is 27 + 45?")
    facts = answer.locator(".facts")
    for fact in (
        r"local",
        r"tiny",
        r"\d+ tok/s",
        r"60 tokens",
        r"[^1-9]0 of \d+ cached",
        r"cut at the limit",
    ):
        expect(facts).to_contain_text(re.compile(fact))
    first = shown(real)
    assert len(first.split()) > 5
    real.button("regenerate").click()
    expect(answer.locator(".versions")).to_contain_text("2 / 2")
    real.rest()
    assert shown(real) == first, "the seed is the same"
    expect(facts).to_contain_text(re.compile(r"tokens[1-9]\d* of"))


def test_a_thought_is_folded(real: Chat) -> None:
    real.page.get_by_label("Model", exact=True).select_option("thinker")
    settle(real, Seed="1", Thinking_budget="20", Most_tokens="40")
    answer = real.ask("Hi")
    summary = answer.locator("details.thinking summary")
    expect(summary).to_have_text(re.compile(r"Thought for [\d.]+ s"))
    assert answer.locator("details.thinking").get_attribute("open") is None
    summary.click()
    assert answer.locator("details.thinking").inner_text() != summary.inner_text()
    assert shown(real)


def test_a_question_is_edited_and_branches(real: Chat) -> None:
    settle(real, Seed="3", Most_tokens="40")
    real.ask("Who are you?")
    first = shown(real)
    real.button("edit").click()
    edit = real.page.get_by_role("textbox", name="Edit your message")
    edit.fill("def parse(")
    edit.press("Enter")
    expect(real.questions.locator(".versions")).to_contain_text("2 / 2")
    real.rest()
    assert shown(real) != first
    real.ask("Go on")
    real.button("previous version", real.questions.first).click()
    expect(real.answers).to_have_count(1)
    assert shown(real) == first


def test_a_reply_is_stopped_and_goes_on_from_there(real: Chat) -> None:
    settle(real, Seed="2", Thinking_budget="0", Temperature="1.5")
    real.say("def parse(")
    expect(real.answers.locator(".prose")).to_have_text(re.compile(r"\w"))
    real.page.keyboard.press("Escape")
    real.rest()
    expect(real.answers.locator(".facts")).to_contain_text("stopped")
    before = real.answers.locator(".prose").text_content() or ""
    settle(real, Most_tokens="12")
    real.button("continue").click()
    real.rest()
    after = real.answers.locator(".prose").text_content() or ""
    assert len(after) > len(before) and after.startswith(before[:8])


def test_a_reload_in_the_middle_keeps_what_had_come_and_goes_on(real: Chat) -> None:
    settle(real, Seed="4", Thinking_budget="0", Temperature="1.5")
    real.say("Tell me about lists.")
    expect(real.answers.locator(".prose")).to_have_text(re.compile(r"\w+ \w+"))
    real.page.wait_for_timeout(900)  # until it is kept
    real.page.reload()
    expect(real.answers.locator(".trouble")).to_contain_text("What had come is kept")
    expect(real.answers.locator(".prose")).to_have_text(re.compile(r"\w+"))
    before = real.answers.locator(".prose").text_content() or ""
    settle(real, Most_tokens="10")
    real.button("continue here").click()
    real.rest()
    expect(real.answers.locator(".trouble")).to_be_hidden()
    assert len(real.answers.locator(".prose").text_content() or "") > len(before)


def test_the_other_model_answers_when_it_is_chosen(real: Chat) -> None:
    settle(real, Seed="5", Most_tokens="30")
    choice = real.page.get_by_label("Model", exact=True)
    choice.select_option("box")
    expect(real.ask("What is 27 + 45?").locator(".facts")).to_contain_text("box")
    expect(real.answers.locator("details.thinking")).to_be_hidden()
    real.page.reload()
    expect(choice).to_have_value("box")


def test_a_conversation_beyond_the_context_is_explained(real: Chat) -> None:
    real.ask("word " * 3000)
    expect(real.answers.locator(".trouble")).to_contain_text("the model holds 2,048")


def test_tools_are_offered_to_models_that_call_them_alone(real: Chat) -> None:
    real.page.locator("#tools").click()
    real.page.get_by_label("Model", exact=True).select_option("box")
    expect(real.page.locator("#tools")).to_be_hidden()
    settle(real, Seed="6", Most_tokens="20")
    expect(real.ask("What is 27 + 45?").locator(".facts")).to_contain_text("box")
    real.page.get_by_label("Model", exact=True).select_option("tiny-qwen3")
    expect(real.page.locator("#tools")).to_have_attribute("aria-pressed", "true")


def script_first(chat: Chat, *wanted: tuple[str, str, str]) -> list[dict[str, Any]]:
    """The first reply calls tools, as these models would not; the requests that came are returned."""
    asked: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or "{}"))
        if len(asked) > 1:
            route.continue_()
            return
        events: Sequence[Any] = [*map(json.dumps, calls(*wanted)), "[DONE]"]
        body = "".join(f"data: {event}\n\n" for event in events)
        route.fulfill(body=body, content_type="text/event-stream")

    chat.page.route("**/v1/chat/completions", answer)
    return asked


def test_a_tool_of_an_mcp_server_is_called_with_consent(real: Chat) -> None:
    settle(real, Seed="6", Most_tokens="20")
    real.page.locator("#tools").click()
    asked = script_first(real, ("c1", "friendly__add", '{"a": 27, "b": 45}'))
    real.say("What is 27 + 45?")
    card = real.page.locator(".tool")
    expect(card).to_contain_text("friendly__add")
    real.button("Allow once").click()
    real.rest()
    expect(card).to_contain_text("Result")
    assert "friendly__add" in [one["function"]["name"] for one in asked[0]["tools"]]
    assert asked[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "72"}
    expect(real.answers.last.locator(".facts")).to_contain_text("tokens")


def test_a_tool_that_dies_is_told_to_the_model(real: Chat) -> None:
    settle(real, Seed="6", Most_tokens="20")
    real.page.locator("#tools").click()
    asked = script_first(real, ("c1", "friendly__die", "{}"))
    real.say("Die")
    real.button("Allow once").click()
    real.rest()
    assert (
        asked[1]["messages"][-1]["role"] == "tool" and "Traceback" not in asked[1]["messages"][-1]["content"]
    )


def test_a_key_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"me {KEY}\n")
    (tmp_path / "keys").chmod(0o600)
    with program("--api-keys", tmp_path / "keys") as site, visit(browser, site) as chat:
        key = chat.page.get_by_role("textbox", name="API key")
        key.fill("wrong")
        key.press("Enter")
        expect(chat.page.get_by_text("The server did not accept that key.")).to_be_visible()
        key.fill(KEY)
        key.press("Enter")
        expect(chat.page.locator("#about")).to_contain_text("tiny")
        settle(chat, Most_tokens="20")
        expect(chat.ask("Hi").locator(".facts")).to_contain_text("local")
        chat.quiet()
