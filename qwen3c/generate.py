"""The token loop: prompt tokens in, events out. Every front end uses this one.

prefill    what the session does not hold already, piece by piece
decode     sample a token, turn it into text, forward it; until one of the reasons to stop
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .chat import THINK, Piece, ReplyStream, last_control_token
from .sampler import Sampler, Sampling

if TYPE_CHECKING:
    from .model import Model

FinishReason = Literal["stop", "length", "cancelled"]

FIRST_PIECE = 64  # tokens of the prompt forwarded at first
PIECE_SECONDS = 0.5  # about how long a piece of the prompt takes: how soon a cancel or a progress line comes
LARGEST_PIECE = 256  # tokens; the engine computes no more at once


@dataclass(frozen=True, slots=True)
class Event:
    """What one token of a reply brought; the last event of a reply has a finish_reason."""

    token: int | None  # None if the reply ended without a further token
    text: str  # what can be shown now: often "" while a character, tag or stop string is unfinished
    thinking: bool  # whether `text` is thought, not answer
    finish_reason: FinishReason | None = None
    tool_call: dict[str, Any] | None = None  # {"name": ..., "arguments": {...}}, once complete
    logprob: float | None = None  # of `token`, in nats, before penalties and temperature
    top_logprobs: list[tuple[int, float]] | None = None  # (token, logprob), the most likely first


@dataclass
class Stats:
    """Counts and times of one reply, filled in as it goes."""

    seed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the session
    read_tokens: int = 0  # of the prompt, computed for this reply; a cancel leaves it short of all
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0  # from the first token to the last
    finish_reason: FinishReason | None = None

    @property
    def prefill_rate(self) -> float:
        """Tokens per second over what was computed of the prompt."""
        return self.read_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first token, which the prefill brought; 0 if there was one only."""
        return max(self.generated_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


@dataclass
class Reply:
    """The events of one reply, put together."""

    text: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: Event) -> None:
        if event.thinking:
            self.thinking += event.text
        else:
            self.text += event.text
        if event.tool_call:
            self.tool_calls.append(event.tool_call)
        self.finish_reason = event.finish_reason

    def message(self) -> dict[str, Any]:
        """The reply as a message, for the prompts that come after it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in self.tool_calls]
        return message


class CachedSession:
    """A session that knows its tokens, so that a prompt costs only what differs from what went before.

    tokens: those whose keys and values the session holds. context: how many it can hold.
    """

    def __init__(self, model: Model, context: int | None = None) -> None:
        self.session = model.session(context)
        self.context = self.session.context
        self.tokens: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common prefix with `prompt`, but for its last token; return its length.

        Only what `tokens` says is kept, whatever else the session may hold.
        """
        limit = min(len(self.tokens), len(prompt) - 1)  # the last one is computed again for its logits
        common = next((i for i in range(limit) if self.tokens[i] != prompt[i]), limit)
        self.rewind(common)
        return common

    def forward(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append `ids`; return the logits of the last one, shape (vocab_size,)."""
        logits = self.session.forward(ids)
        self.tokens += ids  # an interrupt before this leaves a token too many in the session: see reuse()
        return logits

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on."""
        del self.tokens[position:]
        self.session.rewind(position)


class Generation(Iterator[Event]):
    """One reply on its way: iterate for its events.

    See Model.generate for the arguments. `reply`, `tokens` (those sampled) and `stats` fill meanwhile;
    the iteration may be left at any time.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        session: CachedSession,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        cancel: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._prompt = _checked_prompt(prompt, session.context, model.config.context)
        self._budget = _budget(max_tokens, session.context - len(self._prompt))
        if logprobs is not None and not 0 <= logprobs <= model.config.n_tokens:
            raise ValueError(f"logprobs = {logprobs} is outside 0..{model.config.n_tokens}")
        self._sampler = Sampler(sampling, self._prompt, model.config.n_tokens, model.undefined_tokens)
        stops = [stop] if isinstance(stop, str) else stop
        think = model.tokenizer.control_id(THINK)
        in_thought = think is not None and last_control_token(model.tokenizer, self._prompt) == think
        self._stream = ReplyStream(model.tokenizer, in_thought, stops)
        self._end_tokens = frozenset(model.metadata["eos_token_ids"])
        self.session = session
        self._logprobs = logprobs
        self._cancelled = cancel or (lambda: False)
        self._progress = progress or (lambda done, total: None)
        self.tokens: list[int] = []
        self.reply = Reply()
        self.stats = Stats(seed=self._sampler.seed, prompt_tokens=len(self._prompt))
        self._events = self._run()

    def __next__(self) -> Event:
        event = next(self._events)
        self.reply.add(event)
        return event

    def _run(self) -> Iterator[Event]:
        logits = self._prefill() if self._budget else None
        while logits is not None and not self._cancelled():
            begin = time.perf_counter()
            event = self._next_event(logits)
            self.stats.decode_seconds += time.perf_counter() - begin
            yield event
            if event.finish_reason:
                return
            begin = time.perf_counter()
            logits = self.session.forward(self.tokens[-1:])
            self.stats.decode_seconds += time.perf_counter() - begin
        reason: FinishReason = "cancelled" if self._budget else "length"
        piece = self._last_piece(Piece(), reason)
        yield Event(None, piece.text, piece.thinking, reason)

    def _prefill(self) -> NDArray[np.float32] | None:
        """The logits after the prompt, or None if cancelled on the way."""
        done = self.stats.cached_tokens = self.session.reuse(self._prompt)
        size, logits = FIRST_PIECE, None
        while done < len(self._prompt):
            if self._cancelled():
                return None
            begin = time.perf_counter()
            logits = self.session.forward(self._prompt[done : done + size])
            seconds = time.perf_counter() - begin
            done = min(done + size, len(self._prompt))
            self.stats.read_tokens = done - self.stats.cached_tokens
            self.stats.prefill_seconds += seconds
            self._progress(done, len(self._prompt))
            if seconds < PIECE_SECONDS / 2:
                size = min(2 * size, LARGEST_PIECE)
            elif seconds > 2 * PIECE_SECONDS:
                size = max(size // 2, 1)
        return logits

    def _next_event(self, logits: NDArray[np.float32]) -> Event:
        token = self._sampler.sample(logits)
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        logprob, top_logprobs = None, None
        if self._logprobs is not None:
            logprob, top_logprobs = self._sampler.logprobs(logits, token, self._logprobs)
        ends = token in self._end_tokens
        piece = Piece() if ends else self._stream.push(token)
        reason: FinishReason | None = None
        if ends or self._stream.stopped:
            reason = "stop"
        elif len(self.tokens) == self._budget:
            reason = "length"
        if reason:
            piece = self._last_piece(piece, reason)
        return Event(token, piece.text, piece.thinking, reason, piece.tool_call, logprob, top_logprobs)

    def _last_piece(self, piece: Piece, reason: FinishReason) -> Piece:
        """`piece` and what was held back after it."""
        self.stats.finish_reason = reason
        rest = self._stream.finish()
        return Piece(piece.text + rest.text, (piece if piece.text else rest).thinking, piece.tool_call)


class ContextFullError(ValueError):
    """A prompt is longer than the context of its session."""


def _checked_prompt(prompt: Sequence[int], context: int, largest: int) -> list[int]:
    """The token ids of `prompt`. context: of the session; largest: the context that the model can have."""
    if isinstance(prompt, str):
        raise ValueError("prompt is text; pass token ids, from model.tokenizer.encode or model.chat_prompt")
    ids = [operator.index(id) for id in prompt]
    if not ids:
        raise ValueError("prompt is empty: there is nothing to go on from")
    if len(ids) > context:
        room = f"can hold {largest} (-c {largest})" if largest > context else "holds no more"
        raise ContextFullError(f"prompt is {len(ids)} tokens, the context holds {context}; this model {room}")
    return ids


def _budget(max_tokens: int | None, room: int) -> int:
    """How many tokens may come: prompt and reply together stay within the context."""
    if max_tokens is None:
        return room
    if isinstance(max_tokens, bool) or operator.index(max_tokens) < 0:
        raise ValueError(f"max_tokens = {max_tokens} is negative")
    return min(operator.index(max_tokens), room)
