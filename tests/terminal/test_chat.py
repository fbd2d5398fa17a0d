"""Chat as a person types it: any terminal, keys at any time, long prompts, every way to end.

python -m pytest tests/terminal/test_chat.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from screen import ROOT, Terminal
from small_models import TINY_QWEN3, export_small_model

from qwen3c import Model
from qwen3c.format import ModelFile, ModelWriter

RUN = [sys.executable, str(ROOT / "run.py"), "-j", "1", "-s", "1"]
TALKS_ON = ("--no-think", "-t", "1.5", "-n", "2000")  # until somebody stops it
BRIEF = ("--no-think", "-n", "4")
Chat = Callable[..., Terminal]


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    def start(
        *options: str, model: Path = TINY_QWEN3, env: dict[str, Any] | None = None, **window: Any
    ) -> Terminal:
        command = [*RUN, str(model), "-m", "chat", *options]
        return Terminal(command, env={"XDG_STATE_HOME": str(tmp_path / "state"), **(env or {})}, **window)

    return start


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and room for a prompt that takes a while to read."""
    return export_small_model(tmp_path_factory.mktemp("long"), context=40960)


def wait_for_prompt(terminal: Terminal) -> None:
    terminal.wait_until(lambda: terminal.current_line == ">", "the prompt")


def ask(terminal: Terminal, line: str) -> list[str]:
    """Type a line where the prompt stands; what is shown until it stands there again."""
    wait_for_prompt(terminal)
    before = len(terminal.lines)
    terminal.type(line + "\r")
    terminal.wait_until(
        lambda: len(terminal.lines) > before and terminal.current_line == ">", f"what {line} brings"
    )
    return terminal.lines[before:-1]


def leave(terminal: Terminal) -> None:
    wait_for_prompt(terminal)
    terminal.press("ctrl-d")
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.text


def conversation_file(path: Path, said: str) -> Path:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "ok"}]
    path.write_text(json.dumps({"qwen3c": "conversation", "system": "be kïnd", "messages": messages}))
    return path


# ----------------------------------------------------------------------------
# Windows, colours, locales


def test_the_first_screen_names_the_model_and_the_way_out(chat: Chat) -> None:
    with chat(*BRIEF) as t:
        reply = ask(t, "hello")
        assert t.lines[0].startswith("tiny-qwen3 int8 g64 ") and "thinking off" in t.lines[0]
        assert "/help lists the commands, Ctrl-D leaves" in t.lines and "> hello" in t.lines
        pattern = r"prompt \d+ tok [\d.]+ tok/s \| reply 4 tok [\d.]+ tok/s.* \| cut at max tokens \(-n\)"
        assert re.fullmatch(pattern, reply[-1]), reply  # in one line
        leave(t)


def test_in_a_narrow_window_lines_break_between_words(chat: Chat) -> None:
    with chat(*BRIEF, columns=20) as t:
        shown = " ".join(ask(t, "hello"))
        banner = " ".join(t.lines[: t.lines.index("> hello")])
        assert "temperature 0.7 top-p 0.8 top-k 20 | context 2048 of 2048" in banner
        assert re.search(r"reply 4 tok [\d.]+ tok/s \| cut at max tokens \(-n\)$", shown)
        assert "prompt" not in shown  # what matters least is left out
        leave(t)


def test_a_dumb_terminal_gets_no_escape_codes(chat: Chat) -> None:
    with chat("-n", "4", env={"TERM": "dumb"}) as t:
        ask(t, "hello")
        wait_for_prompt(t)
        t.type("two\rlines\r")  # they come at once: a paste
        t.wait_until(lambda: sum("reply 4 tok" in line for line in t.lines) == 2, "the second reply")
        wait_for_prompt(t)
        t.press("up")
        t.wait_until(lambda: t.current_line == "> two^Jlines", "the paste as one entry")
        t.press("ctrl-c")
        t.wait_for("(Ctrl-D or /exit leaves)")
        leave(t)
        assert b"\x1b" not in t.raw


@pytest.mark.parametrize("no_colour", [None, "1"])
def test_thoughts_are_dim_unless_colours_are_unwanted(
    chat: Chat, tmp_path: Path, no_colour: str | None
) -> None:
    model = export_small_model(tmp_path, thinking="always")
    with chat("-n", "3", model=model, env={"NO_COLOR": no_colour}) as t:
        ask(t, "hello")
        reply = t.raw.partition(b"hello")[2].partition(b"prompt ")[0]
        assert (b"\x1b[2m" in reply and b"\x1b[0m" in reply) is (no_colour is None)
        assert (b"<think>" in reply) is (no_colour is not None)
        leave(t)
        if no_colour:
            assert re.search(rb"\x1b\[\d*m", t.raw) is None


