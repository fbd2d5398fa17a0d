"""Chat on a terminal: messages and slash commands in, replies out.

A line that begins with / and a word is a command. What Qwen itself understands stays a message: /no_think,
and /think with text after it. So does a path such as /usr/bin. A space before the / makes any line a message.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import glob
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation import OVERFLOW, SETTINGS, Conversation
from ..drivers.generate import Generation
from ..drivers.reply import ContextFullError, Reply
from ..system.terminal import abandon_closed_streams, escaped, note
from .command import one_line
from .options import SMALLER_CONTEXT
from .output import JsonWriter, ReplyWriter, show
from .reader import MessageReader, history_path, state_directory
from .signals import answering, endable
from .tools import Tools

if TYPE_CHECKING:
    from .cloud import Cloud

HELP = """\
/help               this; also /?
/clear              forget what was said
/system [TEXT]      show or set the system prompt; /system clear: none
/set [NAME [VALUE]] show or change settings; VALUE "default" takes it back
/think, /nothink    switch thinking on or off
/regen              another reply to the last question
/tools              the tools of other servers (--mcp), and how these are
/save FILE          write the conversation to a file
/load FILE          go on from a saved conversation
/exit               leave; also /quit, /bye and Ctrl-D
\"\"\" before and after makes several lines one message; a pasted text is one message anyway.
A space before / makes the line a message. Tab completes commands, settings and files.
Ctrl-C stops a reply; what it said until then is kept."""
ALIASES = {"?": "help", "quit": "exit", "bye": "exit"}
NO_ARGUMENT = ("clear", "think", "nothink", "regen", "tools")
ROUNDS = 10  # of calls in answer to one message
WAYS_OUT = (
    "/clear forgets what was said, /set overflow drop lets the oldest turns go, /set context N makes room"
)
BACKEND = "backend"  # the setting that is not the conversation's: who is asked
KEPT = 9  # interrupted conversations: the older ones go


class Repl:
    """Reads messages until there are no more.

    writer: makes what shows a reply. cloud: who is asked before the model. tools: those that replies may
    call. options: Model.generate.
    """

    def __init__(
        self,
        conversation: Conversation,
        writer: Callable[[], ReplyWriter | JsonWriter],
        cloud: Cloud | None = None,
        tools: Tools | None = None,
        **options: Any,
    ) -> None:
        self._conversation = conversation
        self._cloud = cloud
        self._tools = tools
        self._reader = MessageReader(self._completions)
        self._writer = writer
        self._options = options
        self._failed = False
        self._typed = sys.stdin.isatty()  # asked now, because a closed terminal is no longer a tty
        self._ended: Callable[[], int] = lambda: 0
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: note(HELP),
            "clear": self._clear,
            "system": self._system,
            "set": self._set,
            "think": lambda _: self._switch_thinking(True),
            "nothink": lambda _: self._switch_thinking(False),
            "regen": lambda _: self._answer(conversation.last_question()),
            "save": self._save,
            "load": self._load,
            "tools": self._list_tools,
            "exit": lambda _: None,
        }

    def run(self) -> int:
        """Run until the input ends. Returns 0, 2 if an error came up while stdin was no terminal, 128 + N
        after signal N.
        """
        if not self._typed:
            self._take_all()
            return 2 if self._failed else 0
        _tell_of_interrupted()
        with answering(signal.default_int_handler, "SIGINT"), endable() as self._ended:
            try:
                self._take_all()
                return 0
            except (KeyboardInterrupt, OSError) as error:
                closed = isinstance(error, OSError) and error.errno == errno.EIO
                number = self._ended() or (signal.SIGHUP if closed else 0)
                if not number:
                    raise
                self._keep()
                abandon_closed_streams()
                return 128 + number

    def _take_all(self) -> None:
        while self._take():
            if self._ended():
                raise KeyboardInterrupt

    def _take(self) -> bool:
        """One message or command; False when there are no more."""
        try:
            text = self._reader.read()
            command = parse_command(text)
            if command and command[0] == "exit":
                return False
            if command:
                self._run_command(*command)
            elif text.strip():
                self._answer(self._conversation.question(text))
        except EOFError:
            if self._typed:
                print(file=sys.stderr)
            return False
        except KeyboardInterrupt:
            if not self._typed or self._ended():
                raise
            print(file=sys.stderr)
            note("(Ctrl-D or /exit leaves)")
        except (ValueError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.filename is None:
                raise  # stdout is closed
            self._failed = True
            ways_out = f"; {WAYS_OUT}" if isinstance(error, ContextFullError) else ""
            note(f"error: {one_line(error, SMALLER_CONTEXT)}{ways_out}")
        return True

    def _run_command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            names = [*self._commands, *ALIASES]
            near = difflib.get_close_matches(name, names, 1)
            near = near or [each for each in names if name.startswith(each) or each.startswith(name)]
            meant = f": /{near[0]}?" if near else ""
            raise ValueError(
                f"unknown command /{name}{meant} (/help lists them; a space before the / sends it as text)"
            )
        if argument and name in NO_ARGUMENT:
            raise ValueError(f"/{name} takes nothing after it")
        self._commands[name](argument)

    def _answer(self, asked: list[dict[str, Any]]) -> None:
        """Show a reply to the messages and take it into the conversation: the cloud's, else the model's."""
        speaker = ""
        if self._cloud:
            got = self._cloud.reply(self._conversation, asked, self._writer())
            if not isinstance(got, str):
                said = got.reply.text or got.reply.thinking
                if said:
                    self._conversation.take(asked, got.reply.message())
                self._end(bool(said), got.reply.finish_reason)
                return
            name = escaped(str(self._conversation.model.metadata["name"]))
            speaker = f"local: {name}"
            if got != "route_local":
                speaker += f" (fallback: {got})"
        generation = self._show(functools.partial(self._conversation.answer, asked), speaker)
        self._answer_calls(generation.reply)

    def _answer_calls(self, reply: Reply) -> None:
        """The replies to what the tools come to that a reply calls, and those they call in turn."""
        for _ in range(ROUNDS):
            if self._tools is None or not reply.tool_calls or reply.finish_reason == "cancelled":
                return
            confirm = self._reader.ask if self._typed and sys.stderr.isatty() else None
            try:
                results = [self._tools.run(call, confirm) for call in reply.tool_calls]
            except KeyboardInterrupt:
                if not self._typed or self._ended():
                    raise
                print(file=sys.stderr)
                note("(cancelled; the model is not told)")
                return
            self._conversation.tools = self._tools.functions
            reply = self._show(functools.partial(self._conversation.answer_calls, results)).reply
        if reply.tool_calls:
            note(f"({ROUNDS} rounds of calls are enough for one message)")

    def _end(self, said: bool, finish_reason: str | None) -> None:
        if not said:
            note("(nothing was said; the question is not kept)")
        if finish_reason == "cancelled" and not self._typed:
            raise KeyboardInterrupt  # nobody is there to go on

    def _show(self, ask: Callable[..., Generation], speaker: str = "") -> Generation:
        """Show the reply that `ask` begins. speaker: who it is from, where that could be somebody else."""

        def told(**options: Any) -> Generation:
            before = self._conversation.forgotten
            generation = ask(**options, **self._options)
            if self._conversation.forgotten > before:
                note(
                    f"({self._conversation.forgotten - before} oldest messages are no longer told to the "
                    "model)"
                )
            return generation

        generation = show(told, self._writer(), speaker)
        self._end(bool(generation.tokens), generation.reply.finish_reason)
        return generation

    def _list_tools(self, _: str) -> None:
        if self._tools is None:
            raise ValueError("there are no tools: --mcp FILE names servers that have some")
        self._tools.refresh()
        self._conversation.tools = self._tools.functions
        note(self._tools.listed())

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        note("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "clear" else _unquoted(text) or None
        note(f"system: {self._conversation.system or '(none)'}")

    def _switch_thinking(self, thinking: bool) -> None:
        self._conversation.set_thinking(thinking)
        note(f"thinking {'on' if thinking else 'off'}")

    def _save(self, path: str) -> None:
        self._conversation.save(_given(path))
        note(f"{len(self._conversation.messages)} messages saved to {path}")

    def _load(self, path: str) -> None:
        self._conversation.load(_given(path))
        note(f"{len(self._conversation.messages)} messages from {path}")

    def _set(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        if name and name not in self._settings:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(self._settings)}")
        if text.strip() and self._cloud and name == BACKEND:
            self._cloud.set_route(text.strip())
        elif text.strip():
            self._conversation.set(name, _value(name, text.strip()))
        for each in (name,) if name else self._settings:
            note(self._setting(each))

    @property
    def _settings(self) -> tuple[str, ...]:
        return (*SETTINGS, BACKEND) if self._cloud else SETTINGS

    def _setting(self, name: str) -> str:
        """A setting and its value, as a person reads them."""
        if self._cloud and name == BACKEND:
            return f"{name} {self._cloud.route}{' (default)' * (self._cloud.route == self._cloud.routes[0])}"
        conversation = self._conversation
        value = conversation.effective_settings()[name]
        if name == "seed" and value is None:
            last = "" if conversation.last_seed is None else f"; the last was {conversation.last_seed}"
            value = f"new for each reply{last}"
        elif name == "max_tokens" and value is None:
            value = "as many as fit"
        elif name == "context":
            value = f"{value} of {conversation.model.config.context}"
        elif not isinstance(value, (int, float, str)):
            value = json.dumps(value, ensure_ascii=False) if value else "none"
        chosen = conversation.settings.get(name) not in (None, (), [])
        return f"{name} {value}{'' if chosen else ' (default)'}"

    def _completions(self, line: str) -> list[str]:
        """The lines that `line`, a command typed so far, can be completed to."""
        command, space, argument = line.partition(" ")
        if not space:
            words = [name + " " * (name not in NO_ARGUMENT) for name in (*self._commands, *ALIASES)]
            return sorted("/" + word for word in words if word.startswith(command[1:].lower()))
        if command in ("/save", "/load"):
            return [f"{command} {path}" for path in _paths(argument)]
        if command != "/set":
            return []
        name, space, value = argument.partition(" ")
        if not space:
            return [f"/set {each} " for each in self._settings if each.startswith(name)]
        choices = {"overflow": OVERFLOW, BACKEND: self._cloud.routes if self._cloud else ()}
        values = ("default", *choices.get(name, ()))
        return [f"/set {name} {each}" for each in values if each.startswith(value)]

    def _keep(self) -> None:
        """Save the conversation that a signal ended; the next chat says where."""
        directory = state_directory()
        if directory is None or not self._conversation.messages:
            return
        path = directory / time.strftime(f"interrupted-%Y%m%d-%H%M%S-{os.getpid()}.json")
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._conversation.save(str(path))
            path.chmod(0o600)
            for old in _interrupted()[:-KEPT]:
                old.unlink()
            told = f"ended by a signal; /load {path} goes on from here"
        except OSError as error:
            told = f"ended by a signal; the conversation is lost: {one_line(error)}"
        with contextlib.suppress(OSError):
            note(told)


def _interrupted() -> list[Path]:
    """The files of conversations that signals ended, oldest first."""
    directory = state_directory()
    return sorted(directory.glob("interrupted-*.json")) if directory else []


def _tell_of_interrupted() -> None:
    """Say where the last interrupted conversation is, unless a message was typed after it."""
    history = history_path()
    with contextlib.suppress(OSError):
        for path in _interrupted()[-1:]:
            typed_at = history.stat().st_mtime if history and history.exists() else 0.0
            if path.stat().st_mtime >= typed_at:
                note(f"the last conversation was interrupted; /load {path} goes on from there")


def parse_command(text: str) -> tuple[str, str] | None:
    """(name, argument) of a slash command, or None for a message."""
    match = re.fullmatch(r"/([a-z][\w-]*|\?)(?:\s+(.*))?", text.rstrip(), re.DOTALL | re.IGNORECASE)
    if not match:
        return None
    name, argument = match[1].lower(), match[2] or ""
    if name == "no_think" or (name == "think" and argument):
        return None
    return ALIASES.get(name, name), argument


def _given(path: str) -> str:
    if not path:
        raise ValueError("which file?")
    return path


def _unquoted(text: str) -> str:
    """`text` without the quotes around it, if there are two."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _value(name: str, text: str) -> Any:
    """The value of a setting from the text typed. stop: a text, or JSON of a text or a list of texts."""
    if text == "default":
        return None
    try:
        value = json.loads(text)
    except ValueError:
        if name not in ("overflow", "stop"):
            raise ValueError(f"{text!r} is not a number") from None
        return [text] if name == "stop" else text
    if name == "stop":
        return value if isinstance(value, list) else [value if isinstance(value, str) else text]
    if name == "logit_bias" and isinstance(value, dict):
        return {int(id): bias for id, bias in value.items()}  # in JSON the keys are texts
    return value


def _paths(start: str) -> list[str]:
    """Paths that begin with `start`; folders end in /, and a leading ~ stays as typed."""
    home = os.path.expanduser(start)
    found = sorted(glob.glob(glob.escape(home) + "*"))
    return [start + path[len(home) :] + "/" * os.path.isdir(path) for path in found]
