"""run.py as a person types it: status lines, the program's name, and the default mode.

python -m pytest tests/terminal/test_run.py
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from modes import SLOWLY
from screen import ROOT, Terminal, run_typed
from small_models import TINY_QWEN3, export_small_model, write_small_model

RUN = [sys.executable, str(ROOT / "run.py")]
TINY = str(TINY_QWEN3)
# run.py with status lines that appear at once, so that tests need no slow work
AT_ONCE = [*SLOWLY, "at-once", "run.py"]
ONE_THREAD: dict[str, str | None] = {"QWEN3C_THREADS": "1"}


def drawn(raw: bytes) -> list[str]:
    """The successive states of redrawn lines, without escape codes."""
    parts = re.split(rb"\r\x1b\[K", raw)[1:]
    return [re.split(rb"\r?\n", part)[0].decode() for part in parts]


def text_file(folder: Path) -> str:
    (folder / "text").write_text("def add(a, b):\n    return a + b\n" * 20)
    return str(folder / "text")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-m", "generate", "-i", "x", "-n", "2"], [r"loading \S+tiny-qwen3\.bin  0 s"]),
        (["-m", "generate", "-i", "x", "-n", "2", "--huge-pages"],
         [r"loading \S+tiny-qwen3\.bin into huge pages  0 s"]),
        (["-m", "trace", "-i", "x", "-n", "1"], [r"tracing \d+ tokens and what follows them  0 s",
                                                 r"tracing \d+ tokens  0 s"]),
        (["-m", "trace", "-i", "x", "-n", "1", "--html", "{folder}/t.html"], [r"drawing \S+/t\.html  0 s"]),
        (["-m", "generate", "-i", "x", "-n", "9", "--json"], [r"replying  \d tok"]),
        (["-m", "info", "--verify"], [r"\[#* *\] +\d+%  0\.00 of 0\.00 GB checked"]),
        (["-m", "perplexity", "{text}"], [r"cutting \d+ characters into tokens",
                                          r"\d+%  \d+ of \d+ tokens  \d+ tok/s  perplexity \d"]),
    ],
    ids=["load", "huge pages", "trace", "page", "json", "verify", "perplexity"],
)  # fmt: skip
def test_what_takes_long_says_what_it_does_and_leaves_no_trace_of_it(
    arguments: list[str], expected: list[str], tmp_path: Path
) -> None:
    if "--huge-pages" in arguments and not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        pytest.skip("this system has no huge pages")
    places = {"folder": str(tmp_path), "text": text_file(tmp_path)}
    command = [*AT_ONCE, TINY, *(argument.format(**places) for argument in arguments)]
    status, text, raw = run_typed(command, columns=200, rows=200, env=ONE_THREAD)
    assert status == 0 and "Traceback" not in text, text
    for pattern in expected:
        assert any(re.search(pattern, line) for line in drawn(raw)), (pattern, drawn(raw))
        assert not re.search(pattern, text), text


def test_the_seconds_of_a_wait_go_on_while_nothing_else_is_heard_of_it(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from qwen3c.system.terminal import waiting\n"
        "with waiting('busy', delay=0):\n"
        "    while not os.path.exists(sys.argv[1]):\n"
        "        time.sleep(0.01)\n"
        "print('done')\n"
    )
    with Terminal([sys.executable, "-c", script, tmp_path / "go"]) as terminal:
        terminal.wait_for("busy  0 s")
        terminal.wait_for("busy  1 s")
        (tmp_path / "go").touch()
        assert terminal.finish() == 0 and terminal.text == "done"


@pytest.mark.parametrize("columns", [20, 80])
@pytest.mark.parametrize(
    "arguments", [["-m", "info", "--verify"], ["-m", "perplexity", "{text}"], ["-m", "trace", "-i", "x"]]
)
def test_what_is_drawn_fits_the_window(arguments: list[str], columns: int, tmp_path: Path) -> None:
    command = [*AT_ONCE, TINY, *(argument.format(text=text_file(tmp_path)) for argument in arguments)]
    status, text, raw = run_typed(command, columns=columns, env=ONE_THREAD)
    assert status == 0, text
    lines = [line for line in drawn(raw) if re.match(r"loading|tracing|cutting|\[|\s*\d+%", line)]
    assert lines and all(len(line) < columns for line in lines)


@pytest.mark.parametrize("arguments", [["-m", "info", "--verify"], ["-m", "perplexity", "{text}"]])
def test_a_dumb_terminal_gets_no_escape_codes(arguments: list[str], tmp_path: Path) -> None:
    command = [*AT_ONCE, TINY, *(argument.format(text=text_file(tmp_path)) for argument in arguments)]
    status, text, raw = run_typed(command, env={**ONE_THREAD, "TERM": "dumb"})
    assert status == 0 and b"\x1b" not in raw, text


def test_ctrl_c_in_a_long_measurement_leaves_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("def add(a, b):\n    return a + b\n" * 30_000)
    with Terminal([*AT_ONCE, TINY, "-m", "perplexity", tmp_path / "long"], env=ONE_THREAD) as terminal:
        terminal.wait_for("tok/s")
        terminal.press("ctrl-c")
        assert terminal.finish() == 130
        assert "tok/s" not in terminal.text and "Traceback" not in terminal.text, terminal.text


def test_bench_fits_80_columns_says_what_it_does_and_explains_every_word(tmp_path: Path) -> None:
    model = export_small_model(tmp_path)
    script = (
        "from qwen3c.inspect import bench; bench.PROBE_BYTES = 1 << 20; from qwen3c.cli import run; "
        "run.main()"
    )
    command = [sys.executable, "-c", script, str(model), "-m", "bench"]
    status, text, raw = run_typed(command, rows=50, env=ONE_THREAD)
    assert status == 0, text
    for line in raw.decode().replace("\x1b[K", "").splitlines():  # "\r" ends one too
        assert len(line) < 80, line
    shown = drawn(raw)
    assert "comparing a few tokens with the scalar kernels" in shown
    for test in ("pp254", "tg64", "loop64"):
        assert f"{test}: warming up" in shown and f"{test}: run 2 of at most 5" in shown
        assert "warming up" not in text and ": run " not in text
        assert re.search(rf"^\| {test} ", text, re.MULTILINE)
        assert re.search(rf"^{test} +.*tokens", text, re.MULTILINE), text
    for column in ("t/s", "GB/s", "G MAC/s", "% of limit"):
        assert re.search(rf"^{column}  +\w", text, re.MULTILINE), text


def test_a_prompt_typed_without_a_mode_is_answered_and_the_line_says_so() -> None:
    for options, said in (
        ([], "chat template, thinking on"),
        (["-m", "generate"], "raw text"),
        (["--raw"], "raw text"),
    ):
        status, text, _ = run_typed(
            [*RUN, TINY, "-i", "hello", "-n", "2", *options], columns=200, env=ONE_THREAD
        )
        assert status == 0 and f"| {said} |" in text, text


def test_without_a_prompt_a_chat_begins(tmp_path: Path) -> None:
    env = {**ONE_THREAD, "XDG_STATE_HOME": str(tmp_path)}
    with Terminal([*RUN, TINY], columns=200, env=env) as terminal:
        terminal.wait_for("/help lists the commands")
        # a Ctrl-D that comes before the prompt is lost when the terminal goes over to line editing
        terminal.wait_until(lambda: terminal.current_line == ">", "the prompt")
        terminal.press("ctrl-d")
        assert terminal.finish() == 0


def test_a_prompt_to_complete_may_be_typed() -> None:
    with Terminal([*RUN, TINY, "--raw", "-n", "2"], columns=200, env=ONE_THREAD) as terminal:
        terminal.wait_for("reading from the terminal; Ctrl-D ends the text")
        terminal.type("import\r")
        terminal.press("ctrl-d")
        assert terminal.finish() == 0 and "| raw text |" in terminal.text


def test_mistakes_are_one_line_on_a_terminal_too(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "Qwen3-0.6B")
    for arguments, said in [
        (["info"], "info: No such file or directory; did you mean -m info?"),
        ([source], "`python export.py Qwen3-0.6B model.bin` converts it"),
        (
            ["Qwen/Qwen3-0.6B"],
            "Qwen/Qwen3-0.6B: is not in the cache, and HF_HUB_OFFLINE is set: unset it once",
        ),
        (["-m", "info", "-i", "hi"], "-i/--prompt belongs to -m generate or trace, not to -m info"),
        (["--think", "--no-think"], "argument --no-think: not allowed with argument --think"),
    ]:
        named = [Path(argument).name if argument == source else argument for argument in arguments]  # type: ignore[attr-defined]
        env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "QWEN3C_CACHE": str(tmp_path / "cache")}
        status, text, _ = run_typed([*RUN, *named], columns=300, cwd=tmp_path, env=env)
        assert status == 2 and text.startswith("run.py: error: ") and said in text and "\n" not in text, text


def test_an_installed_command_is_the_script_by_its_own_name(tmp_path: Path) -> None:
    """A script for pyproject.toml's entry point, as pip makes it."""
    declared = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0]
    entries = re.findall(r'^([\w-]+) = "([\w.]+):(\w+)"$', declared, re.MULTILINE)
    assert [name for name, _, _ in entries] == ["qwen3c", "qwen3c-export", "qwen3c-train"]
    for name, module, function in entries:
        command = tmp_path / name
        command.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        env = {"PYTHONPATH": str(ROOT)}
        status, text, _ = run_typed([sys.executable, command, "--help"], rows=200, env=env, cwd=tmp_path)
        assert status == 0 and re.match(rf"usage: {name} (?!-)", text), text
        status, text, raw = run_typed(
            [sys.executable, command, "--nonsense"], columns=20, env=env, cwd=tmp_path
        )
        assert status == 2 and text.replace("\n", " ").startswith(f"{name}: error: "[:20].strip()), text
        assert b"\x1b" not in raw


def test_python_m_calls_itself_by_that_name() -> None:
    status, text, _ = run_typed([sys.executable, "-m", "qwen3c", "--help"], rows=200)
    assert status == 0 and text.startswith("usage: python -m qwen3c [MODEL]"), text


@pytest.mark.skipif(sys.platform != "linux", reason="needs an address space with a limit")
def test_too_little_memory_is_one_line_that_says_what_was_short() -> None:
    for limit, said in (
        ("-v 200000", r"of address space, ulimit -v leaves \d+ of 195 MiB"),
        ("-n 8", "ulimit -n"),
    ):
        shell = f'ulimit {limit}; exec "$0" "$@"'
        command = ["/bin/sh", "-c", shell, *RUN, TINY, "-i", "x", "-n", "1"]
        status, text, _ = run_typed(command, columns=300, env=ONE_THREAD)
        assert status == 2 and re.match(rf"run\.py: error: .*{said}", text) and "\n" not in text, text
