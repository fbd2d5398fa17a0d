"""Debian's Chromium at the page of a stub: what the tests of the page type, press and read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Page, expect, sync_playwright
from stub import Stub, serving

CHROMIUM = shutil.which("chromium")
TIMEOUT = 10_000  # ms: for what is to happen, on a busy machine
expect.set_options(timeout=TIMEOUT)

WATCH = """
addEventListener("securitypolicyviolation", event => (window.violations ??= []).push(event.violatedDirective));
"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Chat:
    """A visit to the page, in a browser profile of its own, that notes what must not happen."""

    def __init__(self, browser: Browser, stub: Stub, **options: Any) -> None:
        self.stub = stub
        self.context = browser.new_context(**{"viewport": {"width": 1180, "height": 860}, **options})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=stub.url)
        self.context.set_default_timeout(TIMEOUT)
        self.elsewhere: list[str] = []  # requests to other servers
        self.paths: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.page = self.tab()

    def tab(self) -> Page:
        page = self.context.new_page()
        page.add_init_script(WATCH)
        page.on("request", lambda request: self._note(request.url))
        page.on("dialog", self._dismiss)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._read_console)
        page.goto(self.stub.url)
        return page

    def _note(self, url: str) -> None:
        (self.paths if url.startswith(self.stub.url + "/") else self.elsewhere).append(url)

    def _dismiss(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _read_console(self, message: ConsoleMessage) -> None:
        # a status of 4xx is told by the browser itself
        if message.type == "error" and "the server responded with a status" not in message.text:
            self.errors.append(message.text)

    @property
    def box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.assistant")

    @property
    def questions(self) -> Locator:
        return self.page.locator("article.user")

    def button(self, name: str, within: Locator | None = None) -> Locator:
        return (within or self.page).get_by_role("button", name=name, exact=True)

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def rest(self) -> None:
        """Until no reply is being written."""
        expect(self.page.get_by_role("log")).to_have_attribute("aria-busy", "false", timeout=60_000)

    def ask(self, text: str) -> Locator:
        """Say `text` and wait for the whole reply."""
        before = self.questions.count()
        self.say(text)
        expect(self.questions).to_have_count(before + 1)
        self.rest()
        return self.answers.last

    def quiet(self) -> None:
        """Nothing happened that must never happen."""
        assert self.elsewhere == [] and self.dialogs == [] and self.errors == []
        assert self.page.evaluate("window.violations ?? []") == []

    def close(self) -> None:
        self.context.close()


@contextlib.contextmanager
def visit(browser: Browser, stub: Stub, **options: Any) -> Iterator[Chat]:
    chat = Chat(browser, stub, **options)
    try:
        yield chat
    finally:
        chat.close()


def stored(chat: Chat, kind: str) -> list[dict[str, Any]]:
    """Everything of a kind that the browser keeps."""
    script = """kind => new Promise(resolve => {
        indexedDB.open("qwen3c", 1).onsuccess = opened => {
            const records = opened.target.result.transaction(kind).objectStore(kind).getAll();
            records.onsuccess = () => { opened.target.result.close(); resolve(records.result); };
        };
    })"""
    found: list[dict[str, Any]] = chat.page.evaluate(script, kind)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("needs chromium")
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def served() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


@pytest.fixture
def stub(served: Stub) -> Stub:
    served.reset()
    return served


@pytest.fixture
def chat(browser: Browser, stub: Stub) -> Iterator[Chat]:
    with visit(browser, stub) as opened:
        yield opened
        opened.quiet()
