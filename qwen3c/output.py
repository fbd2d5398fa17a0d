"""How a reply is shown: as text while it comes, or as one line of JSON; and how fast it was."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from .generate import Event, Generation
from .terminal import DIM, RESET, StatusLine, has_colour, interruptible, note


class ReplyWriter:
    """A reply on its way to stdout: the answer as it is; thoughts dim, or between tags, or not at all."""

    def __init__(self, hide_thinking: bool = False) -> None:
        self._hide = hide_thinking
        dim = has_colour(sys.stdout)
        self._begin, self._end = (DIM, RESET + "\n\n") if dim else ("<think>\n", "\n</think>\n\n")
        self._thinking = False
        self._last = "\n"

    def add(self, event: Event) -> None:
        if event.text and event.thinking != self._thinking:
            self._switch()
        if event.text and not (event.thinking and self._hide):
            self._put(event.text)
        if event.tool_call:
            self._put(f"<tool_call>\n{json.dumps(event.tool_call, ensure_ascii=False)}\n</tool_call>\n")

    def end(self, generation: Generation) -> None:
        """Leave the terminal as it was, at the start of a line. Call this however the reply ended."""
        if self._thinking:
            self._switch()
        if self._last != "\n":
            self._put("\n")

    def _switch(self) -> None:
        self._thinking = not self._thinking
        if not self._hide:
            self._put(self._begin if self._thinking else self._end)
        elif self._thinking:
            note("(thinking, not shown)")

    def _put(self, text: str) -> None:
        self._last = text[-1]
        sys.stdout.write(text)
        sys.stdout.flush()


class JsonWriter:
    """A reply as one line of JSON on stdout, once it has ended."""

    def __init__(self, token_text: Callable[[list[int]], str]) -> None:
        self._token_text = token_text
        self._tokens: list[dict[str, Any]] = []

    def add(self, event: Event) -> None:
        if event.logprob is not None and event.token is not None:
            top = [self._token(id, logprob) for id, logprob in event.top_logprobs or ()]
            self._tokens.append(self._token(event.token, event.logprob) | {"top_logprobs": top})

    def end(self, generation: Generation) -> None:
        line = dataclasses.asdict(generation.reply)
        line |= line.pop("stats")
        if self._tokens:
            line["logprobs"] = self._tokens
        print(json.dumps(line, ensure_ascii=False), flush=True)

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {"token": id, "text": self._token_text([id]), "logprob": logprob}


def speed_line(generation: Generation) -> str:
    """Counts and rates of a reply, and why it ended if not by itself."""
    stats, session = generation.stats, generation.session
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens} tok{cached} {_rate(stats.prefill_rate)}",
        f"reply {stats.generated_tokens} tok {_rate(stats.decode_rate)}",
        f"context {len(session.tokens)}/{session.context}",
        f"seed {stats.seed}",
    ]
    if stats.finish_reason == "length":
        full = stats.prompt_tokens + stats.generated_tokens >= session.context
        parts.append("cut: context full (-c)" if full else "cut at max tokens (-n)")
    if stats.finish_reason == "cancelled":
        parts.append("stopped")
    return " | ".join(parts)


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.{0 if tokens_per_second >= 100 else 1}f} tok/s"


def show(ask: Callable[..., Generation], writer: ReplyWriter | JsonWriter) -> Generation:
    """Show the reply that `ask`, called with cancel and progress, begins. Ctrl-C ends it early.

    stdout gets what `writer` makes of it, stderr progress through a long prompt and the speed line.
    """
    status = StatusLine()
    with interruptible() as interrupted:
        generation = ask(
            cancel=interrupted,
            progress=lambda done, total: status.show(lambda: f"reading {done}/{total} tokens"),
        )
        try:
            for event in generation:
                status.clear()
                writer.add(event)
        finally:
            status.clear()
            writer.end(generation)
    note(speed_line(generation))
    return generation