@pytest.mark.parametrize(
    ("locale", "shown"),
    [
        ({"LANG": "C"}, "be kïnd"),  # where nothing is known of the terminal Python takes it for a UTF-8 one
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "be k?nd"),
    ],
)
def test_a_plain_locale_shows_what_it_can(
    chat: Chat, tmp_path: Path, locale: dict[str, str], shown: str
) -> None:
    saved = conversation_file(tmp_path / "c.json", "hi")
    with chat(*BRIEF, env=locale) as t:
        ask(t, f"/load {saved}")
        assert ask(t, "/system") == [f"system: {shown}"]
        assert "reply 4 tok" in ask(t, "hello")[-1]
        leave(t)


def test_neither_a_name_nor_a_reply_reaches_the_terminal_raw(chat: Chat, tmp_path: Path) -> None:
    path, file = tmp_path / "named.bin", ModelFile(export_small_model(tmp_path))
    metadata = file.metadata | {"name": "s\x1b]0;owned\x07"}
    with ModelWriter(path, file.config, metadata, file.tokenizer, file.template) as writer:
        for tensor in writer.tensors:
            writer.write(file.data(tensor))
            writer.end_tensor()
    escape = Model(str(path), threads=1).tokenizer.encode("\x1b")[-1]
    forced = ["-n", "3", "-t", "0", "--logit-bias", f"{escape}=10000", "--no-think"]
    with chat(*forced, model=path) as t:
        reply = ask(t, "hello")
        assert t.lines[0].startswith(r"s\u001b]0;owned\u0007 int8") and reply[0] == r"\u001b" * 3
        leave(t)
        assert b"\x1b]" not in t.raw and b"\x1b\x1b" not in t.raw
    info = subprocess.run([*RUN[:2], path, "-m", "info"], capture_output=True, check=True)
    assert b"\x1b" not in info.stdout and rb"s\u001b]0;owned\u0007" in info.stdout
    piped = subprocess.run([*RUN, path, "-i", "hello", *forced], capture_output=True, check=True)
    assert piped.stdout == b"\x1b\x1b\x1b\n"  # in a pipe the text is what the model said


@pytest.mark.parametrize(
    ("redirection", "seen", "hidden"),
    [
        ("< said", ["reply 4 tok"], []),
        ("2> hidden", ["> hello"], ["tiny-qwen3 int8", "reply 4 tok"]),
        ("> hidden", ["tiny-qwen3 int8", "reply 4 tok"], ["de"]),
        ("| cat > hidden", ["tiny-qwen3 int8", "reply 4 tok"], ["de"]),
    ],
)
def test_each_stream_of_a_chat_may_be_a_pipe_alone(
    tmp_path: Path, redirection: str, seen: list[str], hidden: list[str]
) -> None:
    (tmp_path / "said").write_text("hello\n/exit\n")
    command = shlex.join([*RUN, str(TINY_QWEN3), "-m", "chat", *BRIEF])
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with Terminal(["sh", "-c", f"{command} {redirection}"], cwd=tmp_path, env=env) as t:
        if "<" not in redirection:
            wait_for_prompt(t)
            t.type("hello\r")
            t.wait_until(lambda: t.text.count(">") == 2, "the next prompt")
            wait_for_prompt(t)
            t.press("ctrl-d")
        assert t.finish() == 0
        assert "Traceback" not in t.text and all(text in t.text for text in seen), t.text
    if hidden:
        kept = (tmp_path / "hidden").read_text()
        assert "\x1b" not in kept and "\r" not in kept and all(text in kept for text in hidden), kept


# ----------------------------------------------------------------------------
# Keys


def test_ctrl_c_stops_a_reply_and_keeps_it(chat: Chat, tmp_path: Path) -> None:
    with chat(*TALKS_ON) as t:
        wait_for_prompt(t)
        t.type("write\r")
        t.wait_until(lambda: len(t.text.partition("> write")[2]) > 40, "some text")
        t.press("ctrl-c")
        t.wait_for("| stopped")
        ask(t, f"/save {tmp_path}/c.json")
        leave(t)
    question, reply = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert question["content"] == "write" and len(reply["content"]) >= 40


