"""The token loop: prompt tokens in, events out. Every front end uses this one.

prefill    what the session does not hold already, piece by piece
decode     sample a token, turn it into text, forward it; until one of the reasons to stop
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from .sampler import Sampler, Sampling, SamplingOptions
from .text.chat import THINK, Piece, ReplyStream, last_control_token

if TYPE_CHECKING:
    from .model import Model

FinishReason = Literal["stop", "length", "cancelled"]

FIRST_PIECE = 64  # tokens of the prompt forwarded at first
PIECE_SECONDS = 0.5  # about how long a piece of the prompt takes: how soon a cancel or a progress line comes
LARGEST_PIECE = 256  # tokens; the engine computes no more at once
SHOWN = 48  # characters of a text in a repr


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


@dataclass(repr=False)
class Reply:
    """The events of one reply, put together. str() of it is its text."""

    text: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while the reply is on its way, or if an error ended it
    stats: Stats = field(default_factory=Stats)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        thought = f", {len(self.thinking)} characters of thought" if self.thinking else ""
        calls = "".join(f", calls {call['name']}" for call in self.tool_calls)
        shown = self.text if len(self.text) <= SHOWN else self.text[: SHOWN - 1] + "…"
        end = self.finish_reason or "unfinished"
        return f"<Reply {shown!r}, {self.stats.generated_tokens} tokens{thought}{calls}, {end}>"

    def add(self, event: Event) -> None:
        """Take in the next event."""
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

    tokens: those whose keys and values the session holds. context: how many it can hold. One reply at a time
    goes on in it, the newest: an older one that is asked for more is a ValueError.
    """

    def __init__(self, model: Model, context: int | None = None) -> None:
        self.model = model
        self.session = model.session(context)
        self.context = self.session.context
        self.tokens: list[int] = []
        self.n_replies = 0

    def __repr__(self) -> str:
        return (
            f"<CachedSession of {self.model.metadata['name']!r}, {len(self.tokens)} of {self.context} tokens>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CachedSession cannot be pickled or copied: its cache belongs to its model's process"
        )

    def begin_reply(self) -> int:
        """Let a new reply go on in the session; returns the number of the reply."""
        self.n_replies += 1
        return self.n_replies

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


class ReplyOptions(SamplingOptions, total=False):
    """The keywords that Model.chat and Model.complete hand on to Model.generate, which says what they are."""

    session: CachedSession | None
    stop: str | Sequence[str]
    cancel: Callable[[], bool] | None
    progress: Callable[[int, int], None] | None


