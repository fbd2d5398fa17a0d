"""A conversation with a model: its messages, its settings and the session that remembers them.

What the chat on a terminal and any other front end for people share. Tokens already in the session are
not computed again; a reply that was stopped stays as far as it came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .chat import may_think, normalized
from .files import write_whole
from .generate import CachedSession, Generation
from .model import Model
from .sampler import Sampling

SETTINGS = ("max_tokens", *(f.name for f in fields(Sampling)))


class Conversation:
    """context: positions of the session. settings: the names in SETTINGS; None or absent is the default."""

    def __init__(
        self,
        model: Model,
        context: int | None = None,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        stop: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.model = model
        self.session = CachedSession(model, context)
        self.system = system
        self.thinking = thinking
        self.settings: dict[str, Any] = {}
        self._stop = stop
        self._n_replies = 0
        self._before: list[dict[str, Any]] = []  # the messages before the last question
        self._asked: list[dict[str, Any]] = []  # and with it
        self._generation: Generation | None = None  # the reply to it
        # what the template refuses is better known before the first question
        model.chat_prompt([{"role": "user", "content": ""}], thinking)
        for name, value in settings.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        """Change a setting from the next reply on; None for the default. ValueError if it cannot be."""
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
        if name == "max_tokens":
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"max_tokens = {value!r} is not a whole number of at least 1")
        elif value is not None:
            Sampling(**{name: value})
        self.settings[name] = value

    def effective_settings(self) -> dict[str, Any]:
        """Every setting as the next reply will use it; None is no bound, or a seed nobody chose."""
        given = {name: value for name, value in self.settings.items() if name != "max_tokens"}
        sampling = self.model.sampling(may_think(self.model.metadata["thinking"], self.thinking), **given)
        return {name: getattr(sampling, name, self.settings.get(name)) for name in SETTINGS}

    def set_thinking(self, thinking: bool) -> None:
        """Switch thinking from the next reply on. ValueError if the model cannot."""
        self.model.chat_template.check_thinking(thinking)
        self.thinking = thinking

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said so far, the system prompt aside, and of the last reply as much as there is.

        Without one token of reply it is as if the question had not been asked.
        """
        if self._generation is None or not self._generation.tokens:
            return self._before
        return [*self._asked, self._generation.reply.message()]

    def ask(self, text: str, **options: Any) -> Generation:
        """Say `text`; the reply to iterate over. options: cancel, progress and logprobs of Model.generate.

        ValueError if the conversation does not fit the context any more; then nothing was said.
        """
        return self._reply([*self.messages, {"role": "user", "content": text}], options)

    def regenerate(self, **options: Any) -> Generation:
        """Another reply in place of the last one. ValueError if there is none."""
        messages = self.messages
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("there is no reply yet to make again")
        return self._reply(messages[:-1], options)

    def clear(self) -> None:
        """Forget what was said, but not the system prompt."""
        self._before, self._generation = [], None

    def _reply(self, asked: list[dict[str, Any]], options: dict[str, Any]) -> Generation:
        system = [{"role": "system", "content": self.system}] if self.system else []
        settings = dict(self.settings)
        if settings.get("seed") is not None:
            settings["seed"] += self._n_replies  # else asking again would bring the same again
        generation = self.model.generate(
            self.model.chat_prompt([*system, *asked], self.thinking),
            session=self.session,
            stop=self._stop,
            **settings,
            **options,
        )
        self._before, self._asked, self._generation = self.messages, asked, generation
        self._n_replies += 1
        return generation

    def save(self, path: str) -> None:
        """Write the conversation to a file: the whole of it or nothing."""
        target = Path(path).expanduser()
        if target.exists():
            read_conversation(target)  # nothing but a conversation is written over
        data = {"qwen3c": "conversation", "system": self.system, "messages": self.messages}
        write_whole(target, json.dumps(data, ensure_ascii=False, indent=1))

    def load(self, path: str) -> None:
        """Go on from a file that save() wrote. ValueError or OSError, and nothing changed, if it is none."""
        system, messages = read_conversation(Path(path).expanduser())
        self.system, self._before, self._generation = system, messages, None


def read_conversation(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """(system prompt, messages) of a file that Conversation.save wrote; ValueError if it is another."""
    try:
        data = json.loads(path.read_bytes())
        if data["qwen3c"] != "conversation" or not isinstance(data["system"], (str, type(None))):
            raise ValueError("is not one")
        return data["system"], normalized(data["messages"]) if data["messages"] else []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "is not one"
        raise ValueError(f"{path} is not a saved conversation ({reason})") from None