def test_a_long_prompt_shows_how_far_it_is_and_can_be_stopped(
    chat: Chat, long_model: Path, tmp_path: Path
) -> None:
    saved = conversation_file(tmp_path / "c.json", "ab " * 15_000)
    # float32 is slow: there is time to look
    with chat(*BRIEF, "--activations", "float32", "-c", "0", model=long_model, columns=100) as t:
        ask(t, f"/load {saved}")
        wait_for_prompt(t)
        t.type("go\r")
        reading = r"^\[#* *\] +(\d+)%  reading (\d+) of (\d+) tok  [\d,]+ tok/s  .*\d s left$"
        t.wait_until(
            lambda: re.search(reading, t.current_line), "a line with a bar, a percentage and the time left"
        )
        percent, done, total = map(int, re.search(reading, t.current_line).groups())  # type: ignore[union-attr]
        assert percent == 100 * done // total and 0 < done < total
        t.resize(40, 24)
        t.wait_until(
            lambda: re.search(r"^ *\d+%  .*s left$", t.current_line) and len(t.current_line) < 40,
            "a line that fits the narrower window",
        )
        t.resize(100, 24)
        t.wait_until(lambda: t.current_line.startswith("["), "the bar again")
        t.press("ctrl-c")
        t.wait_for("(nothing was said; the question is not kept)")
        stopped = next(line for line in t.lines if line.endswith("| stopped"))
        done, total = map(int, re.search(r"^prompt (\d+) of (\d+) tok [\d.]+ tok/s", stopped).groups())  # type: ignore[union-attr]
        assert 0 < done < total and "reply" not in stopped
        wait_for_prompt(t)
        assert not any("reading" in line for line in t.lines[-4:])  # it was erased
        leave(t)


def test_a_line_typed_ahead_is_taken_next(chat: Chat) -> None:
    with chat(*TALKS_ON) as t:
        wait_for_prompt(t)
        t.type("write\r")
        t.wait_until(lambda: len(t.text.partition("> write")[2]) > 20, "some text")
        t.press("ctrl-c")  # which throws away what was typed before it
        t.type("/set max_tokens 3\r/set max_tokens\r")
        t.wait_until(lambda: t.lines.count("max_tokens 3") == 2, "both lines to be taken")
        leave(t)


def test_ctrl_z_gives_the_terminal_back_and_fg_the_line(chat: Chat, tmp_path: Path) -> None:
    command = shlex.join([*RUN, str(TINY_QWEN3), "-m", "chat", *BRIEF])
    env = {"PS1": "SHELL> ", "XDG_STATE_HOME": str(tmp_path)}
    with Terminal(["bash", "--norc", "--noprofile", "-i"], env=env, columns=200) as t:
        t.wait_for("SHELL>")
        t.type(command + "\r")
        wait_for_prompt(t)
        t.type("half a")
        t.wait_for("> half a")
        t.press("ctrl-z")
        t.wait_until(lambda: "Stopped" in t.text and t.current_line == "SHELL>", "the shell")
        t.type("fg\r")
        t.wait_until(lambda: t.current_line == "> half a", "the line as it was")
        t.type(" line")
        t.wait_until(lambda: t.current_line == "> half a line", "what is typed on")
        t.press("enter")
        t.wait_for("reply 4 tok")
        wait_for_prompt(t)
        t.press("up")
        t.wait_until(lambda: t.current_line == "> half a line", "the whole line in the history")
        t.press("ctrl-u", "ctrl-d")
        t.wait_until(lambda: t.current_line == "SHELL>", "the end")
        t.type("exit\r")
        t.finish()


