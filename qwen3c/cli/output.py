"""How a reply is shown: as text while it comes, or as one line of JSON; and how fast it was."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any, Protocol

from ..drivers.generate import Generation
from ..drivers.reply import Event, Reply, Stats
from ..system.terminal import DIM, RESET, Progress, StatusLine, columns, escaped, has_colour, note, visible
from .signals import interruptible

WAIT = 1.0  # seconds after which a reply that is shown only at its end reports its length so far
PREDICTED_FROM = 0.1  # share of a prompt that must be read before the time left is estimated


class Replied(Protocol):
    """What a writer asks of a reply that has ended, whoever spoke."""

    reply: Reply


class ReplyWriter:
    """Writes a reply to stdout: the answer as it is; thoughts dim, or between tags, or not at all.

    For a terminal the model's control characters are escaped: they could move its cursor or reprogram it.
    """

    def __init__(self, hide_thinking: bool = False) -> None:
        self._hide = hide_thinking
        dim = has_colour(sys.stdout)
        self._begin, self._end = (DIM, RESET + "\n\n") if dim else ("<think>\n", "\n</think>\n\n")
        self._is_terminal = sys.stdout.isatty()
        self._thinking = False
        self._last = "\n"

    def add(self, event: Event) -> None:
        if event.text and event.thinking != self._thinking:
            self._switch()
        if event.text and not (event.thinking and self._hide):
            self._put_models(event.text)
        for tool_call in event.tool_calls:
            call = json.dumps(tool_call, ensure_ascii=False)
            self._put_models(f"<tool_call>\n{visible(call) if self._is_terminal else call}\n</tool_call>\n")

    def end(self, replied: Replied, speaker: str = "") -> None:
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

    def _put_models(self, text: str) -> None:
        self._put(escaped(text, keep="\n\t") if self._is_terminal else text)

    def _put(self, text: str) -> None:
        self._last = text[-1]
        sys.stdout.write(text)
        sys.stdout.flush()


class JsonWriter:
    """A reply as one line of JSON on stdout, once it has ended."""

    def __init__(self, token_text: Callable[[list[int]], str]) -> None:
        self._token_text = token_text
        self._tokens: list[dict[str, Any]] = []
        self._status = StatusLine(WAIT)
        self._n_events = 0

    def add(self, event: Event) -> None:
        self._n_events += 1
        self._status.show(lambda: f"replying  {self._n_events} tok")
        if event.logprob is not None and event.token is not None:
            top = [self._token(id, logprob) for id, logprob in event.top_logprobs or ()]
            self._tokens.append(self._token(event.token, event.logprob) | {"top_logprobs": top})

    def end(self, replied: Replied, speaker: str = "") -> None:
        self._status.clear()
        line = dataclasses.asdict(replied.reply)
        line |= line.pop("stats")
        if speaker:
            line["backend"] = speaker
        if self._tokens:
            line["logprobs"] = self._tokens
        text = json.dumps(line, ensure_ascii=False)
        print(escaped(text) if sys.stdout.isatty() else text, flush=True)

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {"token": id, "text": self._token_text([id]), "logprob": logprob}


class Reading:
    """Progress through a prompt: call it with the statistics of its reply after every piece.

    The cost of a token is constant for the weights, and grows with its depth for attention. So the time left
    is estimated by a straight line through the seconds per token of the pieces read so far.
    """

    def __init__(self) -> None:
        self._progress = Progress(self._words, predict=self._seconds_left)
        self._stats = Stats()
        # of each piece: tokens, depth of its middle token, seconds per token
        self._pieces: list[tuple[float, float, float]] = []

    def __call__(self, stats: Stats, done: int, total: int) -> None:
        tokens = stats.read_tokens - self._stats.read_tokens
        seconds = stats.prefill_seconds - self._stats.prefill_seconds
        self._pieces.append((tokens, done - tokens / 2, seconds / tokens))
        self._stats = dataclasses.replace(stats)
        self._progress(done, total)

    def clear(self) -> None:
        """Erase what was drawn."""
        self._progress.clear()

    def _words(self, done: float, total: float, _: float) -> str:
        return f"reading {done:.0f} of {total:.0f} tok  {self._stats.prefill_rate:.0f} tok/s"

    def _seconds_left(self, done: float, total: float, _: float) -> float | None:
        if self._stats.read_tokens < PREDICTED_FROM * (total - self._stats.cached_tokens):
            return None
        at_zero, per_position = cost_by_depth(self._pieces)
        return (total - done) * (at_zero + per_position * (total + done) / 2)


def cost_by_depth(pieces: list[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b): a token at depth d costs about a + b * d seconds; neither is negative.

    The weighted least squares of pieces of (tokens, depth, seconds per token).
    """
    n = sum(tokens for tokens, _, _ in pieces)
    mean_depth = sum(tokens * depth for tokens, depth, _ in pieces) / n
    mean_cost = sum(tokens * cost for tokens, _, cost in pieces) / n
    spread = sum(tokens * (depth - mean_depth) ** 2 for tokens, depth, _ in pieces)
    together = sum(tokens * (depth - mean_depth) * (cost - mean_cost) for tokens, depth, cost in pieces)
    slope = max(together / spread, 0.0) if spread else 0.0
    slope = min(slope, mean_cost / mean_depth)  # a steeper line would be negative at depth 0
    return mean_cost - slope * mean_depth, slope


