"""The chat page: how it travels, replies, errors, settings, tools and keys.

python -m pytest tests/serve/test_page.py
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import threading
from typing import Any

import pytest
from browser import Chat, stored, visit
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient
from stub import MODEL, Stub, calls, chunk, reading, text, tool, usage

from qwen3c.serve import page


def said(stub: Stub, number: int = -1) -> list[tuple[str, str]]:
    """The roles and texts of a chat request."""
    return [(message["role"], message["content"]) for message in stub.asked[number]["messages"]]


# ---- how it travels


def test_the_reader_of_markdown_is_the_published_one() -> None:
    marked = page.PARTS["MARKED"]
    assert hashlib.sha256(marked.read_bytes()).hexdigest() == page.MARKED_SHA256
    assert "marked v18.2.1" in marked.read_text()
    assert "Permission is hereby granted" in marked.with_name("marked.LICENSE.md").read_text()


def test_the_policy_allows_the_scripts_and_the_style_of_the_page_only(stub: Stub) -> None:
    answer = TestClient(stub.app()).get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    hashes = {
        tag: [
            f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
            for block in re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        ]
        for tag in ("script", "style")
    }
    assert len(hashes["script"]) == 2 and len(hashes["style"]) == 1
    assert answer.headers["content-security-policy"] == (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {hashes['style'][0]}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def test_the_page_names_nothing_to_load_and_no_way_around_its_policy() -> None:
    style, script = (page.PARTS[name].read_text(encoding="utf-8") for name in ("STYLE", "SCRIPT"))
    own = page.PAGE.read_text(encoding="utf-8") + style + script
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser", own
    )
    assert not re.search(r"@import|<link|<img|<iframe|\bsrc=|\sstyle=|\son\w+=\"|https?://", own)
    assert "url(" not in style and "</" not in style and "</script" not in script
    assert "sourceMappingURL" not in page.document().body.decode()


def test_the_page_travels_compressed_and_once(stub: Stub) -> None:
    client = TestClient(stub.app())
    plain = client.get("/", headers={"accept-encoding": "identity"})
    assert plain.content == page.document().body and "content-encoding" not in plain.headers
    packed = page.answer("", "br, gzip")
    assert (
        gzip.decompress(bytes(packed.body)) == plain.content and packed.headers["content-encoding"] == "gzip"
    )
    assert "content-encoding" not in page.answer("", "gzip;q=0, br").headers
    assert packed.headers["vary"] == "accept-encoding"
    known = client.get("/", headers={"if-none-match": f'"other", {plain.headers["etag"]}'})
    assert (
        known.status_code == 304 and known.content == b"" and known.headers["etag"] == plain.headers["etag"]
    )
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    parts = {name: path.read_text() for name, path in page.PARTS.items()}
    assert page.assemble(page.PAGE.read_text(), parts).body == page.document().body
    other = page.assemble(page.PAGE.read_text(), parts | {"MARKED": parts["MARKED"] + "//"})
    assert other.etag != page.document().etag


# ---- a reply


def test_a_reply_streams_and_says_what_it_took(chat: Chat, stub: Stub) -> None:
    gate = threading.Event()
    steps = text("Hello **you**, here is more.", prompt=1310, cached=1024, completion=412, speed=31.4)
    stub.script(*steps[:2], gate, *steps[2:])
    chat.say("Hi")
    expect(chat.answers.locator(".prose")).to_have_text("Hello *")
    expect(chat.page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    expect(chat.box).to_be_focused()
    gate.set()
    chat.rest()
    expect(chat.answers.locator("strong")).to_have_text("you")
    facts = ["local", MODEL, "31 tok/s", "412 tokens", "1,024 of 1,310 cached"]
    expect(chat.answers.locator(".facts > span")).to_have_text(facts)
    expect(chat.page.locator("#status")).to_have_text("The reply is complete.")
    body = stub.asked[0]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["return_progress"] is True and body["model"] == MODEL and said(stub) == [("user", "Hi")]


def test_the_stage_of_a_request_is_shown(chat: Chat, stub: Stub) -> None:
    gates = [threading.Event() for _ in range(4)]
    stub.script(
        reading("queued", position=3),
        gates[0],
        reading("reading", total=1000, processed=400),
        gates[1],
        chunk(delta={"reasoning_content": "Hm."}),
        gates[2],
        chunk(delta={"content": "So"}),
        gates[3],
        chunk(finish_reason="stop"),
        usage(),
    )
    chat.say("Hi")
    foot = chat.answers.locator(".foot")
    for gate, shown in zip(
        gates, ("Queued, 3rd in line", "Reading 40 %", "Thinking", "Writing"), strict=True
    ):
        expect(foot).to_have_text(shown)
        gate.set()
    chat.rest()
    expect(foot).to_contain_text("31 tok/s")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_a_reply_is_stopped_and_goes_on(chat: Chat, stub: Stub, how: str) -> None:
    stub.script(chunk(delta={"content": "Once upon"}), threading.Event())
    chat.say("A story")
    expect(chat.answers.locator(".prose")).to_have_text("Once upon")
    chat.page.keyboard.press("Escape") if how == "Escape" else chat.button("Stop").click()
    chat.rest()
    expect(chat.answers.locator(".facts")).to_contain_text("stopped")
    expect(chat.box).to_be_focused()
    stub.script(*text(" a time."))
    chat.button("continue").click()
    expect(chat.answers.locator(".prose")).to_have_text("Once upon a time.")
    chat.rest()
    assert stub.left == [0]
    assert said(stub) == [("user", "A story"), ("assistant", "Once upon")]
    assert stub.asked[1]["continue_final_message"] is True and stub.asked[1]["add_generation_prompt"] is False


def test_thinking_is_folded_with_its_seconds(chat: Chat, stub: Stub) -> None:
    steps = text("Four.", thinking="Two and two <b>are</b>", size=100)
    stub.script(*steps[:2], 0.15, *steps[2:])
    answer = chat.ask("2 + 2")
    summary = answer.locator("details.thinking summary")
    expect(summary).to_have_text(re.compile(r"Thought for 0\.[1-9] s"))
    expect(answer.get_by_text("Two and two <b>are</b>")).to_be_hidden()
    summary.click()
    expect(answer.get_by_text("Two and two <b>are</b>")).to_be_visible()


def test_markdown_becomes_elements(chat: Chat, stub: Stub) -> None:
    stub.script(
        *text(
            "# Head\n\nA &amp; b `x<y`  \nnext *em* ~~gone~~\n\n3. three\n4. four\n   - deep\n\n- [x] done\n\n> said\n\n---\n\n"
            "| a | b |\n|---|--:|\n| 1 | 2 |\n\n[here](https://a.example/x) <https://b.example> [r]\n\n[r]: https://c.example"
        )
    )
    prose = chat.ask("all").locator(".prose")
    expect(prose.locator("h3.depth-1")).to_have_text("Head")
    expect(prose.locator("p").first).to_have_text("A & b x<y next em gone", use_inner_text=True)
    assert prose.locator("ol").get_attribute("start") == "3"
    for selector in (
        "p > code",
        "em",
        "del",
        "ol > li > ul > li",
        "blockquote",
        "hr",
        "td.to-right",
        ".scroll > table",
    ):
        expect(prose.locator(selector)).to_have_count(1)
    expect(prose.locator("li.task")).to_have_text("☑ done")
    links = prose.locator("a")
    expect(links).to_have_count(3)
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://a.example/x",
        "https://b.example",
        "https://c.example",
    ]
    for link in links.all():
        assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"


def test_only_the_last_block_is_drawn_again(chat: Chat, stub: Stub) -> None:
    gates = [threading.Event(), threading.Event()]
    stub.script(
        chunk(delta={"content": "first\n\n- a\n- b\n\nlast"}),
        gates[0],
        chunk(delta={"content": " word\n\n```py\nx = 1\n"}),
        gates[1],
        chunk(delta={"content": "y = 2\n```"}),
        chunk(finish_reason="stop"),
        usage(),
    )
    chat.say("go")
    blocks = chat.answers.locator(".prose > *")
    expect(blocks).to_have_count(3)
    chat.page.evaluate("document.querySelectorAll('.prose > *').forEach(node => { node.seen = true; })")
    gates[0].set()
    expect(blocks).to_have_count(4)
    kept = "[...document.querySelectorAll('.prose > *')].map(node => Boolean(node.seen))"
    assert chat.page.evaluate(kept) == [True, True, False, False]
    chat.page.evaluate("document.querySelector('figure').seen = true")
    gates[1].set()
    chat.rest()
    assert chat.page.evaluate(kept) == [True, True, False, True]
    expect(chat.answers.locator("pre")).to_have_text("x = 1\ny = 2")


def test_code_and_messages_are_copied(chat: Chat, stub: Stub) -> None:
    stub.script(*text("Look:\n\n```python title\nprint('a')\n```"))
    answer = chat.ask("Code, *please*")
    expect(answer.locator("figcaption span")).to_have_text("python")
    clipboard = "navigator.clipboard.readText()"
    chat.button("copy the code").click()
    expect(answer.locator("figcaption button")).to_have_text("copied")
    assert chat.page.evaluate(clipboard) == "print('a')"
    chat.button("copy", answer.locator(".foot")).click()
    assert chat.page.evaluate(clipboard) == "Look:\n\n```python title\nprint('a')\n```"
    chat.button("copy", chat.questions).click()
    assert chat.page.evaluate(clipboard) == "Code, *please*"


def test_replies_and_questions_have_versions(chat: Chat, stub: Stub) -> None:
    for content in ("one", "two", "three"):
        stub.script(*text(content))
    chat.ask("Q")
    chat.button("regenerate").click()
    expect(chat.answers.locator(".prose")).to_have_text("two")
    chat.rest()
    expect(chat.answers.locator(".versions")).to_contain_text("2 / 2")
    assert said(stub) == [("user", "Q")]
    chat.button("previous version").click()
    expect(chat.answers.locator(".prose")).to_have_text("one")

    chat.button("edit").click()
    edit = chat.page.get_by_role("textbox", name="Edit your message")
    expect(edit).to_be_focused()
    expect(edit).to_be_in_viewport()
    edit.fill("Q, but better")
    edit.press("Enter")
    expect(chat.answers.locator(".prose")).to_have_text("three")
    chat.rest()
    assert said(stub) == [("user", "Q, but better")]
    expect(chat.questions.locator(".versions")).to_contain_text("2 / 2")
    chat.button("previous version", chat.questions).click()
    # the version of the reply that was last looked at
    expect(chat.answers.locator(".prose")).to_have_text("one")
    expect(chat.answers.locator(".versions")).to_contain_text("1 / 2")
    chat.page.reload()
    expect(chat.answers.locator(".prose")).to_have_text("one")
    chat.button("edit").click()
    edit.press("Escape")
    expect(chat.questions.locator(".bubble")).to_have_text("Q")


# ---- errors


def test_an_error_is_text_with_a_retry(chat: Chat, stub: Stub) -> None:
    stub.script(
        status=429,
        error={"message": "the queue is <b>full</b>", "code": "queue_full"},
        headers={"retry-after": "3"},
    )
    chat.ask("Hi")
    expect(chat.answers.locator(".trouble p")).to_have_text("the queue is <b>full</b> Try again in 3.0 s.")
    stub.script(*text("Now."))
    chat.button("retry").click()
    expect(chat.answers.locator(".prose")).to_have_text("Now.")
    chat.rest()
    expect(chat.answers).to_have_count(1)
    expect(chat.page.locator(".versions")).to_have_count(0)
    assert len(stored(chat, "messages")) == 2


def test_a_server_that_is_away_is_a_message(chat: Chat, stub: Stub) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.say("Hi")
    expect(chat.answers.locator(".trouble p")).to_have_text("The server cannot be reached.")
    chat.rest()
    chat.page.unroute("**/v1/chat/completions")
    stub.script(*text("Here again."))
    chat.button("retry").click()
    expect(chat.answers.locator(".prose")).to_have_text("Here again.")
    expect(chat.box).to_be_focused()
    chat.errors = [error for error in chat.errors if "ERR_FAILED" not in error]


def test_a_conversation_that_is_too_long_is_explained_with_both_numbers(chat: Chat, stub: Stub) -> None:
    error = {
        "message": "too long",
        "code": "context_length_exceeded",
        "n_prompt_tokens": 50123,
        "n_ctx": 40960,
    }
    stub.script(status=400, error=error)
    chat.ask("Hi")
    expect(chat.answers.locator(".trouble")).to_contain_text("50,123 tokens long, and the model holds 40,960")


def test_a_cut_reply_is_kept_and_goes_on_here(chat: Chat, stub: Stub) -> None:
    error = {"message": "cut", "type": "server_error", "param": None, "code": "upstream_interrupted"}
    stub.script(chunk(delta={"content": "From the"}), {"error": error}, headers={"x-qwen3c-backend": "cloud"})
    chat.ask("Hi")
    expect(chat.answers.locator(".trouble")).to_contain_text("The cloud's reply was cut off")
    expect(chat.answers.locator(".prose")).to_have_text("From the")
    expect(chat.answers.locator(".badge")).to_have_text("cloud")
    stub.script(*text(" sky."))
    chat.button("continue here").click()
    expect(chat.answers.locator(".prose")).to_have_text("From the sky.")
    chat.rest()
    assert stub.headers[1]["x-qwen3c-route"] == "local" and "x-qwen3c-route" not in stub.headers[0]
    expect(chat.answers.locator(".badge")).to_have_text("local")


def test_a_stream_without_an_end_is_not_taken_for_whole(chat: Chat, stub: Stub) -> None:
    stub.script(chunk(delta={"content": "Half"}), "cut")
    chat.ask("Hi")
    expect(chat.answers.locator(".trouble")).to_contain_text("ended before the reply did")
    expect(chat.button("continue here")).to_be_visible()


def test_a_reload_in_the_middle_of_a_reply_keeps_what_had_come(chat: Chat, stub: Stub) -> None:
    stub.script(chunk(delta={"content": "Half of"}), 0.5, chunk(delta={"content": " it"}), threading.Event())
    chat.say("Hi")
    expect(chat.answers.locator(".prose")).to_have_text("Half of it")
    chat.page.wait_for_timeout(100)
    chat.page.reload()
    expect(chat.answers.locator(".prose")).to_have_text("Half of it")
    expect(chat.answers.locator(".trouble")).to_contain_text("What had come is kept")
    stub.script(*text(", and the rest"))
    chat.button("continue here").click()
    expect(chat.answers.locator(".prose")).to_have_text("Half of it, and the rest")
    chat.rest()


def test_a_key_is_asked_for_once_and_kept_for_the_tab(browser: Browser, stub: Stub) -> None:
    stub.key = "sesame"
    with visit(browser, stub) as chat:
        key = chat.page.get_by_role("textbox", name="API key")
        key.fill("wrong")
        key.press("Enter")
        expect(chat.page.get_by_text("The server did not accept that key.")).to_be_visible()
        assert key.get_attribute("type") == "password"
        key.fill("sesame")
        chat.button("Use key").click()
        expect(chat.page.locator("#about")).to_have_text(MODEL)
        chat.ask("Hi")
        assert stub.headers[0]["authorization"] == "Bearer sesame"
        chat.page.reload()
        expect(chat.page.locator("#about")).to_have_text(MODEL)
        assert chat.page.evaluate(
            "[sessionStorage.length, JSON.stringify({...localStorage}).includes('sesame')]"
        ) == [1, False]
        chat.quiet()


def test_who_spoke_is_shown_with_the_reason(chat: Chat, stub: Stub) -> None:
    stub.script(*text("a"), headers={"x-qwen3c-backend": "cloud"})
    stub.script(*text("b"), headers={"x-qwen3c-fallback": "connect_timeout"})
    chat.ask("1")
    chat.ask("2")
    expect(chat.page.locator(".badge")).to_have_text(
        ["cloud", "local, because the cloud failed: connect_timeout"]
    )


# ---- settings


def test_settings_are_sent_and_defaults_shown(chat: Chat, stub: Stub) -> None:
    chat.ask("before")
    sent = {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "seed",
        "thinking_budget",
        "chat_template_kwargs",
    }
    assert not sent & stub.asked[0].keys()
    chat.button("Settings").click()
    field = chat.page.get_by_label
    assert [field(name).get_attribute("placeholder") for name in ("Temperature", "Top-p", "Top-k")] == [
        "0.6",
        "0.95",
        "20",
    ]
    values = {
        "Temperature": "0.2",
        "Top-p": "0.9",
        "Top-k": "40",
        "Min-p": "0.05",
        "Most tokens": "99",
        "Seed": "7",
        "Thinking budget": "64",
    }
    for name, value in values.items():
        field(name).fill(value)
    chat.page.locator("#fields select").select_option("off")
    field("System prompt").fill("Be brief.")
    chat.button("Done").click()
    chat.ask("after")
    expected = {
        "temperature": 0.2,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 99,
        "seed": 7,
        "thinking_budget": 64,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert {name: stub.asked[1][name] for name in sent} == expected
    assert said(stub)[0] == ("system", "Be brief.")
    chat.page.reload()
    chat.button("New chat").click()
    chat.ask("a new one begins with it")
    assert said(stub)[0] == ("system", "Be brief.") and stub.asked[2]["seed"] == 7
    chat.button("Settings").click()
    field("Temperature").fill("-1")
    field("Temperature").blur()
    chat.button("Back to defaults").click()
    expect(field("Temperature")).to_have_value("")
    chat.button("Done").click()
    chat.ask("defaults again")
    assert not sent & stub.asked[3].keys()


@pytest.mark.parametrize("thinking, fields", [("always", ["Thinking budget"]), ("none", [])])
def test_a_model_that_cannot_choose_offers_no_choice(
    browser: Browser, stub: Stub, thinking: str, fields: list[str]
) -> None:
    stub.props["thinking"] = thinking
    with visit(browser, stub) as chat:
        expect(chat.page.locator("#about")).to_have_text(MODEL)
        chat.button("Settings").click()
        labels = chat.page.locator("#fields label").all_inner_texts()
        assert [label.split("\n")[0] for label in labels if label.startswith("Thinking")] == fields


def test_a_model_is_chosen_where_there_are_several(browser: Browser, stub: Stub) -> None:
    stub.models = [MODEL, "big"]
    with visit(browser, stub) as chat:
        choice = chat.page.get_by_label("Model", exact=True)
        choice.select_option("big")
        chat.ask("Hi")
        assert stub.asked[0]["model"] == "big"
        chat.page.reload()
        expect(choice).to_have_value("big")


# ---- tools


def with_tools(chat: Chat, stub: Stub, **fields: Any) -> None:
    stub.tools = [
        tool("files__list", "Lists.", **fields),
        tool("files__read", "<b>Reads</b> \x1b[2J files.", **fields),
    ]
    chat.page.reload()
    chat.button("Tools · 2").click()


def test_a_tool_is_called_when_it_is_allowed(chat: Chat, stub: Stub) -> None:
    with_tools(chat, stub)
    stub.result = {"content": "<img src=x> 42", "isError": False, "truncated": True}
    stub.script(*calls(("c1", "files__read", '{"path": "<i>/tmp"}')))
    stub.script(*text("There are 42."))
    chat.say("Count")
    card = chat.page.locator(".tool")
    expect(card).to_contain_text('"path": "<i>/tmp"')
    expect(card).to_contain_text("files__read")
    card.get_by_text("What its server says of it").click()
    expect(card).to_contain_text("<b>Reads</b> ␛[2J files.")
    assert stub.called == []
    assert [offered["function"]["name"] for offered in stub.asked[0]["tools"]] == [
        "files__list",
        "files__read",
    ]
    assert stub.asked[0]["tools"][0]["function"]["parameters"]["type"] == "object"
    chat.button("Allow once").click()
    expect(chat.answers.last.locator(".prose")).to_have_text("There are 42.")
    chat.rest()
    expect(chat.box).to_be_focused()
    assert stub.called == [{"name": "files__read", "arguments": {"path": "<i>/tmp"}, "digest": "d1"}]
    sent = stub.asked[1]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "files__read", "arguments": '{"path": "<i>/tmp"}'}
    assert sent[2] == {"role": "tool", "tool_call_id": "c1", "content": "<img src=x> 42"}
    card.get_by_text("Result, 14 characters, cut").click()
    expect(card.get_by_text("<img src=x> 42")).to_be_visible()
    expect(card).to_contain_text("its end was cut off")


def test_consent_is_for_one_tool_in_one_chat_and_as_it_was(chat: Chat, stub: Stub) -> None:
    with_tools(chat, stub)

    def ask(name: str, id: str) -> None:
        stub.script(*calls((id, name, "{}")))

    ask("files__read", "c1")
    ask("files__read", "c2")
    ask("files__list", "c3")
    stub.script(*text("Enough."))
    chat.say("Go")
    chat.button("Always for this tool here").click()
    expect(chat.page.locator(".tool.asks")).to_contain_text("files__list")
    assert [called["name"] for called in stub.called] == ["files__read"] * 2
    chat.button("Deny").click()
    expect(chat.answers.last.locator(".prose")).to_have_text("Enough.")
    chat.rest()
    assert len(stub.called) == 2 and said(stub)[-1] == ("tool", "The user did not allow this call.")

    stub.tools[1]["digest"] = "d2"
    stub.tools[1]["description"] = "Now it deletes."
    ask("files__read", "c4")
    stub.script(*text("Done."))
    chat.say("Again")
    expect(chat.page.locator("#notice-text")).to_contain_text("The server changed what files__read is")
    chat.page.get_by_text("What its server says of it").click()
    expect(chat.page.locator(".tool.asks")).to_contain_text("Now it deletes.")
    assert len(stub.called) == 2
    chat.button("Always for this tool here").click()
    chat.rest()
    assert stub.called[-1]["digest"] == "d2"
    # a change that the page hears of when it is loaded, not from a refusal
    stub.tools[1]["digest"] = "d3"
    chat.page.reload()
    ask("files__read", "c1")
    chat.say("Once more")
    expect(chat.button("Allow once")).to_be_visible()
    assert len(stub.called) == 3
    stub.script(*text("Fine."))
    chat.button("Deny").click()
    expect(chat.answers.last.locator(".prose")).to_have_text("Fine.")
    chat.rest()

    chat.button("New chat").click()
    ask("files__read", "c5")
    chat.say("Elsewhere")
    expect(chat.button("Allow once")).to_be_visible()
    chat.page.keyboard.press("Escape")
    chat.rest()
    expect(chat.page.locator(".tool")).to_contain_text("failed")
    assert len(stub.called) == 3


def test_tools_end_after_ten_rounds(chat: Chat, stub: Stub) -> None:
    with_tools(chat, stub)
    for i in range(10):
        stub.script(*calls((f"c{i}", "files__list", "{}")))
    stub.script(*text("That is all."))
    chat.say("Go")
    chat.button("Always for this tool here").click()
    expect(chat.answers.last.locator(".prose")).to_have_text("That is all.")
    chat.rest()
    assert len(stub.called) == 10 and stub.asked[9].get("tool_choice") is None
    assert len(stub.asked) == 11 and stub.asked[10]["tool_choice"] == "none"


def test_a_call_that_cannot_be_made_is_told_to_the_model(chat: Chat, stub: Stub) -> None:
    with_tools(chat, stub)
    stub.script(*calls(("c1", "files__read", "{broken"), ("c2", "nobody__knows", "{}")))
    stub.script(*text("Sorry."))
    chat.ask("Go")
    assert said(stub)[-2:] == [
        ("tool", "The arguments are not valid JSON; nothing was called."),
        ("tool", "There is no tool of this name."),
    ]
    assert stub.called == []


def test_no_tool_is_offered_before_the_user_says_so(chat: Chat, stub: Stub) -> None:
    stub.tools = [tool("files__list")]
    chat.page.reload()
    expect(chat.button("Tools · 1")).to_have_attribute("aria-pressed", "false")
    chat.ask("Hi")
    assert "tools" not in stub.asked[0]


# ---- keys, sizes, themes


def test_enter_sends_and_shift_enter_breaks_the_line(chat: Chat, stub: Stub) -> None:
    expect(chat.box).to_be_focused()
    chat.page.keyboard.type("one")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("two")
    chat.page.keyboard.press("Enter")
    expect(chat.questions).to_have_count(1)
    chat.rest()
    assert said(stub) == [("user", "one\ntwo")]
    expect(chat.box).to_have_value("")
    expect(chat.box).to_be_focused()
    # Enter that ends a composed word is no Enter
    chat.box.fill("にほん")
    chat.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(chat.box).to_have_value("にほん")


def test_an_address_submits_nothing(chat: Chat, stub: Stub) -> None:
    chat.page.goto(stub.url + "/?q=rm+-rf&prompt=hello#hello")
    expect(chat.page.locator("#about")).to_have_text(MODEL)
    expect(chat.box).to_have_value("")
    assert stub.asked == []


def test_the_theme_follows_the_system_until_it_is_switched(chat: Chat) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    chat.page.emulate_media(color_scheme="light")
    light = chat.page.evaluate(colour)
    chat.page.emulate_media(color_scheme="dark")
    dark = chat.page.evaluate(colour)
    assert light != dark
    chat.button("light / dark").click()
    assert chat.page.evaluate(colour) == light
    chat.page.reload()
    assert chat.page.evaluate(colour) == light
    chat.button("light / dark").click()
    assert chat.page.evaluate(colour) == dark


def test_on_a_phone_the_conversations_are_a_drawer(browser: Browser, stub: Stub) -> None:
    with visit(browser, stub, viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True) as chat:
        stub.script(
            *text(
                "| "
                + "wide column | " * 9
                + "\n|"
                + "---|" * 9
                + "\n\n`"
                + "x" * 300
                + "`\n\n```\n"
                + "y" * 300
                + "\n```"
            )
        )
        chat.ask("Hi")
        assert chat.page.evaluate(
            "[document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth]"
        ) == [360, 360]
        expect(chat.button("New chat")).to_be_hidden()
        chat.button("Conversations").click()
        expect(chat.button("New chat")).to_be_focused()
        chat.page.keyboard.press("Escape")
        expect(chat.button("New chat")).to_be_hidden()
        chat.button("Conversations").click()
        chat.button("New chat").click()
        expect(chat.answers).to_have_count(0)
        expect(chat.button("Conversations")).to_have_attribute("aria-expanded", "false")
        chat.quiet()


def test_the_newest_words_stay_in_sight_unless_one_reads_above(chat: Chat, stub: Stub) -> None:
    gate, more = threading.Event(), [chunk(delta={"content": f"line {i}\n\n"}) for i in range(60)]
    stub.script(*more, gate, *more, chunk(finish_reason="stop"), usage())
    chat.say("long")
    left = "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.querySelector('#scroll'))"
    expect(chat.answers.get_by_text("line 59")).to_be_in_viewport()
    chat.page.locator("#scroll").hover()
    chat.page.mouse.wheel(0, -600)
    expect(chat.button("↓ newest")).to_be_visible()
    gate.set()
    chat.rest()
    assert chat.page.evaluate(left) > 600
    chat.button("↓ newest").click()
    assert chat.page.evaluate(left) < 2
    expect(chat.box).to_be_focused()