def test_a_paste_is_one_message_and_one_entry_of_the_history_also_after_a_restart(
    chat: Chat, tmp_path: Path
) -> None:
    history = tmp_path / "state" / "qwen3c" / "history"
    history.parent.mkdir(parents=True)
    history.write_text("of old \\040\n")  # as GNU readline wrote it
    with chat(*BRIEF) as t:
        wait_for_prompt(t)
        t.press("up")
        t.wait_until(lambda: t.current_line == r"> of old \040", "an entry of an older history")
        t.press("ctrl-u")
        t.type("\x1b[200~one\n\n\ttwo\x1b[201~")
        t.wait_for("> one")
        t.press("enter")
        t.wait_for("reply 4 tok")
        ask(t, f"/save {tmp_path}/c.json")
        t.press("up", "up")
        t.wait_until(lambda: t.current_line.strip() == "two", "the paste again")
        t.press("ctrl-c")
        leave(t)
    with chat(*BRIEF) as t:
        wait_for_prompt(t)
        t.press("up", "up")  # /save, then the paste
        t.wait_until(lambda: t.current_line.strip() == "two", "the paste after a restart")
        t.press("enter")
        t.wait_for("reply 4 tok")
        ask(t, f"/save {tmp_path}/d.json")
        leave(t)
    for name in ("c.json", "d.json"):
        assert json.loads((tmp_path / name).read_text())["messages"][0]["content"] == "one\n\n\ttwo"


def test_tab_completes_commands_settings_and_files_and_is_a_tab_in_a_message(
    chat: Chat, tmp_path: Path
) -> None:
    conversation_file(tmp_path / "a saved one.json", "hi")
    (tmp_path / "folder").mkdir()
    with chat(*BRIEF, columns=200) as t:
        for keys, line in [
            ("/reg\t", "> /regen"),
            ("/se\tov\tdr\t", "> /set overflow drop"),
            (f"/load {tmp_path}/a s\t", f"> /load {tmp_path}/a saved one.json"),
            (f"/save {tmp_path}/fo\t", f"> /save {tmp_path}/folder/"),
            ("/nothing\t", "> /nothing"),
            ("a\tb", "> a     b"),
        ]:
            wait_for_prompt(t)
            t.type(keys)
            t.wait_until(lambda line=line: t.current_line == line, line)  # type: ignore[misc]
            t.press("ctrl-c")
        wait_for_prompt(t)
        t.type("/s\t\t")
        t.wait_until(
            lambda: any(line.split() == ["/save", "/set", "/system"] for line in t.lines), "the choices"
        )
        t.press("ctrl-c")
        leave(t)


# ----------------------------------------------------------------------------
# Ends


def test_a_closed_terminal_loses_neither_conversation_nor_history(chat: Chat, tmp_path: Path) -> None:
    state = tmp_path / "state" / "qwen3c"
    with chat(*BRIEF) as t:
        ask(t, "at the prompt")
        t.hang_up()
        assert t.finish_unseen() == 128 + signal.SIGHUP
    (first,) = state.glob("interrupted-*.json")
    assert json.loads(first.read_text())["messages"][0]["content"] == "at the prompt"
    assert first.stat().st_mode & 0o077 == 0 and (state / "history").read_text() == "at the prompt\n"
    with chat(*TALKS_ON, columns=200) as t:
        wait_for_prompt(t)
        assert f"the last conversation was interrupted; /load {first} goes on from there" in t.lines
        assert ask(t, f"/load {first}") == [f"2 messages from {first}"]
        t.type("in a reply\r")
        t.wait_until(lambda: len(t.text.partition("> in a reply")[2]) > 40, "some text")
        t.hang_up()
        assert t.finish_unseen() == 128 + signal.SIGHUP
    last = max(state.glob("interrupted-*.json"), key=lambda path: path.stat().st_mtime)
    messages = json.loads(last.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["at the prompt", "in a reply"]
    assert len(messages[3]["content"]) > 30
    (state / "history").touch()
    with chat(*BRIEF) as t:  # something was typed since then: it is known
        wait_for_prompt(t)
        assert "interrupted" not in t.text


@pytest.mark.parametrize("speaking", [False, True])
def test_sigterm_says_where_the_conversation_is(chat: Chat, tmp_path: Path, speaking: bool) -> None:
    with chat(*TALKS_ON, columns=200) as t:
        ask(t, "/set max_tokens 4")
        ask(t, "first")
        if speaking:
            ask(t, "/set max_tokens default")
            t.type("second\r")
            t.wait_until(lambda: len(t.text.partition("> second")[2]) > 40, "some text")
        t.send_signal(signal.SIGTERM)
        assert t.finish() == 128 + signal.SIGTERM
        (path,) = (tmp_path / "state" / "qwen3c").glob("interrupted-*.json")
        assert t.lines[-1] == f"ended by a signal; /load {path} goes on from here"
        assert len(json.loads(path.read_text())["messages"]) == (4 if speaking else 2)
        assert "Traceback" not in t.text and "Ctrl-D or /exit" not in t.text


def test_a_conversation_that_cannot_be_kept_is_said_to_be_lost(chat: Chat, tmp_path: Path) -> None:
    with chat(*BRIEF, columns=200) as t:
        ask(t, "hello")
        shutil.rmtree(tmp_path / "state" / "qwen3c")
        (tmp_path / "state" / "qwen3c").write_text("")
        t.send_signal(signal.SIGTERM)
        assert t.finish() == 128 + signal.SIGTERM
        assert t.lines[-1].startswith("ended by a signal; the conversation is lost: "), t.text


def test_a_chat_that_said_nothing_leaves_nothing(chat: Chat, tmp_path: Path) -> None:
    with chat(*BRIEF) as t:
        wait_for_prompt(t)
        t.send_signal(signal.SIGTERM)
        assert t.finish() == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("state/qwen3c/interrupted*"))