def speed_line(generation: Generation, width: int = sys.maxsize, speaker: str = "") -> str:
    """Counts and rates of a reply, and why it ended if not by itself.

    speaker: who replied, where it could have been another. Speaker, reply and why it ended always stand
    there; of the rest only what fits into `width`.
    """
    stats, session = generation.stats, generation.session
    parts = {
        "speaker": speaker,
        "prompt": f" | {_prompt_part(stats)}",
        "cached": f" ({stats.cached_tokens} cached)" if stats.cached_tokens else "",
        "reply": f" | reply {stats.generated_tokens} tok{_rate(stats.decode_rate)}",
        "drafts": f" ({stats.tokens_per_pass:.1f} tokens a pass)" if stats.accepted_tokens else "",
        "context": f" | context {len(session.tokens)}/{session.context}",
        "seed": f" | seed {stats.seed}",
        "end": _end_part(generation),
    }
    if not stats.generated_tokens:
        parts["reply"] = (
            ""  # the prompt is all there was: it takes the reply's place as what always stands there
        )
    chosen = {"speaker", "end", "reply" if parts["reply"] else "prompt"}
    line = ""
    for name in ("", "prompt", "drafts", "context", "cached", "seed"):
        longer = "".join(text for key, text in parts.items() if key in chosen | {name}).removeprefix(" | ")
        if line and len(longer) > width:
            break
        chosen.add(name)
        line = longer
    return line


def _prompt_part(stats: Stats) -> str:
    seen = stats.cached_tokens + stats.read_tokens
    count = f"{seen} of {stats.prompt_tokens}" if seen < stats.prompt_tokens else str(stats.prompt_tokens)
    return f"prompt {count} tok{_rate(stats.prefill_rate)}"


def _end_part(generation: Generation) -> str:
    stats = generation.stats
    if stats.finish_reason == "cancelled":
        return " | stopped"
    if stats.finish_reason != "length":
        return ""
    full = stats.prompt_tokens + stats.generated_tokens >= generation.session.context
    return " | cut: context full (-c)" if full else " | cut at max tokens (-n)"


def _rate(tokens_per_second: float) -> str:
    """A rate in words; "" for 0, when no token, or only the one that prefill gives, was computed."""
    digits = 0 if tokens_per_second >= 100 else 1
    return f" {tokens_per_second:.{digits}f} tok/s" if tokens_per_second else ""


def show(ask: Callable[..., Generation], writer: ReplyWriter | JsonWriter, speaker: str = "") -> Generation:
    """Show the reply that `ask`, called with cancel and progress, begins. Ctrl-C ends it early.

    stdout gets what `writer` makes of it, stderr progress through a long prompt and the speed line.
    speaker: who replies, where it could have been another.
    """
    reading = Reading()
    with interruptible() as interrupted:
        generation: Generation = ask(
            cancel=interrupted,
            progress=lambda done, total: reading(generation.stats, done, total),
        )
        try:
            for event in generation:
                reading.clear()
                writer.add(event)
        finally:
            reading.clear()
            writer.end(generation, speaker)
    width = columns(sys.stderr) - 1 if sys.stderr.isatty() else sys.maxsize
    note(speed_line(generation, width, speaker))
    return generation
