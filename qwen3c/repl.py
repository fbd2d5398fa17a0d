"""Chat on a terminal: messages and slash commands in, replies out.

A line that begins with / and a known word is a command. What Qwen understands itself stays a message:
/no_think, and /think with text after it. A space before the / makes any line a message.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from .conversation import Conversation
from .generate import Generation
from .output import JsonWriter, ReplyWriter, show
from .terminal import MessageReader, note, one_line

HELP = """\
/help               this
/clear              forget what was said
/system [TEXT]      show or set the system prompt
/set [NAME VALUE]   show or change a setting; VALUE "default" takes it back
/think, /nothink    switch thinking on or off
/regen              another reply to the last question
/save FILE          write the conversation to a file
/load FILE          go on from a saved conversation
/exit               leave, as Ctrl-D does
\"\"\" before and after makes several lines one message; a pasted text is one message anyway.
Ctrl-C stops a reply; what it said until then is kept."""


class Repl:
    """Reads messages until there are no more. writer: makes what shows a reply. options: Model.generate."""

    def __init__(
        self,
        conversation: Conversation,
        writer: Callable[[], ReplyWriter | JsonWriter],
        **options: Any,
    ) -> None:
        self._conversation = conversation
        self._writer = writer
        self._options = options
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: note(HELP),
            "clear": self._clear,
            "system": self._system,
            "set": self._set,
            "think": lambda _: self._switch_thinking(True),
            "nothink": lambda _: self._switch_thinking(False),
            "regen": lambda _: self._answer(conversation.regenerate),
            "save": self._save,
            "load": self._load,
        }

    def run(self) -> int:
        """The exit status: 2 if something failed and nobody sat there to see it."""
        reader = MessageReader()
        try:
            while self._take(reader):
                pass
        finally:
            reader.close()
        return 2 if self._failed and not sys.stdin.isatty() else 0

    def _take(self, reader: MessageReader) -> bool:
        """One message or command; False when there are no more."""
        try:
            text = reader.read()
            command = parse_command(text)
            if command == ("exit", ""):
                return False
            if command:
                self._run_command(*command)
            elif text.strip():
                self._answer(functools.partial(self._conversation.ask, text))
        except EOFError:
            if sys.stdin.isatty():
                print(file=sys.stderr)
            return False
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(file=sys.stderr)
            note("(Ctrl-D or /exit leaves)")
        except (ValueError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.filename is None:
                raise  # stdout is gone
            self._failed = True
            note(f"error: {one_line(error)}")
        return True

    def _run_command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise ValueError(
                f"unknown command /{name} (/help lists them; a space before the / sends it as text)"
            )
        self._commands[name](argument)

    def _answer(self, ask: Callable[..., Generation]) -> None:
        generation = show(lambda **options: ask(**options, **self._options), self._writer())
        if not generation.tokens:
            note("(nothing was said; the question is not kept)")
        if generation.reply.finish_reason == "cancelled" and not sys.stdin.isatty():
            raise KeyboardInterrupt  # nobody is there to go on

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        note("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text.strip('"') or None
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
        words = argument.split()
        if len(words) == 2:
            self._conversation.set(words[0], None if words[1] == "default" else _number(words[1]))
        elif words:
            raise ValueError("usage: /set NAME VALUE")
        else:
            for name, value in self._conversation.effective_settings().items():
                chosen = self._conversation.settings.get(name) is not None
                note(f"{name} {value}{'' if chosen else ' (default)'}")


def parse_command(text: str) -> tuple[str, str] | None:
    """(name, argument) of a slash command, or None for a message."""
    match = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    if not match or (match[1] == "think" and match[2]):
        return None
    return match[1], match[2] or ""


def _given(path: str) -> str:
    if not path:
        raise ValueError("which file?")
    return path


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