def test_a_full_context_has_ways_out(chat: Chat, tmp_path: Path) -> None:
    saved = conversation_file(tmp_path / "c.json", "ab " * 200)
    with chat(*BRIEF, "-c", "128", columns=300) as t:
        ask(t, f"/load {saved}")
        (told,) = ask(t, "x")
        assert re.match(
            r"error: prompt is \d+ tokens, the context holds 128; this model can hold 2048 \(-c 2048\); "
            r"/clear forgets what was said, /set overflow drop lets the oldest turns go, "
            r"/set context N makes room",
            told,
        )
        assert ask(t, "/set overflow drop") == ["overflow drop"]
        dropped, *_, speed = ask(t, "x")
        assert dropped == "(2 oldest messages are no longer told to the model)" and "reply 4 tok" in speed
        (told,) = ask(t, "/set context 5000")
        assert told == "error: context = 5000 is outside 1..2048, the context of the model"
        assert ask(t, "/set context 2048") == ["context 2048 of 2048"]
        speed = ask(t, "y")[-1]  # and all of the conversation is told again
        assert int(re.search(r"prompt (\d+) tok", speed)[1]) > 128  # type: ignore[index]
        assert "no longer told" not in "".join(t.lines[-4:])
        leave(t)


def test_the_other_names_of_commands_and_what_is_none(chat: Chat, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with chat(*BRIEF, columns=300) as t:
        assert any("/load FILE" in line for line in ask(t, "/?")) and any(
            "/quit" in line for line in ask(t, "/Help")
        )
        for line, answer in [
            (
                "/hlep",
                "error: unknown command /hlep: /help? (/help lists them; a space before the / sends it as "
                "text)",
            ),
            ("/set-context 5", "error: unknown command /set-context: /set? "),
            ("/q", "error: unknown command /q: /quit? "),
            ("/clear it", "error: /clear takes nothing after it"),
            ('/system say "hi"', 'system: say "hi"'),
            ("/system clear", "system: (none)"),
            ('/system "clear"', "system: clear"),
            ("/set top_k 5", "top_k 5"),
            ("/set top_k default", "top_k 20 (default)"),
            ("/set seed default", "seed new for each reply (default)"),
            ("/set stop a b", 'stop ["a b"]'),
            ("/set stop default", "stop none (default)"),
            ("/set overflow away", "error: overflow = 'away' is neither stop nor drop"),
            ('/set logit_bias {"5": -3}', 'logit_bias {"5": -3}'),
            ("/save ~nosuchuser/x", "error: ~nosuchuser/x: there is no such home directory"),
            ("/load ~nosuchuser/x", "error: ~nosuchuser/x: there is no such home directory"),
            (f"/save {tmp_path}/no/c.json", f"error: {tmp_path}/no/c.json: No such file or directory"),
            (f"/load {tmp_path}/pipe", f"error: {tmp_path}/pipe is not a file"),
            ("/load /dev/zero", "error: /dev/zero is not a file"),
        ]:
            assert ask(t, line)[0].startswith(answer), line
        ask(t, "hello")
        shown = ask(t, "/set")
        assert any(
            re.fullmatch(r"seed new for each reply; the last was \d+ \(default\)", line) for line in shown
        )
        assert [line.split()[0] for line in shown][-3:] == ["context", "overflow", "stop"]
        assert not any("None" in line or "{}" in line for line in shown)
        wait_for_prompt(t)
        t.type("/Bye now\r")
        assert t.finish() == 0