class Generation(Iterator[Event], AsyncIterator[Event]):
    """One reply on its way. Model.generate makes it, and nothing is computed before the first event is asked for.

    for event in generation          the events, as they come
    async for event in generation    the same, each computed in a thread, so that an event loop is not held up;
                                     cancelling the task ends the reply
    generation.result()              run to the end: the whole Reply
    with generation: ...             close() at the end of the block: the reply ends there, if it has not

    `reply`, `tokens` (those sampled) and `stats` fill as the events come, and are empty before the first. The
    iteration may be left at any time.
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        sampling: Sampling,
        *,
        session: CachedSession | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        cancel: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.session = CachedSession(model) if session is None else _checked_session(session, model)
        self._owns_session = session is None
        self._prompt = prompt
        _check_room(len(prompt), self.session.context, model.config.context)
        self._budget = _budget(max_tokens, self.session.context - len(self._prompt))
        self._logprobs = _checked_logprobs(logprobs, model.config.n_tokens)
        self._sampler = Sampler(sampling, self._prompt, model.config.n_tokens, model.undefined_tokens)
        think = model.tokenizer.control_id(THINK)
        in_thought = think is not None and last_control_token(model.tokenizer, self._prompt) == think
        self._stream = ReplyStream(model.tokenizer, in_thought, _stops(stop))
        self._end_tokens = frozenset(model.metadata["eos_token_ids"])
        self._asked_to_stop = cancel or (lambda: False)
        self._progress = progress or (lambda done, total: None)
        self.tokens: list[int] = []
        self.stats = Stats(seed=self._sampler.seed, prompt_tokens=len(self._prompt))
        self.reply = Reply(stats=self.stats)
        self._closed = False
        self._lock = threading.RLock()  # threads that ask for events take turns
        self._events = self._run()

    def __next__(self) -> Event:
        with self._lock:
            event = next(self._events)
            self.reply.add(event)
            return event

    async def __anext__(self) -> Event:
        import asyncio  # not needed by those who do not wait, and slow to import

        # no asyncio.to_thread: a loop that shuts down would cancel its task, and the step still runs
        step = asyncio.get_running_loop().run_in_executor(None, next, self, None)
        try:
            await asyncio.wait([step])
        except asyncio.CancelledError:
            self._closed = True
            while not step.done():  # the session is nobody else's before
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([step])
            step.exception()  # of the step, if it failed: the cancellation is what the task hears of
            self.close()
            raise
        event = step.result()
        if event is None:
            raise StopAsyncIteration
        return event

    def result(self) -> Reply:
        """Run to the end and return the whole reply. ValueError if an error has ended it before."""
        for _ in self:
            pass
        if self.reply.finish_reason is None:
            raise ValueError(f"an error ended this reply after {len(self.tokens)} tokens; `reply` holds them")
        return self.reply

    def close(self) -> None:
        """End the reply here: what has come stays, and there are no more events.

        The finish_reason of a reply that had not ended is "cancelled". The memory of a session that was made for
        this reply alone is released.
        """
        self._closed = True
        with self._lock:
            if inspect.getgeneratorstate(self._events) == inspect.GEN_RUNNING:
                return  # called by `cancel` or `progress`: the step under way ends the reply
            for _ in self:  # at most one event, and nothing is computed for it
                pass
            if self._owns_session:
                self.session.rewind(0)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if inspect.getgeneratorstate(self._events) == inspect.GEN_CREATED:
            return f"<Generation, not begun: {len(self._prompt)} tokens of prompt; iterate, or call result()>"
        return f"<Generation of {self.reply!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Generation cannot be pickled or copied: it is a reply on its way; its `reply` can")

    def _cancelled(self) -> bool:
        return self._closed or self._asked_to_stop()

    def _run(self) -> Generator[Event, None, None]:
        logits = None
        if self._budget and not self._closed:
            number = self.session.begin_reply()
            logits = self._prefill()
        while logits is not None and not self._cancelled():
            begin = time.perf_counter()
            event = self._next_event(logits)
            self.stats.decode_seconds += time.perf_counter() - begin
            yield event
            if event.finish_reason:
                return
            if self._closed:
                break
            if self.session.n_replies != number:
                raise ValueError(
                    "another reply goes on in the session of this one, which cannot go on itself"
                )
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


def _check_room(n: int, context: int, largest: int) -> None:
    """ContextFullError if `n` tokens pass `context`, that of the session; largest: what the model can have."""
    if n > context:
        room = f"can hold {largest} (-c {largest})" if largest > context else "holds no more"
        raise ContextFullError(f"prompt is {n} tokens, the context holds {context}; this model {room}")


def token_ids(prompt: Sequence[int], n_ids: int) -> list[int]:
    """`prompt` as a list of at least one id below n_ids; ValueError says what is wrong with it."""
    if isinstance(prompt, str):
        raise ValueError("prompt is text; pass token ids, from model.tokenizer.encode or model.chat_prompt")
    try:
        ids = [operator.index(id) for id in prompt]
    except TypeError:
        raise ValueError(f"prompt = {_short(prompt)} is not a list of token ids") from None
    if not ids:
        raise ValueError("prompt is empty: there is nothing to go on from")
    beyond = next((i for i, id in enumerate(ids) if not 0 <= id < n_ids), None)
    if beyond is not None:
        raise ValueError(f"prompt[{beyond}] = {ids[beyond]} is no token: ids are 0 to {n_ids - 1}")
    return ids


def _checked_session(session: CachedSession, model: Model) -> CachedSession:
    if not isinstance(session, CachedSession):
        raise ValueError(
            f"session is a {type(session).__name__}, which does not know its tokens; pass a CachedSession"
        )
    if session.model is not model:
        raise ValueError(f"session belongs to another model ({session.model.path})")
    return session


def _checked_logprobs(logprobs: int | None, n_tokens: int) -> int | None:
    if logprobs is not None and not 0 <= _whole("logprobs", logprobs) <= n_tokens:
        raise ValueError(f"logprobs = {logprobs} is outside 0..{n_tokens}")
    return logprobs


def _stops(stop: str | Sequence[str]) -> list[str]:
    try:
        return [stop] if isinstance(stop, str) else list(stop)
    except TypeError:
        raise ValueError(f"stop = {_short(stop)} is not a text or a list of texts") from None


def _budget(max_tokens: int | None, room: int) -> int:
    """How many tokens may come: prompt and reply together stay within the context."""
    if max_tokens is None:
        return room
    if _whole("max_tokens", max_tokens) < 0:
        raise ValueError(f"max_tokens = {max_tokens} is negative")
    return min(_whole("max_tokens", max_tokens), room)


def _whole(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} = {_short(value)} is not a whole number") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
