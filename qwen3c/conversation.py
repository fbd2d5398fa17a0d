"""A conversation with a model: its messages, its settings and the session that remembers them.

The chat on a terminal and other front ends for people share it. Tokens already in the session are not
computed again; of a stopped reply, the part that came stays.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .drivers.batch import CachedSession
from .drivers.generate import Generation
from .drivers.sampler import Sampling
from .model import Model
from .system.files import write_whole
from .text.chat import StopStrings, may_think, normalized
from .text.tools import ToolSet, format_of

SETTINGS = ("max_tokens", *(f.name for f in fields(Sampling)), "context", "overflow", "stop")
OVERFLOW = ("stop", "drop")


class Conversation:
    """A conversation. settings: by the names in SETTINGS; None or absent is the default.

    context: positions of the session. overflow: what happens once the conversation no longer fits into them;
    "stop" refuses the question, "drop" leaves the oldest turns out of the prompt. `messages` keeps all turns;
    the first `forgotten` are left out of prompts, but for system messages.
    """

    def __init__(
        self,
        model: Model,
        context: int | None = None,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        **settings: Any,
    ) -> None:
        self.model = model
        self.session = CachedSession(model, context)
        self.system = system
        self.thinking = thinking
        self.tools: Sequence[dict[str, Any]] | None = None  # what replies may call: see Model.chat_prompt
        self.settings: dict[str, Any] = {}
        self.forgotten = 0
        self._context = self.session.context  # default of the setting "context"
        self._n_replies = 0
        self._before: list[dict[str, Any]] = []  # the messages before the last question
        self._asked: list[dict[str, Any]] = []  # those messages and the last question
        self._generation: Generation | None = None  # the reply to the last question
        # render once, so that the template refuses a system prompt now and not at the first question
        model.chat_prompt([{"role": "user", "content": ""}], thinking)
        for name, value in settings.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        """Change a setting from the next reply on; None for the default. ValueError for a bad value."""
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
        if name == "max_tokens":
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"max_tokens = {value!r} is not a whole number of at least 1")
        elif name == "context":
            if value != self.session.context:
                self.session = CachedSession(self.model, self._context if value is None else value)
                self.forgotten = 0
        elif name == "overflow":
            if value not in (None, *OVERFLOW):
                raise ValueError(f"overflow = {value!r} is neither {' nor '.join(OVERFLOW)}")
        elif name == "stop":
            StopStrings([value] if isinstance(value, str) else value or ())
        elif value is not None:
            Sampling(**{name: value})
        self.settings[name] = value

    def effective_settings(self) -> dict[str, Any]:
        """Every setting as the next reply will use it; None means no bound, or a seed to be drawn."""
        given = {f.name: self.settings.get(f.name) for f in fields(Sampling)}
        sampling = self.model.sampling(may_think(self.model.metadata["thinking"], self.thinking), **given)
        others = {
            "max_tokens": self.settings.get("max_tokens"),
            "context": self.session.context,
            "overflow": self.settings.get("overflow") or OVERFLOW[0],
            "stop": self.settings.get("stop") or (),
        }
        return {name: others[name] if name in others else getattr(sampling, name) for name in SETTINGS}

    @property
    def last_seed(self) -> int | None:
        """The seed of the last reply; None if there is none yet."""
        return self._generation.stats.seed if self._generation else None

    def set_thinking(self, thinking: bool) -> None:
        """Switch thinking from the next reply on. ValueError if the model cannot."""
        self.model.chat_template.check_thinking(thinking)
        self.thinking = thinking

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, without the system prompt; the last reply as far as it came.

        A question whose reply has no token yet is not among them.
        """
        if self._generation is None or not self._generation.tokens:
            return self._before
        return [*self._asked, self._generation.reply.message()]

    def ask(self, text: str, **options: Any) -> Generation:
        """Say `text`; the reply to iterate over. options: cancel, progress and logprobs of Model.generate.

        ValueError, and no change, if the conversation does not fit the context any more.
        """
        return self.answer(self.question(text), **options)

    def answer_calls(self, results: Sequence[str], **options: Any) -> Generation:
        """Tell what the calls of the last reply came to, in their order; the reply to that. options: see
        ask.
        """
        told = [{"role": "tool", "content": text} for text in results]
        return self.answer([*self.messages, *told], **options)

    def regenerate(self, **options: Any) -> Generation:
        """Another reply in place of the last one. ValueError if there is none."""
        return self.answer(self.last_question(), **options)

    def question(self, text: str) -> list[dict[str, Any]]:
        """The messages with which `text` is said; nothing is said yet."""
        return [*self.messages, {"role": "user", "content": text}]

    def last_question(self) -> list[dict[str, Any]]:
        """The messages before the last reply. ValueError if there is none."""
        messages = self.messages
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("there is no reply yet to make again")
        return messages[:-1]

    def with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`messages` after the system prompt, if there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]

    def take(self, asked: list[dict[str, Any]], reply: dict[str, Any]) -> None:
        """Go on from a reply that came from elsewhere: the messages it answers, and its own."""
        self._before, self._generation = [*asked, reply], None

    def clear(self) -> None:
        """Forget all messages but the system prompt."""
        self._before, self._generation, self.forgotten = [], None, 0

    def answer(self, asked: list[dict[str, Any]], **options: Any) -> Generation:
        """The model's reply to question() or last_question(); see ask()."""
        forgotten, prompt = self._fitting(asked)
        settings = {
            name: value for name, value in self.settings.items() if name not in ("context", "overflow")
        }
        if settings.get("seed") is not None:
            settings["seed"] += self._n_replies  # or regenerate() would give the same reply
        settings["stop"] = settings.get("stop") or ()
        format = format_of(self.model.chat_template.source)
        if self.tools and format != "hermes":
            options["toolset"] = ToolSet(self.tools, format)
        generation = self.model.generate(prompt, session=self.session, **settings, **options)
        self._before, self._asked, self._generation = self.messages, asked, generation
        self.forgotten = forgotten
        self._n_replies += 1
        return generation

    def _fitting(self, asked: list[dict[str, Any]]) -> tuple[int, list[int]]:
        """(how many of the oldest messages are left out, the prompt made of the others).

        With overflow "drop" the prompt leaves room for a reply, unless the last turn alone is too long. Once
        turns are dropped, they are dropped until half of the context is free, because all later turns are
        then read again, which should be rare.
        """
        starts = [i for i, message in enumerate(asked) if message["role"] == "user"] or [0]
        forgotten = min(self.forgotten, starts[-1])
        prompt = self._prompt(asked, forgotten)
        context = self.session.context
        room = min(self.settings.get("max_tokens") or context, context // 4)
        if self.settings.get("overflow") == "drop" and len(prompt) > context - room:
            starts = [i for i in starts if i > forgotten] or [forgotten]
            fits = bisect.bisect_left(
                starts[:-1], True, key=lambda i: len(self._prompt(asked, i)) <= context // 2
            )
            forgotten = starts[fits]
            prompt = self._prompt(asked, forgotten)
        return forgotten, prompt

    def _prompt(self, asked: list[dict[str, Any]], forgotten: int) -> list[int]:
        kept = [message for message in asked[:forgotten] if message["role"] == "system"]
        return self.model.chat_prompt(
            self.with_system([*kept, *asked[forgotten:]]), self.thinking, self.tools
        )

    def save(self, path: str) -> None:
        """Write the conversation to a file: the whole of it or nothing. ~ is the home directory."""
        target = _expanded(path)
        if target.exists():
            read_conversation(target)  # raises unless the file is a conversation: nothing else is overwritten
        data = {"qwen3c": "conversation", "system": self.system, "messages": self.messages}
        try:
            write_whole(target, json.dumps(data, ensure_ascii=False, indent=1))
        except OSError as error:
            # the error names a temporary file that the user does not know
            raise OSError(error.errno, error.strerror, str(target)) from None

    def load(self, path: str) -> None:
        """Go on from a file that save() wrote. ValueError or OSError, and no change, if it is not such a
        file.
        """
        system, messages = read_conversation(_expanded(path))
        self.system, self._before, self._generation, self.forgotten = system, messages, None, 0


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home directory") from None


def read_conversation(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """(system prompt, messages) of a file that Conversation.save wrote; ValueError if it is another."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")  # reading a pipe would block
    try:
        data = json.loads(path.read_bytes())
        if data["qwen3c"] != "conversation" or not isinstance(data["system"], (str, type(None))):
            raise ValueError("is not one")
        return data["system"], normalized(data["messages"]) if data["messages"] else []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "is not one"
        raise ValueError(f"{path} is not a saved conversation ({reason})") from None
