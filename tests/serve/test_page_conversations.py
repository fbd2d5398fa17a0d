"""The conversations that the chat page keeps: found, renamed, deleted, written to files and read from them.

python -m pytest tests/serve/test_page_conversations.py
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Chat, stored, visit
from playwright.sync_api import Browser, expect
from scene import import_text, long_talk
from stub import Stub, chunk, text, usage


def test_conversations_are_found_renamed_and_deleted(chat: Chat, stub: Stub) -> None:
    stub.script(*text("The capital is Ouagadougou."))
    stub.script(*text("Cheese."))
    chat.ask("Burkina Faso?")
    chat.button("New chat").click()
    chat.ask("What is Gouda?")
    names = chat.page.locator("#list .name")
    expect(names).to_have_text(["What is Gouda?", "Burkina Faso?"])
    chat.page.get_by_label("Search").fill("ouaga")
    expect(names).to_have_text(["Burkina Faso?"])
    expect(chat.page.locator("#list mark")).to_have_text("Ouaga")
    chat.page.get_by_label("Search").fill("gouda")
    expect(names).to_have_text(["What is Gouda?"])
    chat.page.get_by_label("Search").fill("")
    expect(names).to_have_count(2)

    chat.button("Burkina Faso?").click()
    expect(chat.answers.locator(".prose")).to_have_text("The capital is Ouagadougou.")
    chat.button("More for Burkina Faso?").click()
    chat.button("rename").click()
    chat.page.get_by_label("Title").fill("Capitals")
    chat.button("Rename").click()
    expect(chat.page.get_by_role("heading", name="Capitals")).to_be_visible()
    chat.page.reload()
    expect(names).to_have_text(["What is Gouda?", "Capitals"])
    expect(chat.answers.locator(".prose")).to_have_text("The capital is Ouagadougou.")

    for answer, left in (("Cancel", 2), ("Delete", 1)):
        if chat.button("delete").count() == 0:
            chat.button("More for Capitals").click()
        chat.button("delete").click()
        chat.button(answer, chat.page.get_by_role("dialog")).click()
        expect(names).to_have_count(left)
    assert {message["content"] for message in stored(chat, "messages")} == {"What is Gouda?", "Cheese."}
    chat.button("Settings").click()
    chat.button("Delete all").click()
    chat.button("Delete", chat.page.get_by_role("dialog")).click()
    expect(chat.page.locator("#list")).to_have_text("Nothing said yet")
    assert stored(chat, "messages") == stored(chat, "conversations") == []


def test_conversations_leave_as_a_file_and_come_back(chat: Chat, stub: Stub, tmp_path: Path) -> None:
    stub.script(*text("one", thinking="hm"))
    stub.script(*text("two"))
    chat.ask("First")
    chat.button("regenerate").click()
    expect(chat.answers.locator(".prose")).to_have_text("two")
    chat.rest()
    chat.button("Settings").click()
    with chat.page.expect_download() as download:
        chat.button("Export all").click()
    file = tmp_path / "all.json"
    download.value.save_as(file)
    chat.button("Done").click()
    chat.button("More for First").click()
    with chat.page.expect_download() as download:
        chat.button("export").click()
    assert json.loads(Path(download.value.path()).read_text()) == json.loads(file.read_text())

    data = json.loads(file.read_text())
    data["conversations"][0]["allowed"] = {"files__read": "d1"}
    data["conversations"][0]["title"] = "Came \x1b[31mback"
    file.write_text(json.dumps(data))
    chat.page.locator("#file").set_input_files(file)
    expect(chat.page.locator("#notice-text")).to_have_text("1 conversation imported.")
    chat.page.locator("#list .name", has_text="Came ␛[31mback").click()
    expect(chat.answers.locator(".prose")).to_have_text("two")
    chat.button("previous version").click()
    expect(chat.answers.locator(".prose")).to_have_text("one")
    assert len(stored(chat, "messages")) == 6
    # consent to tools does not come from a file
    assert not any("allowed" in conversation for conversation in stored(chat, "conversations"))


MESSAGE = {"id": "a", "parent": None, "role": "user", "content": "x", "created": 1, "state": "done"}


def exported(message: Any = MESSAGE, **fields: Any) -> str:
    conversation = {
        "title": "t",
        "created": 1,
        "updated": 1,
        "system": "",
        "leaf": "a",
        "messages": [message],
        **fields,
    }
    return json.dumps({"format": "qwen3c-conversations", "version": 1, "conversations": [conversation]})


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "it is not JSON"),
        ('{"format": "other"}', "it is no export of this page"),
        ("[1]", "it is no export of this page"),
        (exported(title=7), "conversations[0].title is not what it should be"),
        (exported({**MESSAGE, "role": "admin"}), "conversations[0].messages[0].role is not what it should be"),
        (exported({**MESSAGE, "parent": "b"}), "conversations[0].messages[0].parent names no message before it"),
        (exported({**MESSAGE, "parent": "a"}), "conversations[0].messages[0].parent names no message before it"),
        (exported({**MESSAGE, "calls": [{"id": 1}]}), "conversations[0].messages[0].calls is not"),
        (exported(messages=[MESSAGE, MESSAGE]), "conversations[0].messages[1].id comes twice"),
        (exported(leaf="z"), "conversations[0].leaf names no message"),
        (exported(messages=None), "conversations[0].messages is missing"),
        (exported("x"), "conversations[0].messages[0] is no object"),
    ],
)  # fmt: skip
def test_a_bad_file_is_a_message_and_changes_nothing(imports: Chat, content: str, told: str) -> None:
    file: Any = {"name": "bad.json", "mimeType": "application/json", "buffer": content.encode()}
    imports.page.locator("#file").set_input_files(file)
    notice = imports.page.locator("#notice-text")
    expect(notice).to_contain_text(told)
    expect(notice).to_contain_text("bad.json was not imported")
    expect(notice).to_contain_text("Nothing was changed.")
    assert stored(imports, "messages") == stored(imports, "conversations") == []


@pytest.fixture(scope="module")
def imports(browser: Browser, served: Stub) -> Iterator[Chat]:
    served.reset()
    with visit(browser, served) as opened:
        yield opened
        opened.quiet()


def test_a_reply_goes_on_while_another_conversation_is_read(chat: Chat, stub: Stub) -> None:
    gate = threading.Event()
    stub.script(
        chunk(delta={"content": "slow"}),
        gate,
        chunk(delta={"content": " but sure"}),
        chunk(finish_reason="stop"),
        usage(),
    )
    chat.say("first")
    expect(chat.answers.locator(".prose")).to_have_text("slow")
    chat.page.keyboard.press("Control+Shift+O")
    expect(chat.answers).to_have_count(0)
    stub.script(*text("quick"))
    chat.ask("second")
    expect(chat.answers.locator(".prose")).to_have_text("quick")
    gate.set()
    expect(chat.page.locator("#list .busy")).to_have_count(0)
    chat.button("first").click()
    expect(chat.answers.locator(".prose")).to_have_text("slow but sure")
    chat.page.go_back()
    expect(chat.answers.locator(".prose")).to_have_text("quick")


def test_a_conversation_that_is_being_written_is_deleted_whole(chat: Chat, stub: Stub) -> None:
    stub.script(chunk(delta={"content": "for ever"}), threading.Event())
    chat.say("Hi")
    expect(chat.answers.locator(".prose")).to_have_text("for ever")
    chat.button("More for Hi").click()
    chat.button("delete").click()
    chat.button("Delete", chat.page.get_by_role("dialog")).click()
    expect(chat.page.locator("#list")).to_have_text("Nothing said yet")
    chat.rest()
    assert stored(chat, "messages") == stored(chat, "conversations") == []
    expect(chat.answers).to_have_count(0)


def test_an_imported_reply_goes_on(chat: Chat, stub: Stub) -> None:
    half = {**MESSAGE, "role": "assistant", "content": "Half", "state": "stopped"}
    import_text(chat, exported(half))
    chat.page.locator("#list .open").click()
    stub.script(*text(" and half", thinking="Hm."))
    chat.button("continue").click()
    expect(chat.answers.locator(".prose")).to_have_text("Half and half")
    chat.rest()
    expect(chat.answers.locator("details.thinking > div")).to_have_text("Hm.", use_inner_text=False)


def test_two_tabs_show_the_same_conversations(chat: Chat, stub: Stub) -> None:
    other = chat.tab()
    expect(other.locator("#list")).to_have_text("Nothing said yet")
    chat.ask("Hi there")
    expect(other.locator("#list .name")).to_have_text("Hi there")


def test_without_storage_the_page_talks_all_the_same(browser: Browser, stub: Stub) -> None:
    with visit(browser, stub) as chat:
        chat.page.add_init_script(
            "Object.defineProperty(window, 'indexedDB', { value: { open() { throw new Error('no'); } } })"
        )
        chat.page.reload()
        expect(chat.page.locator("#notice-text")).to_contain_text("keeps nothing")
        chat.ask("Hi")
        chat.ask("Once more")
        assert len(stub.asked[1]["messages"]) == 3
        chat.button("New chat").click()
        chat.button("Hi").click()
        expect(chat.questions).to_have_count(2)


def test_a_long_conversation_is_there_at_once(chat: Chat) -> None:
    import_text(chat, long_talk(500))
    chat.page.locator("#list .open").click()
    expect(chat.answers).to_have_count(250)
    expect(chat.answers.last).to_be_in_viewport()
    chat.page.reload()
    expect(chat.answers).to_have_count(250)
    expect(chat.answers.last).to_be_in_viewport()
