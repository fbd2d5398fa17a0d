"""Templates: what `transformers` renders, and nothing a hostile one tries.

python -m pytest tests/text/test_template.py
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from qwen3c.text import template
from qwen3c.text.template import ChatTemplateError, Renderer

MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
GROWING = (
    "{% set n = namespace(s='x') %}{% for i in range(70) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class": "{{ ''.__class__ }}",
    "init": "{{ messages.__init__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('echo out > canary').read() }}",
    "attr filter": "{{ messages|attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "subscript": "{{ messages['__class__'] }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "loops": LOOPS,
    "loops in a filter": "{{ range(99999)|map('string')|join('x' * 900) }}",
    "text": "{{ 'x' * 10**10 }}",
    "large text": "{{ 'x' * 10**8 }}",
    "list": "{{ [1] * 10**10 }}",
    "range": "{{ range(10**10)|list }}",
    "growing": GROWING,
    "power": "{{ 10**(10**10) }}",
    "big number": "{{ 7**(10**8) % 10 }}",
    "format width": "{{ '%10000000000d' % 1 }}",
    "format spec": "{{ '{:>10000000000}'.format(1) }}",
    "center": "{{ 'x'|center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "replace": "{{ ('x' * 2000000)|replace('x', 'y' * 100) }}",
    "join": "{{ 'a'.join(['b' * 1000000] * 10000) }}",
    "lorem ipsum": "{{ lipsum(n=10000000) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "nesting": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "syntax": "{% if %}",
    "unknown filter": "{{ messages|nothing }}",
    "undefined": "{{ nothing.at.all }}",
    "output": "{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line(
    renderer: Renderer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    with pytest.raises(ChatTemplateError) as caught:
        renderer.render(HOSTILE[name], MESSAGES)
    assert time.monotonic() - begin < 8  # 1 s of processor time; the rest is a busy machine
    assert str(caught.value).startswith("chat template: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_after_a_hostile_template_others_render(renderer: Renderer) -> None:
    for hostile in (LOOPS, HOSTILE["text"], HOSTILE["power"], HOSTILE["syntax"]):
        with pytest.raises(ChatTemplateError):
            renderer.render(hostile, MESSAGES)
        assert renderer.render("{{ messages[0].content }}", MESSAGES) == "hi"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of the child from /proc")
def test_the_child_stays_small() -> None:
    renderer = Renderer()
    renderer.render("{{ 'x' * 10**6 }}", MESSAGES)
    child = renderer._child
    assert child is not None
    for name in ("large text", "growing", "join"):
        status = Path(f"/proc/{child.pid}/status").read_text()
        peak = int(status.split("VmPeak:")[1].split()[0]) * 1024
        assert peak < 300e6
        with pytest.raises(ChatTemplateError, match="memory"):
            renderer.render(HOSTILE[name], MESSAGES)
        renderer.render("x", MESSAGES)
        child = renderer._child
        assert child is not None


def test_templates_find_what_transformers_gives_them(renderer: Renderer) -> None:
    def text(template: str) -> str:
        return renderer.render(template, MESSAGES | {"tool": {"b": "<é&'>", "a": [1, None, True]}})

    assert text("{{ tool|tojson }}") == '{"b": "<é&\'>", "a": [1, null, true]}'
    assert text("{{ tool|tojson(indent=1) }}").startswith('{\n "b"')
    assert text("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert text("a\n    {% if true %}\nb\n    {% endif %}\nc") == "a\nb\nc"  # trim_blocks and lstrip_blocks
    assert text("{% generation %}said{% endgeneration %}") == "said"
    assert text("{{ strftime_now('%Y') }}").isdigit()
    assert text("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}") == "2"
    with pytest.raises(ChatTemplateError, match=r"^chat template: TemplateError: roles must alternate$"):
        text("{{ raise_exception('roles must\\nalternate') }}")


def test_large_conversations_render(renderer: Renderer) -> None:
    content = "é🎉" * 1_000_000
    assert renderer.render("{{ messages }}", {"messages": content}) == content
    assert renderer.render("{{ messages }}", {"messages": "after"}) == "after"


def test_lone_surrogates_pass_through(renderer: Renderer) -> None:
    assert renderer.render("{{ a }}", {"a": "x\ud800y"}) == "x\ud800y"


@pytest.mark.parametrize("value", [{1, 2}, object(), print])
def test_only_plain_data_goes_to_a_template(renderer: Renderer, value: object) -> None:
    with pytest.raises(ChatTemplateError, match="not plain JSON data"):
        renderer.render("{{ a }}", {"a": value})


def test_threads_share_a_renderer(renderer: Renderer) -> None:
    results: dict[int, str] = {}

    def render(i: int) -> None:
        results[i] = renderer.render("{{ a }}", {"a": str(i) * 1000})

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: str(i) * 1000 for i in range(8)}


def test_a_forked_process_gets_a_child_of_its_own() -> None:
    script = (
        "import os, sys; from qwen3c.text.template import Renderer; r = Renderer(); r.render('a', {})\n"
        "pid = os.fork(); ok = r.render('{{ x }}', {'x': str(os.getpid())}) == str(os.getpid())\n"
        "if pid: ok = ok and os.waitpid(pid, 0)[1] == 0 and r.render('b', {}) == 'b'\n"
        "sys.exit(not ok)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 0


def test_the_child_does_not_outlive_its_renderer() -> None:
    renderer = Renderer()
    renderer.start()
    child = renderer._child
    assert child is not None
    os.kill(child.pid, 0)
    del renderer
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_child_that_was_killed_is_replaced(renderer: Renderer) -> None:
    renderer.start()
    assert renderer._child is not None
    renderer._child.send_signal(signal.SIGKILL)
    renderer._child.wait()
    assert renderer.render("again", {}) == "again"


# ----------------------------------------------------------------------------
# Interrupted, at every line


SOURCE = Path(template.__file__).read_text().splitlines()


def interrupt(line: int, call: Callable[[], object]) -> bool:
    """Make call() with a KeyboardInterrupt at line number `line` of template.py; False if fewer lines ran.

    Lines that enter or leave a `with` do not count: there a tracer is called, but no signal is handled
    between taking a lock and the block, nor between the block and the release.
    """
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if frame.f_code.co_filename != template.__file__:
            return None
        if event == "line" and not SOURCE[frame.f_lineno - 1].lstrip().startswith("with "):
            passed += 1
            if passed == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    assert passed < line
    return False


@pytest.mark.parametrize("state", ["idle", "running", "last"])
def test_after_an_interrupt_at_any_line_no_answer_is_taken_for_another(state: str) -> None:
    """state: the child's before the interrupted rendering. The two renderings after it must be right."""
    lines = 0
    while True:
        renderer = Renderer()
        if state != "idle":
            renderer.start()
        mine = "x" * (2 << 20) if state == "last" else f"interrupted at {lines}"
        if not interrupt(lines + 1, lambda r=renderer, m=mine: r.render("{{ a }}", {"a": m})):  # type: ignore[misc]
            break
        lines += 1
        assert renderer.render("{{ a }}", {"a": f"after {lines}"}) == f"after {lines}", lines
        assert renderer.render("{{ a }}", {"a": f"later {lines}"}) == f"later {lines}", lines
        assert not renderer._lock.locked()
    assert lines > 20


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
def test_an_interrupted_child_does_not_stay() -> None:
    def children() -> int:
        return len(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    before, renderer = children(), Renderer()
    renderer.start()
    for line in range(12, 24):  # the lines from the request on
        interrupt(line, lambda: renderer.render("{{ a }}", {"a": "x"}))
        renderer.render("{{ a }}", {"a": "x"})
        assert children() <= before + 1, line


def test_a_child_in_the_middle_of_a_line_is_not_asked_again() -> None:
    """Ctrl-C while a long conversation is being written or its answer read."""
    renderer = Renderer()
    for seconds in (0.001, 0.01, 0.03, 0.1):
        timer = threading.Timer(seconds, signal.raise_signal, (signal.SIGINT,))
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            renderer.render("{{ a }}", {"a": "x" * (4 << 20)})
            timer.join()
            time.sleep(0.2)
        timer.join()
        assert renderer.render("{{ a }}", {"a": str(seconds)}) == str(seconds)


def test_a_fork_interrupted_while_it_starts_its_child_leaves_the_parents_alone() -> None:
    renderer = Renderer()
    renderer.render("a", {})
    for line in range(1, 40):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                interrupt(line, renderer.start)
                os._exit(renderer.render("{{ x }}", {"x": "mine"}) != "mine")
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, line
        assert renderer.render("{{ x }}", {"x": line}) == str(line), line


# ----------------------------------------------------------------------------
# Where the system gives no more


def test_without_a_thread_to_be_had_a_template_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    renderer = Renderer()
    assert renderer.render("{{ a }}", {"a": "x"}) == "x"
    with pytest.raises(ChatTemplateError, match="processor time"):
        renderer.render(LOOPS, {})


def test_without_a_process_to_be_had_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*arguments: object, **options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(ChatTemplateError, match=r"^chat template: no process .*: Resource temporarily"):
        Renderer().render("a", {})


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_templates_that_overdo_it_leave_no_files_open(renderer: Renderer) -> None:
    renderer.render("a", {})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ChatTemplateError):
            renderer.render(HOSTILE["large text"], MESSAGES)
    renderer.render("a", {})
    assert len(os.listdir("/proc/self/fd")) <= before + 2
